"""Samples (a problem with a noise seed) and the choice of the samples of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from cosprobe.bounds import MANY
from cosprobe.cells import SPLIT_ORDER
from cosprobe.errors import InputError
from cosprobe.tasks.task import Problem, Task, TaskConfig

SHARES = {"train": 0.5, "validation": 0.2, "test": 0.3}


@dataclass(frozen=True)
class Sample:
    """A problem and a noise seed. replica: index of the seed among the noise seeds of this problem."""

    problem: Problem
    seed: int
    replica: int = 0

    @property
    def name(self) -> str:
        """Name of the problem and the noise seed, unique for a task with given settings."""
        return f"{self.problem.name}/{self.seed}"


def draw_samples(task: Task, config: TaskConfig, seed: int) -> list[Sample]:
    """The samples of a run: `config.problems` problems in total, each with `config.seeds` noise seeds.

    The splits have SHARES of the problems. The samples of a problem are neighbours in the list. A noise seed depends on
    `seed`, the problem and the replica, never on the position in a batch.
    With `config.problems` 0, all problems of a task that reads them from disk.
    Raises InputError when a split would have fewer than 2 problems.
    """
    problems, seeds = config.problems, config.seeds
    if not problems:  # of a task that reads them: all that there are
        return with_noise([p for split in SPLIT_ORDER for p in task.problems(split, MANY)], seed, seeds)
    counts = {split: round(problems * share) for split, share in SHARES.items()}
    counts["train"] += problems - sum(counts.values())
    if min(counts.values()) < 2 or seeds < 1:
        raise InputError(
            f"task.problems={problems}, task.seeds={seeds}: expected at least 10 problems (otherwise a split is too "
            "small) and at least 1 seed"
        )
    return with_noise([p for split in SPLIT_ORDER for p in task.problems(split, counts[split])], seed, seeds)


def with_noise(problems: Sequence[Problem], seed: int, seeds: int = 1) -> list[Sample]:
    """Each problem with its first `seeds` noise seeds. The samples of a problem are neighbours in the list."""
    return [Sample(problem, noise_seed(problem, which, seed), which) for problem in problems for which in range(seeds)]


def fresh_problems(task: Task, split: str, used: int, count: int, kinds: Sequence[str]) -> list[Problem]:
    """`count` problems of the given kinds, in turn, that are not among the problems of a run.

    split: validation or test. used: number of problems of the run, over all splits; 0: all.
    Raises InputError where a task that reads its problems has too few.
    """
    seen = -(-round(used * SHARES[split]) // len(task.kinds)) if used else MANY  # of each kind, which alternate
    most = seen + -(-count // len(kinds))
    turns = zip(*(task.problems(split, most, kind)[seen:] for kind in task.kinds if kind in kinds), strict=True)
    found = [problem for turn in turns for problem in turn][:count]
    if len(found) < count:
        fewer = "lower use.problems, or " if found else ""
        raise InputError(
            f"task {task.name!r}: has {len(found)} problems of the split {split} that the run has not seen, expected "
            f"{count}; {fewer}train on fewer with task.problems, in another run_dir"
        )
    return found


def noise_seed(problem: Problem, which: int, seed: int) -> int:
    """The noise seed of a sample, a hash of `seed`, the name of the problem and the replica `which`."""
    return int(hashlib.sha256(f"{seed}/{problem.name}/{which}".encode()).hexdigest()[:12], 16)
