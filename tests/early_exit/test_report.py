"""What is written and said about a calibrated policy."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from cosprobe.early_exit import report
from cosprobe.early_exit.calibrate import LiveRun
from cosprobe.early_exit.frontier import PolicyResult, evaluate_policy, stopping_rules
from cosprobe.early_exit.reader import Answer
from cosprobe.early_exit.report import frontier_figure, remarks, strip_figure, write_early_report
from cosprobe.early_exit.threshold import read_policy
from cosprobe.reporting.film import Film, FilmRow
from tests.examples.stopping import CELLS, FLOPS, PRICES, PROBLEMS, synthetic


def examined(**options) -> report.KindReport:
    calibrated = synthetic(**options)
    image = np.full((64, 64, 3), 200, dtype=np.uint8)
    rows = [
        FilmRow(title, image, np.stack([image[None]] * 3), (0, 1, 1), PROBLEMS[0].regions, 1, 1)
        for title in ("as the video", "finished")
    ]
    live = [
        LiveRun(PROBLEMS[0], Answer(1, 0.9, 0, 2), 1, (1,), 0.1, True),
        LiveRun(PROBLEMS[1], None, -1, (2,), 0.5, False),
    ]
    rules, result = stopping_rules(calibrated, PRICES), evaluate_policy(calibrated, PRICES)
    return report.KindReport(calibrated, rules, result, live, Film(tuple(rows), (0, 2, 4)), [(2, "probe: 1"), None])


@pytest.mark.slow
def test_everything_is_written_and_the_tables_are_printed(tmp_path):
    one, console = examined(), Console(width=140, record=True)
    folder = write_early_report([one], PRICES, tmp_path, console)
    assert {path.name for path in folder.iterdir()} == {"early.json", "early.md", "frontier.png", "film_one_exit.png"}
    found = json.loads((folder / "early.json").read_text())
    kind = found["kinds"]["one_exit"]
    assert read_policy(kind["policy"]) == one.calibrated.policy
    assert kind["result"]["compute"] == one.result.compute
    assert kind["rules"]["fixed step"]["compute"] == one.rules[0].compute.tolist()
    assert found["flops"]["evaluation"] == FLOPS.evaluation
    page, printed = (folder / "early.md").read_text(), console.export_text()
    compute = re.compile(rf"^\* .*compute\D*{re.escape(f'{one.result.compute:.3f}')}", re.MULTILINE)
    for text in (page, printed):
        assert "finished video" in text and "calibrated policy" in text and "none" in text
        assert compute.search(text)
    assert "![frontier.png](frontier.png)" in page


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gain", "verdict"),
    [
        ((0.04, 0.01, 0.07), r"more often.*0\.800.*\+0\.040 \[\+0\.010, \+0\.070\]"),
        ((-0.04, -0.07, -0.01), r"less often.*0\.800.*-0\.040 \[-0\.070, -0\.010\]"),
        ((0.01, -0.02, 0.04), r"differ.*0\.800.*\+0\.010 \[-0\.020, \+0\.040\]"),
    ],
)
def test_more_often_right_is_said_only_when_the_interval_says_so(gain, verdict):
    result = PolicyResult(100, 90, 2, 0.02, (0.0, 0.07), 0.1, 0.8, 0.1, 0.5, 0.84, 0.8, gain, gain)
    lines = [line for line in remarks(replace(examined(), result=result)) if "0.800" in line]
    assert len(lines) == 2  # the policy, and stopping at the first exit point
    for line in lines:
        assert re.search(verdict, line)
        assert sum(word in line for word in ("more often", "less often", "differ")) == 1


@pytest.mark.slow
def test_a_policy_that_never_stops_says_so():
    lines = remarks(examined(threshold=np.inf))
    assert len(lines) == 1
    assert re.search(r"0\.1 .*0\.95.*0\.020.*\b300\b.*finished", lines[0])


@pytest.mark.slow
def test_the_frontier_shows_every_rule_and_the_promise():
    for error_reference, others in (("model_answer", "1 - risk asked for (0.1)"), ("truth", "finished video")):
        axes = frontier_figure([examined(error_reference=error_reference)]).axes[0]
        labels = axes.get_legend_handles_labels()[1]
        assert {"fixed step", "parsed x0-hat", "entropy rule", "policy", "calibrated policy", others} == set(labels)


@pytest.mark.slow
def test_the_step_that_answered_is_framed():
    one = examined()
    figure = strip_figure(one)
    framed = [axes for axes in figure.axes if axes.spines["top"].get_linewidth() == 2.5]
    assert framed == [figure.axes[2]]  # the first row: first frame, step 0, step 2
    assert "probe: 1" in framed[0].get_xlabel()
    assert CELLS[1].step == 1
