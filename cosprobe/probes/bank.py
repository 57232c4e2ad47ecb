"""The bank: every linear probe of a grid, frozen after fitting.

A probe reads standardised features. Its form decides what a decision value is (x: one region's channels):
`candidate` w . x per region, `region` W x + b per region, `problem` W [x_1 .. x_R] + b per sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from cosprobe.cells import Cell
from cosprobe.errors import InputError
from cosprobe.models import fingerprint
from cosprobe.probes.calibration import temperatures
from cosprobe.probes.linalg import affine, classes_last, design, standardise
from cosprobe.runtime import make_folder, whole_file
from cosprobe.tasks import Target

FORMAT = 3  # cells are layers; earlier banks held inputs among them
TABLES = ("weights", "biases", "lambdas", "temperatures")
TENSORS, DESCRIPTION = "bank.safetensors", "bank.json"
CHUNK = 2**26  # numbers standardised at a time, 256 MB in fp32


@dataclass(frozen=True)
class ProbeBank:
    """All probes of one grid.

    weights, biases: per target name, [cell, width, out] and [cell, out]; width is channel, for form `problem`
    region * channel; out is 1 for form `candidate` and the number of classes otherwise.
    mean, std: standardisation from the training rows. lambdas: the penalty that was chosen, per target.
    temperatures: what decision values are divided by to give probabilities, per target; from `calibrated`.
    targets: in the form they were fitted. provenance: where the bank comes from, anything JSON can hold.
    """

    cells: tuple[Cell, ...]
    targets: tuple[Target, ...]
    regions: int
    mean: Float[Tensor, "cell channel"]
    std: Float[Tensor, "cell channel"]
    weights: dict[str, Float[Tensor, "cell _width _out"]]
    biases: dict[str, Float[Tensor, "cell _out"]]
    lambdas: dict[str, Float[Tensor, " cell"]]
    temperatures: dict[str, Float[Tensor, " cell"]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def with_provenance(self, **provenance: Any) -> ProbeBank:
        """The same bank with more said of where it comes from."""
        return replace(self, provenance=self.provenance | provenance)

    def check_model(self, *folders: Path) -> None:
        """Raises ValueError when the bank does not say which model it was made for, or when that is not the one whose
        files are in `folders`."""
        if not (store := self.provenance.get("store")):
            raise InputError("this bank does not say which model it was made for: expected one that train.py has saved")
        if (found := fingerprint(*folders)) != store["model"]:
            where = " and ".join(map(str, folders))
            raise InputError(
                f"this bank was made for model {store['model']}, {where} holds {found}; retrain the probes"
            )

    def target(self, name: str) -> Target:
        """Raises ValueError for a target the bank has no probes of."""
        for target in self.targets:
            if target.name == name:
                return target
        known = ", ".join(t.name for t in self.targets)
        raise InputError(f"target={name!r}: this bank has no such probes; expected one of {known}")

    def select(self, cells: Sequence[Cell]) -> ProbeBank:
        """The smaller bank of these cells, in this order. Raises ValueError for a cell the bank has not."""
        place = {cell: i for i, cell in enumerate(self.cells)}
        for cell in cells:
            if cell not in place:
                raise InputError(
                    f"cell ({cell}): not among the {len(place)} cells of this bank; fit it or pick another"
                )
        at = torch.tensor([place[cell] for cell in cells], dtype=torch.long)
        tables: dict[str, Any] = {
            table: {name: value[at] for name, value in getattr(self, table).items()} for table in TABLES
        }
        return replace(self, cells=tuple(cells), mean=self.mean[at], std=self.std[at], **tables)

    @classmethod
    def join(cls, banks: Sequence[ProbeBank]) -> ProbeBank:
        """One bank of the cells of several that were fitted to the same targets; provenance of the first."""
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
        features: Float[Tensor, "sample cell region channel"],
        labels: Mapping[str, Int[Tensor, " sample *region"]],
    ) -> ProbeBank:
        """The same bank with a temperature for every cell and target, from samples it was not fitted to."""
        found = {}
        for target in self.targets:
            values, label = self.decision(features, target.name), labels[target.name].flatten()
            found[target.name] = temperatures(values.reshape(len(self.cells), len(label), -1), label)
        return replace(self, temperatures=found)

    def decision(
        self,
        features: Float[Tensor, "sample cell region channel"],
        target: str,
        cells: Sequence[Cell] | None = None,
    ) -> Float[Tensor, "cell sample *region out"]:
        """Decision values, classes (or candidates) last.

        `cells` names the cells `features` holds, in order; without it they must be all cells of the bank.
        Raises ValueError when the shape of `features` does not fit the bank.
        """
        bank = self if cells is None else self.select(cells)
        expected = (len(bank.cells), self.regions, self.mean.shape[1])
        if features.ndim != 4 or tuple(features.shape[1:]) != expected:
            raise InputError(
                f"features{list(features.shape)}: expected [sample, cell, region, channel] with {list(expected)} "
                "after sample; name the cells, and pool as when the bank was fitted"
            )
        form = self.target(target).form
        values = []
        for part in _parts(len(bank.cells), features[:, 0].numel()):
            rows = design(standardise(features[:, part], bank.mean[part], bank.std[part]), form)
            values.append(classes_last(affine(rows, bank.weights[target][part], bank.biases[target][part]), form))
        return torch.cat(values)

    def probabilities(
        self,
        features: Float[Tensor, "sample cell region channel"],
        target: str,
        cells: Sequence[Cell] | None = None,
    ) -> Float[Tensor, "cell sample *region out"]:
        """Softmax of the decision values, each cell's divided by its temperature if the bank is calibrated."""
        values = self.decision(features, target, cells)
        if target in self.temperatures:
            heat = (self if cells is None else self.select(cells)).temperatures[target]
            values = values / heat.view(-1, *[1] * (values.ndim - 1))
        return values.softmax(dim=-1)

    def predict(
        self,
        features: Float[Tensor, "sample cell region channel"],
        target: str,
        cells: Sequence[Cell] | None = None,
    ) -> Int[Tensor, "cell sample *region"]:
        """The label each probe gives."""
        return self.decision(features, target, cells).argmax(dim=-1)

    def save(self, folder: Path | str) -> None:
        """Writes the tensors, then the description that vouches for them; a kill leaves no half bank behind."""
        folder = Path(folder)
        make_folder(folder)
        tensors = {"mean": self.mean, "std": self.std}
        for name in TABLES:
            tensors |= {f"{name}/{key}": value for key, value in getattr(self, name).items()}
        data = tensor_bytes({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
        description = {
            "format": FORMAT,
            "sha256": hashlib.sha256(data).hexdigest(),
            "regions": self.regions,
            "targets": [asdict(target) for target in self.targets],
            "cells": [[c.step, c.site, c.branch, c.place] for c in self.cells],
            "provenance": self.provenance,
        }
        for name, content in ((TENSORS, data), (DESCRIPTION, json.dumps(description, indent=1).encode())):
            with whole_file(folder / name) as part:
                part.write_bytes(content)

    @classmethod
    def load(cls, folder: Path | str) -> ProbeBank:
        """Reads what `save` wrote. Raises ValueError when it is missing, damaged or of another format."""
        folder = Path(folder)
        for name in (DESCRIPTION, TENSORS):
            if not (folder / name).is_file():
                raise InputError(f"{folder}: expected a probe bank, but {name} is missing; fit the probes first")
        try:
            description = json.loads((folder / DESCRIPTION).read_text())
            form, digest = description["format"], description["sha256"]
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{folder / DESCRIPTION}: not the description of a probe bank; fit again") from None
        if form != FORMAT:
            raise InputError(f"{folder}: bank format {form}, expected {FORMAT}; fit again with this version")
        data = (folder / TENSORS).read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise InputError(f"{folder / TENSORS}: damaged or from another fit than {DESCRIPTION}; fit again")
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
            provenance=description["provenance"],
            **tables,
        )


def load_probes(path: Path | str) -> ProbeBank:
    """The bank of a run folder (in its `probes`), or of a folder of probes itself.

    Raises ValueError when there is no complete bank.
    """
    path = Path(path)
    return ProbeBank.load(path / "probes" if (path / "probes").is_dir() else path)


def _parts(cells: int, each: int) -> Iterator[slice]:
    size = max(1, CHUNK // max(1, each))
    return (slice(start, start + size) for start in range(0, cells, size))
