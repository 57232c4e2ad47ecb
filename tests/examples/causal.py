"""A finished run of a toy pipeline whose random videos have answers, and a pipeline with a planted cause."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cosprobe.activations.collection import StoreSettings
from cosprobe.activations.dataset import load_samples
from cosprobe.activations.sampler import Sampler
from cosprobe.config import CaptureConfig, PipelineConfig, ProbeConfig, TrainerConfig
from cosprobe.evaluation import build_grid, read_inputs
from cosprobe.evaluation.predictions import evaluate
from cosprobe.models import load_pipeline
from cosprobe.models.pipelines import experts
from cosprobe.probes import ProbeBank, fit
from cosprobe.tasks import MazeConfig, ParsedAnswer, Problem, Task, TaskConfig, draw_samples
from cosprobe.tasks.maze import Maze
from tests.examples.pipelines import save_wan
from tests.examples.stores import collected

STEPS, FRAMES = 3, 5
CONFIG = PipelineConfig(steps=STEPS, guidance=1.0, frames=FRAMES, prompt_tokens=32, batch=6)


def shown(code: int | None, candidates: int = 4) -> ParsedAnswer:
    """What a parser returns for a video that shows `code`."""
    return ParsedAnswer(code, tuple(float(i == code) for i in range(candidates)), 0.0)


def hashed(task: Task) -> Task:
    """The same task; its answers are numbers that any change of the video changes; one in eight shows none."""

    def parse(self: Task, problem: Problem, video: np.ndarray) -> ParsedAnswer:
        code, options = int(np.abs(video.astype(np.float64)).mean() * 2**24), self.plausible_answers(problem)
        return shown(None if code % 8 == 7 else options[code // 8 % len(options)], self.candidates)

    found = copy(task)
    object.__setattr__(found, "__class__", type("Hashed", (type(task),), {"parse": parse}))
    return found


@dataclass(frozen=True)
class Brightness(Maze):
    """Mazes whose answer is the brightness of the video, in fifths; black shows none."""

    def parse(self, problem: Problem, video: np.ndarray) -> ParsedAnswer:
        code = round(float(video.mean()) * 5) - 1
        return shown(code if code >= 0 else None)


@dataclass(frozen=True)
class Finished:
    """A finished run: all that `intervene` takes but its settings and seed."""

    sampler: Sampler
    task: TaskConfig
    bank: ProbeBank
    folder: Path


def finished(
    place: Path,
    task: TaskConfig | None = None,
    capture: CaptureConfig | None = None,
    kind: str = "ridge",
    **config: Any,
) -> Finished:
    """Collects, fits and evaluates as train.py does, without a report. config: settings of the pipeline.

    The run with default settings is made once in a process, and copied.
    """
    if task is None and capture is None and kind == "ridge" and not config:
        kept = _once()
        shutil.copytree(kept.folder.parent.parent, place, dirs_exist_ok=True)
        made = replace(CONFIG, path=str(place / "model"))
        sampler = Sampler(load_pipeline(made), made, kept.sampler.task)
        return replace(kept, sampler=sampler, folder=place / "run" / kind)
    return _made(place, task, capture, kind, **config)


@cache
def _once() -> Finished:
    place = Path(tempfile.mkdtemp(prefix="finished-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return _made(place)


def _made(
    place: Path,
    task: TaskConfig | None = None,
    capture: CaptureConfig | None = None,
    kind: str = "ridge",
    **config: Any,
) -> Finished:
    task, capture = (
        task or MazeConfig(frames=FRAMES, problems=40),
        capture or CaptureConfig(decode="last", random_weights=0),
    )
    save_wan(place / "model", config.pop("experts", 1))
    made = replace(CONFIG, path=str(place / "model"), **config)
    sampler = Sampler(load_pipeline(made), made, hashed(task.build()))
    settings, folder = StoreSettings.of(made, task, capture, 0), place / "run" / kind
    stored = collected(sampler, draw_samples(sampler.task, task, 0), settings, folder.parent)
    folder.mkdir(parents=True)
    stored.save(folder)
    samples, inputs, experts_of_steps = load_samples(stored)
    recipe, trainer = ProbeConfig(kind=kind, penalties=[0.1]), TrainerConfig(precision="32-true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bank = fit(samples, recipe, trainer, folder / "tensorboard", 0).with_provenance(store=settings)
        readings = read_inputs(samples, inputs, recipe.kind, recipe.penalties)
        grid = build_grid(evaluate(samples, experts_of_steps, bank, readings), draws=99)
    grid.save(folder / "report" / "grid.nc")
    return Finished(sampler, task, bank, folder)


@dataclass
class Planted:
    """The codes of the samples of the running call, in order, and the cell that carries them."""

    step: int
    layer: int
    codes: Sequence[int] = ()


@contextmanager
def planted(pipeline: Any, step: int, layer: int) -> Iterator[Planted]:
    """A pipeline whose video shows the code in the output of one block at one step, and nothing else.

    The block writes the code of its sample to channel 0 of all tokens, whatever its input. The transformer reads it
    there: where all tokens of a sample hold the same code, the video is code + 1 fifths bright, otherwise black.
    """
    found = Planted(step, layer)
    (model,) = experts(pipeline).values()
    seen = list[int]()

    def now() -> int:
        return pipeline.scheduler._step_index or 0

    def write(block: Any, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if now() != step:
            return None
        output = output.clone()
        output[..., 0] = torch.tensor(found.codes).to(output)[:, None]
        return output

    def read(block: Any, args: tuple, kwargs: dict) -> None:
        if now() == step:
            tokens = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])[..., 0]
            same = (tokens == tokens[:, :1]).all(dim=1) & torch.isin(tokens[:, 0], torch.arange(4.0))
            seen[:] = torch.where(same, tokens[:, 0], -1).tolist()

    def mark(part: Any, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if now() != step:
            return None
        scheduler = pipeline.scheduler
        change = scheduler.sigmas[step + 1] - scheduler.sigmas[step]
        return torch.zeros_like(output) + 1000 * (torch.tensor(seen) + 1)[:, None, None] / change

    def decode(latent: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        mean, std = (torch.tensor(getattr(pipeline.vae.config, f"latents_{n}")) for n in ("mean", "std"))
        code = ((latent.mean(dim=(2, 3, 4)) - mean) / std / 1000).mean(dim=1).round()
        size = [side * 8 for side in latent.shape[3:]]
        return ((code / 5 * 2 - 1)[:, None, None, None, None].expand(-1, 3, FRAMES, *size),)

    hooks = [
        model.blocks[layer].register_forward_hook(write),
        model.blocks[layer + 1].register_forward_pre_hook(read, with_kwargs=True),
        model.proj_out.register_forward_hook(mark),
    ]
    original, pipeline.vae.decode = pipeline.vae.decode, decode
    try:
        yield found
    finally:
        pipeline.vae.decode = original
        for hook in hooks:
            hook.remove()
