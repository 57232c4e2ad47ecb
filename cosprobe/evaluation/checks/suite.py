"""Checks of the best cells of a map, each against another explanation of a high accuracy.

Cells are chosen on validation. Checks are measured on test, and their results become variables of the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from cosprobe.activations import InputFeatures, ProbeSamples
from cosprobe.cells import EMBED, X0, Cell
from cosprobe.evaluation import Evaluated, Grid, InputReading, build_grid, input_samples
from cosprobe.evaluation.checks.confounds import Residualised, residualised
from cosprobe.evaluation.checks.description_length import DescriptionLength, description_length, side_by_side
from cosprobe.evaluation.checks.generalisation import Matrix, matrices
from cosprobe.evaluation.checks.projection import ProjectionCost, projection_cost
from cosprobe.evaluation.checks.refitting import NotEnoughSamples
from cosprobe.evaluation.checks.untrained import WEIGHTS, WeightsTable
from cosprobe.probes import ProbeBank, Reliability, reliability
from cosprobe.tasks import ANSWER_ROLES

BINS = 8  # largest number of points of a reliability curve
ROWS = 5  # least number of labels per point
MEANING = {
    "transfer": "test accuracy of the probe of one {axis} on another",
    "bits": "prequential description length of the training labels, bits per label",
    "bits_lower": "lower end of the 95 % interval of bits", "bits_upper": "upper end of the 95 % interval of bits",
    "bits_uniform": "bits per label without a probe",
    "bits_prior": "bits per label if only label frequencies are learnt",
    "learning": "test accuracy of the best cell's probe by number of training problems",
    "learning_lower": "lower end of its 95 % interval", "learning_upper": "upper end of its 95 % interval",
    "residual_before": "test accuracy of the best cell, refitted",
    "residual_after": "the same after confounds are regressed out of the features",
    "residual_lower": "lower end of the paired 95 % interval of after - before",
    "residual_upper": "upper end of the paired 95 % interval of after - before",
    "projection_all": "test accuracy with all channels, at a cell that is kept with them",
    "projection_kept": "the same with the projected features",
    "projection_lower": "lower end of the paired 95 % interval of kept - all",
    "projection_upper": "upper end of the paired 95 % interval of kept - all",
    "difficulty_alone": "test accuracy of a probe on the confounds alone",
    "weights_accuracy": "test accuracy on few samples, by weights of the transformer",
    "weights_lower": "lower end of the 95 % interval of weights_accuracy",
    "weights_upper": "upper end of the 95 % interval of weights_accuracy",
}  # fmt: skip
Result = TypeVar("Result")


@dataclass(frozen=True)
class Checks:
    """Results of the checks, for every target of role `answer` or `model_answer`.

    best: the best cell of each target.
    lengths: description lengths of the best cell, of `embed` and of the latents of x0-hat at its step. The latter two
    are read in the form that was kept in cross-validation.
    reliability: reliability curves of the best cell with and without the temperature.
    projections: what the projection of the features costs, if they are projected.
    weights: accuracy by weights of the transformer, None if no other weights were sampled.
    skipped: a sentence for each check that is missing that gives the reason.
    """

    best: dict[str, Cell]
    matrices: tuple[Matrix, ...]
    lengths: tuple[DescriptionLength, ...]
    residuals: tuple[Residualised, ...]
    reliability: dict[str, tuple[Reliability, Reliability]]
    weights: WeightsTable | None
    skipped: tuple[str, ...]
    projections: tuple[ProjectionCost, ...] = ()


def examine(
    evaluated: Evaluated,
    samples: ProbeSamples,
    inputs: Mapping[str, InputFeatures],
    bank: ProbeBank,
    weights: WeightsTable | None = None,
    seed: int = 0,
    draws: int = 1000,
    whole: ProbeSamples | None = None,
) -> tuple[Grid, Checks]:
    """Computes the grid of a bank and all checks of its best cells for which there are enough samples.

    evaluated: predictions of the bank.
    samples: the samples that the bank was fitted and evaluated on.
    inputs: features of the inputs of these samples, by name.
    weights: results with other weights of the transformer, if any.
    seed, draws: as in `build_grid`.
    whole: the samples with all channels, if those of the bank are projected.
    Returns the grid, which includes the checks as variables, and the checks.
    """
    grid = build_grid(evaluated, draws, seed, asdict(bank.provenance) | {"bank": bank.fingerprint})
    best = {target: grid.best(target).cell for target in grid.with_role(*ANSWER_ROLES)}
    skipped: list[str] = []
    lengths: list[DescriptionLength] = []
    residuals: list[Residualised] = []
    projections: list[ProjectionCost] = []
    curves: dict[str, tuple[Reliability, Reliability]] = {}
    readings = {result.target.name: result.readings for result in evaluated.results}
    for name, cell in best.items():
        penalty = bank.select([cell]).penalties[name]
        lengths += _tried(skipped, partial(_lengths, samples, inputs, readings[name], name, cell, penalty, seed))
        residuals += _tried(skipped, partial(residualised, samples, name, [cell], penalty))
        curves[name] = _curves(samples, bank, name, cell)
        if whole is not None:
            penalties = bank.provenance.probe["penalties"]
            projections += _tried(skipped, partial(projection_cost, samples, whole, name, cell.position, penalties))
    experts = dict(zip(evaluated.steps, evaluated.experts, strict=True))
    found = _tried(skipped, partial(matrices, samples, bank, best, experts))
    checks = Checks(best, tuple(chain(*found)), tuple(lengths), tuple(residuals), curves, weights, tuple(skipped),
                    tuple(projections))  # fmt: skip
    return with_checks(grid, checks), checks


def _lengths(
    samples: ProbeSamples,
    inputs: Mapping[str, InputFeatures],
    readings: Mapping[str, InputReading],
    target: str,
    cell: Cell,
    penalty: Float[Tensor, " one"],
    seed: int,
) -> DescriptionLength:
    """Description lengths of a cell, and of `embed` and the latents of x0-hat at its step where they have readings."""
    found = {"best": description_length(samples, target, [cell], penalty, seed)}
    step = sorted({c.step for c in samples.cells}).index(cell.step)
    position = tuple(dict.fromkeys(c.position for c in samples.cells)).index(cell.position)
    for name in (name for name in (EMBED, X0) if name in readings):
        form, value = (getattr(readings[name], field)[step, position] for field in ("form", "penalty"))
        of_input = input_samples(samples, inputs[name], target, cell, str(form))
        found[name] = description_length(of_input, target, of_input.cells, torch.tensor([value]), seed)
    return side_by_side(found)


def _tried(skipped: list[str], analysis: Callable[[], Result]) -> list[Result]:
    """The result in a list; if there are too few samples, an empty list, and the reason is appended to `skipped`."""
    try:
        return [analysis()]
    except NotEnoughSamples as error:
        skipped.append(str(error))
        return []


def _curves(samples: ProbeSamples, bank: ProbeBank, target: str, cell: Cell) -> tuple[Reliability, Reliability]:
    """Reliability curves of a cell on test, with and without the temperature."""
    test = samples.subset("test")
    features = test.features[:, [samples.cells.index(cell)]]
    labels = test.labels[target].flatten()
    bins = max(1, min(BINS, int((labels >= 0).sum()) // ROWS))
    raw = bank.decision(features, target, [cell]).softmax(dim=-1)
    proba = bank.probabilities(features, target, [cell])
    a, b = (reliability(values.reshape(len(labels), -1), labels, bins) for values in (proba, raw))
    return a, b


def with_checks(grid: Grid, checks: Checks) -> Grid:
    """Adds the checks to the grid as variables. NaN for targets without a check."""
    parts = [*map(_matrix, checks.matrices), *map(_length, checks.lengths), *map(_residual, checks.residuals)]
    parts += map(_projection, checks.projections)
    dataset = grid.dataset
    if checks.weights is not None:
        dataset = _with_weights(dataset, checks.weights)
    known = [part.reindex(target=dataset.target) for part in parts]
    return Grid(xr.merge([dataset, *known], join="outer", compat="no_conflicts", combine_attrs="override"))


def _matrix(matrix: Matrix) -> xr.Dataset:
    """Variables `transfer_<axis>`, `transfer_<axis>_lower` and `_upper`, with axes train_<axis> and test_<axis>."""
    axes = (f"train_{matrix.axis}", f"test_{matrix.axis}")
    coordinates: dict[str, list] = {
        axis: list(names) for axis, names in zip(axes, (matrix.train, matrix.test), strict=True)
    }
    if matrix.axis in ("step", "layer"):
        coordinates = {axis: [int(name) for name in names] for axis, names in coordinates.items()}
    values = {"": matrix.accuracy, "_lower": matrix.lower, "_upper": matrix.upper}
    meaning = MEANING["transfer"].format(axis=matrix.axis)
    variables = {f"transfer_{matrix.axis}{end}": (axes, value, meaning) for end, value in values.items()}
    return _dataset(matrix.target, variables, coordinates)


def _length(length: DescriptionLength) -> xr.Dataset:
    learning = {"": length.accuracy.value, "_lower": length.accuracy.lower, "_upper": length.accuracy.upper}
    variables = {
        "bits": (("source",), length.bits), "bits_lower": (("source",), length.lower),
        "bits_upper": (("source",), length.upper), "bits_uniform": ((), np.asarray(length.uniform)),
        "bits_prior": ((), np.asarray(length.prior)),
    } | {f"learning{end}": (("problems",), values[0]) for end, values in learning.items()}  # fmt: skip
    return _dataset(length.target, variables, {"source": list(length.names), "problems": list(length.sizes)})


def _residual(found: Residualised) -> xr.Dataset:
    values = {
        "residual_before": found.before.value, "residual_after": found.after.value,
        "residual_lower": found.difference.lower, "residual_upper": found.difference.upper,
        "difficulty_alone": found.alone.value,
    }  # fmt: skip
    return _dataset(found.target, {name: ((), np.ravel(value)[0]) for name, value in values.items()}, {})


def _projection(found: ProjectionCost) -> xr.Dataset:
    values = {
        "projection_all": found.whole.value, "projection_kept": found.projected.value,
        "projection_lower": found.difference.lower, "projection_upper": found.difference.upper,
    }  # fmt: skip
    return _dataset(found.target, {name: ((), value) for name, value in values.items()}, {})


def _with_weights(dataset: xr.Dataset, table: WeightsTable) -> xr.Dataset:
    """Adds `weights_accuracy` by layer and step, and the two baselines: accuracy at the layer best on validation."""
    steps, layers, positions = (
        sorted({cell.step for cell in table.cells}), sorted({cell.layer for cell in table.cells}),
        list(dict.fromkeys(cell.position for cell in table.cells)),
    )  # fmt: skip
    shape = (len(table.targets), len(WEIGHTS), len(steps), len(layers), len(positions))
    axes = ("target", "weights", "step", "layer", "position")
    coordinates = {"target": list(table.targets), "weights": list(WEIGHTS), "step": steps, "layer": layers}
    coordinates["position"] = positions
    values = {"accuracy": table.accuracy, "lower": table.lower, "upper": table.upper, "validation": table.validation}
    arrays = {name: xr.DataArray(value.reshape(shape), coordinates, axes) for name, value in values.items()}
    chosen = arrays["validation"].argmax("layer")
    found = dataset.copy(deep=True)
    for name, variable in (("accuracy", "baseline_accuracy"), ("lower", "baseline_lower"), ("upper", "baseline_upper"),
                           ("validation", "baseline_validation")):  # fmt: skip
        best = arrays[name].isel(layer=chosen).drop_vars("layer")
        for weights in WEIGHTS[1:]:
            where = {"baseline": f"{weights}_weights", "target": list(table.targets), "step": steps}
            values_here = best.sel(weights=weights).drop_vars("weights")
            if "branch" in found.dims:
                where["branch"] = "cond"
            order = [axis for axis in found[variable].dims if axis in values_here.dims]
            found[variable].loc[where] = values_here.transpose(*order).values
    for name in ("accuracy", "lower", "upper"):
        whole = arrays[name].reindex({axis: dataset[axis] for axis in ("target", "step", "layer")})
        found[f"weights_{name}"] = whole.assign_attrs(long_name=MEANING[f"weights_{name}"])
    return found.assign_attrs(
        weights_samples=table.samples, weights_evaluations=table.evaluations, weights_seconds=table.seconds
    )


def _dataset(target: str, variables: dict, coordinates: dict) -> xr.Dataset:
    """A dataset of one target. variables: by name (axes, values) or (axes, values, meaning)."""
    table = {
        name: (("target", *axes), np.asarray(values)[None], {"long_name": meaning[0] if meaning else MEANING[name]})
        for name, (axes, values, *meaning) in variables.items()
    }
    return xr.Dataset(table, coords={"target": [target], **coordinates})
