"""A pipeline together with the task whose problems it samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cosprobe.config import PipelineConfig, TrainerConfig
from cosprobe.models import (
    TokenGrid,
    architecture,
    block_list,
    decode,
    experts,
    first_transformer,
    sample,
    with_defaults,
)
from cosprobe.tasks import Problem, Sample, Task

NOT_SEEN = (
    "this is a text-to-video model: it never sees the image that the problem is in, so no probe can find the answer "
    "other than by chance; use an image-to-video model, or problems in words"
)


@dataclass(frozen=True, eq=False)
class Parsed:
    """Parsed answers of one video per problem. answers: -1 for none. scores: one per candidate."""

    answers: Int[Tensor, " sample"]
    scores: Float[Tensor, "sample candidate"]

    @property
    def forced(self) -> Int[Tensor, " sample"]:
        """The candidate with the highest score."""
        return self.scores.argmax(dim=-1)


def unparsed(samples: int) -> Parsed:
    """What stands in place of parsed answers where the task has no parser: no answer, and no candidates."""
    return Parsed(torch.full((samples,), -1), torch.empty(samples, 0))


@dataclass(frozen=True, eq=False)
class Sampler:
    """A loaded diffusers pipeline (`model`), its settings, and the task whose problems it samples.

    Settings that are 0 or empty become the defaults of the model.
    trainer: the Lightning trainer under which many problems are sampled.
    """

    model: Any
    config: PipelineConfig
    task: Task
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", with_defaults(self.config, self.model))  # frozen

    def __call__(self, samples: Sequence[Sample], **overrides: Any) -> np.ndarray | Tensor:
        """Samples videos: float [sample, frame, height, width, 3] in [0, 1]. overrides: see `models.sample`."""
        problems = [s.problem for s in samples]
        prompts, seeds = [p.prompt for p in problems], [s.seed for s in samples]
        return sample(self.model, self.config, images(self.task, problems), prompts, seeds, **overrides)

    def decode(self, latents: Tensor) -> np.ndarray:
        """Decodes latents, as `models.decode` takes them, into videos with the axes and range of finished videos."""
        return decode(self.model, latents, self.config.frames)

    def parse(self, problems: Sequence[Problem], video: np.ndarray | Tensor) -> Parsed:
        """Parses the answer of every video."""
        read = [self.task.parse(problem, clip) for problem, clip in zip(problems, np.asarray(video), strict=True)]
        answers = torch.tensor([-1 if r.answer is None else r.answer for r in read])
        return Parsed(answers, torch.tensor([r.scores for r in read]))

    def batches(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """Divides the samples into batches of `pipeline.batch`."""
        size = self.config.batch
        return [list(samples[start : start + size]) for start in range(0, len(samples), size)]

    @property
    def sees_image(self) -> bool:
        """Whether the model is given the image of a problem."""
        return architecture(self.model).takes_image(self.model)

    @property
    def depth(self) -> int:
        """Number of blocks; with several experts the smallest."""
        return min(len(block_list(self.model, model)) for model in experts(self.model).values())

    @property
    def token_frames(self) -> int:
        """Number of frames of the token grid of a video."""
        family = architecture(self.model)
        return family.token_frames(self.model, first_transformer(self.model), self.config.frames)

    @property
    def token_grid(self) -> TokenGrid:
        """The token grid of a video."""
        transformer = first_transformer(self.model)
        height, width = self.task.image(self.task.problems("test", 1)[0]).shape[:2]
        return architecture(self.model).video_grid(self.model, transformer, self.config.frames, height, width)


def images(task: Task, problems: Sequence[Problem]) -> Float[Tensor, "batch 3 height width"]:
    """The first frames of the problems, with values in [0, 1]."""
    frames = np.stack([task.image(problem) for problem in problems])
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
