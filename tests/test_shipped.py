"""The model in the package solves every family and follows the words: a few problems of every kind. In make test, mazes
and the words of `select` stand for all of them."""

from __future__ import annotations

import pytest

from cosprobe.activations import Sampler
from cosprobe.config import PipelineConfig
from cosprobe.minimodel.accuracy import solve
from cosprobe.minimodel.card import rate, rewordings
from cosprobe.models.loading import load_pipeline
from cosprobe.tasks import FAMILIES, Select

CONFIG = PipelineConfig()


@pytest.fixture(scope="module")
def shipped():
    pipeline = load_pipeline(CONFIG)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["maze", *(pytest.param(name, marks=pytest.mark.docs) for name in FAMILIES if name != "maze")]
)
def test_most_problems_are_solved(shipped, name):
    task = FAMILIES[name]().build()
    problems = [p for kind in task.kinds for p in task.problems("test", 4, kind)]
    solved = solve(Sampler(shipped, CONFIG, task), problems, 0)
    print(f"{name}: {rate(solved)}")  # noqa: T201
    assert solved.right.mean() >= 0.7


@pytest.mark.slow
@pytest.mark.parametrize("count", [4, pytest.param(8, marks=pytest.mark.docs)])
def test_other_words_make_another_video_of_the_same_picture(shipped, count):
    task = Select()
    for what, asked in rewordings(task, task.problems("test", count)):
        solved = solve(Sampler(shipped, CONFIG, task), asked, 0)
        print(f"another {what} named: {rate(solved)}")  # noqa: T201
        assert solved.right.mean() >= 0.7
