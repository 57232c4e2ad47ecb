"""Files that cannot grow, as on a full disk: one line, and afterwards the same command ends well."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.torture.world import World, compare, content, run

SMALLEST, LARGEST = 1.0, 6.5  # powers of ten of the bytes from which on no file grows


def fill(world: World, count: int, rng: np.random.Generator, say: Callable[[str], None]) -> dict[str, int]:
    """Runs commands of whole runs under `count` limits of the size of files. Returns the numbers of faults."""
    whole = content(world.finished)
    counts = {"limits": 0, "refused in one line": 0, "tracebacks": 0, "other ends": 0, "lost or doubled": 0}
    log = world.root / "full.log"
    while counts["limits"] < count:
        folder = world.place("full")
        for command in world.commands(folder):
            limit = int(10 ** rng.uniform(SMALLEST, LARGEST))
            ended = run(command, log, file_limit=limit)
            counts["limits"] += 1
            counts["refused in one line"] += ended.one_line
            counts["tracebacks"] += ended.traceback
            if ended.code != 0 and not ended.one_line:
                counts["other ends"] += 1
                say(f"{command[0]} with files of at most {limit} bytes: exit code {ended.code}: {ended.said[-900:]}")
            again = run(command, log)
            if again.code != 0:
                counts["other ends"] += 1
                say(f"{command[0]}, again: exit code {again.code}: {again.said[-700:]}")
        compare(whole, folder, counts, say, "after limits of files")
    return counts
