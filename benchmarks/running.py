"""A whole run, compared with its unavoidable part: network evaluations and decodes.

Measured: `train.py probe=layers` in this process, from loading the model to the report, with a small `task.problems`.
It runs once without random weights (`probe.random_weights=0`) and once with them, on the same share of problems as in
the demo. Compared with: sampling the same batches without capture (text, first frames, every step), decoding the
finished videos, and decoding x0-hat as often as the run does. The model is loaded before timing.

The time of fits, statistics and figures also depends on the number of cells, so their share is larger here than in the
demo. Only this benchmark: `python -m benchmarks run`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

import train
from benchmarks.pairs import Pair, side_by_side
from cosprobe.activations import images
from cosprobe.command import load
from cosprobe.config import TrainRun, decode_steps
from cosprobe.models import decode, load_pipeline, sample
from cosprobe.tasks import draw_samples

DEMO = 600  # number of problems of the demo


def measure(repeats: int = 3, problems: int = 120, settings: Sequence[str] = ()) -> list[Pair]:
    """Two pairs, without and with random weights. Only the first one if `settings` has `probe.random_weights=0`."""
    arguments = ["probe=layers", f"task.problems={problems}", *settings]
    run = load(TrainRun, arguments)
    model = load_pipeline(run.pipeline)
    other, pairs = partial(needed, model, run), []
    for random_weights in sorted({0, run.probe.random_weights * problems // DEMO}):
        name = f"random weights on {random_weights} samples" if random_weights else "no random weights"
        ours = partial(whole_run, [*arguments, f"probe.random_weights={random_weights}"])
        what = f"train.py probe=layers, {problems} problems, {name}"
        pairs.append(side_by_side(what, ours, "its evaluations and decodes", other, repeats))
    return pairs


def whole_run(arguments: list[str]) -> None:
    """Runs train.py with these arguments in a temporary folder. Raises RuntimeError when it fails."""
    with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()) as output:
        code = train.main([*arguments, f"run_dir={Path(folder) / 'run'}"])
    if code:
        raise RuntimeError(f"train.py {' '.join(arguments)} ended with {code}: {output.getvalue()[-300:]}")


def needed(model: Any, run: TrainRun) -> int:
    """Samples and decodes as often as `run` does without random weights. Returns the number of decoded clips."""
    task, clips = run.task.build(), 0
    drawn = draw_samples(task, run.task, run.seed)
    early = sum(step < run.pipeline.steps - 1 for step in decode_steps(run.probe.decode, run.pipeline.steps))
    for start in range(0, len(drawn), run.pipeline.batch):
        chunk = drawn[start : start + run.pipeline.batch]
        problems = [s.problem for s in chunk]
        latents = sample(
            model, run.pipeline, images(task, problems), [p.prompt for p in problems], [s.seed for s in chunk],
            output_type="latent",
        )  # fmt: skip
        assert isinstance(latents, Tensor)  # output_type="latent"
        read = [i for i, problem in enumerate(problems) if problem.split != "train"]
        for part in [latents, *([latents[read]] * early if read else [])]:
            clips += len(decode(model, part, run.pipeline.frames))
    return clips
