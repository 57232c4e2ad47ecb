"""Process groups on GPUs: the one of a single process, and two processes that exchange probes."""

from __future__ import annotations

import multiprocessing
import socket
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpu.findings import Finding
from cosprobe.config import TrainerConfig
from cosprobe.probes import shared

LONGEST = 60.0  # seconds until processes that do not answer are ended
CELLS = 5


def measure(device: str, context: Any = None) -> list[Finding]:
    """With one GPU, two processes share it through gloo, because NCCL wants one for each.

    context: starts the processes; default: `spawn`, because CUDA does not work in copies of a process.
    """
    context = context or multiprocessing.get_context("spawn")
    nccl = "nccl" if device.startswith("cuda") else "gloo"
    two = device.startswith("cuda") and torch.cuda.device_count() > 1
    places = ["cuda:0", "cuda:1"] if two else [device] * 2
    return [_group(context, nccl, [device]), _group(context, nccl if two else "gloo", places)]


def _group(context: Any, backend: str, places: list[str]) -> Finding:
    """One process for each of the devices `places`; they divide cells as in a fit, and exchange the results."""
    timeout, begin = TrainerConfig().timeout, time.perf_counter()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, started = [], []
    for rank, device in enumerate(places):
        ours, theirs = context.Pipe()
        process = context.Process(target=member, args=(rank, len(places), port, backend, device, timeout, theirs))
        process.start()
        theirs.close()  # so that waiting ends if the process dies
        pipes.append(ours)
        started.append(process)
    answers = [_answer(pipe, begin + LONGEST) for pipe in pipes]
    for process in started:
        process.join(1)
        process.kill()
    what = f"{len(places)} {'process' if len(places) == 1 else 'processes'}, {backend}, on {', '.join(places)}"
    if errors := [answer for answer in answers if isinstance(answer, str)]:
        return Finding(what, errors[0], {}, False)
    seconds, limits = max(answer[0] for answer in answers), {answer[1] for answer in answers}
    return Finding(
        what,
        f"group and first exchange in {seconds:.1f} s; timeout {', '.join(f'{limit:g}' for limit in sorted(limits))} s",
        {"seconds": seconds, "timeout": max(limits)}, limits == {timeout} and all(answer[2] for answer in answers),
    )  # fmt: skip


def _answer(pipe: Connection, until: float) -> tuple[float, float, bool] | str:
    """What a process has sent, or what kept it from that. until: by the clock `perf_counter`."""
    try:
        return pipe.recv() if pipe.poll(max(0.0, until - time.perf_counter())) else f"no answer in {LONGEST:g} s"
    except EOFError:
        return "ended without an answer"


def member(rank: int, world: int, port: int, backend: str, device: str, timeout: float, answer: Connection) -> None:
    """One process. Its answer: its seconds, the timeout of the group, whether it has all results; or an error."""
    try:
        answer.send(_exchanged(rank, world, port, backend, torch.device(device), timeout))
    except Exception as error:  # any of them is the result
        answer.send(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _exchanged(
    rank: int, world: int, port: int, backend: str, device: torch.device, timeout: float
) -> tuple[float, float, bool]:
    begin = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(backend, store, timedelta(seconds=timeout), world, rank)
    try:

        def solve(part: slice) -> dict[str, Tensor]:
            cells = torch.arange(CELLS, device=device, dtype=torch.float64)[part]
            return {"weight": cells[:, None].float().expand(-1, 3), "energy": cells, "converged": cells > 1}

        total = torch.ones(1, device=device)
        dist.all_reduce(total)
        found = shared(solve, CELLS)
        same = int(total) == world and all(torch.equal(found[k], v) for k, v in solve(slice(None)).items())
        limit = dist.group.WORLD._get_backend(device).options._timeout.total_seconds()  # type: ignore[union-attr]
        return time.perf_counter() - begin, limit, same
    finally:
        dist.destroy_process_group()
