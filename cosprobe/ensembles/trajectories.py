"""Trials of seed ensembles on many problems, kept on disk.

Every problem is sampled once with several noise seeds while probes read its first steps: the records. Whatever only
chooses among runs is replayed on them, which gives exactly what it would return; whatever changes its runs is run.
Finished batches are kept, a second run continues.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from cosprobe.activations import ActivationStore
from cosprobe.ensembles.ensemble import RunContext, run
from cosprobe.ensembles.strategies import METHODS, Course, Finished, Plan, course, replay
from cosprobe.tasks import Problem

READS = 6  # probes are read at so many first steps


@dataclass(frozen=True)
class Candidate:
    """A method with its settings."""

    method: str
    plan: Plan

    @property
    def free(self) -> bool:
        """Whether records of whole runs tell what it returns."""
        path = METHODS[self.method](self.plan, 10**6)
        return path.edit is None and not path.length

    def __str__(self) -> str:
        """Method, K seeds, step indices s, layers L: `hidden K=3 s0 L4-5`."""
        if self.method == "single":
            return f"single, {self.plan.length} steps"
        parts = [self.method, f"K={self.plan.seeds}"]
        if self.plan.steps is not None:
            parts.append("s" + ",".join(map(str, self.plan.steps)))
        if self.plan.layers:
            parts.append(f"L{self.plan.layers[0]}-{self.plan.layers[-1]}")
        return " ".join([*parts, *(["all"] if self.plan.back == "all" else [])])


@dataclass(frozen=True, eq=False)
class Trial:
    """What came of a candidate, per problem: share of right answers, and how many of its runs were begun."""

    right: np.ndarray
    begun: np.ndarray


class Trials:
    """What is on disk is read, the rest is run and kept.

    problems: by split. seeds: noise seeds of each problem in the records. seed: what they are drawn from. identity:
    what else shapes results (model, bank, task).
    """

    def __init__(
        self,
        context: RunContext,
        problems: dict[str, list[Problem]],
        seeds: int,
        seed: int,
        folder: Path,
        identity: dict,
    ):
        self.context, self.problems, self.seeds, self.seed, self.folder = context, problems, seeds, seed, folder
        self.reads = tuple(range(min(READS, context.config.steps))) if context.scorer is not None else ()
        self.identity = identity | {"seed": seed, "steps": context.config.steps, "batch": context.config.batch}

    def records(self, split: str) -> dict[str, Tensor]:
        """Every problem with every seed: answers and right [problem, seed], scores [problem, seed, candidate], and
        where there are probes their probabilities, `odds` [problem, seed, step, candidate]."""
        return self._read([None], split)[0]

    def of(self, found: Sequence[Candidate], split: str) -> dict[Candidate, Trial]:
        """Free candidates are replayed on the records, each of whose seeds is once the first of K consecutive ones
        (the first follows the last); the others are run with the first seeds."""
        run_for_real = [c for c in found if not c.free]
        pool, *trials = self._read([None, *run_for_real], split)
        given = {
            c: Trial(trial["right"].numpy().astype(float), np.full(len(trial["right"]), float(c.plan.seeds)))
            for c, trial in zip(run_for_real, trials, strict=True)
        }
        return {c: given[c] if c in given else self._replayed(c, pool, split) for c in found}

    def _replayed(self, candidate: Candidate, pool: dict[str, Tensor], split: str) -> Trial:
        count, right, begun = candidate.plan.seeds, [], []
        path = self._path(candidate)
        for start in range(self.seeds):
            part = [(start + i) % self.seeds for i in range(count)]
            proba = {step: pool["odds"][:, part, i] for i, step in enumerate(self.reads)}
            answers, _, runs = replay(path, Finished(pool["answers"][:, part], pool["scores"][:, part]), proba)
            right.append(self._solved(answers, self.problems[split]).float())
            begun.append(runs.float())
        return Trial(*(torch.stack(each).mean(dim=0).numpy().astype(float) for each in (right, begun)))

    def _read(self, found: Sequence[Candidate | None], split: str) -> list[dict[str, Tensor]]:
        """Runs what is missing of several trials (None: the records), in one progress bar, and reads all of them."""
        stores = [self._store(c, split) for c in found]
        todo = [(c, store, i) for c, store in zip(found, stores, strict=True) for i in self._missing(store)]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        if todo:
            with Progress(*columns, TimeRemainingColumn()) as bar:
                for candidate, store, index in bar.track(todo, description=f"ensemble: batches of {split}"):
                    store.write(index, *self._batch(candidate, self._chunks(candidate, split)[index]))
        for store in stores:
            if not store.complete:
                store.finish()
        return [store.read()[0] for store in stores]

    def _missing(self, store: ActivationStore) -> list[int]:
        store.begin(0)
        return store.missing()

    def _chunks(self, candidate: Candidate | None, split: str) -> list[list[Problem]]:
        seeds = self.seeds if candidate is None else self._path(candidate).seeds
        each, problems = max(1, self.context.config.batch // seeds), self.problems[split]
        return [problems[i : i + each] for i in range(0, len(problems), each)]

    def _path(self, candidate: Candidate) -> Course:
        return course(candidate.method, candidate.plan, self.context.config.steps)

    def _store(self, candidate: Candidate | None, split: str) -> ActivationStore:
        trial = {"records": self.seeds} if candidate is None else {candidate.method: asdict(candidate.plan)}
        settings = self.identity | {"split": split, "problems": len(self.problems[split]), "trial": trial}
        settings["first"] = self.problems[split][0].name
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
        kind = "records" if candidate is None else candidate.method
        return ActivationStore(self.folder / f"{kind}-{split}-{name}", settings, len(self._chunks(candidate, split)))

    def _batch(self, candidate: Candidate | None, problems: list[Problem]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if candidate is not None:
            outcome = run(self.context, candidate.method, candidate.plan, problems, self.seed)
            right = self._solved(outcome.answers, problems)
            return {"answers": outcome.answers, "right": right}, {}
        outcome = run(self.context, "vote", Plan(self.seeds), problems, self.seed, read=self.reads)
        tensors = {"answers": outcome.finished.answers, "scores": outcome.finished.scores}
        tensors["right"] = torch.stack([self._solved(column, problems) for column in outcome.finished.answers.T], 1)
        if self.reads:
            tensors["odds"] = torch.stack([outcome.proba[step] for step in self.reads], dim=2)
        return tensors, {}

    def _solved(self, answers: Tensor, problems: Sequence[Problem]) -> Tensor:
        solutions = [self.context.task.solutions(p) for p in problems]
        return torch.tensor([int(a) in s for a, s in zip(answers, solutions, strict=True)])
