"""The clean run of a batch of samples, and what edits of the batch take from it: first steps, states, donors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cosprobe.activations import Sampler
from cosprobe.causal.patching import At
from cosprobe.causal.prefix import Prefix, recorded, replayed
from cosprobe.causal.states import record_states
from cosprobe.models import stop_after
from cosprobe.tasks import Problem, Region, Sample, Task

NONE = -1  # in place of an answer or of a donor


class Donors(NamedTuple):
    """For every sample, index in the batch of the sample that gives its states; NONE where there is no such sample.

    other: its finished video shows another answer, which the host could show as well. same: it shows the same answer.
    """

    other: Int[np.ndarray, " sample"]
    same: Int[np.ndarray, " sample"]


def choose_donors(task: Task, problems: Sequence[Problem], answers: Sequence[int]) -> Donors:
    """Chooses the donors of every sample from the samples of its batch.

    answers: of the clean runs, NONE for none. Where a problem is in the batch several times, with other noise seeds,
    donors are samples of the same problem. Otherwise they are other problems, taken in turn, so that no sample gives
    its states to all others.
    """
    count, found = len(problems), ([NONE] * len(problems), [NONE] * len(problems))
    for i, problem in enumerate(problems):
        if answers[i] == NONE:
            continue
        plausible = set(task.plausible_answers(problem))
        order = [(i + shift) % count for shift in range(1, count)]
        seeds = [j for j in order if problems[j].name == problem.name]
        for j in seeds or order:
            if answers[j] == answers[i] and found[1][i] == NONE:
                found[1][i] = j
            if answers[j] not in (NONE, answers[i]) and answers[j] in plausible and found[0][i] == NONE:
                found[0][i] = j
    return Donors(*(np.array(each) for each in found))


@dataclass(eq=False)
class CleanRun:
    """One batch of samples, all of one kind, sampled without edits.

    sampler: with the number of steps of this run. layers: the blocks whose states are kept. On first access the batch
    is sampled. Its answers are `answers`, NONE for none; the videos `video`; its first steps `prefix`.
    """

    sampler: Sampler
    samples: Sequence[Sample]
    layers: Sequence[int]
    evaluations: int = 0  # of the transformer, per sample, with guidance counted once
    _states: dict[int, dict[At, Tensor]] = field(default_factory=dict)
    _norms: dict[At, Tensor] = field(default_factory=dict)
    _every: dict[At, Tensor] | None = None

    @property
    def problems(self) -> list[Problem]:
        """The problem of every sample."""
        return [sample.problem for sample in self.samples]

    @property
    def seeds(self) -> list[int]:
        """The noise seed of every sample."""
        return [sample.seed for sample in self.samples]

    @cached_property
    def _run(self) -> tuple[Prefix, np.ndarray]:
        with recorded(self.sampler.model) as prefix:
            video = np.asarray(self.sampler(self.samples))
        self.evaluations += self.sampler.config.steps
        return prefix, video

    @property
    def prefix(self) -> Prefix:
        """What the transformer and the encoders computed."""
        return self._run[0]

    @property
    def video(self) -> np.ndarray:
        """[sample, frame, height, width, 3] in [0, 1]."""
        return self._run[1]

    @cached_property
    def answers(self) -> Int[Tensor, " sample"]:
        """What the videos show."""
        return self.sampler.parse(self.problems, self.video).answers

    @cached_property
    def donors(self) -> Donors:
        """The donors of every sample."""
        return choose_donors(self.sampler.task, self.problems, self.answers.tolist())

    def boxes(self, first: Sequence[Sequence[int]]) -> list[list[Region]]:
        """The regions of every sample, with those that are named first, in this order, and then the others."""
        found = []
        for problem, chosen in zip(self.problems, first, strict=True):
            rest = [i for i in range(len(problem.regions)) if i not in chosen]
            found.append([problem.regions[i] for i in (*chosen, *rest)])
        return found

    def states(self, step: int) -> dict[At, Tensor]:
        """Outputs of the blocks `layers` at a step (a step index), on the CPU, for every guidance branch.

        Steps before it are replayed, and the run ends after it. States of the last two steps are kept.
        """
        if step not in self._states:
            while len(self._states) > 1:
                self._states.pop(next(iter(self._states)))
            self._states[step] = self._recorded(step)
            self.evaluations += 1
        return self._states[step]

    def forget_states(self) -> None:
        """Forgets all states, so that they are recorded anew."""
        self._states.clear()
        self._norms.clear()
        self._every = None

    def states_of_all_steps(self) -> dict[At, Tensor]:
        """The same of every step, from one whole run. All of them are kept: for models and batches that allow it."""
        if self._every is None:
            steps = range(self.sampler.config.steps)
            with record_states(self.sampler.model, self.layers, steps) as found:
                self.sampler(self.samples, output_type="latent")
            self.evaluations += len(steps)
            self._every = found
        return self._every

    def token_norms(self, at: At) -> Float[Tensor, " sample"]:
        """Mean norm of the tokens of every sample in a state."""
        if at not in self._norms:
            self._norms[at] = self.states(at.step)[at].float().norm(dim=-1).mean(dim=1)
        return self._norms[at]

    def _recorded(self, step: int) -> dict[At, Tensor]:
        pipeline = self.sampler.model
        with record_states(pipeline, self.layers, [step]) as found, replayed(pipeline, self.prefix, step):
            self.sampler(self.samples, callback_on_step_end=stop_after(step), output_type="latent")
        return found


def with_steps(sampler: Sampler, steps: int) -> Sampler:
    """The same sampler with another number of steps; 0: as it is."""
    return replace(sampler, config=replace(sampler.config, steps=steps)) if steps else sampler


def taken_from(states: dict[At, Tensor], rows: Int[np.ndarray, " sample"], step: int | None = None) -> dict[At, Tensor]:
    """The states of other samples of the batch, as those of `step` (default: of their own step). rows: whose; NONE: the
    sample's own."""
    own = np.arange(len(rows))
    at = torch.from_numpy(np.where(rows == NONE, own, rows))
    return {key if step is None else key._replace(step=step): state[at] for key, state in states.items()}


def random_states(states: dict[At, Tensor], seed: int) -> dict[At, Tensor]:
    """Gaussian states in which every token has the norm it has in `states`."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for key, state in states.items():
        drawn = torch.randn(state.shape, generator=generator)
        scale = state.float().norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        found[key] = (drawn * scale).to(state.dtype)
    return found
