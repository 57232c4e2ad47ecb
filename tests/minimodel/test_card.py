"""The card says what was measured, in tables that fit any family."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from cosprobe.activations import Sampler
from cosprobe.config import PipelineConfig
from cosprobe.minimodel.accuracy import Solved, solve
from cosprobe.minimodel.card import Measured, difficulties, measure, rate, rewordings, speed, write_card
from cosprobe.tasks import Line, Maze, Select
from tests.examples.pipelines import CONFIG, wan

RECIPE = {
    "settings": {"lengths": [5], "flow": {"stages": [[5, 300], [9, 200]], "batch": 32}},
    "tasks": {},
    "minutes": {"flow matching": 8.0},
    "curve": [
        {"step": 100, "family": "line", "kind": "one", "right": 10, "of": 48, "frames": 5},
        {"step": 200, "family": "line", "kind": "one", "right": 44, "of": 48, "frames": 5},
        {"step": 300, "family": "line", "kind": "one", "right": 47, "of": 48, "frames": 5},
    ],
}


def solved(task, right):
    problems = task.problems("test", len(right))
    right = np.array(right, dtype=bool)
    return Solved(problems, right, ~right, right.astype(float))


@pytest.mark.slow
def test_a_rate_is_a_share_with_its_interval():
    found = solved(Maze(), [1] * 30 + [0] * 10)
    text = rate(found, np.ones(40, dtype=bool))
    low, high = map(float, text[text.index("[") + 1 : text.index("]")].split(", "))
    assert text.startswith("0.750 [") and text.endswith("of 40") and 0.5 < low < 0.75 < high < 0.95
    assert rate(found, np.zeros(40, dtype=bool)) == "-"


def test_rows_of_difficulty_hold_every_problem_once():
    found = solved(Line(), [1] * 40)
    rows = difficulties(found)
    for measure_ in found.problems[0].difficulty:
        mine = [keep for title, keep in rows if title.startswith(measure_)]
        assert 1 <= len(mine) <= 5 and (np.sum(mine, axis=0) == 1).all()
    title, keep = next(row for row in rows if row[0].startswith("pieces") and " to " in row[0])
    low, high = map(int, title.removeprefix("pieces ").split(" to "))
    assert {p.difficulty["pieces"] for p, kept in zip(found.problems, keep, strict=True) if kept} <= {
        *range(low, high + 1)
    }


def test_speed_counts_clips_and_the_first_time_nine_in_ten_are_right():
    text = "\n".join(speed(RECIPE))
    assert "| 1 | - | - | 8 | 16 | 5, 9 | 30.0 |" in text  # 480 s for 500 steps of 32
    assert "line one 6 (5 frames)." in text  # 200 steps of 32, in thousands
    before = {**RECIPE, "minutes": {"autoencoder": 3.0}, "curve": []}  # learned from no clip
    later = {**RECIPE, "before": [before, {**RECIPE, "curve": []}], "minutes": {"encoding": 2, "flow matching": 4}}
    text = "\n".join(speed(later))
    rows = [
        "| 1 | 3 | - | - | - | - | - |",
        "| 2 | - | - | 8 | 16 | 5, 9 | 30.0 |",
        "| 3 | - | 2 | 4 | 16 | 5, 9 | 15.0 |",
    ]
    assert "\n".join(rows) in text
    assert "line one 22 (5 frames)." in text


def test_a_card_names_families_kinds_and_misreadings(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    maze = solved(Maze(), [1, 0] * 10)
    measured = Measured({"maze": maze}, {("maze", 5): solved(Maze(), [1] * 8)}, {"maze": (3, 500)}, {})
    text = write_card(tmp_path, measured, PipelineConfig()).read_text()
    assert "| problems | one_exit | choice |" in text
    assert "| all | 1.000 [0.692, 1.000] of 10 | 0.000 [0.000, 0.308] of 10 |" in text
    assert "| rooms 4 |" in text and "| 5 frames | 1.000" in text
    assert re.search(r"\b3 of 500\b", text)  # references that read differently when reconstructed
    assert re.search(r"no answer.*\b0\.500\b", text)


def test_other_words_name_something_else_in_the_same_picture(tmp_path):
    task = Select()
    problems = task.problems("test", 9)
    (what, objects), (other, boxes) = rewordings(task, problems)
    assert (what, other, len(objects), len(boxes)) == ("object", "box", 5, 4)
    for before, after in [*zip(problems[::2], objects, strict=True), *zip(problems[1::2], boxes, strict=True)]:
        assert (task.image(before) == task.image(after)).all() and before.prompt != after.prompt
    assert all(before.answer == after.answer for before, after in zip(problems[::2], objects, strict=True))
    assert all(before.answer != after.answer for before, after in zip(problems[1::2], boxes, strict=True))
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    right = solved(task, [1, 1, 1, 0])
    measured = Measured({"select": right}, {}, {"select": (0, 4)}, {"select": {"object": right}})
    text = write_card(tmp_path, measured, PipelineConfig()).read_text()
    assert re.search(r"another object\b.*\b0\.750 \[", text)


@pytest.mark.slow
def test_what_is_measured_is_what_the_videos_show(monkeypatch):
    """A model that draws the reference solves everything, one that draws the first frame nothing."""
    task = Maze()
    config = replace(CONFIG, steps=2, batch=4)
    shown = {}

    def draw(model, pipeline, images, prompts, seeds):
        assert len(seeds) == len(set(seeds)) and pipeline.frames in (5, 9)
        return np.stack([shown[image.numpy().tobytes()][pipeline.frames] for image in images])

    for problem in task.problems("test", 6, "one_exit") + task.problems("test", 6, "choice"):
        image = (task.image(problem).transpose(2, 0, 1) / np.float32(255)).astype(np.float32)
        solves = problem.index % 2 == 0
        shown[image.tobytes()] = {
            n: (replace(task, frames=n).video(problem) if solves else np.repeat(task.image(problem)[None], n, 0)) / 255
            for n in (5, 9)
        }
    monkeypatch.setattr("cosprobe.activations.sampler.sample", draw)
    found = measure(wan(), config, {"maze": task}, [5, 9], (6, 3, 2), 0)
    for result in (found.solved["maze"], found.elsewhere["maze", 9]):
        assert (result.right == [p.index % 2 == 0 for p in result.problems]).all()
        assert (result.none == ~result.right).all()
    assert len(found.solved["maze"].problems) == 12 and len(found.elsewhere["maze", 9].problems) == 6
    assert found.misread["maze"][1] == 4 and found.misread["maze"][0] > 0  # random weights make no picture again


def test_a_pipeline_is_asked_once_for_every_problem():
    task = Maze()
    config = replace(CONFIG, steps=1, batch=2)
    result = solve(Sampler(wan(), config, task), task.problems("test", 3), 0)
    assert result.right.shape == result.none.shape == result.path.shape == (3,)
    assert not (result.right & result.none).any()
