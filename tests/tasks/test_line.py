"""Rows to complete: labels, pictures, parsing, and that no crowd of pieces gives the answer away."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from cosprobe.tasks import Problem, Task
from cosprobe.tasks.line import BLUE, GOLD, PALETTE, RED, Line, LineConfig, canonical_key

TASK = Line()
SMALL = Line(size=3, row=3, pieces=(3, 6))
STEPS = ((0, 1), (1, 0), (1, 1), (-1, 1))  # across, down, down-right, up-right


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return TASK.problems("model", 400)


@pytest.fixture(scope="module")
def many() -> list[Problem]:
    return TASK.problems("model", 2500, "one")


def played(task: Line, problem: Problem) -> np.ndarray:
    return task.video(problem) / np.float32(255)


def rows_through(marks: list[int], n: int, k: int, colour: int) -> dict[int, list[tuple[tuple[int, ...], int]]]:
    """Per empty cell, the rows of k that a piece of `colour` there completes, with their direction: cell by cell."""
    found: dict[int, list[tuple[tuple[int, ...], int]]] = {}
    for r, c, (d, (down, right)) in product(range(n), range(n), enumerate(STEPS)):
        if not (0 <= r + (k - 1) * down < n and c + (k - 1) * right < n):
            continue
        row = tuple((r + i * down) * n + c + i * right for i in range(k))
        gaps = [cell for cell in row if marks[cell] != colour]
        if len(gaps) == 1 and marks[gaps[0]] == 0:
            found.setdefault(gaps[0], []).append((row, d))
        assert gaps, "a finished row"
    return found


def turned(marks: bytes, n: int, flip_rows: bool, flip_columns: bool, transpose: bool) -> bytes:
    board = np.frombuffer(marks, dtype=np.uint8).reshape(n, n)
    board = board[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
    return (board.T if transpose else board).tobytes()


def filling(problem: Problem, cell: int) -> Problem:
    """The problem with a reference that fills `cell`, right or wrong; a wrong piece turns gold alone."""
    line = problem.layout.solutions.get(cell, (cell,))
    solutions = problem.layout.solutions | {cell: line}
    return replace(problem, layout=replace(problem.layout, cell=cell, solutions=solutions))


# labels


@pytest.mark.parametrize("task", [TASK, SMALL, Line(size=5, row=4, pieces=(10, 16))], ids=["6x6", "3x3", "5x5"])
def test_labels_agree_with_the_board(task):
    n = task.size
    for problem in task.problems("model", 60):
        marks = list(problem.layout.marks)
        own, other = marks.count(1), marks.count(2)
        wins, threats = rows_through(marks, n, task.row, 1), rows_through(marks, n, task.row, 2)
        assert abs(own - other) <= 1
        assert own + other == problem.difficulty["pieces"]
        assert task.pieces[0] <= own + other <= task.pieces[1]
        assert {cell: [row for row, _ in rows] for cell, rows in wins.items()} == {
            cell: [row] for cell, row in problem.layout.solutions.items()
        }
        assert set(task.solutions(problem)) == set(wins)
        assert len(wins) == problem.difficulty["wins"]
        assert len(threats) <= 1
        assert problem.labels.get("threat") == next(iter(threats), None)
        assert problem.labels["pieces"] == tuple(marks)
        assert task.plausible_answers(problem) == tuple(cell for cell in range(n * n) if marks[cell] == 0)
        assert set(wins) <= set(task.plausible_answers(problem))
        upper, lower = (marks[i * n + i] for i in (n // 2 - 1, n // 2))
        assert problem.labels["centre"] == 3 * upper + lower
        assert problem.layout.cell in wins
        if problem.kind == "one":
            assert [problem.answer] == [problem.labels["answer"]] == list(wins)
            assert problem.labels["lines"] == wins[problem.answer][0][1]
        else:
            assert problem.answer is None
            assert len(wins) in (2, 3)
            assert "answer" not in problem.labels and "lines" not in problem.labels


def test_labels_stay_within_their_classes_and_use_them(problems):
    assert [t.name for t in TASK.targets[:2]] == [t.role for t in TASK.targets[:2]] == ["answer", "model_answer"]
    for target in TASK.targets:
        carried = [p.labels[target.name] for p in problems if target.name in p.labels]
        if target.role != "model_answer":  # the model's own answer is known only after it has drawn
            values = np.array(carried).ravel()
            assert {p.kind for p in problems if target.name in p.labels} == set(target.kinds)
            assert values.min() >= 0 and values.max() < target.classes
            assert len(np.unique(values)) == target.classes or target.form == "candidate"
    assert sum("threat" in p.labels for p in problems) > 0.8 * len(problems)


def test_winning_cells_are_spread_over_the_board(many, problems):
    counts = np.bincount([p.answer for p in many], minlength=36)
    assert np.abs(counts / len(many) - 1 / 36).max() < 4 * np.sqrt(1 / 36 / len(many))
    several = Counter(p.difficulty["wins"] for p in problems if p.kind == "several")
    assert min(several[2], several[3]) > 20
    first = [min(p.layout.solutions) == p.layout.cell for p in problems if p.kind == "several"]
    assert 0.3 < np.mean(first) < 0.6  # any of the two or three


def test_there_are_near_misses_on_most_boards(problems):
    misses = []
    for problem in problems[:100]:
        marks = np.array(list(problem.layout.marks)).reshape(6, 6)
        rows = [[marks[r + i * d, c + i * e] for i in range(4)] for d, e in STEPS for r, c in np.ndindex(6, 6)
                if 0 <= r + 3 * d < 6 and c + 3 * e < 6]  # fmt: skip
        misses.append(sum(row.count(1) == 3 and row.count(2) == 1 for row in rows))
        assert misses[-1] == problem.difficulty["misses"]
    assert np.mean(np.array(misses) > 0) > 0.8


def test_prompts_vary_and_say_how_many_win(problems):
    for task in (TASK, SMALL, Line(row=5), Line(row=6, pieces=(16, 20))):
        prompts = {p.prompt for p in (problems if task is TASK else task.problems("model", 12))}
        for prompt in prompts:
            assert len(prompt.split()) <= 30
            assert prompt == prompt.lower() and prompt.replace(" ", "").isalpha()
            assert {3: "three", 4: "four", 5: "five", 6: "six"}[task.row] in prompt
    assert len({p.prompt for p in problems}) > 30


# identity


def test_key_is_the_same_under_the_symmetries_of_the_square(problems):
    for problem in problems[:60]:
        views = [turned(problem.layout.marks, 6, *flips) for flips in product((False, True), repeat=3)]
        assert {canonical_key(6, 4, view) for view in views} == {problem.key}
        marks = bytearray(problem.layout.marks)
        marks[0] = (marks[0] + 1) % 3
        assert canonical_key(6, 4, bytes(marks)) != problem.key


@pytest.mark.slow
def test_there_are_more_than_twenty_thousand_boards():
    for kind in TASK.kinds:
        drawn = TASK._draw("model", kind)
        keys = {next(drawn).key for _ in range(4_000)}
        print(f"line/{kind}: {len(keys)} distinct boards in 4000 draws")  # noqa: T201
        # n boards, all alike, give 4000 ** 2 / 2 / n pairs of the same: 400 of 20,000, few only if n is in the millions
        assert len(keys) >= 3_996


@pytest.mark.slow
def test_three_in_a_row_has_the_boards_that_can_be_counted():
    """All boards of 3 x 3, by brute force: every one that fits is drawn, and no other."""
    wanted: dict[str, set[str]] = {"one": set(), "several": set()}
    for marks in product(range(3), repeat=9):
        own, other = marks.count(1), marks.count(2)
        if not (abs(own - other) <= 1 and 3 <= own + other <= 6):
            continue
        try:
            wins, threats = rows_through(list(marks), 3, 3, 1), rows_through(list(marks), 3, 3, 2)
        except AssertionError:
            continue
        if all(len(rows) == 1 for rows in wins.values()) and len(threats) <= 1 and 1 <= len(wins) <= 3:
            wanted["one" if len(wins) == 1 else "several"].add(canonical_key(3, 3, bytes(marks)))
    for kind, keys in wanted.items():
        drawn = SMALL._draw("model", kind)
        found = {next(drawn).key for _ in range(5_000)}
        print(f"line 3 x 3/{kind}: {len(keys)} boards, {len(found)} drawn")  # noqa: T201
        assert found <= keys
        assert len(found) > 0.8 * len(keys)  # some are rare


# pictures


@pytest.mark.parametrize("frames", [5, 9, 13, 17])
@pytest.mark.parametrize("task", [TASK, SMALL, Line(image_size=80)], ids=["default", "3x3", "80 px"])
def test_reference_video_fills_a_cell_turns_its_row_gold_and_rests(task, frames):
    task = replace(task, frames=frames)
    assert isinstance(task, Task)
    for problem in task.problems("model", 8):
        video, image = task.video(problem), task.image(problem)
        assert video.shape == (frames, task.image_size, task.image_size, 3)
        assert np.array_equal(video[0], image)
        assert np.array_equal(video[-1], video[-2]) and np.array_equal(video[-1], video[-3])
        changed = (video != image).any(-1)
        assert not (changed.any(0) & ~task.workspace(problem)).any()
        gold = (video == PALETTE[GOLD]).all(-1)
        assert np.array_equal(changed[-1], gold[-1])
        assert (np.diff(gold.sum((1, 2))) >= 0).all()
        new = [(a != b).any() for a, b in zip(video[:-3], video[1:-2], strict=True)]
        assert all(new), "moves in every frame before it rests"
        assert task.parse(problem, video / np.float32(255)).answer == problem.layout.cell


def test_pieces_are_bold_and_regions_hold_them(problems):
    assert len({p.regions for p in problems}) == 1
    assert len(problems[0].regions) == TASK.regions == TASK.candidates == 36
    for problem in problems[:20]:
        image = TASK.image(problem)
        for mark, (x0, y0, x1, y1) in zip(problem.layout.marks, problem.regions, strict=True):
            inside = image[round(y0 * 64) : round(y1 * 64), round(x0 * 64) : round(x1 * 64)]
            assert inside.shape == (10, 10, 3)
            for colour, piece in ((RED, 1), (BLUE, 2)):
                disc = (inside == PALETTE[colour]).all(-1)
                assert disc.any(0).sum() == disc.any(1).sum() == (8 if mark == piece else 0)


def test_workspace_does_not_tell_which_cell_the_reference_fills(problems):
    for problem in (p for p in problems[:40] if p.kind == "several"):
        for cell in problem.layout.solutions:
            other = filling(problem, cell)
            assert np.array_equal(TASK.workspace(other), TASK.workspace(problem))
            assert np.array_equal(TASK.image(other), TASK.image(problem))


def test_any_resolution_shows_the_same_problem():
    large = Line(image_size=480, frames=5)
    for ours, theirs in zip(TASK.problems("test", 6), large.problems("test", 6), strict=True):
        assert ours == theirs and ours.layout == theirs.layout
        assert large.parse(theirs, played(large, theirs)).answer == ours.layout.cell


# parsing


@pytest.mark.slow
def test_parsing_bears_noise_and_blur(problems, rng):
    for problem in problems[:200]:
        video = played(TASK, problem)
        noisy = video[-3:] + rng.normal(0, 0.08, video[-3:].shape).astype(np.float32)
        wide = np.pad(video[-1], ((1, 1), (1, 1), (0, 0)), mode="edge")
        blurred = sum(wide[i : i + 64, j : j + 64] for i in range(3) for j in range(3)) / 9
        for spoilt in (noisy, blurred[None], noisy[-1:] * 0.5 + blurred * 0.5):
            read = TASK.parse(problem, spoilt)
            assert (read.answer, read.forced, read.path) == (problem.layout.cell, problem.layout.cell, 1.0)
        still = video[:1] + rng.normal(0, 0.08, video[:1].shape).astype(np.float32)
        assert TASK.parse(problem, still).answer is None


def test_a_wrong_answer_reads_as_that_answer(problems):
    for problem in problems[:100]:
        for cell in TASK.plausible_answers(problem)[::3]:
            read = TASK.parse(problem, played(TASK, filling(problem, cell)))
            assert read.answer == read.forced == cell
            assert (read.path == 1.0) == (cell in TASK.solutions(problem))


def test_what_the_rules_forbid_reads_as_none(problems):
    for problem in problems[:60]:
        pieces = {mark: [c for c, m in enumerate(problem.layout.marks) if m == mark] for mark in range(3)}
        row = problem.layout.solutions[problem.layout.cell]
        spare = next(cell for cell in pieces[0] if cell not in problem.layout.solutions)
        kept = next(cell for cell in pieces[1] if cell not in row)
        changes = {
            "a second piece": (spare, RED),
            "a second golden piece": (spare, GOLD),
            "a move of the other colour": (spare, BLUE),
            "an own piece gone": (kept, 0),
            "an own piece of the other colour": (kept, BLUE),
            "a piece of the other colour gone": (pieces[2][0], 0),
            "a piece of the other colour won over": (pieces[2][0], RED),
        }
        for name, (cell, colour) in changes.items():
            video = played(TASK, problem)
            x0, y0, x1, y1 = (round(64 * edge) for edge in problem.regions[cell])
            video[-1, y0:y1, x0:x1] = PALETTE[colour] / np.float32(255)
            read = TASK.parse(problem, video)
            assert read.answer is None, name
            assert 0 < read.path < 1, name


def test_any_video_has_scores(problems):
    for value in (0.0, 0.3, 0.5, 0.8, 1.0):
        read = TASK.parse(problems[0], np.full((3, 64, 64, 3), value, dtype=np.float32))
        assert read.answer is None
        assert len(read.scores) == 36 and np.isfinite(read.scores).all()
        assert read.forced in TASK.plausible_answers(problems[0])
    for problem in problems[:60]:
        read = TASK.parse(problem, 0.15 * played(TASK, problem) + 0.85 * 0.5)
        assert read.answer is None
        assert read.forced == problem.layout.cell


# nothing but the row gives the answer away


def guess(problems: list[Problem]) -> float:
    """How often a guess among the plausible_answers cells is right."""
    return float(np.mean([len(TASK.solutions(p)) / len(TASK.plausible_answers(p)) for p in problems]))


@pytest.mark.slow
@pytest.mark.parametrize("seen", ["cells", pytest.param("16 x 16", marks=pytest.mark.docs)])
def test_a_linear_classifier_of_the_first_frame_finds_little(many, seen):
    """Trained on one-cell problems, tested on unseen ones of both kinds; with thousands of problems it would learn
    some rows, as a given row is linear in the pixels. 16 x 16 pixels at one strength are in test_task.py."""
    several = TASK.problems("model", 1000, "several")
    images = [TASK.image(p) / np.float32(255) for p in [*many, *several]]
    if seen == "cells":
        centres = np.ix_(range(7, 64, 10), range(7, 64, 10))  # the pixel in the middle of each cell
        pixels = np.array([image[centres].ravel() for image in images])
    else:
        pixels = np.array([image.reshape(16, 4, 16, 4, 3).mean((1, 3)).ravel() for image in images])
    for strength in (0.03, 0.3, 1.0):
        probe = LogisticRegression(max_iter=200, C=strength).fit(pixels[:1500], [p.answer for p in many[:1500]])
        picked = probe.predict(pixels[1500:])
        for kind, held in (("one", many[1500:]), ("several", several)):
            mine, picked = picked[: len(held)], picked[len(held) :]
            score = np.mean([cell in TASK.solutions(p) for cell, p in zip(mine, held, strict=True)])
            print(f"line/{kind}, {seen}, C={strength}: linear {score:.3f}, guess {guess(held):.3f}")  # noqa: T201
            assert score < guess(held) + 0.1


def test_crowds_of_pieces_tell_little(many, rng):
    marks = np.array([list(p.layout.marks) for p in many])
    row, column = np.divmod(np.arange(36), 6)
    down, right = np.abs(row[:, None] - row), np.abs(column[:, None] - column)
    near = (np.maximum(down, right) == 1).astype(float)
    in_line = ((np.minimum(down, right) == 0) | (down == right)) & (down + right > 0) & (np.maximum(down, right) < 4)
    for near_by, weight in product((near, in_line.astype(float)), (-1, 0, 1)):
        crowd = (marks == 1) @ near_by + weight * ((marks == 2) @ near_by)
        for sign in (-1, 1):
            score = np.where(marks == 0, sign * crowd + 1e-3 * rng.random(crowd.shape), -99)
            assert (score.argmax(1) == [p.answer for p in many]).mean() < guess(many) + 0.05


# bad requests


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 70}, r"task\.image_size=70.*\b16\b.*\b64\b"),
        ({"image_size": 48}, r"task\.image_size=48.*\b16\b.*\b64\b"),
        ({"frames": 4}, r"task\.frames=4.*\b5\b"),
        ({"size": 7}, r"task\.size=7.*\b3 to 6\b"),
        ({"size": 2}, r"task\.size=2.*\b3 to 6\b"),
        ({"row": 2}, r"task\.row=2.*\b3\b.*task\.size=6\b"),
        ({"row": 7}, r"task\.row=7.*\b3\b.*task\.size=6\b"),
        ({"pieces": [4, 10]}, r"task\.pieces=\(4, 10\).*fewest.*most.*\b5 to 33\b"),
        ({"pieces": [20, 34]}, r"task\.pieces=\(20, 34\).*fewest.*most.*\b5 to 33\b"),
        ({"pieces": [22, 21]}, r"task\.pieces=\(22, 21\).*fewest.*most.*\b5 to 33\b"),
        ({"pieces": [20]}, r"task\.pieces=\[20\].*fewest.*most"),
        ({"problems": 0}, r"task\.problems=0.*\b1\b"),
        ({"seeds": 0}, r"task\.seeds=0.*\b1\b"),
        ({"seed": -1}, r"task\.seed=-1.*\b0\b"),
    ],
)
def test_a_board_that_cannot_be_built_is_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        LineConfig(**settings)


@pytest.mark.slow
def test_a_board_too_full_to_be_drawn_is_refused():
    with pytest.raises(ValueError, match=r"task\.pieces=\(33, 33\).*\b1 to 1\b"):
        Line(row=3, pieces=(33, 33)).problems("model", 1, "one")


def test_settings_build_the_task_they_describe():
    assert LineConfig().build() == TASK
    assert LineConfig(image_size=128, frames=5, size=3, row=3, pieces=[4, 5], seed=3).build() == Line(
        image_size=128, frames=5, size=3, row=3, pieces=(4, 5), seed=3
    )
