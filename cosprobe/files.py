"""Atomic writing of files, and JSON files with a checksum of their content."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cosprobe.errors import InputError

CHECKSUM = "sha256"  # entry of a JSON file
MODEL_INDEX = "model_index.json"  # in the folder of a diffusers pipeline
# Names of the temporary files of `whole_file`, and of safetensors, which writes beside the file too.
HALF = re.compile(r"\..*\.part-\d+(\.\w+)?|\.tmp\w{6}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Writes a file atomically: afterwards `path` is either complete or unchanged.

    Yields a temporary name in the same folder, different in every process. The temporary file is renamed to `path` when
    the block ends, and deleted when the block fails.
    Raises InputError when it cannot be written (a full or read-only disk).
    """
    part = path.with_name(f".{path.stem}.part-{os.getpid()}{path.suffix}")
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
        full = error.errno in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        space = f"; {_free(path)} free there); free some space, or" if full else ");"
        raise InputError(f"{str(path)!r}: cannot be written ({reason}{space} choose another folder") from error


def _free(path: Path) -> str:
    """The space on the disk of a path."""
    there = next((folder for folder in path.absolute().parents if folder.is_dir()), Path("/"))
    return size_text(shutil.disk_usage(there).free)


def size_text(size: int) -> str:
    """A number of bytes as text, never 0.0 of a unit."""
    unit, name = (1e9, "GB") if size >= 1e8 else (1e6, "MB")
    return f"{size / unit:.1f} {name}" if size >= 1e5 else f"{size} bytes"


def make_folder(path: Path) -> Path:
    """Creates the folder and its missing parents, and returns it.

    Raises InputError when it cannot be created, and for a folder of a model or inside of one: a model is known by the
    files in its folder, and would become another model.
    """
    if (path.exists() or path.is_symlink()) and not path.is_dir():
        raise InputError(f"{str(path)!r}: cannot be a folder, it is a file or a broken link; choose another name")
    real = Path(os.path.realpath(path))
    with writable(path):
        if model := next((folder for folder in (real, *real.parents) if (folder / MODEL_INDEX).is_file()), None):
            raise InputError(f"{str(path)!r}: is in the folder of a model, {str(model)!r}; choose another folder")
        path.mkdir(parents=True, exist_ok=True)
    return path


def stranger(folder: Path, known: Callable[[Path], bool]) -> str | None:
    """The name of something in a folder that is neither `known` nor hidden; None if there is nothing of the kind."""
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    return next((path.name for path in inside if not path.name.startswith(".") and not known(path)), None)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object with a checksum, atomically. Raises InputError when the file cannot be written."""
    with whole_file(path) as part:
        part.write_text(json.dumps({**content, CHECKSUM: _json_checksum(content)}, indent=1))


def read_json(path: Path, advice: str, **version: int) -> dict[str, Any]:
    """What `write_json` wrote.

    version: name and value of the entry with the version of the file, such as `layout=2`. Raises InputError, with
    `advice`, when it is missing, of another version, damaged, or was edited.
    """
    try:
        content = json.loads(path.read_text())
        for name, expected in version.items():
            if (found := content.get(name, 1)) != expected:
                raise InputError(
                    f"{str(path)!r} has {name} {found}, expected {expected}: from another version of cosprobe; {advice}"
                )
        if content.pop(CHECKSUM) != _json_checksum(content):
            raise ValueError("its checksum differs")
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read ({error.strerror}): {advice}") from error
    except InputError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is damaged or was edited: {advice}") from error
    return content


def _json_checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
