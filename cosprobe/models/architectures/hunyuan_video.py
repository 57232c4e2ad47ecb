"""HunyuanVideo. Guidance is an input of the model, and classifier-free guidance comes on top of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from cosprobe.errors import InputError
from cosprobe.models.architectures.protocol import BYTE, COND, UNCOND, Branches, JointBlocks
from cosprobe.wrapping import wrapped


class HunyuanVideo(JointBlocks):
    """Adapter for HunyuanVideo. See `Architecture` for the methods."""

    pipelines = ("HunyuanVideoPipeline",)
    transformers = ("HunyuanVideoTransformer3DModel",)
    guidance = "true_cfg_scale"

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    def check_guidance(self, pipeline: Any, scale: float, own: float) -> None:
        """Raises InputError for guidance as an input of a model that has no such input."""
        if scale > 1 and not pipeline.transformer.config.guidance_embeds:
            raise InputError(
                f"pipeline.guidance={scale:g}: this model has no input for guidance, so it changes nothing; set it to "
                "1, or pipeline.true_cfg for classifier-free guidance"
            )

    def guided(self, pipeline: Any) -> bool:
        """False: the pipeline does not keep its scale. Contexts and the order of calls tell the branches."""
        return False


class HunyuanVideoFromImage(HunyuanVideo):
    """Adapter for image-to-video with HunyuanVideo. The first frame is in further channels, or a frame of its own."""

    pipelines = ("HunyuanVideoImageToVideoPipeline",)

    def branches(self, context: str, call: int, guided: bool) -> Branches | None:
        """The pipeline opens no context: the first call of a step has the prompt, the second one has not."""
        return ((COND,), (UNCOND,))[call] if call < 2 else None

    @contextmanager
    def batched_images(self, pipeline: Any) -> Iterator[list[Tensor]]:
        """The image processor of the text encoder takes values up to 255, and the negative prompts of a batch come with
        one black image for all of them. Here each gets one of its own."""

        def encode(original: Callable, *, image: Any, prompt: list[str], **rest: Any) -> Any:
            given = image * BYTE if isinstance(image, Tensor) else [image] * len(prompt)
            return original(image=given, prompt=prompt, **rest)

        with wrapped(pipeline, "encode_prompt", encode):
            yield []

    def keeps_first_frame(self, pipeline: Any) -> bool:
        return pipeline.transformer.config.image_condition_type == "token_replace"

    def video_frames(self, pipeline: Any, frames: int) -> int:
        """With the image in further channels, the pipeline leaves the first four frames out."""
        return frames if self.keeps_first_frame(pipeline) else frames - 4

    def decode(self, pipeline: Any, latent: Tensor, frames: int) -> Tensor:
        video = super().decode(pipeline, latent, frames)
        return video[:, :, frames - self.video_frames(pipeline, frames) :]
