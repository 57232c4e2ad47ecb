"""Trajectories for ensembles: runs of many problems with several noise seeds each, kept on disk.

Every problem is sampled once with every seed, and probes are read at the first steps. A strategy that only chooses
among runs is replayed on these whole runs, with the same result as when it is run. A strategy that changes its runs
(averages, other numbers of steps) is run separately. Finished batches are kept, and a second call continues with the
missing ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from cosprobe.activations import ActivationStore, FrozenSampling, Sampled, Shard, predict_shards
from cosprobe.ensembles.run import RunContext, run
from cosprobe.ensembles.strategies import STRATEGIES, Finished, Hyperparameters, Strategy, build_strategy, replay
from cosprobe.runtime import rank_and_world
from cosprobe.tasks import Problem, Task

READS = 6  # probes are read at the first 6 steps


@dataclass(frozen=True)
class Candidate:
    """A strategy with its hyperparameters."""

    name: str
    params: Hyperparameters

    @property
    def free(self) -> bool:
        """Whether it can be replayed on whole runs, so that it needs no runs of its own."""
        strategy = STRATEGIES[self.name](self.params, 10**6)
        return strategy.edit is None and not strategy.length

    def __str__(self) -> str:
        """Name, number of seeds K, step indices s and layers L, such as `hidden K=3 s0 L4-5`."""
        if self.name == "single":
            return f"single, {self.params.length} steps"
        parts = [self.name, f"K={self.params.seeds}"]
        if self.params.steps is not None:
            parts.append("s" + ",".join(map(str, self.params.steps)))
        if self.params.layers:
            parts.append(f"L{self.params.layers[0]}-{self.params.layers[-1]}")
        return " ".join([*parts, *(["all"] if self.params.back == "all" else [])])


@dataclass(frozen=True, eq=False)
class CandidateResult:
    """Per problem: share of right answers, and number of runs that were begun."""

    right: np.ndarray
    begun: np.ndarray


@dataclass(frozen=True)
class ProblemBatch:
    """A batch of problems for one candidate; None: whole runs of every problem with every seed."""

    candidate: Candidate | None
    problems: list[Problem]

    def __len__(self) -> int:
        return len(self.problems)


class SeedEnsemble(FrozenSampling):
    """Gets answers from several noise seeds for a batch of problems, for `Trainer.predict`.

    seeds: number of noise seeds of whole runs. reads: step indices at which probes are read in whole runs. seed: noise
    seeds are derived from it.
    """

    def __init__(self, context: RunContext, seeds: int, reads: tuple[int, ...], seed: int):
        super().__init__(context.sampler)
        self.context, self.seeds, self.reads, self.seed = context, seeds, reads, seed

    def predict_step(self, batch: Shard, index: int) -> Sampled:
        """answers and right [problem] of a candidate; of whole runs [problem, seed], with scores and probabilities."""
        candidate, problems, task = batch.content.candidate, batch.content.problems, self.sampler.task
        if candidate is not None:
            outcome = run(self.context, candidate.name, candidate.params, problems, self.seed)
            return {"answers": outcome.answers, "right": solved(task, outcome.answers, problems)}, {}
        outcome = run(self.context, "vote", Hyperparameters(self.seeds), problems, self.seed, read=self.reads)
        finished = outcome.finished
        tensors = {"answers": finished.answers, "scores": finished.scores}
        tensors["right"] = torch.stack([solved(task, column, problems) for column in finished.answers.T], dim=1)
        if self.reads:
            tensors["proba"] = torch.stack([outcome.proba[step] for step in self.reads], dim=2)
        return tensors, {}


class Trajectories:
    """Runs of problems, kept in a folder. Missing runs are sampled on access.

    problems: by split. seeds: number of noise seeds of each problem. seed: noise seeds are derived from it. identity:
    everything else that results depend on (model, bank, task).
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
        self.reads = tuple(range(min(READS, context.sampler.config.steps))) if context.scorer is not None else ()
        self.identity = identity | {
            "seed": seed,
            "steps": context.sampler.config.steps,
            "batch": context.sampler.config.batch,
        }

    def whole_runs(self, split: str) -> dict[str, Tensor]:
        """Whole runs of every problem with every seed.

        Holds answers and right [problem, seed], scores [problem, seed, candidate] and, with probes, their probabilities
        proba [problem, seed, step, candidate].
        """
        return self._read([None], split)[0]

    def of(self, found: Sequence[Candidate], split: str) -> dict[Candidate, CandidateResult]:
        """Results of candidates.

        Candidates that can be replayed are replayed once for every seed, with K consecutive seeds from this one on (the
        first seed follows the last), and the results are averaged. Other candidates are run with the first K seeds.
        """
        to_run = [c for c in found if not c.free]
        pool, *ran = self._read([None, *to_run], split)
        given = {
            c: CandidateResult(one["right"].numpy().astype(float), np.full(len(one["right"]), float(c.params.seeds)))
            for c, one in zip(to_run, ran, strict=True)
        }
        return {c: given[c] if c in given else self._replayed(c, pool, split) for c in found}

    def _replayed(self, candidate: Candidate, pool: dict[str, Tensor], split: str) -> CandidateResult:
        count, right, begun = candidate.params.seeds, [], []
        strategy = self._strategy(candidate)
        for start in range(self.seeds):
            part = [(start + i) % self.seeds for i in range(count)]
            proba = {step: pool["proba"][:, part, i] for i, step in enumerate(self.reads)}
            found = replay(strategy, Finished(pool["answers"][:, part], pool["scores"][:, part]), proba)
            right.append(solved(self.context.sampler.task, found.answers, self.problems[split]).float())
            begun.append(found.begun.float())
        return CandidateResult(*(torch.stack(each).mean(dim=0).numpy().astype(float) for each in (right, begun)))

    def _read(self, found: Sequence[Candidate | None], split: str) -> list[dict[str, Tensor]]:
        """Samples the missing problems of several candidates (None: whole runs) and reads all results."""
        stores = [self._store(c, split) for c in found]
        if rank_and_world()[0] == 0:
            for store in stores:
                store.begin(0)
        names = [problem.name for problem in self.problems[split]]
        shards = [
            Shard(store, {"": [problem.name for problem in problems]}, ProblemBatch(candidate, problems))
            for candidate, store in zip(found, stores, strict=True)
            for problems in self._chunks(candidate, split, store.missing(names))
        ]
        module = SeedEnsemble(self.context, self.seeds, self.reads, self.seed)
        predict_shards(module, shards, [(store, names) for store in stores], self.context.sampler.trainer)
        return [store.read(names=names)[0] for store in stores]

    def _chunks(self, candidate: Candidate | None, split: str, names: Collection[str]) -> list[list[Problem]]:
        """The problems of these names, in batches."""
        seeds = self.seeds if candidate is None else self._strategy(candidate).seeds
        each = max(1, self.context.sampler.config.batch // seeds)
        wanted = set(names)
        problems = [problem for problem in self.problems[split] if problem.name in wanted]
        return [problems[i : i + each] for i in range(0, len(problems), each)]

    def _strategy(self, candidate: Candidate) -> Strategy:
        return build_strategy(candidate.name, candidate.params, self.context.sampler.config.steps)

    def _store(self, candidate: Candidate | None, split: str) -> ActivationStore:
        identity = {"runs": self.seeds} if candidate is None else {candidate.name: asdict(candidate.params)}
        settings = self.identity | {"split": split, "strategy": identity}
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
        kind = "runs" if candidate is None else candidate.name
        return ActivationStore(self.folder / f"{kind}-{split}-{name}", settings)


def solved(task: Task, answers: Tensor, problems: Sequence[Problem]) -> Bool[Tensor, " problem"]:
    """Whether each answer (-1: none) is right."""
    return torch.tensor([int(a) in task.solutions(p) for a, p in zip(answers, problems, strict=True)])
