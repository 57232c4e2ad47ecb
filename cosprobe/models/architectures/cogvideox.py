"""CogVideoX 1.0 and 1.5. The frame axis of latents comes before the channel axis; blocks return (video, text)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from cosprobe.errors import InputError
from cosprobe.models.architectures.protocol import Doubled, JointBlocks


class CogVideoX(Doubled, JointBlocks):
    """Adapter for CogVideoX. See `Architecture` for the methods."""

    pipelines = ("CogVideoXPipeline", "CogVideoXImageToVideoPipeline")
    transformers = ("CogVideoXTransformer3DModel",)
    layout = "b f c h w"

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        return list(transformer.transformer_blocks)

    def chunk(self, pipeline: Any) -> int:
        """Latent frames are decoded in pairs: other numbers of frames give more frames than asked for."""
        return 2 * self.scale(pipeline).frames

    def needed_tokens(self, config: Mapping[str, Any]) -> int | None:
        """The number that positions in the embedding were made for."""
        rotary = config["use_rotary_positional_embeddings"]
        return config["max_text_seq_length"] if config["use_learned_positional_embeddings"] or not rotary else None

    def check_video(self, pipeline: Any, transformer: nn.Module, sides: Sequence[int], frames: int) -> None:
        """Also raises InputError for another size or length than learned positions have."""
        super().check_video(pipeline, transformer, sides, frames)
        config, scale = transformer.config, self.scale(pipeline)
        expected = (config.sample_height * scale.side, config.sample_width * scale.side, config.sample_frames)
        if config.use_learned_positional_embeddings and (*sides, frames) != expected:
            raise InputError(
                f"images: {sides[0]} x {sides[1]} pixels, pipeline.frames={frames}; this model was trained for "
                f"{expected[0]} x {expected[1]} pixels and {expected[2]} frames only"
            )

    def decode(self, pipeline: Any, latent: Tensor, frames: int) -> Tensor:
        """CogVideoX 1.5 pads latents in front to whole patches."""
        padding = latent.shape[1] - self.latent_frames(pipeline, frames)
        return pipeline.decode_latents(latent[:, padding:].to(pipeline.vae.dtype))
