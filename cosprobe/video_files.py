"""Writes and reads MP4 files."""

from __future__ import annotations

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
    """Reads all frames of a video file. Raises InputError for a file without frames; for others see PyAV's errors."""
    with av.open(str(file)) as film:
        if not film.streams.video:
            raise InputError("it has no video stream")
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    if not frames:
        raise InputError("it has no frames")
    return np.stack(frames)
