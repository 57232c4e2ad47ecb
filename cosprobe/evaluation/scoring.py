"""Computes the grid from the predictions of the probes.

For each target, every cell and every baseline becomes a row of 1 (right) and 0 (wrong) over the test samples. These
rows give, in this order: accuracy, the reference and skill, significance, differences from x0-hat, selectivity,
agreement with the model's answers, calibration, and latency over steps and layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int, Shaped

from cosprobe.cells import DIFFICULTY, INPUTS, X0, Place
from cosprobe.errors import InputError
from cosprobe.evaluation.baselines import MUST_BEAT
from cosprobe.evaluation.grid import Grid
from cosprobe.evaluation.intervals import (
    CROSS_FITTED,
    correctness,
    difference_interval,
    effective_problems,
    grounded,
    majority,
    share_interval,
)
from cosprobe.evaluation.latency import lag, latency
from cosprobe.evaluation.predictions import Evaluated, SplitPredictions, TargetPredictions
from cosprobe.evaluation.significance import max_t_permutation, weakest_pair
from cosprobe.evaluation.variables import (
    ALPHA,
    BASELINES,
    CEILING,
    MAJORITY,
    MEANING,
    UNIFORM,
    X0_BASELINES,
    X0_PARSED,
)
from cosprobe.tasks import RELABELLED, Role, Target

CELL = ("step", "layer", "branch", "position")
STEP = ("step", "branch", "position")
LAYER = ("layer", "branch", "position")
PLACE = ("frame", "row", "column")  # coordinates along position
BASELINE = ("baseline", *STEP)
READ = (*INPUTS, X0)  # baselines that are probes (`baselines.read_inputs`)
MODEL_ACCURACY = ("model_accuracy", "model_accuracy_lower", "model_accuracy_upper")

Variables = dict[str, tuple[tuple[str, ...], np.ndarray]]  # by name: dimensions and values, as in xarray.Dataset


@dataclass(frozen=True)
class Resampling:
    """draws: number of sign changes, of permutations, and of bootstrap draws of latencies. seed: seed of all three."""

    draws: int = 1000
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Ends:
    """Lower and upper end of the interval of every row."""

    lower: Float[np.ndarray, "row"]
    upper: Float[np.ndarray, "row"]


@dataclass(frozen=True, eq=False)
class Rows:
    """Whether each cell, guess and baseline is right on each sample, for one target on one split.

    right: one row per cell, guess and baseline; 1 for right, 0 for wrong.
    keys: the problem of each sample.
    layer: index of the row of each cell, -1 for none.
    baseline: by name, index of the row of each baseline at each step, branch and position, -1 for none. All branches
    share the same rows.
    steps, layers: step indices and layers along these axes.
    worth: what a problem counts in intervals, see `share_interval`.
    """

    right: Float[np.ndarray, "row sample"]
    keys: Shaped[np.ndarray, "sample"]
    layer: Int[np.ndarray, "step layer branch position"]
    baseline: dict[str, Int[np.ndarray, "step branch position"]]
    steps: tuple[int, ...]
    layers: tuple[int, ...]
    worth: float = 1.0

    @cached_property
    def accuracy(self) -> Float[np.ndarray, "row"]:
        """Accuracy of every row."""
        return self.right.mean(axis=1)

    @cached_property
    def ends(self) -> Ends:
        """95 % interval of every accuracy. The baseline `uniform` is known exactly, so its interval has width 0."""
        lower, upper = share_interval(self.right, self.keys, self.worth)
        exact = self.guess(UNIFORM)
        lower[exact] = upper[exact] = self.accuracy[exact]
        return Ends(lower, upper)

    @property
    def present(self) -> Bool[np.ndarray, "step layer branch position"]:
        """True for cells that exist."""
        return self.layer >= 0

    @property
    def enough(self) -> bool:
        """Whether there are enough problems for p-values and intervals of differences."""
        return grounded(self.keys)

    def guess(self, name: str) -> int:
        """Index of the row of a guess, which is the same at all steps, branches and positions."""
        return int(self.baseline[name].flat[0])

    def rows_of(self, names: Sequence[str]) -> Int[np.ndarray, "name step branch position"]:
        """Indices of the rows of some baselines, in the order of `names`."""
        empty = np.empty((0, *self.baseline[UNIFORM].shape), dtype=int)
        return np.stack([self.baseline[name] for name in names]) if names else empty


@dataclass(frozen=True, eq=False)
class Chosen:
    """The baseline chosen at each step, branch and position: index of its row, and its name; -1 and "" for none."""

    row: Int[np.ndarray, "step branch position"]
    source: Shaped[np.ndarray, "step branch position"]


@dataclass(frozen=True, eq=False)
class Tested:
    """p of every cell, and the critical value of the statistic (0 if nothing was tested)."""

    p: Float[np.ndarray, "step layer branch position"]
    critical: float


def build_grid(
    evaluated: Evaluated, draws: int = 1000, seed: int = 0, provenance: Mapping[str, Any] | None = None
) -> Grid:
    """Computes the grid: accuracy, baselines, significance and latencies of every cell on test.

    draws, seed: see `Resampling`. provenance: stored in the grid's attributes.
    Raises InputError when there are no cells, experts do not match the steps, or a target has no samples.
    """
    if not evaluated.cells:
        raise InputError("cells: none; expected at least one layer")
    if len(evaluated.experts) != len(evaluated.steps):
        raise InputError(f"{len(evaluated.experts)} experts: expected one per step, {len(evaluated.steps)}")
    targets = [result.target for result in evaluated.results]
    relabelled = {result.target.name: _cells_right(result) for result in evaluated.results}
    scored = [
        _score(result, evaluated, relabelled.get(f"{result.target.name}_{RELABELLED}"), Resampling(draws, seed))
        for result in evaluated.results
    ]
    variables = {}
    for name, (axes, _) in scored[0].items():
        values = np.stack([score[name][1] for score in scored])
        variables[name] = (("target", *axes), values, {"long_name": MEANING[name]})
    positions = list(evaluated.positions)
    coordinates = {
        "target": [t.name for t in targets],
        "step": list(evaluated.steps),
        "layer": list(evaluated.layers),
        "branch": list(evaluated.branches),
        "position": positions,
        "baseline": list(BASELINES),
        "expert": ("step", list(evaluated.experts)),
        **{axis: ("position", [getattr(Place.of(name), axis) for name in positions]) for axis in PLACE},
        "role": ("target", [t.role for t in targets]),
        "form": ("target", [t.form for t in targets]),
        "kinds": ("target", [",".join(t.kinds) for t in targets]),
        "not_measured": ("target", [",".join(missing_inputs(result)) for result in evaluated.results]),
    }
    attributes = {
        "provenance": json.dumps(dict(provenance or {}), default=str),
        "left_out": json.dumps(list(evaluated.left_out)),
        **_model_accuracy(evaluated),
    }
    dataset = xr.Dataset(variables, coordinates, attributes)
    return Grid(dataset.isel(branch=0) if len(evaluated.branches) == 1 else dataset)


def _score(
    result: TargetPredictions,
    evaluated: Evaluated,
    relabelled: Float[np.ndarray, "cell sample"] | None,
    resampling: Resampling,
) -> Variables:
    """All variables of one target. relabelled: where the same cells are right on its random relabelling."""
    validation, test = (
        _carrying(split, result.target, name, len(evaluated.cells))
        for split, name in ((result.validation, "validation"), (result.test, "test"))
    )
    # every problem trains some bank of cross-fitting
    guess = majority(np.asarray(result.train_labels if test.fold is None else test.labels))
    of_test, of_validation = (_rows(split, result, evaluated, guess) for split in (test, validation))
    # on test itself: chosen on validation, the more frequent label could be right less often than 1 / classes
    better = max((UNIFORM, MAJORITY), key=lambda name: of_test.accuracy[of_test.guess(name)])
    cross_validation = _of_readings(result, of_test, "accuracy", np.nan)
    reference = _reference(result, of_test, cross_validation, better)
    of_x0 = _x0_rows(of_test)
    x0 = _best_of_x0(of_x0, of_validation, cross_validation[BASELINES.index(X0)])
    return (
        _accuracies(result, of_test, of_validation)
        | _nested(test, validation, of_test, of_validation)
        | _baselines(result, of_test, of_validation, cross_validation)
        | _skill(of_test, reference)
        | _significance(result, test, of_test, better, resampling)
        | _above_x0(of_test, of_x0, x0, resampling)
        | _selectivity(of_test, relabelled)
        | _model_answers(result, test, of_test)
        | _calibration(result, of_test)
        | timing(of_test, x0.row, _found(validation, of_validation, of_test, resampling), better, resampling)
        | _counts(result, validation, test)
    )


def _carrying(split: SplitPredictions, target: Target, name: str, cells: int) -> SplitPredictions:
    """The samples that have a label of the target. Raises InputError for no such samples, or predictions that do not
    match the cells."""
    split = split.carried()
    if len(split.keys) == 0:
        raise InputError(f"target {target.name!r} has no {name} samples: expected at least 1; raise task.problems")
    if split.predicted.shape != (cells, *split.labels.shape):
        raise InputError(
            f"target {target.name!r}: {name} predictions of shape {split.predicted.shape}, expected "
            f"{(cells, *split.labels.shape)}, one per cell and label"
        )
    return split


def _rows(split: SplitPredictions, result: TargetPredictions, evaluated: Evaluated, guess: int) -> Rows:
    """Rows of all cells and baselines. guess: the most frequent training label.

    Order of the rows: cells, the two guesses, parsed x0-hat at every step, inputs at every step and position.
    """
    layer, cells, steps = evaluated.index(), len(evaluated.cells), len(evaluated.steps)
    parsed = split.x0_parsed if split.x0_parsed is not None else np.full((steps, len(split.keys)), -1)
    if len(parsed) != steps:
        raise InputError(f"x0_parsed has {len(parsed)} steps: expected one per step of the grid, {steps}")
    shape = (steps, layer.shape[2], layer.shape[3])
    baseline = {name: np.full(shape, -1) for name in BASELINES}
    baseline[UNIFORM][:], baseline[MAJORITY][:] = cells, cells + 1
    decoded = (parsed >= 0).any(axis=1)
    baseline[X0_PARSED][decoded] = (cells + 2 + np.arange(steps))[decoded, None, None]
    # the parser returns one candidate, so it has no answer for region labels
    of_parsed = correctness(parsed, split.labels) if split.labels.ndim == 1 else np.zeros(parsed.shape)
    right = [
        correctness(split.predicted, split.labels),
        np.full((1, len(split.keys)), 1 / result.target.classes),
        correctness(np.full((1, *split.labels.shape), guess), split.labels),
        of_parsed,
    ]
    for name in (name for name in READ if name in result.readings):
        first = sum(map(len, right))
        baseline[name][:] = first + np.arange(steps * shape[2]).reshape(steps, 1, shape[2])
        right.append(correctness(split.inputs[name].reshape(-1, *split.labels.shape), split.labels))
    worth = 1.0 if split.fold is None else CROSS_FITTED
    return Rows(np.concatenate(right), split.keys, layer, baseline, evaluated.steps, evaluated.layers, worth)


def _accuracies(result: TargetPredictions, test: Rows, validation: Rows) -> Variables:
    return {
        "accuracy": (CELL, _take(test.accuracy, test.layer)),
        "lower": (CELL, _take(test.ends.lower, test.layer)),
        "upper": (CELL, _take(test.ends.upper, test.layer)),
        "validation_accuracy": (CELL, _take(validation.accuracy, test.layer)),
        "penalty": (CELL, _take(np.asarray(result.penalties), test.layer)),
    }


def _nested(test: SplitPredictions, validation: SplitPredictions, of_test: Rows, of_validation: Rows) -> Variables:
    """With cross-fitting, accuracy where every bank chooses its best cell on its own validation problems."""
    if test.fold is None or validation.fold is None:
        return {}
    right, cells = np.empty(len(test.keys)), of_test.layer[of_test.present]  # in the order in which ties are decided
    for bank in np.unique(test.fold):
        scores = of_validation.right[cells][:, validation.fold == bank].mean(axis=1)
        chosen, here = cells[scores.round(12).argmax()], test.fold == bank
        right[here] = of_test.right[chosen, here]
    lower, upper = share_interval(right[None], test.keys, of_test.worth)
    values = {"": right.mean(), "_lower": lower[0], "_upper": upper[0]}
    return {f"nested_accuracy{end}": ((), np.asarray(value)) for end, value in values.items()}


def _baselines(
    result: TargetPredictions,
    test: Rows,
    validation: Rows,
    cross_validation: Float[np.ndarray, "baseline step branch position"],
) -> Variables:
    rows = test.rows_of(BASELINES)
    return {
        "baseline_accuracy": (BASELINE, _take(test.accuracy, rows)),
        "baseline_lower": (BASELINE, _take(test.ends.lower, rows)),
        "baseline_upper": (BASELINE, _take(test.ends.upper, rows)),
        "baseline_validation": (BASELINE, _take(validation.accuracy, rows)),
        "baseline_cross_validation": (BASELINE, cross_validation),
        "baseline_form": (BASELINE, _of_readings(result, test, "form", "")),
        "baseline_columns": (BASELINE, _of_readings(result, test, "columns", np.nan)),
        "baseline_projected": (BASELINE, _of_readings(result, test, "projected", np.nan)),
    }


def _of_readings(
    result: TargetPredictions, rows: Rows, field: str, missing: float | str
) -> Shaped[np.ndarray, "baseline step branch position"]:
    """A field of every reading, repeated for every branch. `missing` for baselines that are not probes."""
    kind = "<U24" if isinstance(missing, str) else np.float64
    found = np.full((len(BASELINES), *rows.baseline[UNIFORM].shape), missing, dtype=kind)
    for name, reading in result.readings.items():
        found[BASELINES.index(name)] = getattr(reading, field)[:, None]
    return found


def _reference(
    result: TargetPredictions,
    test: Rows,
    cross_validation: Float[np.ndarray, "baseline step branch position"],
    guess: str,
) -> Chosen:
    """The input with the highest cross-validated accuracy. The guess, where that input is less accurate on test than
    the guess, or where the target has no input to beat. None, where it has inputs to beat and none was measured."""
    names = _inputs(result)
    if unmeasured(result):
        empty = np.full(test.baseline[UNIFORM].shape, -1)
        return Chosen(empty, np.full(empty.shape, ""))
    best = _highest(test.rows_of(names), cross_validation[[BASELINES.index(name) for name in names]], names)
    below = ~(_take(test.accuracy, best.row) >= test.accuracy[test.guess(guess)])  # true for NaN
    return Chosen(np.where(below, test.guess(guess), best.row), np.where(below, guess, best.source))


def _inputs(result: TargetPredictions) -> list[str]:
    """Inputs that the target is compared with."""
    return [name for name in INPUTS if name in result.readings]


def missing_inputs(result: TargetPredictions) -> list[str]:
    """Inputs that the target has to beat and that were not measured. Difficulty exists for some tasks only."""
    return [name for name in MUST_BEAT.get(result.target.role, ()) if name not in (*result.readings, DIFFICULTY)]


def unmeasured(result: TargetPredictions) -> bool:
    """Whether the target has inputs to beat and none was measured. Then it has neither skill nor evidence."""
    return result.target.role in MUST_BEAT and not _inputs(result)


def _skill(test: Rows, reference: Chosen) -> Variables:
    level = _take(test.accuracy, reference.row)
    room = np.where(level > CEILING, np.nan, 1 - level)[:, None]
    return {
        "skill": (CELL, (_take(test.accuracy, test.layer) - level[:, None]) / room),
        "reference": (STEP, level),
        "reference_source": (STEP, reference.source),
    }


def _significance(
    result: TargetPredictions, test: SplitPredictions, rows: Rows, guess: str, resampling: Resampling
) -> Variables:
    """p of every cell against chance and every input; and the smallest detectable skill."""
    permuted = _permuted(test, rows, resampling)
    inputs = _above_all(rows, rows.rows_of(_inputs(result)), resampling)
    # Predictions may go along with the labels and still be less accurate than the most frequent label. With
    # cross-fitting, labels that are permuted alone are not quite the null hypothesis, so any guess has to be beaten.
    beaten = [guess] if guess == MAJORITY or test.fold is not None else []
    guesses = _above_all(rows, rows.rows_of(beaten), resampling)
    chance, effective = rows.accuracy[rows.guess(guess)], rows.worth * effective_problems(rows.keys)
    # sign changes: sqrt(problems won) has to reach the critical value; permutations: accuracy in standard deviations
    evidence = np.fmax(np.fmax(permuted.p, guesses.p), inputs.p)  # NaN only where all are
    deviation = np.sqrt(chance * (1 - chance) / effective)
    gain = max(max(inputs.critical, guesses.critical) ** 2 / effective, permuted.critical * deviation)
    detectable = gain / (1 - chance) if rows.enough and chance < 1 else np.nan
    return {
        "p_permutation": (CELL, permuted.p),
        "p_inputs": (CELL, inputs.p),
        "p_guess": (CELL, guesses.p),
        "p_evidence": (CELL, np.full_like(evidence, np.nan) if unmeasured(result) else evidence),
        "chance": ((), np.asarray(chance)),
        "smallest_detectable_skill": ((), np.asarray(detectable)),
    }


def _permuted(split: SplitPredictions, rows: Rows, resampling: Resampling) -> Tested:
    """p of every cell by permutation of labels between problems: do its predictions go along with them?"""
    p = np.full(rows.layer.shape, np.nan)
    if not rows.enough:
        return Tested(p, 0.0)
    predicted = split.predicted[rows.layer[rows.present]]
    tested = max_t_permutation(predicted, split.labels, split.keys, resampling.draws, resampling.seed)
    p[rows.present] = tested.p
    return Tested(p, tested.critical)


def _above_all(rows: Rows, others: Int[np.ndarray, "other step branch position"], resampling: Resampling) -> Tested:
    """p of every cell against each of the other rows at its step, branch and position, by sign changes of problems."""
    p = np.full(rows.layer.shape, np.nan)
    at = np.broadcast_to(others[:, :, None], (len(others), *rows.layer.shape))
    tested = rows.present & (at >= 0).any(axis=0)
    if not rows.enough or not tested.any():
        return Tested(p, 0.0)
    pairs = at[:, tested].T  # cell, other
    right = rows.right[rows.layer[tested]][:, None]
    differences = np.where((pairs >= 0)[..., None], right - rows.right[pairs], np.nan)
    found = weakest_pair(differences, rows.keys, resampling.draws, resampling.seed)
    p[tested] = found.p
    return Tested(p, found.critical)


def _x0_rows(rows: Rows) -> Int[np.ndarray, "3 step branch position"]:
    """Rows of the x0-hat baselines at each step: the parser at the last decoded step up to this one, the parser at the
    first decoded step from this one on, and the probe on its latents.

    At steps that are not decoded the probe alone would be too weak a baseline: trained on few samples, it is less
    accurate than the parser on the decoded video.
    """
    parsed, latent = (rows.baseline[name] for name in X0_BASELINES)
    decoded = np.flatnonzero((parsed >= 0).all(axis=(1, 2)))
    if not len(decoded):
        return np.stack([parsed, parsed, latent])
    steps = np.arange(len(parsed))
    before = decoded[(np.searchsorted(decoded, steps, side="right") - 1).clip(min=0)]
    after = decoded[np.searchsorted(decoded, steps).clip(max=len(decoded) - 1)]
    return np.stack([parsed[before], parsed[after], latent])


def _best_of_x0(
    of_x0: Int[np.ndarray, "3 step branch position"],
    validation: Rows,
    latent: Float[np.ndarray, "step branch position"],
) -> Chosen:
    """The best x0-hat baseline at each step, chosen without test samples: the parser by its validation accuracy
    (training samples are not parsed), the probe on latents by its cross-validated accuracy."""
    scores = np.stack([_take(validation.accuracy, of_x0[0]), _take(validation.accuracy, of_x0[1]), latent])
    return _highest(of_x0, scores, (X0_PARSED, X0_PARSED, X0))


def _above_x0(
    rows: Rows, of_x0: Int[np.ndarray, "3 step branch position"], best: Chosen, resampling: Resampling
) -> Variables:
    difference = _difference(rows.right, rows, np.broadcast_to(best.row[:, None], rows.layer.shape))
    return {
        **{f"above_x0{end}": (CELL, values) for end, values in difference.items()},
        "p_x0": (CELL, _above_all(rows, of_x0, resampling).p),
        "x0_accuracy": (STEP, _take(rows.accuracy, best.row)),
        "x0_source": (STEP, best.source),
    }


def _selectivity(rows: Rows, relabelled: Float[np.ndarray, "cell sample"] | None) -> Variables:
    if relabelled is None or relabelled.shape[1] != len(rows.keys):
        found = {end: np.full(rows.layer.shape, np.nan) for end in ("", "_lower", "_upper")}
    else:
        of_control = np.where(rows.present, rows.layer + len(rows.right), -1)
        found = _difference(np.concatenate([rows.right, relabelled]), rows, of_control)
    return {f"selectivity{end}": (CELL, values) for end, values in found.items()}


def _difference(
    right: Float[np.ndarray, "row sample"], rows: Rows, other: Int[np.ndarray, "step layer branch position"]
) -> dict[str, Float[np.ndarray, "step layer branch position"]]:
    """Accuracy of every cell minus that of another row of `right`, and the ends of its paired interval."""
    found = {end: np.full(rows.layer.shape, np.nan) for end in ("", "_lower", "_upper")}
    both = rows.present & (other >= 0)
    if both.any():
        difference = right[rows.layer[both]] - right[other[both]]
        found[""][both] = difference.mean(axis=1)
        if rows.enough:
            found["_lower"][both], found["_upper"][both] = difference_interval(difference, rows.keys, rows.worth)
    return found


def _model_answers(result: TargetPredictions, test: SplitPredictions, rows: Rows) -> Variables:
    """Agreement of each cell with the model's answers, and its accuracy where the model's answer is wrong."""
    names = ("", "_lower", "_upper")
    cells = len(test.predicted)
    agreement, wrong_count = np.full(cells, np.nan), 0
    correct = {end: np.full(cells, np.nan) for end in names}
    if test.model_answer is not None and test.labels.ndim == 1:
        settled, wrong = test.model_answer >= 0, test.model_answer != test.labels
        if settled.any():
            agreement = (test.predicted[:, settled] == test.model_answer[settled]).mean(axis=1)
        if wrong.any() and result.target.role is Role.ANSWER:
            right = rows.right[:cells, wrong]
            correct[""], wrong_count = right.mean(axis=1), int(wrong.sum())
            correct["_lower"], correct["_upper"] = share_interval(right, test.keys[wrong], rows.worth)
    return {
        "agreement": (CELL, _take(agreement, rows.layer)),
        **{f"correct_when_model_wrong{end}": (CELL, _take(correct[end], rows.layer)) for end in names},
        "n_model_wrong": ((), np.asarray(wrong_count)),
    }


def _calibration(result: TargetPredictions, rows: Rows) -> Variables:
    unknown = np.full(rows.layer.max() + 1, np.nan)
    names = ("temperature", "ece", "ece_raw", "brier")
    return {name: (CELL, _take(np.asarray(result.calibration.get(name, unknown)), rows.layer)) for name in names}


def _found(
    validation: SplitPredictions, rows: Rows, test: Rows, resampling: Resampling
) -> Bool[np.ndarray, "step layer branch position"]:
    """Cells with evidence on validation, by permutation of labels (corrected p at most 0.05). None, if test has too few
    problems.

    Test samples are not used: a selection by evidence on test would bias the latencies, which are measured on test.
    With cross-fitting, all validation samples are test samples too, so there are no latencies.
    """
    if not test.enough or validation.fold is not None:
        return np.zeros(rows.layer.shape, dtype=bool)
    return np.nan_to_num(_permuted(validation, rows, resampling).p, nan=1.0) <= ALPHA


def timing(
    rows: Rows,
    x0: Int[np.ndarray, "step branch position"],
    found: Bool[np.ndarray, "step layer branch position"],
    guess: str,
    resampling: Resampling,
) -> Variables:
    """Latency of every layer and of x0-hat over steps, their lag, and depth (latency over layers) of every step.

    x0: index of the row of the best x0-hat baseline, -1 for none.
    found: cells with evidence; a line without such cells has no latency.
    guess: the baseline that is subtracted from accuracy.
    """
    level, across = rows.right[rows.guess(guess)], rows.layer.shape[2:]
    options = (resampling.draws, resampling.seed)

    # over steps: one line per layer, branch and position, then one of x0-hat per branch and position
    index = np.concatenate([rows.layer, x0[:, None]], axis=1).reshape(len(rows.steps), -1).T
    of_x0 = np.asarray(found.any(axis=(0, 1)))[None]  # x0-hat counts only where some probe has evidence
    evidence = np.concatenate([found.any(axis=0), of_x0]).ravel()
    levels = np.tile(level, (len(index), 1))
    over_steps = latency(_points(rows, index), levels, rows.steps, rows.keys, evidence, *options)
    count = len(rows.layers) * int(np.prod(across))
    of_line = count + np.arange(count) % max(1, int(np.prod(across)))  # x0-hat at the same branch and position
    lead = lag(over_steps, of_line.tolist(), list(range(count)))

    # over layers: one line per step, branch and position
    deep = np.moveaxis(rows.layer, 1, -1).reshape(-1, len(rows.layers))
    levels = np.tile(level, (len(deep), 1))
    over_layers = latency(_points(rows, deep), levels, rows.layers, rows.keys, found.any(axis=1).ravel(), *options)

    ends = {"": "value", "_lower": "lower", "_upper": "upper"}
    table: Variables = {}
    for end, field in (ends | {"_censored": "censored"}).items():
        values = getattr(over_steps, field)
        table[f"latency{end}"] = (LAYER, values[:count].reshape(len(rows.layers), *across))
        table[f"x0_latency{end}"] = (LAYER[1:], values[count:].reshape(across))
    for end, field in ends.items():
        table[f"lag{end}"] = (LAYER, getattr(lead, field).reshape(len(rows.layers), *across))
        table[f"depth{end}"] = (STEP, getattr(over_layers, field).reshape(len(rows.steps), *across))
    return table


def _points(rows: Rows, index: Int[np.ndarray, "line point"]) -> Float[np.ndarray, "line point sample"]:
    return np.where((index >= 0)[..., None], rows.right[index], np.nan)


def _counts(result: TargetPredictions, validation: SplitPredictions, test: SplitPredictions) -> Variables:
    labels = np.asarray(result.train_labels)
    train_keys = np.asarray(result.train_keys)[labels.reshape(len(labels), -1)[:, 0] >= 0]
    keys = {"train": train_keys, "validation": validation.keys, "test": test.keys}
    numbers = {f"n_{split}": len(these) for split, these in keys.items()}
    numbers |= {f"n_{split}_problems": len(np.unique(these)) for split, these in keys.items()}
    found: Variables = {name: ((), np.asarray(number)) for name, number in numbers.items()}
    found["n_effective"] = ((), np.asarray(effective_problems(test.keys)))
    return found | {"n_no_answer": ((), np.asarray(result.n_no_answer))}


def _take(values: Float[np.ndarray, "row"], index: Int[np.ndarray, "*axes"]) -> Float[np.ndarray, "*axes"]:
    return np.where(index >= 0, values[index], np.nan)


def _highest(
    rows: Int[np.ndarray, "row step branch position"],
    scores: Float[np.ndarray, "row step branch position"],
    names: Sequence[str],
) -> Chosen:
    """The row with the highest score, on a tie the first."""
    if not len(rows):
        return Chosen(np.full(rows.shape[1:], -1), np.full(rows.shape[1:], ""))
    first = np.where(rows >= 0, np.nan_to_num(scores, nan=-1.0), -2.0).argmax(axis=0)
    chosen = np.take_along_axis(rows, first[None], axis=0)[0]
    return Chosen(chosen, np.where(chosen >= 0, np.asarray(names)[first], ""))


def _cells_right(result: TargetPredictions) -> Float[np.ndarray, "cell sample"]:
    test = result.test.carried()
    return correctness(test.predicted, test.labels)


def _model_accuracy(evaluated: Evaluated) -> dict[str, float]:
    """Accuracy of the model's answer on the test samples of the first target of role `answer`, with its interval.

    No answer counts as wrong. NaN if there is no such target.
    """
    for result in evaluated.results:
        test = result.test.carried()
        if result.target.role is Role.ANSWER and test.model_answer is not None and len(test.keys):
            right = correctness(test.model_answer[None], test.labels)
            lower, upper = share_interval(right, test.keys)
            return dict(zip(MODEL_ACCURACY, (float(right.mean()), float(lower[0]), float(upper[0])), strict=True))
    return dict.fromkeys(MODEL_ACCURACY, float("nan"))
