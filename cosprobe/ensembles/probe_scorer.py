"""Reads trained probes while runs are sampled: chooses the cell for a step and computes probabilities of a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from cosprobe.activations import Pooling, check_finite
from cosprobe.cells import Cell
from cosprobe.errors import InputError
from cosprobe.evaluation import Grid
from cosprobe.probes import ProbeBank, load_probes
from cosprobe.tasks import ANSWER_ROLES, Problem


@dataclass(frozen=True, eq=False)
class ProbeScorer:
    """Probabilities of answers, by trained probes, of runs that are being sampled.

    accuracy: validation accuracy by target and cell, which decides which layer is read at a step. task: name of the
    task that the probes were trained on.
    """

    bank: ProbeBank
    accuracy: dict[str, dict[Cell, float]]
    task: str

    @classmethod
    def load(cls, folder: Path | str, task: str) -> ProbeScorer:
        """Loads the probes of a finished run. task: name of the task of that run."""
        return cls.of(load_probes(folder), Grid.load(folder), task)

    @classmethod
    def of(cls, bank: ProbeBank, grid: Grid, task: str) -> ProbeScorer:
        """Raises InputError when the bank has no probes of an answer or model_answer."""
        names = [t.name for role in ANSWER_ROLES for t in bank.targets if t.role == role and t.name in grid.targets]
        if not names:
            raise InputError(
                "these probes have no target of role answer or model_answer: expected at least one; train such probes"
            )
        cells = [cell for cell in bank.cells if cell.branch == "cond"]
        return cls(bank, {n: {c: float(grid.at(n, c).validation_accuracy) for c in cells} for n in names}, task)

    @property
    def fingerprint(self) -> str:
        """Hash of the probes and of their validation accuracies."""
        digest = hashlib.sha256(repr(sorted((n, sorted(t.items())) for n, t in self.accuracy.items())).encode())
        for name in sorted(self.accuracy):
            digest.update(self.bank.weights[name].contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of problems that the probes can answer."""
        return tuple(sorted({kind for name in self.accuracy for kind in self.bank.target(name).kinds}))

    def target(self, problem: Problem) -> str:
        """The target that answers this problem. Raises InputError for a problem of another task or kind."""
        fitting = [name for name in self.accuracy if problem.kind in self.bank.target(name).kinds]
        if problem.task != self.task or not fitting:
            raise InputError(
                f"problem {problem.name!r}: these probes were trained on other problems, expected task {self.task!r}, "
                f"kind {' or '.join(self.kinds)}; train probes on its task"
            )
        return fitting[0]

    def check(self, steps: Sequence[int], layers: Sequence[int | None]) -> None:
        """Raises InputError unless there are probes of every target at these step indices and layers (None: any)."""
        for target, step, layer in product(self.accuracy, steps, layers):
            self.cell(target, step, layer)

    def cell(self, target: str, step: int, layer: int | None = None) -> Cell:
        """The cell with the best validation accuracy at a step index (and layer). Raises InputError if there is
        none."""
        table = self.accuracy[target]
        here = [c for c in table if c.step == step and layer in (None, c.layer)]
        if not here:
            where = f"step {step}" if layer is None else f"step {step}, layer {layer}"
            steps, layers = sorted({c.step for c in table}), sorted({c.layer for c in table})
            raise InputError(
                f"{where}: no probes were trained there, expected steps {steps} and layers {layers}; train with "
                "probe.steps=all and probe.layers=all"
            )
        return max(here, key=lambda c: (table[c], -c.layer))

    def pooling(self, problems: Sequence[Problem]) -> Pooling:
        """The pooling that the bank was trained with. Its boxes are a list, so that samples can be dropped from it."""
        return Pooling.of(self.bank.store.probe, problems)

    def read(
        self, cells: dict[str, Cell], problems: Sequence[Problem], features: Callable[[Cell], Tensor]
    ) -> Float[Tensor, "sample candidate"]:
        """Probabilities of the candidates for each sample.

        cells: cell to read by target. features: function that returns [sample, region, channel] of a cell.
        """
        targets = [self.target(p) for p in problems]
        proba: dict[str, Tensor] = {}
        for name in sorted(set(targets)):
            rows = features(cells[name]).float()
            check_finite(rows, cells[name].step, cells[name].layer)
            proba[name] = self.bank.probabilities(rows[:, None], name, [cells[name]])[0]
        return torch.stack([proba[name][i] for i, name in enumerate(targets)])
