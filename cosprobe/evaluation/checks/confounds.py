"""Accuracy of a probe after confounds are regressed out of the features.

A target may be decodable only because it is correlated with a confound, such as the length of the path. Every channel
of every region is regressed on the confounds, and the probe is refitted to the residuals. The regression is fitted to
training samples only: if test samples took part, accidental correlations in them would bias the test accuracy. This
procedure is recommended by Snoek, Miletic and Scholte (2019), "How to control for confounds in decoding analyses of
neuroimaging data".

On the training samples, the residuals are uncorrelated with every sum of functions of single confounds, so a linear
probe cannot read such a sum from them. Two effects are not removed: interactions of several confounds, and effects of
confounds on the variance of the features rather than their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cosprobe.activations import ProbeSamples, difficulty_columns
from cosprobe.cells import Cell
from cosprobe.evaluation.checks.refitting import (
    Estimate,
    Labelled,
    NotEnoughSamples,
    decide,
    estimate_difference,
    estimate_share,
    join_rare,
    labelled,
    readable,
    refit,
    right,
    statistics,
)
from cosprobe.probes import affine, classes_last, design, fit_newton, spread, standardise, validated
from cosprobe.tasks import Target

RARE = 10  # values with fewer training problems are merged with neighbouring values
RANK = 1e-9  # singular values below this share of the largest count as 0 (one-hot columns add up to 1)


@dataclass(frozen=True)
class Residualised:
    """Test accuracy of refitted probes before and after confounds are regressed out of the features.

    confounds: names of the confounds that vary. difference: after - before, with a paired interval. alone: accuracy of
    a probe on the confounds alone. n: number of test samples. converged: whether both fits of a cell met their
    tolerance.
    """

    target: str
    cells: tuple[Cell, ...]
    confounds: tuple[str, ...]
    before: Estimate
    after: Estimate
    difference: Estimate
    alone: Estimate
    n: int
    converged: Bool[np.ndarray, " cell"]


def residualised(
    samples: ProbeSamples,
    target: str,
    cells: Sequence[Cell],
    penalties: Float[Tensor, " penalty"],
) -> Residualised:
    """Refits `target` at each cell, before and after confounds (the columns of `samples.difficulty`) are regressed out.

    penalties: the penalty of each cell, used for both fits. Features are standardised once, before confounds are
    regressed out. The probe on confounds alone uses the one of these penalties that is best on validation.
    Raises InputError for an unknown target or cell, or a number of penalties other than one per cell. Raises
    NotEnoughSamples when a split has no sample with a label of the target, or no confound varies among its training
    samples.
    """
    kind = readable(samples, target)
    train, test = (labelled(samples, kind, cells, split) for split in ("train", "test"))
    names, columns, other_columns = _one_hot(samples, train, test, target)
    stats = statistics(samples, cells)
    x, held = standardise(train.features, *stats), standardise(test.features, *stats)
    before = refit(x, train.labels, kind, penalties)
    left, held_left = partial_out(x, columns, held, other_columns)
    after = refit(left, train.labels, kind, penalties)
    hits = right(decide(held, before, kind.form), test.labels)
    hits_left = right(decide(held_left, after, kind.form), test.labels)
    alone = _alone(samples, kind, names, train, test, penalties)
    return Residualised(
        target=target,
        cells=tuple(cells),
        confounds=names,
        before=estimate_share(hits, test.keys),
        after=estimate_share(hits_left, test.keys),
        difference=estimate_difference(hits_left - hits, test.keys),
        alone=estimate_share(alone, test.keys),
        n=len(test),
        converged=before.converged & after.converged,
    )


def partial_out(
    x: Float[Tensor, "cell sample region channel"],
    confounds: Float[Tensor, "sample column"],
    other: Float[Tensor, "cell other region channel"],
    other_confounds: Float[Tensor, "other column"],
) -> tuple[Float[Tensor, "cell sample region channel"], Float[Tensor, "cell other region channel"]]:
    """Residuals of `x` and of `other` under ordinary least squares with an intercept, fitted to (confounds, x).

    Computed in fp64 with the pseudo-inverse of the confounds, so columns may be linearly dependent.
    """
    level = confounds.double().mean(dim=0)
    mean = x.double().mean(dim=1, keepdim=True)
    inverse = torch.linalg.pinv(confounds.double() - level, rtol=RANK)
    slope = torch.einsum("qs,csrd->cqrd", inverse, x.double() - mean)

    def left(values: Tensor, columns: Tensor) -> Tensor:
        explained = mean + torch.einsum("sq,cqrd->csrd", columns.double() - level, slope)
        return (values.double() - explained).to(values.dtype)

    return left(x, confounds), left(other, other_confounds)


def _one_hot(
    samples: ProbeSamples, train: Labelled, test: Labelled, target: str
) -> tuple[tuple[str, ...], Float[Tensor, "train column"], Float[Tensor, "test column"]]:
    """Names of the confounds that vary, and their one-hot columns in train and test, with rare values merged."""
    names, columns = [], []
    for name, column in samples.difficulty.items():
        values = [np.asarray(column)[part.where] for part in (train, test)]
        bins = join_rare([(values[0], train.keys, RARE)])
        if len(bins.names) > 1:
            names.append(name)
            columns.append([np.eye(len(bins.names))[bins.index(value)] for value in values])
    if not samples.difficulty:
        raise NotEnoughSamples(
            f"target {target!r}: nothing is known of the difficulty of these problems, so it cannot be removed from "
            "features"
        )
    if not names:
        raise NotEnoughSamples(
            f"target {target!r}: none of {len(samples.difficulty)} confounds varies among its {len(train)} training "
            "samples, expected at least one that does; widen the task's difficulty"
        )
    joined = [torch.from_numpy(np.concatenate(parts, axis=1)) for parts in zip(*columns, strict=True)]
    return tuple(names), joined[0], joined[1]


def _alone(
    samples: ProbeSamples,
    target: Target,
    names: tuple[str, ...],
    train: Labelled,
    test: Labelled,
    penalties: Float[Tensor, " penalty"],
) -> Float[np.ndarray, " test"]:
    """1 where a probe on the confounds alone is right on test, 0 where it is wrong.

    Its penalty is the one of `penalties` with the highest validation accuracy, on a tie with the lowest cross-entropy,
    as for the probes of a bank.
    """
    rows = difficulty_columns(samples, names)[:, None, None]
    if target.form == "region":  # one label per region; all regions have the same confounds
        rows = rows.expand(-1, -1, samples.regions, -1)
    else:
        target = replace(target, form="problem")
    validation = labelled(samples, target, (), "validation")
    at = torch.from_numpy(train.where)
    stats = spread(rows[at])
    tried = penalties.unique().tolist()
    fit = fit_newton(standardise(rows[at], *stats), train.labels, target, tried)
    held, seen = (standardise(rows[torch.from_numpy(part.where)], *stats) for part in (validation, test))
    kept = validated(held, validation.labels, target.form, fit.weight, fit.bias, tried)
    decision = classes_last(affine(design(seen, target.form), kept.weights, kept.biases), target.form)
    return right(decision, test.labels)[0]
