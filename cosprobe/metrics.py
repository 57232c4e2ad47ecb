"""How sure a number is: intervals and significance that respect the problem behind every sample.

Samples of one problem (other noise seeds, mirror images) are not independent, so both procedures work on whole
problems: the bootstrap draws problems, the permutation exchanges the labels of whole problems. Probes are never
refitted: they were trained on other problems, so their test predictions are fixed.
"""

from __future__ import annotations

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


def cluster_bootstrap(
    correct: Float[np.ndarray, "cell sample"], keys: Shaped[np.ndarray, "sample"], draws: int = 1000, seed: int = 0
) -> tuple[Float[np.ndarray, "cell"], Float[np.ndarray, "cell"]]:
    """95 % percentile interval of each cell's mean when problems, not samples, are drawn with replacement.

    correct: any number per sample (right or wrong, or a difference of two cells: every cell sees the same draws,
    so differences are paired). keys: the problem of each sample. The order of samples does not matter.
    Cells right on every sample get the interval [1, 1]: the bootstrap cannot see errors that were never drawn.
    Raises ValueError for no samples.
    Source: cluster bootstrap, Cameron, Gelbach and Miller (2008), section II; here of a ratio of sums.
    """
    correct = np.asarray(correct, dtype=np.float64)
    _check(keys)
    problem = np.unique(keys, return_inverse=True)[1]
    sizes = np.bincount(problem).astype(np.float64)
    member = np.zeros((len(problem), len(sizes)))
    member[np.arange(len(problem)), problem] = 1.0
    times = np.random.default_rng(seed).multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=draws)
    weights = (times / (times @ sizes)[:, None]).T  # problem draw
    tails = [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2]
    bounds = np.empty((2, len(correct)))
    for start in range(0, len(correct), CHUNK):
        means = (correct[start : start + CHUNK] @ member) @ weights
        bounds[:, start : start + CHUNK] = np.quantile(means, tails, axis=1)
    return bounds[0], bounds[1]


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


def _check(keys: Shaped[np.ndarray, "sample"]) -> None:
    if len(keys) == 0:
        raise ValueError("no samples: expected at least one; draw more problems")
