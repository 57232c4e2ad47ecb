"""Flow matching with freed memory kept by the process, compared with the default, which returns it to the system.

Both sides train alternately on clips of the same shapes. Each runs in its own process, because the setting cannot be
undone within a process. Only this benchmark: `python -m benchmarks allocate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.learning import gradients, learner, noise_batch
from benchmarks.pairs import Pair, side_by_side
from cosprobe.command import keep_freed_memory, load
from cosprobe.config import TrainRun
from cosprobe.models import load_pipeline


def measure(repeats: int = 7, batches: int = 4, frames: int = 13, settings: Sequence[str] = ()) -> list[Pair]:
    """One pair: loss and gradients of `batches` batches of clips with `frames` frames, with the settings of the
    recipe."""
    context, sides = get_context("spawn"), []
    for kept in (True, False):
        ours, theirs = context.Pipe()
        arguments = (theirs, kept, batches, frames, list(settings))
        context.Process(target=_learning, args=arguments, daemon=True).start()
        theirs.close()  # so that waiting ends if the process dies
        sides.append(ours)
        _once(ours)  # loading and compiling are not measured
    run, other = (partial(_once, side) for side in sides)
    what = f"{batches} batches of clips of {frames} frames learned from, freed memory kept"
    found = [side_by_side(what, run, "the same, given back", other, repeats)]
    for side in sides:
        side.send(False)
    return found


def _once(side: Connection) -> None:
    side.send(True)
    side.recv()


def _learning(side: Connection, kept: bool, batches: int, frames: int, settings: list[str]) -> None:
    if kept:
        keep_freed_memory()
    run: Any = load(TrainRun, ["experiment=mini", *settings])
    config = run.experiment.flow
    module = learner(run, config.compile)
    batch = noise_batch(load_pipeline(run.pipeline).vae, config.batch, frames)
    while side.recv():
        gradients(module, batch, batches)
        side.send(None)
