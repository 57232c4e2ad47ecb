"""Sampling under Lightning's trainer: what is sampled, by whom, and what happens when it ends early."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from cosprobe.activations.predicting import FrozenSampling, Shard, announce, predict_shards
from cosprobe.activations.sampler import Sampler
from cosprobe.activations.store import ActivationStore
from cosprobe.config import PipelineConfig, TrainerConfig
from cosprobe.errors import InputError
from cosprobe.tasks import MazeConfig
from tests.examples.pipelines import wan


class Doubling(FrozenSampling):
    """Instead of sampling, doubles the content of a shard, and keeps what it was called with."""

    def __init__(self, sampler):
        super().__init__(sampler)
        self.seen = []

    def predict_step(self, batch, index):
        self.seen.append(batch.index)
        assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        return {"x": 2 * torch.tensor(batch.content)}, {"steps": [0]}


@pytest.fixture(scope="module")
def sampler():
    return Sampler(wan(), PipelineConfig(steps=1), MazeConfig().build(), TrainerConfig(accelerator="cpu"))


def shards(folder, count=5):
    store = ActivationStore(folder, {"what": "doubled"}, count)
    announce(store, 100, "numbers")
    return store, [Shard(store, i, [float(i), float(i + 1)]) for i in range(count)]


def test_missing_shards_are_sampled_once_and_the_store_is_completed(sampler, tmp_path):
    store, parts = shards(tmp_path / "store")
    predict_shards(module := Doubling(sampler), parts, sampler.trainer)
    assert module.seen == [0, 1, 2, 3, 4] and store.complete
    assert store.read()[0]["x"].tolist() == [2.0 * n for i in range(5) for n in (i, i + 1)]
    (store.folder / "shard-00003.safetensors").unlink()
    predict_shards(module := Doubling(sampler), parts, sampler.trainer)
    assert module.seen == [3] and store.complete
    predict_shards(module := Doubling(sampler), parts, sampler.trainer)
    assert module.seen == []


def test_several_stores_are_filled_by_one_call(sampler, tmp_path):
    (first, parts), (second, others) = shards(tmp_path / "a", 2), shards(tmp_path / "b", 3)
    predict_shards(module := Doubling(sampler), [*parts, *others], sampler.trainer)
    assert module.seen == [0, 1, 0, 1, 2] and first.complete and second.complete


def test_a_limit_ends_sampling_and_the_next_call_continues(sampler, tmp_path):
    store, parts = shards(tmp_path / "store")
    limited = TrainerConfig(accelerator="cpu", limit_predict_batches=2)
    with pytest.raises(InputError, match=r"limit_predict_batches=2: 3 of 5 shards"):
        predict_shards(Doubling(sampler), parts, limited)
    assert not store.complete
    predict_shards(module := Doubling(sampler), parts, sampler.trainer)
    assert module.seen == [2, 3, 4] and store.complete


def test_the_pipeline_is_no_submodule_and_has_to_be_frozen(sampler, tmp_path):
    module = Doubling(sampler)
    assert isinstance(module, L.LightningModule) and not list(module.parameters()) and not list(module.children())
    thawed = wan()
    thawed.transformer.requires_grad_(True)
    _, parts = shards(tmp_path / "store")
    with pytest.raises(InputError, match="transformer.*frozen"):
        predict_shards(Doubling(Sampler(thawed, sampler.config, sampler.task, sampler.trainer)), parts, sampler.trainer)


def test_an_error_keeps_what_was_written(sampler, tmp_path):
    class Failing(Doubling):
        def predict_step(self, batch, index):
            if batch.index == 2:
                raise InputError("shard=2: no")
            return super().predict_step(batch, index)

    store, parts = shards(tmp_path / "store")
    with pytest.raises(InputError, match="shard=2"):
        predict_shards(Failing(sampler), parts, sampler.trainer)
    assert store.missing() == [2, 3, 4]


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
    _, parts = shards(tmp_path / "store")
    with pytest.raises(InputError, match=named):
        predict_shards(Doubling(sampler), parts, TrainerConfig(**settings))
