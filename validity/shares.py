"""Coverage of `share_interval` by true share, number of problems, seeds and their correlation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cosprobe.evaluation import share_interval
from cosprobe.evaluation.intervals import problem_draws
from validity.rows import Row, coverage, luck, seeds_of, worst

SUBJECT = "shares of right answers"
TRUTHS = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99)
PROBLEMS = (12, 20, 30, 60, 90, 180, 300, 600)
LAYOUTS = (("one each", 0.0), ("1 to 5", 0.0), ("1 to 5", 0.3), ("1 to 5", 1.0), ("a quarter hold 5", 1.0))
AT_ONCE = 500  # runs processed at a time; bounds memory


def simulate(runs: int, seed: int) -> list[Row]:
    """One row per number of problems and layout: the lowest coverage over true shares."""
    rng = np.random.default_rng(seed)
    return worst_by_layout(_covered, runs, rng) + _others(runs, rng)


def worst_by_layout(
    covered: Callable[[int, int, str, float, np.random.Generator], list[Row]], runs: int, rng: np.random.Generator
) -> list[Row]:
    """For each number of problems and layout, the row of lowest coverage among those that `covered` returns."""
    found = []
    for problems in PROBLEMS:
        for layout, correlation in LAYOUTS:
            setting = f"{problems} problems, {layout}, correlation {correlation:g}"
            found.append(worst(covered(runs, problems, layout, correlation, rng), setting))
    return found


def _covered(runs: int, problems: int, layout: str, correlation: float, rng: np.random.Generator) -> list[Row]:
    seeds = seeds_of(problems, layout, rng)
    keys = np.repeat(np.arange(problems), seeds)
    held, widths = np.empty((2, len(TRUTHS), runs))
    for start in range(0, runs, AT_ONCE):
        part = slice(start, min(start + AT_ONCE, runs))
        drawn = luck(part.stop - start, seeds, correlation, rng)
        for t, truth in enumerate(TRUTHS):
            lower, upper = share_interval((drawn < truth).astype(float), keys)
            held[t, part], widths[t, part] = (lower <= truth) & (truth <= upper), upper - lower
    return [coverage(SUBJECT, f"{t:g}", h > 0, w) for t, h, w in zip(TRUTHS, held, widths, strict=True)]


def _others(runs: int, rng: np.random.Generator) -> list[Row]:
    """Coverage of Wald's interval and of bootstrap percentiles, for 60 problems with one sample each."""
    draws = problem_draws(np.arange(60), 500, 0)
    wald, percentile = [], []
    for truth in TRUTHS:
        right = (rng.random((runs, 60)) < truth).astype(float)
        mean = right.mean(axis=1)
        half = 1.96 * np.sqrt(mean * (1 - mean) / 60)
        wald.append(coverage("shares, Wald", f"{truth:g}", np.abs(mean - truth) <= half, 2 * half, used=False))
        low, high = np.quantile(draws.means(right), [0.025, 0.975], axis=1)
        held = (low <= truth) & (truth <= high)
        percentile.append(coverage("shares, bootstrap percentiles", f"{truth:g}", held, high - low, used=False))
    return [worst(rows, "60 problems, one each") for rows in (wald, percentile)]
