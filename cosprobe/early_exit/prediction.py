"""Reads answers of new problems from runs halted at one cell, and compares them with the answers of full runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table

from cosprobe.activations import Pooling, Sampler, halting
from cosprobe.cells import Cell, ranges
from cosprobe.config import PredictConfig
from cosprobe.early_exit.reader import probabilities
from cosprobe.errors import InputError
from cosprobe.evaluation import Grid
from cosprobe.models import pipeline_fingerprint
from cosprobe.probes import ProbeBank
from cosprobe.runtime import rank_and_world
from cosprobe.tasks import ANSWER_ROLES, Problem, Sample, TaskConfig, fresh_problems, with_noise


@dataclass(frozen=True)
class EarlyAnswer:
    """The early answer to one problem.

    probability: probability of this answer, calibrated by the temperature of the cell. model_answer: what the finished
    video shows, None for no answer, or for a task without a parser. solutions: answers that count as right; none where
    the problem has no label.
    """

    problem: Problem
    answer: int
    probability: float
    model_answer: int | None
    solutions: tuple[int, ...]


@torch.no_grad()
def early_answers(
    sampler: Sampler, bank: ProbeBank, target: str, cell: Cell, samples: Sequence[Sample]
) -> list[EarlyAnswer]:
    """Reads the probe of `cell` in runs that are halted there, then samples full runs with the same seeds.

    Full runs are left out where no parser reads their videos. The label of a problem is then its only right answer.
    """
    found, parser = [], sampler.task.candidates > 0
    for batch in sampler.batches(samples):
        problems = [s.problem for s in batch]
        proba = probabilities(bank, _features_at(sampler, bank, cell, batch)[:, None], target, [cell])[0]
        ends = sampler.parse(problems, sampler(batch)).answers.tolist() if parser else [-1] * len(batch)
        for problem, each, end in zip(problems, proba, ends, strict=True):
            label, model_answer = problem.labels.get(target), None if end < 0 else end
            labelled = (label,) if isinstance(label, int) else ()
            solutions = sampler.task.solutions(problem) if parser else labelled
            found.append(EarlyAnswer(problem, int(each.argmax()), float(each.max()), model_answer, solutions))
    return found


def _features_at(
    sampler: Sampler, bank: ProbeBank, cell: Cell, batch: list[Sample]
) -> Float[torch.Tensor, "sample region channel"]:
    """Features at one cell, from runs that are halted there."""
    found = []

    def enough(at: Cell, features: torch.Tensor) -> bool:
        found.append(features)
        return True

    with halting(sampler.model, [cell], Pooling.of(bank.store.probe, [s.problem for s in batch]), enough):
        sampler(batch)
    return found[0]


def predict(
    sampler: Sampler,
    task: TaskConfig,
    bank: ProbeBank,
    use: PredictConfig,
    seed: int,
    folder: Path,
    console: Console | None = None,
) -> None:
    """Prints early answers to new problems together with the answers of full runs, where a parser reads these.

    sampler: the loaded pipeline and the task of the run in `folder`. task: settings of that task. With several
    processes, only the first one does anything. Raises InputError when the bank was made for another model, or does not
    hold the step or layer.
    """
    if rank_and_world()[0]:
        return
    pipeline, grid = sampler.config, Grid.load(folder)
    bank.check_model(pipeline_fingerprint(sampler.model), "the loaded pipeline")
    console = console or Console()
    for name in grid.with_role(*ANSWER_ROLES):
        cell = _best_at(grid, bank, name, use.step, use.layer)
        kind = bank.target(name).kinds[0]
        samples = with_noise(fresh_problems(sampler.task, "test", task.problems, use.problems, [kind]), seed)
        answers = early_answers(sampler, bank, name, cell, samples)
        parser, names = sampler.task.candidates > 0, bank.target(name).names
        heads = ("problem", "probe", "probability", *(["full run"] if parser else []), "right answer")
        table = Table(*heads, box=None, padding=(0, 3, 0, 0))
        table.title = f"{name}: read after step {use.step} of {pipeline.steps} (0 = noisiest), layer {cell.layer}"
        for a in answers:
            end = ["none" if a.model_answer is None else _named(a.model_answer, names)] if parser else []
            right = " or ".join(_named(solution, names) for solution in a.solutions)
            table.add_row(a.problem.title, _named(a.answer, names), f"{a.probability:.2f}", *end, right)
        console.print(table)
        of_probe = np.mean([a.answer in a.solutions for a in answers])
        if parser:
            same = np.mean([a.answer == a.model_answer for a in answers])
            of_run = np.mean([a.model_answer in a.solutions for a in answers])
            said = f"probe and full run agree on {same:.2f} of {len(answers)} problems; right: probe {of_probe:.2f}, "
            said += f"full run {of_run:.2f}"
        else:
            said = f"right: probe {of_probe:.2f} of {len(answers)} problems. The task has no parser (task.parser), so "
            said += "the answers of full runs are not known."
        console.print(f"{said}\n", highlight=False, soft_wrap=True)


def _named(answer: int, names: Sequence[str]) -> str:
    """The name of an answer, its number where it has none."""
    return names[answer] if names else str(answer)


def _best_at(grid: Grid, bank: ProbeBank, target: str, step: int, layer: int | None) -> Cell:
    """The cell of a target at a step and layer; without a layer, the one with the best validation accuracy at the
    step."""
    cells = bank.cells
    steps, layers = sorted({c.step for c in cells}), sorted({c.layer for c in cells})
    if step not in steps:
        raise InputError(f"use.step={step}: expected a step at which probes were trained: {ranges(steps)}")
    if layer is not None and layer not in layers:
        raise InputError(f"use.layer={layer}: expected a layer at which probes were trained: {ranges(layers)}")
    here = [c for c in cells if c.step == step and (layer is None or c.layer == layer)]
    return max(here, key=lambda cell: float(grid.at(target, cell).validation_accuracy))
