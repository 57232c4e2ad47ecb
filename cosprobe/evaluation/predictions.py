"""What frozen probes predict on validation and test: the numbers a grid is built from, before any statistics."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int, Shaped

from cosprobe.cells import Cell
from cosprobe.errors import InputError
from cosprobe.tasks import Target


@dataclass(frozen=True)
class SplitPredictions:
    """One target on one split, probes already frozen.

    labels: -1 (every region of a row, for region labels) leaves the sample out. keys: problem of each sample.
    predicted: label each cell gives. readout: forced-choice answer of decoded x0-hat at each step of the grid, -1 in
    steps that were not decoded. drawn: the model's own final answer, -1 for none. inputs: by name of an input, and
    for `x0_latent`, the label that its probe gives.
    """

    labels: Int[np.ndarray, "*label"]
    keys: Shaped[np.ndarray, "sample"]
    predicted: Int[np.ndarray, "cell *label"]
    readout: Int[np.ndarray, "step sample"] | None = None
    drawn: Int[np.ndarray, "sample"] | None = None
    inputs: dict[str, Int[np.ndarray, "step place *label"]] = field(default_factory=dict)

    def carried(self) -> SplitPredictions:
        """Only the samples that carry the target."""
        known = np.asarray(self.labels) >= 0
        keep = known if known.ndim == 1 else known.all(axis=1)
        if known.ndim == 2 and (known.any(axis=1) != keep).any():
            raise InputError("region labels: expected -1 in every region of a sample or in none")
        take = [None if x is None else np.asarray(x)[..., keep] for x in (self.readout, self.drawn)]
        labels, keys = np.asarray(self.labels)[keep], np.asarray(self.keys)[keep]
        inputs = {name: np.asarray(said)[:, :, keep] for name, said in self.inputs.items()}
        readout, drawn = take
        return SplitPredictions(labels, keys, np.asarray(self.predicted)[:, keep], readout, drawn, inputs)


@dataclass(frozen=True)
class InputReading:
    """What was read of one target from one input, frozen, at every step and place of the grid.

    form: the form that was kept. accuracy: of that form, in cross-validation. penalty: of its probe. columns: how many
    numbers it has per row. projected: to how many principal axes of the training samples they were brought down; equal
    to columns where they were not. validation, test: the labels it gives.
    """

    form: Shaped[np.ndarray, "step place"]
    accuracy: Float[np.ndarray, "step place"]
    penalty: Float[np.ndarray, "step place"]
    columns: Int[np.ndarray, "step place"]
    projected: Int[np.ndarray, "step place"]
    validation: Int[np.ndarray, "step place *validation"]
    test: Int[np.ndarray, "step place *test"]


@dataclass(frozen=True)
class TargetPredictions:
    """One target: training labels and the problem of each, predictions on validation and test, the lambda chosen for
    each cell, how many samples were left out because the model settled on no answer, and how far probabilities can be
    trusted (`temperature`, and on test `brier`, `ece` and `ece_raw`, the latter without the temperature). readings: of
    every input that was read, in what form, and its accuracy in cross-validation."""

    target: Target
    train_labels: Int[np.ndarray, "*train"]
    train_keys: Shaped[np.ndarray, "sample"]
    validation: SplitPredictions
    test: SplitPredictions
    lambdas: Float[np.ndarray, "cell"]
    n_none: int = 0
    trust: dict[str, Float[np.ndarray, "cell"]] = field(default_factory=dict)
    readings: dict[str, InputReading] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluated:
    """What a grid is built from. cells: the cells axis of every prediction, all of them layers.
    experts: which transformer ran, for each step that occurs in cells, in order. results: one per target. left_out:
    why there are no probes of a target, a sentence each."""

    cells: tuple[Cell, ...]
    experts: tuple[str, ...]
    results: tuple[TargetPredictions, ...]
    left_out: tuple[str, ...] = ()

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(sorted({cell.step for cell in self.cells}))

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({int(cell.site) for cell in self.cells}))

    @property
    def branches(self) -> tuple[str, ...]:
        """In order of appearance."""
        return tuple(dict.fromkeys(cell.branch for cell in self.cells))

    @property
    def places(self) -> tuple[str, ...]:
        """In order of appearance."""
        return tuple(dict.fromkeys(cell.place for cell in self.cells))

    def index(self) -> Int[np.ndarray, "step layer branch place"]:
        """Where each cell stands in `cells`, -1 for one that is absent."""
        axes = (self.steps, self.layers, self.branches, self.places)
        position = np.full([len(axis) for axis in axes], -1)
        for i, cell in enumerate(self.cells):
            names = (cell.step, int(cell.site), cell.branch, cell.place)
            position[tuple(axis.index(name) for axis, name in zip(axes, names, strict=True))] = i
        return position
