"""Coverage of `difference_interval` by true difference, share of ties, number of problems, seeds and correlation."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from cosprobe.evaluation import difference_interval
from cosprobe.evaluation.intervals import problem_draws
from validity.rows import Row, coverage, luck, seeds_of, worst
from validity.shares import AT_ONCE, worst_by_layout

SUBJECT = "paired differences"
TRUTHS = (-0.5, -0.2, 0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


def tables() -> list[tuple[float, float]]:
    """Pairs (true difference, share of samples without a tie): one side wins never, rarely, or often; or no ties."""
    found = []
    for truth in TRUTHS:
        apart = {abs(truth), abs(truth) + 0.05, (1 + abs(truth)) / 2, 1.0} - {0.0}
        found += [(truth, share) for share in sorted(apart)]
    return found


def simulate(runs: int, seed: int) -> list[Row]:
    """One row per number of problems and layout: the lowest coverage over true differences and shares of ties."""
    rng = np.random.default_rng(seed)
    return worst_by_layout(_covered, runs, rng) + _others(runs, rng)


def _differences(drawn: Float[np.ndarray, "run sample"], truth: float, apart: float) -> Float[np.ndarray, "run sample"]:
    won, lost = (apart + truth) / 2, (apart - truth) / 2
    return (drawn < won).astype(float) - (drawn > 1 - lost)


def _covered(runs: int, problems: int, layout: str, correlation: float, rng: np.random.Generator) -> list[Row]:
    seeds = seeds_of(problems, layout, rng)
    keys = np.repeat(np.arange(problems), seeds)
    settings = tables()
    held, widths = np.empty((2, len(settings), runs))
    for start in range(0, runs, AT_ONCE):
        part = slice(start, min(start + AT_ONCE, runs))
        drawn = luck(part.stop - start, seeds, correlation, rng)
        for i, (truth, apart) in enumerate(settings):
            lower, upper = difference_interval(_differences(drawn, truth, apart), keys)
            held[i, part], widths[i, part] = (lower <= truth) & (truth <= upper), upper - lower
    return [coverage(SUBJECT, _named(*s), h > 0, w) for s, h, w in zip(settings, held, widths, strict=True)]


def _others(runs: int, rng: np.random.Generator) -> list[Row]:
    """Coverage of the interval of Agresti and Min and of bootstrap percentiles, for 60 problems with one sample
    each."""
    draws = problem_draws(np.arange(60), 500, 0)
    agresti, percentile = [], []
    for truth, apart in tables():
        values = _differences(rng.random((runs, 60)), truth, apart)
        ahead, differing = values.sum(axis=1), np.abs(values).sum(axis=1) + 1
        half = 1.96 * np.sqrt(differing - ahead**2 / 62) / 62
        held = np.abs(ahead / 62 - truth) <= half
        agresti.append(coverage("differences, Agresti and Min", _named(truth, apart), held, 2 * half, used=False))
        low, high = np.quantile(draws.means(values), [0.025, 0.975], axis=1)
        held = (low <= truth) & (truth <= high)
        name = "differences, bootstrap percentiles"
        percentile.append(coverage(name, _named(truth, apart), held, high - low, used=False))
    return [worst(rows, "60 problems, one each") for rows in (agresti, percentile)]


def _named(truth: float, apart: float) -> str:
    return f"{truth:+g}, {apart:g} differ"
