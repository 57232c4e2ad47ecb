"""Labels of patches: which patches of the picture the reference solution changes, and which it could change."""

from __future__ import annotations

import numpy as np
from einops import reduce
from jaxtyping import Bool

from cosprobe.errors import InputError
from cosprobe.tasks.disk import Entry
from cosprobe.tasks.task import Problem, Task


def has_path(task: Task, problem: Problem) -> bool:
    """Whether a problem has a single right answer and a reference that shows it to the pixel, see `on_path`.

    Videos from disk do not: compression changes pixels everywhere.
    """
    return len(task.solutions(problem)) == 1 and not isinstance(problem.layout, Entry)


def on_path(task: Task, problem: Problem, rows: int, columns: int) -> Bool[np.ndarray, "row column"]:
    """True for the patches in which the reference video changes a pixel of the first frame at any time.

    For a maze these are the patches on the path from start to exit. rows, columns: number of patches.
    Raises InputError for a problem without a reference video or from disk, and for images that cannot be divided into
    such patches.
    """
    if isinstance(problem.layout, Entry):
        raise InputError(f"{problem.name}: its reference video is lossy, expected a task that draws its problems")
    video = task.video(problem)
    return patches((video != video[0]).any(axis=(0, -1)), rows, columns)


def in_workspace(task: Task, problem: Problem, rows: int, columns: int) -> Bool[np.ndarray, "row column"]:
    """True for the patches with a pixel that a solution may change. Arguments and errors: see `on_path`."""
    return patches(task.workspace(problem), rows, columns)


def patches(mask: Bool[np.ndarray, "height width"], rows: int, columns: int) -> Bool[np.ndarray, "row column"]:
    """True for the patches that hold a true pixel. Errors: see `on_path`."""
    if mask.shape[0] % rows or mask.shape[1] % columns:
        raise InputError(
            f"images of {mask.shape[0]} x {mask.shape[1]} pixels: expected multiples of {rows} x {columns}"
        )
    return reduce(mask, "(r h) (c w) -> r c", "any", r=rows, c=columns)
