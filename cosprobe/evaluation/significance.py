"""p-values corrected for the number of cells looked at; problems, not samples, are exchanged.

Two questions: does a cell beat guessing (`max_t_permutation`: the labels of whole problems are permuted), and does it
beat a baseline (`max_t_bootstrap`: the signs of whole problems are turned), or every one of several (`weakest_pair`)?
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Shaped

from cosprobe.errors import InputError
from cosprobe.evaluation.intervals import COVERAGE, TIE, check_any, membership

CHUNK = 4096  # cells worked on at once: bounds memory at CHUNK x draws numbers


@dataclass(frozen=True)
class MaxT:
    """What a comparison corrected for all cells found.

    p: of each cell. critical: what a cell's statistic must exceed for p <= 0.05; inf where none can.
    """

    p: Float[np.ndarray, "cell"]
    critical: float


@dataclass(frozen=True)
class Above(MaxT):
    """lower: simultaneous 95 % lower bound of each cell's mean."""

    lower: Float[np.ndarray, "cell"]


def max_t_bootstrap(
    difference: Float[np.ndarray, "cell sample"], keys: Shaped[np.ndarray, "sample"], draws: int = 1000, seed: int = 0
) -> Above:
    """Is a cell's mean difference above 0? p and 95 % lower bound, corrected for having looked at all cells.

    difference: probe right minus baseline right, per sample. Each draw keeps or turns the sign of whole problems,
    the same ones in all cells, which is what a difference without direction would look like. A cell's statistic is
    its sum over problems divided by the root of its sum of squares (neither of which needs estimating anew: a turned
    sign leaves the squares alone), the largest of each draw is kept over cells, and
    p = (1 + draws whose largest reaches this cell's statistic) / (1 + draws).
    lower: the largest mean the same test would reject, with the critical value of mean 0; simultaneous (all bounds
    hold together in 95 % of experiments), above 0 exactly where p <= 0.05 if it is finite. It is -inf where no mean,
    however low, can be rejected: below 19 draws, with too few problems, or where one of few holds most samples. A
    cell that differs on no problem has p = 1 and lower = 0; one that differs by the same amount on all of n problems
    has 1 / 2**n, the sign test's p, when it stands alone.

    Exact for one cell with differences as often up as down; for a grid asymptotic in the number of problems. In
    simulations (20 to 300 cells, 20 to 60 problems) 3 to 8 of 100 null grids show a cell; drawing problems with
    replacement instead gave 5 to 11. Raises ValueError for no samples.
    Source: wild cluster bootstrap with the null imposed and Rademacher weights, Cameron, Gelbach and Miller (2008),
    section III.B, here of the largest statistic over cells (single-step maxT, Romano and Wolf 2005).
    """
    difference, member = np.asarray(difference, dtype=np.float64), membership(keys)
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
    if critical > np.sqrt(len(sizes)) - TIE:  # no statistic is larger than this root (Cauchy and Schwarz)
        critical = np.inf
    bending = sizes.sum() ** 2 - critical**2 * (sizes**2).sum()
    if bending <= TIE:
        lower = np.full(len(difference), -np.inf)
    else:  # statistic(difference - mean) = critical is a quadratic equation in mean; the smaller root
        linear = totals * sizes.sum() - critical**2 * overlap
        constant = totals**2 - critical**2 * lengths**2
        lower = (linear - np.sqrt(np.maximum(linear**2 - bending * constant, 0.0))) / bending
    lower = np.where(p <= 1 - COVERAGE + TIE, lower, np.minimum(lower, 0.0))  # ties are ties in both
    return Above(p, float(critical), np.where(differs, lower, 0.0))


def weakest_pair(
    differences: Float[np.ndarray, "cell input sample"],
    keys: Shaped[np.ndarray, "sample"],
    draws: int = 1000,
    seed: int = 0,
) -> Above:
    """Does a cell beat every one of its inputs? p and 95 % lower bound of its weakest pair, corrected for all pairs.

    differences: cell right minus input right, per sample; a pair that is NaN on every sample does not exist. All pairs
    go through one `max_t_bootstrap`, with the same sign changes; a cell has the largest p and the smallest lower bound
    of its pairs, NaN where it has none. A cell is no better than all inputs if it is no better than one of them, so
    that calling it better takes a wrong rejection of that pair, whichever it is: no input is chosen, and the level
    holds whether inputs are equally good or not. Raises ValueError for no samples, or a pair that is NaN on some only.
    Source: the intersection-union test, Berger (1982), of p-values corrected as in `max_t_bootstrap`.
    """
    differences = np.asarray(differences, dtype=np.float64)
    missing = np.isnan(differences)
    exists = ~missing.all(axis=2)
    if (broken := exists & missing.any(axis=2)).any():
        cell, source = np.argwhere(broken)[0]
        raise InputError(f"cell {cell}, input {source}: NaN on some samples, expected on all or none; drop the pair")
    found = max_t_bootstrap(differences[exists], keys, draws, seed)
    p, lower = np.full(exists.shape, -np.inf), np.full(exists.shape, np.inf)
    p[exists], lower[exists] = found.p, found.lower
    none = ~exists.any(axis=1)
    p, lower = p.max(axis=1, initial=-np.inf), lower.min(axis=1, initial=np.inf)
    return Above(np.where(none, np.nan, p), found.critical, np.where(none, np.nan, lower))


def max_t_permutation(
    predictions: Int[np.ndarray, "cell *label"],
    labels: Int[np.ndarray, "*label"],
    keys: Shaped[np.ndarray, "sample"],
    draws: int = 1000,
    seed: int = 0,
) -> MaxT:
    """p of each cell's accuracy, corrected for having looked at all of them; the statistic is in standard deviations.

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
    check_any(keys)
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
    p = (1 + draws - np.searchsorted(reached, observed - TIE)) / (1 + draws)
    rank = int((1 - COVERAGE) * (1 + draws) + TIE)
    return MaxT(p, float(reached[-rank]) if rank else np.inf)


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
