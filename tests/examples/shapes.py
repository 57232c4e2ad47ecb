"""Switches the checks of shapes off, for simulations that repeat what was checked once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jaxtyping import config


@contextmanager
def unchecked(really: bool = True) -> Iterator[None]:
    """Inside, functions do not compare the shapes of their arguments with the annotations."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", before or really)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", before)
