"""Writes and reads MP4 files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8

from cosprobe.errors import InputError

RATE = 16  # frames per second
QUALITY = 1  # quantiser of MPEG-4, 1 (best) to 31


def write_video(path: Path, video: UInt8[np.ndarray, "frame height width 3"], rate: int = RATE) -> None:
    """Writes an MP4 file. rate: frames per second. Height and width have to be even."""
    with av.open(str(path), "w", format="mp4") as film:
        stream = film.add_stream("mpeg4", rate=rate, options={"qmin": str(QUALITY), "qmax": str(QUALITY)})
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "yuv420p"
        for frame in video:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        film.mux(stream.encode())


def read_video(file: Path) -> UInt8[np.ndarray, "frame height width 3"]:
    """Reads all frames of a video file. Errors: see `read_frames`."""
    return np.stack(list(read_frames(file)))


def read_frames(file: Path) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """The frames of a video file, one at a time.

    Raises InputError for a file without frames and for an MP4 file that breaks off; for others see PyAV's errors.
    """
    _check_whole(file)
    with av.open(str(file)) as film:
        if not film.streams.video:
            raise InputError("it has no video stream")
        empty = True
        for frame in film.decode(video=0):
            empty = False
            yield frame.to_ndarray(format="rgb24")
    if empty:
        raise InputError("it has no frames")


def _check_whole(file: Path) -> None:
    """Raises InputError for an MP4 file that breaks off. FFmpeg reads the frames before that without an error."""
    size = file.stat().st_size
    with file.open("rb") as content:
        place = 0
        while len(head := content.read(16)) >= 8:
            length, kind = int.from_bytes(head[:4]), head[4:8]
            if not place and kind != b"ftyp":  # another kind of file
                return
            if length == 1:  # the length is in the next 8 bytes
                length = int.from_bytes(head[8:])
            if kind in (b"mdat", b"moov") and place + length > size:
                raise InputError(f"it breaks off after {size} bytes, expected {place + length}")
            if length < 8:  # 0: up to the end
                return
            place += length
            content.seek(place)
