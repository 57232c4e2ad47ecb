"""When along the steps (or layers) something becomes decodable, in a measure that targets of any ceiling share.

A *line* is the accuracy of one probe or one baseline over positions. Its latency is the position where accuracy
above chance first reaches half of its own maximum above chance, as half-maximum onsets are read off in
electrophysiology; a fixed threshold would call a target with a low ceiling late. Since the maximum is the largest of
several noisy points it is a little too high and latencies a little too late: in simulations with 60 to 300 problems
by 0.1 to 0.2 steps for a line that climbs to 0.9, by 0.4 to 0.7 for one that stops at 0.5.
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

# Standard deviations to either side of an interval: 1.96 would cover 0.91 to 0.95, because the maximum is taken anew in
# every draw (`validity.onsets`).
QUANTILE = 2.24


@dataclass(frozen=True)
class Latency:
    """Positions, in the unit of `at` (step index or layer), one per line; NaN for lines without evidence.

    value: on all samples. lower, upper: 95 % interval from draws of problems, freed of their bias. censored: half of
    the maximum is reached at the line's first point already, so the value means "at or before". drawn: the latency in
    every draw, the same problems for all lines; NaN in draws where the line nowhere exceeds chance.
    """

    value: Float[np.ndarray, "line"]
    lower: Float[np.ndarray, "line"]
    upper: Float[np.ndarray, "line"]
    censored: Bool[np.ndarray, "line"]
    drawn: Float[np.ndarray, "line draw"]


@dataclass(frozen=True)
class Lag:
    """Differences of two latencies, in the unit of positions; NaN where either is.

    at_most: the first of the two is censored, the true lag may be smaller. at_least: the second is, it may be
    larger. Both at once: nothing is known of its sign.
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

    correct: right or wrong at each point; a point that is NaN on every sample (x0-hat not decoded at that step) does
    not exist for that line. chance: a number per line, or right and wrong of the guess, per line and sample, which is
    then drawn along. at: positions of the points, rising. keys: the problem of each sample. found: lines with
    evidence (corrected significance) that they exceed chance anywhere; others get NaN, as does a line that nowhere
    exceeds chance, or fails to in more than 5 % of the draws.
    The maximum, and with it the height that must be reached, is taken anew in every draw.
    Raises ValueError for no samples, positions that do not rise or fit, and a point that is NaN on some samples only.
    """
    plan = problem_draws(keys, draws, seed)
    correct, positions = np.asarray(correct, dtype=np.float64), np.asarray(at, dtype=np.float64)
    lines, points, samples = correct.shape
    if positions.shape != (points,) or (np.diff(positions) <= 0).any():
        raise InputError(f"at={list(at)}: expected {points} rising positions, one per point; sort the points")
    missing = np.isnan(correct)
    if (missing.any(axis=2) != missing.all(axis=2)).any():
        line, point = np.argwhere(missing.any(axis=2) != missing.all(axis=2))[0]
        raise InputError(f"line {line}, point {point}: NaN on some samples, expected on all or none; drop the point")
    guess = np.asarray(chance, dtype=np.float64)
    if guess.shape not in ((lines,), (lines, samples)):
        raise InputError(f"chance{list(guess.shape)}: expected [{lines}] or [{lines}, {samples}], one row per line")
    guess = guess.reshape(lines, -1)
    exists = ~missing[:, :, 0]
    value, drawn, censored = np.empty(lines), np.empty((lines, draws)), np.empty(lines, dtype=bool)
    size = max(1, CHUNK // max(1, points))
    for start in range(0, lines, size):
        part = slice(start, start + size)
        above = np.nan_to_num(correct[part]) - guess[part, None]
        means = plan.means(above.reshape(-1, samples)).reshape(*above.shape[:2], draws)
        heights = np.concatenate([above.mean(axis=2, keepdims=True), means], axis=2)
        crossed, first = _half_maximum(heights, positions, exists[part])
        value[part], drawn[part], censored[part] = crossed[:, 0], crossed[:, 1:], first[:, 0]
    known = np.asarray(found) & np.isfinite(value) & (np.isnan(drawn).mean(axis=1) <= 1 - COVERAGE)
    drawn = np.where(known[:, None], drawn, np.nan)
    return Latency(np.where(known, value, np.nan), *_interval(value, drawn), censored & known, drawn)


def lag(latencies: Latency, first: Sequence[int], second: Sequence[int]) -> Lag:
    """Latency of line first[i] minus latency of line second[i], paired: both are read in the same draws.

    With the visible baseline as `first` and a probe as `second`, a positive lag means decodable before visible.
    Draws in which either line has no latency are left out. Raises ValueError when the two do not pair up.
    """
    if len(first) != len(second):
        raise InputError(f"{len(first)} first and {len(second)} second lines: expected pairs; repeat the shared line")
    a, b = np.asarray(first, dtype=int), np.asarray(second, dtype=int)
    value = latencies.value[a] - latencies.value[b]
    lower, upper = _interval(value, latencies.drawn[a] - latencies.drawn[b])
    known = np.isfinite(value)
    return Lag(value, lower, upper, latencies.censored[a] & known, latencies.censored[b] & known)


def _half_maximum(
    heights: Float[np.ndarray, "line point draw"],
    at: Float[np.ndarray, "point"],
    exists: Bool[np.ndarray, "line point"],
) -> tuple[Float[np.ndarray, "line draw"], Bool[np.ndarray, "line draw"]]:
    """Where each line first reaches half of its maximum in each draw, and whether that is at its first point."""
    order = np.argsort(~exists, axis=1, kind="stable")  # points that exist come first, the last of them fills the rest
    last = np.maximum(exists.sum(axis=1) - 1, 0)
    order = np.take_along_axis(order, np.minimum(np.arange(len(at)), last[:, None]), axis=1)
    heights, place = np.take_along_axis(heights, order[:, :, None], axis=1), at[order]
    largest = heights.max(axis=1)
    half = largest / 2
    after = (heights >= half[:, None] - TIE).argmax(axis=1)
    before = np.maximum(after - 1, 0)
    low, high = (np.take_along_axis(heights, i[:, None], axis=1)[:, 0] for i in (before, after))
    start, end = (np.take_along_axis(place, i, axis=1) for i in (before, after))
    rise = np.where(after > 0, high - low, 1.0)  # never 0: a point below half, then one that reaches it
    share = np.clip((half - low) / rise, 0.0, 1.0)
    exceeds = (largest > TIE) & exists.any(axis=1, keepdims=True)
    return np.where(exceeds, start + share * (end - start), np.nan), (after == 0) & exceeds


def _interval(
    value: Float[np.ndarray, "line"], drawn: Float[np.ndarray, "line draw"]
) -> tuple[Float[np.ndarray, "line"], Float[np.ndarray, "line"]]:
    """Percentiles of the draws, corrected for how far their median is from the value (Efron 1981, "Nonparametric
    standard errors and confidence intervals"), with QUANTILE standard deviations to either side."""
    bounds = np.full((2, len(drawn)), np.nan)
    for line in np.flatnonzero(~np.isnan(drawn).all(axis=1) & np.isfinite(value)):
        known = np.sort(drawn[line][~np.isnan(drawn[line])])
        below = ((known < value[line] - TIE).sum() + (known <= value[line] + TIE).sum()) / 2 / len(known)
        shift = 2 * ndtri(np.clip(below, 0.5 / len(known), 1 - 0.5 / len(known)))
        bounds[:, line] = np.quantile(known, ndtr([shift - QUANTILE, shift + QUANTILE]))
    return bounds[0], bounds[1]
