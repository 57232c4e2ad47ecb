"""Processes that start in a moment: copies of one that has imported torch and the package, once for all tests."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["lightning.pytorch", "sklearn.linear_model", "hypothesis", "pytest", "cosprobe.probes.logistic"]
)


def start(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process that calls a function of a module."""
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def run(function: Callable[..., None], *arguments: Any, processes: int = 1) -> list[int | None]:
    """Exit codes of processes that call `function(rank, *arguments)` side by side; None: not ended in time."""
    started = [start(function, rank, *arguments) for rank in range(processes)]
    for process in started:
        process.join(400)
    return [process.exitcode for process in started]
