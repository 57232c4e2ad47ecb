"""A film strip of real mazes."""

from __future__ import annotations

from functools import cache

import numpy as np

from cosprobe.reporting.film import Film, FilmRow
from cosprobe.tasks import Maze


@cache
def film(steps: int = 3) -> Film:
    """A right, a wrong and a choice row on real mazes, with clips that grow brighter."""
    task, rows = Maze(), []
    for title, kind in (("right", "one_exit"), ("wrong", "one_exit"), ("several right", "choice")):
        problem = task.problems("test", 1, kind)[0]
        last = problem.answer if title == "right" else ((problem.answer or 0) + 1) % 4
        picks = (*[((problem.answer or 0) + 2) % 4] * (steps - 1), last)
        clips = np.stack([np.full((2, 64, 64, 3), 10 * i, dtype=np.uint8) for i in range(steps)])
        clips[:, 0] += 5  # the first frame of a clip differs from the last
        model_answer = None if title == "several right" else last
        rows.append(FilmRow(title, task.image(problem), clips, picks, problem.regions, problem.answer, model_answer))
    return Film(tuple(rows), tuple(range(0, 4 * steps, 4)))
