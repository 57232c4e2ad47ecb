"""Keeps two commands out of one folder."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from cosprobe.errors import InputError
from cosprobe.files import HALF, make_folder, whole_file, writable

LOCK, HOLDER = ".lock", ".holder"  # files in the folder that is held; the second says by which process
RANK = "RANK"  # variable of the environment with the index of a process among those of all machines, from `torchrun`
# Without it, the first process has none of these, or 0. A shell of SLURM sets SLURM_PROCID=0 for all it starts, and
# Lightning numbers machines and the processes of each.
PARTS = ("SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")


@contextmanager
def held(folder: Path, setting: str) -> Iterator[None]:
    """Holds a folder, which is created if needed, until the block ends.

    Only the first of several processes of one command holds it. The operating system ends the hold of a process that is
    killed. Halves of files from such a process are deleted. Afterwards the files of the hold are deleted, and the
    folder if it is still empty.
    setting: names the folder in messages. Raises InputError, with the process, when another command holds it.
    """
    if any(os.environ.get(name, "0") != "0" for name in ((RANK,) if RANK in os.environ else PARTS)):
        yield
        return
    there = folder.is_dir()
    make_folder(folder)
    lock = FileLock(folder / LOCK)
    with writable(folder / LOCK):
        try:
            lock.acquire(timeout=0)
        except Timeout:  # an OSError too
            raise InputError(
                f"{setting}={str(folder)!r}: {_holder(folder)} is using it; wait for it, or choose another folder"
            ) from None
    try:
        # a full disk is told where it is known how much is needed
        with suppress(InputError), whole_file(folder / HOLDER) as part:
            about = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
            part.write_text(json.dumps(about))
        _clean(folder)
        yield
    finally:
        for name in (HOLDER, LOCK):  # the lock last, while it is held
            with suppress(OSError):
                (folder / name).unlink(missing_ok=True)
        lock.release()
        if not there:
            with suppress(OSError):  # not empty
                folder.rmdir()


def _clean(folder: Path) -> None:
    """Deletes halves of files that killed commands left in a folder, but for those in folders that another holds."""
    for path, inside, names in os.walk(folder):
        inside[:] = [name for name in inside if not (Path(path) / name / LOCK).exists()]
        for name in names:
            if HALF.fullmatch(name):
                with suppress(OSError):
                    (Path(path) / name).unlink()


def _holder(folder: Path) -> str:
    try:
        about = json.loads((folder / HOLDER).read_text())
        return f"process {about['pid']} on {about['host']} (since {about['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
