"""What a probe says of a run that is halted at its cell is what it says of a whole run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cosprobe.activations.capture import capture
from cosprobe.early_exit.prediction import early_answers
from cosprobe.early_exit.reader import pooling_of
from cosprobe.models.pipelines import load_pipeline, sample
from cosprobe.tasks import MazeConfig
from cosprobe.tasks.samples import images, with_noise
from tests.examples.banks import CELLS, bank_for
from tests.examples.pipelines import CONFIG, wan

TASK = MazeConfig(frames=5).build()


def test_a_halted_answer_is_that_of_a_whole_run(tmp_path):
    wan().save_pretrained(tmp_path)
    config = replace(CONFIG, path=str(tmp_path))
    model, bank, cell = load_pipeline(config), bank_for(config), CELLS[2]
    drawn = with_noise(TASK.problems("test", 2, "one_exit"), 0)
    problems = [s.problem for s in drawn]
    answers = early_answers(model, config, TASK, bank, "answer", cell, drawn)
    with capture(model, [cell.site], pooling_of("region", False, problems), str(cell.step)) as cache:
        video = sample(model, config, images(TASK, problems), [p.prompt for p in problems], [s.seed for s in drawn])
    features = cache.parts[(cell.step, cell.site, "cond")][:, 0]
    proba = bank.probabilities(features[:, None], "answer", [cell])[0]
    assert [a.answer for a in answers] == proba.argmax(-1).tolist()
    assert [a.probability for a in answers] == pytest.approx(proba.amax(-1).tolist())
    assert [a.drawn for a in answers] == [TASK.readout(p, clip).answer for p, clip in zip(problems, video, strict=True)]
    assert [a.right for a in answers] == [TASK.solutions(p) for p in problems]
