"""The bank: all linear probes of a grid, after fitting.

Probes work on standardised features. The decision values depend on the form of the target (x: channels of one region):
`candidate`: w . x per region. `region`: W x + b per region. `problem`: W [x_1 .. x_R] + b per sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from cosprobe.activations import StoredTensor, StoreSettings
from cosprobe.cells import Cell, ranges
from cosprobe.config import ProbeConfig, TrainerConfig, TrainRun
from cosprobe.differences import check_same, differences, first_difference
from cosprobe.errors import InputError
from cosprobe.files import make_folder, read_json, whole_file, write_json
from cosprobe.models import Fingerprint
from cosprobe.probes.calibration import temperatures
from cosprobe.probes.linalg import affine, blocks, classes_last, design, standardise
from cosprobe.runs import find_result
from cosprobe.runtime import say
from cosprobe.tasks import Target

FORMAT = 5
TABLES = ("weights", "biases", "penalties", "temperatures")
TENSORS, DESCRIPTION = "bank.safetensors", "bank.json"


@dataclass(frozen=True)
class Provenance:
    """How a bank was made.

    store: settings of the store with the features; None when unknown. probe, trainer, seed: settings of the fit.
    train, validation: numbers of samples. converged: for each target, numbers of converged fits and of all fits. gap:
    for each target, the largest relative gap of a fit. policies: calibrated early-exit policies. fold: the test fold of
    cross-fitting (`ProbeSamples.divisions`), 0 without it.
    """

    store: StoreSettings | None = None
    probe: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    train: int = 0
    validation: int = 0
    converged: dict[str, tuple[int, int]] = field(default_factory=dict)
    gap: dict[str, float] = field(default_factory=dict)
    policies: tuple[dict[str, Any], ...] = ()
    fold: int = 0

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Provenance:
        """The provenance from the output of `asdict`. Raises InputError when the activations have another format."""
        store = None if saved["store"] is None else StoreSettings.from_json(saved["store"])
        converged = {target: (done, fits) for target, (done, fits) in saved["converged"].items()}
        return cls(**{**saved, "store": store, "converged": converged, "policies": tuple(saved["policies"])})


@dataclass(frozen=True)
class ProbeBank:
    """All probes of one grid.

    cells: the cells, in the order of the axis cell. targets: in the form in which they were fitted. regions: number of
    regions of the features. mean, std: standardisation, from the training samples.
    weights, biases: by name of the target, [cell, width, out] and [cell, out]. width is the number of channels, for
    form `problem` regions * channels. out is 1 for form `candidate`, otherwise the number of classes.
    penalties: the chosen penalty, by name of the target. temperatures: divisors of the decision values, by name of the
    target, set by `calibrated`. provenance: how the bank was made.
    """

    cells: tuple[Cell, ...]
    targets: tuple[Target, ...]
    regions: int
    mean: Float[Tensor, "cell channel"]
    std: Float[Tensor, "cell channel"]
    weights: dict[str, Float[Tensor, "cell _width _out"]]
    biases: dict[str, Float[Tensor, "cell _out"]]
    penalties: dict[str, Float[Tensor, " cell"]]
    temperatures: dict[str, Float[Tensor, " cell"]] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)

    def __repr__(self) -> str:
        steps, layers = {c.step for c in self.cells}, {c.layer for c in self.cells}
        targets = ", ".join(f"{t.name} ({t.classes} classes)" for t in self.targets)
        return (
            f"ProbeBank({len(self.cells)} cells: steps {ranges(list(steps))}, layers {ranges(list(layers))}; "
            f"targets: {targets}; {self.regions} regions, {self.mean.shape[1]} channels)"
        )

    def with_provenance(self, **provenance: Any) -> ProbeBank:
        """The same bank with some fields of its provenance replaced."""
        return replace(self, provenance=replace(self.provenance, **provenance))

    @property
    def store(self) -> StoreSettings:
        """Settings of the store with the features of the bank. Raises InputError when the bank does not have them."""
        if self.provenance.store is None:
            raise InputError("this bank does not record the model it was made for: expected a bank saved by train.py")
        return self.provenance.store

    def check_model(self, found: Fingerprint, where: str) -> None:
        """Raises InputError, with the parts that differ, unless the bank was made for the model with the fingerprint
        `found`. where: names that model."""
        if others := differences(self.store.model, found):
            named = ", ".join(f"{part} ({made} in the bank, {now} here)" for part, made, now in others)
            raise InputError(
                f"this bank was made for another model than {where}: its {named} differ; use the model (and adapters) "
                "of the run, or train the probes again"
            )

    @property
    def folds(self) -> int:
        """The number of folds of cross-fitting, 0 for a bank of one split."""
        return int(self.provenance.probe.get("folds", 0))

    @property
    def made_from(self) -> dict[str, Any]:
        """The settings that the bank depends on, without versions of libraries."""
        made = self.provenance
        shaping = made.store.shaping if made.store else {}
        return _made_from(shaping, made.probe, made.trainer.get("precision"), made.seed)

    def check_result(self, run: TrainRun, grid: str, folder: Path) -> None:
        """Raises InputError when the result in `folder` is not of one piece, or the files of its model have changed.

        run: the settings of the result, as saved. grid: fingerprint of the bank that the grid was computed with.
        """
        settings = StoreSettings.of(run.pipeline, run.task, run.probe, run.seed)
        self.check_model(settings.model, " and ".join(map(str, run.pipeline.parts)))
        check_same(
            self.made_from, _made_from(settings.shaping, asdict(run.probe), run.trainer.precision, run.seed),
            f"run={str(folder)!r}: its probes were", "run train.py again",
        )  # fmt: skip
        if grid != self.fingerprint:
            raise InputError(
                f"run={str(folder)!r}: its grid is of other probes ({grid}) than those in it ({self.fingerprint}); run "
                "train.py again"
            )

    def target(self, name: str) -> Target:
        """The target of this name. Raises InputError when the bank has no probes for it."""
        for target in self.targets:
            if target.name == name:
                return target
        known = ", ".join(t.name for t in self.targets)
        raise InputError(f"target={name!r}: this bank has no probes for it; expected one of {known}")

    @property
    def fingerprint(self) -> str:
        """A hash of the probes, without their provenance."""
        return hashlib.sha256(tensor_bytes(self._tensors())).hexdigest()[:16]

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"mean": self.mean, "std": self.std}
        for name in TABLES:
            tensors |= {f"{name}/{key}": value for key, value in getattr(self, name).items()}
        return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}

    def select(self, cells: Sequence[Cell]) -> ProbeBank:
        """The bank of some of the cells, in the order given. Raises InputError for a cell that is not in the bank."""
        index = {cell: i for i, cell in enumerate(self.cells)}
        for cell in cells:
            if cell not in index:
                raise InputError(
                    f"cell ({cell}): not among the {len(index)} cells of this bank; fit it or choose another"
                )
        at = torch.tensor([index[cell] for cell in cells], dtype=torch.long)
        tables: dict[str, Any] = {
            table: {name: value[at] for name, value in getattr(self, table).items()} for table in TABLES
        }
        return replace(self, cells=tuple(cells), mean=self.mean[at], std=self.std[at], **tables)

    @classmethod
    def join(cls, banks: Sequence[ProbeBank]) -> ProbeBank:
        """Joins the cells of banks with the same targets into one bank, with the provenance of the first."""
        first = banks[0]
        tables: dict[str, Any] = {
            table: {name: torch.cat([getattr(bank, table)[name] for bank in banks]) for name in getattr(first, table)}
            for table in TABLES
        }
        return replace(
            first,
            cells=tuple(cell for bank in banks for cell in bank.cells),
            mean=torch.cat([bank.mean for bank in banks]),
            std=torch.cat([bank.std for bank in banks]),
            **tables,
        )

    def calibrated(
        self,
        features: Float[Tensor | StoredTensor, "sample cell region channel"],
        labels: Mapping[str, Int[Tensor, " sample *region"]],
    ) -> ProbeBank:
        """The same bank with a temperature for every cell and target. Use samples that the bank was not fitted to."""
        found = {}
        for target in self.targets:
            values, label = self.decision(features, target.name), labels[target.name].flatten()
            found[target.name] = temperatures(values.reshape(len(self.cells), len(label), -1), label)
        return replace(self, temperatures=found)

    def decision(
        self,
        features: Float[Tensor | StoredTensor, "sample cell region channel"],
        target: str,
        cells: Sequence[Cell] | None = None,
    ) -> Float[Tensor, "cell sample *region out"]:
        """Decision values. The last axis has the classes, for form `candidate` the regions.

        cells: the cells of `features`, in order; default all cells of the bank.
        Raises InputError when the shape of `features` does not fit the bank, and for an unknown target or cell.
        """
        bank = self if cells is None else self.select(cells)
        expected = (len(bank.cells), self.regions, self.mean.shape[1])
        if features.ndim != 4 or tuple(features.shape[1:]) != expected:
            raise InputError(
                f"features{list(features.shape)}: expected [sample, cell, region, channel] with {list(expected)} "
                "after sample; pass `cells`, and pool as for the fit of the bank"
            )
        form = self.target(target).form
        values = []
        each = len(features) * self.regions * self.mean.shape[1]
        for part in blocks(len(bank.cells), 8 * each):  # features of 16 MB in fp32
            rows = design(standardise(features[:, part], bank.mean[part], bank.std[part]), form)
            values.append(classes_last(affine(rows, bank.weights[target][part], bank.biases[target][part]), form))
        return torch.cat(values)

    def probabilities(
        self,
        features: Float[Tensor | StoredTensor, "sample cell region channel"],
        target: str,
        cells: Sequence[Cell] | None = None,
    ) -> Float[Tensor, "cell sample *region out"]:
        """Softmax of the decision values, after division by the temperature of the cell if the bank is calibrated."""
        values = self.decision(features, target, cells)
        if target in self.temperatures:
            temperature = (self if cells is None else self.select(cells)).temperatures[target]
            values = values / temperature.view(-1, *[1] * (values.ndim - 1))
        return values.softmax(dim=-1)

    def predict(
        self,
        features: Float[Tensor | StoredTensor, "sample cell region channel"],
        target: str,
        cells: Sequence[Cell] | None = None,
    ) -> Int[Tensor, "cell sample *region"]:
        """The label with the largest decision value."""
        return self.decision(features, target, cells).argmax(dim=-1)

    def save(self, folder: Path | str) -> None:
        """Writes the tensors, then the description with their checksum. Both files are written atomically."""
        folder = Path(folder)
        make_folder(folder)
        data = tensor_bytes(self._tensors())
        description = {
            "format": FORMAT,
            "tensors": hashlib.sha256(data).hexdigest(),
            "regions": self.regions,
            "targets": [asdict(target) for target in self.targets],
            "cells": [astuple(cell) for cell in self.cells],
            "provenance": asdict(self.provenance),
        }
        with whole_file(folder / TENSORS, len(data)) as part:
            part.write_bytes(data)
        write_json(folder / DESCRIPTION, description)

    @classmethod
    def load(cls, folder: Path | str) -> ProbeBank:
        """Reads a bank written by `save`. Raises InputError when it is missing, damaged or of another format."""
        folder = Path(folder)
        for name in (DESCRIPTION, TENSORS):
            if not (folder / name).is_file():
                raise InputError(f"{folder}: expected a probe bank, but {name} is missing; run train.py first")
        description = read_json(folder / DESCRIPTION, "run train.py again, which fits the probes again", format=FORMAT)
        data = (folder / TENSORS).read_bytes()
        if hashlib.sha256(data).hexdigest() != description["tensors"]:
            raise InputError(f"{folder / TENSORS}: damaged, or from another fit than {DESCRIPTION}; fit again")
        tensors = read_tensors(data)
        tables: dict[str, dict[str, Tensor]] = {name: {} for name in TABLES}
        for key, value in tensors.items():
            if "/" in key:
                table, name = key.split("/", 1)
                tables[table][name] = value
        return cls(
            cells=tuple(Cell(*entry) for entry in description["cells"]),
            targets=tuple(Target(**entry | {"kinds": tuple(entry["kinds"])}) for entry in description["targets"]),
            regions=description["regions"],
            mean=tensors["mean"],
            std=tensors["std"],
            provenance=Provenance.from_json(description["provenance"]),
            **tables,
        )


def load_probes(path: Path | str) -> ProbeBank:
    """Loads a bank. path: a run folder, the folder of a result, or a folder written by `ProbeBank.save`.

    Raises InputError when there is no complete bank, and for a run folder with several results.
    """
    path = find_result(path)
    return ProbeBank.load(path / "probes" if (path / "probes").is_dir() else path)


def kept_bank(
    folder: Path, store: StoreSettings, probe: ProbeConfig, trainer: TrainerConfig, seed: int, fold: int = 0
) -> ProbeBank | None:
    """The bank in `folder` if it was fitted with exactly these settings, with its stopping policies; otherwise None.

    fold: the test fold of cross-fitting.
    Its probes would be the same if they were fitted again. A damaged bank counts as none.
    """
    try:
        bank = ProbeBank.load(folder)
    except InputError:
        return None
    if first_difference(bank.made_from, _made_from(store.shaping, asdict(probe), trainer.precision, seed)):
        return None
    if bank.provenance.fold != fold:
        return None
    if found := first_difference(bank.store.versions, store.versions):
        name, made, now = found
        say(f"warning: the probes in {folder} were fitted with {name} {made}, now it is {name} {now}")
    return bank


def _made_from(
    shaping: Mapping[str, Any], probe: Mapping[str, Any], precision: str | None, seed: int
) -> dict[str, Any]:
    """What a fit depends on. shaping: of the store. probe, precision, seed: settings of the fit."""
    probe = {"folds": 0, "project": 0, **probe}  # what banks of earlier versions were fitted with
    return {**shaping, "probe": probe, "trainer": {"precision": precision}, "seed of the fit": seed}
