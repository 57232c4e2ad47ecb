"""From frozen probes' predictions to a grid: every cell and every baseline is a row of right and wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int, Shaped

from cosprobe.grid import ALPHA, BASELINES, CEILING, CHANCE, GUESSES, INPUTS, MAJORITY, READOUT, VISIBLE, Grid
from cosprobe.metrics import (
    cluster_bootstrap,
    correctness,
    majority,
    max_t_bootstrap,
    max_t_permutation,
    share_interval,
)
from cosprobe.predictions import Evaluated, SplitPredictions, TargetPredictions
from cosprobe.tasks import Target
from cosprobe.timing import timing
from cosprobe.types import FIXED, NUISANCE, SOURCES

RELABELLED = "relabelled"  # role of a control, and the end of its name
MEANING = {
    "accuracy": "test accuracy of the probe",
    "lower": "lower end of the 95 % cluster-bootstrap interval of accuracy",
    "upper": "upper end of the 95 % cluster-bootstrap interval of accuracy",
    "skill": "(accuracy - reference) / (1 - reference); NaN where reference > 0.95",
    "p_skill": "p of accuracy being above the reference, by a paired bootstrap corrected over all cells of the target",
    "excess": "accuracy - visible",
    "excess_lower": "lower end of the paired 95 % cluster-bootstrap interval of excess",
    "excess_upper": "upper end of the paired 95 % cluster-bootstrap interval of excess",
    "p_excess": "p of excess being above 0, by a paired bootstrap corrected over all cells of the target",
    "p_permutation": "p of accuracy by permutation of labels between problems, corrected over all cells of the target",
    "validation_accuracy": "validation accuracy of the probe",
    "lambda": "penalty of the probe",
    "agreement": "share of the test samples the model settled on an answer in where the probe says that answer",
    "knew": "share of the test samples the model got wrong (none counts as wrong) where the probe is right",
    "knew_lower": "lower end of the 95 % interval of knew", "knew_upper": "upper end of the 95 % interval of knew",
    "selectivity": "accuracy - accuracy of the same cell on a random relabelling of an attribute that can be seen",
    "temperature": "what decision values are divided by to give probabilities, from validation",
    "ece": "expected calibration error of the probabilities on test", "ece_raw": "the same without the temperature",
    "brier": "Brier score of the probabilities on test, summed over classes",
    "latency": "step index where accuracy above the guess first reaches half of its maximum over steps, on test",
    "latency_lower": "lower end of the 95 % interval of latency",
    "latency_upper": "upper end of the 95 % interval of latency",
    "latency_at_most": "latency is at or before the first step",
    "visible_latency": "latency of the visible baseline", "visible_latency_lower": "lower end of its 95 % interval",
    "visible_latency_upper": "upper end of its 95 % interval",
    "visible_latency_at_most": "visible_latency is at or before the first step",
    "lag": "visible_latency - latency: positive where a probe reads the answer before the picture shows it",
    "lag_lower": "lower end of the paired 95 % interval of lag", "lag_upper": "upper end of it",
    "depth": "layer where accuracy above the guess first reaches half of its maximum over layers, on test",
    "depth_lower": "lower end of the 95 % interval of depth", "depth_upper": "upper end of it",
    "baseline_accuracy": "test accuracy of each baseline",
    "baseline_lower": "lower end of the 95 % interval of baseline_accuracy",
    "baseline_upper": "upper end of the 95 % interval of baseline_accuracy",
    "baseline_validation": "validation accuracy of each baseline",
    "reference": "test accuracy of the strongest input or guess on validation (perception: of the guesses)",
    "reference_source": "which baseline the reference is",
    "visible": "test accuracy of the strongest on validation of x0_latent at the step and x0_readout there, or at the "
    "decoded steps around it where it is not decoded",
    "visible_source": "which baseline the visible one is",
    "chance": "test accuracy of the better guess on validation: any class, or the most frequent training label",
    "n_train": "training samples", "n_validation": "validation samples", "n_test": "test samples",
    "n_test_problems": "different problems among the test samples",
    "n_none": "samples left out because the model itself settled on no answer",
    "n_wrong": "test samples in which the model's own final answer is wrong or none",
}  # fmt: skip
CELL = ("step", "layer", "branch", "place")
STEP = ("step", "branch", "place")
BASELINE = ("baseline", *STEP)


@dataclass(frozen=True)
class _Rows:
    """Right and wrong on one split: every cell, the two guesses, then the readout of every step."""

    right: Float[np.ndarray, "row sample"]
    keys: Shaped[np.ndarray, "sample"]

    @property
    def accuracy(self) -> Float[np.ndarray, "row"]:
        return self.right.mean(axis=1)


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
    steps, layers = list(evaluated.steps), list(evaluated.layers)
    targets = [result.target for result in evaluated.results]
    scored = [_score(result, position, steps, layers, draws, seed) for result in evaluated.results]
    variables = {}
    for name in scored[0]:
        axes, values = scored[0][name][0], np.stack([score[name][1] for score in scored])
        variables[name] = (("target", *axes), values, {"long_name": MEANING[name]})
    dataset = xr.Dataset(
        variables,
        coords={
            "target": [t.name for t in targets], "step": steps, "layer": layers,
            "branch": list(branches), "place": list(places), "baseline": list(BASELINES),
            "expert": ("step", list(evaluated.experts)), "role": ("target", [t.role for t in targets]),
            "form": ("target", [t.form for t in targets]), "kinds": ("target", [",".join(t.kinds) for t in targets]),
        },
        attrs={"provenance": json.dumps(dict(provenance or {}), default=str), **_model(evaluated, draws, seed)},
    )  # fmt: skip
    dataset["selectivity"] = _selectivity(dataset)
    return Grid(dataset.isel(branch=0) if len(branches) == 1 else dataset)


def _score(
    result: TargetPredictions,
    position: Int[np.ndarray, "step site branch place"],
    at: list[int],
    layers: list[int],
    draws: int,
    seed: int,
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Variables of one target, each with its axes; -1 in an index is a row that does not exist."""
    target, cells, steps = result.target, int(position.max()) + 1, len(position)
    validation = _usable(result.validation, target, "validation", cells)
    test = _usable(result.test, target, "test", cells)
    guess = majority(np.asarray(result.train_labels))
    rows, trial = _rows(test, target, guess, steps), _rows(validation, target, guess, steps)
    right, keys = rows.right, rows.keys
    lower, upper = share_interval(right, keys, draws, seed)

    layer, baseline = position[:, : len(layers)], _baseline_rows(position, len(layers), cells, test.readout)
    if target.role == "nuisance":  # it is one of the nuisances itself
        baseline[BASELINES.index(NUISANCE)] = -1
    trial_baseline = _take(trial.accuracy, baseline)
    chance = cells + int(trial.accuracy[cells + 1] > trial.accuracy[cells])
    names = GUESSES if target.role == "perception" else INPUTS
    reference, reference_source = _strongest(names, baseline[[BASELINES.index(n) for n in names]], trial.accuracy)
    visible, visible_source = _strongest((READOUT, *VISIBLE), _shown(baseline), trial.accuracy)
    b, v = _take(rows.accuracy, reference), _take(rows.accuracy, visible)
    accuracy = _take(rows.accuracy, layer)
    room = np.where(b > CEILING, np.nan, 1 - b)[:, None]

    present = layer >= 0
    p = np.full(layer.shape, np.nan)
    p[present] = max_t_permutation(test.predicted[layer[present]], test.labels, keys, draws, seed)
    beyond = _against(right, keys, layer, reference, draws, seed)
    excess = _against(right, keys, layer, visible, draws, seed)
    count = {
        "n_train": int((np.asarray(result.train_labels).reshape(len(result.train_labels), -1)[:, 0] >= 0).sum()),
        "n_validation": len(validation.keys), "n_test": len(test.keys),
        "n_test_problems": len(np.unique(test.keys)), "n_none": result.n_none,
    }  # fmt: skip
    by_cell = {
        "accuracy": accuracy, "lower": _take(lower, layer), "upper": _take(upper, layer),
        "skill": (accuracy - b[:, None]) / room, "p_skill": beyond["p"], "excess": accuracy - v[:, None],
        "excess_lower": excess["lower"], "excess_upper": excess["upper"], "p_excess": excess["p"], "p_permutation": p,
        "validation_accuracy": _take(trial.accuracy, layer), "lambda": _take(np.asarray(result.lambdas), layer),
        **{name: _take(values, layer) for name, values in _beside_the_video(test, target, right, draws, seed).items()},
        **{name: _take(np.asarray(result.trust.get(name, np.full(cells, np.nan))), layer)
           for name in ("temperature", "ece", "ece_raw", "brier")},
    }  # fmt: skip
    by_baseline = {
        "baseline_accuracy": _take(rows.accuracy, baseline), "baseline_lower": _take(lower, baseline),
        "baseline_upper": _take(upper, baseline), "baseline_validation": trial_baseline,
    }  # fmt: skip
    by_step = {
        "reference": b, "reference_source": reference_source, "visible": v, "visible_source": visible_source,
    }  # fmt: skip
    wrong = 0 if test.drawn is None or target.role != "answer" else int((test.drawn != test.labels).sum())
    alone = {"chance": rows.accuracy[chance], "n_wrong": wrong, **count}
    table: dict[str, tuple[tuple[str, ...], np.ndarray]] = {name: (CELL, values) for name, values in by_cell.items()}
    table |= {name: (BASELINE, values) for name, values in by_baseline.items()}
    table |= {name: (STEP, values) for name, values in by_step.items()}
    table |= timing(right, keys, layer, visible, p <= ALPHA, right[chance], at, layers, draws, seed)
    return table | {name: ((), np.asarray(value)) for name, value in alone.items()}


