"""The interface of the adapters for families of video pipelines, with defaults that fit most families."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from cosprobe.errors import InputError

LAYOUT = "b c f h w"
COND, UNCOND = "cond", "uncond"
BYTE = 255  # largest value of a pixel, as the image processors of text encoders take it
SIDE = 16  # the image-to-video pipelines of diffusers take multiples of it
Branches = tuple[str, ...]  # of one transformer call: `cond`, `uncond`, or both in the order of the batch


class TokenGrid(NamedTuple):
    """Number of video tokens of one sample along each axis. Tokens are in the order frame, row, column."""

    frames: int
    rows: int
    columns: int


class PatchColumns(NamedTuple):
    """Number of values in one token.

    noisy: of the noisy latent. condition: of the image condition; 0 for none.
    """

    noisy: int
    condition: int


class Scales(NamedTuple):
    """How many frames and pixels one value of a latent stands for, along time and along each side."""

    frames: int
    side: int


@runtime_checkable
class Architecture(Protocol):
    """What differs between families of video pipelines.

    pipelines, transformers: names of the diffusers classes of the family. layout: axes of the latents in the sampling
    loop (b batch, c channel, f frame, h height, w width). scales: names of the attributes of the pipeline that hold
    `Scales`. guidance: name of the argument of the pipeline that turns classifier-free guidance on above 1.
    To add a family, write a module in this folder with a subclass that overrides what differs, and add an instance to
    ARCHITECTURES.
    """

    pipelines: tuple[str, ...]
    transformers: tuple[str, ...]
    layout: str = LAYOUT
    scales: tuple[str, str] = ("vae_scale_factor_temporal", "vae_scale_factor_spatial")
    guidance: str = "guidance_scale"

    # blocks and tokens

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """The blocks whose outputs are captured, in order of execution."""
        ...

    def video_tokens(self, output: Any) -> Float[Tensor, "batch token channel"]:
        """The hidden states of the video in the output of a block."""
        return output

    def with_video_tokens(self, output: Any, tokens: Float[Tensor, "batch token channel"]) -> Any:
        """The output of a block with its video hidden states replaced by `tokens`."""
        return tokens

    def token_grid(self, transformer: nn.Module, latent: Tensor, call: Mapping[str, Any]) -> TokenGrid:
        """The token grid of a transformer call. latent: its `hidden_states`. call: its keyword arguments."""
        size = dict(zip(self.layout.split(), latent.shape, strict=True))
        frames, rows, columns = self.patch(transformer)
        return TokenGrid(size["f"] // frames, size["h"] // rows, size["w"] // columns)

    def patch(self, transformer: nn.Module) -> tuple[int, int, int]:
        """Size of a patch: frames, rows and columns of the latent."""
        size, frames = transformer.config.patch_size, transformer.config.get("patch_size_t", None)
        return (frames or 1, size, size) if isinstance(size, int) else tuple(size)

    def latent_tokens(self, transformer: nn.Module, latent: Tensor) -> Float[Tensor, "batch token channel"]:
        """Latents divided into the patches of the transformer: one token per patch, channels and pixels flattened."""
        frames, rows, columns = self.patch(transformer)
        latent = latent.movedim(self.axis("c"), 1)
        return rearrange(
            latent, "b c (f t) (y h) (x w) -> b (f y x) (c t h w)", t=frames, h=rows, w=columns
        )  # fmt: skip

    def patch_columns(self, pipeline: Any, transformer: nn.Module) -> PatchColumns:
        """Number of values of one patch, of the noisy latent and of the image condition."""
        volume, noisy = math.prod(self.patch(transformer)), self.noisy_channels(transformer)
        replaced = self.keeps_first_frame(pipeline)
        return PatchColumns(volume * noisy, volume * (noisy if replaced else transformer.config.in_channels - noisy))

    def noisy_channels(self, transformer: nn.Module) -> int:
        """Number of channels of the noisy latent. The other input channels hold the image condition."""
        return transformer.config.out_channels or transformer.config.in_channels

    def axis(self, name: str) -> int:
        """Index of an axis in `layout`."""
        return self.layout.split().index(name)

    def token_frames(self, pipeline: Any, transformer: nn.Module, frames: int) -> int:
        """Number of frames of the token grid for a video of `frames` frames."""
        return -(-self.latent_frames(pipeline, frames) // self.patch(transformer)[0])

    def video_grid(self, pipeline: Any, transformer: nn.Module, frames: int, height: int, width: int) -> TokenGrid:
        """The token grid of a video, before any call. frames: of the video. height, width: in pixels."""
        side, (_, rows, columns) = self.scale(pipeline).side, self.patch(transformer)
        among = self.token_frames(pipeline, transformer, frames)
        return TokenGrid(among, height // (side * rows), width // (side * columns))

    def latent_frames(self, pipeline: Any, frames: int) -> int:
        """Number of latent frames of a video, without padding."""
        return (frames - 1) // self.scale(pipeline).frames + 1

    def scale(self, pipeline: Any) -> Scales:
        """How many frames and pixels one value of a latent stands for."""
        return Scales(*(getattr(pipeline, name) for name in self.scales))

    # the call of the pipeline

    def takes_image(self, pipeline: Any) -> bool:
        """Whether the pipeline is given a first frame."""
        return "image" in inspect.signature(type(pipeline).__call__).parameters

    def check_video(self, pipeline: Any, transformer: nn.Module, sides: Sequence[int], frames: int) -> None:
        """Raises InputError for a size or number of frames that diffusers would round, or decode to something else.

        sides: height and width in pixels.
        """
        side, chunk = self.side(pipeline, transformer), self.chunk(pipeline)
        if any(length % side for length in sides):
            raise InputError(
                f"images: {sides[0]} x {sides[1]} pixels, expected multiples of {side} for this model; set "
                "pipeline.height and pipeline.width, or task.image_size, or resize the images"
            )
        if (frames - 1) % chunk:
            raise InputError(
                f"pipeline.frames={frames}: expected {chunk}k + 1 frames for this model, such as "
                f"{(frames - 1) // chunk * chunk + 1} or {((frames - 1) // chunk + 1) * chunk + 1}"
            )

    def chunk(self, pipeline: Any) -> int:
        """The number of video frames, after the first, of which there are whole multiples."""
        return self.scale(pipeline).frames

    def side(self, pipeline: Any, transformer: nn.Module) -> int:
        """The number of pixels of which height and width of a video are multiples."""
        return math.lcm(SIDE, self.scale(pipeline).side * self.patch(transformer)[-1])

    def video_frames(self, pipeline: Any, frames: int) -> int:
        """Number of frames of the video that the pipeline returns when `frames` are asked for."""
        return frames

    def needed_tokens(self, config: Mapping[str, Any]) -> int | None:
        """The number of prompt tokens that a transformer needs; None if it takes any. config: its configuration."""
        return None

    def default_frames(self, config: Mapping[str, Any]) -> int:
        """The number of video frames where the pipeline has no default. config: configuration of the transformer."""
        return config["sample_frames"]

    def arguments(self, pipeline: Any) -> dict[str, Any]:
        """Further arguments of the pipeline call."""
        return {}

    def prepare(self, pipeline: Any) -> None:
        """Turns on, in a pipeline that was just loaded, what its autoencoder needs and no file says."""
        return

    @contextmanager
    def batched_images(self, pipeline: Any) -> Iterator[list[Tensor]]:
        """Makes pipeline calls with a batch of different first frames possible where diffusers does not support them.

        The changes are undone on exit. Yields a list that will contain the image condition of the batch if the pipeline
        mixes it into the latents after its loop.
        """
        yield []

    # guidance

    def check_guidance(self, pipeline: Any, scale: float, own: float) -> None:
        """Raises InputError for a kind of guidance that the model does not have. scale: `pipeline.guidance`. own:
        `pipeline.true_cfg`."""
        if own > 1:
            raise InputError(f"pipeline.true_cfg={own:g}: this model has pipeline.guidance alone; set true_cfg to 1")

    def guided(self, pipeline: Any) -> bool:
        """Whether the running call of the pipeline uses classifier-free guidance, at its first step."""
        return pipeline.guidance_scale > 1

    def branches(self, context: str, call: int, guided: bool) -> Branches | None:
        """The guidance branches of a transformer call; None if they cannot be told.

        context: what the pipeline gives to `cache_context`, empty for nothing. call: number of transformer calls in
        this step before. guided: see above.
        Here: one call per branch, named by its context.
        """
        return (context,) if context in (COND, UNCOND) else None

    # the image condition and x0-hat

    def keeps_first_frame(self, pipeline: Any) -> bool:
        """Whether the image condition is the first latent frame of the model input, which no step changes."""
        return False

    def unpacked(self, latent: Tensor, grid: TokenGrid) -> Tensor:
        """Latents in `layout`, for families whose loop keeps them as tokens."""
        return latent

    def split_input(self, pipeline: Any, transformer: nn.Module, latent: Tensor) -> tuple[Tensor, Tensor | None]:
        """The noise and the image condition in the (unpacked) model input of the first step, None for no condition.

        Where the condition is the first frame, both have all frames, with zeros where there is the other.
        """
        if self.keeps_first_frame(pipeline):
            first = torch.zeros_like(latent)
            first.narrow(self.axis("f"), 0, 1).copy_(latent.narrow(self.axis("f"), 0, 1))
            return latent - first, first
        noise, condition = latent.tensor_split([self.noisy_channels(transformer)], dim=self.axis("c"))
        return noise, condition if condition.shape[self.axis("c")] else None

    def whole(self, pipeline: Any, latent: Tensor, model_input: Tensor) -> Tensor:
        """A latent of the scheduler as the pipeline keeps it: with the first frame of the model input where that is
        the image condition. Both are unpacked."""
        if not self.keeps_first_frame(pipeline):
            return latent
        axis, frames = self.axis("f"), model_input.shape[self.axis("f")]
        rest = latent.narrow(axis, latent.shape[axis] - (frames - 1), frames - 1)
        return torch.cat([model_input.narrow(axis, 0, 1).to(rest), rest], dim=axis)

    def decode(self, pipeline: Any, latent: Tensor, frames: int) -> Float[Tensor, "batch 3 frame height width"]:
        """Decodes latents in `layout` as the pipeline does at its end, into values in [-1, 1].

        frames: number of video frames that the pipeline was asked for.
        """
        vae = pipeline.vae
        return vae.decode((latent.to(vae.dtype) / vae.config.scaling_factor), return_dict=False)[0]

    def decodes_itself(self, pipeline: Any) -> bool:
        """Whether the pipeline can decode a batch at the end of its call."""
        return True


class Doubled(Architecture, Protocol):
    """Families whose guidance is one transformer call on a batch of two halves, without the prompt and with it."""

    def branches(self, context: str, call: int, guided: bool) -> Branches | None:
        return (UNCOND, COND) if guided else (COND,)


class JointBlocks(Architecture, Protocol):
    """Families whose blocks return (video, text)."""

    def video_tokens(self, output: Any) -> Tensor:
        return output[0]

    def with_video_tokens(self, output: Any, tokens: Tensor) -> Any:
        return (tokens, *output[1:])
