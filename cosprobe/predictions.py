"""What frozen probes predict on validation and test: the numbers a grid is built from, before any statistics."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int, Shaped

from cosprobe.tasks import Target
from cosprobe.types import EVERY_STEP, FIXED, SOURCES, Cell


@dataclass(frozen=True)
class SplitPredictions:
    """One target on one split, probes already frozen.

    labels: -1 (every region of a row, for region labels) leaves the sample out. keys: problem of each sample.
    predicted: label each cell gives. readout: forced-choice answer of decoded x0-hat at each step of the grid, -1 in
    steps that were not decoded. drawn: the model's own final answer, -1 for none.
    """

    labels: Int[np.ndarray, "*label"]
    keys: Shaped[np.ndarray, "sample"]
    predicted: Int[np.ndarray, "cell *label"]
    readout: Int[np.ndarray, "step sample"] | None = None
    drawn: Int[np.ndarray, "sample"] | None = None

    def carried(self) -> SplitPredictions:
        """Only the samples that carry the target."""
        known = np.asarray(self.labels) >= 0
        keep = known if known.ndim == 1 else known.all(axis=1)
        if known.ndim == 2 and (known.any(axis=1) != keep).any():
            raise ValueError("region labels: expected -1 in every region of a sample or in none")
        take = [None if x is None else np.asarray(x)[..., keep] for x in (self.readout, self.drawn)]
        labels, keys = np.asarray(self.labels)[keep], np.asarray(self.keys)[keep]
        return SplitPredictions(labels, keys, np.asarray(self.predicted)[:, keep], *take)


@dataclass(frozen=True)
class TargetPredictions:
    """One target: training labels, predictions on validation and test, the lambda chosen for each cell, how many
    samples were left out because the model settled on no answer, and how far probabilities can be trusted
    (`temperature`, and on test `brier`, `ece` and `ece_raw`, the latter without the temperature)."""

    target: Target
    train_labels: Int[np.ndarray, "*train"]
    validation: SplitPredictions
    test: SplitPredictions
    lambdas: Float[np.ndarray, "cell"]
    n_none: int = 0
    trust: dict[str, Float[np.ndarray, "cell"]] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluated:
    """What a grid is built from. cells: the cells axis of every prediction, layers and sources alike.
    experts: which transformer ran, for each step that occurs in cells, in order. results: one per target."""

    cells: tuple[Cell, ...]
    experts: tuple[str, ...]
    results: tuple[TargetPredictions, ...]

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(sorted({cell.step for cell in self.cells} - {EVERY_STEP}))

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({int(cell.site) for cell in self.cells if cell.is_layer}))

    def index(self) -> tuple[Int[np.ndarray, "step site branch place"], tuple[str, ...], tuple[str, ...]]:
        """Where each cell stands in `cells` (-1: absent), and the branches and places, in order of appearance.
        The site axis holds the layers, then SOURCES, then FIXED, whose one cell serves every step and branch."""
        branches = tuple(dict.fromkeys(cell.branch for cell in self.cells))
        places = tuple(dict.fromkeys(cell.place for cell in self.cells))
        sites = {name: i for i, name in enumerate((*map(str, self.layers), *SOURCES, *FIXED))}
        position = np.full((len(self.steps), len(sites), len(branches), len(places)), -1)
        rank = {step: i for i, step in enumerate(self.steps)}
        for i, cell in enumerate(self.cells):
            site, place = sites[cell.site], places.index(cell.place)
            if cell.step == EVERY_STEP:
                position[:, site, :, place] = i
            else:
                position[rank[cell.step], site, branches.index(cell.branch), place] = i
        return position, branches, places
