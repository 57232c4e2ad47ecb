"""Mochi 1. Blocks return (video, text)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cosprobe.models.architectures.protocol import Doubled, JointBlocks


class Mochi(Doubled, JointBlocks):
    """Adapter for Mochi. See `Architecture` for the methods."""

    pipelines = ("MochiPipeline",)
    transformers = ("MochiTransformer3DModel",)
    scales = ("vae_temporal_scale_factor", "vae_spatial_scale_factor")

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        return list(transformer.transformer_blocks)

    def decode(self, pipeline: Any, latent: Tensor, frames: int) -> Tensor:
        config, latent = pipeline.vae.config, latent.to(pipeline.vae.dtype)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            latent = latent / config.scaling_factor
        else:
            mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1).to(latent) for values in (mean, std))
            latent = latent * std / config.scaling_factor + mean
        return pipeline.vae.decode(latent, return_dict=False)[0]
