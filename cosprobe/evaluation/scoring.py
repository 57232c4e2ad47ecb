"""From frozen probes' predictions to a grid: every cell and every baseline is a row of right and wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int, Shaped

from cosprobe.cells import INPUTS, X0
from cosprobe.errors import InputError
from cosprobe.evaluation.grid import ALPHA, BASELINES, CEILING, CHANCE, GUESSES, MAJORITY, READOUT, VISIBLE, Grid
from cosprobe.evaluation.intervals import (
    correctness,
    difference_interval,
    effective_problems,
    grounded,
    majority,
    share_interval,
)
from cosprobe.evaluation.predictions import Evaluated, SplitPredictions, TargetPredictions
from cosprobe.evaluation.significance import max_t_permutation, weakest_pair
from cosprobe.evaluation.timing import timing
from cosprobe.tasks import RELABELLED, Target

MEANING = {
    "accuracy": "test accuracy of the probe",
    "lower": "lower end of the 95 % interval of accuracy", "upper": "upper end of the 95 % interval of accuracy",
    "skill": "(accuracy - reference) / (1 - reference); NaN where reference > 0.95",
    "p_permutation": "p of accuracy being above chance by permutation of labels between problems, corrected over all "
    "cells of the target",
    "p_inputs": "p of accuracy being above every input the target has to beat: the largest p of the cell's pairs with "
    "inputs, corrected over all pairs of the target; NaN where there is no input to beat",
    "p_guess": "p of accuracy being above that of the most frequent training label, corrected over all cells of the "
    "target, where this guess is better than one over the number of classes; NaN elsewhere",
    "p_evidence": "the largest of p_permutation, p_guess and p_inputs: evidence where at most 0.05",
    "excess": "accuracy - visible",
    "excess_lower": "lower end of the paired 95 % interval of excess",
    "excess_upper": "upper end of the paired 95 % interval of excess",
    "p_excess": "p of accuracy being above all that x0-hat shows at the step: the largest p of the cell's pairs with "
    "x0_latent and the x0_readout of the decoded steps around it, corrected over all pairs of the target",
    "validation_accuracy": "validation accuracy of the probe",
    "lambda": "penalty of the probe",
    "agreement": "share of the test samples the model settled on an answer in where the probe says that answer",
    "knew": "share of the test samples the model got wrong (none counts as wrong) where the probe is right",
    "knew_lower": "lower end of the 95 % interval of knew", "knew_upper": "upper end of the 95 % interval of knew",
    "selectivity": "accuracy - accuracy of the same cell on a random relabelling of an attribute that can be seen",
    "selectivity_lower": "lower end of the paired 95 % interval of selectivity",
    "selectivity_upper": "upper end of the paired 95 % interval of selectivity",
    "temperature": "what decision values are divided by to give probabilities, from validation",
    "ece": "expected calibration error of the probabilities on test", "ece_raw": "the same without the temperature",
    "brier": "Brier score of the probabilities on test, summed over classes",
    "latency": "step index where accuracy above the guess first reaches half of its maximum over steps, on test; NaN "
    "without evidence on validation",
    "latency_lower": "lower end of the 95 % interval of latency",
    "latency_upper": "upper end of the 95 % interval of latency",
    "latency_at_most": "latency is at or before the first step",
    "visible_latency": "latency of the visible baseline", "visible_latency_lower": "lower end of its 95 % interval",
    "visible_latency_upper": "upper end of its 95 % interval",
    "visible_latency_at_most": "visible_latency is at or before the first step",
    "lag": "visible_latency - latency: positive where a probe reads the answer before the picture shows it",
    "lag_lower": "lower end of the paired 95 % interval of lag", "lag_upper": "upper end of it",
    "depth": "layer where accuracy above the guess first reaches half of its maximum over layers, on test; NaN without "
    "evidence on validation",
    "depth_lower": "lower end of the 95 % interval of depth", "depth_upper": "upper end of it",
    "baseline_accuracy": "test accuracy of each baseline",
    "baseline_lower": "lower end of the 95 % interval of baseline_accuracy",
    "baseline_upper": "upper end of the 95 % interval of baseline_accuracy",
    "baseline_validation": "validation accuracy of each baseline",
    "baseline_cross_validation": "accuracy of the kept form of each input in cross-validation over problems of train "
    "and validation",
    "baseline_form": "the form in which each input is read: region or whole frame; mean over latent frames, or frames "
    "side by side",
    "baseline_columns": "numbers per row of that form",
    "baseline_projected": "principal axes of the training samples they were brought down to; equal to baseline_columns "
    "where they were not",
    "reference": "test accuracy of the input with the highest baseline_cross_validation among those the target has to "
    "beat, never below chance",
    "reference_source": "which baseline the reference is",
    "visible": "test accuracy of what x0-hat shows best: x0_latent by its accuracy in cross-validation, or the "
    "x0_readout of the decoded steps around the step by their validation accuracy",
    "visible_source": "which baseline the visible one is",
    "chance": "test accuracy of the better guess on validation: any class, or the most frequent training label",
    "smallest_skill": "the smallest skill above chance that could have been evidence: of a cell that is right on more "
    "problems than what it is compared with, and wrong on none that this gets right",
    "n_train": "training samples", "n_validation": "validation samples", "n_test": "test samples",
    "n_train_problems": "different problems among the training samples",
    "n_validation_problems": "different problems among the validation samples",
    "n_test_problems": "different problems among the test samples",
    "n_effective": "test problems that would tell as much with one sample each: (sum m)^2 / sum m^2 of m samples each",
    "n_none": "samples left out because the model itself settled on no answer",
    "n_wrong": "test samples in which the model's own final answer is wrong or none",
}  # fmt: skip
CELL = ("step", "layer", "branch", "place")
STEP = ("step", "branch", "place")
BASELINE = ("baseline", *STEP)
READ = (*INPUTS, X0)  # what `inputs.read_inputs` reads


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
    """Scores every cell on test. draws: of sign changes, of permutations, and of the bootstrap of latencies.

    Raises ValueError when there is no layer, experts do not match the steps, or a target has no samples.
    """
    if not evaluated.cells:
        raise InputError("cells: none; expected at least one layer")
    if len(evaluated.experts) != len(evaluated.steps):
        raise InputError(f"{len(evaluated.experts)} experts: expected one per step, {len(evaluated.steps)}")
    position = evaluated.index()
    targets = [result.target for result in evaluated.results]
    twins = {f"{result.target.name}_{RELABELLED}": result.target.name for result in evaluated.results}
    rights = {twins[r.target.name]: _layers_right(r) for r in evaluated.results if r.target.name in twins}
    scored = [_score(result, evaluated, position, rights.get(result.target.name), draws, seed)
              for result in evaluated.results]  # fmt: skip
    variables = {}
    for name in scored[0]:
        axes, values = scored[0][name][0], np.stack([score[name][1] for score in scored])
        variables[name] = (("target", *axes), values, {"long_name": MEANING[name]})
    dataset = xr.Dataset(
        variables,
        coords={
            "target": [t.name for t in targets], "step": list(evaluated.steps), "layer": list(evaluated.layers),
            "branch": list(evaluated.branches), "place": list(evaluated.places), "baseline": list(BASELINES),
            "expert": ("step", list(evaluated.experts)), "role": ("target", [t.role for t in targets]),
            "form": ("target", [t.form for t in targets]), "kinds": ("target", [",".join(t.kinds) for t in targets]),
        },
        attrs={"provenance": json.dumps(dict(provenance or {}), default=str),
               "left_out": json.dumps(list(evaluated.left_out)), **_model(evaluated)},
    )  # fmt: skip
    return Grid(dataset.isel(branch=0) if len(evaluated.branches) == 1 else dataset)


def _score(
    result: TargetPredictions,
    evaluated: Evaluated,
    layer: Int[np.ndarray, "step layer branch place"],
    relabelled: Float[np.ndarray, "cell sample"] | None,
    draws: int,
    seed: int,
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Variables of one target, each with its axes; -1 in an index is a row that does not exist. relabelled: right and
    wrong of the same cells on the control of this target."""
    target, cells, steps = result.target, int(layer.max()) + 1, len(layer)
    validation = _usable(result.validation, target, "validation", cells)
    test = _usable(result.test, target, "test", cells)
    guess = majority(np.asarray(result.train_labels))
    rows, trial = _rows(test, target, guess, steps), _rows(validation, target, guess, steps)
    right, keys = rows.right, rows.keys
    sure = grounded(keys)  # too few problems carry no p and no interval of a difference; that of a share is exact
    lower, upper = share_interval(right, keys)
    lower[cells] = upper[cells] = right[cells].mean()  # what any class is right on is known exactly

    baseline = _baseline_rows(result, layer.shape, cells, test.readout)
    trusted = _cross_validation(result, layer.shape)
    chance = cells + int(trial.accuracy[cells + 1] > trial.accuracy[cells])
    names = [name for name in INPUTS if name in result.readings]
    inputs = [BASELINES.index(name) for name in names]
    guesses = (chance, GUESSES[chance - cells])
    reference, reference_source = _reference(baseline[inputs], trusted[inputs], names, rows.accuracy, guesses)
    shown = _shown(baseline)
    visible, visible_source = _visible(shown, trial.accuracy, trusted[BASELINES.index(X0)])
    b, v = _take(rows.accuracy, reference), _take(rows.accuracy, visible)
    accuracy = _take(rows.accuracy, layer)
    room = np.where(b > CEILING, np.nan, 1 - b)[:, None]

    p = {"p_permutation": np.full(layer.shape, np.nan)}
    present = layer >= 0
    if sure:
        tested = max_t_permutation(test.predicted[layer[present]], test.labels, keys, draws, seed)
        p["p_permutation"][present] = tested.p
    p["p_inputs"], of_inputs = _against_all(right, keys, layer, baseline[inputs], draws, seed, sure)
    # labels that are told apart are not yet told more often than by the most frequent one
    most_frequent = np.full((1, *baseline.shape[1:]), chance if chance > cells else -1)
    p["p_guess"], of_guess = _against_all(right, keys, layer, most_frequent, draws, seed, sure)
    p["p_evidence"] = np.fmax(np.fmax(p["p_permutation"], p["p_guess"]), p["p_inputs"])  # NaN only where all are
    p["p_excess"], _ = _against_all(right, keys, layer, shown, draws, seed, sure)
    excess = _difference(right, keys, layer, np.broadcast_to(visible[:, None], layer.shape), sure)
    select = {end: np.full(layer.shape, np.nan) for end in ("", "_lower", "_upper")}
    if relabelled is not None and relabelled.shape[1] == len(keys):
        selected = np.concatenate([right[:cells], relabelled])
        select = _difference(selected, keys, layer, np.where(present, layer + cells, -1), sure)
    effective = effective_problems(keys)
    guessed = rows.accuracy[chance]
    reach = np.nan
    if sure:  # of sign changes: sqrt(problems won) has to be critical; of permutations: in standard deviations
        deviation = np.sqrt(guessed * (1 - guessed) / effective)
        reach = max(max(of_inputs, of_guess) ** 2 / effective, tested.critical * deviation)
    train_keys = np.asarray(result.train_keys)[_labelled(result.train_labels)]
    count = {
        "n_train": len(train_keys), "n_validation": len(validation.keys), "n_test": len(test.keys),
        "n_train_problems": len(np.unique(train_keys)), "n_validation_problems": len(np.unique(validation.keys)),
        "n_test_problems": len(np.unique(test.keys)), "n_effective": effective, "n_none": result.n_none,
    }  # fmt: skip
    by_cell = {
        "accuracy": accuracy, "lower": _take(lower, layer), "upper": _take(upper, layer),
        "skill": (accuracy - b[:, None]) / room, **p, **{f"excess{end}": value for end, value in excess.items()},
        **{f"selectivity{end}": value for end, value in select.items()},
        "validation_accuracy": _take(trial.accuracy, layer), "lambda": _take(np.asarray(result.lambdas), layer),
        **{name: _take(values, layer) for name, values in _beside_the_video(test, target, right).items()},
        **{name: _take(np.asarray(result.trust.get(name, np.full(cells, np.nan))), layer)
           for name in ("temperature", "ece", "ece_raw", "brier")},
    }  # fmt: skip
    by_baseline = {
        "baseline_accuracy": _take(rows.accuracy, baseline), "baseline_lower": _take(lower, baseline),
        "baseline_upper": _take(upper, baseline), "baseline_validation": _take(trial.accuracy, baseline),
        "baseline_cross_validation": trusted, **_described(result, layer.shape),
    }  # fmt: skip
    by_step = {
        "reference": b, "reference_source": reference_source, "visible": v, "visible_source": visible_source,
    }  # fmt: skip
    wrong = 0 if test.drawn is None or target.role != "answer" else int((test.drawn != test.labels).sum())
    alone = {"chance": guessed, "smallest_skill": reach / (1 - guessed) if guessed < 1 else np.nan,
             "n_wrong": wrong, **count}  # fmt: skip
    table: dict[str, tuple[tuple[str, ...], np.ndarray]] = {name: (CELL, values) for name, values in by_cell.items()}
    table |= {name: (BASELINE, values) for name, values in by_baseline.items()}
    table |= {name: (STEP, values) for name, values in by_step.items()}
    found = np.zeros(layer.shape, dtype=bool)
    if sure and grounded(validation.keys):  # evidence on test would show just those latencies that came out well
        said = validation.predicted[layer[present]]
        found[present] = max_t_permutation(said, validation.labels, validation.keys, draws, seed).p <= ALPHA
    table |= timing(right, keys, layer, visible, found, right[chance], list(evaluated.steps), list(evaluated.layers),
                    draws, seed)  # fmt: skip
    return table | {name: ((), np.asarray(value)) for name, value in alone.items()}


