"""Real diffusers classes at toy size with random weights: what the capture contracts are tested on."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel

from cosprobe.config import SAMPLING, PipelineConfig
from cosprobe.minimodel.encoding import TEXT_WIDTH, build_text
from cosprobe.models.loading import freeze

PROMPT = "draw a red trail from the green start through the corridors to a blue exit that can be reached"
CONFIG = PipelineConfig(steps=3, guidance=1.0, frames=5, prompt_tokens=32)
SAMPLED_WITH = {"steps": 20, "guidance": 1.0, "frames": 5, "prompt_tokens": 32, "dtype": "float32"}


def _vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True], patch_size=2,
        in_channels=12, out_channels=12, latents_mean=[0.1] * 4, latents_std=[0.5] * 4,
    )  # fmt: skip


def _transformer(layers: int = 3) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 1, 1), num_attention_heads=2, attention_head_dim=12, in_channels=12, out_channels=4,
        text_dim=TEXT_WIDTH, freq_dim=16, ffn_dim=32, num_layers=layers, rope_max_seq_len=32,
    )  # fmt: skip


def wan(experts: int = 1) -> WanImageToVideoPipeline:
    """A Wan image-to-video pipeline; with two experts it switches at sigma 0.875, like Wan2.2-I2V-A14B."""
    torch.manual_seed(0)
    tokenizer, encoder = build_text([PROMPT, ""], seed=0)
    second = {"transformer_2": _transformer(), "boundary_ratio": 0.875} if experts == 2 else {}
    pipeline = WanImageToVideoPipeline(
        tokenizer, encoder, _vae(), FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=_transformer(), **second
    )
    pipeline.set_progress_bar_config(disable=True)
    return freeze(pipeline)


def save_wan(folder: Path, experts: int = 1) -> Path:
    """Saves `wan` as a model that says how it is sampled."""
    wan(experts).save_pretrained(folder)
    (folder / SAMPLING).write_text(json.dumps(SAMPLED_WITH))
    return folder


def cogvideox() -> CogVideoXPipeline:
    """Guidance as one doubled batch (unconditional half first), blocks that return (video, text)."""
    torch.manual_seed(0)
    tokenizer, _ = build_text([PROMPT, ""], seed=0)
    encoder = T5EncoderModel(T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4,
    )  # fmt: skip
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=2, sample_width=4, sample_height=4, sample_frames=9, patch_size=2,
        max_text_seq_length=32, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    pipeline = CogVideoXPipeline(tokenizer, encoder, vae, transformer, CogVideoXDDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return freeze(pipeline)
