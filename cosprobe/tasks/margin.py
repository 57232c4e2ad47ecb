"""A task whose images stand in the middle of a larger frame, for models that were made for another size of video."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import numpy as np
from jaxtyping import Bool, Float, UInt8

from cosprobe.errors import InputError
from cosprobe.tasks.regions import Box, Mask, Region
from cosprobe.tasks.task import ParsedAnswer, Problem, Target, Task

SMALL = 0.5  # an image that fills less of the height of a video is probably drawn at the wrong size


@dataclass(frozen=True)
class FramedProblem(Problem):
    """A problem whose `regions` are those of the larger frame. inside: the same problem without a margin."""

    inside: Problem = field(repr=False, compare=False)


@dataclass(frozen=True)
class WithMargin:
    """`task` with a margin around its images, of the colour of their upper left corner.

    height, width: of the frame in pixels. Regions are those of the image. Parsers read the part of a video in which the
    image is.
    """

    task: Task
    height: int
    width: int

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def kinds(self) -> tuple[str, ...]:
        return self.task.kinds

    @property
    def targets(self) -> tuple[Target, ...]:
        return self.task.targets

    @property
    def candidates(self) -> int:
        return self.task.candidates

    @property
    def regions(self) -> int:
        return self.task.regions

    @property
    def frames(self) -> int:
        return self.task.frames

    def problems(self, split: str, count: int, kind: str | None = None) -> list[Problem]:
        """The problems of the task, with regions of the frame."""
        return [self._framed(problem) for problem in self.task.problems(split, count, kind)]

    def image(self, problem: Problem) -> UInt8[np.ndarray, "height width 3"]:
        """The first frame with its margin."""
        image = self.task.image(_inside(problem))
        self._check(image.shape)
        return self._around(image, image[0, 0])

    def video(self, problem: Problem) -> UInt8[np.ndarray, "frame height width 3"]:
        """The reference video with its margin."""
        video = self.task.video(_inside(problem))
        return np.stack([self._around(frame, video[0, 0, 0]) for frame in video])

    def workspace(self, problem: Problem) -> Bool[np.ndarray, "height width"]:
        """The mask of the task: nothing in the margin may change."""
        return self._around(self.task.workspace(_inside(problem)), np.zeros((), dtype=bool))

    def solutions(self, problem: Problem) -> tuple[int, ...]:
        """The right answers."""
        return self.task.solutions(_inside(problem))

    def plausible_answers(self, problem: Problem) -> tuple[int, ...]:
        """See `Task`."""
        return self.task.plausible_answers(_inside(problem))

    def parse(self, problem: Problem, video: Float[np.ndarray, "frame height width 3"]) -> ParsedAnswer:
        """Reads the answer from the part of the video without the margin."""
        inside = _inside(problem)
        rows, columns = self._place(self.task.image(inside).shape)
        return self.task.parse(inside, video[:, rows, columns])

    @property
    def share(self) -> float:
        """The part of the height of the frame that the image fills."""
        return self.task.image(self.task.problems("train", 1)[0]).shape[0] / self.height

    def _framed(self, problem: Problem) -> FramedProblem:
        shape = self.task.image(problem).shape
        self._check(shape)
        rows, columns = self._place(shape)
        scale_y, scale_x = shape[0] / self.height, shape[1] / self.width
        y, x = rows.start / self.height, columns.start / self.width

        def moved(box: Box) -> Box:
            return x + box[0] * scale_x, y + box[1] * scale_y, x + box[2] * scale_x, y + box[3] * scale_y

        regions: tuple[Region, ...] = tuple(
            replace(one, place=moved(one.place)) if isinstance(one, Mask) else moved(one) for one in problem.regions
        )
        values = {entry.name: getattr(problem, entry.name) for entry in fields(Problem)} | {"regions": regions}
        return FramedProblem(**values, inside=problem)

    def _check(self, shape: tuple[int, ...]) -> None:
        if shape[0] > self.height or shape[1] > self.width:
            raise InputError(
                f"pipeline.height={self.height}, pipeline.width={self.width}: the images have {shape[0]} x {shape[1]} "
                "pixels; expected a video at least as large, or lower task.image_size"
            )

    def _place(self, shape: tuple[int, ...]) -> tuple[slice, slice]:
        """Where the image is in the frame."""
        top, left = (self.height - shape[0]) // 2, (self.width - shape[1]) // 2
        return slice(top, top + shape[0]), slice(left, left + shape[1])

    def _around(self, image: np.ndarray, margin: np.ndarray) -> np.ndarray:
        frame = np.empty((self.height, self.width, *image.shape[2:]), dtype=image.dtype)
        frame[:] = margin
        frame[self._place(image.shape)] = image
        return frame


def with_margin(task: Task, height: int, width: int) -> Task:
    """`task`, with a margin around its images if `height` or `width` (in pixels) is not 0. 0: that of the image."""
    if not height and not width:
        return task
    side = task.image(task.problems("train", 1)[0]).shape
    return WithMargin(task, height or side[0], width or side[1])


def _inside(problem: Problem) -> Problem:
    return problem.inside if isinstance(problem, FramedProblem) else problem
