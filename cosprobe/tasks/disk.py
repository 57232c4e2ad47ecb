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
from PIL import Image, ImageOps

from cosprobe.cells import SPLIT_ORDER
from cosprobe.errors import InputError
from cosprobe.tasks.task import Box, ParsedAnswer, Problem, Target, check_video

FITS = ("pad", "crop", "stretch")
MOST_PIXELS = 89_000_000  # an image of more is not decoded; Pillow warns a little above
LEAST = 2  # problems of a split
BEHIND = (255, 255, 255, 255)  # the transparent parts of an image


class Broken(InputError):
    """A problem that cannot be used. It ends the command or is skipped, as `task.on_error` says."""


@dataclass(frozen=True)
class Entry:
    """A problem as it lies on disk.

    name: unique. where: path for messages. image: file of the first frame, None for problems in words. prompt: its
    text. fields: everything else that is known, by dotted path.
    """

    name: str
    where: str
    image: Path | None
    prompt: str
    fields: Mapping[str, Any]


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
        """Number of boxes of every problem."""
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
        """Raises InputError: reference videos are not read."""
        raise InputError(f"task {self.name!r}: reference videos are not read; expected a task that draws its problems")

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


# images


def opened(path: Path, where: str) -> Image.Image:
    """The RGB image of a file, decoded. Raises Broken for a file that is missing, unreadable or too large."""
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                size = f"{picture.width} x {picture.height}"
                raise Broken(f"{where}: {size} pixels, expected at most {MOST_PIXELS:,}; make it smaller")
            if picture.mode.startswith(("I", "F")):
                raise Broken(f"{where}: mode {picture.mode}, expected 8 bits a channel; save it as an RGB image")
            if "A" in picture.getbands() or "transparency" in picture.info:
                layer = picture.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", layer.size, BEHIND), layer).convert("RGB")
            return picture.convert("RGB")
    except Broken:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise Broken(f"{where}: cannot be read as an image ({reason}); save it again") from error


def fitted(picture: Image.Image, size: tuple[int, int], fit: str) -> Image.Image:
    """The image at `size` (width, height). fit: see FITS."""
    if fit == "crop":
        return ImageOps.fit(picture, size)
    if fit == "pad":
        return ImageOps.pad(picture, size, color=tuple(picture.crop((0, 0, 1, 1)).tobytes()))
    return picture.resize(size)


def box_of(box: Box, shape: tuple[int, int], size: tuple[int, int], fit: str) -> Box:
    """A box of an image as a box of the fitted image, both as fractions. shape, size: (width, height) before and
    after."""
    if fit == "stretch":
        return box
    scale = (max if fit == "crop" else min)(size[0] / shape[0], size[1] / shape[1])
    ends = []
    for i, value in enumerate(box):
        side = i % 2
        whole = shape[side] * scale / size[side]  # length of the whole image in the frame
        ends.append(min(max(0.5 + (value - 0.5) * whole, 0.0), 1.0))
    x0, y0, x1, y1 = ends
    return x0, y0, x1, y1
