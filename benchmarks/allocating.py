"""A process that keeps freed memory for the next tensor against one that gives it back, as C libraries do by default.

Both sample the same batch in turns, each in a process of its own, since a process cannot be told to forget what it was
told about memory. Run all: `make bench`; this alone: `python -m benchmarks allocate`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection

from benchmarks.pairs import Pair, side_by_side
from cosprobe.collect import draw_samples, images
from cosprobe.config import TrainRun, load
from cosprobe.devices import keep_freed_memory
from cosprobe.pipelines import load_pipeline, sample


def measure(repeats: int = 7, batch: int = 16, steps: int = 20) -> list[Pair]:
    """One pair: the whole call of the pipeline, decoded video included."""
    context, sides = get_context("spawn"), []
    for kept in (True, False):
        ours, theirs = context.Pipe()
        context.Process(target=_sampling, args=(theirs, kept, batch, steps), daemon=True).start()
        theirs.close()  # a process that dies then ends the wait for it
        sides.append(ours)
    for side in sides:
        _once(side)  # loading is not part of it
    run, other = (partial(_once, side) for side in sides)
    what = f"sampling {batch} problems, {steps} steps, freed memory kept"
    found = [side_by_side(what, run, "the same, given back", other, repeats)]
    for side in sides:
        side.send(False)
    return found


def _once(side: Connection) -> None:
    side.send(True)
    side.recv()


def _sampling(side: Connection, kept: bool, batch: int, steps: int) -> None:
    if kept:
        keep_freed_memory()
    call = _call(batch, steps)
    while side.recv():
        call()
        side.send(None)


def _call(batch: int, steps: int) -> Callable[[], object]:
    run = load(TrainRun, [f"pipeline.steps={steps}"])
    task, model = run.task.build(), load_pipeline(run.pipeline)
    chunk = draw_samples(task, run.task, run.seed)[:batch]
    problems = [s.problem for s in chunk]
    arguments = (images(task, problems), [p.prompt for p in problems], [s.seed for s in chunk])
    return partial(sample, model, run.pipeline, *arguments)
