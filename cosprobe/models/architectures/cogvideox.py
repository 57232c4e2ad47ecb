"""CogVideoX. The frame axis of latents comes before the channel axis, and blocks return (video, text)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cosprobe.models.architectures.protocol import Architecture


class CogVideoX(Architecture):
    """Adapter for CogVideoX. See `Architecture` for the methods."""

    transformers = ("CogVideoXTransformer3DModel",)
    layout = "b f c h w"

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        return list(transformer.transformer_blocks)

    def video_tokens(self, output: Any) -> Tensor:
        return output[0]

    def with_video_tokens(self, output: Any, tokens: Tensor) -> Any:
        return (tokens, *output[1:])

    def to_decoder(self, vae: nn.Module, latent: Tensor) -> Tensor:
        return (latent / vae.config.scaling_factor).transpose(1, 2)
