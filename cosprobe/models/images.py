"""First frames of any common kind as one tensor: PIL, numpy or torch, single or in lists.

Axes are those of the library an image comes from: height, width, channel in numpy, channel, height, width in torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Shaped
from PIL import Image
from torch import Tensor

from cosprobe.errors import InputError

Picture = Image.Image | np.ndarray | Tensor
Pictures = Picture | Sequence[Picture]

ROUNDING = 1e-3  # how far a float may lie outside [0, 1]


def image_batch(images: Pictures) -> Float[Tensor, "image 3 height width"]:
    """Images as a float tensor with values in [0, 1].

    images: one image, a list of images, or an array or tensor with a batch axis in front. PIL of any mode; numpy
    [height, width, 3] and torch [3, height, width], both uint8 or float in [0, 1].
    Raises InputError for no images, other axes or types, values outside the range, and images of different sizes.
    """
    parts: Sequence[Picture] = [images] if isinstance(images, Picture) else list(images)
    if not parts:
        raise InputError("images: none; expected at least one")
    named = [("images" if isinstance(images, Picture) else f"images[{i}]", part) for i, part in enumerate(parts)]
    tensors = [_tensor(name, part) for name, part in named]
    sizes = [tuple(t.shape[-2:]) for t in tensors]
    for (name, _), (height, width) in zip(named, sizes, strict=True):
        if (height, width) != sizes[0]:
            raise InputError(
                f"{name}: {height} x {width} pixels, and {named[0][0]} has {sizes[0][0]} x {sizes[0][1]}; expected "
                "images of one size; resize them"
            )
    return torch.cat(tensors)


def _tensor(name: str, image: Picture) -> Float[Tensor, "image 3 height width"]:
    """One image, or a batch of images, with the checks of `image_batch`."""
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    if isinstance(image, np.ndarray):
        _check_axes(name, image, "[height, width, 3]", -1)
        values = torch.from_numpy(np.array(image[None] if image.ndim == 3 else image)).movedim(-1, 1)
    elif isinstance(image, Tensor):
        _check_axes(name, image, "[3, height, width]", -3)
        values = image.detach().cpu()[None] if image.ndim == 3 else image.detach().cpu()
    else:
        raise InputError(f"{name}: {type(image).__name__}, expected a PIL image, a numpy array or a torch tensor")
    if values.dtype == torch.uint8:
        return values.float() / 255
    if not values.is_floating_point():
        raise InputError(f"{name}: type {values.dtype}, expected uint8 (0 to 255) or float (0 to 1); convert it")
    values = values.float()
    if not torch.isfinite(values).all():
        raise InputError(f"{name}: NaN or infinite values, expected 0 to 1; check the image")
    least, most = float(values.min()), float(values.max())
    if least < -ROUNDING or most > 1 + ROUNDING:
        advice = "use (x + 1) / 2" if least < 0 and least >= -1 - ROUNDING and most <= 1 + ROUNDING else "divide by 255"
        raise InputError(f"{name}: values from {least:g} to {most:g}, expected floats from 0 to 1; {advice}")
    return values


def _check_axes(name: str, image: Shaped[np.ndarray, "*axes"] | Shaped[Tensor, "*axes"], axes: str, at: int) -> None:
    """Raises InputError unless the image has three channels on axis `at`, and at most a batch axis in front."""
    shape = list(image.shape)
    if len(shape) not in (3, 4) or shape[at] != 3 or 0 in shape:
        advice = "; torch has channels first" if at == -3 else "; numpy has channels last"
        raise InputError(f"{name}: shape {shape}, expected {axes} of an RGB image, or a batch of them{advice}")
