"""What a probe reads beyond nuisances: their part of the features is removed, and the probe fitted anew.

A target may be decodable because it goes along with something plain, such as how long the path is. Every channel of
every region is regressed on the nuisances over the training samples (never on test samples: removing with them what
they share by chance biases what is left), as recommended by Snoek, Miletic and Scholte (2019), "How to control for
confounds in decoding analyses of neuroimaging data". A linear probe can then find on the training samples
nothing of any sum of functions of single nuisances. What is not removed: interactions of several nuisances, and what
they do to spread rather than mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cosprobe.activations import ProbeSamples, nuisance_columns
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

RARE = 10  # values with fewer training problems are joined with their neighbours
RANK = 1e-9  # directions of the nuisances below this share of the largest do not exist (one-hot columns add up to 1)


@dataclass(frozen=True)
class Residualised:
    """Test accuracy of refitted probes with and without what nuisances explain of the features.

    nuisances: names of those that vary. difference: after - before, its interval paired. alone: a probe that sees
    nothing but the nuisances. n: test samples. converged: whether both fits of a cell met their tolerance.
    """

    target: str
    cells: tuple[Cell, ...]
    nuisances: tuple[str, ...]
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
    lambdas: Float[Tensor, " penalty"],
) -> Residualised:
    """Refits `target` at each cell, before and after nuisances (every column of `samples.difficulty`) are removed.

    lambdas: the penalty of each cell, for both fits: features are standardised once, before the removal, and keep
    their scale. The probe of nuisances alone has the one of these penalties that is best on validation.
    Raises ValueError for an unknown target or cell, not one penalty per cell, or when no nuisance varies among the
    training samples of the target.
    """
    kind = readable(samples, target)
    train, test = (labelled(samples, kind, cells, split) for split in ("train", "test"))
    names, columns, other_columns = _one_hot(samples, train, test, target)
    stats = statistics(samples, cells)
    x, held = standardise(train.features, *stats), standardise(test.features, *stats)
    before = refit(x, train.labels, kind, lambdas)
    left, held_left = partial_out(x, columns, held, other_columns)
    after = refit(left, train.labels, kind, lambdas)
    hits = right(decide(held, before, kind.form), test.labels)
    hits_left = right(decide(held_left, after, kind.form), test.labels)
    alone = _alone(samples, kind, names, train, test, lambdas)
    return Residualised(
        target=target,
        cells=tuple(cells),
        nuisances=names,
        before=estimate_share(hits, test.keys),
        after=estimate_share(hits_left, test.keys),
        difference=estimate_difference(hits_left - hits, test.keys),
        alone=estimate_share(alone, test.keys),
        n=len(test),
        converged=before.converged & after.converged,
    )


def partial_out(
    x: Float[Tensor, "cell sample region channel"],
    nuisances: Float[Tensor, "sample column"],
    other: Float[Tensor, "cell other region channel"],
    other_nuisances: Float[Tensor, "other column"],
) -> tuple[Float[Tensor, "cell sample region channel"], Float[Tensor, "cell other region channel"]]:
    """What ordinary least squares with an intercept, fitted to (nuisances, x), leaves of `x` and of `other`.

    In fp64, by the pseudo-inverse of the small design: columns that depend on each other do no harm.
    """
    level = nuisances.double().mean(dim=0)
    mean = x.double().mean(dim=1, keepdim=True)
    inverse = torch.linalg.pinv(nuisances.double() - level, rtol=RANK)
    slope = torch.einsum("qs,csrd->cqrd", inverse, x.double() - mean)

    def left(values: Tensor, columns: Tensor) -> Tensor:
        explained = mean + torch.einsum("sq,cqrd->csrd", columns.double() - level, slope)
        return (values.double() - explained).to(values.dtype)

    return left(x, nuisances), left(other, other_nuisances)


def _one_hot(
    samples: ProbeSamples, train: Labelled, test: Labelled, target: str
) -> tuple[tuple[str, ...], Float[Tensor, "train column"], Float[Tensor, "test column"]]:
    """The nuisances that vary, and their values in train and test as one-hot columns, rare ones joined."""
    names, columns = [], []
    for name, column in samples.difficulty.items():
        values = [np.asarray(column)[part.where] for part in (train, test)]
        bins = join_rare([(values[0], train.keys, RARE)])
        if len(bins.names) > 1:
            names.append(name)
            columns.append([np.eye(len(bins.names))[bins.index(value)] for value in values])
    if not names:
        raise NotEnoughSamples(
            f"target {target!r}: none of {len(samples.difficulty)} nuisances varies among its {len(train)} training "
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
    lambdas: Float[Tensor, " penalty"],
) -> Float[np.ndarray, " test"]:
    """Right and wrong on test of a probe of the nuisances; its penalty, one of `lambdas`, chosen on validation as the
    bank chooses: most right, then the lowest cross-entropy."""
    rows = nuisance_columns(samples, names)[:, None, None]
    if target.form == "region":  # a label for each region, all of which see the same
        rows = rows.expand(-1, -1, samples.regions, -1)
    else:
        target = replace(target, form="problem")
    trial = labelled(samples, target, (), "validation")
    at = torch.from_numpy(train.where)
    stats = spread(rows[at])
    penalties = lambdas.unique().tolist()
    fit = fit_newton(standardise(rows[at], *stats), train.labels, target, penalties)
    held, seen = (standardise(rows[torch.from_numpy(part.where)], *stats) for part in (trial, test))
    kept = validated(held, trial.labels, target.form, fit.weight, fit.bias, penalties)
    decision = classes_last(affine(design(seen, target.form), kept.weights, kept.biases), target.form)
    return right(decision, test.labels)[0]
