"""The recipe at toy size: every stage really trains, and a killed run ends where an unbroken one would."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from safetensors.torch import load_file

from cosprobe.autoencoding import AutoencoderConfig, AutoencoderTraining, ClipBatches, to_model_range
from cosprobe.flowmatching import FlowBatches, FlowConfig, FlowMatching, LatentClips
from cosprobe.mini import TEXT_TOKENS, MiniConfig, build_text, embed, train_mini
from cosprobe.tasks import Maze
from tests.tiny import wan

TASK = Maze(frames=5)
CONFIG = MiniConfig(
    autoencoder=AutoencoderConfig(base_dim=4, z_dim=4, dim_mult=[1, 1, 1], stages=[[1, 2, 2], [5, 2, 2]]),
    flow=FlowConfig(steps=4, batch=4),
    clips=12,
    layers=2,
    heads=2,
    head_dim=12,
    ffn=16,
)


def weights(folder):
    return {name: load_file(next((folder / name).glob("*.safetensors"))) for name in ("transformer", "vae")}


@pytest.mark.slow
def test_a_killed_run_ends_where_an_unbroken_one_would(tmp_path, monkeypatch):
    whole = train_mini(CONFIG, TASK, tmp_path / "whole", "32-true", every=1)
    original = {kind: kind.training_step for kind in (AutoencoderTraining, FlowMatching)}

    for kind in original:  # once in the middle of each stage

        def killed(self, batch, index, kind=kind):
            if self.global_step == 2:
                raise ConnectionError("killed")
            return original[kind](self, batch, index)

        monkeypatch.setattr(kind, "training_step", killed)
        with pytest.raises(ConnectionError):
            train_mini(CONFIG, TASK, tmp_path / "broken", "32-true", every=1)
        monkeypatch.setattr(kind, "training_step", original[kind])
    assert not (tmp_path / "broken" / "pipeline").exists()
    broken = train_mini(CONFIG, TASK, tmp_path / "broken", "32-true", every=1)
    for name, state in weights(whole).items():
        for key, value in weights(broken)[name].items():
            torch.testing.assert_close(value, state[key], msg=f"{name} {key}")
    pipeline = WanImageToVideoPipeline.from_pretrained(broken)
    assert pipeline.transformer.dtype == torch.float32
    assert json.loads((broken / "recipe.json").read_text())["settings"]["clips"] == 12


def test_batches_depend_on_their_number_alone():
    problems = TASK.problems("model", 6)
    whole = list(ClipBatches(TASK, problems, CONFIG.autoencoder, 0, 0))
    late = list(ClipBatches(TASK, problems, CONFIG.autoencoder, 0, 3))
    assert [tuple(b.shape) for b in whole] == [(2, 3, 1, 64, 64)] * 2 + [(2, 3, 5, 64, 64)] * 2
    assert len(late) == 1 and torch.equal(late[0], whole[3])
    latents = (torch.randn(10, 2, 2, 1, 1) for _ in range(2))
    clips = LatentClips(
        *latents,
        torch.ones(10, 2, 1, 1, dtype=torch.uint8),
        torch.randn(10, 3, 4),
        torch.zeros(3, 4),
        torch.tensor([1, 2] * 5),
    )
    stream, resumed = iter(FlowBatches(clips, 4, 0, 0)), iter(FlowBatches(clips, 4, 0, 3))
    batches = [next(stream) for _ in range(5)]
    for step in (3, 4):
        again = next(resumed)
        assert all(torch.equal(again[name], batches[step][name]) for name in again)
    assert not torch.equal(batches[0]["noise"], batches[1]["noise"])


def test_an_epoch_holds_every_clip_as_often_as_it_is_repeated():
    number = torch.arange(6.0)[:, None, None, None, None].expand(-1, 1, 1, 1, 1)
    active, repeats = torch.ones(6, 1, 1, 1, dtype=torch.uint8), torch.tensor([1, 1, 1, 3, 3, 3])
    clips = LatentClips(number, number, active, torch.zeros(6, 2, 4), torch.zeros(2, 4), repeats)
    stream = iter(FlowBatches(clips, 4, 0, 0))
    seen = torch.cat([next(stream)["latent"].flatten() for _ in range(3)])
    assert seen.long().bincount().tolist() == repeats.tolist()


def test_clips_are_scaled_to_the_models_range():
    frames = np.zeros((2, 5, 8, 8, 3), dtype=np.uint8)
    frames[1, 2, 3, 4, 1] = 255
    clips = to_model_range(frames)
    assert (
        clips.shape == (2, 3, 5, 8, 8)
        and clips.min() == -1
        and clips[1, 1, 2, 3, 4] == 1
        and clips.sum() == 2 - clips.numel()
    )


def test_embeddings_are_the_pipelines_own():
    pipeline = wan()
    prompt = TASK.problems("model", 1)[0].prompt
    ours = embed([prompt, ""], *build_text([prompt, ""], seed=0))
    theirs, _ = pipeline.encode_prompt([prompt, ""], do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS)
    assert not torch.allclose(ours[0], ours[1])
    pipeline.tokenizer, pipeline.text_encoder = build_text([prompt, ""], seed=0)
    theirs, _ = pipeline.encode_prompt([prompt, ""], do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS)
    torch.testing.assert_close(ours, theirs)


class Exact(torch.nn.Module):
    """A transformer that knows the velocity of one clip."""

    def __init__(self, clean):
        super().__init__()
        self.clean, self.scale = clean, torch.nn.Parameter(torch.ones(()))

    def forward(self, noisy, timestep, prompt, return_dict):
        sigma = (timestep / 1000)[:, None, None, None, None]
        latent = noisy[:, : self.clean.shape[1]]
        return (self.scale * (latent - self.clean) / sigma,)


def test_the_loss_is_zero_for_the_true_velocity_and_counts_every_frame():
    clean = torch.randn(1, 3, 2, 4, 4)
    active = torch.zeros(4, 2, 4, 4, dtype=torch.uint8)
    active[:, :, :2] = 1
    prompt, empty = torch.zeros(4, 2, 3), torch.zeros(2, 3)
    clips = LatentClips(
        clean.expand(4, -1, -1, -1, -1),
        torch.zeros(4, 1, 2, 4, 4),
        active,
        prompt,
        empty,
        torch.ones(4, dtype=torch.int64),
    )
    batch = next(iter(FlowBatches(clips, 4, 0, 0)))

    def loss(frame, row):
        wrong = torch.zeros(2, 4, 4)
        wrong[frame, row] = 1.0
        return float(FlowMatching(Exact(clean + wrong), clips, FlowConfig(batch=4), seed=0).loss(batch))

    assert FlowMatching(Exact(clean), clips, FlowConfig(batch=4), seed=0).loss(batch) < 1e-6
    # frame 0 counts once wherever the mistake is; in later frames what may change counts five times
    assert loss(0, 0) == pytest.approx(loss(0, 3), rel=1e-4) == pytest.approx(loss(1, 3), rel=1e-4)
    assert loss(1, 0) == pytest.approx(5 * loss(1, 3), rel=1e-4)
