"""What is written and said about a calibrated policy."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from cosprobe.early_exit.calibrate import Live
from cosprobe.early_exit.frontier import Realised, realised, ways
from cosprobe.early_exit.policy import read_policy
from cosprobe.early_exit.reader import Answer
from cosprobe.early_exit.report import Saved, frontier_figure, remarks, strip_figure, write_savings
from cosprobe.reporting.film import Film, FilmRow
from tests.examples.stopping import CELLS, CLOCK, COST, PROBLEMS, TOTAL, synthetic


def saved(**options) -> Saved:
    stopping = synthetic(**options)
    image = np.full((64, 64, 3), 200, dtype=np.uint8)
    rows = [
        FilmRow(title, image, np.stack([image] * 3), (0, 1, 1), PROBLEMS[0].regions, 1, 1)
        for title in ("as drawn", "finished")
    ]
    live = [
        Live(PROBLEMS[0], Answer(1, 0.9, 0, 2), 1, (1,), 0.1, True),
        Live(PROBLEMS[1], None, -1, (2,), 0.5, False),
    ]
    done = realised(stopping, COST, CLOCK, TOTAL)
    return Saved(
        stopping, ways(stopping, COST, CLOCK, TOTAL), done, live, Film(tuple(rows), (0, 2, 4)), [(2, "probe: 1"), None]
    )


def test_everything_is_written_and_the_tables_are_printed(tmp_path):
    one, console = saved(), Console(width=140, record=True)
    folder = write_savings([one], COST, CLOCK, TOTAL, tmp_path, console)
    assert {path.name for path in folder.iterdir()} == {"early.json", "early.md", "frontier.png", "film_one_exit.png"}
    found = json.loads((folder / "early.json").read_text())
    kind = found["kinds"]["one_exit"]
    assert read_policy(kind["policy"]) == one.stopping.policy
    assert kind["realised"]["compute"] == one.realised.compute
    assert kind["ways"]["fixed step"]["compute"] == one.ways[0].compute.tolist()
    assert found["flops"]["evaluation"] == COST.evaluation
    page, said = (folder / "early.md").read_text(), console.export_text()
    for text in (page, said):
        assert "finished video" in text and "calibrated policy" in text and "none" in text
        assert f"Mean compute {one.realised.compute:.3f} of a finished, decoded run" in text
    assert "![frontier.png](frontier.png)" in page


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        ((0.04, 0.01, 0.07), "more often than by the finished video (0.800): +0.040 [+0.010, +0.070]"),
        ((-0.04, -0.07, -0.01), "less often than by the finished video"),
        ((0.01, -0.02, 0.04), "neither more nor less often than by the finished video"),
    ],
)
def test_more_often_right_is_said_only_when_the_interval_says_so(gain, words):
    done = Realised(100, 90, 2, 0.02, (0.0, 0.07), 0.1, 0.8, 0.1, 0.5, 0.84, 0.8, gain, gain)
    assert any(words in line for line in remarks(replace(saved(), realised=done)))


def test_a_policy_that_never_stops_says_so():
    lines = remarks(saved(threshold=np.inf))
    assert len(lines) == 1 and "every run is finished" in lines[0]


def test_the_frontier_shows_every_way_and_the_promise():
    for against, others in (("choice", "1 - risk asked for (0.1)"), ("truth", "finished video")):
        axes = frontier_figure([saved(against=against)]).axes[0]
        labels = axes.get_legend_handles_labels()[1]
        assert {"fixed step", "readout of x0-hat", "entropy rule", "policy", "calibrated policy", others} == set(labels)


def test_the_step_that_answered_is_framed():
    one = saved()
    figure = strip_figure(one)
    framed = [axes for axes in figure.axes if axes.spines["top"].get_linewidth() == 2.5]
    assert framed == [figure.axes[2]]  # the first row: first frame, step 0, step 2
    assert "probe: 1" in framed[0].get_xlabel()
    assert CELLS[1].step == 1
