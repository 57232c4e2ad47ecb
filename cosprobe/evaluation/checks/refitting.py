"""Shared parts of the checks: samples with labels of a target, bins of difficulty, refits, accuracy with intervals.

Probes are refitted by `fit_newton` to convergence, at the penalty that the cell already has. Refits therefore differ in
their data only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from cosprobe.activations import ProbeSamples
from cosprobe.cells import Cell
from cosprobe.errors import InputError
from cosprobe.evaluation import correctness, difference_interval, mean_interval, share_interval
from cosprobe.probes import affine, classes_last, design, fit_newton, spread
from cosprobe.tasks import Target, readable_targets


class NotEnoughSamples(ValueError):
    """A check lacks samples, or its samples do not vary enough. Other checks may still be possible."""


@dataclass(frozen=True)
class Labelled:
    """The samples of one split with a label of a target, at some cells. where: their indices in the original
    samples."""

    features: Float[Tensor, "sample cell region channel"]
    labels: Int[Tensor, " sample *region"]
    keys: Shaped[np.ndarray, " sample"]
    where: Int[np.ndarray, " sample"]

    def __len__(self) -> int:
        return len(self.where)

    def take(self, keep: Bool[np.ndarray, " sample"]) -> Labelled:
        """The samples where `keep` is true."""
        at = torch.from_numpy(np.flatnonzero(keep))
        return Labelled(self.features[at], self.labels[at], self.keys[keep], self.where[keep])


@dataclass(frozen=True)
class Estimate:
    """A mean over samples with its 95 % interval by problem."""

    value: Float[np.ndarray, "*axes"]
    lower: Float[np.ndarray, "*axes"]
    upper: Float[np.ndarray, "*axes"]


@dataclass(frozen=True)
class Refit:
    """One probe per cell. converged: whether the fit of a cell met its tolerance."""

    weight: Float[Tensor, "cell width out"]
    bias: Float[Tensor, "cell out"]
    converged: Bool[np.ndarray, " cell"]


@dataclass(frozen=True)
class Bins:
    """Bins of neighbouring integers. names: such as `4`, or `1-3` for a range. last: the largest value of each bin."""

    names: tuple[str, ...]
    last: Int[np.ndarray, " bin"]

    def index(self, values: Int[np.ndarray, " sample"]) -> Int[np.ndarray, " sample"]:
        """The bin of each value. A value between two bins goes to the upper one, a value above all bins to the last."""
        return np.minimum(np.searchsorted(self.last, values), len(self.last) - 1)


def readable(samples: ProbeSamples, name: str) -> Target:
    """The target of this name, in the form in which these features are fitted. Raises InputError for an unknown
    name."""
    known = {t.name: t for t in readable_targets(samples.targets, samples.regions)}
    if name not in known:
        raise InputError(f"target={name!r}: no such labels; expected one of {', '.join(known)}")
    return known[name]


def columns_of(samples: ProbeSamples, cells: Sequence[Cell]) -> Int[Tensor, " cell"]:
    """Indices of the cells along the cell axis of the features. Raises InputError for a cell that is not there."""
    position = {cell: i for i, cell in enumerate(samples.cells)}
    if missing := [cell for cell in cells if cell not in position]:
        raise InputError(f"cell ({missing[0]}): not among the {len(position)} cells captured; pick one of them")
    return torch.tensor([position[cell] for cell in cells], dtype=torch.long)


def labelled(samples: ProbeSamples, target: Target, cells: Sequence[Cell], split: str) -> Labelled:
    """The samples of a split that have a label of the target.

    Raises InputError for an unknown cell, or a sample with labels in some of its regions only. Raises NotEnoughSamples
    when there is no such sample.
    """
    known = samples.labels[target.name].numpy() >= 0
    whole = known.reshape(len(known), -1).all(axis=1)
    if (known.reshape(len(known), -1).any(axis=1) != whole).any():
        raise InputError(f"target {target.name!r}: expected -1 in every region of a sample or in none")
    where = np.flatnonzero(whole & (np.asarray(samples.split) == split))
    if not len(where):
        raise NotEnoughSamples(
            f"target {target.name!r} has no {split} samples: expected at least 1; raise task.problems"
        )
    at = torch.from_numpy(where)
    features = samples.features[at[:, None], columns_of(samples, cells)]
    return Labelled(features, samples.labels[target.name][at], np.asarray(samples.keys)[where], where)


def statistics(
    samples: ProbeSamples, cells: Sequence[Cell]
) -> tuple[Float[Tensor, "cell channel"], Float[Tensor, "cell channel"]]:
    """Mean and standard deviation over all training samples, with or without a label, as in a bank."""
    rows = torch.from_numpy(np.flatnonzero(np.asarray(samples.split) == "train"))
    stats = [spread(samples.features[rows[:, None], at[None]]) for at in columns_of(samples, cells)]
    return torch.cat([mean for mean, _ in stats]), torch.cat([std for _, std in stats])


def refit(
    x: Float[Tensor, "cell sample region channel"],
    labels: Int[Tensor, " sample *region"],
    target: Target,
    penalties: Float[Tensor, " penalty"],
) -> Refit:
    """Fits one probe per cell to standardised features, each at its own penalty.

    Raises InputError when there is not one penalty per cell.
    """
    if len(penalties) != len(x):
        raise InputError(f"penalties: {len(penalties)} penalties, expected one for each of {len(x)} cells")
    parts, positions = [], []
    for value in penalties.unique():
        at = torch.nonzero(penalties == value)[:, 0]
        parts.append(fit_newton(x[at], labels, target, [float(value)]))
        positions.append(at)
    back = torch.cat(positions).argsort()
    return Refit(
        torch.cat([part.weight[:, :, 0] for part in parts])[back],
        torch.cat([part.bias[:, 0] for part in parts])[back],
        torch.cat([part.converged[:, 0] for part in parts])[back].cpu().numpy(),
    )


def decide(
    x: Float[Tensor, "cell sample region channel"], probes: Refit, form: str
) -> Float[Tensor, "cell sample *region out"]:
    """Decision values of refitted probes, with classes (or candidates) on the last axis."""
    return classes_last(affine(design(x, form), probes.weight.to(x.dtype), probes.bias.to(x.dtype)), form)


def right(
    decision: Float[Tensor, "cell sample *region out"], labels: Int[Tensor, " sample *region"]
) -> Float[np.ndarray, "cell sample"]:
    """1 where the label has the largest decision value, 0 elsewhere. The mean over regions for region labels."""
    return correctness(decision.argmax(dim=-1).numpy(), labels.numpy())


def estimate_share(right: Float[np.ndarray, "*axes sample"], keys: Shaped[np.ndarray, " sample"]) -> Estimate:
    """Shares of right answers. Each sample is between 0 (wrong) and 1 (right)."""
    return _shaped(right, share_interval(right.reshape(-1, right.shape[-1]), keys))


def estimate_difference(difference: Float[np.ndarray, "*axes sample"], keys: Shaped[np.ndarray, " sample"]) -> Estimate:
    """Mean differences of two shares on the same samples. Each sample is between -1 and 1."""
    return _shaped(difference, difference_interval(difference.reshape(-1, difference.shape[-1]), keys))


def estimate_mean(values: Float[np.ndarray, "*axes sample"], keys: Shaped[np.ndarray, " sample"]) -> Estimate:
    """Means of unbounded values."""
    return _shaped(values, mean_interval(values.reshape(-1, values.shape[-1]), keys))


def _shaped(values: Float[np.ndarray, "*axes sample"], bounds: tuple[np.ndarray, np.ndarray]) -> Estimate:
    lower, upper = (bound.reshape(values.shape[:-1]) for bound in bounds)
    return Estimate(np.asarray(values.mean(axis=-1)), lower, upper)


def join_rare(
    parts: Sequence[tuple[Int[np.ndarray, " _sample"], Shaped[np.ndarray, " _sample"], int]], most: int | None = None
) -> Bins:
    """Bins of neighbouring values, each with enough problems in every part.

    parts: (values, keys, least number of problems in a bin), for example one for each split.
    most: the largest number of bins.

    From the smallest value upwards, a bin ends as soon as it holds enough problems. Values left over at the end join
    the last bin. If there are more than `most` bins, they end at the quantiles k / most of the first part instead.
    Labels are not used.
    """
    values = np.unique(np.concatenate([value for value, _, _ in parts]))
    counts = np.zeros((len(parts), len(values)), dtype=int)
    for part, (value, keys, _) in enumerate(parts):
        at = np.searchsorted(values, value)
        pairs = np.unique(np.stack([at, np.unique(keys, return_inverse=True)[1]]), axis=1)
        counts[part] = np.bincount(pairs[0], minlength=len(values))
    least = np.array([enough for _, _, enough in parts])
    ends = _closed(counts, least, 0.0)
    if most is not None and len(ends) > most:
        ends = _closed(counts, least, counts[0].sum() / most)
    starts = [0, *(end + 1 for end in ends[:-1])]
    spans = [(values[start], values[end]) for start, end in zip(starts, ends, strict=True)]
    return Bins(tuple(f"{a}" if a == b else f"{a}-{b}" for a, b in spans), values[ends])


def _closed(counts: Int[np.ndarray, "part value"], least: Int[np.ndarray, " part"], share: float) -> list[int]:
    """Index of the last value of every bin. The k-th bin holds at least k * `share` problems of the first part so
    far."""
    ends: list[int] = []
    held = np.zeros_like(least)
    for value, so_far in enumerate(counts[0].cumsum()):
        held = held + counts[:, value]
        if (held >= least).all() and so_far >= share * (len(ends) + 1):
            ends.append(value)
            held = np.zeros_like(least)
    return [*ends[:-1], counts.shape[1] - 1]