def _baseline_rows(
    position: Int[np.ndarray, "step site branch place"],
    layers: int,
    cells: int,
    readout: Int[np.ndarray, "step sample"] | None,
) -> Int[np.ndarray, "baseline step branch place"]:
    """The row of every baseline; the guesses and the readout do not depend on the branch or the place."""
    sources = np.moveaxis(position[:, layers:], 1, 0)
    table = dict(zip((*SOURCES, *FIXED), sources, strict=True))
    empty = np.full(sources.shape[1:], -1)
    table |= {CHANCE: np.full_like(empty, cells), MAJORITY: np.full_like(empty, cells + 1), READOUT: empty.copy()}
    if readout is not None:
        decoded = (readout >= 0).any(axis=1)
        table[READOUT][decoded] = (cells + 2 + np.arange(len(position)))[decoded, None, None]
    return np.stack([table.get(name, empty) for name in BASELINES])


def _against(
    right: Float[np.ndarray, "row sample"],
    keys: Shaped[np.ndarray, "sample"],
    layer: Int[np.ndarray, "step layer branch place"],
    other: Int[np.ndarray, "step branch place"],
    draws: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Every cell against a baseline of its step and place: interval of the difference, and corrected p."""
    opposite = np.broadcast_to(other[:, None], layer.shape)
    both = (layer >= 0) & (opposite >= 0)
    found = {name: np.full(layer.shape, np.nan) for name in ("p", "lower", "upper")}
    if both.any():
        difference = right[layer[both]] - right[opposite[both]]
        found["lower"][both], found["upper"][both] = cluster_bootstrap(difference, keys, draws, seed)
        found["p"][both] = max_t_bootstrap(difference, keys, draws, seed)[0]
    return found


def _beside_the_video(
    test: SplitPredictions, target: Target, right: Float[np.ndarray, "row sample"], draws: int, seed: int
) -> dict[str, Float[np.ndarray, "cell"]]:
    """What each cell says beside what the model finally drew."""
    cells = len(test.predicted)
    found = {name: np.full(cells, np.nan) for name in ("agreement", "knew", "knew_lower", "knew_upper")}
    if test.drawn is None or test.labels.ndim != 1:
        return found
    settled, wrong = test.drawn >= 0, test.drawn != test.labels
    if settled.any():
        found["agreement"] = (test.predicted[:, settled] == test.drawn[settled]).mean(axis=1)
    if wrong.any() and target.role == "answer":
        knew = right[:cells, wrong]
        found["knew"] = knew.mean(axis=1)
        found["knew_lower"], found["knew_upper"] = share_interval(knew, test.keys[wrong], draws, seed)
    return found


def _selectivity(dataset: xr.Dataset) -> xr.DataArray:
    """Hewitt and Liang (2019), equation 2: NaN for targets without a relabelled control."""
    names = list(dataset.target.values)
    pairs = [f"{name}_{RELABELLED}" for name in names]
    twin = np.array([names.index(pair) if pair in names else -1 for pair in pairs])
    control = dataset.accuracy.values[twin]
    control[twin < 0] = np.nan
    return dataset.accuracy.copy(data=dataset.accuracy.values - control).assign_attrs(long_name=MEANING["selectivity"])


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


def _rows(split: SplitPredictions, target: Target, guess: int, steps: int) -> _Rows:
    readout = split.readout if split.readout is not None else np.full((steps, len(split.keys)), -1)
    if len(readout) != steps:
        raise ValueError(f"x0_readout has {len(readout)} steps: expected one per step of the grid, {steps}")
    constant = np.full((1, *split.labels.shape), guess)
    uniform = np.full((1, len(split.keys)), 1 / target.classes)
    rows = [correctness(split.predicted, split.labels), uniform, correctness(constant, split.labels)]
    if split.labels.ndim == 1:  # a readout names one candidate; region labels have none
        return _Rows(np.concatenate([*rows, correctness(readout, split.labels)]), split.keys)
    return _Rows(np.concatenate([*rows, np.zeros(readout.shape)]), split.keys)


def _take(values: Float[np.ndarray, "row"], index: Int[np.ndarray, "*axes"]) -> Float[np.ndarray, "*axes"]:
    return np.where(index >= 0, values[index], np.nan)


def _shown(baseline: Int[np.ndarray, "baseline step branch place"]) -> Int[np.ndarray, "3 step branch place"]:
    """Rows of all that x0-hat shows at a step: its readout, which at a step that is not decoded is the readout of the
    decoded step before it and of the one after it, and the probe of its latents. A probe of few samples alone would
    make any layer look ahead of the picture at the steps in between."""
    readout, latent = (baseline[BASELINES.index(name)] for name in VISIBLE)
    decoded = np.flatnonzero((readout >= 0).all(axis=(1, 2)))
    if not len(decoded):
        return np.stack([readout, readout, latent])
    steps = np.arange(len(readout))
    before = decoded[(np.searchsorted(decoded, steps, side="right") - 1).clip(min=0)]
    after = decoded[np.searchsorted(decoded, steps).clip(max=len(decoded) - 1)]
    return np.stack([readout[before], readout[after], latent])


def _strongest(
    names: tuple[str, ...], rows: Int[np.ndarray, "name *axes"], trial: Float[np.ndarray, "row"]
) -> tuple[Int[np.ndarray, "*axes"], Shaped[np.ndarray, "*axes"]]:
    """Row and name of the baseline with the highest validation accuracy; -1 and "" where none exists."""
    scores = np.nan_to_num(_take(trial, rows), nan=-1.0)
    first = scores.argmax(axis=0)
    chosen = np.take_along_axis(rows, first[None], axis=0)[0]
    return chosen, np.where(chosen >= 0, np.asarray(names)[first], "")


def _model(evaluated: Evaluated, draws: int, seed: int) -> dict[str, float]:
    """How often the model's own final answer is right, on the test samples of the first answer target; an answer of
    none is wrong. NaN without such a target."""
    for result in evaluated.results:
        test = result.test.carried()
        if result.target.role == "answer" and test.drawn is not None and len(test.keys):
            right = correctness(test.drawn[None], test.labels)
            lower, upper = share_interval(right, test.keys, draws, seed)
            bounds = (float(right.mean()), float(lower[0]), float(upper[0]))
            return dict(zip(("model_accuracy", "model_accuracy_lower", "model_accuracy_upper"), bounds, strict=True))
    return dict.fromkeys(("model_accuracy", "model_accuracy_lower", "model_accuracy_upper"), float("nan"))
