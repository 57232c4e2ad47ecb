"""LTX-Video. The loop keeps latents as tokens, and the transformer gets their grid as arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from cosprobe.models.architectures.protocol import Doubled, TokenGrid


class LTX(Doubled):
    """Adapter for LTX-Video. See `Architecture` for the methods."""

    pipelines = ("LTXPipeline", "LTXImageToVideoPipeline")
    transformers = ("LTXVideoTransformer3DModel",)
    scales = ("vae_temporal_compression_ratio", "vae_spatial_compression_ratio")

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        return list(transformer.transformer_blocks)

    def token_grid(self, transformer: nn.Module, latent: Tensor, call: Mapping[str, Any]) -> TokenGrid:
        return TokenGrid(call["num_frames"], call["height"], call["width"])

    def keeps_first_frame(self, pipeline: Any) -> bool:
        return self.takes_image(pipeline)

    def unpacked(self, latent: Tensor, grid: TokenGrid) -> Tensor:
        """Patches have one value. The image-to-video pipeline gives the scheduler latents that it has unpacked."""
        if latent.ndim == 5:
            return latent
        return rearrange(latent, "b (f h w) c -> b c f h w", f=grid.frames, h=grid.rows)

    def decode(self, pipeline: Any, latent: Tensor, frames: int) -> Tensor:
        """A decoder with timesteps gets 0, which is the default of the pipelines: no noise is added.

        A decoder that draws noise of its own draws the same for every sample.
        """
        vae = pipeline.vae
        latent = pipeline._denormalize_latents(latent, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
        latent = latent.to(vae.dtype)
        time = latent.new_zeros(len(latent)) if vae.config.timestep_conditioning else None
        if not self.draws(pipeline):
            return vae.decode(latent, time, return_dict=False)[0]
        videos = []
        for one in latent.split(1):
            with torch.random.fork_rng([one.device.index] if one.is_cuda else []):
                torch.manual_seed(0)
                videos.append(vae.decode(one, None if time is None else time[:1], return_dict=False)[0])
        return torch.cat(videos)

    def draws(self, pipeline: Any) -> bool:
        """Whether the decoder draws noise."""
        inject = pipeline.vae.config.decoder_inject_noise
        return any(inject) if isinstance(inject, tuple | list) else bool(inject)

    def decodes_itself(self, pipeline: Any) -> bool:
        """The pipelines give a decoder with timesteps as many of them as prompts, however many samples are left, and
        fail with one noise generator per sample; noise that the decoder draws depends on what was drawn before."""
        return not (pipeline.vae.config.timestep_conditioning or self.draws(pipeline))
