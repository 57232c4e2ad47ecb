"""Accuracy of a pipeline on unseen problems, with answers parsed from decoded videos; also during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
from rich.progress import track

from cosprobe.activations import Sampler
from cosprobe.config import PipelineConfig
from cosprobe.files import read_json, write_json
from cosprobe.tasks import Problem, Task, with_noise

CURVE = "solved.json"  # the file of a `LearningCurve`, in the folder of a training


@dataclass(frozen=True)
class Solved:
    """Results on unseen problems. All arrays are [problem].

    right: whether the video shows a right answer. none: whether it shows no answer. path: agreement of the video with a
    right solution.
    """

    problems: list[Problem]
    right: np.ndarray
    none: np.ndarray
    path: np.ndarray


def solve(sampler: Sampler, problems: Sequence[Problem], seed: int, progress: bool = False) -> Solved:
    """Samples every problem once and parses the answer from the video. Videos have `sampler.config.frames` frames."""
    task = cast(Task, replace(cast(Any, sampler.task), frames=sampler.config.frames))
    right, none, path = [], [], []
    title = f"{task.name}: {len(problems)} unseen problems"
    for batch in track(sampler.batches(with_noise(problems, seed)), title, disable=not progress):
        for one, clip in zip(batch, np.asarray(sampler(batch)), strict=True):
            read = task.parse(one.problem, clip)
            right.append(read.answer in task.solutions(one.problem))
            none.append(read.answer is None)
            path.append(read.path)
    return Solved(list(problems), np.array(right), np.array(none), np.array(path))


class LearningCurve(L.Callback):
    """Callback that measures accuracy on a few validation problems of every kind, every `every` steps.

    tasks: by name. pipeline_of: function of the module and the step that returns a pipeline with the current weights
    and the settings for sampling. path: JSON list of {step, family, kind, right, of, frames}, which a resumed run
    continues.
    problems: number of problems of each kind.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        pipeline_of: Callable[[Any, int], tuple[Any, PipelineConfig]],
        path: Path,
        every: int,
        problems: int = 48,
    ):
        self.tasks, self.pipeline_of, self.path, self.every, self.problems = tasks, pipeline_of, path, every, problems

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        """Measures accuracy if the step is a multiple of `every`."""
        step = trainer.global_step
        if step % self.every:
            return
        noted = read_json(self.path, "delete it")["rows"] if self.path.is_file() else []
        noted = [row for row in noted if row["step"] < step]
        model, settings = self.pipeline_of(module, step)
        for name, task in self.tasks.items():
            for kind in task.kinds:
                solved = solve(Sampler(model, settings, task), task.problems("validation", self.problems, kind), 0)
                row = {"step": step, "family": name, "kind": kind, "frames": settings.frames}
                noted.append(row | {"right": int(solved.right.sum()), "of": len(solved.right)})
                module.log(f"solved/{name}_{kind}", float(solved.right.mean()))
        write_json(self.path, {"rows": noted})
