"""The interface of the adapters for families of video transformers, with defaults that fit most families."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

LAYOUT = "b c f h w"


class TokenGrid(NamedTuple):
    """Number of video tokens of one sample along each axis. Tokens are in the order frame, row, column."""

    frames: int
    rows: int
    columns: int


class PatchColumns(NamedTuple):
    """Number of values in one token.

    noisy: of the noisy latent. condition: of the image condition, which is concatenated to the latent on the channel
    axis; 0 for none.
    """

    noisy: int
    condition: int


@runtime_checkable
class Architecture(Protocol):
    """What differs between families of transformers.

    transformers: names of the diffusers classes of the family. layout: axes of the latents in the sampling loop of the
    pipeline (b batch, c channel, f frame, h height, w width).
    To add a family, write a module in this folder with a subclass that overrides what differs, and add an instance to
    ARCHITECTURES.
    """

    transformers: tuple[str, ...]
    layout: str = LAYOUT

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """The blocks whose outputs are captured, in order of execution."""
        ...

    def video_tokens(self, output: Any) -> Float[Tensor, "batch token channel"]:
        """The hidden states of the video in the output of a block."""
        return output

    def with_video_tokens(self, output: Any, tokens: Float[Tensor, "batch token channel"]) -> Any:
        """The output of a block with its video hidden states replaced by `tokens`."""
        return tokens

    def token_grid(self, transformer: nn.Module, latent: Tensor) -> TokenGrid:
        """The token grid of the latents that the transformer is called with."""
        size = dict(zip(self.layout.split(), latent.shape, strict=True))
        frames, rows, columns = self.patch(transformer)
        return TokenGrid(size["f"] // frames, size["h"] // rows, size["w"] // columns)

    def latent_tokens(self, transformer: nn.Module, latent: Tensor) -> Float[Tensor, "batch token channel"]:
        """Latents divided into the patches of the transformer: one token per patch, channels and pixels flattened."""
        latent = latent.movedim(self.channel_axis, 1)
        (t, h, w), (b, c, f, y, x) = self.patch(transformer), latent.shape
        patches = latent.reshape(b, c, f // t, t, y // h, h, x // w, w).permute(0, 2, 4, 6, 1, 3, 5, 7)
        return patches.reshape(b, (f // t) * (y // h) * (x // w), c * t * h * w)

    def patch_columns(self, transformer: nn.Module) -> PatchColumns:
        """Number of values of one patch. The condition has the input channels that the output does not have."""
        volume, config = math.prod(self.patch(transformer)), transformer.config
        return PatchColumns(volume * config.out_channels, volume * max(0, config.in_channels - config.out_channels))

    def patch(self, transformer: nn.Module) -> tuple[int, int, int]:
        """Size of a patch: frames, rows and columns of the latent."""
        size, frames = transformer.config.patch_size, transformer.config.get("patch_size_t", None)
        return (frames or 1, size, size) if isinstance(size, int) else tuple(size)

    @property
    def channel_axis(self) -> int:
        """Index of the channel axis in `layout`."""
        return self.layout.split().index("c")

    def one_problem_a_call(self, transformer: nn.Module) -> bool:
        """Whether a pipeline call can have one problem only, because the pipeline repeats an input over the batch."""
        return False

    def to_decoder(self, vae: nn.Module, latent: Tensor) -> Tensor:
        """Latents of the sampling loop in the scale and layout of the autoencoder."""
        return latent / vae.config.scaling_factor
