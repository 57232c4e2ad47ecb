"""Processes, devices, memory and the terminal.

There is one process per device. Every process runs the same script.
"""

from __future__ import annotations

import ctypes
import logging
import platform
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.strategies import DDPStrategy as FabricDDP
from lightning.fabric.strategies import ParallelStrategy
from lightning.fabric.strategies.launchers import subprocess_script
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console

from cosprobe.config import TrainerConfig
from cosprobe.errors import InputError
from cosprobe.processes import look_after, look_after_first, starting


def build_trainer(config: TrainerConfig, **fixed: Any) -> L.Trainer:
    """The Lightning trainer that the settings name. fixed: further arguments of `L.Trainer`; they take precedence.

    With several processes, DDP synchronises parameters only: buffers are equal in all of them. Raises InputError, in
    one line, for devices that do not exist and for an accelerator or strategy that Lightning does not know.
    """
    given: dict[str, Any] = {
        "accelerator": accelerator(config),
        "devices": config.devices,
        "num_nodes": config.num_nodes,
        "strategy": _strategy(config, DDPStrategy, broadcast_buffers=False),
        "precision": config.precision,
        "deterministic": config.deterministic,
        "enable_progress_bar": config.enable_progress_bar,
        "limit_predict_batches": config.limit_predict_batches,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    # a run has several trainers, and each would print the list of devices; warnings stay
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with _device_errors(config):
        return L.Trainer(**(given | fixed))


def accelerator(config: TrainerConfig) -> str:
    """The accelerator of Lightning. `auto` is never `mps`, because Newton steps need fp64, which mps lacks."""
    if config.accelerator != "auto":
        return config.accelerator
    return "cuda" if torch.cuda.is_available() else "cpu"


def launch(config: TrainerConfig) -> Fabric:
    """Starts one process per device, unless `torchrun` or SLURM have started them.

    Each process runs the script from the beginning and returns from this function. The Lightning trainer that fits the
    probes later uses the same processes. A process that finds another one gone ends; see `cosprobe.processes`.
    Raises InputError, in one line, for devices that do not exist, and for another number of processes than those that
    `torchrun` or SLURM have started.
    """
    look_after_first()
    # Lightning's own thread kills this process when another one has failed, and people are told nothing
    ours = patch.object(subprocess_script, "_launch_process_observer", look_after, create=True)
    with _device_errors(config), starting(), ours:
        fabric = Fabric(
            accelerator=accelerator(config),
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=_strategy(config, FabricDDP),
        )
        if not isinstance(fabric.strategy, ParallelStrategy):
            _check_alone()
        fabric.launch()
        return fabric


def _check_alone() -> None:
    """Raises ValueError when `torchrun` or SLURM have started several processes, in the words of Lightning, which asks
    only with a strategy for several. Without one, each process would do the whole work."""
    for environment in (TorchElasticEnvironment, SLURMEnvironment):  # in the order of Lightning
        if environment.detect():
            environment().validate_settings(num_devices=1, num_nodes=1)
            return


def _strategy(config: TrainerConfig, ddp: Any, **fixed: Any) -> Any:
    """Lightning's strategy. ddp: its class for DDP, which gets the timeout, gloo on CPUs, and the arguments `fixed`."""
    if config.devices == "auto":
        count = torch.cuda.device_count() if accelerator(config) in ("gpu", "cuda") else 1
    else:
        count = len([part for part in config.devices.strip("[]").split(",") if part.strip()])
        count = int(config.devices) if config.devices.isdigit() else count
    if config.strategy not in ("auto", "ddp") or count * config.num_nodes == 1:
        return config.strategy
    backend = "gloo" if accelerator(config) == "cpu" else None
    return ddp(process_group_backend=backend, timeout=timedelta(seconds=config.timeout), **fixed)


@contextmanager
def _device_errors(config: TrainerConfig) -> Iterator[None]:
    """Raises InputError in place of Lightning's errors for devices, and when other processes do not come."""
    try:
        yield
    except dist.DistError as error:
        raise InputError(
            f"no other process has come in {config.timeout:g} s (trainer.timeout); the same command continues"
        ) from error
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"trainer.accelerator={config.accelerator!r}, trainer.devices={config.devices!r}, "
            f"trainer.strategy={config.strategy!r}: not possible on this machine ({reason})"
        ) from error


def return_freed_memory() -> None:
    """Returns freed memory to the system. Call it between large steps: commands keep freed memory for the next tensors
    (`command.keep_freed_memory`), and what is left between small objects may fit none of the next step. Does nothing
    with other C libraries than that of GNU."""
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """The function of the C library, None if it has none. Finding out takes ten milliseconds."""
    return ctypes.CDLL(None).malloc_trim if platform.libc_ver()[0] == "glibc" else None


def rank_and_world() -> tuple[int, int]:
    """Index of this process, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


@rank_zero_only
def say(line: str) -> None:
    """Prints one line on the terminal, from the first process only."""
    Console().print(line, highlight=False, soft_wrap=True)


@contextmanager
def keyboard_interrupts() -> Iterator[None]:
    """Raises KeyboardInterrupt where Lightning's trainer ends the program after ctrl-C or SIGTERM, and lets ctrl-C work
    again.

    Lightning closes its processes and files, then ignores ctrl-C and raises SystemExit.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as ended:
        if not isinstance(ended.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, before)
        raise type(ended.__context__) from ended  # ctrl-C or SIGTERM


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
