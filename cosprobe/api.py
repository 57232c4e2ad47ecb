"""Probes for your own labels on your own images, in a notebook.

    pipeline = load_pipeline()
    data = collect(pipeline, images=images, prompts=prompts, labels={"colour": colours})
    bank = fit_probes(data)
    grid = evaluate(bank, data)
    plot_map(grid, "colour")

The same steps as in `train.py`, with the same code. The activations stay on disk; the same call uses them again.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int

from cosprobe.activations import (
    ActivationStore,
    InputFeatures,
    LabelledRows,
    ProbeSamples,
    Sampler,
    StoredSamples,
    StoreSettings,
    find_store,
    load_samples,
)
from cosprobe.activations import collect as collect_store
from cosprobe.cells import SPLIT_ORDER, ranges
from cosprobe.config import CaptureConfig, PipelineConfig, ProbeConfig, TrainerConfig, check_folds
from cosprobe.errors import InputError
from cosprobe.evaluation import Grid, build_grid, evaluate_divisions, joined, read_inputs
from cosprobe.files import stranger
from cosprobe.models import DiffusionPipeline, Pictures, check_size, image_batch, pipeline_fingerprint, with_defaults
from cosprobe.probes import ProbeBank, fit
from cosprobe.reporting import MapFigure, headline, maps
from cosprobe.runs import POINTER, STORE, find_result
from cosprobe.tasks import Box, Labels, OwnImages, Role, encode_labels, with_noise

# The whole image, cut into 4 x 4 boxes. A probe reads them side by side, so it sees where something is.
BOXES: tuple[Box, ...] = tuple((c / 4, r / 4, (c + 1) / 4, (r + 1) / 4) for r in range(4) for c in range(4))
OWN = re.compile("[0-9a-f]{16}")  # names of the folders that `collect` makes, see `_digest`
IMAGE, PROMPT_TEXT, GROUP = "image", "prompt", "group"  # keys of a problem that are no labels
ONE_DEVICE = TrainerConfig(devices="1", enable_progress_bar=False)


@dataclass(frozen=True, eq=False)
class Activations:
    """Activations with labels, from `collect` or `open_activations`.

    samples: features and labels. inputs: what the probes are compared with, by name. experts: the transformer of each
    step. stored: where the activations are, and what of them was read. order: for every sample the index of its image,
    in the order in which the images were given.
    """

    samples: ProbeSamples
    inputs: dict[str, InputFeatures]
    experts: tuple[str, ...]
    stored: StoredSamples
    order: Int[np.ndarray, " sample"]

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        cells, shape = self.samples.cells, self.samples.features.shape
        splits = ", ".join(f"{int((self.samples.split == split).sum())} {split}" for split in SPLIT_ORDER)
        steps, layers = (ranges(list({getattr(c, axis) for c in cells})) for axis in ("step", "layer"))
        lines = [
            f"Activations({shape[0]} samples of {len(set(self.order.tolist()))} images: {splits}; steps {steps}; "
            f"layers {layers}; {shape[2]} regions, {shape[3]} channels)"
        ]
        for target in self.samples.targets:
            names = f": {', '.join(target.names)}" if target.names else ""
            lines.append(f"  {target.name} ({target.role}), {target.classes} classes{names}")
        return "\n".join([*lines, f"  in {str(self.stored.store.folder)!r}"])

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"

    def with_label(self, name: str, values: Labels, role: Role | str = Role.ANSWER) -> Activations:
        """The same activations with one more label.

        values: the class of every image, as text or whole number, in the order in which the images were given. role:
        what probes of this label have to beat, see `Role`. Raises InputError as `ProbeSamples.with_label` does.
        """
        names, index = encode_labels(name, values, int(self.order.max()) + 1, "image")
        return replace(self, samples=self.samples.with_label(name, index[self.order], role, names))

    def to_xarray(self) -> xr.DataArray:
        """The features as a labelled array; see `ProbeSamples.to_xarray`.

        Samples are ordered by split. The coordinate `image` is the index of the image of each sample, in the order in
        which the images were given.
        """
        return self.samples.to_xarray().assign_coords(image=("sample", self.order))

    def to_sklearn(
        self,
        label: str,
        *,
        step: int,
        layer: int,
        split: str = "train",
        branch: str | None = None,
        position: str | None = None,
    ) -> LabelledRows:
        """X, y and groups of one cell, label and split, for scikit-learn; see `ProbeSamples.to_sklearn`."""
        return self.samples.to_sklearn(label, step=step, layer=layer, split=split, branch=branch, position=position)


def collect(
    pipeline: DiffusionPipeline,
    *,
    problems: Sequence[Mapping[str, Any]] = (),
    images: Pictures | None = None,
    prompts: Sequence[str] = (),
    labels: Mapping[str, Labels] | Labels | None = None,
    roles: Mapping[str, Role | str] | Role | str = Role.ANSWER,
    boxes: Sequence[Box] | None = None,
    groups: Sequence[str | int] | None = None,
    config: PipelineConfig | None = None,
    layers: str = "all",
    steps: str = "all",
    seeds: int = 1,
    seed: int = 0,
    folds: int = 0,
    folder: Path | str = "activations",
) -> Activations:
    """Samples a video for every image and prompt, and keeps what happens inside the transformer.

    pipeline: from `load_pipeline`.
    problems: dictionaries such as `{"image": picture, "prompt": "...", "colour": "red"}`, all with the same keys. Keys
    other than `image`, `prompt` and `group` are labels. They are given instead of images, prompts, labels and groups.
    images: PIL, numpy or torch, of one size; see `cosprobe.models.image_batch`.
    prompts: one for each image. labels: by name, the class of each image, as text or whole number; a list is the label
    `label`. roles: what probes have to beat, for all labels or by name, see `cosprobe.tasks.Role`. Default: `answer`,
    that is every input.
    boxes: where probes read, in fractions of the image; default: 4 x 4 boxes that cover it. A probe reads all boxes
    side by side. Fewer boxes need less disk space.
    groups: images of one group are never in two splits; default: equal images with equal prompts. About half of the
    groups train the probes, a fifth chooses penalties and the best cell, the others test.
    config: how the pipeline samples (steps, guidance, frames); default: that of the pipeline, see
    `cosprobe.models.with_defaults`.
    layers, steps: what is kept, as in `0:30:5`. seeds: noise seeds of each image. seed: they are derived from it.
    folds: for few images, this many folds of them are test images in turn (cross-fitting); 0: one split.
    folder: the activations are kept in a folder of it, named after the model and the settings. The same call uses them
    again, with any labels, and continues when it was interrupted. With more images, only these are sampled.
    Raises InputError before anything is sampled: for what does not fit together, a split with fewer than 2 images, a
    disk that is too small, a folder with anything else in it, such as that of a model.
    """
    config = with_defaults(config or PipelineConfig(), pipeline)
    _check_folder(Path(folder))
    if problems:
        if images is not None or len(prompts) or labels is not None or groups is not None:
            raise InputError("problems: given with images, prompts, labels or groups; expected either, not both")
        images, prompts, labels, groups = _columns(problems)
    if images is None:
        raise InputError("images: none; expected images and prompts, or problems")
    pictures = image_batch(images)
    check_size(pipeline, pictures.shape[2:], config.frames)
    pixels = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    named = _by_name(labels, roles)
    for name, (values, _) in named.items():
        encode_labels(name, values, len(pixels), "image")
    if seeds < 1:
        raise InputError(f"seeds={seeds}: expected at least 1 noise seed for each image")
    check_folds(folds, "folds")
    own = OwnImages(pixels, prompts, config.frames, BOXES if boxes is None else boxes, groups, folds)
    drawn = with_noise([p for split in SPLIT_ORDER for p in own.problems(split, len(pixels))], seed, seeds)
    capture = CaptureConfig(layers=layers, steps=steps, random_weights=0)
    what = {"size": list(pixels.shape[1:3]), "boxes": [list(map(float, box)) for box in own.boxes], "seeds": seeds}
    what["problems"] = _digest("".join(s.name + s.problem.key for s in drawn))
    settings = StoreSettings.of_model(pipeline_fingerprint(pipeline), config, what, capture, seed)
    place = Path(folder) / _digest(json.dumps([settings.identity, layers, steps], sort_keys=True)) / STORE
    sampler = Sampler(pipeline, config, own, ONE_DEVICE)
    stored = collect_store(sampler, lambda: drawn, settings, find_store(settings, sampler.depth, place))
    samples, inputs, experts = load_samples(stored, folds)
    data = Activations(samples, inputs, tuple(experts), stored, np.array([s.problem.layout for s in drawn]))
    for name, (values, role) in named.items():
        data = data.with_label(name, values, role)
    return data


def _columns(
    problems: Sequence[Mapping[str, Any]],
) -> tuple[list[Any], list[str], dict[str, Labels], list[str | int] | None]:
    """Images, prompts, labels and groups of problems. Raises InputError for one with other keys than the first."""
    names = list(problems[0])
    if lacking := [name for name in (IMAGE, PROMPT_TEXT) if name not in names]:
        raise InputError(f"problems[0]: has no {lacking[0]!r}; expected image, prompt, and labels by name")
    for number, one in enumerate(problems):
        if set(one) != set(names):
            other = sorted(set(one) ^ set(names))[0]
            raise InputError(f"problems[{number}]: {other!r} is in some problems only; expected the same keys in all")
    columns: dict[str, Any] = {name: [one[name] for one in problems] for name in names}
    groups = columns.pop(GROUP, None)
    return columns.pop(IMAGE), columns.pop(PROMPT_TEXT), columns, groups


def open_activations(folder: Path | str) -> Activations:
    """The activations of a finished `train.py` run or of `collect`, with the labels that are kept with them.

    folder: a run folder such as `runs/maze-layers`, one of its results, or a store. Of a result, what its run used is
    read; of a store, its samples, which must be one set. The images of `with_label` are those of the problems of the
    run, in order. The labels of `collect` are not kept; add them with `with_label`.
    Raises InputError for a store that is missing, half-written or damaged.
    """
    place = Path(folder)
    if (find_result(place) / POINTER).is_file():
        stored = StoredSamples.load(find_result(place))
    else:
        several = sorted(path.parent for path in place.glob(f"*/{STORE}"))
        if several and not (place / STORE).is_dir():
            raise InputError(f"folder={str(place)!r}: expected one of {', '.join(map(str, several))}")
        stored = StoredSamples.whole(ActivationStore.open(place / STORE if (place / STORE).is_dir() else place))
    samples, inputs, experts = load_samples(stored)
    problems = [name.rpartition("/")[0] for name in stored.table.names]  # without the index of the seed
    at = {name: i for i, name in enumerate(dict.fromkeys(problems))}
    return Activations(samples, inputs, tuple(experts), stored, np.array([at[name] for name in problems]))


def fit_probes(
    data: Activations, *, kind: str = "logistic", penalties: Sequence[float] = (0.01, 0.1, 1.0), seed: int = 0
) -> ProbeBank:
    """Fits a probe for every label, layer and step.

    kind: `logistic`, `newton` (the same probes, another solver) or `ridge`. penalties: candidates; one is chosen for
    each label and cell, without test samples. `ProbeBank.save` keeps the probes, `load_probes` reads them. With
    cross-fitting, these are the probes that the first fold tests.
    Raises InputError when there is no label, and for a label that cannot be fitted.
    """
    if not data.samples.targets:
        raise InputError("labels: none; expected at least one; add it with data.with_label(name, values)")
    settings = data.stored.settings
    config = ProbeConfig(**asdict(settings.probe), kind=kind, penalties=list(penalties), folds=data.samples.folds)
    with tempfile.TemporaryDirectory() as curves:
        bank = fit(data.samples, config, ONE_DEVICE, Path(curves), seed)
    return bank.with_provenance(store=settings)


def evaluate(bank: ProbeBank, data: Activations) -> Grid:
    """Tests the probes on images that no probe was fitted to, against chance and against probes of the inputs.

    With cross-fitting, the probes that the other folds test are fitted here, with the settings of `bank`.
    Returns the grid: accuracy, intervals, baselines, skill and p of every label, layer and step. Each variable explains
    itself, as in `grid.dataset.skill.attrs["long_name"]`. Raises InputError for labels or cells of the probes that the
    activations do not have, and for activations of another model than that of the probes.
    """
    for target in bank.targets:
        if data.samples.target(target.name) != target:
            raise InputError(f"label {target.name!r}: the probes were fitted to other classes; fit them again")
    if bank.cells != data.samples.cells:
        raise InputError(
            f"these probes have {len(bank.cells)} cells, and the activations {len(data.samples.cells)} others; "
            "expected the same layers and steps; fit them again"
        )
    made = bank.provenance
    if made.store is not None:
        bank.check_model(data.stored.settings.model, f"that of the activations in {str(data.stored.store.folder)!r}")
    samples = replace(data.samples, targets=bank.targets)
    divisions = samples.divisions()
    if bank.folds != samples.folds:
        raise InputError(
            f"these probes are of {bank.folds} folds, and the activations are in {samples.folds}; expected the same; "
            "fit them again"
        )
    readings = [read_inputs(d, data.inputs, made.probe["kind"], made.probe["penalties"], made.seed) for d in divisions]
    banks = [bank]
    for division in divisions[1:]:
        with tempfile.TemporaryDirectory() as curves:
            banks.append(fit(division, ProbeConfig(**made.probe), ONE_DEVICE, Path(curves), made.seed))
    evaluated = joined(evaluate_divisions(samples, data.experts, banks, readings))
    return build_grid(evaluated, seed=made.seed, provenance=asdict(made) | {"bank": bank.fingerprint})


def plot_map(grid: Grid, label: str | None = None, position: str | None = None, branch: str | None = None) -> MapFigure:
    """The map of a label over layers and denoising steps: skill, evidence, the best cell.

    label: default: the answers, side by side. position, branch: default: those of the best cell.
    Returns a matplotlib figure, which a notebook shows. Raises InputError for a label that the grid does not have.
    """
    return headline(grid) if label is None else maps(grid, [label], position, branch)


def _check_folder(folder: Path) -> None:
    """Raises InputError for a folder that holds anything but activations and run folders."""

    def known(path: Path) -> bool:
        return (path / STORE).is_dir() or (path.is_dir() and OWN.fullmatch(path.name) is not None)

    if found := stranger(folder, known):
        raise InputError(
            f"folder={str(folder)!r}: holds {found!r}, which is not of activations; expected a folder that is new, "
            "empty, or of an earlier call"
        )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _by_name(
    labels: Mapping[str, Labels] | Labels | None, roles: Mapping[str, Role | str] | Role | str
) -> dict[str, tuple[Labels, Role]]:
    """Values and role of every label, by name."""
    given: Mapping[str, Any] = {} if labels is None else labels if isinstance(labels, Mapping) else {"label": labels}
    by_name = roles if isinstance(roles, Mapping) else dict.fromkeys(given, roles)
    if unknown := [name for name in by_name if name not in given]:
        raise InputError(f"roles: {unknown[0]!r} is not a label; expected one of {', '.join(given) or 'none'}")
    return {name: (values, Role(by_name.get(name, Role.ANSWER))) for name, values in given.items()}
