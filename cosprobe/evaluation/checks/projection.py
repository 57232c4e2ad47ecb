"""What a projection of the features costs: accuracy with all channels against accuracy with those that were kept.

A run with `probe.project` keeps the features of a few cells with all channels, too. Probes are fitted to both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Shaped

from cosprobe.activations import ProbeSamples
from cosprobe.cells import SPLIT_ORDER, Cell
from cosprobe.evaluation.checks.refitting import (
    Estimate,
    estimate_difference,
    estimate_share,
    labelled,
    readable,
    right,
    statistics,
)
from cosprobe.probes import affine, classes_last, design, fit_newton, standardise, validated
from cosprobe.tasks import Target


@dataclass(frozen=True)
class ProjectionCost:
    """Test accuracy of probes on all channels and on the projected ones, at one cell and on the same samples.

    cell: of the cells that are kept with all channels, the one with the highest validation accuracy on these.
    channels, kept: number of channels without and with the projection. difference: projected - all, with a paired
    interval.
    """

    target: str
    cell: Cell
    channels: int
    kept: int
    whole: Estimate
    projected: Estimate
    difference: Estimate


def projection_cost(
    samples: ProbeSamples, whole: ProbeSamples, target: str, position: str, penalties: Sequence[float]
) -> ProjectionCost:
    """Fits the probes of a target to both kinds of features of the same samples.

    samples: projected. whole: with all channels, at some of the same cells. position: of the cells that are compared.
    penalties: one is chosen for each fit, on validation.
    Raises NotEnoughSamples when a split has no sample with a label of the target.
    """
    kind = readable(samples, target)
    cells = [cell for cell in whole.cells if cell.position == position]
    scores, hits, keys = _fitted(whole, kind, cells, penalties)
    best = int(scores.argmax())
    _, kept, _ = _fitted(samples, kind, [cells[best]], penalties)
    return ProjectionCost(
        target,
        cells[best],
        whole.features.shape[-1],
        samples.features.shape[-1],
        estimate_share(hits[best], keys),
        estimate_share(kept[0], keys),
        estimate_difference(kept[0] - hits[best], keys),
    )


def _fitted(
    samples: ProbeSamples, target: Target, cells: Sequence[Cell], penalties: Sequence[float]
) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, "cell sample"], Shaped[np.ndarray, " sample"]]:
    """Validation accuracy of each cell, what is right on test, and the problems of the test samples."""
    train, validation, test = (labelled(samples, target, cells, split) for split in SPLIT_ORDER)
    stat, form = statistics(samples, cells), target.form
    fit = fit_newton(standardise(train.features, *stat), train.labels, target, penalties)
    held = standardise(validation.features, *stat)
    chosen = validated(held, validation.labels, form, fit.weight, fit.bias, penalties)
    found = [
        right(classes_last(affine(design(x, form), chosen.weights, chosen.biases), form), part.labels)
        for x, part in ((held, validation), (standardise(test.features, *stat), test))
    ]
    return found[0].mean(axis=1), found[1], test.keys
