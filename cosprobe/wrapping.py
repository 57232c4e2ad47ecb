"""Replaces a method of one object for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any


@contextmanager
def wrapped(owner: Any, name: str, around: Callable) -> Iterator[None]:
    """Replaces the method `name` of one object by `around(original, *args, **kwargs)`, and restores it on exit.

    Does nothing when the object has no such method.
    """
    original = getattr(owner, name, None)
    if original is None:
        yield
        return
    was_instance = name in vars(owner)

    @wraps(original)
    def answer(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(owner, name, answer)
    try:
        yield
    finally:
        if was_instance:
            setattr(owner, name, original)
        else:
            delattr(owner, name)
