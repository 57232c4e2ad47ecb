"""Pools video tokens into features: means over space and time, computed on the device of the tokens.

Every pooling has a spatial part (sets of tokens of a frame, possibly different for every sample) and a temporal part
(each latent frame, or all of them). Means are computed in fp32, one frame at a time, so no fp32 copy of all tokens is
made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from cosprobe.config import POOLINGS, CaptureConfig
from cosprobe.errors import InputError
from cosprobe.tasks import Mask, Problem, Region

GRID = 4  # `grid` pooling has GRID x GRID coarse cells
PROJECTION = 2003  # seed of the random projection
COLUMNS = 1024  # most values that `whole_frame` keeps of one frame of an input


@dataclass(frozen=True)
class Pooling:
    """Which tokens are averaged.

    kind: `clip` (one mean), `frame` (a mean per latent frame), `grid` (a mean per coarse cell, over all frames),
    `region` (a mean per region, over all frames) or `token` (no mean: every token is a position). frames: with
    `region`, also keep a mean per latent frame.
    boxes: for `region`, the regions (boxes or masks) of each sample of the batch. across: for `grid`, coarse cells per
    side. project: channels that are kept, see `random_projection`; 0: all of them.
    Raises InputError for an unknown kind, and for samples with different numbers of regions.
    """

    kind: str
    frames: bool = False
    boxes: Sequence[Sequence[Region]] = ()
    across: int = GRID
    project: int = 0
    _weights: dict[tuple, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in POOLINGS:
            raise InputError(f"probe.pooling={self.kind!r}: expected one of {', '.join(POOLINGS)}")
        if self.kind == "region" and len({len(boxes) for boxes in self.boxes}) > 1:
            raise InputError("probe.pooling='region': every sample needs the same number of regions")

    @classmethod
    def of(cls, config: CaptureConfig, problems: Sequence[Problem]) -> Pooling:
        """The pooling that the settings name, for a batch of problems."""
        return cls(config.pooling, config.frames, [p.regions for p in problems], project=config.project)

    @property
    def regions(self) -> int:
        """Length of the axis `region`: the number of regions, 1 for other kinds of pooling."""
        return len(self.boxes[0]) if self.kind == "region" and self.boxes else 1

    def positions(self, size: tuple[int, int, int]) -> tuple[str, ...]:
        """The names along the axis `position`. size: latent frames, token rows, token columns."""
        frames, rows, columns = size
        each = tuple(str(f) for f in range(frames))
        if self.kind == "token":
            return tuple(f"f{f}r{r}c{c}" for f in each for r in range(rows) for c in range(columns))
        if self.kind == "frame":
            return each
        if self.kind == "grid":
            return tuple(f"r{r}c{c}" for r in range(self.across) for c in range(self.across))
        return ("all", *each) if self.kind == "region" and self.frames else ("all",)

    def masks(self, batch: int, height: int, width: int) -> Float[Tensor, "batch part token"]:
        """The spatial part: weights of the tokens of one frame, see `box_masks`.

        Raises InputError when there are not as many lists of boxes as samples in the batch.
        """
        if self.kind == "region":
            if len(self.boxes) != batch:
                raise InputError(f"boxes: regions for {len(self.boxes)} samples, expected {batch} (batch size)")
            return torch.stack([box_masks(boxes, height, width) for boxes in self.boxes])
        if self.kind == "grid":
            step, sides = 1 / self.across, range(self.across)
            cells = [(c * step, r * step, (c + 1) * step, (r + 1) * step) for r in sides for c in sides]
            return box_masks(cells, height, width).expand(batch, -1, -1)
        return torch.ones(batch, 1, height * width)

    def by_frame(
        self, tokens: Float[Tensor, "batch token channel"], size: tuple[int, int, int]
    ) -> Float[Tensor, "batch frame part channel"]:
        """The mean for every latent frame and spatial part (region, coarse cell, single token or whole frame).

        tokens: in the order frame, row, column. size: latent frames, token rows, token columns.
        Raises InputError when the number of tokens is not the product of `size`.
        """
        frames, height, width = size
        if tokens.shape[1] != frames * height * width:
            raise InputError(f"a block gave {tokens.shape[1]} tokens, expected {frames} x {height} x {width}")
        if self.kind == "token":
            return rearrange(tokens, "b (f s) d -> b f s d", f=frames).float()
        position = (tokens.shape[0], height, width, tokens.device)
        if position not in self._weights:  # the weights are the same for all hook points and steps of a run
            masks = self.masks(*position[:3]).to(tokens.device)
            self._weights[position] = masks / masks.sum(-1, keepdim=True)
        weights = self._weights[position]
        by_frame = rearrange(tokens, "b (f s) d -> f b s d", f=frames)
        return torch.stack([weights @ frame.float() for frame in by_frame], dim=1)

    def __call__(
        self, tokens: Float[Tensor, "batch token channel"], size: tuple[int, int, int]
    ) -> Float[Tensor, "batch position region kept"]:
        """Pools tokens into the features of a probe, and projects them. Arguments and errors: see `by_frame`."""
        return self.projected(self.means(tokens, size))

    def projected(self, means: Float[Tensor, "*axes channel"]) -> Float[Tensor, "*axes kept"]:
        """The features with `project` channels. Features with no more channels, such as latents, stay as they are."""
        if not self.project or means.shape[-1] <= self.project:
            return means
        key = (means.shape[-1], means.device)
        if key not in self._weights:
            self._weights[key] = random_projection(means.shape[-1], self.project).to(means.device)
        return means @ self._weights[key]

    def means(
        self, tokens: Float[Tensor, "batch token channel"], size: tuple[int, int, int]
    ) -> Float[Tensor, "batch position region channel"]:
        """The features with all channels. Arguments and errors: see `by_frame`."""
        parts = self.by_frame(tokens, size)
        if self.kind == "token":
            return rearrange(parts, "b f s d -> b (f s) 1 d")
        whole = parts.mean(dim=1, keepdim=True)
        if self.kind == "frame":
            return parts
        if self.kind == "grid":
            return rearrange(whole, "b 1 p d -> b p 1 d")
        return torch.cat([whole, parts], dim=1) if self.kind == "region" and self.frames else whole


def random_projection(channels: int, kept: int) -> Float[Tensor, "channel kept"]:
    """A matrix of random signs over sqrt(kept). It is the same for the same sizes, on every machine.

    In expectation, vectors keep their squared norms and inner products. Source: Achlioptas (2003), "Database-friendly
    random projections", theorem 1.1.
    """
    signs = np.random.default_rng(PROJECTION).choice([-1.0, 1.0], size=(channels, kept))
    return torch.from_numpy(signs / kept**0.5).float()


def whole_frame(channels: int) -> Pooling:
    """The pooling of an input over the whole frame: the finest grid with at most COLUMNS values per frame.

    The grid has 1 to GRID coarse cells per side. channels: number of channels of the input.
    """
    return Pooling("grid", across=max(g for g in range(1, GRID + 1) if g == 1 or g * g * channels <= COLUMNS))


def box_masks(boxes: Sequence[Region], height: int, width: int) -> Float[Tensor, "box token"]:
    """The weight of every token in each region.

    A box has weight 1 for the tokens whose centre it contains, otherwise 0. A smaller box gets the token nearest to its
    centre. The weight of a token in a mask is the share of its area that is inside. So a mask of a box whose sides lie
    between tokens has the weights of the box. Raises Broken, an InputError, for a mask that cannot be read any more.
    """
    y = (torch.arange(height) + 0.5) / height
    x = (torch.arange(width) + 0.5) / width
    masks = []
    for box in boxes:
        if isinstance(box, Mask):
            masks.append(torch.from_numpy(box.shares(height, width)).flatten())
            continue
        x0, y0, x1, y1 = box
        rows, columns = (y >= y0) & (y < y1), (x >= x0) & (x < x1)
        if not rows.any():
            rows[(y - (y0 + y1) / 2).abs().argmin()] = True
        if not columns.any():
            columns[(x - (x0 + x1) / 2).abs().argmin()] = True
        masks.append((rows[:, None] & columns[None, :]).flatten().float())
    return torch.stack(masks)
