"""False positive rate of `weakest_pair` on grids whose cells are as accurate as the best input of their step.

For comparison: a rule that chooses the most accurate input of every step on validation samples, and compares cells with
this input only. On few samples it often chooses an input that is not the best one, and cells that are only as accurate
as the best input are then above the chosen one.
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
WEAKER = (0.0, 0.05, 0.06, 0.06, 0.07, 0.08)  # accuracy of the best input minus that of each input


@dataclass(frozen=True)
class World:
    """best: accuracy of cells and of the best input. weaker: `best` minus accuracy of each input. moves: whether the
    best input differs between steps."""

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
    """Share of maps with any cell significantly above all inputs, by `weakest_pair` and by the other rule."""
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
    validation, _ = _right(world, VALIDATION, rng)
    keys = np.arange(problems)
    pairs = (cells[:, :, None] - inputs[:, None]).reshape(STEPS * LAYERS, len(world.weaker), problems)
    strongest = validation.mean(axis=2).argmax(axis=1)
    against = inputs[np.arange(STEPS), strongest]
    chosen = (cells - against[:, None]).reshape(STEPS * LAYERS, problems)
    return (
        bool((weakest_pair(pairs, keys, DRAWS, run).p <= LEVEL).any()),
        bool((max_t_bootstrap(chosen, keys, DRAWS, run).p <= LEVEL).any()),
    )


def _right(
    world: World, problems: int, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "step input sample"], Float[np.ndarray, "step layer sample"]]:
    """Right (1) and wrong (0) of inputs and cells, by thresholds on normal scores.

    Of the variance of a score, 0.4 is shared by all scores of a problem, 0.3 by the steps of an input or the layers of
    a step, and 0.3 is independent. With `moves`, the best input changes from step to step.
    """
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