def _baseline_rows(
    result: TargetPredictions, shape: tuple[int, ...], cells: int, readout: Int[np.ndarray, "step sample"] | None
) -> Int[np.ndarray, "baseline step branch place"]:
    """The row of every baseline. Guesses and the readout are the same at every place; nothing depends on the branch."""
    steps, _, branches, places = shape
    empty = np.full((steps, branches, places), -1)
    table = {CHANCE: np.full_like(empty, cells), MAJORITY: np.full_like(empty, cells + 1), READOUT: empty.copy()}
    if readout is not None:
        decoded = (readout >= 0).any(axis=1)
        table[READOUT][decoded] = (cells + 2 + np.arange(steps))[decoded, None, None]
    first = cells + 2 + steps
    for name in _read_names(result):
        at = first + np.arange(steps * places).reshape(steps, 1, places)
        table[name], first = np.broadcast_to(at, empty.shape), first + steps * places
    return np.stack([table.get(name, empty) for name in BASELINES])


def _read_names(result: TargetPredictions) -> list[str]:
    """Inputs that were read, in the order of their rows."""
    return [name for name in READ if name in result.readings]


def _described(result: TargetPredictions, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """How each input was read; "" and NaN for baselines that are none."""
    steps, _, branches, places = shape
    whole = (len(BASELINES), steps, branches, places)
    form, columns, projected = np.full(whole, "", dtype="<U24"), np.full(whole, np.nan), np.full(whole, np.nan)
    for name, reading in result.readings.items():
        at = BASELINES.index(name)
        form[at], columns[at], projected[at] = (
            value[:, None] for value in (reading.form, reading.columns, reading.projected)
        )
    return {"baseline_form": form, "baseline_columns": columns, "baseline_projected": projected}


def _cross_validation(
    result: TargetPredictions, shape: tuple[int, ...]
) -> Float[np.ndarray, "baseline step branch place"]:
    steps, _, branches, places = shape
    trusted = np.full((len(BASELINES), steps, branches, places), np.nan)
    for name, reading in result.readings.items():
        trusted[BASELINES.index(name)] = reading.accuracy[:, None]
    return trusted


def _reference(
    rows: Int[np.ndarray, "input step branch place"],
    trusted: Float[np.ndarray, "input step branch place"],
    names: Sequence[str],
    accuracy: Float[np.ndarray, "row"],
    guesses: tuple[int, str],
) -> tuple[Int[np.ndarray, "step branch place"], Shaped[np.ndarray, "step branch place"]]:
    """Row and name of the input with the highest accuracy in cross-validation; of the better guess where that input is
    below it on test, or where there is no input to beat."""
    chosen, source = _highest(rows, trusted, names)
    row, name = guesses
    below = ~(_take(accuracy, chosen) >= accuracy[row])  # NaN too
    return np.where(below, row, chosen), np.where(below, name, source)


def _against_all(
    right: Float[np.ndarray, "row sample"],
    keys: Shaped[np.ndarray, "sample"],
    layer: Int[np.ndarray, "step layer branch place"],
    others: Int[np.ndarray, "other step branch place"],
    draws: int,
    seed: int,
    sure: bool,
) -> tuple[Float[np.ndarray, "step layer branch place"], float]:
    """p of every cell being above each of the others at its step and place, and the critical value of the statistic."""
    p = np.full(layer.shape, np.nan)
    at = np.broadcast_to(others[:, :, None], (len(others), *layer.shape))
    tested = (layer >= 0) & (at >= 0).any(axis=0)
    if not sure or not tested.any():
        return p, 0.0
    pairs = at[:, tested].T  # cell, other
    differences = np.where((pairs >= 0)[..., None], right[layer[tested]][:, None] - right[pairs], np.nan)
    found = weakest_pair(differences, keys, draws, seed)
    p[tested] = found.p
    return p, found.critical


def _difference(
    right: Float[np.ndarray, "row sample"],
    keys: Shaped[np.ndarray, "sample"],
    layer: Int[np.ndarray, "step layer branch place"],
    other: Int[np.ndarray, "step layer branch place"],
    sure: bool,
) -> dict[str, Float[np.ndarray, "step layer branch place"]]:
    """Accuracy of every cell minus that of another row, and the ends of its paired interval."""
    found = {end: np.full(layer.shape, np.nan) for end in ("", "_lower", "_upper")}
    both = (layer >= 0) & (other >= 0)
    if both.any():
        difference = right[layer[both]] - right[other[both]]
        found[""][both] = difference.mean(axis=1)
        if sure:
            found["_lower"][both], found["_upper"][both] = difference_interval(difference, keys)
    return found


def _beside_the_video(
    test: SplitPredictions, target: Target, right: Float[np.ndarray, "row sample"]
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
        found["knew_lower"], found["knew_upper"] = share_interval(knew, test.keys[wrong])
    return found


def _layers_right(result: TargetPredictions) -> Float[np.ndarray, "cell sample"]:
    test = result.test.carried()
    return correctness(test.predicted, test.labels)


def _labelled(labels: Int[np.ndarray, "*train"]) -> np.ndarray:
    """Which training samples carry the target."""
    return np.asarray(labels).reshape(len(labels), -1)[:, 0] >= 0


def _usable(split: SplitPredictions, target: Target, name: str, cells: int) -> SplitPredictions:
    """The samples that carry the target. Raises ValueError when there is none or predictions are not one per cell."""
    split = split.carried()
    if len(split.keys) == 0:
        raise InputError(f"target {target.name!r} has no {name} samples: expected at least 1; raise task.problems")
    if split.predicted.shape != (cells, *split.labels.shape):
        raise InputError(
            f"target {target.name!r}: {name} predictions of shape {split.predicted.shape}, expected "
            f"{(cells, *split.labels.shape)}, one per cell and label"
        )
    return split


def _rows(split: SplitPredictions, target: Target, guess: int, steps: int) -> _Rows:
    readout = split.readout if split.readout is not None else np.full((steps, len(split.keys)), -1)
    if len(readout) != steps:
        raise InputError(f"x0_readout has {len(readout)} steps: expected one per step of the grid, {steps}")
    constant = np.full((1, *split.labels.shape), guess)
    uniform = np.full((1, len(split.keys)), 1 / target.classes)
    rows = [correctness(split.predicted, split.labels), uniform, correctness(constant, split.labels)]
    # a readout names one candidate; region labels have none
    rows.append(correctness(readout, split.labels) if split.labels.ndim == 1 else np.zeros(readout.shape))
    rows += [correctness(split.inputs[name].reshape(-1, *split.labels.shape), split.labels)
             for name in READ if name in split.inputs]  # fmt: skip
    return _Rows(np.concatenate(rows), split.keys)


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


def _visible(
    shown: Int[np.ndarray, "3 step branch place"],
    trial: Float[np.ndarray, "row"],
    latent: Float[np.ndarray, "step branch place"],
) -> tuple[Int[np.ndarray, "step branch place"], Shaped[np.ndarray, "step branch place"]]:
    """Row and name of what x0-hat shows best, by accuracies that test has no part in: of readouts on validation (no
    readout is made of training samples), of the latents in cross-validation. -1 and "" where there is nothing."""
    scores = np.stack([_take(trial, shown[0]), _take(trial, shown[1]), latent])
    return _highest(shown, scores, (READOUT, READOUT, X0))


def _highest(
    rows: Int[np.ndarray, "row step branch place"],
    scores: Float[np.ndarray, "row step branch place"],
    names: Sequence[str],
) -> tuple[Int[np.ndarray, "step branch place"], Shaped[np.ndarray, "step branch place"]]:
    """Row and name with the highest score, the first of equals; -1 and "" where none exists."""
    if not len(rows):
        return np.full(rows.shape[1:], -1), np.full(rows.shape[1:], "")
    first = np.where(rows >= 0, np.nan_to_num(scores, nan=-1.0), -2.0).argmax(axis=0)
    chosen = np.take_along_axis(rows, first[None], axis=0)[0]
    return chosen, np.where(chosen >= 0, np.asarray(names)[first], "")


def _model(evaluated: Evaluated) -> dict[str, float]:
    """How often the model's own final answer is right, on the test samples of the first answer target; an answer of
    none is wrong. NaN without such a target."""
    for result in evaluated.results:
        test = result.test.carried()
        if result.target.role == "answer" and test.drawn is not None and len(test.keys):
            right = correctness(test.drawn[None], test.labels)
            lower, upper = share_interval(right, test.keys)
            bounds = (float(right.mean()), float(lower[0]), float(upper[0]))
            return dict(zip(("model_accuracy", "model_accuracy_lower", "model_accuracy_upper"), bounds, strict=True))
    return dict.fromkeys(("model_accuracy", "model_accuracy_lower", "model_accuracy_upper"), float("nan"))
