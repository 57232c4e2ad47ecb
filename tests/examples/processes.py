"""Processes that start in a moment: copies of one that has imported torch and the package, once for all tests."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from multiprocessing.process import BaseProcess
from typing import Any

import torch

Variables = Mapping[str, int | str]  # of the environment of a process
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
    return start_as(by_lightning(devices), function, *arguments)


def run_as(environments: Sequence[Variables], function: Callable[..., None], *arguments: Any) -> list[int | None]:
    """Exit codes of processes that call `function(*arguments)`, each with variables of the environment of its own."""
    return _ended(start_as(environments, function, *arguments))


def start_as(environments: Sequence[Variables], function: Callable[..., None], *arguments: Any) -> list[BaseProcess]:
    """These processes, while they run. They meet at a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    return [start(_with_variables, meet | dict(variables), function, *arguments) for variables in environments]


def by_lightning(devices: int) -> list[Variables]:
    """What Lightning's launcher sets for each of its processes."""
    return [{"LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": devices} for rank in range(devices)]


def by_torchrun(devices: int, nodes: int = 1) -> list[Variables]:
    """What `torchrun` sets for each of its processes."""
    return [
        {
            **{"RANK": devices * node + rank, "LOCAL_RANK": rank, "GROUP_RANK": node, "WORLD_SIZE": devices * nodes},
            **{"LOCAL_WORLD_SIZE": devices, "TORCHELASTIC_RUN_ID": "none"},
        }
        for node, rank in product(range(nodes), range(devices))
    ]


def by_slurm(tasks: int, nodes: int = 1) -> list[Variables]:
    """What `srun --nodes=NODES --ntasks-per-node=TASKS` sets for each of its processes."""
    shared = {
        **{"SLURM_JOB_ID": 1234, "SLURM_JOB_NAME": "probes", "SLURM_NODELIST": "localhost", "SLURM_NNODES": nodes},
        **{"SLURM_NTASKS": tasks * nodes, "SLURM_NTASKS_PER_NODE": tasks},
    }
    return [
        shared | {"SLURM_PROCID": tasks * node + rank, "SLURM_LOCALID": rank, "SLURM_NODEID": node}
        for node, rank in product(range(nodes), range(tasks))
    ]


def by_hand(nodes: int) -> list[Variables]:
    """What is set by hand to start the command on each of several machines."""
    return [{"NODE_RANK": node} for node in range(nodes)]


def _with_variables(variables: Variables, function: Callable[..., None], *arguments: Any) -> None:
    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.set_num_threads(1)
    function(*arguments)


def _ended(started: list[BaseProcess]) -> list[int | None]:
    for process in started:
        process.join(400)
    return [process.exitcode for process in started]
