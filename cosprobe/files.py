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
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a disk, or a file, that takes no more
SCARCE = 65_536  # free bytes with which a disk is full
IN_RUST = re.compile(r"\(os error (\d+)\)")  # in errors of safetensors
# Names of the temporary files of `whole_file`, and of safetensors, which writes beside the file too.
HALF = re.compile(r"\..*\.part-\d+(\.\w+)?|\.tmp\w{6}")


@contextmanager
def whole_file(path: Path, size: int | None = None) -> Iterator[Path]:
    """Writes a file atomically: afterwards `path` is either complete or unchanged.

    Yields a temporary name in the same folder, different in every process. The temporary file is renamed to `path` when
    the block ends, and deleted when the block fails. size: bytes that are needed, if they are known.
    Raises InputError when it cannot be written (a full or read-only disk).
    """
    part = path.with_name(f".{path.stem}.part-{os.getpid()}{path.suffix}")
    try:
        with writable(path, size, part):
            yield part
            part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def writable(
    path: Path, size: int | None = None, part: Path | None = None, among_others: bool = False
) -> Iterator[None]:
    """Raises InputError in place of an error of the disk in the block that writes `path`, a file or folder.

    size: bytes that are needed, if they are known. part: deleted before the free space is told. among_others: the block
    does more than that; only a full disk is told.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        found = disk_error(error, path)
        if found is None or among_others and found.errno not in FULL:
            raise
        if part is not None:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        needed = "" if size is None else f"needs {size_text(size)}, "
        space = f"; {needed}{_free(path)} free there); free some space, or" if found.errno in FULL else ");"
        raise InputError(f"{str(path)!r}: cannot be written ({found.strerror}{space} choose another folder") from error


def disk_error(error: BaseException, path: Path | None = None) -> OSError | None:
    """The error of the disk that has caused an error; None if there is none.

    path: was being written. Then an error of a library that does not say why is one of a full disk, if the disk is.
    """
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    for one in chain:
        if isinstance(one, OSError) and one.errno in FULL:
            return OSError(one.errno, os.strerror(one.errno))
        if number := IN_RUST.search(str(one)):
            return OSError(int(number[1]), os.strerror(int(number[1])))
    if path is not None and isinstance(error, (OSError, RuntimeError)) and _free_bytes(path) < SCARCE:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror or " ".join(str(error).split()), error.filename)
    return None


def _free(path: Path) -> str:
    """The space on the disk of a path."""
    return size_text(_free_bytes(path))


def _free_bytes(path: Path) -> int:
    there = next((folder for folder in (path, *path.absolute().parents) if folder.is_dir()), Path("/"))
    return shutil.disk_usage(there).free


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
    text = json.dumps({**content, CHECKSUM: _json_checksum(content)}, indent=1)
    with whole_file(path, len(text)) as part:
        part.write_text(text)


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
