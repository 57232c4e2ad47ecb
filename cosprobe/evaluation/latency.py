"""Latency: the step (or layer) at which a target becomes decodable, comparable between targets with unequal maxima.

A *line* is the accuracy of one probe or one baseline along steps (or layers). Its latency is the point where accuracy
above chance first reaches half of its own maximum above chance, as in half-maximum onsets in electrophysiology. With a
fixed threshold, a target with a low maximum would seem late.

The maximum is the largest of several noisy points, so it is slightly too high, and latencies are slightly too late. In
simulations with 60 to 300 problems the bias is 0.1 to 0.2 steps for a line that rises to 0.9, and 0.4 to 0.7 for one
that rises to 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy.special import ndtr, ndtri

from cosprobe.errors import InputError
from cosprobe.evaluation.intervals import COVERAGE, TIE, problem_draws
from cosprobe.evaluation.significance import CHUNK

# Standard deviations to either side of an interval. With 1.96, intervals would cover 0.91 to 0.95, because every draw
# has a maximum of its own (`validity.onsets`).
QUANTILE = 2.24


@dataclass(frozen=True)
class Latency:
    """Latency of every line, in the unit of `at` (step index or layer). NaN for lines without evidence.

    value: on all samples.
    lower, upper: bias-corrected 95 % bootstrap interval over problems.
    censored: true if half of the maximum is reached at the first point of the line. Then the value means "at or
    before".
    bootstrap: the latency in every draw. All lines use the same draws. NaN where the line never exceeds chance.
    """

    value: Float[np.ndarray, "line"]
    lower: Float[np.ndarray, "line"]
    upper: Float[np.ndarray, "line"]
    censored: Bool[np.ndarray, "line"]
    bootstrap: Float[np.ndarray, "line draw"]


@dataclass(frozen=True)
class Lag:
    """Differences of two latencies, in the unit of positions. NaN where either latency is NaN.

    at_most: the first latency is censored, so the true lag may be smaller. at_least: the second latency is censored, so
    the true lag may be larger. If both are true, the sign of the lag is unknown.
    """

    value: Float[np.ndarray, "pair"]
    lower: Float[np.ndarray, "pair"]
    upper: Float[np.ndarray, "pair"]
    at_most: Bool[np.ndarray, "pair"]
    at_least: Bool[np.ndarray, "pair"]


def latency(
    correct: Float[np.ndarray, "line point sample"],
    chance: Float[np.ndarray, "line *sample"],
    at: Sequence[float | int],
    keys: Shaped[np.ndarray, "sample"],
    found: Bool[np.ndarray, "line"],
    draws: int = 1000,
    seed: int = 0,
) -> Latency:
    """Half-maximum latency of every line, linearly interpolated between points.

    correct: right (1) or wrong (0) at each point. A point that is NaN on every sample (x0-hat not decoded at that step)
    is left out of that line.
    chance: a number per line, or 1 and 0 where the guess is right and wrong, per line and sample. In the second form it
    is resampled together with `correct`.
    at: positions of the points, increasing.
    keys: the problem of each sample.
    found: lines with evidence (corrected significance) that they exceed chance somewhere. Other lines get NaN, as do
    lines that never exceed chance on all samples, or that never exceed it in more than 5 % of the draws.
    draws, seed: number and seed of the bootstrap draws. The maximum is recomputed in every draw.
    Raises InputError for no samples, positions that do not increase or do not match the points, and a point that is NaN
    on some samples only.
    """
    plan = problem_draws(keys, draws, seed)
    correct, positions = np.asarray(correct, dtype=np.float64), np.asarray(at, dtype=np.float64)
    lines, points, samples = correct.shape
    if positions.shape != (points,) or (np.diff(positions) <= 0).any():
        raise InputError(f"at={list(at)}: expected {points} increasing positions, one per point; sort the points")
    missing = np.isnan(correct)
    if (missing.any(axis=2) != missing.all(axis=2)).any():
        line, point = np.argwhere(missing.any(axis=2) != missing.all(axis=2))[0]
        raise InputError(
            f"line {line}, point {point}: NaN on some samples, expected on all or none; leave the point out"
        )
    guess = np.asarray(chance, dtype=np.float64)
    if guess.shape not in ((lines,), (lines, samples)):
        raise InputError(f"chance{list(guess.shape)}: expected [{lines}] or [{lines}, {samples}], one row per line")
    guess = guess.reshape(lines, -1)
    exists = ~missing[:, :, 0]
    value, bootstrap, censored = np.empty(lines), np.empty((lines, draws)), np.empty(lines, dtype=bool)
    size = max(1, CHUNK // max(1, points))
    for start in range(0, lines, size):
        part = slice(start, start + size)
        above = np.nan_to_num(correct[part]) - guess[part, None]
        means = plan.means(above.reshape(-1, samples)).reshape(*above.shape[:2], draws)
        heights = np.concatenate([above.mean(axis=2, keepdims=True), means], axis=2)
        crossed, first = _half_maximum(heights, positions, exists[part])
        value[part], bootstrap[part], censored[part] = crossed[:, 0], crossed[:, 1:], first[:, 0]
    known = np.asarray(found) & np.isfinite(value) & (np.isnan(bootstrap).mean(axis=1) <= 1 - COVERAGE)
    bootstrap = np.where(known[:, None], bootstrap, np.nan)
    return Latency(np.where(known, value, np.nan), *_interval(value, bootstrap), censored & known, bootstrap)


def lag(latencies: Latency, first: Sequence[int], second: Sequence[int]) -> Lag:
    """Latency of line first[i] minus latency of line second[i], paired: both use the same draws.

    With x0-hat as `first` and a probe as `second`, a positive lag means that the probe decodes the target before x0-hat
    shows it. Draws in which either line has no latency are left out. Raises InputError when `first` and `second` have
    unequal lengths.
    """
    if len(first) != len(second):
        raise InputError(
            f"first and second have {len(first)} and {len(second)} lines: expected equal numbers; repeat a shared line"
        )
    a, b = np.asarray(first, dtype=int), np.asarray(second, dtype=int)
    value = latencies.value[a] - latencies.value[b]
    lower, upper = _interval(value, latencies.bootstrap[a] - latencies.bootstrap[b])
    known = np.isfinite(value)
    return Lag(value, lower, upper, latencies.censored[a] & known, latencies.censored[b] & known)


def lag_difference(latencies: Latency, first: tuple[int, int], second: tuple[int, int]) -> tuple[float, float, float]:
    """The lag of the lines `first` minus that of the lines `second`, with its 95 % interval. All four lines are paired.

    NaN where one of the latencies is NaN. Draws in which some line has no latency are left out. See `lag`.
    """
    signs = np.array([1.0, -1.0, -1.0, 1.0])
    lines = [*first, *second]
    value, draws = (signs @ values[lines] for values in (latencies.value, latencies.bootstrap))
    lower, upper = _interval(value[None], draws[None])
    return float(value), float(lower[0]), float(upper[0])


def _half_maximum(
    heights: Float[np.ndarray, "line point draw"],
    at: Float[np.ndarray, "point"],
    exists: Bool[np.ndarray, "line point"],
) -> tuple[Float[np.ndarray, "line draw"], Bool[np.ndarray, "line draw"]]:
    """The position where each line first reaches half of its maximum in each draw; whether it is the first point."""
    order = np.argsort(~exists, axis=1, kind="stable")  # points that exist first; the last of them repeated after that
    last = np.maximum(exists.sum(axis=1) - 1, 0)
    order = np.take_along_axis(order, np.minimum(np.arange(len(at)), last[:, None]), axis=1)
    heights, position = np.take_along_axis(heights, order[:, :, None], axis=1), at[order]
    largest = heights.max(axis=1)
    half = largest / 2
    after = (heights >= half[:, None] - TIE).argmax(axis=1)
    before = np.maximum(after - 1, 0)
    low, high = (np.take_along_axis(heights, i[:, None], axis=1)[:, 0] for i in (before, after))
    start, end = (np.take_along_axis(position, i, axis=1) for i in (before, after))
    rise = np.where(after > 0, high - low, 1.0)  # above 0: the first point is below half, the second is not
    share = np.clip((half - low) / rise, 0.0, 1.0)
    exceeds = (largest > TIE) & exists.any(axis=1, keepdims=True)
    return np.where(exceeds, start + share * (end - start), np.nan), (after == 0) & exceeds


def _interval(
    value: Float[np.ndarray, "line"], bootstrap: Float[np.ndarray, "line draw"]
) -> tuple[Float[np.ndarray, "line"], Float[np.ndarray, "line"]]:
    """Bias-corrected percentiles of the draws (Efron 1981, "Nonparametric standard errors and confidence intervals"),
    with QUANTILE standard deviations to either side."""
    bounds = np.full((2, len(bootstrap)), np.nan)
    for line in np.flatnonzero(~np.isnan(bootstrap).all(axis=1) & np.isfinite(value)):
        known = np.sort(bootstrap[line][~np.isnan(bootstrap[line])])
        below = ((known < value[line] - TIE).sum() + (known <= value[line] + TIE).sum()) / 2 / len(known)
        shift = 2 * ndtri(np.clip(below, 0.5 / len(known), 1 - 0.5 / len(known)))
        bounds[:, line] = np.quantile(known, ndtr([shift - QUANTILE, shift + QUANTILE]))
    return bounds[0], bounds[1]
