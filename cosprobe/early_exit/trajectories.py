"""Trajectories for early exit: finished runs of many problems, with the features at every exit point, kept on disk.

The early answers and costs of any policy are computed from them, so every problem is sampled only once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cosprobe.activations import (
    ActivationStore,
    FrozenSampling,
    Pooling,
    Sampled,
    Sampler,
    Shard,
    announce,
    capture,
    predict_shards,
)
from cosprobe.cells import Cell
from cosprobe.early_exit.reader import probabilities
from cosprobe.probes import ProbeBank
from cosprobe.tasks import Problem, Sample, Task

FOLDER = "early"  # inside the run folder


@dataclass(frozen=True, eq=False)
class ExitPoints:
    """Points at which a run may stop: the probes of one target at one cell per step, in the order of sampling."""

    bank: ProbeBank
    target: str
    cells: tuple[Cell, ...]

    def probabilities(
        self, features: Float[Tensor, "sample exit_point region channel"]
    ) -> Float[Tensor, "exit_point sample classes"]:
        """Calibrated probabilities of the classes at every exit point."""
        return probabilities(self.bank, features.float(), self.target, self.cells)

    @property
    def layers(self) -> list[int]:
        """Layers of the exit points, sorted."""
        return sorted({cell.layer for cell in self.cells})

    @property
    def steps(self) -> list[int]:
        """Step indices of the exit points, sorted."""
        return sorted({cell.step for cell in self.cells})


@dataclass(frozen=True)
class Trajectories:
    """Predictions at every exit point and results of the finished runs, one sample per problem.

    predictions: the class with the highest probability. confidence: its calibrated probability. entropy: of the
    probabilities of all classes, in nats.
    model_answer: what the finished video shows, -1 for no answer.
    x0_predictions: the candidate with the highest parser score in the decoded x0-hat, at the step indices `decoded`.
    correct, x0_correct, model_correct: whether predictions, x0_predictions and model_answer are right.
    classes: number of classes of the probes.
    """

    problems: tuple[Problem, ...]
    predictions: Int[np.ndarray, "sample exit_point"]
    confidence: Float[np.ndarray, "sample exit_point"]
    entropy: Float[np.ndarray, "sample exit_point"]
    model_answer: Int[np.ndarray, " sample"]
    x0_predictions: Int[np.ndarray, "sample decoded"]
    correct: Bool[np.ndarray, "sample exit_point"]
    x0_correct: Bool[np.ndarray, "sample decoded"]
    model_correct: Bool[np.ndarray, " sample"]
    decoded: tuple[int, ...]
    classes: int

    @classmethod
    def of(
        cls,
        task: Task,
        samples: Sequence[Sample],
        proba: Float[Tensor, "exit_point sample classes"],
        ends: dict[str, Tensor],
        decoded: tuple[int, ...],
    ) -> Trajectories:
        """Builds trajectories from sampled runs. ends: `model_answer` and `x0_predictions` of the runs."""
        problems = tuple(s.problem for s in samples)
        proba = proba.double()
        predictions = proba.argmax(dim=-1).T.numpy()
        answers, of_x0 = ends["model_answer"].numpy(), ends["x0_predictions"].numpy()
        solutions = np.zeros((len(samples), max(task.candidates, proba.shape[-1]) + 1), dtype=bool)  # last: no answer
        for row, problem in zip(solutions, problems, strict=True):
            row[list(task.solutions(problem))] = True
        rows = np.arange(len(samples))
        return cls(
            problems=problems,
            predictions=predictions,
            confidence=proba.amax(dim=-1).T.numpy(),
            entropy=torch.special.entr(proba).sum(dim=-1).T.numpy(),
            model_answer=answers,
            x0_predictions=of_x0,
            correct=solutions[rows[:, None], predictions],
            x0_correct=solutions[rows[:, None], of_x0],
            model_correct=solutions[rows, answers],
            decoded=decoded,
            classes=proba.shape[-1],
        )

    def errors(self, reference: str) -> Bool[np.ndarray, "sample exit_point"]:
        """True where an early answer would be an error. reference: see `Policy.error_reference`."""
        return ~self.correct if reference == "truth" else self.predictions != self.model_answer[:, None]

    @property
    def keys(self) -> np.ndarray:
        """The problem key of every sample."""
        return np.array([p.key for p in self.problems])


def sample_trajectories(
    sampler: Sampler, exits: ExitPoints, samples: Sequence[Sample], decoded: tuple[int, ...], folder: Path
) -> Trajectories:
    """Samples the runs that are not in the run's `folder` yet, and predicts with the probes.

    decoded: step indices at which x0-hat is decoded and parsed.
    """
    bank, first = exits.bank, samples[0].problem
    identity = bank.store.identity | {
        "kind": first.kind,
        "split": first.split,
        "cells": [str(cell) for cell in exits.cells],
        "decoded": list(decoded),
    }
    name = f"{first.kind}-{first.split}-{ActivationStore(folder, identity).fingerprint[:8]}"  # per settings
    store = ActivationStore(folder / FOLDER / name, identity)
    size = 4 * len(samples) * len(exits.cells) * bank.regions * bank.mean.shape[1]
    names = [sample.name for sample in samples]
    absent = set(store.missing(names))
    announce(store, names, len(absent), size, f"{len(samples)} {first.kind} problems of split {first.split}")
    shards = [
        Shard(store, {"": [sample.name for sample in batch]}, batch)
        for batch in sampler.batches([sample for sample in samples if sample.name in absent])
    ]
    predict_shards(ExitPointSampler(sampler, exits, decoded), shards, [(store, names)], sampler.trainer)
    tensors, _ = store.read(names=names)
    return Trajectories.of(sampler.task, samples, exits.probabilities(tensors["features"]), tensors, decoded)


class ExitPointSampler(FrozenSampling):
    """Samples finished runs and captures the features at every exit point, for `Trainer.predict`.

    decoded: step indices at which x0-hat is decoded and parsed.
    """

    def __init__(self, sampler: Sampler, exits: ExitPoints, decoded: tuple[int, ...]):
        super().__init__(sampler)
        self.exits, self.decoded = exits, decoded

    def predict_step(self, batch: Shard, index: int) -> Sampled:
        """Features [sample, exit_point, region, channel] and the answers of the finished runs."""
        return _sample_batch(self.sampler, self.exits, self.decoded, batch.content)


@torch.no_grad()
def _sample_batch(sampler: Sampler, exits: ExitPoints, decoded: tuple[int, ...], batch: list[Sample]) -> Sampled:
    """Contents of one shard, see `ExitPointSampler`."""
    problems = [s.problem for s in batch]
    pooling, steps = Pooling.of(exits.bank.store.probe, problems), ",".join(map(str, exits.steps))
    with capture(sampler.model, list(map(str, exits.layers)), pooling, steps, clean=decoded) as cache:
        video = sampler(batch)
    features = torch.stack([cache.at(cell) for cell in exits.cells], dim=1)
    of_x0 = torch.zeros((len(batch), len(decoded)), dtype=torch.int64)
    for i, step in enumerate(decoded):
        of_x0[:, i] = sampler.parse(problems, sampler.decode(cache.clean[step])).forced
    ends = {"model_answer": sampler.parse(problems, video).answers, "x0_predictions": of_x0}
    return {"features": features, **ends}, {"cells": list(map(str, exits.cells))}
