"""HunyuanVideo. It has two lists of blocks, and the blocks of both return (video, text)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cosprobe.models.architectures.protocol import Architecture


class HunyuanVideo(Architecture):
    """Adapter for HunyuanVideo. See `Architecture` for the methods."""

    transformers = ("HunyuanVideoTransformer3DModel",)

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    def video_tokens(self, output: Any) -> Tensor:
        return output[0]

    def with_video_tokens(self, output: Any, tokens: Tensor) -> Any:
        return (tokens, *output[1:])
