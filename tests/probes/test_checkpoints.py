"""Killed fits go on to the bits of the unbroken fit, and only from intact files of the same fit."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cosprobe.config import ProbeConfig, TrainerConfig
from cosprobe.errors import InputError
from cosprobe.monitoring import remove_events
from cosprobe.probes import logistic
from cosprobe.probes.bank import ProbeBank
from cosprobe.probes.checkpoints import ChecksumIO, fingerprint
from cosprobe.probes.curves import STATISTICS
from cosprobe.probes.logistic import ProbeTraining, chunks, fit
from tests.examples import processes
from tests.examples.shapes import unchecked
from tests.probes.ddp_fit import RECIPE, TARGETS, main, planted, run_killed

SPEED = "speed and memory/fit: samples per second"
EPOCH, CHUNK = 3, 18  # steps; there are two chunks
KILLED = CHUNK + 2 * EPOCH + 2  # inside the third epoch of the second chunk


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """The epochs of the training steps made."""
    made, training_step = [], ProbeTraining.training_step

    def counted(module, *args):
        made.append(module.current_epoch)
        return training_step(module, *args)

    monkeypatch.setattr(ProbeTraining, "training_step", counted)
    return made


def run(folder: Path, samples=None, seed: int = 0, **changes) -> ProbeBank:
    with unchecked():  # tests/probes/test_logistic.py checks the shapes of the same fit
        return fit(samples or planted(), ProbeConfig(**(RECIPE | changes)), TrainerConfig(), folder, seed)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> tuple[ProbeBank, Path]:
    folder = tmp_path_factory.mktemp("unbroken")
    return run(folder), folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    run_killed(folder, KILLED)
    return folder / "fit"


@pytest.fixture
def left(killed, tmp_path) -> Path:
    """A copy of what a killed fit leaves."""
    return Path(shutil.copytree(killed, tmp_path / "fit"))


def same(a: ProbeBank, b: ProbeBank) -> bool:
    pairs = [(getattr(a, table), getattr(b, table)) for table in ("weights", "biases", "penalties", "temperatures")]
    equal = all(torch.equal(one[t.name], other[t.name]) for one, other in pairs for t in TARGETS)
    return equal and torch.equal(a.mean, b.mean) and torch.equal(a.std, b.std) and a.provenance == b.provenance


def files(folder: Path, kind: str) -> list[Path]:
    return list((folder / "checkpoints").rglob(f"*.{kind}"))


@pytest.mark.slow
def test_a_killed_fit_goes_on_to_the_same_bits(left, steps, unbroken, monkeypatch):
    advanced = []
    monkeypatch.setattr("rich.progress.Progress.advance", lambda bar, task, by=1: advanced.append(by))
    assert len(files(left, "safetensors")) == len(files(left, "ckpt")) == 1
    remove_events(left)  # as a run does
    assert same(run(left), unbroken[0])
    assert sum(advanced) == 2 * RECIPE["epochs"]
    assert steps == [epoch for epoch in range(2, 6) for _ in range(EPOCH)]
    assert not (left / "checkpoints").exists()
    for name in STATISTICS:
        found, whole = (EventAccumulator(str(path / "training" / name)).Reload() for path in (left, unbroken[1]))
        assert set(found.Tags()["scalars"]) == set(whole.Tags()["scalars"])
        for tag in whole.Tags()["scalars"]:
            points = [[(event.step, event.value) for event in of.Scalars(tag)] for of in (found, whole)]
            assert points[0] == points[1]
    last = [EventAccumulator(str(path / "training")).Reload().Scalars(SPEED)[-1].step for path in (left, unbroken[1])]
    assert last[0] == last[1]  # samples so far, with those of the killed attempt


@pytest.mark.slow
def test_a_fit_killed_in_its_first_chunk_goes_on(tmp_path, steps, unbroken):
    run_killed(tmp_path, 4 * EPOCH + 2)
    assert same(run(tmp_path / "fit"), unbroken[0])
    assert len(steps) == 2 * CHUNK - 4 * EPOCH


@pytest.mark.slow
def test_a_fit_that_ends_in_its_newton_steps_goes_on_before_the_last_epoch(tmp_path, steps, monkeypatch, unbroken):
    def failing(*_):
        raise RuntimeError("killed")

    monkeypatch.setattr("cosprobe.probes.checkpoints.INTERVAL", 0.0)
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(logistic, "finished", failing)
        run(tmp_path)
    assert len(steps) == CHUNK
    assert same(run(tmp_path), unbroken[0])
    assert len(steps) == 2 * CHUNK + EPOCH


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"seed": 1}, {"lr": 0.5}, {"penalties": [0.01, 2.0]}])
def test_files_of_other_settings_are_not_used(left, tmp_path, steps, change):
    found = run(left, **change)
    assert len(steps) == 2 * CHUNK
    assert same(found, run(tmp_path / "fresh", **change))
    assert not (left / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["labels", "features", "split"])
def test_files_of_other_samples_are_not_used(left, tmp_path, steps, changed):
    source = planted()
    features, split, start = source.features.clone(), source.split.copy(), source.labels["start"].clone()
    if changed == "labels":
        start[0] = (start[0] + 1) % 5
    elif changed == "features":
        features[0, 0, 0, 0] += 1e-3
    else:
        split[0] = "test"
    samples = replace(source, features=features, split=split, labels=source.labels | {"start": start})
    found = run(left, samples)
    assert len(steps) == 2 * CHUNK
    assert same(found, run(tmp_path / "fresh", samples))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "again"), [("ckpt", CHUNK), ("safetensors", 2 * CHUNK - 2 * EPOCH)])
@pytest.mark.parametrize("damage", ["one bit", "cut", "empty"])
def test_damaged_files_are_not_trusted(left, steps, unbroken, kind, again, damage):
    (path,) = files(left, kind)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"one bit": data, "cut": data[: len(data) // 2], "empty": b""}[damage])
    assert same(run(left), unbroken[0])
    assert len(steps) == again


def test_checkpoints_cannot_run_code(tmp_path):
    ChecksumIO().save_checkpoint({"state": print}, tmp_path / "a.ckpt")
    assert ChecksumIO.intact(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=r"/a\.ckpt'.*damaged.*delete it") as caught:
        ChecksumIO().load_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.slow
@pytest.mark.parametrize("change", [
    lambda saved: [1, 2],
    lambda saved: {name: saved[name] for name in saved if name != "state_dict"},
    lambda saved: saved | {"state_dict": {f"old.{name}": values for name, values in saved["state_dict"].items()}},
    lambda saved: saved | {"state_dict": {name: values[..., :1] for name, values in saved["state_dict"].items()}},
], ids=["a list", "no state", "other names", "other shapes"])  # fmt: skip
def test_a_checkpoint_of_something_else_is_named(left, change):
    """Its checksum is right, so nobody has damaged it by accident."""
    (path,) = files(left, "ckpt")
    with unchecked():
        ChecksumIO().save_checkpoint(change(ChecksumIO().load_checkpoint(path)), path)
    with pytest.raises(InputError, match=rf"{path.name}'.*delete it") as caught:
        run(left)
    assert "\n" not in str(caught.value)


def test_files_of_other_code_are_not_used(monkeypatch):
    asked = (planted(), ProbeConfig(**RECIPE), TrainerConfig(), 0)
    before = fingerprint(*asked)
    monkeypatch.setattr("cosprobe.probes.checkpoints.code_fingerprint", lambda: "other")
    assert fingerprint(*asked) != before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["newton", "ridge"])
def test_finished_chunks_of_other_kinds_are_kept(tmp_path, monkeypatch, kind):
    """The fit fails in its second chunk, and the next attempt fits only that one."""
    name = {"ridge": "fit_ridge", "newton": "newton_targets"}[kind]
    solver, calls = getattr(logistic, name), []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return solver(*args)

    whole = run(tmp_path / "whole", kind=kind)
    monkeypatch.setattr(logistic, name, failing)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, kind=kind)
    assert same(run(tmp_path, kind=kind), whole)
    assert len(calls) == 3


@pytest.mark.ddp
def test_two_processes_give_the_bank_of_one_also_after_they_were_killed(tmp_path, unbroken, steps):
    """With an uneven last batch and several chunks of cells. One process goes on, too."""
    assert processes.run_devices(main, tmp_path, 2, KILLED) == [-signal.SIGKILL] * 2
    assert len(files(tmp_path / "fit", "safetensors")) == len(files(tmp_path / "fit", "ckpt")) == 1
    one = run(Path(shutil.copytree(tmp_path / "fit", tmp_path / "one")))
    assert steps == [epoch for epoch in range(2, 6) for _ in range(EPOCH)]
    assert processes.run_devices(main, tmp_path, 2) == [0, 0]
    assert not (tmp_path / "fit" / "checkpoints").exists()
    (tmp_path / "whole").mkdir()
    assert processes.run_devices(main, tmp_path / "whole", 2) == [0, 0]
    killed, whole = (
        [torch.load(folder / f"values_{rank}.pt") for rank in range(2)] for folder in (tmp_path, tmp_path / "whole")
    )
    samples = planted()
    assert len(chunks(samples, TARGETS, ProbeConfig(**RECIPE))) == 2
    for target in TARGETS:
        alone = unbroken[0].decision(samples.features, target.name)
        assert torch.allclose(whole[0][target.name], alone, atol=1e-4)
        assert torch.allclose(one.decision(samples.features, target.name), alone, atol=1e-4)
        assert all(torch.equal(values[target.name], whole[0][target.name]) for values in (*killed, *whole))


def test_without_callbacks_the_fit_is_the_same_and_no_file_is_written(tmp_path, unbroken, monkeypatch):
    monkeypatch.setattr("cosprobe.probes.checkpoints.INTERVAL", 0.0)  # a checkpoint would be due after every epoch
    bank = fit(planted(), ProbeConfig(**RECIPE), TrainerConfig(callbacks=[], enable_progress_bar=False), tmp_path, 0)
    bank = bank.with_provenance(trainer=unbroken[0].provenance.trainer)
    assert same(bank, unbroken[0]) and not list(tmp_path.rglob("events*"))
    with pytest.raises(ValueError, match=r"trainer\.callbacks='curve'.*checkpoints, curves, resources"):
        TrainerConfig(callbacks=["curve"])
