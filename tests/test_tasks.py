"""What every task shares. The maze's own tests stand in test_maze.py."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest

from cosprobe.tasks import SPLITS, Maze, Problem, Readout, split_of
from cosprobe.tasks.task import check_request, distinct


def problem(key: str, index: int = 0, split: str = "train") -> Problem:
    return Problem("maze", "one_exit", split, index, key, "", 0, {}, {}, (), None)


def test_splits_take_their_share_of_keys():
    keys = [hashlib.sha256(str(i).encode()).hexdigest()[:16] for i in range(20_000)]
    counts = Counter(split_of(key) for key in keys)
    assert sum(SPLITS.values()) == 100
    assert set(counts) == set(SPLITS)
    for split, share in SPLITS.items():
        assert counts[split] / len(keys) == pytest.approx(share / 100, abs=0.01)


def test_distinct_keeps_the_first_of_each_key_of_its_split():
    drawn = [problem("a"), problem("b", split="test"), problem("a", 1), problem("c", 2), problem("d", 3)]
    assert [p.key for p in distinct(iter(drawn), "train", 2)] == ["a", "c"]


def test_distinct_says_when_a_difficulty_has_too_few_problems():
    with pytest.raises(ValueError, match="task.problems=3: only 1 distinct problems exist in split 'train'") as caught:
        distinct(iter([problem("a")] * 50), "train", 3, patience=10)
    assert "widen the difficulty of the task" in str(caught.value)


@pytest.mark.parametrize(
    ("split", "count", "message"),
    [
        ("dev", 3, "split='dev': expected one of model, train, validation, calibration, test"),
        ("train", 0, "task.problems=0: expected at least 1 problem; ask for more"),
        ("train", -2, "task.problems=-2: expected at least 1 problem; ask for more"),
    ],
)
def test_requests_that_make_no_sense(split, count, message):
    with pytest.raises(ValueError, match="expected") as caught:
        check_request(split, count)
    assert str(caught.value) == message
    with pytest.raises(ValueError, match="expected"):
        Maze().problems(split, count)


def test_forced_choice_is_the_highest_score():
    assert Readout(None, (0.1, -0.2, 0.4, 0.0), 0.0).forced == 2


def test_a_problem_has_a_name_that_says_where_it_comes_from():
    assert problem("a", 7).name == "maze/one_exit/train/7"
