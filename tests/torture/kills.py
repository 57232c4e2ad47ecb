"""Kills at random moments: afterwards the same command has to end as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.torture.world import World, clock, compare, content, end, run, start

CHUNKS = "probe.memory=0.001"  # GB: nine chunks
PER_RUN = 5  # kills before a run may end


def kill_chunks(world: World, count: int, rng: np.random.Generator, say: Callable[[str], None]) -> dict[str, int]:
    """The same while probes are fitted to a few cells at a time, with activations that are there."""
    small = World.build(world.root / "chunks", only_train=True, more=(CHUNKS, "probe.epochs=40"))
    return kill(small, count, rng, say)


def kill_folds(world: World, count: int, rng: np.random.Generator, say: Callable[[str], None]) -> dict[str, int]:
    """The same while probes are cross-fitted, with activations that are there."""
    return kill(World.build(world.root / "folds", only_train=True, more=("probe.folds=3",)), count, rng, say)


def kill(world: World, count: int, rng: np.random.Generator, say: Callable[[str], None]) -> dict[str, int]:
    """Kills commands of whole runs `count` times. Returns the numbers of kills and of faults."""
    whole = content(world.finished)
    counts = {"kills": 0, "lost or doubled": 0, "tracebacks": 0, "refused reruns": 0}
    takes = {}
    while counts["kills"] < count:
        folder, log = world.place("killed"), world.root / "killed.log"
        share = 0
        for number, command in enumerate(world.commands(folder)):
            for _ in range(min(PER_RUN if number == 0 else 2, count - counts["kills"])):
                begin = clock()
                process = start(command, log)
                process.join(float(rng.uniform(0, takes.get(number, 8.0))))
                if not process.is_alive():  # it has ended before
                    takes[number] = 0.9 * (clock() - begin)
                    break
                process.kill()
                ended = end(process, log)
                counts["kills"] += 1
                counts["tracebacks"] += ended.traceback
                share += 1
            begin = clock()
            ended = run(command, log)
            takes[number] = max(takes.get(number, 0.0), clock() - begin)
            counts["tracebacks"] += ended.traceback
            if ended.code != 0:
                counts["refused reruns"] += 1
                say(f"{' '.join(command)}: exit code {ended.code} after a kill: {ended.said[-500:]}")
        compare(whole, folder, counts, say, f"after {share} kills")
    return counts
