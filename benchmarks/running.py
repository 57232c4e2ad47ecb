"""The whole run against what it cannot avoid: network evaluations and decodes.

Measured: `train.py probe=layers` in this process, from loading the model to the report, at a small `task.problems`,
once without the transformers of random weights (`probe.randomised=0`) and once with them, in the share of problems
the demo has. Against: the same batches of the same problems sampled bare (text, first frames, every step), the
finished video decoded, and x0-hat decoded as often as the run decodes it; the model is loaded before the clock starts.

Statistics, figures and the fit depend on the number of cells as well as on that of problems, so they weigh more here
than in the demo. Run all: `make bench`; this alone: `python -m benchmarks run`.
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
from cosprobe.activations import decode_steps
from cosprobe.config import TrainRun, load
from cosprobe.models import decode, load_pipeline, sample
from cosprobe.tasks import draw_samples, images

DEMO = 600  # problems of the demo


def measure(repeats: int = 3, problems: int = 120, settings: Sequence[str] = ()) -> list[Pair]:
    """Two pairs, without and with random weights; only the first with `probe.randomised=0` among `settings`."""
    asked = ["probe=layers", f"task.problems={problems}", *settings]
    run = load(TrainRun, asked)
    model = load_pipeline(run.pipeline)
    other, pairs = partial(needed, model, run), []
    for randomised in sorted({0, run.probe.randomised * problems // DEMO}):
        name = f"random weights on {randomised} samples" if randomised else "no random weights"
        ours = partial(whole_run, [*asked, f"probe.randomised={randomised}"])
        what = f"train.py probe=layers, {problems} problems, {name}"
        pairs.append(side_by_side(what, ours, "its evaluations and decodes", other, repeats))
    return pairs


def whole_run(asked: list[str]) -> None:
    """Raises RuntimeError when the run fails."""
    with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()) as said:
        code = train.main([*asked, f"run_dir={Path(folder) / 'run'}"])
    if code:
        raise RuntimeError(f"train.py {' '.join(asked)} ended with {code}: {said.getvalue()[-300:]}")


def needed(model: Any, run: TrainRun) -> int:
    """Samples and decodes as often as `run` must, random weights aside; returns how many clips it decoded."""
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
        assert isinstance(latents, Tensor)  # as asked
        read = [i for i, problem in enumerate(problems) if problem.split != "train"]
        for part in [latents, *([latents[read]] * early if read else [])]:
            clips += len(decode(model, part))
    return clips
