"""The task interface: problems with exact labels, their first frames and videos, and a parser that reads answers.

Problems are generated, never downloaded. `problems(split, count)` returns the same problems on every machine.
The split of a problem follows from a hash of its canonical `key`. A problem and its mirror images have the same key, so
they are always in the same split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, UInt8

from cosprobe.bounds import LARGEST_SEED, MANY, check_bounds
from cosprobe.errors import InputError
from cosprobe.tasks.regions import Region
from cosprobe.tasks.splits import SPLITS


class Role(StrEnum):
    """What a target is. It decides which baselines its probes have to beat.

    `answer`: the right answer. `model_answer`: what the finished video shows. `memory`: not visible in the regions it
    is decoded from. `perception`: visible in the first frame. `nuisance`: a possible confound. `control`: random.
    `relabelled`: a random relabelling of a visible attribute, the control for selectivity.
    Raises InputError for another name.
    """

    ANSWER = "answer"
    MODEL_ANSWER = "model_answer"
    MEMORY = "memory"
    PERCEPTION = "perception"
    NUISANCE = "nuisance"
    CONTROL = "control"
    RELABELLED = "relabelled"

    @classmethod
    def _missing_(cls, value: object) -> Role:
        raise InputError(f"role={value!r}: expected one of {', '.join(cls)}")


ANSWER_ROLES = (Role.ANSWER, Role.MODEL_ANSWER)  # roles whose claims need a selectivity control
RELABELLED = Role.RELABELLED  # the role of selectivity controls, and the suffix of their names

BRIGHTEST = 2.0  # a decoder may leave [0, 1] a little


class NoReference(InputError):
    """A problem has no reference video."""


@dataclass(frozen=True)
class Target:
    """A label that probes are trained to decode.

    classes: number of classes.
    form: `candidate`: the label is the index of a region; one function, shared by all regions, gives each a score.
    `region`: one label per region. `problem`: one label per problem, decoded from all regions jointly.
    role: what the target is; a text such as "answer" becomes a `Role`.
    kinds: the kinds of problems that have this label.
    names: of the classes, in order; empty where they are just numbers.
    Raises InputError for an unknown role.
    """

    name: str
    classes: int
    form: str
    role: Role
    kinds: tuple[str, ...]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "role", Role(self.role))
        object.__setattr__(self, "names", tuple(self.names))


@dataclass(frozen=True)
class Problem:
    """One puzzle with exact labels.

    index: number of the draw within task, kind and split. key: a hash, equal for problems that a symmetry of
    the task maps to each other; it decides the split. answer: the right answer, None when several are right.
    labels: one value per target name, a tuple for targets of form `region`. difficulty: named numbers.
    regions: boxes of the image, or masks. layout: the description that the task draws the problem from.
    origin: for problems from disk, the folder or row.
    """

    task: str
    kind: str
    split: str
    index: int
    key: str
    prompt: str
    answer: int | None
    labels: dict[str, int | tuple[int, ...]]
    difficulty: dict[str, int]
    regions: tuple[Region, ...]
    layout: Any = field(repr=False, compare=False)
    origin: str = field(default="", compare=False, kw_only=True)

    @property
    def title(self) -> str:
        """What tables and figures call the problem."""
        return self.origin or f"{self.kind} {self.index}"

    @property
    def name(self) -> str:
        """`task/kind/split/index`, unique for a task with given settings."""
        return f"{self.task}/{self.kind}/{self.split}/{self.index}"


@dataclass(frozen=True)
class ParsedAnswer:
    """What a parser reads from a video.

    answer: index of the candidate, or None when the video shows none or several.
    scores: one score per candidate, defined for every video; higher is more likely.
    path: agreement of everything drawn in the video with a right solution, from 0 to 1.
    """

    answer: int | None
    scores: tuple[float, ...]
    path: float

    @property
    def forced(self) -> int:
        """The candidate with the highest score."""
        return int(np.argmax(self.scores))


@runtime_checkable
class Task(Protocol):
    """The interface of every task.

    name: name of the task. kinds: kinds of problems. targets: the labels that probes decode.
    candidates: number of possible answers. 0: the task has no parser, and so there is no model_answer. Then
    `solutions` is empty, and `workspace`, `plausible_answers` and `parse` raise InputError.
    regions: number of regions of every problem; equal to `candidates` when the answer is a region.
    frames: number of frames of a video.
    """

    @property
    def name(self) -> str: ...

    @property
    def kinds(self) -> tuple[str, ...]: ...

    @property
    def targets(self) -> tuple[Target, ...]: ...

    @property
    def candidates(self) -> int: ...

    @property
    def regions(self) -> int: ...

    @property
    def frames(self) -> int: ...

    def problems(self, split: str, count: int, kind: str | None = None) -> list[Problem]:
        """The first `count` problems of a split: of one kind, or of all kinds in turn."""
        ...

    def image(self, problem: Problem) -> UInt8[np.ndarray, "height width 3"]:
        """The first frame, RGB."""
        ...

    def video(self, problem: Problem) -> UInt8[np.ndarray, "frame height width 3"]:
        """The reference video, which shows a right solution, RGB. Raises NoReference for a problem without one."""
        ...

    def workspace(self, problem: Problem) -> Bool[np.ndarray, "height width"]:
        """Mask of the pixels that a solution may change. It depends on the first frame alone, never on the answer."""
        ...

    def solutions(self, problem: Problem) -> tuple[int, ...]:
        """The right answers, one or several."""
        ...

    def plausible_answers(self, problem: Problem) -> tuple[int, ...]:
        """Answers that someone who sees the first frame, but has not solved the puzzle, would consider possible."""
        ...

    def parse(self, problem: Problem, video: Float[np.ndarray, "frame height width 3"]) -> ParsedAnswer:
        """Reads the answer from a video with values in [0, 1]. Raises InputError as `check_video` does."""
        ...


def reference_of(task: Task, problem: Problem) -> UInt8[np.ndarray, "frame height width 3"] | None:
    """The reference video of a problem; None without one."""
    try:
        return task.video(problem)
    except NoReference:
        return None


def check_video(video: Float[np.ndarray, "frame height width 3"]) -> None:
    """Raises InputError for a video with whole numbers or with values far outside [0, 1], such as 0 to 255."""
    values = np.asarray(video)
    most = float(np.abs(values).max()) if values.size else 0.0
    if values.dtype.kind != "f" or not most <= BRIGHTEST:
        raise InputError(
            f"video: type {values.dtype} with values up to {most:g}, expected floats from 0 to 1; divide by 255"
        )


def check_request(split: str, count: int, kind: str | None, kinds: tuple[str, ...]) -> None:
    """Raises InputError for an unknown split, a count below 1, or a kind that the task does not have."""
    if split not in SPLITS:
        raise InputError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    if count < 1:
        raise InputError(f"task.problems={count}: expected at least 1 problem per split; raise it")
    if kind not in (None, *kinds):
        raise InputError(f"kind={kind!r}: expected one of {', '.join(kinds)}, or None")


@runtime_checkable
class TaskConfig(Protocol):
    """Settings of a task.

    problems: number of problems of a run, over all splits. seeds: number of noise seeds of each problem. seed: random
    seed of the problems.
    """

    problems: int
    seeds: int
    seed: int

    def build(self) -> Task:
        """The task with these settings. Raises InputError for an invalid setting."""
        ...


def check_counts(config: TaskConfig) -> None:
    """Raises InputError when `problems`, `seeds` or `seed` is out of bounds."""
    check_bounds("task.", config, problems=(1, MANY), seeds=(1, 10_000), seed=(0, LARGEST_SEED))


def check_video_size(task: Any, frames: int, chunks: bool = False) -> None:
    """Raises InputError for images that are too small or too large, or for a video with too few or too many frames.

    task: has image_size and frames. frames: the least number of frames. chunks: expect 4k + 1 frames.
    """
    if task.image_size % 16 or not 64 <= task.image_size <= 4096:
        raise InputError(f"task.image_size={task.image_size}: expected a multiple of 16 from 64 to 4096")
    if chunks and task.frames % 4 != 1 or not frames <= task.frames <= 10_000:
        expected = "4k + 1 frames, from" if chunks else "a number of frames from"
        raise InputError(f"task.frames={task.frames}: expected {expected} {frames} to 10000")


def draw_seed(seed: int, split: str, kind: str) -> int:
    """The seed of the random generator for problems of one split and kind. seed: the seed of the task."""
    return int(hashlib.sha256(f"{seed}/{split}/{kind}".encode()).hexdigest()[:12], 16)


def by_turns(kinds: tuple[str, str], count: int, draw: Callable[[int, str], list[Problem]]) -> list[Problem]:
    """`count` problems of two alternating kinds. draw: a function of a count and a kind that returns problems."""
    halves = [draw((count + 1) // 2, kinds[0]), draw(count // 2, kinds[1]) if count > 1 else []]
    return [halves[i % 2][i // 2] for i in range(count)]


def distinct(candidates: Iterator[Problem | None], split: str, count: int, patience: int = 20_000) -> list[Problem]:
    """The first `count` problems of `split` with different keys. None: a draw without a problem.

    Raises InputError when `patience` draws in a row give no new problem. Then the task has too few distinct problems at
    this difficulty.
    """
    found: dict[str, Problem] = {}
    since = 0
    for problem in candidates:
        since += 1
        if problem is not None and problem.split == split and problem.key not in found:
            found[problem.key] = problem
            since = 0
        if len(found) == count:
            break
        if since > patience:
            raise InputError(
                f"task.problems={count}: found only {len(found)} distinct problems in split {split!r} at this "
                "difficulty; lower task.problems, or allow a wider range of difficulty"
            )
    return list(found.values())


def answers_are_regions(task: Task) -> bool:
    """Whether an answer is the index of a region."""
    return any(target.role is Role.ANSWER and target.form == "candidate" for target in task.targets)


def readable_targets(targets: Sequence[Target], regions: int) -> tuple[Target, ...]:
    """The targets that can be decoded from features with this many regions, in the form in which they are fitted.

    With one region, targets of form `candidate` get the form `problem` (`classes` classes per problem), and targets of
    form `region` are left out.
    """
    if regions > 1:
        return tuple(targets)
    return tuple(replace(t, form="problem") for t in targets if t.form != "region")
