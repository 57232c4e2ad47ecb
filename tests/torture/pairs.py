"""The same command twice at once: one ends well, the other is refused with the process that holds the folder."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.torture.world import World, compare, content, end, start


def both(world: World, count: int, rng: np.random.Generator, say: Callable[[str], None]) -> dict[str, int]:
    """Starts the commands of `count` whole runs twice. Returns numbers of pairs and of faults."""
    whole = content(world.finished)
    counts = {"pairs": 0, "refused": 0, "tracebacks": 0, "other ends": 0, "lost or doubled": 0}
    for _ in range(count):
        folder = world.place("twice")
        for command in world.commands(folder):
            logs = [world.root / f"twice-{number}.log" for number in range(2)]
            first = start(command, logs[0])
            first.join(float(rng.uniform(0, 2)))
            second = start(command, logs[1])
            ended = [end(process, log) for process, log in zip((first, second), logs, strict=True)]
            counts["pairs"] += 1
            refused = [one.one_line and "is using it" in one.said for one in ended]
            counts["refused"] += sum(refused)
            counts["tracebacks"] += sum(one.traceback for one in ended)
            if sorted(one.code if one.code is not None else -1 for one in ended) not in ([0, 0], [0, 2]):
                counts["other ends"] += 1
                say(f"{command[0]}: exit codes {[one.code for one in ended]}: {[one.said[-300:] for one in ended]}")
            elif [one.code for one in ended] != [0, 0] and not any(refused):
                counts["other ends"] += 1
                say(f"{command[0]}: refused for another reason: {[one.said[-300:] for one in ended]}")
        compare(whole, folder, counts, say, "after two at once")
    return counts
