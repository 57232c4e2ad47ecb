"""95 % intervals of shares, paired differences and means, for samples that are clustered by problem.

Samples of one problem (other noise seeds, mirror images) are not independent. Intervals therefore count problems, not
samples (`effective_problems`). They treat test predictions as fixed: probes are not refitted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy.special import betaincinv, stdtrit

from cosprobe.errors import InputError

COVERAGE = 0.95
TAIL = (1 - COVERAGE) / 2
LEAST_PROBLEMS = 12  # with fewer problems there are no p-values and no intervals of differences
LEAST_EFFECTIVE = 6  # likewise for the effective number of problems
PSEUDO = 1.5  # problems added to wins and to losses of a difference
CONTINUITY = 0.25  # the interval of a difference is this many problems wider at each end
# What a problem counts in intervals of cross-fitted predictions: its prediction depends on the labels of other test
# problems. Found by simulation (`validity.cross_fitting`).
CROSS_FITTED = 0.9
TIE = 1e-9  # statistics that differ by less than this (rounding) count as equal


def correctness(
    predictions: Int[np.ndarray, "cell *label"], labels: Int[np.ndarray, "*label"]
) -> Float[np.ndarray, "cell sample"]:
    """1 where a cell is right, 0 where it is wrong; the mean over regions where labels have a region axis."""
    right = (np.asarray(predictions) == np.asarray(labels)).astype(np.float64)
    return right if right.ndim == 2 else right.mean(axis=-1)


def majority(labels: Int[np.ndarray, "*label"]) -> int:
    """The most frequent label, on a tie the smallest. Labels of -1 are ignored."""
    return int(np.bincount(labels[labels >= 0].ravel()).argmax())


@dataclass(frozen=True)
class ProblemDraws:
    """Bootstrap draws of problems. All rows use the same draws, so rows are paired.

    member: 1 where a sample belongs to a problem. weight: weight of one sample of a problem in the mean of each draw.
    """

    member: Float[np.ndarray, "sample problem"]
    weight: Float[np.ndarray, "problem draw"]

    def means(self, values: Float[np.ndarray, "row sample"]) -> Float[np.ndarray, "row draw"]:
        """Mean over the samples of each draw. A problem with more samples has more weight."""
        return (values @ self.member) @ self.weight


def problem_draws(keys: Shaped[np.ndarray, "sample"], draws: int, seed: int) -> ProblemDraws:
    """Draws problems with replacement, `draws` times, as many as there are. A problem is drawn with all its samples.

    The result depends on (keys, draws, seed) only. The order of the samples does not change which problems are drawn.
    Raises InputError for no samples.
    """
    member = membership(keys)
    sizes = member.sum(axis=0)
    times = np.random.default_rng(seed).multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=draws)
    return ProblemDraws(member, (times / (times @ sizes)[:, None]).T)


def effective_problems(keys: Shaped[np.ndarray, "sample"]) -> float:
    """Effective number of problems: (sum m)^2 / sum m^2 for m samples of each problem.

    A mean over these samples varies as a mean over that many problems with one sample each. This is exact if all
    samples of a problem have the same value, and too low (conservative) otherwise. It is not estimated from the
    values: intervals based on such an estimate are too narrow at the numbers of problems used here.
    Raises InputError for no samples.
    Source: Kish (1965), "Survey Sampling", section 11.7.
    """
    check_any(keys)
    sizes = np.unique(keys, return_counts=True)[1]
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def grounded(keys: Shaped[np.ndarray, "sample"]) -> bool:
    """Whether there are enough problems for p-values: at least 12, and an effective number of at least 6."""
    if len(np.unique(keys)) < LEAST_PROBLEMS:
        return False
    return effective_problems(keys) >= LEAST_EFFECTIVE


def share_interval(
    right: Float[np.ndarray, "cell sample"], keys: Shaped[np.ndarray, "sample"], worth: float = 1.0
) -> tuple[Float[np.ndarray, "cell"], Float[np.ndarray, "cell"]]:
    """95 % interval of each cell's share of right answers. Each sample is between 0 (wrong) and 1 (right).

    worth: what a problem counts, below 1 where predictions depend on other test problems (`CROSS_FITTED`).
    These are exact binomial bounds for n trials and n * share successes, where n is the effective number of problems.
    Both numbers may be fractions. A sample strictly between 0 and 1 (a mean over regions or seeds) varies less than a
    binary one of the same mean, so its interval is conservative. One more right answer never lowers an end.
    Raises InputError for no samples, or a sample outside 0 to 1.
    Source: Clopper and Pearson (1934), at an effective number of trials as Korn and Graubard (1998).
    """
    right = _within(right, 0.0, "right", "shares from 0 (wrong) to 1 (right)")
    count = worth * effective_problems(keys)
    hits = count * right.mean(axis=1).clip(0.0, 1.0)
    lower = np.where(hits > 0, betaincinv(np.maximum(hits, TIE), count - hits + 1, TAIL), 0.0)
    upper = np.where(hits < count, betaincinv(hits + 1, np.maximum(count - hits, TIE), 1 - TAIL), 1.0)
    return lower, upper


def difference_interval(
    difference: Float[np.ndarray, "cell sample"], keys: Shaped[np.ndarray, "sample"], worth: float = 1.0
) -> tuple[Float[np.ndarray, "cell"], Float[np.ndarray, "cell"]]:
    """95 % interval of each cell's mean paired difference. Each sample is between -1 (lost) and 1 (won).

    worth: as in `share_interval`.
    Wins and losses are counted in effective problems, n in total, and 1.5 are added to each of the two. The interval is
    Wald's, with the quantile of Student's t at n - 1 degrees of freedom, and a quarter of a problem wider at each end.
    The ends are monotone: turning a loss into a tie, or a tie into a win, never lowers an end. Near -1 and 1 the plain
    formula is not monotone; there the end is the one at more wins (losses), which makes the interval wider.

    Departure: Agresti and Min add 0.5 to each of the four cells of the table and use the normal quantile. The interval
    then covers 0.84 to 0.91 of true differences with 12 to 90 problems where one side (almost) never wins, and is not
    monotone. The constants here come from a search: the narrowest interval that covers at least 0.94 for differences
    from -0.5 to 0.5 and any share of ties (worst 0.944, exact for 5 to 450 problems). It is 7 % wider with 90 problems.
    Raises InputError for no samples, or a sample outside -1 to 1.
    Source: Agresti and Min (2005), "Simple improved confidence intervals for comparing matched proportions".
    """
    difference = _within(difference, -1.0, "difference", "differences of two shares, from -1 to 1")
    count = worth * effective_problems(keys)
    wins = count * np.maximum(difference, 0.0).mean(axis=1)
    losses = count * np.maximum(-difference, 0.0).mean(axis=1)
    return _difference_end(wins, losses, count), -_difference_end(losses, wins, count)


def independent_difference_interval(
    one: tuple[Float[np.ndarray, "row"], Float[np.ndarray, "row"], Float[np.ndarray, "row"]],
    two: tuple[Float[np.ndarray, "row"], Float[np.ndarray, "row"], Float[np.ndarray, "row"]],
) -> tuple[Float[np.ndarray, "row"], Float[np.ndarray, "row"]]:
    """95 % interval of `two` minus `one`, two shares that were measured on different problems.

    one, two: each a share with the lower and upper end of its 95 % interval.
    Source: Newcombe (1998), "Interval estimation for the difference between independent proportions", method 10.
    Departure: the ends of the shares are those of `share_interval`, not Wilson's, which makes the interval wider.
    """
    (p, low, high), (q, least, most) = one, two
    lower = q - p - np.sqrt((q - least) ** 2 + (high - p) ** 2)
    upper = q - p + np.sqrt((most - q) ** 2 + (p - low) ** 2)
    return lower, upper


def mean_interval(
    values: Float[np.ndarray, "row sample"], keys: Shaped[np.ndarray, "sample"]
) -> tuple[Float[np.ndarray, "row"], Float[np.ndarray, "row"]]:
    """95 % interval of each row's mean of unbounded values, such as code lengths. For shares use `share_interval`.

    The mean is a ratio of sums over problems. Its Student's t statistic (degrees of freedom: effective problems - 1) is
    corrected for the skewness of the problem sums by a cubic transformation. Without it, and with bootstrap
    percentiles, intervals of code lengths miss the long upper tail. If all values are equal, the interval has width 0.
    With a single problem it is infinite. Raises InputError for no samples.
    Source: Hall (1992), "On the removal of skewness by transformation", the transformation g2.
    """
    values, member = np.asarray(values, dtype=np.float64), membership(keys)
    sizes, count = member.sum(axis=0), member.shape[1]
    mean = values.mean(axis=1)
    if count == 1:
        return np.full(len(values), -np.inf), np.full(len(values), np.inf)
    left = values @ member - mean[:, None] * sizes
    spread = np.sqrt((left**2).mean(axis=1))
    error = spread * count / np.sqrt(count - 1) / sizes.sum()
    skew = (left**3).mean(axis=1) / np.where(spread > TIE, spread, np.inf) ** 3 / np.sqrt(count)
    straight = np.abs(skew) < 1e-6  # the limit of the transformation, which divides by the skewness
    safe = np.where(straight, 1.0, skew)
    ends = []
    for quantile in (_student(effective_problems(keys)), -_student(effective_problems(keys))):
        bent = 3 / safe * (np.cbrt(1 + safe * (quantile - safe / 6)) - 1)
        ends.append(mean - error * np.where(straight, quantile, bent))
    return ends[0], ends[1]


def _difference_end(
    wins: Float[np.ndarray, "cell"], losses: Float[np.ndarray, "cell"], count: float
) -> Float[np.ndarray, "cell"]:
    """Lower end of `difference_interval`, given wins and losses in problems."""
    quantile, total = _student(count), count + 2 * PSEUDO
    twice = 2 * (losses + PSEUDO)
    # at given losses the formula first falls, then rises with more wins; before its minimum, use the minimum
    turn = total / 2 * (1 - np.sqrt((4 * twice + total) / (total + quantile**2)))
    ahead = np.maximum(wins - losses, turn)
    width = quantile * np.sqrt(twice + ahead - ahead**2 / total) + CONTINUITY
    return np.maximum((ahead - width) / total, -1.0)


def _student(count: float) -> float:
    """Upper 2.5 % quantile of Student's t for `count` problems."""
    return float(stdtrit(max(count - 1, 1.0), 1 - TAIL))


def _within(values: Float[np.ndarray, "cell sample"], least: float, name: str, expected: str) -> np.ndarray:
    """The values as fp64. Raises InputError for a value outside `least` to 1."""
    values = np.asarray(values, dtype=np.float64)
    outside = ~((values >= least - TIE) & (values <= 1 + TIE))
    if outside.any():
        raise InputError(f"{name}={values[outside][0]}: expected {expected}; for other values use `mean_interval`")
    return values


def membership(keys: Shaped[np.ndarray, "sample"]) -> Float[np.ndarray, "sample problem"]:
    """1 where a sample belongs to a problem. Problems are sorted by key."""
    check_any(keys)
    problem = np.unique(keys, return_inverse=True)[1]
    return np.eye(problem.max() + 1)[problem]


def check_any(keys: Shaped[np.ndarray, "sample"]) -> None:
    """Raises InputError for no samples."""
    if len(keys) == 0:
        raise InputError("no samples: expected at least one; draw more problems")
