"""SIGTERM and SIGINT at random moments: a message, exit code 143 or 130, and the same command ends well later."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import numpy as np

from tests.torture.world import World, clock, compare, content, end, run, start

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
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
