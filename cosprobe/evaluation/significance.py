"""p-values of the cells of a map, corrected for the number of cells. Problems, not samples, are resampled.

* `max_t_permutation`: do the predictions of a cell go along with the labels? Labels are permuted between problems.
* `max_t_bootstrap`: is a cell above a baseline? The signs of the differences are changed problem by problem.
* `weakest_pair`: is a cell above every one of several baselines?
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Shaped

from cosprobe.errors import InputError
from cosprobe.evaluation.intervals import COVERAGE, TIE, check_any, membership

CHUNK = 4096  # cells processed at a time; memory is bounded by CHUNK x draws values


@dataclass(frozen=True)
class MaxT:
    """Result of a test that is corrected for all cells.

    p: corrected p-value of each cell. critical: a cell has p <= 0.05 if its statistic exceeds this value; inf where no
    statistic can.
    """

    p: Float[np.ndarray, "cell"]
    critical: float


@dataclass(frozen=True)
class Above(MaxT):
    """Result of a test of mean differences. lower: simultaneous 95 % lower bound of each cell's mean difference."""

    lower: Float[np.ndarray, "cell"]


def max_t_bootstrap(
    difference: Float[np.ndarray, "cell sample"], keys: Shaped[np.ndarray, "sample"], draws: int = 1000, seed: int = 0
) -> Above:
    """Tests whether each cell's mean difference is above 0. p-values and 95 % lower bounds, corrected for all cells.

    difference: accuracy of the probe minus accuracy of the baseline on each sample.
    keys: the problem of each sample.
    draws, seed: number and seed of the sign changes.

    Each draw changes the sign of every problem with probability 1/2, the same signs for all cells, as under the null
    hypothesis that differences are symmetric around 0. A cell's statistic is its sum over problems divided by the root
    of its sum of squares, which sign changes do not alter. The largest statistic over cells is kept for each draw, and
    p = (1 + draws whose largest statistic reaches this cell's statistic) / (1 + draws).

    lower: the largest mean that the same test rejects, with the critical value for mean 0. Bounds are simultaneous: all
    hold together in 95 % of experiments. A finite bound is above 0 exactly where p <= 0.05. The bound is -inf where the
    test can reject no mean: below 19 draws, with too few problems, or where one of few problems holds most samples.

    A cell without differences has p = 1 and lower = 0. A single cell that differs by the same amount on all of n
    problems has p = 1 / 2**n, as in the sign test.

    The test is exact for one cell with symmetric differences, and asymptotic in the number of problems for a grid. In
    simulations (20 to 300 cells, 20 to 60 problems), 3 to 8 of 100 null grids have a significant cell. Drawing problems
    with replacement instead gives 5 to 11. Raises InputError for no samples.
    Source: wild cluster bootstrap with the null imposed and Rademacher weights, Cameron, Gelbach and Miller (2008),
    section III.B. Departure: it is applied to the largest statistic over cells (single-step maxT, Romano and Wolf
    2005).
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

    rank = int((1 - COVERAGE) * (1 + draws) + TIE)  # p <= 0.05 if fewer draws than this reach the statistic
    critical = max(largest[-rank], 0.0) if rank and differs.any() else np.inf
    if critical > np.sqrt(len(sizes)) - TIE:  # no statistic is larger than this root (Cauchy-Schwarz)
        critical = np.inf
    bending = sizes.sum() ** 2 - critical**2 * (sizes**2).sum()
    if bending <= TIE:
        lower = np.full(len(difference), -np.inf)
    else:  # statistic(difference - mean) = critical is a quadratic equation in mean; the smaller root
        linear = totals * sizes.sum() - critical**2 * overlap
        constant = totals**2 - critical**2 * lengths**2
        lower = (linear - np.sqrt(np.maximum(linear**2 - bending * constant, 0.0))) / bending
    lower = np.where(p <= 1 - COVERAGE + TIE, lower, np.minimum(lower, 0.0))  # the same ties in both
    return Above(p, float(critical), np.where(differs, lower, 0.0))


def weakest_pair(
    differences: Float[np.ndarray, "cell input sample"],
    keys: Shaped[np.ndarray, "sample"],
    draws: int = 1000,
    seed: int = 0,
) -> Above:
    """Tests whether each cell is above every one of its inputs. p-values and 95 % lower bounds, corrected for all
    pairs.

    differences: accuracy of the cell minus accuracy of the input on each sample. A pair that is NaN on every sample is
    left out.
    keys, draws, seed: as in `max_t_bootstrap`.

    All pairs are tested by one `max_t_bootstrap`, with the same sign changes. The p of a cell is the largest p of its
    pairs, and its lower bound is the smallest of its pairs; both are NaN for a cell without pairs. If a cell is not
    above all inputs, there is an input that it is not above, and a false positive takes a false rejection of that pair.
    The level therefore holds without choosing an input, whether inputs are equally accurate or not.
    Raises InputError for no samples, or a pair that is NaN on some samples only.
    Source: the intersection-union test, Berger (1982), with p-values corrected as in `max_t_bootstrap`.
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
    labels: Int[np.ndarray, "..."],
    keys: Shaped[np.ndarray, "sample"],
    draws: int = 1000,
    seed: int = 0,
    column: Int[np.ndarray, "cell"] | None = None,
) -> MaxT:
    """Tests whether each cell's predictions go along with the labels. p-values corrected for all cells.

    predictions, labels: of each sample (and region). keys: the problem of each sample. draws, seed: number and seed of
    the permutations. column: for each cell, the column of labels [sample, column] that it predicts, where labels
    differ between cells; predictions are then [cell, sample].

    Labels are permuted between problems with the same number of samples. All labels of a problem move together, and so
    do the region labels of a sample. Predictions stay. A cell's statistic is its accuracy, standardised by its mean and
    standard deviation over the permutations. The largest statistic over cells is kept for each permutation, and
    p = (1 + permutations whose largest statistic reaches this cell's statistic) / (1 + draws).
    The observed labelling counts as one of the permutations, which makes the test exact.
    A cell whose accuracy is the same in all permutations (a constant prediction) has statistic 0.
    Raises InputError for no samples.
    Source: single-step maxT, Westfall and Young (1993), procedure 2.8.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    check_any(keys)
    order, flat = permuted_blocks(keys, draws, seed), predictions.reshape(len(predictions), -1)
    observed = np.empty(len(flat))
    largest = np.full(draws + 1, -np.inf)
    alike = np.zeros(len(flat), dtype=int) if column is None else np.asarray(column)
    for of in np.unique(alike):  # cells that predict the same labels
        rows = (labels if column is None else labels[:, of])[order].reshape(draws + 1, -1)
        cells = np.flatnonzero(alike == of)
        for start in range(0, len(cells), CHUNK):
            part = cells[start : start + CHUNK]
            hits = np.zeros((len(part), draws + 1), dtype=np.float32)  # fp32 counts are exact below 2**24
            for k in np.intersect1d(flat[part], rows):
                hits += (flat[part] == k).astype(np.float32) @ (rows == k).astype(np.float32).T
            mean, spread = hits.mean(1, dtype=np.float64), hits.std(1, dtype=np.float64)
            score = (hits - mean[:, None]) / np.where(spread > TIE, spread, np.inf)[:, None]
            observed[part] = score[:, 0]
            largest = np.maximum(largest, score.max(axis=0))
    reached = np.sort(largest[1:])
    p = (1 + draws - np.searchsorted(reached, observed - TIE)) / (1 + draws)
    rank = int((1 - COVERAGE) * (1 + draws) + TIE)
    return MaxT(p, float(reached[-rank]) if rank else np.inf)


def permuted_blocks(keys: Shaped[np.ndarray, "sample"], draws: int, seed: int) -> Int[np.ndarray, "draw sample"]:
    """Index of the sample whose label each sample gets. Row 0 is the identity; `draws` permutations follow."""
    rng = np.random.default_rng(seed)
    problem, sizes = np.unique(keys, return_inverse=True, return_counts=True)[1:]
    order = np.argsort(problem, kind="stable")
    starts = np.cumsum(sizes) - sizes
    source = np.tile(np.arange(len(problem)), (draws + 1, 1))
    for size in np.unique(sizes):
        blocks = order[starts[sizes == size, None] + np.arange(size)]  # axes: problem, sample of the problem
        shuffled = rng.permuted(np.tile(np.arange(len(blocks)), (draws, 1)), axis=1)
        source[1:, blocks.ravel()] = blocks[shuffled].reshape(draws, -1)
    return source
