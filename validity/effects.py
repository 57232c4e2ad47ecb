"""Causal effects: upper bounds of the effects of all cells of a plane, and the rank correlation of skill and effect.

An effect is the mean over problems of win (1), tie (0) and loss (-1) of an edited run against its control.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from scipy.stats import spearmanr

from cosprobe.causal.effects import rank_correlation, upper_bounds
from validity.rows import Row, coverage, luck, seeds_of

PROBLEMS = (24, 96)  # as with use.size=quick and full
CELLS = (9, 16, 60)
LOSSES = 0.1  # probability that the control alone shows the label, where both can
SHARED = 0.3  # correlation of the luck of the cells of a problem
DRAWS = 400
LEAST = 0.9  # coverage of the rank correlation: the order of nearly equal effects cannot be estimated

Effects = Float[np.ndarray, " cell"]
# by name: true effects of cells from their skill, which is uniform between 0 and 1
WORLDS: dict[str, Callable[[Effects, np.random.Generator], Effects]] = {
    "effects rise with skill": lambda skill, rng: 0.5 * skill + rng.normal(scale=0.05, size=len(skill)),
    "effects rise a little": lambda skill, rng: 0.25 * skill + rng.normal(scale=0.1, size=len(skill)),
    "no relation": lambda skill, rng: 0.3 * rng.random(len(skill)),
    "a quarter of the cells has effects": lambda skill, rng: np.where(
        skill > np.quantile(skill, 0.75), rng.uniform(0.4, 0.8, len(skill)), rng.uniform(0, 0.02, len(skill))
    ),
    "effects of 0.6 of the cells are zero": lambda skill, rng: np.where(rng.random(len(skill)) < 0.6, 0.0, 0.3 * skill),
}


def simulate(runs: int, seed: int) -> list[Row]:
    """Bounds hold for a plane if they hold in all its cells."""
    found = []
    for problems in PROBLEMS:
        for cells in CELLS:
            rng = np.random.default_rng([seed, problems, cells])
            for layout in ("one each", "a quarter hold 5"):
                for most in (0.0, 0.05, 0.2):
                    found.append(_bounds(runs, rng, problems, cells, layout, most))
            for name, world in WORLDS.items():
                found.append(_correlation(max(runs // 5, 1), rng, problems, cells, name, world))
    return found


def _bounds(runs: int, rng: np.random.Generator, problems: int, cells: int, layout: str, most: float) -> Row:
    truth = np.linspace(0, most, cells)
    covered, widths = np.empty(runs, dtype=bool), np.empty(runs)
    for run in range(runs):
        seeds = seeds_of(problems, layout, rng)
        keys = np.repeat(np.arange(problems), seeds)
        wins = luck(cells, seeds, SHARED, rng) < truth[:, None]
        bound = upper_bounds(wins.astype(float), keys)
        covered[run], widths[run] = (truth <= bound).all(), (bound - wins.mean(axis=1)).mean()
    setting = f"{problems} problems, seeds {layout}, {cells} cells, effects from 0 to {most:g}"
    return coverage("upper bounds of all effects of a plane", setting, covered, widths)


def _correlation(
    runs: int,
    rng: np.random.Generator,
    problems: int,
    cells: int,
    name: str,
    world: Callable[[Effects, np.random.Generator], Effects],
) -> Row:
    covered, widths = np.empty(runs, dtype=bool), np.empty(runs)
    for run in range(runs):
        skill = rng.random(cells)
        truth = np.clip(world(skill, rng), 0, 1 - 2 * LOSSES)
        exact = spearmanr(skill, truth).statistic if np.ptp(truth) else 0.0  # without effects there is no order
        _, lower, upper = rank_correlation(skill, _differences(truth, problems, rng), np.arange(problems), DRAWS, run)
        covered[run], widths[run] = not lower > exact and not upper < exact, upper - lower
    given = np.isfinite(widths)  # runs without an interval do not count
    return coverage(
        "rank correlation of skill and effect", f"{problems} problems, {cells} cells, {name}", covered[given],
        widths[given], least=LEAST,
    )  # fmt: skip


def _differences(truth: Effects, problems: int, rng: np.random.Generator) -> Float[np.ndarray, "cell problem"]:
    """Wins and losses. With probability a half, a problem's luck is that of all cells."""
    separate = rng.random((len(truth), problems))
    drawn = np.where(rng.random(separate.shape) < 0.5, rng.random(problems), separate)
    return 1.0 * (drawn < truth[:, None] + LOSSES) - (drawn > 1 - LOSSES)
