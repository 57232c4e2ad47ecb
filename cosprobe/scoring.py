"""From frozen probes' predictions to a grid: every cell and every baseline is a row of right and wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int, Shaped

from cosprobe.grid import BASELINES, CEILING, CHANCE, INPUTS, READOUT, VISIBLE, Grid
from cosprobe.metrics import cluster_bootstrap, correctness, majority, max_t_permutation
from cosprobe.tasks import Target
from cosprobe.types import SOURCES, Cell

MEANING = {
    "accuracy": "test accuracy of the probe",
    "lower": "lower end of the 95 % cluster-bootstrap interval of accuracy",
    "upper": "upper end of the 95 % cluster-bootstrap interval of accuracy",
    "skill": "(accuracy - reference) / (1 - reference); NaN where reference > 0.95",
    "excess": "accuracy - visible",
    "excess_lower": "lower end of the paired 95 % cluster-bootstrap interval of excess",
    "excess_upper": "upper end of the paired 95 % cluster-bootstrap interval of excess",
    "p_permutation": "p of accuracy by permutation of labels between problems, corrected over all cells of the target",
    "validation_accuracy": "validation accuracy of the probe",
    "lambda": "penalty chosen on validation",
    "agreement": "share of the test samples the model settled on an answer in where the probe says that answer",
    "baseline_accuracy": "test accuracy of each baseline",
    "baseline_lower": "lower end of the 95 % interval of baseline_accuracy",
    "baseline_upper": "upper end of the 95 % interval of baseline_accuracy",
    "baseline_validation": "validation accuracy of each baseline",
    "reference": "test accuracy of the strongest of chance, embed and x_t on validation (perception: chance)",
    "reference_source": "which baseline the reference is",
    "visible": "test accuracy of the stronger of x0_readout and x0_latent on validation, at the same step",
    "visible_source": "which baseline the visible one is",
    "chance": "test accuracy of the most frequent training label; for candidates at least 1/classes",
    "n_train": "training samples", "n_validation": "validation samples", "n_test": "test samples",
    "n_test_problems": "different problems among the test samples",
    "n_none": "samples left out because the model itself settled on no answer",
}  # fmt: skip


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
    """One target: training labels, predictions on validation and test, the lambda chosen for each cell, and how
    many samples were left out because the model settled on no answer."""

    target: Target
    train_labels: Int[np.ndarray, "*train"]
    validation: SplitPredictions
    test: SplitPredictions
    lambdas: Float[np.ndarray, "cell"]
    n_none: int = 0


@dataclass(frozen=True)
class Evaluated:
    """What a grid is built from. cells: the cells axis of every prediction, layers and sources alike.
    experts: which transformer ran, for each step that occurs in cells, in order. results: one per target."""

    cells: tuple[Cell, ...]
    experts: tuple[str, ...]
    results: tuple[TargetPredictions, ...]

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(sorted({cell.step for cell in self.cells}))

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({int(cell.site) for cell in self.cells if cell.site not in SOURCES}))

    def index(self) -> tuple[Int[np.ndarray, "step site branch place"], tuple[str, ...], tuple[str, ...]]:
        """Where each cell stands in `cells` (-1: absent), and the branches and places, in order of appearance.
        The site axis holds the layers, then SOURCES."""
        branches = tuple(dict.fromkeys(cell.branch for cell in self.cells))
        places = tuple(dict.fromkeys(cell.place for cell in self.cells))
        sites = {str(layer): i for i, layer in enumerate((*self.layers, *SOURCES))}
        position = np.full((len(self.steps), len(sites), len(branches), len(places)), -1)
        rank = {step: i for i, step in enumerate(self.steps)}
        for i, cell in enumerate(self.cells):
            position[rank[cell.step], sites[cell.site], branches.index(cell.branch), places.index(cell.place)] = i
        return position, branches, places


def build_grid(
    evaluated: Evaluated, draws: int = 1000, seed: int = 0, provenance: Mapping[str, Any] | None = None
) -> Grid:
    """Scores every cell on test. draws: of the bootstrap and of the permutation test alike.

    Raises ValueError when there is no layer, experts do not match the steps, or a target has no samples.
    """
    position, branches, places = evaluated.index()
    if not evaluated.layers:
        raise ValueError(f"sites={sorted({cell.site for cell in evaluated.cells})}: expected at least one layer")
    if len(evaluated.experts) != len(evaluated.steps):
        raise ValueError(f"{len(evaluated.experts)} experts: expected one per step, {len(evaluated.steps)}")
    scored = [_score(result, position, draws, seed) for result in evaluated.results]
    variables = {}
    for name in scored[0]:
        values = np.stack([score[name] for score in scored])
        axes = {1: ("target",), 4: ("target", "step", "branch", "place")}.get(values.ndim)
        if axes is None:
            second = ("baseline", "step") if name.startswith("baseline") else ("step", "layer")
            axes = ("target", *second, "branch", "place")
        variables[name] = (axes, values, {"long_name": MEANING[name]})
    targets = [result.target for result in evaluated.results]
    dataset = xr.Dataset(
        variables,
        coords={
            "target": [t.name for t in targets], "step": list(evaluated.steps), "layer": list(evaluated.layers),
            "branch": list(branches), "place": list(places), "baseline": list(BASELINES),
            "expert": ("step", list(evaluated.experts)), "role": ("target", [t.role for t in targets]),
            "form": ("target", [t.form for t in targets]), "kinds": ("target", [",".join(t.kinds) for t in targets]),
        },
        attrs={"provenance": json.dumps(dict(provenance or {}), default=str), **_model(evaluated, draws, seed)},
    )  # fmt: skip
    return Grid(dataset.isel(branch=0) if len(branches) == 1 else dataset)


def _score(
    result: TargetPredictions, position: Int[np.ndarray, "step site branch place"], draws: int, seed: int
) -> dict[str, np.ndarray]:
    """Variables of one target. Cells and baselines alike are rows of one matrix of right and wrong: the cells, a
    constant guess, then the readout of every step; -1 is a row that does not exist."""
    target, cells, steps = result.target, int(position.max()) + 1, len(position)
    validation = _usable(result.validation, target, "validation", cells)
    test = _usable(result.test, target, "test", cells)
    guess = majority(np.asarray(result.train_labels))
    right, trial = _rows(test, guess, steps), _rows(validation, guess, steps)
    accuracy, trial_accuracy = right.mean(axis=1), trial.mean(axis=1)
    lower, upper = cluster_bootstrap(right, test.keys, draws, seed)
    if target.form == "candidate":  # a guess among the candidates needs no training set
        for values in (accuracy, trial_accuracy, lower, upper):
            values[cells] = max(values[cells], 1 / target.classes)

    layer, sources = position[:, : -len(SOURCES)], np.moveaxis(position[:, -len(SOURCES) :], 1, 0)
    shown = np.full(sources.shape[1:], -1)
    if test.readout is not None:
        decoded = (test.readout >= 0).any(axis=1)
        shown[decoded] = (cells + 1 + np.arange(steps))[decoded, None, None]
    table = {CHANCE: np.full_like(shown, cells), READOUT: shown, **dict(zip(SOURCES, sources, strict=True))}
    baseline = np.stack([table[name] for name in BASELINES])
    trial_baseline = _take(trial_accuracy, baseline)
    names = (CHANCE,) if target.role == "perception" else INPUTS
    reference, reference_source = _strongest(names, baseline, trial_baseline)
    visible, visible_source = _strongest(VISIBLE, baseline, trial_baseline)
    b, v = _take(accuracy, reference), _take(accuracy, visible)

    grid_accuracy = _take(accuracy, layer)
    room = np.where(b > CEILING, np.nan, 1 - b)[:, None]
    present = layer >= 0
    p = np.full(layer.shape, np.nan)
    p[present] = max_t_permutation(test.predicted[layer[present]], test.labels, test.keys, draws, seed)
    against = np.broadcast_to(visible[:, None], layer.shape)
    both = present & (against >= 0)
    excess_lower, excess_upper = np.full(layer.shape, np.nan), np.full(layer.shape, np.nan)
    excess_lower[both], excess_upper[both] = cluster_bootstrap(
        right[layer[both]] - right[against[both]], test.keys, draws, seed
    )
    same = np.full(cells, np.nan)
    if test.drawn is not None and (test.drawn >= 0).any() and test.labels.ndim == 1:
        settled = test.drawn >= 0
        same = (test.predicted[:, settled] == test.drawn[settled]).mean(axis=1)
    count = {
        "n_train": int((np.asarray(result.train_labels).reshape(len(result.train_labels), -1)[:, 0] >= 0).sum()),
        "n_validation": len(validation.keys), "n_test": len(test.keys),
        "n_test_problems": len(np.unique(test.keys)), "n_none": result.n_none,
    }  # fmt: skip
    return {
        "accuracy": grid_accuracy, "lower": _take(lower, layer), "upper": _take(upper, layer),
        "skill": (grid_accuracy - b[:, None]) / room, "excess": grid_accuracy - v[:, None],
        "excess_lower": excess_lower, "excess_upper": excess_upper, "p_permutation": p,
        "validation_accuracy": _take(trial_accuracy, layer), "lambda": _take(np.asarray(result.lambdas), layer),
        "agreement": _take(same, layer),
        "baseline_accuracy": _take(accuracy, baseline), "baseline_lower": _take(lower, baseline),
        "baseline_upper": _take(upper, baseline), "baseline_validation": trial_baseline,
        "reference": b, "reference_source": reference_source, "visible": v, "visible_source": visible_source,
        "chance": np.asarray(accuracy[cells]), **{name: np.asarray(n) for name, n in count.items()},
    }  # fmt: skip


def _usable(split: SplitPredictions, target: Target, name: str, cells: int) -> SplitPredictions:
    """The samples that carry the target. Raises ValueError when there is none or predictions are not one per cell."""
    split = split.carried()
    if len(split.keys) == 0:
        raise ValueError(f"target {target.name!r} has no {name} samples: expected at least 1; raise task.problems")
    if split.predicted.shape != (cells, *split.labels.shape):
        raise ValueError(
            f"target {target.name!r}: {name} predictions of shape {split.predicted.shape}, expected "
            f"{(cells, *split.labels.shape)}, one per cell and label"
        )
    return split


def _rows(split: SplitPredictions, guess: int, steps: int) -> Float[np.ndarray, "row sample"]:
    """Right and wrong of every cell, of the constant guess, and of the readout at every step."""
    readout = split.readout if split.readout is not None else np.full((steps, len(split.keys)), -1)
    if len(readout) != steps:
        raise ValueError(f"x0_readout has {len(readout)} steps: expected one per step of the grid, {steps}")
    constant = np.full((1, *split.labels.shape), guess)
    rows = [correctness(split.predicted, split.labels), correctness(constant, split.labels)]
    if split.labels.ndim == 1:  # a readout names one candidate; region labels have none
        return np.concatenate([*rows, correctness(readout, split.labels)])
    return np.concatenate([*rows, np.zeros(readout.shape)])


def _take(values: Float[np.ndarray, "row"], index: Int[np.ndarray, "*axes"]) -> Float[np.ndarray, "*axes"]:
    return np.where(index >= 0, values[index], np.nan)


def _strongest(
    names: tuple[str, ...], row: Int[np.ndarray, "baseline *axes"], trial: Float[np.ndarray, "baseline *axes"]
) -> tuple[Int[np.ndarray, "*axes"], Shaped[np.ndarray, "*axes"]]:
    """Row and name of the baseline with the highest validation accuracy; -1 and "" where none exists."""
    among = [BASELINES.index(name) for name in names]
    scores = np.nan_to_num(trial[among], nan=-1.0)
    first = scores.argmax(axis=0)
    chosen = np.take_along_axis(row[among], first[None], axis=0)[0]
    return chosen, np.where(chosen >= 0, np.asarray(names)[first], "")


def _model(evaluated: Evaluated, draws: int, seed: int) -> dict[str, float]:
    """How often the model's own final answer is right, on the test samples of the first answer target; an answer of
    none is wrong. NaN without such a target."""
    for result in evaluated.results:
        test = result.test.carried()
        if result.target.role == "answer" and test.drawn is not None and len(test.keys):
            right = correctness(test.drawn[None], test.labels)
            lower, upper = cluster_bootstrap(right, test.keys, draws, seed)
            bounds = (float(right.mean()), float(lower[0]), float(upper[0]))
            return dict(zip(("model_accuracy", "model_accuracy_lower", "model_accuracy_upper"), bounds, strict=True))
    return dict.fromkeys(("model_accuracy", "model_accuracy_lower", "model_accuracy_upper"), float("nan"))
