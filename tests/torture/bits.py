"""Flipped bits in every file of a run: an error of ours, or nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from cosprobe.command import read_run
from cosprobe.errors import InputError
from cosprobe.runs import find_result
from tests.torture.world import World, content, differences


def flip(world: World, count: int, rng: np.random.Generator, say: Callable[[str], None]) -> dict[str, int]:
    """Flips `count` random bits, one at a time, in files of a run. Returns the numbers of bits and of faults."""
    folder = world.copy("flipped")

    def everything() -> dict:
        return content(folder) | {"settings": read_run(find_result(folder))}

    whole = everything()
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    counts = {"bits": 0, "found": 0, "without effect": 0, "tracebacks": 0, "silent": 0}
    for number in range(count):
        path = paths[number % len(paths)]
        before = path.read_bytes()
        at = int(rng.integers(8 * len(before)))
        damaged = bytearray(before)
        damaged[at // 8] ^= 1 << at % 8
        path.write_bytes(damaged)
        counts["bits"] += 1
        try:
            wrong = differences(whole, everything())
            counts["silent" if wrong else "without effect"] += 1
            for what in wrong:
                say(f"bit {at} of {name(path, folder)}: other {what}, without a word")
        except InputError:
            counts["found"] += 1
        except Exception as error:
            counts["tracebacks"] += 1
            say(f"bit {at} of {name(path, folder)}: {type(error).__name__}: {error}")
        finally:
            path.write_bytes(before)
    return counts


def name(path: Path, folder: Path) -> str:
    """The path of a file inside its run folder."""
    return str(path.relative_to(folder))
