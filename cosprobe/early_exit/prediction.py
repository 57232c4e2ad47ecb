"""Trained probes at work: the answer read from inside a run that is stopped early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cosprobe.activations import halting
from cosprobe.cells import Cell
from cosprobe.early_exit.reader import pooling_of, probabilities
from cosprobe.errors import InputError
from cosprobe.evaluation import Grid
from cosprobe.models import PipelineConfig, load_pipeline, sample
from cosprobe.probes import ProbeBank
from cosprobe.tasks import Problem, Sample, Task, TaskConfig, fresh_problems, images, with_noise


@dataclass
class PredictConfig:
    """Read answers of `problems` new problems after sampler step `step` (a step index), at block `layer`;
    no layer: the one that was best on validation."""

    step: int = 0
    problems: int = 16
    layer: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("step", 0), ("problems", 1)):
            if getattr(self, name) < least:
                raise InputError(f"use.{name}={getattr(self, name)}: expected at least {least}")


@dataclass(frozen=True)
class EarlyAnswer:
    """What a probe said of one problem. probability: of the probe, by the temperature of its cell.
    drawn: what the finished run ends on, None for none; right: the candidates that count as right."""

    problem: Problem
    answer: int
    probability: float
    drawn: int | None
    right: tuple[int, ...]


@torch.no_grad()
def early_answers(
    model: Any, pipeline: PipelineConfig, task: Task, bank: ProbeBank, target: str, cell: Cell, drawn: Sequence[Sample]
) -> list[EarlyAnswer]:
    """Runs every sample up to `cell` and asks its probe; then lets a full run of the same seed draw."""
    found = []
    for first in range(0, len(drawn), pipeline.batch):
        batch = drawn[first : first + pipeline.batch]
        problems = [s.problem for s in batch]
        arguments = (images(task, problems), [p.prompt for p in problems], [s.seed for s in batch])
        features = _features_at(model, pipeline, bank, cell, problems, arguments)
        proba = probabilities(bank, features[:, None], target, [cell])[0]
        video = sample(model, pipeline, *arguments)
        for problem, chances, clip in zip(problems, proba, video, strict=True):
            end = task.readout(problem, clip).answer
            found.append(
                EarlyAnswer(problem, int(chances.argmax()), float(chances.max()), end, task.solutions(problem))
            )
    return found


def _features_at(
    model: Any, pipeline: PipelineConfig, bank: ProbeBank, cell: Cell, problems: list[Problem], arguments: tuple
) -> torch.Tensor:
    """[sample, region, channel] at one cell, of runs that are halted there."""
    store, found = bank.provenance["store"], []

    def enough(at: Cell, features: torch.Tensor) -> bool:
        found.append(features)
        return True

    with halting(model, [cell], pooling_of(store["probe.pooling"], store["probe.frames"], problems), enough):
        sample(model, pipeline, *arguments)
    return found[0]


def predict(
    pipeline: PipelineConfig,
    task: TaskConfig,
    bank: ProbeBank,
    use: PredictConfig,
    seed: int,
    folder: Path,
    console: Console | None = None,
) -> None:
    """Prints early answers to problems no probe has seen, beside what the full run draws.

    pipeline, task: settings of the run in `folder`. Raises ValueError when the bank was made for another model, or the
    step or layer is not in it.
    """
    bank.check_model(*pipeline.parts)
    grid, world = Grid.load(folder), task.build()
    model = load_pipeline(pipeline)
    console = console or Console()
    for name in grid.with_role("answer", "choice"):
        cell = _best_at(grid, bank, name, use.step, use.layer)
        kind = bank.target(name).kinds[0]
        drawn = with_noise(fresh_problems(world, "test", task.problems, use.problems, [kind]), seed)
        answers = early_answers(model, pipeline, world, bank, name, cell, drawn)
        table = Table("problem", "probe says", "probability", "full run draws", "right", box=None, padding=(0, 3, 0, 0))
        table.title = f"{name}: read after step {use.step} of {pipeline.steps} (0 = noisiest), layer {cell.site}"
        for a in answers:
            end = "none" if a.drawn is None else str(a.drawn)
            right = " or ".join(map(str, a.right))
            table.add_row(f"{kind} {a.problem.index}", str(a.answer), f"{a.probability:.2f}", end, right)
        console.print(table)
        same = np.mean([a.answer == a.drawn for a in answers])
        solved = [np.mean([said in a.right for a, said in zip(answers, says, strict=True)]) for says in _both(answers)]
        console.print(
            f"probe and full run agree on {same:.2f} of {len(answers)} problems; right: probe {solved[0]:.2f}, "
            f"full run {solved[1]:.2f}\n",
            highlight=False,
            soft_wrap=True,
        )


def _both(answers: list[EarlyAnswer]) -> tuple[list[int], list[int | None]]:
    """What the probe said, and what the full run drew."""
    return [a.answer for a in answers], [a.drawn for a in answers]


def _best_at(grid: Grid, bank: ProbeBank, target: str, step: int, layer: int | None) -> Cell:
    """The cell of a target at a step: at `layer`, or at the layer that was best on validation there."""
    cells = [cell for cell in bank.cells if cell.is_layer]
    steps, layers = sorted({c.step for c in cells}), sorted({int(c.site) for c in cells})
    if step not in steps:
        raise InputError(f"use.step={step}: expected a step these probes were trained at: {_ranges(steps)}")
    if layer is not None and layer not in layers:
        raise InputError(f"use.layer={layer}: expected a layer these probes were trained at: {_ranges(layers)}")
    here = [c for c in cells if c.step == step and (layer is None or int(c.site) == layer)]
    return max(here, key=lambda cell: float(grid.at(target, cell).validation_accuracy))


def _ranges(values: list[int]) -> str:
    """`0 to 19`, or the values themselves when some are missing."""
    whole = values == list(range(values[0], values[-1] + 1))
    return f"{values[0]} to {values[-1]}" if whole else ", ".join(map(str, values))
