"""What a task is: problems with exact labels, pictures of them, and a rule that reads answers from video.

A task is generated, never downloaded: `problems(split, count)` gives the same problems on every machine.
Which split a problem belongs to is decided by a hash of its canonical `key`, so no problem (nor any mirror
image of one) can be in two splits, however many are drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, UInt8

from cosprobe.errors import InputError

HEADLINE = ("answer", "choice")  # roles whose claims need a selectivity control
RELABELLED = "relabelled"  # role of a control, and the end of its name

# Share of canonical problems, in percent. `model` is what the video model itself may be trained on.
SPLITS = {"model": 50, "train": 20, "validation": 10, "calibration": 10, "test": 10}

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 as fractions of the image


@dataclass(frozen=True)
class Target:
    """What a probe decodes.

    form: `candidate` - the label is the index of a region, scored by one function shared by all regions;
    `region` - one label per region; `problem` - one label per problem, read from all regions jointly.
    role: `answer`, `choice`, `perception` (visible in the first frame), `memory` (not visible where it is read),
    `nuisance` or `control`. kinds: problem kinds that carry the label.
    """

    name: str
    classes: int
    form: str
    role: str
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Problem:
    """One puzzle with exact labels. `key` is its identity under the task's symmetries; splits are by key."""

    task: str
    kind: str
    split: str
    index: int
    key: str
    prompt: str
    answer: int | None
    labels: dict[str, int | tuple[int, ...]]
    difficulty: dict[str, int]
    regions: tuple[Box, ...]
    layout: Any = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        return f"{self.task}/{self.kind}/{self.split}/{self.index}"


@dataclass(frozen=True)
class Readout:
    """What a rule reads from a video.

    answer: index of the candidate, or None when the video settles on none or on several.
    scores: forced-choice score per candidate, defined for any video however blurry; higher is more likely.
    path: agreement of everything drawn with a right solution, 0 to 1.
    """

    answer: int | None
    scores: tuple[float, ...]
    path: float

    @property
    def forced(self) -> int:
        return int(np.argmax(self.scores))


@runtime_checkable
class Task(Protocol):
    """The contract every family of problems keeps. candidates: answers a readout scores; regions: of every problem,
    as many as candidates where the answer is one of them."""

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
        """The first `count` of a split, of one kind, or of all kinds by turns."""
        ...

    def image(self, problem: Problem) -> UInt8[np.ndarray, "height width 3"]: ...

    def video(self, problem: Problem) -> UInt8[np.ndarray, "frame height width 3"]: ...

    def workspace(self, problem: Problem) -> Bool[np.ndarray, "height width"]:
        """Pixels that a sensible video may change; a function of the first frame, never of the answer."""
        ...

    def solutions(self, problem: Problem) -> tuple[int, ...]:
        """Candidates that count as right: one or several."""
        ...

    def plausible_answers(self, problem: Problem) -> tuple[int, ...]:
        """Candidates that the first frame leaves possible before it is solved."""
        ...

    def readout(self, problem: Problem, video: Float[np.ndarray, "frame height width 3"]) -> Readout: ...


def split_of(key: str) -> str:
    """The split a canonical key belongs to: its hash picks one of 100 buckets."""
    bucket = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 100
    for split, share in SPLITS.items():
        if bucket < share:
            return split
        bucket -= share
    raise AssertionError("SPLITS must add up to 100")


def check_request(split: str, count: int, kind: str | None, kinds: tuple[str, ...]) -> None:
    """Raises ValueError for an unknown split, a request for no problems, or a kind that is not one of the task's."""
    if split not in SPLITS:
        raise InputError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    if count < 1:
        raise InputError(f"task.problems={count}: expected at least 1 problem; ask for more")
    if kind not in (None, *kinds):
        raise InputError(f"kind={kind!r}: expected one of {', '.join(kinds)}, or None")


@runtime_checkable
class TaskConfig(Protocol):
    """Settings of a task. problems: of a run, over all splits. seeds: noise seeds of each problem. seed: what problems
    are drawn from."""

    problems: int
    seeds: int
    seed: int

    def build(self) -> Task:
        """The task. Raises ValueError for a bad setting."""
        ...


def check_counts(config: TaskConfig) -> None:
    """Raises ValueError when a task's settings ask for fewer than one problem or noise seed, or a seed below 0."""
    for name, least in (("problems", 1), ("seeds", 1), ("seed", 0)):
        if getattr(config, name) < least:
            raise InputError(f"task.{name}={getattr(config, name)}: expected at least {least}")


def draw_seed(seed: int, split: str, kind: str) -> int:
    """What random problems of one split and kind start from; `seed` is the world's."""
    return int(hashlib.sha256(f"{seed}/{split}/{kind}".encode()).hexdigest()[:12], 16)


def by_turns(kinds: tuple[str, str], count: int, draw: Callable[[int, str], list[Problem]]) -> list[Problem]:
    """`count` problems, of the two kinds in turn, the first kind first. draw: so many problems of a kind."""
    halves = [draw((count + 1) // 2, kinds[0]), draw(count // 2, kinds[1]) if count > 1 else []]
    return [halves[i % 2][i // 2] for i in range(count)]


def distinct(candidates: Iterator[Problem], split: str, count: int, patience: int = 20_000) -> list[Problem]:
    """The first `count` problems of `split` with different keys.

    Raises ValueError when `patience` draws in a row bring nothing new: the difficulty asked for has too
    few distinct problems.
    """
    found: dict[str, Problem] = {}
    since = 0
    for problem in candidates:
        since += 1
        if problem.split == split and problem.key not in found:
            found[problem.key] = problem
            since = 0
        if len(found) == count:
            break
        if since > patience:
            raise InputError(
                f"task.problems={count}: only {len(found)} distinct problems exist in split {split!r} at this "
                "difficulty; ask for fewer or widen the difficulty of the task"
            )
    return list(found.values())


def readable_targets(targets: Sequence[Target], regions: int) -> tuple[Target, ...]:
    """The targets that features with this many regions can carry, in the form they are then fitted.

    Without a region axis a candidate is one class among `classes` of the whole clip (form `problem`), and
    targets of form `region` do not exist.
    """
    if regions > 1:
        return tuple(targets)
    return tuple(replace(t, form="problem") for t in targets if t.form != "region")
