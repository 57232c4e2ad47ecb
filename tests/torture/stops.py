"""Commands that are stopped, and commands of two processes of which one is killed, at random moments.

SIGTERM and SIGINT: a message, and exit code 143 or 130. One of two killed: the other ends with one line, and exit code
2. Afterwards the same command ends well.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable

import numpy as np

from cosprobe.runs import STORE
from tests.torture.world import World, clock, compare, content, differences, end, left_over, run, start, stored

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
TIMEOUT = 5  # seconds that one of two processes waits for the other
BEGIN = 0.6  # seconds after which a process has begun with the command


def stop(world: World, count: int, rng: np.random.Generator, say: Callable[[str], None]) -> dict[str, int]:
    """Stops commands of whole runs `count` times. Returns the numbers of stops and of faults."""
    whole = content(world.finished)
    counts = {"stops": 0, "with a message": 0, "tracebacks": 0, "other ends": 0, "lost or doubled": 0}
    takes: dict[int, float] = {}
    log = world.root / "stopped.log"
    while counts["stops"] < count:
        folder = world.place("stopped")
        for number, command in enumerate(world.commands(folder)):
            sent = signal.SIGTERM if rng.random() < 0.5 else signal.SIGINT
            process = start(command, log)
            process.join(BEGIN + float(rng.uniform(0, takes.get(number, 5.0))))
            if process.is_alive():
                os.kill(process.pid or 0, sent)
                ended = end(process, log, 60)
                counts["stops"] += 1
                counts["tracebacks"] += ended.traceback
                told = ended.code == CODES[sent] and "the same command continues" in ended.said
                counts["with a message"] += told
                if ended.traceback or (not told and ended.code != 0):  # 0: it was at its end
                    counts["other ends"] += not ended.traceback
                    say(f"{' '.join(command[:2])}: exit code {ended.code} after {sent.name}: {ended.said[-2500:]}")
            begin = clock()
            again = run(command, log)
            takes[number] = 0.9 * max(takes.get(number, 0.0), clock() - begin)
            if again.code != 0:
                counts["other ends"] += 1
                say(f"{' '.join(command[:2])}, again: exit code {again.code}: {again.said[-600:]}")
        compare(whole, folder, counts, say, "after signals")
    return counts


def lose_of_four(world: World, count: int, rng: np.random.Generator, say: Callable[[str], None]) -> dict[str, int]:
    """The same with one of four processes, which have unequal numbers of batches."""
    return lose(world, count, rng, say, processes=4)


def lose(
    world: World, count: int, rng: np.random.Generator, say: Callable[[str], None], processes: int = 2
) -> dict[str, int]:
    """Kills one of the processes of commands that train, `count` times. Returns the numbers of kills and faults.

    The activations have to be those of one process. Probes that two have fitted differ in the last bits.
    """
    whole = stored(world.finished / STORE)
    counts = {"lost": 0, "with a message": 0, "tracebacks": 0, "other ends": 0, "lost or doubled": 0}
    takes, logs = 5.0 * processes, [world.root / f"lost-{rank}.log" for rank in range(processes)]
    while counts["lost"] < count:
        folder = world.place("lost")
        devices = [f"trainer.devices={processes}", "trainer.accelerator=cpu", f"trainer.timeout={TIMEOUT}"]
        command = world.train(folder, *devices)
        begin, chosen = clock(), int(rng.integers(processes))
        both = [start(command, log, environment=a) for log, a in zip(logs, _devices(processes), strict=True)]
        both[chosen].join(float(rng.uniform(0, takes)))
        if not both[chosen].is_alive():  # it has ended before
            takes = 0.9 * (clock() - begin)
            for process, log in zip(both, logs, strict=True):
                end(process, log)
            continue
        both[chosen].kill()
        others = [rank for rank in range(processes) if rank != chosen]
        ends = {rank: end(both[rank], logs[rank], 60) for rank in others}
        end(both[chosen], logs[chosen])
        counts["lost"] += 1
        counts["tracebacks"] += any(ended.traceback for ended in ends.values())
        # with several left, those that others end are told nothing; 0: one had nothing left to do with the others
        counts["with a message"] += any(ended.one_line for ended in ends.values())
        for rank, ended in ends.items():
            told = ended.one_line or ended.code == 0 or (processes > 2 and ended.code is not None)
            if not told or ended.traceback:
                counts["other ends"] += not ended.traceback
                say(f"process {rank}: exit code {ended.code} after {chosen} was lost: {ended.said[-2500:]}")
        again = run(world.train(folder), logs[0])
        if again.code != 0:
            counts["other ends"] += 1
            say(f"train, again: exit code {again.code}: {again.said[-600:]}")
        wrong = [*differences(whole, stored(folder / STORE)), *left_over(folder)] if again.code == 0 else []
        counts["lost or doubled"] += bool(wrong)
        for what in wrong:
            say(f"after {chosen} was lost: {what}")
    return counts


def _devices(processes: int) -> list[dict[str, str]]:
    """The variables of the environment by which processes find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    return [meet | {"LOCAL_RANK": str(rank), "NODE_RANK": "0"} for rank in range(processes)]
