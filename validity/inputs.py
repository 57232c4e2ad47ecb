"""Does a cell beat every input? `weakest_pair` on grids that are exactly as good as the best input of their step.

The rule it replaced picked the strongest input of every step on validation samples and compared with that one. An
input that happens to do well on few samples is picked instead of the best, and cells as good as the best then beat it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import ndtri

from cosprobe.evaluation import max_t_bootstrap
from cosprobe.evaluation.significance import weakest_pair
from validity.rows import LEVEL, Row, alarms

SUBJECT = "a cell above every input (weakest pair)"
STEPS, LAYERS, DRAWS, VALIDATION = 20, 8, 199, 60
WEAKER = (0.0, 0.05, 0.06, 0.06, 0.07, 0.08)  # of the inputs, the best first


@dataclass(frozen=True)
class World:
    """best: share of right answers of cells and of the best input. moves: the best input differs between steps."""

    name: str
    best: float
    weaker: tuple[float, ...]
    moves: bool = False


WORLDS = (
    World("the same input best at every step", 0.6, WEAKER),
    World("another input best at every step", 0.6, WEAKER, moves=True),
    World("all other inputs 25 points weaker", 0.6, (0.0, *(0.25,) * 5)),
    World("cells and inputs at chance", 0.25, (0.0,) * 6),
)


def simulate(runs: int, seed: int, problems: Sequence[int] = (60, 90, 180)) -> list[Row]:
    """Share of maps with any cell called better than all inputs, by the rule in use and by the one it replaced."""
    found = []
    for i, world in enumerate(WORLDS):
        for count in problems:
            rng = np.random.default_rng([seed, i, count])
            called = np.array([_called(world, count, run, rng) for run in range(runs)])
            setting = f"{STEPS} steps x {LAYERS} layers, 6 inputs, {count} problems, {world.name}"
            found.append(alarms(SUBJECT, setting, called[:, 0]))
            other = f"the strongest input on {VALIDATION} validation samples"
            found.append(alarms(other, setting, called[:, 1], used=False))
    return found


def _called(world: World, problems: int, run: int, rng: np.random.Generator) -> tuple[bool, bool]:
    inputs, cells = _right(world, problems, rng)
    trial, _ = _right(world, VALIDATION, rng)
    keys = np.arange(problems)
    pairs = (cells[:, :, None] - inputs[:, None]).reshape(STEPS * LAYERS, len(world.weaker), problems)
    strongest = trial.mean(axis=2).argmax(axis=1)
    against = inputs[np.arange(STEPS), strongest]
    chosen = (cells - against[:, None]).reshape(STEPS * LAYERS, problems)
    return (
        bool((weakest_pair(pairs, keys, DRAWS, run).p <= LEVEL).any()),
        bool((max_t_bootstrap(chosen, keys, DRAWS, run).p <= LEVEL).any()),
    )


def _right(
    world: World, problems: int, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "step input sample"], Float[np.ndarray, "step layer sample"]]:
    """Right and wrong. Four tenths of what decides it are the problem's; three are the input's at all steps, or the
    step's in all layers; three are its own. Inputs take turns in being the best where it moves."""
    problem, inputs = np.sqrt(0.4) * rng.normal(size=problems), len(world.weaker)
    of_input = problem + np.sqrt(0.3) * (
        rng.normal(size=(inputs, problems)) + rng.normal(size=(STEPS, inputs, problems))
    )
    of_cell = problem + np.sqrt(0.3) * (
        rng.normal(size=(STEPS, 1, problems)) + rng.normal(size=(STEPS, LAYERS, problems))
    )
    order = np.arange(STEPS)[:, None] * world.moves + np.arange(len(world.weaker))
    share = world.best - np.asarray(world.weaker)[order % len(world.weaker)]
    return _below(of_input, share[..., None]), _below(of_cell, np.full((1, 1, 1), world.best))


def _below(score: Float[np.ndarray, "..."], share: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    right: Bool[np.ndarray, "..."] = score < ndtri(share)
    return right.astype(float)
