"""From a store to what probes are trained on: features of every cell, labels of every target.

Two things are added to what was stored. Every answer or choice gets a control of the same shape: a random relabelling
of an attribute that can be seen. And the nuisances become an input, beside those that were captured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cosprobe.activations.store import ActivationStore
from cosprobe.cells import NUISANCE, SPLIT_ORDER, Cell
from cosprobe.errors import InputError
from cosprobe.runtime import enough_memory
from cosprobe.tasks import HEADLINE, RELABELLED, Target, Task, readable_targets

OPTIONAL = ("choice", "replica")  # columns that samples may lack


@dataclass(frozen=True)
class ProbeSamples:
    """Pooled features of every sample with the labels of every target.

    features: fp32 or bf16. labels: per target [sample], for form `region` [sample, region]; -1 where the sample
    does not carry the target. split: `train`, `validation` or `test`. keys: canonical problem of each sample,
    which is the unit splits and intervals respect. choice: what the model itself finally answered, -1 for none.
    scores: more arrays per sample, `x0_readout` [sample, step, candidate] (NaN at steps not decoded) and
    `final` [sample, candidate]. replica: which of its problem's noise seeds a sample has, from 0. difficulty:
    what makes a problem hard, by name, a whole number per sample; also the nuisances that are partialled out.
    left_out: why a target that the task has is not among `targets`, a sentence each.
    Raises ValueError when shapes disagree, a split is unknown, a label is out of range or a problem is in two splits.
    """

    features: Float[Tensor, "sample cell region channel"]
    cells: tuple[Cell, ...]
    targets: tuple[Target, ...]
    labels: dict[str, Int[Tensor, " sample *region"]]
    split: np.ndarray
    keys: np.ndarray
    kinds: np.ndarray
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    choice: np.ndarray | None = None
    replica: np.ndarray | None = None
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
                raise InputError(f"target {target.name!r}: label {int(label.max())}, expected -1 to {limit - 1}")

    def __len__(self) -> int:
        return len(self.features)

    @property
    def regions(self) -> int:
        return self.features.shape[2]

    def subset(self, split: str) -> ProbeSamples:
        """The samples of one split. Raises ValueError for an unknown split."""
        if split not in SPLIT_ORDER:
            raise InputError(f"split={split!r}: expected one of {', '.join(SPLIT_ORDER)}")
        return self.rows(np.flatnonzero(np.asarray(self.split) == split))

    def rows(self, keep: Int[np.ndarray, " kept"]) -> ProbeSamples:
        """The samples at these places."""
        at = torch.from_numpy(keep)
        given = {name: getattr(self, name) for name in OPTIONAL}
        optional: dict[str, Any] = {name: None if column is None else column[keep] for name, column in given.items()}
        return replace(
            self,
            features=self.features[at],
            labels={name: label[at] for name, label in self.labels.items()},
            split=self.split[keep],
            keys=self.keys[keep],
            kinds=self.kinds[keep],
            scores={name: array[keep] for name, array in self.scores.items()},
            difficulty={name: array[keep] for name, array in self.difficulty.items()},
            **optional,
        )

    def at(self, part: slice) -> ProbeSamples:
        """The same samples, some of the cells."""
        return replace(self, features=self.features[:, part], cells=self.cells[part])


def check_apart(keys: np.ndarray, split: np.ndarray) -> None:
    """Raises ValueError naming the problems that stand in more than one split."""
    pairs = np.unique(np.stack([np.asarray(keys, str), np.asarray(split, str)]), axis=1)
    names, times = np.unique(pairs[0], return_counts=True)
    if twice := names[times > 1].tolist():
        where = " and ".join(pairs[1][pairs[0] == twice[0]])
        more = f" and {len(twice) - 3} more" if len(twice) > 3 else ""
        raise InputError(
            f"problems {', '.join(twice[:3])}{more} stand in more than one split ({where}): expected each canonical "
            "problem in one; split by key"
        )


@dataclass(frozen=True)
class InputFeatures:
    """One input of every sample, latent frames apart. step has one entry for an input that is the same at every step.

    whole: the coarse cells of the frame; a single one for `prompt` and `nuisance`. region: the regions of the probes;
    None without a pooling by region.
    """

    whole: Float[Tensor, "sample step frame cell channel"]
    region: Float[Tensor, "sample step frame region channel"] | None = None


@enough_memory("take fewer task.problems, probe.layers or probe.steps")
def load_samples(store: ActivationStore, task: Task) -> tuple[ProbeSamples, dict[str, InputFeatures], list[str]]:
    """What probes are trained on, the inputs they are compared with, and the expert that ran at each step kept.

    Targets that no probe can be trained on are left out, and the samples say why.
    """
    tensors, notes = store.read()
    cells = tuple(
        Cell(step, site, branch, place)
        for step in notes["steps"]
        for site in notes["sites"]
        for branch in notes["branches"]
        for place in notes["places"]
    )
    kinds = np.array(task.kinds)[tensors["kind"].numpy()]
    split = np.array(SPLIT_ORDER)[tensors["split"].numpy()]
    labels = {}
    for target in task.targets:
        if target.role == "choice":
            labels[target.name] = torch.where(torch.from_numpy(np.isin(kinds, target.kinds)), tensors["choice"], -1)
        else:
            labels[target.name] = tensors[f"label.{target.name}"]
    reasons = {t.name: _unfit(t, labels[t.name].numpy(), split) for t in task.targets}
    targets = [t for t in task.targets if not reasons[t.name]]
    controls, relabels = relabelled(targets, labels)
    samples = ProbeSamples(
        features=tensors["features"].flatten(1, 4),
        cells=cells,
        targets=(*targets, *(t for t in controls if not _unfit(t, relabels[t.name].numpy(), split))),
        labels=labels | relabels,
        split=split,
        keys=np.array([f"{key:015x}" for key in tensors["key"].tolist()]),
        kinds=kinds,
        choice=tensors["choice"].numpy(),
        replica=tensors["replica"].numpy(),
        scores={name: tensors[name].numpy() for name in ("x0_readout", "final", "solved")},
        difficulty={name: value.numpy() for name, value in _under("difficulty.", tensors).items()},
        left_out=tuple(reason for reason in reasons.values() if reason),
    )
    captured = _under("input.", tensors)
    names = dict.fromkeys(name.rpartition(".")[0] for name in captured)
    inputs = {name: InputFeatures(captured[f"{name}.whole"], captured.get(f"{name}.region")) for name in names}
    if samples.difficulty:
        inputs[NUISANCE] = InputFeatures(nuisance_columns(samples)[:, None, None, None])
    return samples, inputs, notes["experts"]


def relabelled(
    targets: Sequence[Target], labels: Mapping[str, Tensor]
) -> tuple[tuple[Target, ...], dict[str, Int[Tensor, " sample"]]]:
    """A control for every answer or choice: same form, same classes, same samples, another label.

    Each value of a visible attribute (the first perception target with one label per problem) gets one random class,
    the same in every split, so a probe can learn it by remembering values (Hewitt and Liang 2019, arXiv 1909.03368,
    section 2). Nothing when there is no such attribute.
    """
    attributes = [labels[t.name].long() for t in targets if t.role == "perception" and t.form == "problem"]
    if not attributes:
        return (), {}
    shown, controls, found = attributes[0], [], {}
    for target in targets:
        if target.role in HEADLINE:
            control = replace(target, name=f"{target.name}_{RELABELLED}", role=RELABELLED)
            seed = int(hashlib.sha256(control.name.encode()).hexdigest()[:12], 16)
            table = torch.from_numpy(np.random.default_rng(seed).integers(control.classes, size=int(shown.max()) + 1))
            found[control.name] = torch.where((labels[target.name] >= 0) & (shown >= 0), table[shown.clamp(min=0)], -1)
            controls.append(control)
    return tuple(controls), found


def nuisance_columns(samples: ProbeSamples, names: Sequence[str] | None = None) -> Float[Tensor, "sample column"]:
    """The nuisances of every sample, as features of a probe that sees nothing else.

    Per nuisance (all of `samples.difficulty`, or those of `names`) its value, standardised by the training samples,
    and the square of that. Raises ValueError when there are no nuisances.
    """
    names = tuple(samples.difficulty) if names is None else tuple(names)
    if not names:
        raise InputError("difficulty: no nuisance is known of these samples; expected at least one column")
    train = np.asarray(samples.split) == "train"
    columns = []
    for name in names:
        values = np.asarray(samples.difficulty[name], dtype=np.float64)
        deviation = values[train].std()
        score = (values - values[train].mean()) / deviation if deviation > 0 else np.zeros(len(values))
        columns += [score, score**2]
    return torch.from_numpy(np.stack(columns, axis=1)).float()


def _unfit(target: Target, labels: np.ndarray, split: np.ndarray) -> str:
    """Why no probe of a target can be trained and read on these samples; empty when one can."""
    carried = labels.reshape(len(labels), -1)[:, 0] >= 0
    classes = len(np.unique(labels[(split == "train") & carried]))
    empty = [part for part in SPLIT_ORDER if not carried[split == part].any()]
    whose = "the model settles on" if target.role == "choice" else "it has"
    if empty:
        return f"target {target.name!r} is left out: no sample of {' and '.join(empty)} carries it"
    if classes < 2:
        which = "1 class" if classes == 1 else f"{classes} classes"
        return f"target {target.name!r} is left out: {whose} {which} in the training samples, expected at least 2"
    return ""


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose name begins with `prefix`, under the rest of their name."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
