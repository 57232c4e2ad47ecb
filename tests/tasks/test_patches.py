"""Labels of patches, against the layout that pictures are drawn from."""

from __future__ import annotations

import numpy as np
import pytest

from cosprobe.errors import InputError
from cosprobe.tasks import Maze, in_workspace, on_path, with_margin
from cosprobe.tasks.maze import BOARD
from cosprobe.tasks.patches import patches


@pytest.mark.parametrize("size", [64, 128])
def test_the_path_of_a_maze_is_the_rooms_of_its_solution(size):
    task = Maze(image_size=size)
    for problem in task.problems("test", 20, "one_exit"):
        layout = problem.layout
        expected, offset = np.zeros((BOARD, BOARD), dtype=bool), (BOARD - layout.rooms) // 2
        for room in layout.solutions[layout.exit]:
            expected[offset + room // layout.rooms, offset + room % layout.rooms] = True
        found = on_path(task, problem, BOARD, BOARD)
        np.testing.assert_array_equal(found, expected)
        workspace = in_workspace(task, problem, BOARD, BOARD)
        assert (workspace | ~found).all()


def test_margins_move_the_path():
    framed = with_margin(Maze(), 128, 64)
    problem = framed.problems("test", 1, "one_exit")[0]
    found = on_path(framed, problem, 16, 8)
    np.testing.assert_array_equal(found[4:12], on_path(Maze(), Maze().problems("test", 1, "one_exit")[0], 8, 8))
    assert not found[:4].any() and not found[12:].any()


def test_one_pixel_marks_its_patch_alone():
    mask = np.zeros((6, 8), dtype=bool)
    mask[2, 5] = True
    assert np.argwhere(patches(mask, 3, 4)).tolist() == [[1, 2]]
    with pytest.raises(InputError, match=r"6 x 8 pixels.*4 x 4"):
        patches(mask, 4, 4)
