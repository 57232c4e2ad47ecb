"""Adapters: only they are trained, diffusers loads them, and a store knows them from the bare model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from safetensors.torch import load_file

from cosprobe.config import AdapterConfig, FlowConfig, PipelineConfig
from cosprobe.minimodel.lora_training import train_adapter
from cosprobe.minimodel.recipe import families
from cosprobe.models.identity import fingerprint
from cosprobe.models.loading import load_pipeline
from cosprobe.tasks import Maze
from tests.examples.pipelines import cogvideox, save_wan, wan

CONFIG = AdapterConfig(
    families=["maze"], clips=[8], rank=2, flow=FlowConfig(stages=[[5, 3]], batch=4, lr=1e-2, muon_lr=0.0, compile=False)
)
TASKS = families(["maze"], Maze())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    save_wan(folder / "model")
    model = WanImageToVideoPipeline.from_pretrained(folder / "model")
    return folder / "model", train_adapter(model, CONFIG, TASKS, folder / "run", "32-true")


def test_only_the_adapters_are_trained(trained):
    model, adapter = trained
    weights = load_file(adapter / "pytorch_lora_weights.safetensors")
    assert len(weights) == 3 * (8 + 2) * 2  # blocks x layers x two factors
    assert all(".lora_A." in name or ".lora_B." in name for name in weights)
    assert all(2 in value.shape for value in weights.values())
    moved = [name for name, value in weights.items() if ".lora_B." in name and value.abs().max() > 0]
    assert len(moved) == 3 * (8 + 2)  # they start from zero


@pytest.mark.slow
def test_diffusers_loads_them_and_the_rest_is_untouched(trained):
    model, adapter = trained
    plain, adapted = (WanImageToVideoPipeline.from_pretrained(model) for _ in range(2))
    adapted.load_lora_weights(adapter)
    base = {name.replace(".base_layer", ""): value for name, value in adapted.transformer.state_dict().items()}
    assert all(torch.equal(value, base[name]) for name, value in plain.transformer.state_dict().items())
    inputs = torch.randn(1, 12, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 32, 64)
    with torch.no_grad():
        before, after = (p.transformer.eval()(*inputs, return_dict=False)[0] for p in (plain, adapted))
    assert (before - after).abs().max() > 1e-4
    ours = load_pipeline(PipelineConfig(path=str(model), lora=str(adapter))).transformer
    with torch.no_grad():
        torch.testing.assert_close(ours(*inputs, return_dict=False)[0], after)
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_a_store_knows_an_adapted_model_from_the_bare_one(trained):
    model, adapter = trained
    bare, adapted = PipelineConfig(path=str(model)), PipelineConfig(path=str(model), lora=str(adapter))
    assert fingerprint(*bare.parts) != fingerprint(*adapted.parts) == fingerprint(model, adapter)


def test_a_finished_run_is_not_trained_again(trained, monkeypatch):
    model, adapter = trained
    before = load_file(adapter / "pytorch_lora_weights.safetensors")
    monkeypatch.setattr("cosprobe.minimodel.flow_matching.FlowMatching.loss", None)
    again = train_adapter(WanImageToVideoPipeline.from_pretrained(model), CONFIG, TASKS, adapter.parent, "32-true")
    after = load_file(again / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"experiment\.layers=\['to_z'\]"):
        train_adapter(wan(), replace(CONFIG, layers=["to_z"]), TASKS, tmp_path, "32-true")
    with pytest.raises(ValueError, match=r"CogVideoXPipeline.*image-to-video"):
        train_adapter(cogvideox(), CONFIG, TASKS, tmp_path, "32-true")
    with pytest.raises(ValueError, match=r"experiment\.rank=0.*1"):
        replace(CONFIG, rank=0)
    with pytest.raises(ValueError, match=r"pipeline\.lora='nowhere'"):
        load_pipeline(PipelineConfig(lora="nowhere"))
