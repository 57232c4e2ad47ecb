"""A plane of swaps with shared first steps, compared with the same runs from the beginning, with the model in the
package.

With them, every run takes the steps before its swap from the clean run (`replayed`). Without them, a pipeline call with
the same swap computes all its steps. Both sides sample the clean run, record the states of donors in the same way, and
end with the same videos, which is checked before anything is timed. Only this benchmark:
`python -m benchmarks intervene`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.pairs import Pair, side_by_side
from cosprobe.activations import Sampler
from cosprobe.causal import Edit, patch, replayed
from cosprobe.causal.clean import CleanRun, taken_from
from cosprobe.command import load
from cosprobe.config import TrainRun
from cosprobe.models import load_pipeline
from cosprobe.tasks import Sample, draw_samples

Plane = list[tuple[int, int]]  # step, layer


def measure(
    repeats: int = 3, batch: int = 4, steps: int = 20, every: int = 2, layers: Sequence[int] = (4,)
) -> list[Pair]:
    """One pair. A repeat samples one batch in every cell: `layers` at every `every`-th step."""
    run = load(TrainRun, [f"pipeline.steps={steps}", f"task.problems={max(10, 2 * batch)}"])  # half are of `train`
    task = run.task.build()
    sampler = Sampler(load_pipeline(run.pipeline), run.pipeline, task)
    samples = draw_samples(task, run.task, run.seed)[:batch]
    plane = [(step, layer) for step in range(0, steps, every) for layer in layers]
    (ours, shared), (theirs, whole) = (_counted(sampler, side, samples, plane) for side in (with_sharing, without))
    if not np.array_equal(ours, theirs):
        raise RuntimeError("videos with and without shared first steps differ")
    what = f"swaps in {len(plane)} cells of {batch} samples, {shared} evaluations with shared first steps"
    against = f"the same, {whole} evaluations ({whole / shared:.2f} times)"
    return [
        side_by_side(
            what, lambda: with_sharing(sampler, samples, plane), against, lambda: without(sampler, samples, plane),
            repeats,
        )
    ]  # fmt: skip


def with_sharing(sampler: Sampler, samples: list[Sample], plane: Plane) -> np.ndarray:
    """The videos of all cells, from the stored steps of one clean run."""
    run, videos = CleanRun(sampler, samples, sorted({layer for _, layer in plane})), []
    for step, layer in plane:
        with replayed(sampler.model, run.prefix, step):
            videos.append(_swapped(sampler, samples, run.states(step), step, layer))
    return np.stack(videos)


def without(sampler: Sampler, samples: list[Sample], plane: Plane) -> np.ndarray:
    """The videos of all cells, each from a whole pipeline call."""
    run, videos = CleanRun(sampler, samples, sorted({layer for _, layer in plane})), []
    for step, layer in plane:
        videos.append(_swapped(sampler, samples, run.states(step), step, layer))
    return np.stack(videos)


def _swapped(sampler: Sampler, samples: list[Sample], states: Any, step: int, layer: int) -> np.ndarray:
    """Videos with the state of the next sample of the batch at one cell."""
    donors = taken_from(states, np.roll(np.arange(len(samples)), -1), step)
    edit = Edit("swap", steps=(step,), layers=(layer,), source="next")
    with patch(sampler.model, [edit], {"next": donors}):
        return np.asarray(sampler(samples))


def _counted(
    sampler: Sampler, side: Callable[..., np.ndarray], samples: list[Sample], plane: Plane
) -> tuple[np.ndarray, int]:
    """What one side returns, and its number of evaluations."""
    calls = list[int]()
    hook = sampler.model.transformer.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    try:
        return side(sampler, samples, plane), len(calls)
    finally:
        hook.remove()
