"""Atomic writing of files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cosprobe.errors import InputError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Writes a file atomically: afterwards `path` is either complete or unchanged.

    Yields a temporary name in the same folder, different in every process. The temporary file is renamed to `path` when
    the block ends, and deleted when the block fails.
    Raises InputError when it cannot be written (a full or read-only disk).
    """
    part = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        with writable(path):
            yield part
            part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Raises InputError in place of an OSError in the block that writes `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise InputError(
            f"{str(path)!r}: cannot be written ({reason}); free some space, or choose another folder"
        ) from error


def make_folder(path: Path) -> Path:
    """Creates the folder and its missing parents, and returns it. Raises InputError when it cannot be created."""
    with writable(path):
        path.mkdir(parents=True, exist_ok=True)
    return path
