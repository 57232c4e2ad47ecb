"""What the program runs on: its processes, one per device and each running the same script; memory, files, terminal."""

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

# What `mallopt` calls them, and what it is told. Source: malloc.h of the GNU C library.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
KEPT = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 2**26}


@dataclass
class TrainerConfig:
    """Where fitting runs, in Lightning's words: accelerator, number of devices (processes), precision."""

    accelerator: str = "cpu"
    devices: int = 1
    precision: str = "32-true"

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise InputError(f"trainer.devices={self.devices}: expected at least 1")


def launch(config: TrainerConfig) -> Fabric:
    """Starts one process per device, each of which runs the script from its top and returns from here.

    The trainer that fits the probes later finds the processes running and joins them.
    """
    strategy: Any = DDPStrategy(process_group_backend=backend(config)) if config.devices > 1 else "auto"
    fabric = Fabric(accelerator=config.accelerator, devices=config.devices, strategy=strategy)
    fabric.launch()
    return fabric


def backend(config: TrainerConfig) -> str | None:
    return "gloo" if config.accelerator == "cpu" else None


def keep_freed_memory() -> None:
    """Has this process give up to 2 GiB of freed memory to the next tensor. By default the GNU C library hands it back
    to the kernel, so that every tensor of some megabytes is new and cleared page by page. Other libraries are left as
    they are."""
    if platform.libc_ver()[0] == "glibc":
        for name, value in KEPT.items():
            ctypes.CDLL(None).mallopt(name, value)


def place() -> tuple[int, int]:
    """Index of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Waits for all processes."""
    if place()[1] > 1:
        dist.barrier()


@rank_zero_only
def say(line: str) -> None:
    """One line on the terminal, from the first process only."""
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
    return Progress(*columns, disable=place()[0] != 0)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The name under which to write `path`, which then is whole or absent: renamed when the block ends, deleted when it
    fails. Every process has a name of its own. Raises InputError where it cannot be written (a full or read-only disk).
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
    """Turns what a disk refuses while `path` is written into an InputError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise InputError(
            f"{str(path)!r}: cannot be written ({reason}); free some space, or choose another folder"
        ) from error


def make_folder(path: Path) -> Path:
    """The folder, made with those above it where they are missing. Raises InputError where that is refused."""
    with writable(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Turns running out of memory, of the machine or of a device, into an InputError that says what to do."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise InputError(f"not enough memory: {advice}") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # of the CPU's allocator, which has no class for it
            raise
        raise InputError(f"not enough memory: {advice}") from error
