"""Records of real runs: read by the bank as a whole run would be, kept on disk, continued after ctrl-C."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import cosprobe.early_exit.calibrate as module
from cosprobe.early_exit.calibrate import EarlyConfig, Stopping, plan, probe_for, record, run_live
from cosprobe.early_exit.reader import attach
from cosprobe.models.pipelines import load_pipeline, sample
from cosprobe.tasks import MazeConfig, Target
from cosprobe.tasks.samples import images, with_noise
from tests.examples.banks import ANSWER, CELLS, bank_for, policy_at
from tests.examples.pipelines import CONFIG, wan

TASK = MazeConfig(frames=5).build()
DRAWN = with_noise(TASK.problems("calibration", 5, "one_exit"), 0)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "wan"
    wan().save_pretrained(path)
    return replace(CONFIG, path=str(path), batch=2)


@pytest.fixture(scope="module")
def setting(config):
    return load_pipeline(config), config, TASK, bank_for(config), "answer", CELLS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def records(setting, folder):
    return record(*setting, DRAWN, (0,), folder)


def test_a_record_is_what_a_whole_run_says(records, setting):
    model, config, task, bank, *_ = setting
    problems = [s.problem for s in DRAWN]
    videos = [
        sample(model, config, images(task, [p.problem for p in part]), [p.problem.prompt for p in part],
               [p.seed for p in part])
        for part in (DRAWN[:2], DRAWN[2:4], DRAWN[4:])
    ]  # fmt: skip
    read = [task.readout(p, clip) for p, clip in zip(problems, np.concatenate(videos), strict=True)]
    assert records.drawn.tolist() == [-1 if r.answer is None else r.answer for r in read]
    assert records.solved.tolist() == [r.answer in task.solutions(p) for r, p in zip(read, problems, strict=True)]
    with attach(bank, model, problems[:2], policy_at(math.inf)) as reader:
        sample(model, config, images(task, problems[:2]), [p.prompt for p in problems[:2]], [s.seed for s in DRAWN[:2]])
    for look, (_, said, sure) in enumerate(reader.readings):
        assert records.said[:2, look].tolist() == list(said)
        assert records.confidence[:2, look] == pytest.approx(sure, abs=1e-6)
    right = [[said in task.solutions(p) for said in row] for p, row in zip(problems, records.said, strict=True)]
    assert records.right.tolist() == right
    assert (records.entropy >= 0).all() and (records.entropy <= math.log(4) + 1e-6).all()
    assert records.steps == (0,) and records.shown.shape == (5, 1)


def test_a_run_that_ends_in_none_is_an_error_against_the_choice(records):
    none = replace(records, drawn=np.full(5, -1))
    assert none.wrong("choice").all()
    assert (none.wrong("truth") == ~records.right).all()


def test_ctrl_c_keeps_whole_batches_and_a_second_run_continues(setting, records, tmp_path, monkeypatch):
    original, calls = module._chunk, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(module, "_chunk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record(*setting, DRAWN, (0,), tmp_path)
    again = record(*setting, DRAWN, (0,), tmp_path)
    assert len(calls) == 1 + 1 + 2  # the batch that was whole is not sampled again
    assert np.array_equal(again.confidence, records.confidence)
    record(*setting, DRAWN, (0,), tmp_path)
    assert len(calls) == 4


def test_runs_that_stop_themselves_do_as_the_records_say(records, setting):
    best = np.sort(records.confidence.max(axis=1))
    threshold = float((best[1] + best[2]) / 2)  # between two: batches of another size differ in the last bits
    stopping = Stopping(policy_at(threshold), records, records, 0.0)
    model, config, task, bank, *_ = setting
    live = run_live(model, config, task, bank, stopping, 5, 0)
    early = records.confidence.max(axis=1) >= threshold
    assert [one.answer is not None for one in live] == early.tolist()
    assert 0 < early.sum() < 5 and all(one.same for one in live)


def test_the_plan_takes_the_layer_that_knows_at_every_step(setting):
    """Features planted so that layer 0 tells the label at step 0 and nothing else does."""
    bank, rng = setting[3], torch.Generator().manual_seed(7)
    labels = torch.randint(4, (60,), generator=rng)
    features = torch.randn(60, len(CELLS), 4, 24, generator=rng) * 0.05
    direction = bank.weights["answer"][0, :, 0]
    features[torch.arange(60), 0, labels] += direction
    cells = plan(bank, "answer", features, CELLS, labels.numpy())
    assert cells == (CELLS[0], CELLS[2], CELLS[3])
    with pytest.raises(ValueError, match="no validation sample has a label"):
        plan(bank, "answer", features, CELLS, np.full(60, -1))


def test_against_decides_which_probe_answers_where_there_are_two(setting):
    bank, choice = setting[3], Target("choice", 4, "candidate", "choice", ("one_exit", "choice"))
    both = replace(bank, targets=(ANSWER, choice))
    assert probe_for(both, "one_exit", "truth") is ANSWER
    assert probe_for(both, "one_exit", "choice") is choice
    assert probe_for(both, "choice", "truth") is choice
    assert probe_for(bank, "one_exit", "choice") is ANSWER
    assert probe_for(bank, "choice", "choice") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"against": "votes"}, "use.against='votes': expected one of choice, truth"),
        ({"risk": 1.0}, "use.risk=1.0: expected more than 0 and less than 1"),
        ({"confidence": 0.0}, "use.confidence=0.0: expected more than 0 and less than 1"),
        ({"problems": 0}, "use.problems=0: expected at least 1"),
        ({"calibration": 40}, "use.calibration=40: expected at least 59 problems, the fewest that can show a risk of"),
        ({"risk": 0.01, "calibration": 298}, "use.calibration=298: expected at least 299 problems"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        EarlyConfig(**change)
