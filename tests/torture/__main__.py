"""Runs all torture tests and prints counts: `python -m tests.torture [PART=COUNT ...]`, an hour on one core."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded

import numpy as np

from tests.torture import bits, disk, disk_problems, inputs, kills, pairs, stops
from tests.torture.world import World

PARTS = {  # function, and how often
    "kills": (kills.kill, 100),
    "chunks": (kills.kill_chunks, 40),
    "folds": (kills.kill_folds, 20),
    "stops": (stops.stop, 60),
    "lost": (stops.lose, 10),
    "four": (stops.lose_of_four, 20),
    "problems": (disk_problems.give, 100),
    "masks": (disk_problems.give_masks, 100),
    "inputs": (inputs.give, 300),
    "bits": (bits.flip, 500),
    "disk": (disk.fill, 60),
    "brim": (disk.brim, 40),
    "pairs": (pairs.both, 10),
}
GOOD = {  # counts that are no faults
    *("kills", "stops", "lost", "with a message", "inputs", "refused", "accepted", "bits", "found", "without effect"),
    *("limits", "full", "refused in one line", "pairs"),
}


def main(arguments: list[str]) -> int:
    """Runs the parts that are named, or all. Returns 1 if there was any fault."""
    counts = {name: number for name, (_, number) in PARTS.items()}
    chosen = dict(part.partition("=")[::2] for part in arguments)
    if unknown := set(chosen) - set(PARTS):
        sys.stderr.write(f"{', '.join(unknown)}: expected some of {', '.join(PARTS)}\n")
        return 2
    faults = 0
    with tempfile.TemporaryDirectory(prefix="cosprobe-torture-") as root:
        world = World.build(Path(root))
        for number, name in enumerate(chosen or PARTS):
            begin = time.monotonic()
            found = PARTS[name][0](world, int(chosen.get(name) or counts[name]), np.random.default_rng(number), _say)
            bad = sum(value for key, value in found.items() if key not in GOOD)
            faults += bad
            told = ", ".join(f"{key} {value}" for key, value in found.items())
            _say(f"{name}: {told} ({time.monotonic() - begin:.0f} s)")
    _say(f"faults: {faults}")
    return int(faults > 0)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
