"""Problems read from disk, as a task: what is common to folders (`folder.py`) and tables (`tables.py`).

A reader turns each problem into an `Entry`, or says why it cannot. What is done with entries is the same
for all readers, see `entries.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from cosprobe.cells import SPLIT_ORDER
from cosprobe.errors import InputError
from cosprobe.tasks.pictures import fitted, frames_in, opened
from cosprobe.tasks.task import NoReference, ParsedAnswer, Problem, Target, check_video

LEAST = 2  # problems of a split


@dataclass(frozen=True)
class Entry:
    """A problem as it lies on disk.

    name: unique. where: path for messages. image: file of the first frame, None for problems in words. prompt: its
    text. fields: everything else that is known, by dotted path. masks: files of its regions. video: file of the
    reference video. final: file of its last frame.
    """

    name: str
    where: str
    image: Path | None
    prompt: str
    fields: Mapping[str, Any]
    masks: tuple[Path, ...] = ()
    video: Path | None = None
    final: Path | None = None


@dataclass(frozen=True)
class Frame:
    """The frames of videos. height, width: in pixels. fit: how images of another shape are fitted, see FITS. frames:
    number of frames."""

    height: int
    width: int
    fit: str
    frames: int


@dataclass(frozen=True, eq=False)
class DiskTask:
    """Problems from disk, with labels and, if a parser is given, answers that are read from videos.

    notices: what was left out or changed, one sentence each. Images are read when they are asked for, so memory does
    not grow with their number.
    """

    name: str
    targets: tuple[Target, ...]
    all: tuple[Problem, ...]
    frame: Frame
    notices: tuple[str, ...]
    parser: Callable[..., Any] | None = None
    kinds: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", (self.name,))

    @property
    def frames(self) -> int:
        """Number of frames of a video."""
        return self.frame.frames

    @property
    def regions(self) -> int:
        """Number of boxes or masks of every problem."""
        return len(self.all[0].regions)

    @property
    def candidates(self) -> int:
        """Number of answers that the parser tells apart; 0 without a parser."""
        return self.targets[0].classes if self.parser is not None else 0

    @cached_property
    def content(self) -> str:
        """A hash of the problems, their labels and splits. Equal for the same files in another place."""
        text = json.dumps([[p.name, p.key, p.labels] for p in self.all])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def check_splits(self) -> None:
        """Raises InputError for a split with fewer than 2 problems. Cross-fitting does without these splits."""
        for split in SPLIT_ORDER:
            if (count := len(self.problems(split, LEAST))) < LEAST:
                raise InputError(
                    f"task {self.name!r}: {count} of {len(self.all)} problems are in the split {split}, expected at "
                    f"least {LEAST}; with few problems, set probe.folds=5 (cross-fitting)"
                )

    def problems(self, split: str, count: int, kind: str | None = None) -> list[Problem]:
        """The first `count` problems of a split, or all where there are fewer."""
        return [problem for problem in self.all if problem.split == split][:count]

    def image(self, problem: Problem) -> UInt8[np.ndarray, "height width 3"]:
        """The first frame at the size of the video. White for a problem without an image."""
        entry: Entry = problem.layout
        size = (self.frame.width, self.frame.height)
        if entry.image is None:
            return np.full((*size[::-1], 3), 255, dtype=np.uint8)
        return np.asarray(fitted(opened(entry.image, entry.where), size, self.frame.fit))

    def solutions(self, problem: Problem) -> tuple[int, ...]:
        """The class of the first label; nothing without a parser."""
        return () if self.parser is None or problem.answer is None else (problem.answer,)

    def plausible_answers(self, problem: Problem) -> tuple[int, ...]:
        """All classes."""
        self._check_parser()
        return tuple(range(self.candidates))

    def workspace(self, problem: Problem) -> Bool[np.ndarray, "height width"]:
        """All pixels: what a solution may change is not known."""
        self._check_parser()
        return np.ones((self.frame.height, self.frame.width), dtype=bool)

    def video(self, problem: Problem) -> UInt8[np.ndarray, "frame height width 3"]:
        """The reference video: as many frames as the task has, fitted as the image is.

        From a file with another number of frames they are chosen evenly, the first and the last one among them; a
        frame of a shorter file is there several times. Where only the last frame is on disk, it is returned alone.
        Raises NoReference where there is neither, and Broken for a file that cannot be read.
        """
        entry: Entry = problem.layout
        if entry.video is not None:
            pictures = (Image.fromarray(frame) for frame in frames_in(entry.video))
        elif entry.final is not None:
            pictures = (opened(file, repr(str(file))) for file in [entry.final])
        else:
            raise NoReference(f"{entry.where}: no reference video or last frame lies beside it")
        size, margin = (self.frame.width, self.frame.height), self.image(problem)[0, 0].tolist()
        shown = np.stack([np.asarray(fitted(picture, size, self.frame.fit, margin)) for picture in pictures])
        if entry.video is None:
            return shown
        return shown[np.linspace(0, len(shown) - 1, self.frames).round().astype(int)]

    def parse(self, problem: Problem, video: Float[np.ndarray, "frame height width 3"]) -> ParsedAnswer:
        """Calls the user's parser: `function(video, fields)` with a video in [0, 1] and the fields of the problem.

        It returns a class, None for no answer, or a score for each class by name.
        Raises InputError for anything else, and for a class that no problem has.
        """
        check_video(video)
        parser, names = self._check_parser(), self.targets[0].names
        entry: Entry = problem.layout
        given = parser(video, dict(entry.fields))
        scores = given if isinstance(given, Mapping) else {} if given is None else {given: 1.0}
        known = {str(name): float(score) for name, score in scores.items()}
        if unknown := sorted(known.keys() - set(names)):
            raise InputError(
                f"task.parser: {parser.__name__} returned {unknown[0]!r}; expected one of {', '.join(names)}, None, or "
                "scores by class"
            )
        values = tuple(known.get(name, 0.0) for name in names)
        best = None if not known else int(np.argmax(values))
        return ParsedAnswer(best, values, 0.0)

    def _check_parser(self) -> Callable[..., Any]:
        if self.parser is None:
            raise InputError(
                f"task {self.name!r} has no parser, so no answer can be read from its videos; set "
                "task.parser=package.module:function"
            )
        return self.parser
