"""How sure a number is: intervals that respect the problem behind every sample.

Samples of one problem (other noise seeds, mirror images) are not independent, so intervals count problems, not samples
(`effective_problems`). Probes are never refitted: they were trained on other problems, so their test predictions are
fixed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy.special import betaincinv, stdtrit

from cosprobe.errors import InputError

COVERAGE = 0.95
TAIL = (1 - COVERAGE) / 2
LEAST_PROBLEMS = 12  # fewer ground no statement, whatever the interval
LEAST_EFFECTIVE = 6  # nor do many that are worth fewer, because few of them hold most samples
PSEUDO = 1.5  # problems added to wins and to losses of a difference
CONTINUITY = 0.25  # problems by which the interval of a difference is widened at each end
TIE = 1e-9  # two statistics closer than this are equal: only rounding separates them


def correctness(
    predictions: Int[np.ndarray, "cell *label"], labels: Int[np.ndarray, "*label"]
) -> Float[np.ndarray, "cell sample"]:
    """1 where a cell is right, 0 where it is wrong; the mean over regions where labels have a region axis."""
    right = (np.asarray(predictions) == np.asarray(labels)).astype(np.float64)
    return right if right.ndim == 2 else right.mean(axis=-1)


def majority(labels: Int[np.ndarray, "*label"]) -> int:
    """The most frequent label, the smallest of them on a tie; entries of -1 do not count."""
    return int(np.bincount(labels[labels >= 0].ravel()).argmax())


@dataclass(frozen=True)
class ProblemDraws:
    """Problems drawn with replacement; every row they are applied to sees the same draws, so rows are paired.

    member: 1 where a sample belongs to a problem. weight: what one sample of a problem weighs in each draw's mean.
    """

    member: Float[np.ndarray, "sample problem"]
    weight: Float[np.ndarray, "problem draw"]

    def means(self, values: Float[np.ndarray, "row sample"]) -> Float[np.ndarray, "row draw"]:
        """Mean over the samples drawn, a ratio of sums: a problem with more samples weighs more."""
        return (values @ self.member) @ self.weight


def problem_draws(keys: Shaped[np.ndarray, "sample"], draws: int, seed: int) -> ProblemDraws:
    """As many problems as there are, drawn with replacement `draws` times, each with all of its samples.

    A function of (keys, draws, seed) alone; which problem a draw takes does not depend on the order of samples.
    Raises ValueError for no samples.
    """
    member = membership(keys)
    sizes = member.sum(axis=0)
    times = np.random.default_rng(seed).multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=draws)
    return ProblemDraws(member, (times / (times @ sizes)[:, None]).T)


def effective_problems(keys: Shaped[np.ndarray, "sample"]) -> float:
    """How many equally large problems would tell as much: (sum m)^2 / sum m^2 for m samples of each problem.

    It is exact where all samples of a problem agree, and too few problems where they do not. It is not estimated from
    the answers: intervals that do so are too narrow at these numbers of problems. Raises ValueError for no samples.
    Source: Kish (1965), "Survey Sampling", section 11.7.
    """
    check_any(keys)
    sizes = np.unique(keys, return_counts=True)[1]
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def grounded(keys: Shaped[np.ndarray, "sample"]) -> bool:
    """Whether there are problems enough for a statement: 12, and no few of them that hold most of the samples."""
    if len(np.unique(keys)) < LEAST_PROBLEMS:
        return False
    return effective_problems(keys) >= LEAST_EFFECTIVE


def share_interval(
    right: Float[np.ndarray, "cell sample"], keys: Shaped[np.ndarray, "sample"]
) -> tuple[Float[np.ndarray, "cell"], Float[np.ndarray, "cell"]]:
    """95 % interval of each cell's share of right answers, each sample between 0 (wrong) and 1 (right).

    Exact binomial bounds of n trials, n the effective number of problems, of which n times the share succeeded; both
    may be fractions. A sample in between (a mean over regions, or over seeds) varies less than a right or wrong one of
    the same mean, so that its interval is too wide rather than too narrow. One more right answer never lowers an end.
    Raises ValueError for no samples, or a sample outside 0 to 1.
    Source: Clopper and Pearson (1934), at an effective number of trials as Korn and Graubard (1998).
    """
    right = _within(right, 0.0, "right", "shares from 0 (wrong) to 1 (right)")
    count = effective_problems(keys)
    hits = count * right.mean(axis=1).clip(0.0, 1.0)
    lower = np.where(hits > 0, betaincinv(np.maximum(hits, TIE), count - hits + 1, TAIL), 0.0)
    upper = np.where(hits < count, betaincinv(hits + 1, np.maximum(count - hits, TIE), 1 - TAIL), 1.0)
    return lower, upper


def difference_interval(
    difference: Float[np.ndarray, "cell sample"], keys: Shaped[np.ndarray, "sample"]
) -> tuple[Float[np.ndarray, "cell"], Float[np.ndarray, "cell"]]:
    """95 % interval of each cell's mean paired difference, each sample between -1 (lost) and 1 (won).

    Wins and losses are counted in effective problems n; 1.5 are added to both, the interval is Wald's with the
    quantile of Student's t at n - 1 degrees of freedom, a quarter of a problem wider at each end. Turning a loss into
    a tie, or a tie into a win, never lowers an end: where the plain formula would, near -1 and 1, the end is that of
    more wins (losses), which is farther out.

    Agresti and Min add 0.5 to each of the four cells of the table and take the normal quantile. That covers 0.84 to
    0.91 of true differences at 12 to 90 problems where one side (almost) never wins, and is not monotone; these
    constants are the narrowest of a search that cover at least 0.94 for differences from -0.5 to 0.5 and any share of
    ties (worst 0.944, exact for 5 to 450 problems), at 7 % more width with 90 problems.
    Raises ValueError for no samples, or a sample outside -1 to 1.
    Source: Agresti and Min (2005), "Simple improved confidence intervals for comparing matched proportions".
    """
    difference = _within(difference, -1.0, "difference", "differences of two shares, from -1 to 1")
    count = effective_problems(keys)
    wins = count * np.maximum(difference, 0.0).mean(axis=1)
    losses = count * np.maximum(-difference, 0.0).mean(axis=1)
    return _difference_end(wins, losses, count), -_difference_end(losses, wins, count)


def mean_interval(
    values: Float[np.ndarray, "row sample"], keys: Shaped[np.ndarray, "sample"]
) -> tuple[Float[np.ndarray, "row"], Float[np.ndarray, "row"]]:
    """95 % interval of each row's mean of unbounded values, such as code lengths; for shares see `share_interval`.

    The mean is a ratio of sums over problems. Its Student's t statistic (degrees of freedom: effective problems - 1)
    is first freed of the skewness of the problems by a cubic transformation, without which, as with drawing problems
    anew, the long tail of code lengths is missed. Values that are all equal give an interval without width, a single
    problem gives one without ends. Raises ValueError for no samples.
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
    # at given losses the formula falls with more wins, then rises; below its lowest point it keeps that value
    turn = total / 2 * (1 - np.sqrt((4 * twice + total) / (total + quantile**2)))
    ahead = np.maximum(wins - losses, turn)
    width = quantile * np.sqrt(twice + ahead - ahead**2 / total) + CONTINUITY
    return np.maximum((ahead - width) / total, -1.0)


def _student(count: float) -> float:
    return float(stdtrit(max(count - 1, 1.0), 1 - TAIL))


def _within(values: Float[np.ndarray, "cell sample"], least: float, name: str, expected: str) -> np.ndarray:
    """The values as fp64. Raises ValueError for one outside `least` to 1."""
    values = np.asarray(values, dtype=np.float64)
    outside = ~((values >= least - TIE) & (values <= 1 + TIE))
    if outside.any():
        raise InputError(f"{name}={values[outside][0]}: expected {expected}; for other values there is `mean_interval`")
    return values


def membership(keys: Shaped[np.ndarray, "sample"]) -> Float[np.ndarray, "sample problem"]:
    """1 where a sample belongs to a problem, problems in the order of their keys."""
    check_any(keys)
    problem = np.unique(keys, return_inverse=True)[1]
    return np.eye(problem.max() + 1)[problem]


def check_any(keys: Shaped[np.ndarray, "sample"]) -> None:
    if len(keys) == 0:
        raise InputError("no samples: expected at least one; draw more problems")
