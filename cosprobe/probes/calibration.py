"""Calibration of probabilities, for many cells at once: temperature scaling, ECE, Brier score, reliability curves.

Fit temperatures on validation and measure calibration on test. On the samples of its own fit, a temperature looks
better than it is.
A row is one softmax with one label: a sample, or for targets of form `region` a pair of sample and region (flatten
them). Rows with label -1 are ignored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from cosprobe.errors import InputError

COLDEST, HOTTEST = 0.05, 20.0  # bounds of T; it would be infinite for a cell worse than chance
ITERATIONS = 100
PRECISION = 1e-8  # of log T, at which the iteration stops
TIE = 1e-9  # accuracies that differ by less are equal up to rounding


@dataclass(frozen=True)
class Reliability:
    """A reliability curve: mean confidence, accuracy and number of rows of each bin, least confident first."""

    confidence: Float[Tensor, " bin"]
    accuracy: Float[Tensor, " bin"]
    count: Int[Tensor, " bin"]


def temperatures(decision: Float[Tensor, "cell row out"], labels: Int[Tensor, " row"]) -> Float[Tensor, " cell"]:
    """The temperature T of every cell, in [0.05, 20], that minimises the mean cross-entropy of softmax(decision / T).

    T changes the confidence of a probe, but never its predicted label. T = 1 for cells whose cross-entropy does not
    depend on T (decision values equal for all classes, or so far apart that the loss is 0 in fp64).
    Method: Newton's method on log T, in fp64, for all cells together. The cross-entropy is convex in 1 / T, so it has
    one minimum. Bisection replaces Newton steps that leave the bracket of the minimum or converge slowly.
    Raises InputError for values that are not finite, no labelled row, or a label out of range.
    Source: Guo et al. (2017), "On calibration of modern neural networks", equation 9.
    Departure: one row with a uniform label is added (as Platt 1999, section 2.2, smooths targets). Without it, a cell
    that is right on every row would get the lowest T, and all its confidences would be close to 1.
    """
    values, labels = _labelled(decision, labels)
    if not torch.isfinite(values).all():
        raise InputError("decision: expected finite values, found NaN or infinity; fit the probes again")
    rows, classes = len(labels), values.shape[2]
    wanted = (rows * F.one_hot(labels, classes).to(values) + 1 / classes) / (rows + 1)
    values = values - values[:, :, :1]  # equal values become exactly 0
    margin = values - (wanted * values).sum(dim=2, keepdim=True)
    at = values.new_zeros(len(values))
    low, high = torch.full_like(at, math.log(COLDEST)), torch.full_like(at, math.log(HOTTEST))
    cold, hot = _derivatives(margin, low)[0] > 0, _derivatives(margin, high)[0] < 0  # the minimum is beyond a bound
    at = torch.where(cold, low, torch.where(hot, high, at))
    step, still = high - low, torch.nonzero(~(cold | hot))[:, 0]
    for _ in range(ITERATIONS):
        if not len(still):
            break
        here = at[still]
        slope, curve = _derivatives(margin[still], here)
        low[still] = bottom = torch.where(slope < 0, here, low[still])
        high[still] = top = torch.where(slope > 0, here, high[still])
        newton = here - slope / torch.where(curve > 0, curve, torch.inf)
        quick = (curve > 0) & (bottom < newton) & (newton < top) & ((newton - here).abs() <= step[still].abs() / 2)
        at[still] = moved = torch.where(slope == 0, here, torch.where(quick, newton, (bottom + top) / 2))
        step[still] = moved - here
        still = still[(moved - here).abs() > PRECISION]
    return at.exp().to(decision.dtype)


def ece(probabilities: Float[Tensor, "cell row out"], labels: Int[Tensor, " row"]) -> Float[Tensor, " cell"]:
    """Expected calibration error of the most probable class: mean over bins of `|confidence - accuracy|`.

    Bins have equal numbers of rows. The number of bins is the largest before accuracy first decreases from one bin to
    the next, trying 1, 2, 3, ... bins. Rows with equal confidence get their mean accuracy, so order has no effect.
    The estimate is biased upwards, more so for few rows: perfectly calibrated rows with four classes give 0.06 for 100
    rows and 0.02 for 2,000. (15 bins with equal numbers of rows give 0.14 and 0.03.) Report the number of rows with it,
    and compare values at equal numbers of rows only.
    Raises InputError for rows that are not probabilities, no labelled row, or a label out of range.
    Source: Roelofs et al. (2022), "Mitigating bias in calibration error estimation", algorithm 1. Departure: absolute
    instead of squared distances, as usual for the ECE.
    """
    confidence, right = _ranked(probabilities, labels)
    rows = confidence.shape[1]
    ordered = (right.diff(dim=1) >= -TIE).all(dim=1)  # never decreases: one bin per row, no search needed
    error = torch.where(ordered, (right - confidence).abs().mean(dim=1), _binned_error(confidence, right, 1))
    rising = torch.nonzero(~ordered)[:, 0]
    for bins in range(2, rows):
        accuracy = _binned(right[rising], bins)
        rising = rising[(accuracy.diff(dim=1) >= -TIE).all(dim=1)]
        if not len(rising):
            break
        error[rising] = _binned_error(confidence[rising], right[rising], bins)
    return error.to(probabilities.dtype)


def brier(probabilities: Float[Tensor, "cell row out"], labels: Int[Tensor, " row"]) -> Float[Tensor, " cell"]:
    """Brier score: squared distance between probabilities and one-hot label, summed over classes, mean over rows.

    0 for perfect predictions, 1 - 1 / out for uniform probabilities, 2 for a probability of 1 for a wrong class. For
    two classes it is twice the score that uses the probability of one class only.
    Raises InputError for rows that are not probabilities, no labelled row, or a label out of range.
    Source: Brier (1950), "Verification of forecasts expressed in terms of probability", equation 2.
    """
    values, labels = _labelled(probabilities, labels)
    _check_probabilities(values)
    truth = F.one_hot(labels, values.shape[2]).to(values)
    return (values - truth).square().sum(dim=2).mean(dim=1).to(probabilities.dtype)


def reliability(probabilities: Float[Tensor, "row out"], labels: Int[Tensor, " row"], bins: int = 10) -> Reliability:
    """The reliability curve of one cell, with bins of equal numbers of rows (they differ by at most one).

    Raises InputError for fewer labelled rows than bins, and the errors of `ece`.
    """
    confidence, right = _ranked(probabilities[None], labels)
    rows = confidence.shape[1]
    if not 1 <= bins <= rows:
        raise InputError(f"bins={bins}: expected 1 to {rows}, the number of labelled rows; lower bins")
    mean, accuracy = (_binned(values, bins)[0].to(probabilities.dtype) for values in (confidence, right))
    return Reliability(mean, accuracy, _edges(rows, bins, confidence.device).diff())


def _derivatives(
    margin: Float[Tensor, "cell row out"], log_t: Float[Tensor, " cell"]
) -> tuple[Float[Tensor, " cell"], Float[Tensor, " cell"]]:
    """First and second derivative of the mean cross-entropy in log T.

    margin: decision values minus their mean under the smoothed label.
    """
    inverse = (-log_t).exp()
    p = (margin * inverse[:, None, None]).softmax(dim=2)
    expected = (p * margin).sum(dim=2)
    variance = (p * (margin - expected[..., None]).square()).sum(dim=2).mean(dim=1)
    pull = inverse * expected.mean(dim=1)
    return -pull, pull + inverse.square() * variance


def _labelled(
    values: Float[Tensor, "cell row out"], labels: Int[Tensor, " row"]
) -> tuple[Float[Tensor, "cell labelled out"], Int[Tensor, " labelled"]]:
    """The rows with a label, in fp64, and their labels. Raises InputError for none, or a label out of range."""
    labels = labels.to(values.device)
    keep = labels >= 0
    if not keep.any():
        raise InputError(f"labels: none among {len(labels)} rows, expected at least 1; collect more problems")
    if int(labels.max()) >= values.shape[2]:
        raise InputError(
            f"labels: {int(labels.max())}, expected -1 to {values.shape[2] - 1}; pass labels of this target"
        )
    return values[:, keep].double(), labels[keep].long()


def _check_probabilities(values: Float[Tensor, "cell row out"]) -> None:
    """Raises InputError unless values are 0 or more and add up to 1 in every row."""
    total = values.sum(dim=2)
    if not (values.min() >= 0 and (total - 1).abs().max() < 1e-3):  # this condition is False for NaN
        raise InputError("probabilities: expected rows of values from 0 to 1 that add up to 1; apply softmax first")


def _ranked(
    probabilities: Float[Tensor, "cell row out"], labels: Int[Tensor, " row"]
) -> tuple[Float[Tensor, "cell labelled"], Float[Tensor, "cell labelled"]]:
    """Sorted confidences, and accuracies of the most probable class, averaged over rows with equal confidence."""
    values, labels = _labelled(probabilities, labels)
    _check_probabilities(values)
    top, predicted = values.max(dim=2)
    confidence, order = top.sort(dim=1)
    right = (predicted == labels).double().gather(1, order)
    group = F.pad((confidence.diff(dim=1) > 0).long().cumsum(dim=1), (1, 0))
    total = torch.zeros_like(right).scatter_add(1, group, right)
    count = torch.zeros_like(right).scatter_add(1, group, torch.ones_like(right))
    return confidence, (total / count.clamp(min=1)).gather(1, group)


def _edges(rows: int, bins: int, device: torch.device) -> Int[Tensor, " edge"]:
    """First row of every bin, and the number of rows."""
    return torch.arange(bins + 1, device=device) * rows // bins


def _binned(values: Float[Tensor, "cell row"], bins: int) -> Float[Tensor, "cell bin"]:
    """Means over `bins` consecutive groups with equal numbers of rows."""
    edges = _edges(values.shape[1], bins, values.device)
    return F.pad(values.cumsum(dim=1), (1, 0))[:, edges].diff(dim=1) / edges.diff()


def _binned_error(
    confidence: Float[Tensor, "cell row"], right: Float[Tensor, "cell row"], bins: int
) -> Float[Tensor, " cell"]:
    """Mean over bins of |confidence - accuracy|, weighted by the number of rows."""
    share = _edges(confidence.shape[1], bins, confidence.device).diff() / confidence.shape[1]
    return ((_binned(confidence, bins) - _binned(right, bins)).abs() * share).sum(dim=1)
