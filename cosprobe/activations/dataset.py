"""Loads the data for probes from a store: features of every cell and labels of every target.

Two things are added to the content of the store. Every answer and model_answer target gets a selectivity control of the
same shape: a random relabelling of an attribute that is visible in the first frame. The confounds (difficulty) become
one more input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from xarray.core.indexing import LazilyIndexedArray

from cosprobe.activations.collection import NOT_DECODED, UNPROJECTED, StoredSamples
from cosprobe.activations.labelled import LabelledFeatures
from cosprobe.activations.store import ActivationStore
from cosprobe.activations.stored_tensor import StoredTensor
from cosprobe.cells import DIFFICULTY, SPLIT_ORDER, Cell
from cosprobe.errors import InputError
from cosprobe.models import COND
from cosprobe.runtime import enough_memory
from cosprobe.tasks import ANSWER_ROLES, RELABELLED, Labels, Role, Target, encode_labels, readable_targets

Stored = TypeVar("Stored", Tensor, StoredTensor)
CELL_AXES = ("step", "layer", "branch", "position")
OPTIONAL = ("model_answer", "replica", "fold")  # columns that may be None


class LabelledRows(NamedTuple):
    """What estimators of scikit-learn take. groups: the problem of each row, for grouped cross-validation."""

    X: Float[np.ndarray, "row column"]
    y: Int[np.ndarray, " row"]
    groups: Shaped[np.ndarray, " row"]


@dataclass(frozen=True)
class ProbeSamples:
    """Pooled features of every sample with the labels of every target.

    features: fp32 or bf16; in memory, or in a store, from which what is indexed is read.
    labels: for each target [sample], for targets of form `region` [sample, region]; -1 where the sample does not have
    the label. split: `train`, `validation` or `test`. keys: canonical problem of each sample;
    splits and confidence intervals treat the samples of a problem as one unit. kinds: kind of each problem.
    scores: further arrays, `x0_scores` [sample, step, candidate] (NaN at steps that were not decoded), `x0_answer`
    [sample, step] (what x0-hat shows, -1 for no answer, -2 at steps that were not decoded), `final` [sample, candidate]
    and `solved` [sample]. model_answer: what the finished video shows, -1 for none.
    Without a parser, there are no scores, and model_answer is None.
    replica: index of the noise seed among those of the problem, from 0.
    fold: for cross-fitting, the fold of each sample; `split` is then that of fold 0, see `divisions`.
    difficulty: named whole numbers per sample; they are the confounds that are partialled out.
    left_out: for every target of the task that is not in `targets`, a sentence with the reason.
    Raises InputError when shapes do not agree, a split is unknown, a label is out of range, or a problem is in two
    splits.
    """

    features: Float[Tensor | StoredTensor, "sample cell region channel"]
    cells: tuple[Cell, ...]
    targets: tuple[Target, ...]
    labels: dict[str, Int[Tensor, " sample *region"]]
    split: np.ndarray
    keys: np.ndarray
    kinds: np.ndarray
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    model_answer: np.ndarray | None = None
    replica: np.ndarray | None = None
    fold: Int[np.ndarray, " sample"] | None = None
    difficulty: dict[str, np.ndarray] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count, cells, regions = self.features.shape[:3]
        if cells != len(self.cells):
            raise InputError(f"features{list(self.features.shape)}: expected {len(self.cells)} cells on axis 1")
        columns = {"split": self.split, "keys": self.keys, "kinds": self.kinds, **self.scores, **self.difficulty}
        columns |= {name: getattr(self, name) for name in OPTIONAL if getattr(self, name) is not None}
        for name, column in columns.items():
            if len(column) != count:
                raise InputError(f"{name}: {len(column)} entries, expected one for each of {count} samples")
        if unknown := sorted(set(map(str, self.split)) - set(SPLIT_ORDER)):
            raise InputError(f"split={unknown[0]!r}: expected one of {', '.join(SPLIT_ORDER)}")
        check_apart(self.keys, self.split)
        for target in readable_targets(self.targets, regions):
            if target.name not in self.labels:
                raise InputError(f"target {target.name!r}: no labels; expected one for each of {count} samples")
            label = self.labels[target.name]
            shape = (count, regions) if target.form == "region" else (count,)
            limit = regions if target.form == "candidate" else target.classes
            if tuple(label.shape) != shape:
                raise InputError(f"target {target.name!r}: labels{list(label.shape)}, expected {list(shape)}")
            if count and not -1 <= int(label.min()) <= int(label.max()) < limit:
                wrong = int(label.min()) if int(label.min()) < -1 else int(label.max())
                raise InputError(f"target {target.name!r}: label {wrong}, expected -1 to {limit - 1}")

    def __len__(self) -> int:
        return len(self.features)

    @property
    def regions(self) -> int:
        """Number of regions of the features."""
        return self.features.shape[2]

    def subset(self, split: str) -> ProbeSamples:
        """The samples of one split. Raises InputError for an unknown split."""
        if split not in SPLIT_ORDER:
            raise InputError(f"split={split!r}: expected one of {', '.join(SPLIT_ORDER)}")
        return self.rows(np.flatnonzero(np.asarray(self.split) == split))

    def rows(self, keep: Int[np.ndarray, " kept"]) -> ProbeSamples:
        """The samples at these indices."""
        given = {name: getattr(self, name) for name in OPTIONAL}
        optional: dict[str, Any] = {name: None if column is None else column[keep] for name, column in given.items()}
        return replace(
            self,
            features=_rows(self.features, keep),
            labels={name: label[torch.from_numpy(keep)] for name, label in self.labels.items()},
            split=self.split[keep],
            keys=self.keys[keep],
            kinds=self.kinds[keep],
            scores={name: array[keep] for name, array in self.scores.items()},
            difficulty={name: array[keep] for name, array in self.difficulty.items()},
            **optional,
        )

    def in_folds(self, folds: int) -> ProbeSamples:
        """The same samples in this many folds of problems, for cross-fitting.

        Raises InputError for fewer problems than folds.
        """
        fold = folds_of(self.keys, folds)
        return replace(self, fold=fold, split=_splits(self.split, fold)[0])

    @property
    def folds(self) -> int:
        """Number of folds of cross-fitting, 0 without it."""
        return 0 if self.fold is None else int(self.fold.max()) + 1

    def divisions(self) -> tuple[ProbeSamples, ...]:
        """The samples with every split in which probes are fitted: one, or with cross-fitting one for each fold.

        In division k, fold k is test, the next fold is validation, and the others are train. `split` is that of
        division 0.
        """
        return tuple(replace(self, split=split) for split in _splits(self.split, self.fold))

    def at(self, part: slice) -> ProbeSamples:
        """All samples, with some of the cells."""
        values = self.features
        of_part = values.columns(part) if isinstance(values, StoredTensor) else values[:, part]
        return replace(self, features=of_part, cells=self.cells[part])

    def target(self, name: str) -> Target:
        """The target of this name, in the form in which it is fitted. Raises InputError for an unknown name."""
        targets = readable_targets(self.targets, self.regions)
        for target in targets:
            if target.name == name:
                return target
        raise InputError(f"target={name!r}: expected one of {', '.join(t.name for t in targets) or 'none'}")

    def with_label(
        self, name: str, values: Labels, role: Role | str = Role.ANSWER, names: Sequence[str] = ()
    ) -> ProbeSamples:
        """The same samples with one more target, which has one label per sample.

        values: the class of every sample, as text or whole number. role: what probes have to beat, see `Role`.
        names: of the classes, where values are indices of them; default: the values themselves.
        Answers and model answers get their selectivity control. Raises InputError for a name that is taken, labels that
        `encode_labels` refuses, an unknown role, and training samples of one class only.
        """
        if name in self.labels:
            raise InputError(f"label {name!r}: these samples have it already; expected a new name")
        found, label = encode_labels(name, values, len(self), "sample")
        if names:
            found, label = tuple(names), np.asarray(values)
        target = Target(name, len(found), "problem", Role(role), tuple(dict.fromkeys(self.kinds.tolist())), found)
        splits = _splits(self.split, self.fold)
        if reason := _unfit_in(target, label, splits):
            raise InputError(reason.replace(" is left out:", ":") + "; add problems")
        plain = (*(t for t in self.targets if t.role is not RELABELLED), target)
        labels = {t.name: self.labels[t.name] for t in plain if t is not target} | {name: torch.from_numpy(label)}
        controls, relabels = relabelled(plain, labels)
        fit = tuple(t for t in controls if not _unfit_in(t, relabels[t.name].numpy(), splits))
        return replace(self, targets=plain + fit, labels=labels | relabels)

    def to_xarray(self) -> xr.DataArray:
        """The features as a labelled array [sample, step, layer, branch, position, region, channel], in float32.

        Features in a store are read when the array is, and only the samples and cells that were selected.
        Along `sample` stand split, key (the problem) and kind, and `label_NAME` for every target, whose attribute
        `classes` has the names of the classes.
        Raises InputError where the cells are not all combinations of their steps, layers, branches and positions.
        """
        axes = {axis: list(dict.fromkeys(getattr(c, axis) for c in self.cells)) for axis in CELL_AXES}
        if self.cells != tuple(Cell(*names) for names in product(*axes.values())):
            raise InputError(f"{len(self.cells)} cells: expected every step with every layer, branch and position")
        along = {"split": self.split, "key": self.keys, "kind": self.kinds}
        coordinates: dict[str, Any] = {name: ("sample", np.asarray(column)) for name, column in along.items()} | axes
        for target in self.targets:
            label = self.labels[target.name].numpy()
            classes = {"classes": list(target.names)} if target.names else {}
            coordinates[f"label_{target.name}"] = (("sample", "region")[: label.ndim], label, classes)
        names, sizes = ("sample", *axes, "region", "channel"), [len(axis) for axis in axes.values()]
        if isinstance(self.features, StoredTensor):
            values = LazilyIndexedArray(LabelledFeatures(self.features, sizes))
        else:
            values = self.features.float().unflatten(1, sizes).numpy()
        variable = xr.Variable(names, values, {"long_name": "pooled outputs of transformer blocks"})
        return xr.DataArray(variable, coordinates, name="features")

    def to_sklearn(
        self,
        target: str,
        *,
        step: int,
        layer: int,
        split: str = "train",
        branch: str | None = None,
        position: str | None = None,
    ) -> LabelledRows:
        """X, y and groups of one cell, target and split, for estimators of scikit-learn.

        Only samples with a label of the target count. A row has the regions of a sample side by side; for targets of
        form `region`, there is a row for each region. branch, position: needed where there are several.
        Raises InputError for an unknown target, cell or split.
        """
        found, part = self.target(target), self.subset(split)
        rows, label = part.features[:, part.cell_index(step, layer, branch, position)].float(), part.labels[target]
        keys = np.asarray(part.keys)
        if found.form == "region":
            keys, label, rows = keys.repeat(part.regions), label.flatten(), rows.flatten(0, 1)[:, None]
        known = (label >= 0).numpy()
        return LabelledRows(rows.flatten(1).numpy()[known], label.numpy()[known], keys[known])

    def cell_index(self, step: int, layer: int, branch: str | None = None, position: str | None = None) -> int:
        """Index of a cell on the axis cell. branch, position: may be left out where there is one.

        Raises InputError for a cell that is not there, or more than one.
        """
        wanted = {"step": step, "layer": layer, "branch": branch, "position": position}
        cells = list(enumerate(self.cells))
        for axis, value in wanted.items():
            here = list(dict.fromkeys(getattr(cell, axis) for _, cell in cells))
            if value is None and len(here) > 1:
                raise InputError(f"{axis}: there are {', '.join(map(str, here))}; expected one of them")
            if value is not None and value not in here:
                raise InputError(f"{axis}={value!r}: expected one of {', '.join(map(str, here))}")
            cells = [(i, cell) for i, cell in cells if value is None or getattr(cell, axis) == value]
        return cells[0][0]


def _rows(values: Tensor | StoredTensor, keep: Int[np.ndarray, " kept"]) -> Tensor | StoredTensor:
    """The samples at these indices; of a tensor in a store, nothing is read."""
    return values.rows(keep) if isinstance(values, StoredTensor) else values[torch.from_numpy(keep)]


def folds_of(keys: Shaped[np.ndarray, " sample"], folds: int) -> Int[np.ndarray, " sample"]:
    """The fold of each sample, for cross-fitting. Problems are shuffled and divided; labels have no influence.

    The folds depend on the set of problems, not on their order. Folds that are balanced by label would make the
    permutation test reject too often. Raises InputError for fewer problems than folds.
    """
    problems, member = np.unique(keys, return_inverse=True)
    if len(problems) < folds:
        raise InputError(
            f"probe.folds={folds}: {len(problems)} problems, expected at least as many as folds; lower probe.folds"
        )
    return (np.random.default_rng(0).permutation(len(problems)) % folds)[member]


def _splits(split: np.ndarray, fold: Int[np.ndarray, " sample"] | None) -> list[np.ndarray]:
    """The split of each sample in every division: `split` without folds. In division k, fold k is test, the next one is
    validation, and the others are train."""
    if fold is None:
        return [np.asarray(split)]
    folds = int(fold.max()) + 1
    return [
        np.where(fold == test, "test", np.where(fold == (test + 1) % folds, "validation", "train"))
        for test in range(folds)
    ]


def check_apart(keys: np.ndarray, split: np.ndarray) -> None:
    """Raises InputError, with the names of the problems, when problems are in more than one split."""
    pairs = np.unique(np.stack([np.asarray(keys, str), np.asarray(split, str)]), axis=1)
    names, times = np.unique(pairs[0], return_counts=True)
    if twice := names[times > 1].tolist():
        where = " and ".join(pairs[1][pairs[0] == twice[0]])
        more = f" and {len(twice) - 3} more" if len(twice) > 3 else ""
        raise InputError(
            f"problems {', '.join(twice[:3])}{more} are in more than one split ({where}): expected each canonical "
            "problem in one split; split by key"
        )


@dataclass(frozen=True)
class InputFeatures:
    """One input of every sample, with separate latent frames.

    Tensors are in memory, or in a store, from which what is indexed is read; the columns are the steps.
    whole: means over the coarse cells of the frame; a single cell for `prompt` and `difficulty`. region: means over the
    regions; None without region pooling. token: every token of a frame by itself; None without token pooling. The axis
    step has one entry for an input that is the same at every step.
    """

    whole: Float[Tensor | StoredTensor, "sample step frame cell channel"]
    region: Float[Tensor | StoredTensor, "sample step frame region channel"] | None = None
    token: Float[Tensor | StoredTensor, "sample step frame token channel"] | None = None

    def rows(self, keep: Int[np.ndarray, " kept"]) -> InputFeatures:
        """The samples at these indices."""
        region, token = (None if x is None else _rows(x, keep) for x in (self.region, self.token))
        return InputFeatures(_rows(self.whole, keep), region, token)

    def read(self, steps: slice = slice(None), rows: int | None = None) -> InputFeatures:
        """The input at some steps, and of the first `rows` samples (default: all), in memory."""
        region, token = (None if x is None else x[:rows, steps] for x in (self.region, self.token))
        return InputFeatures(self.whole[:rows, steps], region, token)


@enough_memory("lower task.problems, or select fewer probe.layers or probe.steps")
def load_samples(
    stored: StoredSamples | ActivationStore,
    folds: int = 0,
) -> tuple[ProbeSamples, dict[str, InputFeatures], list[str]]:
    """Loads the samples, the inputs that probes are compared with, and the expert that ran at each captured step.

    stored: what of a store is read; a store: all of it. folds: of cross-fitting, in place of the split of the store;
    0: that split.
    Targets for which no probe can be trained (in each division, with cross-fitting) are left out; `left_out` of the
    samples has the reasons.
    Raises InputError for a damaged or incomplete store, and when the memory is too small.
    """
    stored = StoredSamples.whole(stored) if isinstance(stored, ActivationStore) else stored
    table, columns = stored.table, stored.table.columns
    tensors, notes = stored.store.tensors(names=table.names)
    whole = replace(stored, probe=stored.kept)
    if (notes["steps"], notes["hook_points"]) != (list(whole.steps), list(map(str, whole.layers))):
        raise InputError(
            f"store {str(stored.store.folder)!r} is damaged: its settings name other layers or steps than its shards "
            "hold; delete it and run train.py again"
        )
    each = [(branch, position) for branch in notes["branches"] for position in notes["positions"]]
    there = [(step, layer, *rest) for step in whole.steps for layer in whole.layers for rest in each]
    kept = [i for i, one in enumerate(there) if one[0] in stored.steps and one[1] in stored.layers]
    of_steps = np.array([whole.steps.index(step) for step in stored.steps])
    model_answer, final = tensors["model_answer"][:], tensors["final"][:]
    parser = final.shape[1] > 0  # a task without a parser has no candidates
    kinds = np.array(table.kinds)[columns["kind"].numpy()]
    keys = np.array([f"{key:015x}" for key in columns["key"].tolist()])
    fold = folds_of(keys, folds) if folds else None
    splits = _splits(np.array(SPLIT_ORDER)[columns["split"].numpy()], fold)
    labels = {}
    for target in table.targets:
        if target.role == "model_answer":
            labels[target.name] = torch.where(torch.from_numpy(np.isin(kinds, target.kinds)), model_answer, -1)
        else:
            labels[target.name] = columns[f"label.{target.name}"]
    reasons = {t.name: _unfit_in(t, labels[t.name].numpy(), splits) for t in table.targets}
    targets = [t for t in table.targets if not reasons[t.name]]
    controls, relabels = relabelled(targets, labels)
    samples = ProbeSamples(
        features=tensors["features"].columns(np.array(kept)),
        cells=tuple(Cell(*there[i]) for i in kept),
        targets=(*targets, *(t for t in controls if not _unfit_in(t, relabels[t.name].numpy(), splits))),
        labels=labels | relabels,
        split=splits[0],
        keys=keys,
        kinds=kinds,
        model_answer=model_answer.numpy() if parser else None,
        replica=columns["replica"].numpy(),
        fold=fold,
        scores=_scores(stored, tensors, final) if parser else {},
        difficulty={name: value.numpy() for name, value in _under("difficulty.", columns).items()},
        left_out=tuple(reason for reason in reasons.values() if reason),
    )
    captured = {  # other inputs are the same at every step
        name: value.columns(of_steps) if value.shape[1] > 1 else value
        for name, value in _under("input.", tensors).items()
    }
    names = dict.fromkeys(name.rpartition(".")[0] for name in captured)
    inputs = {
        name: InputFeatures(captured[f"{name}.whole"], captured.get(f"{name}.region"), captured.get(f"{name}.token"))
        for name in names
    }
    if samples.difficulty:
        inputs[DIFFICULTY] = InputFeatures(difficulty_columns(samples)[:, None, None, None])
    experts = [notes["experts"][notes["steps"].index(step)] for step in stored.steps]
    return samples, inputs, experts


def unprojected_samples(stored: StoredSamples, samples: ProbeSamples) -> ProbeSamples | None:
    """The same samples with all channels, at the cells of a projected store that are kept so; None without any.

    stored: where the samples are read from.
    """
    if not stored.probe.project:
        return None
    tensors, notes = stored.store.tensors(names=stored.table.names)
    pairs, positions = notes[UNPROJECTED], notes["positions"]
    there = [Cell(step, layer, COND, position) for (step, layer), position in product(pairs, positions)]
    read = set(samples.cells)
    at = [i for i, cell in enumerate(there) if cell in read]
    if not at:
        return None
    return replace(samples, features=tensors[UNPROJECTED].columns(np.array(at)), cells=tuple(there[i] for i in at))


def _scores(stored: StoredSamples, tensors: Mapping[str, StoredTensor], final: Tensor) -> dict[str, np.ndarray]:
    """The arrays `scores` of the samples. Steps that the store has decoded for others count as not decoded."""
    scores, answers = tensors["x0_scores"][:], tensors["x0_answer"][:]
    total = scores.shape[1]
    left = sorted(set(range(total)) - set(stored.probe.steps_decoded(total)))
    scores[:, left], answers[:, left] = float("nan"), NOT_DECODED
    found = {"x0_scores": scores, "x0_answer": answers, "final": final, "solved": tensors["solved"][:]}
    return {name: values.numpy() for name, values in found.items()}


def relabelled(
    targets: Sequence[Target], labels: Mapping[str, Tensor]
) -> tuple[tuple[Target, ...], dict[str, Int[Tensor, " sample"]]]:
    """A selectivity control for every answer and model_answer target: same form, classes and samples, other labels.

    Every value of a visible attribute gets one random class, the same in all splits. A probe can learn this only by
    memorising the class of each value (Hewitt and Liang 2019, arXiv 1909.03368, section 2). The attribute is the first
    perception target with one label per problem. Without such a target there are no controls.
    """
    attributes = [labels[t.name].long() for t in targets if t.role is Role.PERCEPTION and t.form == "problem"]
    if not attributes:
        return (), {}
    shown, controls, found = attributes[0], [], {}
    for target in targets:
        if target.role in ANSWER_ROLES:
            control = replace(target, name=f"{target.name}_{RELABELLED}", role=RELABELLED)
            # `model_answer` was named `choice` when the published numbers were computed; this keeps its random table
            word = {"model_answer": "choice"}.get(target.name, target.name)
            seed = int(hashlib.sha256(f"{word}_{RELABELLED}".encode()).hexdigest()[:12], 16)
            table = torch.from_numpy(np.random.default_rng(seed).integers(control.classes, size=int(shown.max()) + 1))
            found[control.name] = torch.where((labels[target.name] >= 0) & (shown >= 0), table[shown.clamp(min=0)], -1)
            controls.append(control)
    return tuple(controls), found


def difficulty_columns(samples: ProbeSamples, names: Sequence[str] | None = None) -> Float[Tensor, "sample column"]:
    """The confounds of every sample as features.

    Two columns for each confound: its value, standardised with the training samples, and the square of that.
    names: the confounds; default all of `samples.difficulty`. Raises InputError when there are none.
    """
    names = tuple(samples.difficulty) if names is None else tuple(names)
    if not names:
        raise InputError("difficulty: these samples have no confounds; expected at least one")
    train = np.asarray(samples.split) == "train"
    columns = []
    for name in names:
        values = np.asarray(samples.difficulty[name], dtype=np.float64)
        deviation = values[train].std()
        score = (values - values[train].mean()) / deviation if deviation > 0 else np.zeros(len(values))
        columns += [score, score**2]
    return torch.from_numpy(np.stack(columns, axis=1)).float()


def _unfit_in(target: Target, labels: np.ndarray, splits: Sequence[np.ndarray]) -> str:
    """The reason why no probe of a target can be trained and tested in one of these splits; empty if one can in all."""
    return next((reason for split in splits if (reason := _unfit(target, labels, split))), "")


def _unfit(target: Target, labels: np.ndarray, split: np.ndarray) -> str:
    """The reason why no probe of a target can be trained and tested on these samples; empty if one can."""
    carried = labels.reshape(len(labels), -1)[:, 0] >= 0
    classes = len(np.unique(labels[(split == "train") & carried]))
    empty = [part for part in SPLIT_ORDER if not carried[split == part].any()]
    whose = "the model's answers have" if target.role is Role.MODEL_ANSWER else "it has"
    if empty:
        return f"target {target.name!r} is left out: no sample of {' and '.join(empty)} has a label of it"
    if classes < 2:
        which = "1 class" if classes == 1 else f"{classes} classes"
        return f"target {target.name!r} is left out: {whose} {which} in the training samples, expected at least 2"
    trained = labels[(split == "train") & carried]
    for part in ("validation", "test"):
        if not np.isin(labels[(split == part) & carried], trained).any():
            return f"target {target.name!r} is left out: no class of {part} is among the training samples"
    return ""


def _under(prefix: str, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors whose names begin with `prefix`, by the rest of the name."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
