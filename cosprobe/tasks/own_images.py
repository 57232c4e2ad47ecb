"""Images and prompts of your own, as a task without a parser.

The task has no labels: they are added to the samples (`ProbeSamples.with_label`), so that one more label needs no more
sampling. Without a parser there is no model_answer, and what needs one says so.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NoReturn

import numpy as np
from jaxtyping import UInt8

from cosprobe.cells import SPLIT_ORDER
from cosprobe.errors import InputError
from cosprobe.tasks.labels import check_lengths
from cosprobe.tasks.regions import Box
from cosprobe.tasks.samples import SHARES
from cosprobe.tasks.task import NoReference, Problem, Target

WHOLE = ((0.0, 0.0, 1.0, 1.0),)  # the box of the whole image
LEAST = 2  # problems of a split
OWN_IMAGES = "images"  # name of the task and of its only kind


@dataclass(frozen=True, eq=False)
class OwnImages:
    """Images and prompts as problems of the splits train, validation and test.

    images: first frames. prompts: one for each image. frames: of a video. boxes: regions, the same in every image, in
    fractions of it. groups: images of a group are never in two splits; default: equal images with equal prompts.
    folds: of cross-fitting, which does without the splits; 0: none.
    The split of a group depends on its name alone, so that more images change no split. The name of a problem depends
    on its image, prompt, boxes and split alone.
    Raises InputError for other numbers of prompts or groups than of images, boxes outside the image, and a split of
    fewer than 2 problems; with folds, for fewer problems than folds.
    """

    images: UInt8[np.ndarray, "image height width 3"]
    prompts: Sequence[str]
    frames: int
    boxes: Sequence[Box] = WHOLE
    groups: Sequence[str | int] | None = None
    folds: int = 0
    name: str = field(default=OWN_IMAGES, init=False)
    kinds: tuple[str, ...] = field(default=(OWN_IMAGES,), init=False)
    targets: tuple[Target, ...] = field(default=(), init=False)
    candidates: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        count = len(self.images)
        check_lengths(count, prompts=self.prompts, **({} if self.groups is None else {"groups": self.groups}))
        if not len(self.boxes):
            raise InputError("boxes: none; expected at least one, or leave boxes out for the whole image")
        for box in self.boxes:
            if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
                raise InputError(f"boxes: {tuple(box)}, expected x0, y0, x1, y1 in fractions of the image, 0 to 1")
        if self.folds:
            if (problems := len({p.key for p in self.all})) < self.folds:
                raise InputError(f"folds={self.folds}: {problems} images or groups differ, expected as many as folds")
            return
        for split, number in Counter(dict.fromkeys(SPLIT_ORDER, 0) | Counter(p.split for p in self.all)).items():
            if number < LEAST:
                raise InputError(
                    f"images: {number} of {count} are in the split {split}, expected at least {LEAST}; add images, "
                    "make the groups smaller, or set folds=5 (cross-fitting)"
                )

    @property
    def regions(self) -> int:
        """Number of boxes."""
        return len(self.boxes)

    @cached_property
    def all(self) -> tuple[Problem, ...]:
        """The problem of every image, in the order of the images."""
        found, copies = [], Counter[str]()
        boxes: tuple[Box, ...] = tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in self.boxes)
        for i, (image, prompt) in enumerate(zip(self.images, self.prompts, strict=True)):
            content = hashlib.sha256(f"{image.shape}{prompt}".encode() + image.tobytes()).hexdigest()
            key = content if self.groups is None else hashlib.sha256(str(self.groups[i]).encode()).hexdigest()
            named = hashlib.sha256(f"{content}{boxes}{copies[content]}".encode()).hexdigest()
            copies[content] += 1
            number, split = int(named[:12], 16), share_of(key)
            found.append(Problem(OWN_IMAGES, OWN_IMAGES, split, number, key, prompt, None, {}, {}, boxes, layout=i))
        return tuple(found)

    def problems(self, split: str, count: int, kind: str | None = None) -> list[Problem]:
        """The first `count` problems of a split, or all where there are fewer, in the order of the images."""
        return [problem for problem in self.all if problem.split == split][:count]

    def image(self, problem: Problem) -> UInt8[np.ndarray, "height width 3"]:
        """The image of a problem."""
        return self.images[problem.layout]

    def video(self, problem: Problem) -> UInt8[np.ndarray, "frame height width 3"]:
        """Raises NoReference: no solution of these images is known."""
        raise NoReference(f"task {OWN_IMAGES!r} has no reference videos; expected a task that has, such as maze")

    def _no_parser(self, *_: object) -> NoReturn:
        """Raises InputError: these images have no right answers and no parser."""
        raise InputError(
            f"task {OWN_IMAGES!r} has no parser, so no answer can be read from its videos; expected a task with a "
            "parser, such as maze"
        )

    workspace = plausible_answers = parse = _no_parser

    def solutions(self, problem: Problem) -> tuple[int, ...]:
        """None: no answer is known to be right."""
        return ()


def share_of(key: str) -> str:
    """The split of a group, by a hash of its key: `train`, `validation` or `test`, in the proportions of SHARES."""
    at = int(hashlib.sha256(key.encode()).hexdigest()[:12], 16) / 16**12
    for split, share in SHARES.items():
        if at < share:
            return split
        at -= share
    return "test"
