"""Answers that stream out of a real pipeline, and banks that refuse what they were not made for."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from cosprobe.activations import images
from cosprobe.activations.capture import capture
from cosprobe.activations.pooling import Pooling
from cosprobe.config import PipelineConfig
from cosprobe.early_exit.reader import attach, bank_policy, check_pipeline
from cosprobe.early_exit.threshold import Policy
from cosprobe.errors import InputError
from cosprobe.models.identity import fingerprint
from cosprobe.models.loading import load_pipeline
from cosprobe.models.pipelines import sample
from cosprobe.probes.bank import ProbeBank, Provenance
from cosprobe.tasks import Maze
from tests.examples.adapters import adapter
from tests.examples.banks import CELLS, TASK, bank_for, policy_at
from tests.examples.pipelines import CONFIG, save_wan, wan

PROBLEMS = TASK.problems("test", 3, "one_exit")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> PipelineConfig:
    path = tmp_path_factory.mktemp("model") / "wan"
    save_wan(path)
    return replace(CONFIG, path=str(path))


@pytest.fixture(scope="module")
def pipeline(config):
    return load_pipeline(config)


@pytest.fixture(scope="module")
def bank(config) -> ProbeBank:
    return bank_for(config)


def run(pipeline, config, problems=PROBLEMS, **changes):
    prompts, seeds = [p.prompt for p in problems], range(len(problems))
    return sample(pipeline, replace(config, **changes), images(TASK, problems), prompts, seeds)


@pytest.fixture(scope="module")
def proba(pipeline, config, bank) -> torch.Tensor:
    """[exit_point, sample, class] of a whole run."""
    with capture(pipeline, ["0", "2"], Pooling("region", False, [p.regions for p in PROBLEMS])) as cache:
        run(pipeline, config)
    features = torch.stack([cache.parts[(c.step, str(c.layer), "cond")][:, 0] for c in CELLS], dim=1)
    return bank.probabilities(features, "answer", CELLS)


def test_every_exit_point_is_told_and_the_run_is_finished_when_nothing_is_sure(pipeline, config, bank, proba):
    told = []
    with attach(bank, pipeline, PROBLEMS, policy_at(math.inf), told.append) as reader:
        video = run(pipeline, config)
    assert np.array_equal(video, run(pipeline, config))
    assert [step for step, _, _ in told] == [c.step for c in CELLS]
    assert [list(predictions) for _, predictions, _ in told] == proba.argmax(-1).tolist()
    assert torch.equal(torch.tensor([confidence for _, _, confidence in told]), proba.amax(-1))
    assert reader.answers == [None] * 3 and not reader.stopped


def test_the_run_ends_when_every_problem_of_the_batch_has_an_answer(pipeline, config, bank, proba):
    """The threshold is the lowest of each problem's best confidence: the last one answers at that very exit point."""
    confidence, threshold = proba.amax(-1), float(proba.amax(-1).amax(0).min())
    first = [int((column >= threshold).nonzero()[0]) for column in confidence.T]
    finished = False
    with attach(bank, pipeline, PROBLEMS, policy_at(threshold)) as reader:
        run(pipeline, config)
        finished = True
    assert reader.stopped and not finished
    assert len(reader.readings) == max(first) + 1
    for i, (answer, exit_point) in enumerate(zip(reader.answers, first, strict=True)):
        cell, prediction = CELLS[exit_point], int(proba[exit_point, i].argmax())
        assert answer == (prediction, float(confidence[exit_point, i]), cell.step, cell.layer)


def test_the_bank_carries_its_policy(bank, pipeline, config, tmp_path):
    policy = policy_at(0.0)
    bank.with_provenance(policies=(policy.described(),)).save(tmp_path)
    again = ProbeBank.load(tmp_path)
    assert bank_policy(again, "one_exit") == policy
    with attach(again, pipeline, PROBLEMS) as reader:
        run(pipeline, config)
    assert len(reader.readings) == 1 and all(reader.answers)


def refused(bank: ProbeBank, pipeline, problems=PROBLEMS, policy: Policy | None = None, call=None):
    with attach(bank, pipeline, problems, policy or policy_at(0.5)):
        if call is not None:
            call()


