"""Problems on disk: folders with an image, a prompt and metadata."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, size=(48, 32)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def write(folder: Path, number: int, image: Image.Image | None = None, note="metadata.json", **fields) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (image or picture(number)).save(folder / "first_frame.png")
    (folder / "prompt.txt").write_text(f"problem {number}\n")
    content = {"task_id": "x", "parameters": {"answer": number % 3, "size": number / 7} | fields}
    (folder / note).write_text(json.dumps(content))
    return folder
