"""A full disk, and files that cannot grow: one line, and afterwards the same command ends well."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

from tests.torture import killed
from tests.torture.world import LIMIT, World, clock, compare, content, end, left_over, run, start

SIZE = 40_000_000  # bytes of the small disk
BALLAST = "ballast"  # file that fills it
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


def brim(world: World, count: int, rng: np.random.Generator, say: Callable[[str], None]) -> dict[str, int]:
    """Fills the disk of commands of whole runs and of trainings `count` times, at random moments. Returns the numbers
    of faults.

    Whoever may not mount a disk in memory gets a line, and no count.
    """
    counts = {"full": 0, "refused in one line": 0, "tracebacks": 0, "other ends": 0, "lost or doubled": 0}
    takes: dict[str, float] = {}
    log, whole = world.root / "brim.log", content(world.finished)
    with small_disk(world.root / "small") as disk:
        if disk is None:
            say("brim: left out, no disk can be mounted here")
            return counts
        for turn in itertools.count():
            if counts["full"] >= count:
                return counts
            folder = world.place(f"{disk.name}/full")
            experiment = killed.EXPERIMENTS[turn // 2 % 2] if turn % 2 else ""
            training = killed.training(world, experiment) if experiment else None
            for command in [training.again(folder)] if training else world.commands(folder):
                _on_a_full_disk(command, disk, log, takes, rng, counts, say)
            if training is None:
                compare(whole, folder, counts, say, "after a full disk")
            else:
                wrong = [*killed.other(training.found, killed.found(folder)), *left_over(folder)]
                counts["lost or doubled"] += bool(wrong)
                [say(f"{experiment}, after a full disk: {what}") for what in wrong]
            shutil.rmtree(folder.parent)
    return counts


def _on_a_full_disk(
    command: list[str],
    disk: Path,
    log: Path,
    takes: dict[str, float],
    rng: np.random.Generator,
    counts: dict[str, int],
    say: Callable[[str], None],
) -> None:
    """Runs a command whose disk is full from some moment on, and again when there is space."""
    name, begin = " ".join(command[:2]), clock()
    process = start(command, log, before=killed.save_often)
    process.join(float(rng.uniform(0, takes.get(name, 8.0))))
    if process.is_alive():
        keep_full(disk, process, bool(rng.integers(2)))
        counts["full"] += 1
    else:
        takes[name] = 0.9 * (clock() - begin)
    ended = end(process, log)
    (disk / BALLAST).unlink(missing_ok=True)
    counts["refused in one line"] += ended.one_line
    counts["tracebacks"] += ended.traceback
    if ended.traceback or (ended.code != 0 and not ended.one_line):
        counts["other ends"] += not ended.traceback
        say(f"{name} on a full disk: exit code {ended.code}: {ended.said[-2500:]}")
    begin = clock()
    again = run(command, log)
    takes[name] = max(takes.get(name, 0.0), clock() - begin)
    if again.code != 0:
        counts["other ends"] += 1
        say(f"{name}, again: exit code {again.code}: {again.said[-700:]}")


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A disk in memory, mounted on a folder; None where this is not permitted."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    try:
        yield folder if mounted.returncode == 0 else None
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", str(folder)], check=True)


def keep_full(disk: Path, process: BaseProcess, always: bool) -> None:
    """Fills a disk to its last byte: once, or again and again until a process has ended."""
    with (disk / BALLAST).open("ab", buffering=0) as file:
        stop = clock() + LIMIT
        while True:
            for size in (2**20, 2**12, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue
            if not always or not process.is_alive() or clock() > stop:
                return
            process.join(0.02)
