"""Images and videos from disk: decoded, or refused by name; fitted to the frames of a video."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from cosprobe.errors import InputError
from cosprobe.video_files import read_frames

FITS = ("pad", "crop", "stretch")
MOST_PIXELS = 89_000_000  # an image of more is not decoded; Pillow warns a little above
BEHIND = (255, 255, 255, 255)  # the transparent parts of an image


class Broken(InputError):
    """A problem that cannot be used. It ends the command or is skipped, as `task.on_error` says."""


@contextmanager
def picture_in(path: Path, where: str) -> Iterator[Image.Image]:
    """The picture of a file with 8 bits a channel, not yet decoded.

    where: path for messages. Raises Broken for a file that is missing, unreadable or too large, also when it is decoded
    inside the context.
    """
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                size = f"{picture.width} x {picture.height}"
                raise Broken(f"{where}: {size} pixels, expected at most {MOST_PIXELS:,}; make it smaller")
            if picture.mode.startswith(("I", "F")):
                raise Broken(f"{where}: mode {picture.mode}, expected 8 bits a channel; save it as an RGB image")
            yield picture
    except Broken:
        raise
    except FileNotFoundError as error:
        raise Broken(f"{where}: is missing, expected an image") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise Broken(f"{where}: cannot be read as an image ({reason}); save it again") from error


def opened(path: Path, where: str) -> Image.Image:
    """The RGB image of a file, decoded. Transparent parts are white. Arguments and errors: see `picture_in`."""
    with picture_in(path, where) as picture:
        if has_alpha(picture):
            layer = picture.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", layer.size, BEHIND), layer).convert("RGB")
        return picture.convert("RGB")


def has_alpha(picture: Image.Image) -> bool:
    """Whether a picture can be transparent."""
    return "A" in picture.getbands() or "transparency" in picture.info


def frames_in(file: Path) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """The frames of a video file, one at a time. Raises Broken for a file that is missing, unreadable or truncated."""
    try:
        yield from read_frames(file)
    except (OSError, ValueError, av.FFmpegError) as error:
        reason = " ".join(str(error).split())
        raise Broken(f"{str(file)!r}: cannot be read as a video ({reason}); save it again, or remove it") from error


def fitted(picture: Image.Image, size: tuple[int, int], fit: str, margin: Sequence[int] = ()) -> Image.Image:
    """The image at `size` (width, height). fit: see FITS. margin: colour of the padding; empty: that of the upper left
    corner."""
    if fit == "crop":
        return ImageOps.fit(picture, size)
    if fit == "pad":
        return ImageOps.pad(picture, size, color=tuple(margin or picture.crop((0, 0, 1, 1)).tobytes()))
    return picture.resize(size)
