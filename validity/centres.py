"""Coverage of the difference of two centres of mass over layers, and of the rank correlation with a difficulty."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.stats import norm, spearmanr

from cosprobe.behaviour.along_steps import rank_correlation
from cosprobe.behaviour.over_layers import centre_difference
from validity.onsets import SHARED
from validity.rows import Row, coverage

LAYERS, CHANCE = tuple(range(8)), 0.25
CURVES = {  # accuracy of the answer over layers
    "from layer 4": (4.0, 0.95),
    "from layer 6": (6.0, 0.95),
    "from layer 4, low": (4.0, 0.5),
}
VISIBLE = 0.7  # accuracy of what is visible, in every layer
CORRELATIONS = (0.0, 0.3, 0.6)
POPULATION = 400_000


def accuracy(onset: float, ceiling: float) -> Float[np.ndarray, " layer"]:
    """A logistic curve over layers from CHANCE to `ceiling`, with a scale of half a layer."""
    return CHANCE + (ceiling - CHANCE) / (1 + np.exp(2 * (onset - np.array(LAYERS))))


def simulate(runs: int, seed: int, problems: Sequence[int] = (24, 90)) -> list[Row]:
    """Samples of a problem share part of their luck, also between layers."""
    found = []
    for count in problems:
        rng = np.random.default_rng([seed, count])
        for name, curve in CURVES.items():
            found.append(_centres(runs, rng, count, name, accuracy(*curve)))
        for r in CORRELATIONS:
            found.append(_ranks(runs, rng, count, r))
    return found


def _centres(runs: int, rng: np.random.Generator, problems: int, name: str, curve: Float[np.ndarray, " layer"]) -> Row:
    layers, flat = np.array(LAYERS), np.full(len(LAYERS), VISIBLE)
    exact = [(layers * (line - CHANCE)).sum() / (line - CHANCE).sum() for line in (curve, flat)]
    truth, keys = exact[0] - exact[1], np.arange(problems)
    covered, widths = np.empty(runs, bool), np.empty(runs)
    for run in range(runs):
        own, together = rng.random((2, len(layers), problems)), rng.random((2, 1, problems))
        luck = np.where(rng.random(own.shape) < SHARED, together, own)
        right = (luck < np.stack([curve, flat])[:, :, None]).astype(float)
        _, lower, upper = centre_difference(right[0], right[1], (CHANCE, CHANCE), LAYERS, keys)
        covered[run], widths[run] = lower <= truth <= upper, upper - lower
    return coverage("centres over layers", f"{problems} problems, answer {name}", covered, widths)


def _ranks(runs: int, rng: np.random.Generator, problems: int, r: float) -> Row:
    """Difficulties of five levels and steps of eight."""

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        x, y = rng.multivariate_normal([0, 0], [[1, r], [r, 1]], count).T
        return (norm.cdf(x) * 5).astype(int), (norm.cdf(y) * 8).astype(int)

    truth = float(spearmanr(*draw(POPULATION)).statistic)
    covered, widths = np.empty(runs, bool), np.empty(runs)
    for run in range(runs):
        _, lower, upper = rank_correlation(*draw(problems), np.arange(problems))
        covered[run], widths[run] = lower <= truth <= upper, upper - lower
    return coverage("commitment and difficulty", f"{problems} problems, correlation {r:g}", covered, widths)
