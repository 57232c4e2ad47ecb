"""Sampling by two processes of one thread each, compared with one process of one thread: the same batches, captured and
stored as in a run, with the model in the package.

The second pair is the floor: two processes that know nothing of each other, each with half of the batches. What they
lack of half the seconds is lost to the machine, for example to memory that both cores share. All processes are started,
have loaded the model and have met before timing. Each has one thread. A ratio of 0.56 means 1.8 times the speed. It
needs two cores that do nothing else. Only this benchmark: `python -m benchmarks share`.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.pairs import Pair, side_by_side
from cosprobe.activations import Sampler, StoreSettings, collect, find_store
from cosprobe.command import load
from cosprobe.config import TrainRun
from cosprobe.models import load_pipeline
from cosprobe.runs import STORE
from cosprobe.runtime import launch
from cosprobe.tasks import draw_samples

QUIET = ("trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "probe.random_weights=0")


def measure(repeats: int = 3, problems: int = 64, settings: Sequence[str] = ()) -> list[Pair]:
    """Two pairs. A repeat samples all problems on each side."""
    arguments = ["probe=layers", f"task.problems={problems}", *QUIET, *settings]
    alone: list[Mapping[str, str]] = [{}, {}]
    with TemporaryDirectory() as folder, started(arguments, alone) as single, started(
        [*arguments, "trainer.devices=2"], of_two()
    ) as two:  # fmt: skip
        fresh = (Path(folder) / str(number) for number in count())
        one = partial(_sample, single[:1], [(0, 1)], fresh)
        what = f"sampling {problems} problems, one thread for each process"
        return [
            side_by_side(f"{what}: two processes", partial(_sample, two, [(0, 1)] * 2, fresh), "one", one, repeats),
            side_by_side(
                f"{what}: floor, two halves apart", partial(_sample, single, [(0, 2), (1, 2)], fresh, True), "one", one,
                repeats,
            ),
        ]  # fmt: skip


def of_two() -> list[Mapping[str, str]]:
    """Variables of the environment of two processes, as Lightning's launcher sets them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    return [meet | {"NODE_RANK": "0", "LOCAL_RANK": str(rank)} for rank in range(2)]


@contextmanager
def started(arguments: Sequence[str], environments: Sequence[Mapping[str, str]]) -> Iterator[list[Connection]]:
    """Processes that have loaded the model of a run, and wait; one for each of the `environments`."""
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in environments]
    processes = [
        context.Process(target=work, args=(list(arguments), dict(variables), theirs))
        for variables, (_, theirs) in zip(environments, pairs, strict=True)
    ]
    ours = [pair[0] for pair in pairs]
    try:
        for process, (_, theirs) in zip(processes, pairs, strict=True):
            process.start()
            theirs.close()  # so that a process that has ended is noticed
        for connection in ours:
            connection.recv()
        yield ours
    finally:
        for connection in ours:
            connection.close()
        for process in processes:
            process.join()


def work(arguments: list[str], variables: dict[str, str], connection: Connection) -> None:
    """Samples whenever a run folder and a share of the batches come through `connection`, and sends the number of
    samples. A share `(i, n)` is every n-th batch from the i-th on. Ends when the connection is closed."""
    os.environ.update(variables)
    torch.set_num_threads(1)
    run = load(TrainRun, arguments)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        fabric = launch(run.trainer)
        task = run.task.build()
        sampler = Sampler(load_pipeline(run.pipeline, str(fabric.device)), run.pipeline, task, run.trainer)
        settings = StoreSettings.of(run.pipeline, run.task, run.probe, run.seed)
        batches = sampler.batches(draw_samples(task, run.task, run.seed))
        connection.send(0)
        while True:
            try:
                folder, (first, every) = connection.recv()
            except EOFError:
                return
            chosen = [sample for batch in batches[first::every] for sample in batch]
            collect(sampler, partial(list, chosen), settings, find_store(settings, sampler.depth, folder / STORE))
            connection.send(len(chosen))


def _sample(
    connections: Sequence[Connection], shares: Sequence[tuple[int, int]], fresh: Iterator[Path], apart: bool = False
) -> None:
    """Lets processes sample their shares side by side, in one run folder, or in one for each if they work apart.

    fresh: folders that do not exist. Run folders are not side by side: a run reads the activations of one beside it.
    """
    folder = next(fresh)
    for number, (connection, share) in enumerate(zip(connections, shares, strict=True)):
        connection.send((folder / (str(number) if apart else "both") / "run", share))
    for connection in connections:
        connection.recv()
