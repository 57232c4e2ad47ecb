"""Seed ensembles: intervals of means over six seeds and of gains, and the test of methods against a reference."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from cosprobe.evaluation import difference_interval, max_t_bootstrap, share_interval
from validity.rows import LEVEL, Row, alarms, coverage

SEEDS, METHODS, DRAWS = 6, 8, 199
PROBLEMS = (32, 60, 240)  # as with use.size=quick, in between, as with use.size=full
SPREADS = (0.2, 2.0)  # concentration of Beta: seeds of a problem nearly always agree; seeds are nearly independent


def simulate(runs: int, seed: int) -> list[Row]:
    """In each run all methods are equally accurate. The gain is that of one method with half of the errors, by
    problem."""
    found = []
    for problems in PROBLEMS:
        for spread in SPREADS:
            rng = np.random.default_rng([seed, problems, int(10 * spread)])
            found += _rows(runs, rng, problems, spread)
    return found


def _rows(runs: int, rng: np.random.Generator, problems: int, spread: float) -> list[Row]:
    keys, truth = np.arange(problems), 0.75
    chance = rng.beta(truth * spread, (1 - truth) * spread, (runs, problems))
    one = _mean_of_seeds(chance, rng)
    # in half of the problems, the probability of an error is halved
    better = np.where(rng.random(chance.shape) < 0.5, (1 + chance) / 2, chance)
    voted = (rng.random(chance.shape) < better).astype(float)
    gain = (1 - truth) / 4
    lower, upper = share_interval(one, keys)
    less, more = difference_interval(voted - one, keys)
    called = np.empty(runs, dtype=bool)
    for run in range(runs):
        methods = _mean_of_seeds(np.repeat(chance[run][None], METHODS + 1, axis=0), rng)
        called[run] = (max_t_bootstrap(methods[1:] - methods[0], keys, DRAWS, run).p <= LEVEL).any()
    setting = f"{problems} problems, chances Beta({truth * spread:g}, {(1 - truth) * spread:g})"
    return [
        coverage("ensembles: mean over six seeds", setting, (lower <= truth) & (truth <= upper), upper - lower),
        coverage("ensembles: gain of one answer over it", setting, (less <= gain) & (gain <= more), more - less),
        alarms(f"ensembles: any of {METHODS} equally good methods above the reference", setting, called),
    ]


def _mean_of_seeds(
    chance: Float[np.ndarray, "row problem"], rng: np.random.Generator
) -> Float[np.ndarray, "row problem"]:
    return rng.binomial(SEEDS, chance) / SEEDS