def test_probes_of_a_model_with_adapters_fit_that_model_and_not_the_bare_one(config, pipeline, tmp_path):
    path = adapter(tmp_path / "adapter")
    for lora in (path, path.parent):
        adapted = replace(config, lora=str(lora))
        made = bank_for(adapted)
        loaded = load_pipeline(adapted)
        with attach(made, loaded, PROBLEMS, policy_at(0.5)):
            run(loaded, adapted)
        with pytest.raises(ValueError, match=rf"another model.*: its adapters \(\"{made.store.model['adapters']}\""):
            refused(made, pipeline)


def test_another_model_or_scheduler_is_refused(bank, pipeline, config, tmp_path):
    files = fingerprint(config.folder)
    other = bank.with_provenance(store=replace(bank.store, model=files | {"vae": "beef", "scheduler": "feed"}))
    with pytest.raises(ValueError, match=f"its scheduler .*feed.*{files['scheduler']}.*, vae .*beef.*{files['vae']}"):
        refused(other, pipeline)
    changed = load_pipeline(config)
    changed.scheduler = UniPCMultistepScheduler.from_config(changed.scheduler.config)
    with pytest.raises(ValueError, match="_class_name=FlowMatchEuler.*_class_name=UniPC"):
        refused(bank, changed)
    changed = load_pipeline(config)
    changed.scheduler.register_to_config(shift=5.0)
    with pytest.raises(ValueError, match=r"shift=3\.0.*shift=5\.0"):
        refused(bank, changed)
    with pytest.raises(ValueError, match=r"another model than the pipeline: its index .*, transformer .*, vae "):
        refused(bank, wan())
    changed = load_pipeline(config)
    changed.transformer.blocks[0].ffn.net[2].weight.data *= 1.01
    with pytest.raises(ValueError, match=rf"another model.*: its transformer \(\"{files['transformer']}\""):
        refused(bank, changed)
    with pytest.raises(ValueError, match=r"model.*train\.py"):
        refused(replace(bank, provenance=Provenance()), pipeline)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 4}, r"\bsteps=3\b.*\bsteps=4\b.*num_inference_steps=3\b"),
        ({"guidance": 2.0}, r"guidance=1\b.*guidance=2\b.*guidance_scale=1\b"),
    ],
)
def test_another_call_is_refused_at_its_first_exit_point(bank, pipeline, config, change, message):
    with pytest.raises(ValueError, match=message):
        refused(bank, pipeline, call=lambda: run(pipeline, config, **change))


def test_problems_it_does_not_know_are_refused(bank, pipeline):
    hide, choice = replace(PROBLEMS[0], task="hide"), Maze(frames=5).problems("test", 1, "choice")[0]
    fewer = replace(PROBLEMS[0], regions=PROBLEMS[0].regions[:2])
    with pytest.raises(ValueError, match=rf"{hide.name}\b.*task.*'hide'.*'maze'"):
        refused(bank, pipeline, [hide])
    with pytest.raises(ValueError, match=rf"{choice.name}\b.*kind.*'choice'.*'one_exit'"):
        refused(bank, pipeline, [choice])
    with pytest.raises(ValueError, match=rf"{fewer.name}\b.*\b2\b.*\b4\b"):
        refused(bank, pipeline, [fewer])
    with pytest.raises(ValueError, match="problems: none"):
        refused(bank, pipeline, [])
    with (
        pytest.raises(ValueError, match="'one_exit'.*none.*use=early.*policy="),
        attach(bank, pipeline, PROBLEMS),
    ):
        pass


def test_an_activation_that_is_not_finite_is_named(bank, pipeline, config):
    broken = load_pipeline(config)

    def call() -> None:
        broken.transformer.blocks[1].ffn.net[2].bias.data[0] = math.nan
        run(broken, config)

    with pytest.raises(ValueError, match=re.escape(str(CELLS[1])) + ".*finite"):
        refused(bank, broken, policy=policy_at(math.inf), call=call)


def test_a_bank_of_another_scheduler_by_settings_is_told_apart(bank, pipeline, config):
    with_shift = replace(config, flow_shift=5.0)
    other = bank.with_provenance(store=replace(bank.store, pipeline=replace(bank.store.pipeline, flow_shift=5.0)))
    with pytest.raises(InputError, match=r"shift=5\.0.*shift=3\.0"):
        check_pipeline(other, pipeline)
    changed = load_pipeline(with_shift)
    check_pipeline(other, changed)
    with pytest.raises(InputError, match=r"shift=3\.0.*shift=5\.0"):
        check_pipeline(bank, changed)
