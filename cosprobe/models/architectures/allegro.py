"""Allegro. Its autoencoder works with tiling only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from cosprobe.errors import InputError
from cosprobe.models.architectures.protocol import SIDE, Doubled

LATENT_FRAME = 4  # frames of a video in one of its latent


class Allegro(Doubled):
    """Adapter for Allegro. See `Architecture` for the methods."""

    pipelines = ("AllegroPipeline",)
    transformers = ("AllegroTransformer3DModel",)

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        return list(transformer.transformer_blocks)

    def latent_frames(self, pipeline: Any, frames: int) -> int:
        return frames // self.scale(pipeline).frames

    def check_video(self, pipeline: Any, transformer: nn.Module, sides: Sequence[int], frames: int) -> None:
        """Raises InputError for videos that the tiles of the autoencoder do not cover: the rest would be grey."""
        vae, (height, width) = pipeline.vae, sides
        names = ("pipeline.frames", "height of the images", "width of the images")
        for name, length, tile, stride in zip(names, (frames, height, width), vae.kernel, vae.stride, strict=True):
            if length < tile or (length - tile) % stride:
                raise InputError(
                    f"{name}: {length}, expected {tile} + {stride}k for the autoencoder of this model, such as "
                    f"{tile + 2 * stride}"
                )
        if any(length % self.side(pipeline, transformer) for length in sides):
            raise InputError(f"images: {height} x {width} pixels, expected multiples of {SIDE} for this model")

    def default_frames(self, config: Mapping[str, Any]) -> int:
        return config["sample_frames"] * LATENT_FRAME

    def arguments(self, pipeline: Any) -> dict[str, Any]:
        """Prompts are given to the tokenizer as they are: cleaning needs a library, and changes them if it is there."""
        return {"clean_caption": False}

    def prepare(self, pipeline: Any) -> None:
        pipeline.vae.enable_tiling()
        pipeline.vae.enable_slicing()

    def decode(self, pipeline: Any, latent: Tensor, frames: int) -> Tensor:
        return pipeline.decode_latents(latent.to(pipeline.vae.dtype))[:, :, :frames]
