"""What is measured of every token of a video: numbers that need no probe and no label.

The quantities are those of the token visualisation of arXiv 2603.16870 (section 5, Fig. 6, and the released
`token_visualization.py`). Departures: energy is a root mean square and not a norm, so that models of different widths
compare; principal axes are shared by the steps of a layer, so that a colour means the same at every step; the cosine
to the end is new; all values are saved, not only pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from einops import rearrange
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from cosprobe.probes import principal_axes

MASSIVE = 100.0  # an activation is massive above this multiple of the median magnitude of its layer and step
COMPONENTS = 3  # principal components, drawn as red, green and blue
GRID = ("frame", "row", "column")
MEANING = {
    "energy": "root mean square of a token over its channels",
    "temporal_energy": "root mean square, over channels, of a token minus the token of the same patch one latent frame "
    "before; NaN in the first latent frame",
    "channel_variance": "variance of a token over its channels",
    "cosine": "cosine of the angle between a token and the same token at the last step, over channels",
    "components": "coordinates of a token on the first three principal axes of all tokens of its layer, at all steps",
    "explained": "share of the variance of all tokens of the layer, at all steps, along each principal axis",
    "massive_channels": f"number of channels of a token whose magnitude is above {MASSIVE:g} times the median "
    "magnitude of its layer and step",
    "largest": "largest magnitude of an activation of the layer and step, as a multiple of the median magnitude",
}


@dataclass(frozen=True, eq=False)
class TokenRun:
    """The measures of one sample.

    measures: see `measure_layer`, with the axis `layer`, whose first entry is `embed`, the input of block 0. picture:
    last frame of the finished video. path, contrast: see `tasks.on_path` and `path_contrast`; None where no single
    path is known.
    """

    name: str
    prompt: str
    measures: xr.Dataset
    picture: UInt8[np.ndarray, "height width 3"]
    path: Bool[np.ndarray, "row column"] | None = None
    contrast: Float[np.ndarray, "step layer"] | None = None


def measure_layer(states: Float[Tensor, "step token channel"], size: tuple[int, int, int]) -> xr.Dataset:
    """Measures every token of one layer. All computations are in fp32.

    states: at the measured steps, of which the last one is the last step of the run. Tokens are in the order frame,
    row, column. size: latent frames, token rows, token columns.

    Returns a dataset with the axes step, frame, row and column. MEANING describes its variables.

    Massive activations are a few channels of a few tokens that are far larger than all others (Sun et al. 2024,
    arXiv 2402.17762; in video transformers first-frame tokens have most, arXiv 2603.17825). Norms, cosines and
    principal axes follow them. They are counted and left in. Departure: Sun et al. ask for a magnitude above 100 and
    about 1000 times the median; here 100 times the median suffices, so that more of them are reported.
    """
    states = states.float()
    grid = rearrange(states, "s (f r c) d -> s f r c d", f=size[0], r=size[1], c=size[2])
    change = (grid[:, 1:] - grid[:, :-1]).square().mean(dim=-1).sqrt()
    magnitude = states.abs()
    median = magnitude.flatten(1).median(dim=1).values.clamp_min(torch.finfo(torch.float32).tiny)
    ratio = magnitude / median[:, None, None]
    components, explained = _components(states)
    on_grid = {
        "energy": grid.square().mean(dim=-1).sqrt(),
        "temporal_energy": torch.cat([torch.full_like(grid[:, :1, ..., 0], torch.nan), change], dim=1),
        "channel_variance": grid.var(dim=-1, correction=0),
        "cosine": torch.cosine_similarity(grid, grid[-1:], dim=-1),
        "massive_channels": (ratio > MASSIVE).sum(dim=-1).reshape(grid.shape[:-1]),
    }
    variables: dict[str, tuple] = {name: (("step", *GRID), value.numpy()) for name, value in on_grid.items()}
    variables["components"] = (("step", *GRID, "component"), components.reshape(*grid.shape[:-1], -1).numpy())
    variables["explained"] = (("component",), explained.numpy())
    variables["largest"] = (("step",), ratio.flatten(1).amax(dim=1).numpy())
    return xr.Dataset({name: (*value, {"long_name": MEANING[name]}) for name, value in variables.items()})


def _components(
    states: Float[Tensor, "step token channel"],
) -> tuple[Float[Tensor, "step token component"], Float[Tensor, " component"]]:
    """Coordinates on the first principal axes of all rows, and the share of variance along each.

    The sign of an axis is the one with which its largest entry is positive. Axes without variance have coordinate 0.
    """
    rows = states.flatten(0, 1)
    axes = principal_axes(rows[None])
    count = min(COMPONENTS, axes.basis.shape[2])
    basis = axes.basis[0, :, -count:].flip(1)  # largest variance first
    basis = basis * basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)).sign()
    variance = axes.variance[0].clamp_min(0)
    share = variance[-count:].flip(0) / variance.sum().clamp_min(torch.finfo(torch.float32).tiny)
    missing = COMPONENTS - count
    found = torch.nn.functional.pad((rows - axes.mean) @ basis, (0, missing))
    return found.unflatten(0, states.shape[:2]), torch.nn.functional.pad(share, (0, missing))


def colour_range(values: Float[np.ndarray, "*axes"], massive: Bool[np.ndarray, "*axes"]) -> tuple[float, float]:
    """The ends of a colour scale: the 1 % and 99 % quantiles of the tokens without massive activations.

    Where most tokens have some, all tokens count. NaN is left out. The ends differ, also where all values are equal.
    """
    known = np.isfinite(values)
    usual = known & ~massive
    chosen = values[usual if usual.sum() * 2 >= known.sum() else known]
    low, high = (float(end) for end in np.quantile(chosen, (0.01, 0.99))) if chosen.size else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def path_contrast(
    energy: Float[np.ndarray, "step layer frame row column"],
    path: Bool[np.ndarray, "row column"],
    workspace: Bool[np.ndarray, "row column"],
) -> Float[np.ndarray, "step layer"]:
    """Mean log energy of the tokens on the path minus that of the other tokens that a solution may change.

    Over the latent frames after the first, which is the given picture. exp of it is a ratio of geometric means.
    """
    logs = np.log(np.maximum(energy[:, :, 1:], np.finfo(np.float32).tiny))
    return logs[..., path].mean(axis=(2, 3)) - logs[..., workspace & ~path].mean(axis=(2, 3))
