"""How sure a number is: intervals and significance that respect the problem behind every sample.

Samples of one problem (other noise seeds, mirror images) are not independent, so all procedures work on whole
problems: intervals draw problems with replacement, the permutation exchanges the labels of whole problems, the wild
bootstrap turns the signs of whole problems. Probes are never refitted: they were trained on other problems, so their
test predictions are fixed. Two questions are corrected for the number of cells: does a cell beat guessing
(`max_t_permutation`), and does it beat a baseline (`max_t_bootstrap`)?
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Shaped

COVERAGE = 0.95
CHUNK = 4096  # cells worked on at once: bounds memory at CHUNK x draws numbers
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
    member = _membership(keys)
    sizes = member.sum(axis=0)
    times = np.random.default_rng(seed).multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=draws)
    return ProblemDraws(member, (times / (times @ sizes)[:, None]).T)


def cluster_bootstrap(
    correct: Float[np.ndarray, "cell sample"], keys: Shaped[np.ndarray, "sample"], draws: int = 1000, seed: int = 0
) -> tuple[Float[np.ndarray, "cell"], Float[np.ndarray, "cell"]]:
    """95 % percentile interval of each cell's mean when problems, not samples, are drawn with replacement.

    correct: any number per sample (right or wrong, or a difference of two cells: every cell sees the same draws,
    so differences are paired). keys: the problem of each sample. The order of samples does not matter.
    Equal values give an interval without width: a bootstrap cannot see errors that were never drawn. For shares of
    right answers there is `share_interval`. Raises ValueError for no samples.
    Source: cluster bootstrap, Cameron, Gelbach and Miller (2008), section II; here of a ratio of sums.
    """
    correct = np.asarray(correct, dtype=np.float64)
    drawn = problem_draws(keys, draws, seed)
    tails = [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2]
    bounds = np.empty((2, len(correct)))
    for start in range(0, len(correct), CHUNK):
        means = drawn.means(correct[start : start + CHUNK])
        bounds[:, start : start + CHUNK] = np.quantile(means, tails, axis=1)
    return bounds[0], bounds[1]


def share_interval(
    right: Float[np.ndarray, "cell sample"], keys: Shaped[np.ndarray, "sample"], draws: int = 1000, seed: int = 0
) -> tuple[Float[np.ndarray, "cell"], Float[np.ndarray, "cell"]]:
    """`cluster_bootstrap` of shares, each sample between 0 (wrong) and 1 (right). A cell that is right, or wrong, on
    every sample of n problems gets the exact binomial bound 0.025^(1/n) on its open side (Clopper and Pearson 1934).
    """
    right = np.asarray(right, dtype=np.float64)
    lower, upper = cluster_bootstrap(right, keys, draws, seed)
    bound = ((1 - COVERAGE) / 2) ** (1 / len(np.unique(keys)))
    never_wrong, never_right = (right == 1).all(axis=1), (right == 0).all(axis=1)
    return np.where(never_wrong, bound, lower), np.where(never_right, 1 - bound, upper)


def max_t_bootstrap(
    difference: Float[np.ndarray, "cell sample"], keys: Shaped[np.ndarray, "sample"], draws: int = 1000, seed: int = 0
) -> tuple[Float[np.ndarray, "cell"], Float[np.ndarray, "cell"]]:
    """Is a cell's mean difference above 0? p and 95 % lower bound, corrected for having looked at all cells.

    difference: probe right minus baseline right, per sample. Each draw keeps or turns the sign of whole problems,
    the same ones in all cells, which is what a difference without direction would look like. A cell's statistic is
    its sum over problems divided by the root of its sum of squares (neither of which needs estimating anew: a turned
    sign leaves the squares alone), the largest of each draw is kept over cells, and
    p = (1 + draws whose largest reaches this cell's statistic) / (1 + draws).
    lower: the largest mean the same test would reject, with the critical value of mean 0; simultaneous (all bounds
    hold together in 95 % of experiments), above 0 exactly where p <= 0.05. It is -inf where nothing can be rejected:
    below 19 draws, or with too few problems. A cell that differs on no problem has p = 1 and lower = 0; one
    that differs by the same amount on all of n problems has 1 / 2**n, the sign test's p, when it stands alone.

    Exact for one cell with differences as often up as down; for a grid asymptotic in the number of problems. In
    simulations (20 to 300 cells, 20 to 60 problems) 3 to 8 of 100 null grids show a cell; drawing problems with
    replacement instead, as in `cluster_bootstrap`, gave 5 to 11. Raises ValueError for no samples.
    Source: wild cluster bootstrap with the null imposed and Rademacher weights, Cameron, Gelbach and Miller (2008),
    section III.B, here of the largest statistic over cells (single-step maxT, Romano and Wolf 2005).
    """
    difference, member = np.asarray(difference, dtype=np.float64), _membership(keys)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(member.shape[1], draws))
    totals, lengths, overlap = np.empty((3, len(difference)))
    largest = np.full(draws, -np.inf)
    sizes = member.sum(axis=0)
    for start in range(0, len(difference), CHUNK):
        part = slice(start, start + CHUNK)
        sums = difference[part] @ member
        totals[part], lengths[part], overlap[part] = sums.sum(1), np.linalg.norm(sums, axis=1), sums @ sizes
        moving = lengths[part] > TIE
        turned = (sums[moving] @ signs) / lengths[part][moving, None]
        largest = np.maximum(largest, turned.max(axis=0, initial=-np.inf))
    largest.sort()
    differs = lengths > TIE
    statistic = np.where(differs, totals / np.where(differs, lengths, 1.0), -np.inf)
    p = (1 + draws - np.searchsorted(largest, statistic - TIE)) / (1 + draws)

    rank = int((1 - COVERAGE) * (1 + draws) + TIE)  # p <= 0.05: fewer draws than this reach the statistic
    critical = max(largest[-rank], 0.0) if rank and differs.any() else np.inf
    bending = sizes.sum() ** 2 - critical**2 * (sizes**2).sum()
    if bending <= TIE:
        lower = np.full(len(difference), -np.inf)
    else:  # statistic(difference - mean) = critical is a quadratic equation in mean; the smaller root
        linear = totals * sizes.sum() - critical**2 * overlap
        constant = totals**2 - critical**2 * lengths**2
        lower = (linear - np.sqrt(np.maximum(linear**2 - bending * constant, 0.0))) / bending
    lower = np.where(p <= 1 - COVERAGE + TIE, lower, np.minimum(lower, 0.0))  # ties are ties in both
    return p, np.where(differs, lower, 0.0)


def max_t_permutation(
    predictions: Int[np.ndarray, "cell *label"],
    labels: Int[np.ndarray, "*label"],
    keys: Shaped[np.ndarray, "sample"],
    draws: int = 1000,
    seed: int = 0,
) -> Float[np.ndarray, "cell"]:
    """p of each cell's accuracy, corrected for having looked at all of them.

    Labels move between problems as whole blocks (only between problems with the same number of samples; a row of
    region labels stays together); predictions stay. Every cell's accuracy is standardised by its own mean and
    spread over the permutations, the largest cell of each permutation is kept, and
    p = (1 + permutations whose largest cell reaches this cell) / (1 + draws).
    The observed labelling counts as one of the permutations, which keeps the test exact.
    A cell whose accuracy no permutation changes (a constant prediction) has no evidence either way: it scores 0.
    Raises ValueError for no samples.
    Source: single-step maxT, Westfall and Young (1993), procedure 2.8.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    _check(keys)
    rows = labels[permuted_blocks(keys, draws, seed)].reshape(draws + 1, -1)
    flat = predictions.reshape(len(predictions), -1)
    classes = np.intersect1d(flat, rows)
    observed = np.empty(len(flat))
    largest = np.full(draws + 1, -np.inf)
    for start in range(0, len(flat), CHUNK):
        block = flat[start : start + CHUNK]
        hits = np.zeros((len(block), draws + 1), dtype=np.float32)  # counts: exact below 2**24 labels
        for k in classes:
            hits += (block == k).astype(np.float32) @ (rows == k).astype(np.float32).T
        mean, spread = hits.mean(1, dtype=np.float64), hits.std(1, dtype=np.float64)
        score = (hits - mean[:, None]) / np.where(spread > TIE, spread, np.inf)[:, None]
        observed[start : start + CHUNK] = score[:, 0]
        largest = np.maximum(largest, score.max(axis=0))
    reached = np.sort(largest[1:])
    return (1 + draws - np.searchsorted(reached, observed - TIE)) / (1 + draws)


def permuted_blocks(keys: Shaped[np.ndarray, "sample"], draws: int, seed: int) -> Int[np.ndarray, "draw sample"]:
    """Which sample's label each sample gets; row 0 is the identity, followed by `draws` permutations."""
    rng = np.random.default_rng(seed)
    problem, sizes = np.unique(keys, return_inverse=True, return_counts=True)[1:]
    order = np.argsort(problem, kind="stable")
    starts = np.cumsum(sizes) - sizes
    source = np.tile(np.arange(len(problem)), (draws + 1, 1))
    for size in np.unique(sizes):
        blocks = order[starts[sizes == size, None] + np.arange(size)]  # problem, its samples
        shuffled = rng.permuted(np.tile(np.arange(len(blocks)), (draws, 1)), axis=1)
        source[1:, blocks.ravel()] = blocks[shuffled].reshape(draws, -1)
    return source


def _membership(keys: Shaped[np.ndarray, "sample"]) -> Float[np.ndarray, "sample problem"]:
    """1 where a sample belongs to a problem, problems in the order of their keys."""
    _check(keys)
    problem = np.unique(keys, return_inverse=True)[1]
    return np.eye(problem.max() + 1)[problem]


def _check(keys: Shaped[np.ndarray, "sample"]) -> None:
    if len(keys) == 0:
        raise ValueError("no samples: expected at least one; draw more problems")
