"""Processes, memory, files and the terminal.

There is one process per device. Every process runs the same script.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cosprobe.errors import InputError

# Parameters of `mallopt` and the values set by `keep_freed_memory`. Source: malloc.h of the GNU C library.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
KEPT = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 2**26}


@dataclass
class TrainerConfig:
    """Where probes are fitted.

    accelerator, precision: as in Lightning's `Trainer`. devices: number of devices, with one process each.
    """

    accelerator: str = "cpu"
    devices: int = 1
    precision: str = "32-true"

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise InputError(f"trainer.devices={self.devices}: expected at least 1")


def launch(config: TrainerConfig) -> Fabric:
    """Starts one process per device.

    Each process runs the script from the beginning and returns from this function. The Lightning trainer that fits the
    probes later uses the same processes.
    """
    strategy: Any = DDPStrategy(process_group_backend=backend(config)) if config.devices > 1 else "auto"
    fabric = Fabric(accelerator=config.accelerator, devices=config.devices, strategy=strategy)
    fabric.launch()
    return fabric


def backend(config: TrainerConfig) -> str | None:
    """The process group backend of DDP: `gloo` on the CPU, else None (the default of Lightning)."""
    return "gloo" if config.accelerator == "cpu" else None


def keep_freed_memory() -> None:
    """Lets this process reuse up to 2 GiB of freed memory for later tensors.

    By default the GNU C library returns such memory to the kernel. Every tensor of several megabytes then gets new
    pages, and the kernel has to zero each of them. Does nothing with other C libraries.
    """
    if platform.libc_ver()[0] == "glibc":
        for name, value in KEPT.items():
            ctypes.CDLL(None).mallopt(name, value)


def rank_and_world() -> tuple[int, int]:
    """Index of this process, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Waits for all processes."""
    if rank_and_world()[1] > 1:
        dist.barrier()


@rank_zero_only
def say(line: str) -> None:
    """Prints one line on the terminal, from the first process only."""
    Console().print(line, highlight=False, soft_wrap=True)


def progress() -> Progress:
    """A progress bar, shown by the first process only."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, disable=rank_and_world()[0] != 0)


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


@contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Raises InputError with `advice` when the block runs out of memory, on the CPU or on a device."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise InputError(f"not enough memory: {advice}") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # torch's CPU allocator raises a plain RuntimeError
            raise
        raise InputError(f"not enough memory: {advice}") from error
