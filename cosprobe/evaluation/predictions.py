"""Predictions of a bank's probes on validation and test. A grid is computed from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from cosprobe.activations import ProbeSamples
from cosprobe.cells import Cell
from cosprobe.errors import InputError
from cosprobe.probes import ProbeBank, blocks, brier, ece
from cosprobe.runtime import return_freed_memory
from cosprobe.tasks import ANSWER_ROLES, Role, Target


@dataclass(frozen=True)
class SplitPredictions:
    """Predictions of one target on one split.

    labels: samples with label -1 are left out (for region labels: -1 in every region).
    keys: the problem of each sample.
    predicted: labels predicted at each cell.
    x0_parsed: the candidate with the highest parser score in the decoded x0-hat, at each step of the grid; -1 at steps
    that were not decoded.
    model_answer: what the finished video shows, -1 for no answer.
    inputs: labels predicted by the probes on inputs and on `x0_latent`, by name.
    fold: with cross-fitting, the number of the bank that predicted each sample.
    """

    labels: Int[np.ndarray, "*label"]
    keys: Shaped[np.ndarray, "sample"]
    predicted: Int[np.ndarray, "cell *label"]
    x0_parsed: Int[np.ndarray, "step sample"] | None = None
    model_answer: Int[np.ndarray, "sample"] | None = None
    inputs: dict[str, Int[np.ndarray, "step position *label"]] = field(default_factory=dict)
    fold: Int[np.ndarray, "sample"] | None = None

    def carried(self) -> SplitPredictions:
        """Only the samples that have a label of the target.

        Raises InputError for a sample with labels in some of its regions only.
        """
        known = np.asarray(self.labels) >= 0
        keep = known if known.ndim == 1 else known.all(axis=1)
        if known.ndim == 2 and (known.any(axis=1) != keep).any():
            raise InputError("region labels: expected -1 in every region of a sample or in none")
        optional = (self.x0_parsed, self.model_answer, self.fold)
        take = [None if x is None else np.asarray(x)[..., keep] for x in optional]
        labels, keys = np.asarray(self.labels)[keep], np.asarray(self.keys)[keep]
        inputs = {name: np.asarray(labels)[:, :, keep] for name, labels in self.inputs.items()}
        x0_parsed, model_answer, fold = take
        predicted = np.asarray(self.predicted)[:, keep]
        return SplitPredictions(labels, keys, predicted, x0_parsed, model_answer, inputs, fold)


@dataclass(frozen=True)
class InputReading:
    """Probes of one target on one input, at every step and position of the grid.

    form: the form of the input that was kept. accuracy: cross-validated accuracy of that form. penalty: penalty of the
    probe. columns: number of features. projected: number of principal axes of the training samples that features were
    projected onto; equal to columns where they were not projected. validation, test: predicted labels.
    """

    form: Shaped[np.ndarray, "step position"]
    accuracy: Float[np.ndarray, "step position"]
    penalty: Float[np.ndarray, "step position"]
    columns: Int[np.ndarray, "step position"]
    projected: Int[np.ndarray, "step position"]
    validation: Int[np.ndarray, "step position *validation"]
    test: Int[np.ndarray, "step position *test"]


@dataclass(frozen=True)
class TargetPredictions:
    """Predictions of one target on validation and test, and how its probes were trained.

    train_labels, train_keys: training labels, and the problem of each training sample.
    penalties: the penalty chosen for each cell.
    n_no_answer: number of samples left out because the finished video shows no answer.
    calibration: of each cell, `temperature`, and on test `brier`, `ece` and `ece_raw` (ECE without the temperature).
    readings: probes on inputs, by name of the input.
    """

    target: Target
    train_labels: Int[np.ndarray, "*train"]
    train_keys: Shaped[np.ndarray, "sample"]
    validation: SplitPredictions
    test: SplitPredictions
    penalties: Float[np.ndarray, "cell"]
    n_no_answer: int = 0
    calibration: dict[str, Float[np.ndarray, "cell"]] = field(default_factory=dict)
    readings: dict[str, InputReading] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluated:
    """Predictions of all targets, from which a grid is built.

    cells: the cell axis of every prediction; all cells are layers.
    experts: the transformer that ran at each step of `cells`, in order of steps.
    results: one per target.
    left_out: a sentence for each target without probes that gives the reason.
    """

    cells: tuple[Cell, ...]
    experts: tuple[str, ...]
    results: tuple[TargetPredictions, ...]
    left_out: tuple[str, ...] = ()

    @property
    def steps(self) -> tuple[int, ...]:
        """Step indices of the cells, sorted."""
        return tuple(sorted({cell.step for cell in self.cells}))

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of the cells, sorted."""
        return tuple(sorted({cell.layer for cell in self.cells}))

    @property
    def branches(self) -> tuple[str, ...]:
        """Branches of the cells, in order of appearance."""
        return tuple(dict.fromkeys(cell.branch for cell in self.cells))

    @property
    def positions(self) -> tuple[str, ...]:
        """Positions of the cells, in order of appearance."""
        return tuple(dict.fromkeys(cell.position for cell in self.cells))

    def index(self) -> Int[np.ndarray, "step layer branch position"]:
        """Index into `cells` by step, layer, branch and position; -1 where there is no such cell."""
        axes = (self.steps, self.layers, self.branches, self.positions)
        position = np.full([len(axis) for axis in axes], -1)
        for i, cell in enumerate(self.cells):
            names = (cell.step, cell.layer, cell.branch, cell.position)
            position[tuple(axis.index(name) for axis, name in zip(axes, names, strict=True))] = i
        return position


