"""Regions of a frame, over which probes read: boxes and masks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from cosprobe.tasks.pictures import Broken, has_alpha, picture_in

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 as fractions of the image
HALF = 128  # a pixel of a mask is inside from this grey value, or this alpha, up


@dataclass(frozen=True)
class Mask:
    """A region of any shape, from an image file.

    The file is read when it is asked for, so memory does not grow with the number of masks, and every model gets exact
    shares of its own tokens.
    digest: hash of the size and pixels of the mask. place: where the whole image lies in the frame, as fractions of the
    frame; below 0 or above 1 where it is cropped. file: the image.
    """

    digest: str
    place: Box
    file: Path = field(repr=False, compare=False)

    def shares(self, rows: int, columns: int) -> Float[np.ndarray, "row column"]:
        """The share of the area of each token that is inside, from 0 to 1.

        rows, columns: of the tokens of a frame. Raises Broken when the file cannot be read, or is no longer the mask it
        was.
        """
        inside = read_mask(self.file)
        if digest_of(inside) != self.digest:
            raise Broken(f"{str(self.file)!r}: has changed since the problems were read; run the command again")
        return shares_of(inside, self.place, rows, columns)


Region = Box | Mask


def read_mask(file: Path) -> Bool[np.ndarray, "height width"]:
    """True for the pixels inside a mask: the opaque ones if any is transparent, otherwise the white ones.

    Raises Broken when the file is missing or unreadable, has more than 89 million pixels, colours but no transparent
    pixel, or no pixel inside.
    """
    where = repr(str(file))
    with picture_in(file, where) as picture:
        values = np.asarray(picture.convert("RGBA").getchannel("A")) if has_alpha(picture) else None
        if values is None or values.min() == 255:
            colours = [np.asarray(band) for band in picture.convert("RGB").split()]
            values = colours[0]
            if not all(np.array_equal(values, other) for other in colours[1:]):
                raise Broken(f"{where}: has colours, expected a mask: white inside, black or transparent outside")
    if values.max() < HALF:
        raise Broken(f"{where}: no pixel is inside (largest value {values.max()} of 255), expected some in white")
    return values >= HALF


def digest_of(inside: Bool[np.ndarray, "height width"]) -> str:
    """A hash of the size and pixels of a mask."""
    return hashlib.sha256(f"{inside.shape}".encode() + np.packbits(inside).tobytes()).hexdigest()


def shares_of(
    inside: Bool[np.ndarray, "height width"], place: Box, rows: int, columns: int
) -> Float[np.ndarray, "row column"]:
    """The share of the area of each token that is inside a mask. place: see `Mask`. rows, columns: of the tokens."""
    height, width = inside.shape
    down, tall = _overlaps(place[1], place[3], height, rows)
    across, wide = _overlaps(place[0], place[2], width, columns)
    return down @ inside.astype(np.float32) @ across.T / np.float32(tall * wide)


def _overlaps(start: float, end: float, pixels: int, tokens: int) -> tuple[np.ndarray, float]:
    """How much of each pixel each token covers along one side, and the length of a token, in pixels of the mask.

    start, end: of the mask, as fractions of the frame.
    """
    edges = np.round((np.linspace(0, 1, tokens + 1) - start) / (end - start) * pixels, 9)[:, None]
    first = np.arange(pixels)
    covered = np.minimum(edges[1:], first + 1) - np.maximum(edges[:-1], first)
    return covered.clip(0).astype(np.float32), pixels / (end - start) / tokens


def place_of(shape: tuple[int, int], size: tuple[int, int], fit: str) -> Box:
    """Where an image lies in the fitted image, see `Mask.place`. shape, size: (width, height) before and after."""
    return _moved((0.0, 0.0, 1.0, 1.0), shape, size, fit)


def box_of(box: Box, shape: tuple[int, int], size: tuple[int, int], fit: str) -> Box:
    """A box of an image as a box of the fitted image, both as fractions. shape, size: (width, height) before and
    after."""
    x0, y0, x1, y1 = (min(max(end, 0.0), 1.0) for end in _moved(box, shape, size, fit))
    return x0, y0, x1, y1


def _moved(box: Box, shape: tuple[int, int], size: tuple[int, int], fit: str) -> Box:
    """`box_of`, with the parts that are cropped."""
    if fit == "stretch":
        return box
    scale = (max if fit == "crop" else min)(size[0] / shape[0], size[1] / shape[1])
    wide, tall = (shape[side] * scale / size[side] for side in range(2))  # of the whole image in the frame
    x0, y0, x1, y1 = box
    return 0.5 + (x0 - 0.5) * wide, 0.5 + (y0 - 0.5) * tall, 0.5 + (x1 - 0.5) * wide, 0.5 + (y1 - 0.5) * tall
