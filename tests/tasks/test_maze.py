"""The maze task: labels, pictures, parsing, and that nothing gives the answer away."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from cosprobe.tasks import Maze, MazeConfig, Problem
from cosprobe.tasks.lattice import Layout, canonical_key
from cosprobe.tasks.maze import BOARD, PALETTE, TRAIL, trail_cells

TASK = Maze()
MIXED = Maze(rooms=(4, 5, 6, 8))


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return TASK.problems("train", 300)


@pytest.fixture(scope="module")
def many() -> list[Problem]:
    """One-exit problems: even ones to learn from, odd ones to test on."""
    return TASK.problems("train", 800, "one_exit")


def played(task: Maze, problem: Problem) -> np.ndarray:
    return task.video(problem) / np.float32(255)


def reference_answer(problem: Problem) -> int:
    return problem.layout.corners.index(problem.layout.exit)


def turned(layout: Layout, flip_rows: bool, flip_columns: bool, transpose: bool) -> Layout:
    """The same maze, seen after one of the 8 symmetries of the square."""

    def move(room: int) -> int:
        row, column = divmod(room, layout.rooms)
        row = layout.rooms - 1 - row if flip_rows else row
        column = layout.rooms - 1 - column if flip_columns else column
        row, column = (column, row) if transpose else (row, column)
        return row * layout.rooms + column

    passages = frozenset((min(move(a), move(b)), max(move(a), move(b))) for a, b in layout.passages)
    solutions = {move(end): tuple(move(room) for room in walk) for end, walk in layout.solutions.items()}
    return Layout(layout.rooms, move(layout.start), passages, solutions, move(layout.exit))


def reached(layout: Layout) -> set[int]:
    """Rooms that can be walked to, by repeated passes over the doors: an oracle of the labels."""
    rooms = {layout.start}
    for _ in range(layout.rooms**2):
        rooms |= {b for pair in layout.passages for a, b in (pair, pair[::-1]) if a in rooms}
    return rooms


def accuracy(features: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Test accuracy of a linear probe on odd rows, and three standard errors of chance among four."""
    probe = LogisticRegression(max_iter=500).fit(features[::2], labels[::2])
    return probe.score(features[1::2], labels[1::2]), 3 * np.sqrt(0.25 * 0.75 / len(labels[1::2]))


# labels


def test_labels_agree_with_the_maze(problems):
    for problem in problems:
        layout = problem.layout
        open_exits = [k for k, corner in enumerate(layout.corners) if corner in reached(layout)]
        assert [k for k, corner in enumerate(layout.corners) if corner in layout.solutions] == open_exits
        assert problem.difficulty["reachable"] == len(open_exits)
        if problem.kind == "one_exit":
            assert [problem.answer] == [problem.labels["answer"]] == open_exits
        else:
            assert problem.answer is None
            assert "answer" not in problem.labels
            assert len(open_exits) in (2, 3)
        walk = layout.solutions[layout.exit]
        assert all((min(a, b), max(a, b)) in layout.passages for a, b in zip(walk, walk[1:], strict=False))
        assert problem.difficulty["length"] == len(walk) - 1
        row, column = divmod(layout.start, layout.rooms)
        assert problem.labels["start"] == row * max(TASK.rooms) + column
        doors = [sum(corner in edge for edge in layout.passages) for corner in layout.corners]
        assert problem.labels["corridors"] == tuple(int(d > 1) for d in doors)


# identity


def test_key_is_the_same_under_the_symmetries_of_the_square(problems):
    for problem in problems[:60]:
        views = [turned(problem.layout, *flips) for flips in product((False, True), repeat=3)]
        assert {canonical_key(view) for view in views} == {problem.key}


def test_key_tells_different_mazes_apart(problems):
    assert len({p.key for p in problems if p.kind == "one_exit"}) == 150
    layout = problems[0].layout
    elsewhere = next(room for room in range(layout.rooms**2) if room not in (layout.start, *layout.corners))
    assert canonical_key(replace(layout, start=elsewhere)) != problems[0].key
    fewer = frozenset(sorted(layout.passages)[1:])
    assert canonical_key(replace(layout, passages=fewer)) != problems[0].key


@pytest.mark.slow
def test_difficulty_is_kept_to():
    for problem in Maze(rooms=(5, 5, 6), length=(6, 8)).problems("validation", 30):
        assert problem.difficulty["rooms"] in (5, 6)
        assert 6 <= problem.difficulty["length"] <= 8


# pictures