def evaluate(
    samples: ProbeSamples,
    experts: Sequence[str],
    bank: ProbeBank,
    readings: Mapping[str, Mapping[str, InputReading]] | None = None,
) -> Evaluated:
    """Predicts every target of the bank at every cell, on validation and test.

    experts: the transformer of each step in `samples`. readings: probes on inputs, by target and input.
    """
    steps = sorted({cell.step for cell in samples.cells})
    train, validation, test = (samples.subset(split) for split in ("train", "validation", "test"))
    settled = np.zeros(len(samples)) if samples.model_answer is None else samples.model_answer
    each = (len(validation) + len(test)) * math.prod(samples.features.shape[2:])
    few = blocks(len(samples.cells), 4 * each)  # features of 32 MB, and what is computed from them
    held_out = samples.rows(np.flatnonzero(np.isin(samples.split, ("validation", "test"))))
    parts = [_of_cells(held_out.at(part), bank.select(bank.cells[part])) for part in few]
    results = []
    for target in bank.targets:
        joined = {name: np.concatenate([one[target.name][name] for one in parts]) for name in parts[0][target.name]}
        predicted = [joined.pop(split) for split in ("validation", "test")]
        read = dict((readings or {}).get(target.name, {}))
        kinds = np.isin(samples.kinds, target.kinds)
        none = int((kinds & (settled < 0)).sum()) if target.role is Role.MODEL_ANSWER else 0
        results.append(
            TargetPredictions(
                target,
                train.labels[target.name].numpy(),
                train.keys,
                _predictions(validation, target, predicted[0], steps, {n: one.validation for n, one in read.items()}),
                _predictions(test, target, predicted[1], steps, {n: one.test for n, one in read.items()}),
                bank.penalties[target.name].numpy(),
                none,
                joined,
                read,
            )
        )
    return Evaluated(samples.cells, tuple(experts), tuple(results), samples.left_out)


def _predictions(
    samples: ProbeSamples, target: Target, predicted: np.ndarray, steps: list[int], inputs: dict[str, np.ndarray]
) -> SplitPredictions:
    x0_parsed = None
    if target.role in ANSWER_ROLES and "x0_scores" in samples.scores:  # the candidate with the highest parser score
        scores = samples.scores["x0_scores"][:, steps]
        x0_parsed = np.where(np.isnan(scores).any(-1), -1, np.nan_to_num(scores).argmax(-1)).T
    return SplitPredictions(
        labels=samples.labels[target.name].numpy(),
        keys=samples.keys,
        predicted=predicted,
        x0_parsed=x0_parsed,
        model_answer=samples.model_answer,
        inputs=inputs,
    )


def _of_cells(held_out: ProbeSamples, bank: ProbeBank) -> dict[str, dict[str, np.ndarray]]:
    """For every target: predicted labels by split, and the calibration of some cells, which are those of the bank.

    held_out: validation and test samples.
    """
    found, features = dict[str, dict[str, np.ndarray]](), held_out.features[:]
    validation, test = (torch.from_numpy(held_out.split == split) for split in ("validation", "test"))
    for target in bank.targets:
        raw, label = bank.decision(features, target.name), held_out.labels[target.name]
        picked = raw.argmax(dim=-1)
        predicted = {"validation": picked[:, validation].numpy(), "test": picked[:, test].numpy()}
        found[target.name] = predicted | _calibration(raw[:, test], label[test].flatten(), target, bank)
    del features, raw
    return_freed_memory()
    return found


def _calibration(
    raw: Float[Tensor, "cell sample *region out"], labels: Int[Tensor, " row"], target: Target, bank: ProbeBank
) -> dict[str, np.ndarray]:
    """Calibration of the cells on test. Empty if the bank has no temperatures for the target or test has no labels.

    raw: decision values.
    """
    if target.name not in bank.temperatures or not (labels >= 0).any():
        return {}
    raw = raw.reshape(len(bank.cells), len(labels), -1)
    heat = bank.temperatures[target.name]
    proba = (raw / heat[:, None, None]).softmax(dim=-1)
    values = {"temperature": heat, "ece": ece(proba, labels), "ece_raw": ece(raw.softmax(-1), labels)}
    return {name: value.numpy() for name, value in (values | {"brier": brier(proba, labels)}).items()}
