"""Sampling under Lightning's trainer: what is sampled, by whom, and what happens when it ends early."""

from __future__ import annotations

import os
import re
import signal
import sys
import time

import lightning as L
import pytest
import torch

from cosprobe.activations import predicting
from cosprobe.activations.predicting import FrozenSampling, Shard, announce, predict_shards
from cosprobe.activations.sampler import Sampler
from cosprobe.activations.store import ActivationStore
from cosprobe.command import command
from cosprobe.config import PipelineConfig, TrainerConfig, TrainRun
from cosprobe.errors import InputError
from cosprobe.runtime import launch, rank_and_world
from cosprobe.tasks import MazeConfig
from tests.examples import processes
from tests.examples.pipelines import wan

NAMES = list(map(str, range(10)))
TRAINER = TrainerConfig(accelerator="cpu")


class Doubling(FrozenSampling):
    """Instead of sampling, doubles the content of a shard, and keeps what it was called with."""

    def __init__(self, sampler):
        super().__init__(sampler)
        self.seen = []

    def predict_step(self, batch, index):
        self.seen.append(batch.content[0])
        assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        return {"x": 2 * torch.tensor(batch.content)}, {"steps": [0]}


@pytest.fixture(scope="module")
def sampler():
    return Sampler(
        wan(), PipelineConfig(steps=1, guidance=1.0, frames=5, prompt_tokens=32), MazeConfig().build(), TRAINER
    )


def shards(folder, count=5):
    """A store, and the shards that it lacks: of two numbers each, named by them."""
    store = ActivationStore(folder, {"what": "doubled"})
    names = NAMES[: 2 * count]
    missing = store.missing(names)
    announce(store, names, len(missing), 100, "numbers")
    pairs = [names[i : i + 2] for i in range(0, len(names), 2)]
    return store, [Shard(store, {"": two}, [float(two[0]), float(two[1])]) for two in pairs if two[0] in missing]


def predict(module, *parts, trainer=None):
    """Samples what is missing in stores of so many shards."""
    asked = [(store, NAMES[: 2 * count]) for store, _, count in parts]
    predict_shards(module, [shard for _, lacking, _ in parts for shard in lacking], asked, trainer or TRAINER)
    return module.seen


def test_missing_shards_are_sampled_once_and_the_store_is_completed(sampler, tmp_path):
    store, lacking = shards(tmp_path / "store")
    assert predict(Doubling(sampler), (store, lacking, 5)) == [0, 2, 4, 6, 8] and store.complete(NAMES)
    assert store.read()[0]["x"].tolist() == [2.0 * n for n in range(10)]
    lacking[3].store.path(lacking[3].rows).unlink()
    assert predict(Doubling(sampler), (*shards(tmp_path / "store"), 5)) == [6] and store.complete(NAMES)
    assert predict(Doubling(sampler), (*shards(tmp_path / "store"), 5)) == []


def test_several_stores_are_filled_by_one_call(sampler, tmp_path):
    first, second = (*shards(tmp_path / "a", 2), 2), (*shards(tmp_path / "b", 3), 3)
    assert predict(Doubling(sampler), first, second) == [0, 2, 0, 2, 4]
    assert first[0].complete(NAMES[:4]) and second[0].complete(NAMES[:6])


def test_a_limit_ends_sampling_and_the_next_call_continues(sampler, tmp_path):
    store, lacking = shards(tmp_path / "store")
    limited = TrainerConfig(accelerator="cpu", limit_predict_batches=2)
    with pytest.raises(InputError, match=r"limit_predict_batches=2: 3 of 5 shards"):
        predict(Doubling(sampler), (store, lacking, 5), trainer=limited)
    assert not store.complete(NAMES[:4])
    assert predict(Doubling(sampler), (*shards(tmp_path / "store"), 5)) == [4, 6, 8] and store.complete(NAMES)


def test_the_pipeline_is_no_submodule_and_has_to_be_frozen(sampler, tmp_path):
    module = Doubling(sampler)
    assert isinstance(module, L.LightningModule) and not list(module.parameters()) and not list(module.children())
    thawed = wan()
    thawed.transformer.requires_grad_(True)
    module = Doubling(Sampler(thawed, sampler.config, sampler.task, sampler.trainer))
    with pytest.raises(InputError, match="transformer.*frozen"):
        predict(module, (*shards(tmp_path / "store"), 5))


def test_an_error_keeps_what_was_written(sampler, tmp_path):
    class Failing(Doubling):
        def predict_step(self, batch, index):
            if batch.content[0] == 2:
                raise InputError("shard=2: no")
            return super().predict_step(batch, index)

    store, lacking = shards(tmp_path / "store")
    with pytest.raises(InputError, match="shard=2"):
        predict(Failing(sampler), (store, lacking, 5))
    assert store.missing(NAMES) == NAMES[2:]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"accelerator": "gpu", "devices": "99"}, "trainer.accelerator='gpu', trainer.devices='99'"),
        ({"accelerator": "abacus"}, "trainer.accelerator='abacus'"),
        ({"accelerator": "cpu", "devices": "0"}, "trainer.devices='0'"),
        ({"accelerator": "cpu", "devices": "x"}, "trainer.devices='x'"),
        ({"accelerator": "cpu", "strategy": "magic"}, "trainer.strategy='magic'"),
    ],
)
def test_devices_that_do_not_exist_are_named(sampler, tmp_path, settings, named):
    with pytest.raises(InputError, match=named):
        predict(Doubling(sampler), (*shards(tmp_path / "store"), 5), trainer=TrainerConfig(**settings))


def two_devices(folder, killed):
    """One of two processes that sample with `Trainer.predict`; one of them is killed while it does, if not None."""

    class Slow(Doubling):
        def predict_step(self, batch, index):
            if index == 1 and rank_and_world()[0] == killed:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.1)
            return super().predict_step(batch, index)

    def body(run):
        trainer = TrainerConfig(accelerator="cpu", devices="2", timeout=5, enable_progress_bar=False)
        launch(trainer)
        module = Slow(Sampler(wan(), PipelineConfig(steps=1), MazeConfig().build(), trainer))
        predict(module, (*shards(folder / "store"), 5), trainer=trainer)

    log = os.open(folder / f"log-{os.environ['LOCAL_RANK']}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)
    sys.exit(command(TrainRun, body, "", []))


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.docs)])
def test_when_one_of_two_processes_is_killed_the_other_ends_in_one_line_and_the_next_continues(
    sampler, tmp_path, killed
):
    codes = processes.run_devices(two_devices, tmp_path, killed)
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] == 2
    said = (tmp_path / f"log-{1 - killed}").read_text()
    assert "Traceback" not in said and said.count("error: ") == 1, said
    assert re.search("error: .*(trainer.timeout|another process).*the same command continues", said), said
    store, lacking = shards(tmp_path / "store")
    assert 0 < len(lacking) < 5  # what both have written stays
    predict(Doubling(sampler), (store, lacking, 5))
    assert store.complete(NAMES) and store.read()[0]["x"].tolist() == [2.0 * n for n in range(10)]


def test_shards_of_another_process_are_not_waited_for_without_end(sampler, tmp_path, monkeypatch):
    store, lacking = shards(tmp_path / "store")
    monkeypatch.setattr("cosprobe.activations.predicting.rank_and_world", lambda: (0, 2))
    monkeypatch.setattr("cosprobe.activations.predicting.POLL", 0.01)
    with pytest.raises(InputError, match=r"no new shard in 0\.2 s \(trainer\.timeout\); the same command continues"):
        predicting._complete(lacking, [(store, NAMES)], 0.2)
