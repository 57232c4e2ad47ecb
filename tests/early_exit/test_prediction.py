"""What a probe says of a run that is halted at its cell is what it says of a whole run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cosprobe.activations import images
from cosprobe.activations.capture import capture
from cosprobe.activations.pooling import Pooling
from cosprobe.activations.sampler import Sampler
from cosprobe.early_exit.prediction import early_answers
from cosprobe.models.loading import load_pipeline
from cosprobe.models.pipelines import sample
from cosprobe.tasks.samples import with_noise
from tests.examples.banks import CELLS, TASK, bank_for
from tests.examples.pipelines import CONFIG, save_wan


def test_a_halted_answer_is_that_of_a_whole_run(tmp_path):
    save_wan(tmp_path)
    config = replace(CONFIG, path=str(tmp_path))
    sampler, bank, cell = Sampler(load_pipeline(config), config, TASK), bank_for(config), CELLS[2]
    samples = with_noise(TASK.problems("test", 2, "one_exit"), 0)
    problems = [s.problem for s in samples]
    prompts, seeds = [p.prompt for p in problems], [s.seed for s in samples]
    answers = early_answers(sampler, bank, "answer", cell, samples)
    pooling = Pooling("region", False, [p.regions for p in problems])
    with capture(sampler.model, [str(cell.layer)], pooling, str(cell.step)) as cache:
        video = sample(sampler.model, config, images(TASK, problems), prompts, seeds)
    features = cache.parts[(cell.step, str(cell.layer), "cond")][:, 0]
    proba = bank.probabilities(features[:, None], "answer", [cell])[0]
    assert [a.answer for a in answers] == proba.argmax(-1).tolist()
    assert [a.probability for a in answers] == pytest.approx(proba.amax(-1).tolist())
    parsed = [TASK.parse(p, clip) for p, clip in zip(problems, video, strict=True)]
    assert [a.model_answer for a in answers] == [one.answer for one in parsed]
    assert [a.solutions for a in answers] == [TASK.solutions(p) for p in problems]
