"""Probes that scorer a run while it runs: which of them to read at a step, and what they say of a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from cosprobe.activations import Pooling, check_finite
from cosprobe.cells import Cell
from cosprobe.errors import InputError
from cosprobe.evaluation import Grid
from cosprobe.probes import ProbeBank, load_probes
from cosprobe.tasks import Problem

ROLES = ("answer", "choice")  # of the targets a run is judged by, in this order


@dataclass(frozen=True, eq=False)
class ProbeScorer:
    """Probes that scorer a run while it runs, by how sure they are of its answer.

    accuracy: of every layer cell of every answer or choice target on validation, which says what layer to read at a
    step. task: the family the probes were trained on.
    """

    bank: ProbeBank
    accuracy: dict[str, dict[Cell, float]]
    task: str

    @classmethod
    def load(cls, folder: Path | str, task: str) -> ProbeScorer:
        """The probes of a finished run on the family `task`."""
        return cls.of(load_probes(folder), Grid.load(folder), task)

    @classmethod
    def of(cls, bank: ProbeBank, grid: Grid, task: str) -> ProbeScorer:
        """Raises ValueError when there are no probes that read answers."""
        names = [t.name for role in ROLES for t in bank.targets if t.role == role and t.name in grid.targets]
        if not names:
            raise InputError("these probes read no answer or choice: expected a target of either; train probes of one")
        cells = [cell for cell in bank.cells if cell.is_layer and cell.branch == "cond"]
        return cls(bank, {n: {c: float(grid.at(n, c).validation_accuracy) for c in cells} for n in names}, task)

    @property
    def fingerprint(self) -> str:
        """Identity of the probes and of which of them are read."""
        digest = hashlib.sha256(repr(sorted((n, sorted(t.items())) for n, t in self.accuracy.items())).encode())
        for name in sorted(self.accuracy):
            digest.update(self.bank.weights[name].contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of problems whose runs can be read."""
        return tuple(sorted({kind for name in self.accuracy for kind in self.bank.target(name).kinds}))

    def target(self, problem: Problem) -> str:
        """The target a run of this problem is read by. Raises ValueError for a problem the probes do not know."""
        fitting = [name for name in self.accuracy if problem.kind in self.bank.target(name).kinds]
        if problem.task != self.task or not fitting:
            raise InputError(
                f"problem {problem.name!r}: these probes do not know it, expected task {self.task!r}, "
                f"kind {' or '.join(self.kinds)}; train probes on its task"
            )
        return fitting[0]

    def cell(self, target: str, step: int, layer: int | None = None) -> Cell:
        """The cell that is best on validation at a step (index), or at a step and layer. Raises ValueError."""
        table = self.accuracy[target]
        here = [c for c in table if c.step == step and layer in (None, int(c.site))]
        if not here:
            where = f"step {step}" if layer is None else f"step {step}, layer {layer}"
            steps, layers = sorted({c.step for c in table}), sorted({int(c.site) for c in table})
            raise InputError(f"{where}: no probes were trained there, expected steps {steps} and layers {layers}")
        return max(here, key=lambda c: (table[c], -int(c.site)))

    def pooling(self, problems: Sequence[Problem]) -> Pooling:
        """As the bank's features were pooled; the boxes are a list that may be cut together with the batch."""
        store = self.bank.provenance["store"]
        kind = store["probe.pooling"]
        return Pooling(kind, store["probe.frames"], [p.regions for p in problems] if kind == "region" else ())

    def read(
        self, cells: dict[str, Cell], problems: Sequence[Problem], features: Callable[[Cell], Tensor]
    ) -> Float[Tensor, "sample candidate"]:
        """Probabilities of the candidates for each sample. cells: per target; features: [sample, region, channel]."""
        targets = [self.target(p) for p in problems]
        proba: dict[str, Tensor] = {}
        for name in sorted(set(targets)):
            rows = features(cells[name]).float()
            check_finite(rows, cells[name].step, int(cells[name].site))
            rows = torch.nn.functional.pad(rows, (0, self.bank.mean.shape[1] - rows.shape[-1]))
            proba[name] = self.bank.probabilities(rows[:, None], name, [cells[name]])[0]
        return torch.stack([proba[name][i] for i, name in enumerate(targets)])