@pytest.mark.parametrize("task", [TASK, MIXED, Maze(frames=5)], ids=["default", "up to 8 rooms", "5 frames"])
def test_reference_video_starts_at_the_image_and_only_grows_a_trail(task):
    for problem in task.problems("test", 12):
        video, image = task.video(problem), task.image(problem)
        trail = (video == PALETTE[TRAIL]).all(-1)
        assert video.shape == (task.frames, task.image_size, task.image_size, 3)
        assert np.array_equal(video[0], image)
        assert not (trail[:-1] & ~trail[1:]).any()
        assert (np.diff(trail.sum((1, 2))) >= 0).all()
        changed = (video != image).any(-1)
        assert np.array_equal(changed, trail)
        assert not (changed.any(0) & ~task.workspace(problem)).any()


def test_workspace_does_not_tell_which_exit_the_reference_takes(problems):
    for problem in (p for p in problems[:40] if p.kind == "choice"):
        for end in problem.layout.solutions:
            other = replace(problem, layout=replace(problem.layout, exit=end))
            assert np.array_equal(TASK.workspace(other), TASK.workspace(problem))
            assert np.array_equal(TASK.image(other), TASK.image(problem))


@pytest.mark.slow
def test_any_resolution_shows_the_same_problem():
    large = Maze(image_size=480)
    for small_one, large_one in zip(TASK.problems("test", 6), large.problems("test", 6), strict=True):
        assert small_one == large_one
        assert small_one.layout == large_one.layout
        for task, problem in ((TASK, small_one), (large, large_one)):
            assert task.parse(problem, played(task, problem)).answer == reference_answer(problem)
    double = Maze(image_size=128)
    problem = TASK.problems("test", 1)[0]
    assert np.array_equal(double.image(problem), TASK.image(problem).repeat(2, axis=0).repeat(2, axis=1))


def test_every_room_lies_in_a_tile_of_its_own():
    """A region is one tile of the board, so at 64 px it is one token of a model with 8 x 8 tokens."""
    for problem in MIXED.problems("test", 16):
        colours = MIXED.image(problem)
        for corner, (x0, y0, x1, y1) in zip(problem.layout.corners, problem.regions, strict=True):
            assert (x1 - x0, y1 - y0) == (1 / BOARD, 1 / BOARD)
            inside = colours[int(y0 * 64) : int(y1 * 64), int(x0 * 64) : int(x1 * 64)]
            assert (inside == np.array([52, 102, 214])).all(-1).sum() == 16, corner


# parsing


def test_a_blurred_video_keeps_the_order_of_the_scores(problems):
    for problem in problems[:40]:
        faint = 0.15 * played(TASK, problem) + 0.85 * 0.5
        read = TASK.parse(problem, faint)
        assert read.answer is None
        assert read.forced == reference_answer(problem)


def test_a_trail_with_a_gap_reads_as_none(problems):
    for problem in problems[:40]:
        video = played(TASK, problem)
        cells = trail_cells(problem.layout.solutions[problem.layout.exit])
        gap = TASK._pixels(problem.layout, cells[0])
        video[-1][gap] = TASK.image(problem)[gap] / np.float32(255)
        read = TASK.parse(problem, video)
        assert read.answer is None
        assert read.forced == reference_answer(problem)
        assert 0 <= read.path < 1


def test_a_trail_to_two_exits_reads_as_none(problems):
    for problem in (p for p in problems[:40] if p.kind == "choice"):
        ways = [replace(problem, layout=replace(problem.layout, exit=end)) for end in problem.layout.solutions]
        first, second = (played(TASK, way) for way in ways[:2])
        both = np.where((TASK.video(ways[1]) == PALETTE[TRAIL]).all(-1)[..., None], second, first)
        assert TASK.parse(problem, both).answer is None
        for way in ways:  # either alone is a right solution
            read = TASK.parse(problem, played(TASK, way))
            assert (read.answer, read.path) == (reference_answer(way), 1.0)


def test_a_trail_through_walls_is_read_where_it_ends(problems):
    read_wrong = 0
    for problem in (p for p in problems[:60] if p.kind == "one_exit"):
        layout, n = problem.layout, problem.layout.rooms
        row, column = divmod(layout.start, n)
        if row in (0, n - 1):
            continue  # the straight line would cross another exit
        target = layout.corners[(problem.answer + 1) % 4]
        end_row, end_column = divmod(target, n)
        columns = range(column, end_column, 1 if end_column > column else -1)
        rows = range(row, end_row, 1 if end_row > row else -1)
        walk = [row * n + c for c in columns] + [r * n + end_column for r in rows] + [target]
        frame = TASK.image(problem).copy()
        for cell in trail_cells(tuple(walk)):
            frame[TASK._pixels(layout, cell)] = PALETTE[TRAIL]
        read = TASK.parse(problem, frame[None] / np.float32(255))
        assert read.answer == (problem.answer + 1) % 4
        assert read.path < 1
        read_wrong += 1
    assert read_wrong >= 10


