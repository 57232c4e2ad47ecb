"""Sampling with capture, compared with sampling without it: the same problems and noise, with the model in the package.

With capture, the output of every block at every step (pooled by region) and all inputs are kept and stacked, as in a
run. Without it, the pipeline is called directly. Both sides end with the decoded video. Only this benchmark:
`python -m benchmarks capture`.
"""

from __future__ import annotations

from typing import Any

from benchmarks.pairs import Pair, side_by_side
from cosprobe.activations import ActivationCache, Pooling, capture, images
from cosprobe.command import load
from cosprobe.config import TrainRun
from cosprobe.models import block_list, load_pipeline, sample
from cosprobe.tasks import draw_samples


def measure(repeats: int = 7, batch: int = 16, steps: int = 20) -> list[Pair]:
    """One pair. A repeat samples one batch."""
    run = load(TrainRun, [f"pipeline.steps={steps}", f"task.problems={max(10, 2 * batch)}"])  # half are of `train`
    config, task, model = run.pipeline, run.task.build(), load_pipeline(run.pipeline)
    chunk = draw_samples(task, run.task, run.seed)[:batch]
    problems = [s.problem for s in chunk]
    arguments = (images(task, problems), [p.prompt for p in problems], [s.seed for s in chunk])
    layers = len(block_list(model))
    pooling = Pooling("region", boxes=[p.regions for p in problems])

    def bare() -> Any:
        return sample(model, config, *arguments)

    def captured() -> ActivationCache:
        with capture(model, "all", pooling, inputs=True) as cache:
            sample(model, config, *arguments)
        cache.features(), cache.input_features()
        return cache

    what = f"sampling {batch} problems, {steps} steps, {layers} layers and all inputs captured"
    return [side_by_side(what, captured, "the same without capture", bare, repeats)]
