"""Wan 2.1 and 2.2, and SkyReels-V2, which has the same loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from cosprobe.models.architectures.protocol import BYTE, Architecture
from cosprobe.wrapping import wrapped

IMAGE_TEXT_TOKENS = 512


@dataclass(frozen=True)
class _PerImage:
    """Embeddings of the images of a batch, in place of those of one image that the pipeline repeats over the batch."""

    embeddings: Tensor

    def repeat(self, *_: int) -> Tensor:
        """The embeddings, as they are: there is one for every sample already."""
        return self.embeddings


class Wan(Architecture):
    """Adapter for Wan 2.1 and 2.2. See `Architecture` for the methods."""

    pipelines = ("WanPipeline", "WanImageToVideoPipeline")
    transformers = ("WanTransformer3DModel",)

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        return list(transformer.blocks)

    def keeps_first_frame(self, pipeline: Any) -> bool:
        """True for image-to-video with Wan2.2-TI2V-5B."""
        return self.takes_image(pipeline) and bool(pipeline.config.get("expand_timesteps", False))

    def needed_tokens(self, config: Mapping[str, Any]) -> int | None:
        """512 where the model attends to a CLIP embedding of the image: attention divides its inputs at this number."""
        return IMAGE_TEXT_TOKENS if config.get("image_dim") is not None else None

    @contextmanager
    def batched_images(self, pipeline: Any) -> Iterator[list[Tensor]]:
        """`prepare_latents` encodes the whole batch of images once for every noise generator, and the CLIP embedding of
        the batch is repeated as if it were of one image. Here the batch is encoded once (equal neighbouring images as
        one), and each generator and each sample gets its own image.

        The noise of a sample does not depend on its batch. Its image condition depends on the batch up to rounding.
        """
        held, encoded = list[Tensor](), list[Tensor]()
        if not self.takes_image(pipeline):
            yield held
            return

        def prepare(original: Callable, images: Tensor, batch: int, *arguments: Any) -> tuple[Tensor, ...]:
            each = images.repeat_interleave(batch // len(images), dim=0)  # videos of one prompt are neighbours
            noise, condition, *mask = original(each, batch, *arguments)
            if len(condition) != len(noise):
                raise RuntimeError(f"the pipeline encoded {len(condition)} of {len(noise)} images: expected all")
            held.append(condition)
            return (noise, condition, *mask)

        def one_by_one(encode: Callable, videos: Tensor) -> Any:
            if len(videos) == 1:
                return encode(videos)
            if not encoded:
                new = torch.tensor([i == 0 or not torch.equal(videos[i], videos[i - 1]) for i in range(len(videos))])
                encoded.extend(encode(videos[new]).latent_dist.mode()[new.cumsum(0) - 1].split(1))
            return SimpleNamespace(latents=encoded.pop(0))

        def embed(original: Callable, images: Tensor, *arguments: Any) -> _PerImage:
            return _PerImage(original(images * BYTE, *arguments))  # the processor of CLIP takes values up to 255

        with (
            wrapped(pipeline, "prepare_latents", prepare),
            wrapped(pipeline.vae, "encode", one_by_one),
            wrapped(pipeline, "encode_image", embed),
        ):
            yield held

    def decode(self, pipeline: Any, latent: Tensor, frames: int) -> Tensor:
        vae = pipeline.vae
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1).to(latent.device, vae.dtype)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return vae.decode(latent.to(vae.dtype) / (1 / std) + mean, return_dict=False)[0]


class SkyReelsV2(Wan):
    """Adapter for SkyReels-V2, without diffusion forcing."""

    pipelines = ("SkyReelsV2Pipeline", "SkyReelsV2ImageToVideoPipeline")
    transformers = ("SkyReelsV2Transformer3DModel",)