# nothing but the walk gives the answer away


def test_regions_depend_on_the_size_of_the_maze_alone(problems):
    for size in (4, 5):
        assert len({p.regions for p in problems if p.layout.rooms == size}) == 1


def test_doors_of_the_exits_tell_nothing(many):
    """Branches are cut before the exit's own doorstep: every exit keeps its doors, reachable or not."""
    features = []
    for problem in many:
        layout, n = problem.layout, problem.layout.rooms
        doors = [[tuple(sorted((c, c + d))) in layout.passages for d in (-n, -1, 1, n)] for c in layout.corners]
        assert all(any(around) for around in doors)
        features.append(np.ravel(doors))
    score, margin = accuracy(np.array(features, dtype=float), np.array([p.answer for p in many]))
    assert abs(score - 0.25) < margin


def test_rooms_beside_the_exits_hint_but_do_not_tell(many):
    """A branch may be cut right behind the doorstep, and on small mazes it often has nowhere else to be: the room
    before an exit is then a dead end. That hint is worth 0.42 with chance at 0.25; it must not grow
    towards the answer itself."""
    ends = np.zeros((len(many), 4, 3))
    for row, problem in zip(ends, many, strict=True):
        passages = problem.layout.passages
        for exit_row, corner in zip(row, problem.layout.corners, strict=True):
            beside = [sum(edge) - corner for edge in passages if corner in edge]
            doors = [sum(room in edge for edge in passages) for room in beside]
            exit_row[:] = len(beside), doors.count(1), max(doors) == 1
    hit = (np.array([p.answer for p in many])[:, None] == np.arange(4)).ravel()
    half = hit.size // 2
    scorer = LogisticRegression(max_iter=500).fit(ends.reshape(-1, 3)[:half], hit[:half])
    picked = scorer.decision_function(ends.reshape(-1, 3)).reshape(-1, 4).argmax(1)
    score = (picked == [p.answer for p in many])[len(many) // 2 :].mean()
    assert 0.25 < score < 0.52
    reachable = ends.reshape(-1, 3)[hit, 2]
    assert not reachable.any()  # a way that leads on has a second door


def test_the_place_of_the_start_tells_nothing(many):
    """Size of the maze and place of the start are drawn before the answer is: no probe on them beats chance."""
    features = np.array([np.eye(2 * 25)[25 * (p.layout.rooms - 4) + p.labels["start"]] for p in many])
    score, margin = accuracy(features, np.array([p.answer for p in many]))
    assert abs(score - 0.25) < margin


# bad requests


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 70}, r"task\.image_size=70.*\b16\b.*\b64\b"),
        ({"image_size": 48}, r"task\.image_size=48.*\b16\b.*\b64\b"),
        ({"rooms": [2]}, r"task\.rooms=\[2\].*\b4 to 8\b"),
        ({"rooms": [4, 9]}, r"task\.rooms=\[4, 9\].*\b4 to 8\b"),
        ({"rooms": []}, r"task\.rooms=\[\].*\b4 to 8\b"),
        ({"length": [5, 4]}, r"task\.length=\[5, 4\].*shortest.*longest.*\b1\b"),
        ({"length": [0, 4]}, r"task\.length=\[0, 4\].*shortest.*longest.*\b1\b"),
        ({"length": [4]}, r"task\.length=\[4\].*shortest.*longest"),
        ({"frames": 1}, r"task\.frames=1.*\b2\b"),
        ({"problems": 0}, r"task\.problems=0.*\b1\b"),
        ({"seeds": 0}, r"task\.seeds=0.*\b1\b"),
        ({"seed": -1}, r"task\.seed=-1.*\b0\b"),
    ],
)
def test_a_world_that_cannot_be_built_is_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        MazeConfig(**settings)


def test_settings_build_the_task_they_describe():
    assert MazeConfig().build() == Maze()
    assert MazeConfig(rooms=[6], length=[2, 9], image_size=128, frames=5, seed=3).build() == Maze(
        image_size=128, frames=5, rooms=(6,), length=(2, 9), seed=3
    )
