"""From tokens to features: means over space and time, computed where the tokens are.

Every pooling factors into a spatial part (which tokens of a frame belong together, possibly different for
every sample) and a temporal part (each latent frame, or all of them). Sums run in fp32 frame by frame, so
the full token tensor is never copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from cosprobe.errors import InputError

POOLINGS = ("clip", "frame", "grid", "region")
GRID = 4  # `grid` pooling is GRID x GRID coarse cells
COLUMNS = 1024  # numbers that one frame of an input may take when the whole frame is kept

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 as fractions of the image


@dataclass(frozen=True)
class Pooling:
    """kind: `clip` (one mean), `frame` (a mean per latent frame), `grid` (coarse cells over the clip) or
    `region` (a mean per candidate box). frames: with `region`, also keep every latent frame.
    boxes: for `region`, the boxes of each sample of the batch. across: coarse cells a side, for `grid`."""

    kind: str
    frames: bool = False
    boxes: Sequence[Sequence[Box]] = ()
    across: int = GRID
    _weights: dict[tuple, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in POOLINGS:
            raise InputError(f"probe.pooling={self.kind!r}: expected one of {', '.join(POOLINGS)}")
        if self.kind == "region" and len({len(boxes) for boxes in self.boxes}) > 1:
            raise InputError("probe.pooling='region': every sample needs the same number of regions")

    @property
    def regions(self) -> int:
        return len(self.boxes[0]) if self.kind == "region" and self.boxes else 1

    def places(self, latent_frames: int) -> tuple[str, ...]:
        """Names along the `place` axis."""
        each = tuple(str(f) for f in range(latent_frames))
        if self.kind == "frame":
            return each
        if self.kind == "grid":
            return tuple(f"r{r}c{c}" for r in range(self.across) for c in range(self.across))
        return ("all", *each) if self.kind == "region" and self.frames else ("all",)

    def masks(self, batch: int, height: int, width: int) -> Float[Tensor, "batch part token"]:
        """0/1 masks over the tokens of one frame: the spatial part."""
        if self.kind == "region":
            if len(self.boxes) != batch:
                raise InputError(f"region pooling got boxes for {len(self.boxes)} samples in a batch of {batch}")
            return torch.stack([box_masks(boxes, height, width) for boxes in self.boxes])
        if self.kind == "grid":
            step, sides = 1 / self.across, range(self.across)
            cells = [(c * step, r * step, (c + 1) * step, (r + 1) * step) for r in sides for c in sides]
            return box_masks(cells, height, width).expand(batch, -1, -1)
        return torch.ones(batch, 1, height * width)

    def by_frame(
        self, tokens: Float[Tensor, "batch token channel"], size: tuple[int, int, int]
    ) -> Float[Tensor, "batch frame part channel"]:
        """A mean for every latent frame and spatial part: region, coarse cell, or the whole frame.

        tokens in the order (frame, height, width); `size` = latent frames, token rows, token columns.
        Raises ValueError when the token count is not frame x height x width.
        """
        frames, height, width = size
        if tokens.shape[1] != frames * height * width:
            raise InputError(f"a block gave {tokens.shape[1]} tokens, expected {frames} x {height} x {width}")
        place = (tokens.shape[0], height, width, tokens.device)
        if place not in self._weights:  # the same for every site and step of a run
            masks = self.masks(*place[:3]).to(tokens.device)
            self._weights[place] = masks / masks.sum(-1, keepdim=True)
        weights = self._weights[place]
        by_frame = rearrange(tokens, "b (f s) d -> f b s d", f=frames)
        return torch.stack([weights @ frame.float() for frame in by_frame], dim=1)

    def __call__(
        self, tokens: Float[Tensor, "batch token channel"], size: tuple[int, int, int]
    ) -> Float[Tensor, "batch place region channel"]:
        """The features of a probe. Arguments and errors as in `by_frame`."""
        parts = self.by_frame(tokens, size)
        whole = parts.mean(dim=1, keepdim=True)
        if self.kind == "frame":
            return parts
        if self.kind == "grid":
            return rearrange(whole, "b 1 p d -> b p 1 d")
        return torch.cat([whole, parts], dim=1) if self.kind == "region" and self.frames else whole


def whole_frame(channels: int) -> Pooling:
    """The pooling that keeps an input of so many channels over the whole frame: a grid of at most GRID coarse cells a
    side, as fine as keeps one frame within COLUMNS numbers; at least the mean of the frame."""
    return Pooling("grid", across=max(g for g in range(1, GRID + 1) if g == 1 or g * g * channels <= COLUMNS))


def box_masks(boxes: Sequence[Box], height: int, width: int) -> Float[Tensor, "box token"]:
    """Tokens whose centre lies in each box; a box smaller than a token gets the token nearest its centre."""
    y = (torch.arange(height) + 0.5) / height
    x = (torch.arange(width) + 0.5) / width
    masks = []
    for x0, y0, x1, y1 in boxes:
        rows, columns = (y >= y0) & (y < y1), (x >= x0) & (x < x1)
        if not rows.any():
            rows[(y - (y0 + y1) / 2).abs().argmin()] = True
        if not columns.any():
            columns[(x - (x0 + x1) / 2).abs().argmin()] = True
        masks.append((rows[:, None] & columns[None, :]).flatten())
    return torch.stack(masks).float()
