"""Do probabilities mean what they say? Temperatures, and the errors of probabilities, for many cells at once.

Fit temperatures on validation and measure on test: on the data it was fitted to, a temperature flatters itself.
Rows are whatever carries one label: a sample, or for region targets a sample and region (flatten them). Rows with
label -1 do not count anywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from cosprobe.errors import InputError

COLDEST, HOTTEST = 0.05, 20.0  # one worse than chance would get an infinite temperature
ITERATIONS = 100
PRECISION = 1e-8  # of log T
TIE = 1e-9  # accuracies closer than this are equal: only rounding separates them


@dataclass(frozen=True)
class Reliability:
    """A reliability curve: mean confidence, accuracy and number of rows of each bin, least confident first."""

    confidence: Float[Tensor, " bin"]
    accuracy: Float[Tensor, " bin"]
    count: Int[Tensor, " bin"]


def temperatures(decision: Float[Tensor, "cell row out"], labels: Int[Tensor, " row"]) -> Float[Tensor, " cell"]:
    """T of every cell for which the softmax of decision / T has the lowest mean cross-entropy, within [0.05, 20].

    One number per cell: it changes how sure a probe is, never what it says. Cells whose cross-entropy does not depend
    on T (decision values equal for all classes, or so far apart that the loss is 0 in fp64) keep T = 1.
    Newton's method on log T, in fp64, all cells together; a bracket around the only minimum (the cross-entropy is
    convex in 1 / T) takes over wherever Newton would leave it or slow down.
    One uniform pseudo-label is counted among the labels (as Platt 1999, section 2.2, smooths his targets): a cell
    that is right on every row would otherwise get the lowest T there is, and be certain ever after.
    Raises ValueError for values that are not finite, no labelled row, or a label out of range.
    Source: Guo et al. (2017), "On calibration of modern neural networks", equation 9, there for one network and
    without the pseudo-label.
    """
    values, labels = _labelled(decision, labels)
    if not torch.isfinite(values).all():
        raise InputError("decision: values that are not finite, expected finite ones; refit the probes")
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
    """Expected calibration error of the most probable class: mean distance of confidence and accuracy over bins.

    Bins hold equally many rows, as many bins as keep accuracy from falling with confidence: 1, 2, 3, ... until
    it first falls. Rows of equal confidence share their accuracy, so their order does not matter.
    Noise inside the bins reads as miscalibration, the more so the fewer rows there are: perfectly calibrated rows (four
    classes) come out at 0.06 for 100 rows and 0.02 for 2,000. That is this estimator, made for few rows; 15 bins
    of equally many rows give 0.14 and 0.03. State the number of rows beside it, and compare like with like.
    Raises ValueError for rows that are no probabilities, no labelled row, or a label out of range.
    Source: Roelofs et al. (2022), "Mitigating bias in calibration error estimation", algorithm 1, here with absolute
    instead of squared distances, as `ECE` usually has it.
    """
    confidence, right = _ranked(probabilities, labels)
    rows = confidence.shape[1]
    ordered = (right.diff(dim=1) >= -TIE).all(dim=1)  # never falls, however many bins: one per row, without the search
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
    """Mean over rows of the squared distance between probabilities and the one-hot label, summed over classes.

    0 is perfect, 1 - 1 / out is knowing nothing, 2 is certain and wrong. For two classes it is twice
    the score that counts one of them.
    Raises ValueError for rows that are no probabilities, no labelled row, or a label out of range.
    Source: Brier (1950), "Verification of forecasts expressed in terms of probability", equation 2.
    """
    values, labels = _labelled(probabilities, labels)
    _check_probabilities(values)
    truth = F.one_hot(labels, values.shape[2]).to(values)
    return (values - truth).square().sum(dim=2).mean(dim=1).to(probabilities.dtype)


def reliability(probabilities: Float[Tensor, "row out"], labels: Int[Tensor, " row"], bins: int = 10) -> Reliability:
    """The reliability curve of one cell, in bins of equally many rows (sizes differ by one at most).

    Raises ValueError for fewer labelled rows than bins, and as `ece` does.
    """
    confidence, right = _ranked(probabilities[None], labels)
    rows = confidence.shape[1]
    if not 1 <= bins <= rows:
        raise InputError(f"bins={bins}: expected 1 to {rows}, the number of labelled rows; take fewer bins")
    mean, accuracy = (_binned(values, bins)[0].to(probabilities.dtype) for values in (confidence, right))
    return Reliability(mean, accuracy, _edges(rows, bins, confidence.device).diff())


def _derivatives(
    margin: Float[Tensor, "cell row out"], log_t: Float[Tensor, " cell"]
) -> tuple[Float[Tensor, " cell"], Float[Tensor, " cell"]]:
    """First and second derivative of the mean cross-entropy in log T. margin: decision minus what the label wants."""
    inverse = (-log_t).exp()
    p = (margin * inverse[:, None, None]).softmax(dim=2)
    expected = (p * margin).sum(dim=2)
    variance = (p * (margin - expected[..., None]).square()).sum(dim=2).mean(dim=1)
    pull = inverse * expected.mean(dim=1)
    return -pull, pull + inverse.square() * variance


def _labelled(
    values: Float[Tensor, "cell row out"], labels: Int[Tensor, " row"]
) -> tuple[Float[Tensor, "cell labelled out"], Int[Tensor, " labelled"]]:
    """The rows with a label, in fp64."""
    labels = labels.to(values.device)
    keep = labels >= 0
    if not keep.any():
        raise InputError(f"labels: none among {len(labels)} rows, expected at least 1; collect more problems")
    if int(labels.max()) >= values.shape[2]:
        raise InputError(f"labels: {int(labels.max())}, expected -1 to {values.shape[2] - 1}; pass the target's own")
    return values[:, keep].double(), labels[keep].long()


def _check_probabilities(values: Float[Tensor, "cell row out"]) -> None:
    total = values.sum(dim=2)
    if not (values.min() >= 0 and (total - 1).abs().max() < 1e-3):  # written so that NaN fails too
        raise InputError("probabilities: expected rows of at least 0 that add up to 1; take the softmax first")


def _ranked(
    probabilities: Float[Tensor, "cell row out"], labels: Int[Tensor, " row"]
) -> tuple[Float[Tensor, "cell labelled"], Float[Tensor, "cell labelled"]]:
    """Confidence, rising, and whether the most probable class is right: the mean of it over equal confidences."""
    values, labels = _labelled(probabilities, labels)
    _check_probabilities(values)
    top, said = values.max(dim=2)
    confidence, order = top.sort(dim=1)
    right = (said == labels).double().gather(1, order)
    group = F.pad((confidence.diff(dim=1) > 0).long().cumsum(dim=1), (1, 0))
    total = torch.zeros_like(right).scatter_add(1, group, right)
    count = torch.zeros_like(right).scatter_add(1, group, torch.ones_like(right))
    return confidence, (total / count.clamp(min=1)).gather(1, group)


def _edges(rows: int, bins: int, device: torch.device) -> Int[Tensor, " edge"]:
    return torch.arange(bins + 1, device=device) * rows // bins


def _binned(values: Float[Tensor, "cell row"], bins: int) -> Float[Tensor, "cell bin"]:
    """Means of `bins` neighbouring groups of equally many rows."""
    edges = _edges(values.shape[1], bins, values.device)
    return F.pad(values.cumsum(dim=1), (1, 0))[:, edges].diff(dim=1) / edges.diff()


def _binned_error(
    confidence: Float[Tensor, "cell row"], right: Float[Tensor, "cell row"], bins: int
) -> Float[Tensor, " cell"]:
    share = _edges(confidence.shape[1], bins, confidence.device).diff() / confidence.shape[1]
    return ((_binned(confidence, bins) - _binned(right, bins)).abs() * share).sum(dim=1)
