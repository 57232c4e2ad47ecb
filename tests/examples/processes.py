"""Processes that start in a moment: copies of one that has imported torch and the package, once for all tests."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("lightning.pytorch", "sklearn.linear_model", "hypothesis", "pytest", "cosprobe.probes.logistic"),
        *("train", "probe", "cosprobe.api", "cosprobe.early_exit", "cosprobe.ensembles", "cosprobe.minimodel"),
        *("cosprobe.reporting", "matplotlib.pyplot", "torch.utils.tensorboard", "tests.examples.pipelines"),
    ]
)


def start(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process that calls a function of a module."""
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def run(function: Callable[..., None], *arguments: Any, processes: int = 1) -> list[int | None]:
    """Exit codes of processes that call `function(rank, *arguments)` side by side; None: not ended in time."""
    return _ended([start(function, rank, *arguments) for rank in range(processes)])


def run_devices(function: Callable[..., None], *arguments: Any, devices: int = 2) -> list[int | None]:
    """Exit codes of the processes of `devices` devices that call `function(*arguments)`.

    They are what Lightning's launcher starts, without its seconds of imports: the environment says who is who.
    """
    return _ended(start_devices(function, *arguments, devices=devices))


def start_devices(function: Callable[..., None], *arguments: Any, devices: int = 2) -> list[BaseProcess]:
    """These processes, while they run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(_as_device, rank, devices, port, function, *arguments) for rank in range(devices)]


def _as_device(rank: int, devices: int, port: int, function: Callable[..., None], *arguments: Any) -> None:
    names = {"LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": devices, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    function(*arguments)


def _ended(started: list[BaseProcess]) -> list[int | None]:
    for process in started:
        process.join(400)
    return [process.exitcode for process in started]
