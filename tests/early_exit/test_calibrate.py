"""Trajectories of real runs: read by the bank as a whole run would be, kept on disk, continued after ctrl-C."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import cosprobe.early_exit.trajectories as module
from cosprobe.activations import images
from cosprobe.activations.sampler import Sampler
from cosprobe.config import EarlyConfig, PipelineConfig
from cosprobe.early_exit.calibrate import Calibrated, plan, probe_for, run_live
from cosprobe.early_exit.reader import attach
from cosprobe.early_exit.trajectories import ExitPoints, Trajectories, sample_trajectories
from cosprobe.models.loading import load_pipeline
from cosprobe.models.pipelines import sample
from cosprobe.tasks import Target
from cosprobe.tasks.samples import with_noise
from tests.examples.banks import ANSWER, CELLS, TASK, bank_for, policy_at
from tests.examples.pipelines import CONFIG, save_wan

SAMPLES = with_noise(TASK.problems("calibration", 5, "one_exit"), 0)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> PipelineConfig:
    path = tmp_path_factory.mktemp("model") / "wan"
    save_wan(path)
    return replace(CONFIG, path=str(path), batch=2)


@pytest.fixture(scope="module")
def sampler(config) -> Sampler:
    return Sampler(load_pipeline(config), config, TASK)


@pytest.fixture(scope="module")
def exits(config) -> ExitPoints:
    return ExitPoints(bank_for(config), "answer", CELLS)


@pytest.fixture(scope="module")
def trajectories(sampler, exits, tmp_path_factory) -> Trajectories:
    return sample_trajectories(sampler, exits, SAMPLES, (0,), tmp_path_factory.mktemp("run"))


def test_a_trajectory_is_what_a_whole_run_says(trajectories, sampler, exits):
    model, config = sampler.model, sampler.config
    problems = [s.problem for s in SAMPLES]
    videos = [
        sample(model, config, images(TASK, [s.problem for s in part]), [s.problem.prompt for s in part],
               [s.seed for s in part])
        for part in (SAMPLES[:2], SAMPLES[2:4], SAMPLES[4:])
    ]  # fmt: skip
    parsed = [TASK.parse(p, clip) for p, clip in zip(problems, np.concatenate(videos), strict=True)]
    assert trajectories.model_answer.tolist() == [-1 if one.answer is None else one.answer for one in parsed]
    solved = [one.answer in TASK.solutions(p) for one, p in zip(parsed, problems, strict=True)]
    assert trajectories.model_correct.tolist() == solved
    prompts, seeds = [p.prompt for p in problems[:2]], [s.seed for s in SAMPLES[:2]]
    with attach(exits.bank, model, problems[:2], policy_at(math.inf)) as reader:
        sample(model, config, images(TASK, problems[:2]), prompts, seeds)
    for exit_point, (_, predictions, confidence) in enumerate(reader.readings):
        assert trajectories.predictions[:2, exit_point].tolist() == list(predictions)
        assert trajectories.confidence[:2, exit_point] == pytest.approx(confidence, abs=1e-6)
    rows = zip(problems, trajectories.predictions, strict=True)
    assert trajectories.correct.tolist() == [[one in TASK.solutions(p) for one in row] for p, row in rows]
    assert (trajectories.entropy >= 0).all() and (trajectories.entropy <= math.log(4) + 1e-6).all()
    assert trajectories.decoded == (0,) and trajectories.x0_predictions.shape == (5, 1)


def test_a_run_that_ends_in_none_is_an_error_by_the_model_answer(trajectories):
    none = replace(trajectories, model_answer=np.full(5, -1))
    assert none.errors("model_answer").all()
    assert (none.errors("truth") == ~trajectories.correct).all()


def test_ctrl_c_keeps_whole_batches_and_a_second_run_continues(sampler, exits, trajectories, tmp_path, monkeypatch):
    original, calls = module._sample_batch, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(module, "_sample_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample_trajectories(sampler, exits, SAMPLES, (0,), tmp_path)
    again = sample_trajectories(sampler, exits, SAMPLES, (0,), tmp_path)
    assert len(calls) == 1 + 1 + 2  # the batch that was whole is not sampled again
    assert np.array_equal(again.confidence, trajectories.confidence)
    sample_trajectories(sampler, exits, SAMPLES, (0,), tmp_path)
    assert len(calls) == 4


def test_runs_that_stop_themselves_do_as_the_trajectories_say(trajectories, sampler, exits):
    surest = np.sort(trajectories.confidence.max(axis=1))
    threshold = float((surest[1] + surest[2]) / 2)  # between two: batches of another size differ in the last bits
    calibrated = Calibrated(policy_at(threshold), trajectories, trajectories, 0.0)
    live = run_live(sampler, exits.bank, calibrated, 5, 0)
    early = trajectories.confidence.max(axis=1) >= threshold
    assert [one.answer is not None for one in live] == early.tolist()
    assert 0 < early.sum() < 5 and all(one.same for one in live)


def test_the_plan_takes_the_layer_that_knows_at_every_step(exits):
    """Features planted so that layer 0 tells the label at step 0 and nothing else does."""
    bank, rng = exits.bank, torch.Generator().manual_seed(7)
    labels = torch.randint(4, (60,), generator=rng)
    features = torch.randn(60, len(CELLS), 4, 24, generator=rng) * 0.05
    direction = bank.weights["answer"][0, :, 0]
    features[torch.arange(60), 0, labels] += direction
    cells = plan(bank, "answer", features, CELLS, labels.numpy())
    assert cells == (CELLS[0], CELLS[2], CELLS[3])
    with pytest.raises(ValueError, match="'answer'.*validation"):
        plan(bank, "answer", features, CELLS, np.full(60, -1))


def test_the_error_reference_decides_which_probe_answers_where_there_are_two(exits):
    bank, model_answer = exits.bank, Target("model_answer", 4, "candidate", "model_answer", ("one_exit", "choice"))
    both = replace(bank, targets=(ANSWER, model_answer))
    assert probe_for(both, "one_exit", "truth") is ANSWER
    assert probe_for(both, "one_exit", "model_answer") is model_answer
    assert probe_for(both, "choice", "truth") is model_answer
    assert probe_for(bank, "one_exit", "model_answer") is ANSWER
    assert probe_for(bank, "choice", "model_answer") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"error_reference": "votes"}, r"use\.error_reference='votes'.*model_answer.*truth"),
        ({"risk": 1.0}, r"use\.risk=1\.0.*\b0\b.*\b1\b"),
        ({"confidence": 0.0}, r"use\.confidence=0\.0.*\b0\b.*\b1\b"),
        ({"problems": 0}, r"use\.problems=0.*\b1\b"),
        ({"calibration": 40}, r"use\.calibration=40.*\b59\b.*\b0\.05\b.*\b0\.95\b"),
        ({"risk": 0.01, "calibration": 298}, r"use\.calibration=298.*\b299\b.*\b0\.01\b.*\b0\.95\b"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        EarlyConfig(**change)
