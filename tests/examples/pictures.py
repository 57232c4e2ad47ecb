"""Draws no pictures, for runs that are repeated: their pictures were drawn and looked at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from matplotlib.figure import Figure
from PIL import Image


@contextmanager
def undrawn(really: bool = True) -> Iterator[None]:
    """Inside, figures are saved as an empty picture of the same shape."""

    def save(figure: Figure, file: Any, **_: Any) -> None:
        width, height = figure.get_size_inches()
        Image.new("RGB", (round(50 * width), round(50 * height)), "white").save(file, format="png")

    if really:
        with patch.object(Figure, "savefig", save):
            yield
    else:
        yield
