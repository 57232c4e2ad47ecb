"""Symptoms from public reports about diffusers and transformers: what is loaded and sampled is right, or one line says
what is wrong.

Numbers with # are issues of diffusers, unless another project is named. Those of capture are in
tests/activations/test_reports.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from transformers import UMT5EncoderModel

from cosprobe.config import PipelineConfig
from cosprobe.errors import InputError
from cosprobe.models import architecture, decode, load_pipeline, sample
from cosprobe.models.schedulers import StepCall, clean_estimate
from tests.conformity.checks import Case
from tests.examples.adapters import adapter
from tests.examples.pipelines import CONFIG, PROMPT, save_wan, wan

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def config(folder: Path, **more: Any) -> PipelineConfig:
    return replace(CONFIG, path=str(folder), guidance=1.0, **more)


# Adapters of two experts: #12074


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    return save_wan(tmp_path_factory.mktemp("model") / "two", experts=2)


@pytest.mark.slow
def test_adapters_that_only_the_first_of_two_experts_gets(two, tmp_path):
    path = str(adapter(tmp_path / "adapter"))
    with pytest.raises(InputError, match=r"pipeline\.lora_2: .*pipeline\.lora"):
        load_pipeline(config(two, lora=path))
    bare, low, both = (
        load_pipeline(config(two, **given)) for given in ({}, {"lora_2": path}, {"lora": path, "lora_2": path})
    )
    inputs = torch.randn(1, 12, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 32, 64)
    for pipeline, changed in ((low, (False, True)), (both, (True, True))):
        for name, change in zip(("transformer", "transformer_2"), changed, strict=True):
            with torch.no_grad():
                before, after = (getattr(p, name)(*inputs, return_dict=False)[0] for p in (bare, pipeline))
            assert ((before - after).abs().max() > 1e-3) == change


# Prompts that mean nothing: transformers #43880, #43992


def test_the_embeddings_of_a_text_encoder_are_tied(copied):
    encoder = load_pipeline(config(copied)).text_encoder
    assert encoder.encoder.embed_tokens.weight is encoder.shared.weight


def test_a_version_of_transformers_that_does_not_tie_embeddings(copied, monkeypatch):
    """As 5.0 to 5.2: the embeddings of the tokens are random numbers, and no file has them."""
    monkeypatch.setattr(UMT5EncoderModel, "_tied_weights_keys", {})
    with pytest.raises(InputError, match=r"text_encoder: encoder\.embed_tokens\.weight"):
        load_pipeline(config(copied))


# Families: #13588, #13582, #12039, #12041


def test_a_pipeline_that_takes_guiders():
    pipeline = wan()
    pipeline.__class__ = diffusers.HunyuanVideo15Pipeline
    with pytest.raises(InputError, match=r"HunyuanVideo15Pipeline .*HunyuanVideoPipeline"):
        architecture(pipeline)


def test_a_model_for_images_that_is_loaded_as_one_for_text():
    """The files of Wan2.2-TI2V-5B name WanPipeline, which takes no image."""
    text, image = (Case(name, guided=False).pipeline for name in ("wan22_ti2v_t2v", "wan22_ti2v_i2v"))
    assert architecture(image).takes_image(image) and architecture(image).keeps_first_frame(image)
    assert not architecture(text).takes_image(text) and not architecture(text).keeps_first_frame(text)


# Noise levels: #13706, #13243, #14036, #10266


@pytest.mark.parametrize(
    ("scheduler", "levels"),
    [
        (FlowMatchEulerDiscreteScheduler(shift=3.0), {"timesteps": [900.0, 500.0, 100.0]}),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), {"sigmas": [0.9, 0.5, 0.1]}),
        (FlowMatchEulerDiscreteScheduler(), {"timesteps": [999.0, 600.0, 2.0], "sigmas": [0.9, 0.5, 0.1]}),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), {"timesteps": [900.0, 900.0, 100.0]}),
        (FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.1), {"num_inference_steps": 3}),
        (UniPCMultistepScheduler(**FLOW, flow_shift=3.0), {"sigmas": np.array([0.9, 0.5, 0.1])}),
        (UniPCMultistepScheduler(**FLOW, flow_shift=12.0), {"num_inference_steps": 120}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_timesteps_that_disagree_with_noise_levels(scheduler, levels):
    """The noise in a latent is what the scheduler left there, whatever timestep the model is told."""
    scheduler.set_timesteps(**levels)
    scheduler.set_begin_index(0)
    clean, noise = torch.randn(2, 1, 2, 3)
    noisy = (1 - scheduler.sigmas[0]) * clean + scheduler.sigmas[0] * noise
    for timestep in scheduler.timesteps:
        call = StepCall(noise - clean, timestep, noisy)
        torch.testing.assert_close(clean_estimate(scheduler, call), clean, atol=1e-4, rtol=0)
        noisy = scheduler.step(*call, return_dict=False)[0]
    torch.testing.assert_close(noisy, clean, atol=1e-4, rtol=0)


# Offloading: #13881, #14328


def test_latents_are_decoded_where_the_autoencoder_runs():
    pipeline, images = wan(), torch.rand(1, 3, 32, 32)
    run = replace(CONFIG, guidance=1.0)
    latents = sample(pipeline, run, images, [PROMPT], [0], output_type="latent")
    expected = decode(pipeline, latents, run.frames)
    accelerate.cpu_offload(pipeline.vae, torch.device("cpu"))
    assert (decode(pipeline, latents, run.frames) == expected).all()
