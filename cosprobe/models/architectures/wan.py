"""Wan 2.1 and 2.2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cosprobe.models.architectures.protocol import Architecture


class Wan(Architecture):
    """Adapter for Wan 2.1 and 2.2. See `Architecture` for the methods."""

    transformers = ("WanTransformer3DModel",)

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        return list(transformer.blocks)

    def one_problem_a_call(self, transformer: nn.Module) -> bool:
        """True for Wan 2.1 image-to-video models: the pipeline repeats one CLIP image embedding over the batch."""
        return transformer.config.get("image_dim", None) is not None

    def to_decoder(self, vae: nn.Module, latent: Tensor) -> Tensor:
        statistics = (vae.config.latents_mean, vae.config.latents_std)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1).to(latent) for values in statistics)
        return latent * std + mean
