"""False positive rate of `max_t_permutation` on grids whose predictions are independent of the labels."""

from __future__ import annotations

import math

import numpy as np

from cosprobe.evaluation.significance import max_t_permutation
from validity.rows import LEVEL, Row, alarms, seeds_of

SUBJECT = "a cell above guessing (permutation of problems)"
CELLS, DRAWS = 40, 199
BALANCED, RARE = (0.25, 0.25, 0.25, 0.25), (0.9, 0.06, 0.04)
SETTINGS = [  # problems, layout, frequency of each class, correlation of cells
    (60, "one each", BALANCED, 0.0),
    (60, "one each", BALANCED, 0.8),
    (90, "one each", BALANCED, 0.5),
    (60, "one each", RARE, 0.5),
    (90, "one each", RARE, 0.8),
    (60, "1 to 5", BALANCED, 0.5),
    (90, "1 to 5", RARE, 0.5),
    (180, "1 to 5", BALANCED, 0.8),
]


def simulate(runs: int, seed: int) -> list[Row]:
    """Share of grids with any significant cell. Labels and predictions are independent."""
    return [_alarms(runs, np.random.default_rng([seed, i]), *setting) for i, setting in enumerate(SETTINGS)]


def _alarms(
    runs: int, rng: np.random.Generator, problems: int, layout: str, frequency: tuple[float, ...], correlation: float
) -> Row:
    bounds = np.cumsum(frequency)[:-1]
    seeds = seeds_of(problems, layout, rng)
    keys = np.repeat(np.arange(problems), seeds)
    found = np.empty(runs, dtype=bool)
    for run in range(runs):
        labels = np.searchsorted(bounds, rng.random(problems))[np.repeat(np.arange(problems), seeds)]
        # a cell takes the shared guess of the problem with probability sqrt(correlation), otherwise its own guess
        shared = np.searchsorted(bounds, rng.random(problems))
        separate = np.searchsorted(bounds, rng.random((CELLS, problems)))
        guess = np.where(rng.random((CELLS, problems)) < math.sqrt(correlation), shared, separate)
        p = max_t_permutation(np.repeat(guess, seeds, axis=1), labels, keys, DRAWS, run).p
        found[run] = (p <= LEVEL).any()
    classes = " ".join(f"{share:g}" for share in frequency)
    setting = f"{CELLS} cells, {problems} problems, {layout}, classes {classes}, correlation of cells {correlation:g}"
    return alarms(SUBJECT, setting, found)
