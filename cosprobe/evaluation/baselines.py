"""Input baselines: what a linear probe reads of a target before the first block of the transformer has run.

An answer that can be read from a layer is a finding only if it cannot be read from what the model was given. So each
input gets the same samples, penalties and solver as the probes, and is read in the form that serves it best:

* `region` or `whole`: from the regions that a probe of layers reads, or from coarse cells of the whole frame side by
  side (`pooling.whole_frame`), which every candidate weighs in its own way;
* `mean` or `frames`: the mean over latent frames, or all latent frames side by side.

One form is kept per target, input and step: the one with the highest accuracy in cross-validation over whole problems
of train and validation. Test is not looked at. The kept form is then fitted like a probe: on train, its penalty chosen
on validation (`ridge`: by folds inside train).

The latents of x0-hat are read in the same way. They are no input, and have a comparison of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cosprobe.activations import InputFeatures, ProbeSamples
from cosprobe.cells import EMBED, FIRST_FRAME, INPUTS, NOISE, X0, X_T, Cell
from cosprobe.evaluation.predictions import InputReading
from cosprobe.probes import (
    affine,
    classes_last,
    design,
    fit_newton,
    fit_ridge,
    principal_axes,
    problem_folds,
    shared,
    spread,
    standardise,
    validated,
)
from cosprobe.tasks import Target, readable_targets

LOCAL = (NOISE, FIRST_FRAME, EMBED, X_T)  # inputs that have frames and regions
# What a target has to be compared with, by its role. Perception targets lie in the input by definition, nuisance and
# control targets are no findings: all of these are compared with chance alone.
MUST_BEAT = {"answer": INPUTS, "choice": INPUTS, "memory": LOCAL}
GAP = 1e-4  # relative gap of the objective at which a fit ends
NUMBERS = 2**25  # features worked on at once: 128 MB in fp32


@dataclass(frozen=True)
class Recipe:
    """How inputs are fitted. kind, lambdas: solver and penalties of the probes. seed: of the folds."""

    kind: str
    lambdas: Sequence[float]
    seed: int


@dataclass(frozen=True)
class Form:
    """One way of reading an input. rows: with a region axis of 1 where the whole frame is read."""

    name: str
    rows: Float[Tensor, "sample step region column"]


def read_inputs(
    samples: ProbeSamples,
    inputs: Mapping[str, InputFeatures],
    kind: str,
    lambdas: Sequence[float],
    seed: int = 0,
) -> dict[str, dict[str, InputReading]]:
    """By target and input (and `x0_latent`): what can be read of every target that has to beat inputs.

    samples: those the probes are fitted to. kind, lambdas: solver and penalties of the probes (`logistic` and `newton`
    have the same optimum, and get the same fits here). seed: of the folds. With several processes every process calls
    this, each does a part of the steps, and all get the same result.
    """
    recipe = Recipe(kind, lambdas, seed)
    places = tuple(dict.fromkeys(cell.place for cell in samples.cells))
    steps = len({cell.step for cell in samples.cells})
    found: dict[str, dict[str, InputReading]] = {}
    for target in readable_targets(samples.targets, samples.regions):
        names = [name for name in (*MUST_BEAT[target.role], X0) if name in inputs] if target.role in MUST_BEAT else []
        local = target.role == "memory"
        for name in names:
            read = [
                _read(samples, target, list(forms(inputs[name], target, place if local else None)), recipe)
                for place in (places if local else places[:1])
            ]
            joined = {field: np.stack([part[field] for part in read], axis=1) for field in read[0]}
            found.setdefault(target.name, {})[name] = InputReading(
                **{field: _spread_out(value, steps, len(places)) for field, value in joined.items()}
            )
    return found


def forms(source: InputFeatures, target: Target, place: str | None) -> Iterator[Form]:
    """The ways in which `target` may be read from an input.

    place: for a memory target, where the probe reads: then the input is read in the same regions and latent frame only.
    None: wherever it serves best.
    """
    areas = {"region": source.region, "whole": source.whole}
    if place is not None or target.form == "region":
        areas.pop("whole" if source.region is not None else "region")
    for area, values in areas.items():
        if values is None:
            continue
        if place is not None and place.isdigit():
            values = values[:, :, [int(place)]]
        if place is not None and place.startswith("r"):  # a coarse cell, by row and column
            across = round(values.shape[3] ** 0.5)
            row, column = map(int, place[1:].split("c"))
            values = values[:, :, :, [row * across + column]]
        times = {"mean": values.mean(dim=2), "frames": rearrange(values, "n s f p c -> n s p (f c)")}
        for time, rows in times.items():
            if time == "frames" and values.shape[2] == 1:
                continue
            yield Form(f"{area}, {time}", rows.flatten(2)[:, :, None] if area == "whole" else rows)


def input_samples(samples: ProbeSamples, source: InputFeatures, target: str, cell: Cell, form: str) -> ProbeSamples:
    """The same samples with one cell, an input in one of its forms at the step of `cell`, for analyses that refit."""
    kind = next(t for t in readable_targets(samples.targets, samples.regions) if t.name == target)
    step = sorted({c.step for c in samples.cells}).index(cell.step)
    place = cell.place if kind.role == "memory" else None
    rows = next(one.rows for one in forms(source, kind, place) if one.name == form)
    at = min(step, rows.shape[1] - 1)  # one entry serves every step
    return replace(samples, features=rows[:, [at]], cells=(cell,))


def _read(samples: ProbeSamples, target: Target, tried: list[Form], recipe: Recipe) -> dict[str, np.ndarray]:
    """Fields of an `InputReading` with the step axis first and no place axis."""
    steps = tried[0].rows.shape[1]
    scores = torch.stack([_by_steps(_cross_validate, samples, target, form, recipe)[0] for form in tried])
    kept = scores.argmax(dim=0)  # the first of equals
    names = ("penalty", "columns", "projected", "validation", "test")
    values: dict[str, list] = {name: [None] * steps for name in names}
    for i, form in enumerate(tried):
        at = torch.nonzero(kept == i)[:, 0]
        if len(at):
            part = replace(form, rows=form.rows[:, at])
            fitted = _by_steps(_fit_and_predict, samples, target, part, recipe)
            for name, tensor in zip(values, fitted, strict=True):
                for place, value in zip(at.tolist(), tensor.numpy(), strict=True):
                    values[name][place] = value
    return {
        "form": np.array([tried[i].name for i in kept.tolist()]),
        "accuracy": scores.amax(dim=0).numpy(),
        **{name: np.stack(value) for name, value in values.items()},
    }


def _by_steps(
    work: Callable[[ProbeSamples, Target, Tensor, Recipe], tuple[Tensor, ...]],
    samples: ProbeSamples,
    target: Target,
    form: Form,
    recipe: Recipe,
) -> tuple[Tensor, ...]:
    """`work` on a few steps at a time, the steps divided between processes."""
    fitted = replace(target, form="problem") if form.rows.shape[2] == 1 else target  # no regions to compete
    each = form.rows[:, 0].numel()

    def solve(part: slice) -> tuple[Tensor, ...]:
        size = max(1, NUMBERS // each)
        slices = [slice(start, min(start + size, part.stop)) for start in range(part.start, part.stop, size)]
        parts = [work(samples, fitted, form.rows[:, one], recipe) for one in slices]
        return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))

    return shared(solve, form.rows.shape[1])


def _cross_validate(
    samples: ProbeSamples,
    target: Target,
    rows: Float[Tensor, "sample step region column"],
    recipe: Recipe,
) -> tuple[Float[Tensor, " step"]]:
    """Accuracy at the best penalty, every sample of train and validation predicted without its problem's fold."""
    keep = torch.from_numpy(samples.split != "test") & _carries(samples, target)
    x, labels = _prepared(samples, target, rows)[0][:, keep], samples.labels[target.name][keep]
    folds = torch.from_numpy(problem_folds(samples.keys[keep.numpy()], recipe.seed))
    right = torch.zeros(len(x), len(recipe.lambdas), dtype=torch.float64)
    for fold in folds.unique():
        own = folds == fold
        weight, bias = _fit(x[:, ~own], labels[~own], target, recipe)
        right += _hits(x[:, own], labels[own], target, weight, bias).sum(dim=2)
    return (right.amax(dim=1) / len(labels),)


def _fit_and_predict(
    samples: ProbeSamples,
    target: Target,
    rows: Float[Tensor, "sample step region column"],
    recipe: Recipe,
) -> tuple[Tensor, ...]:
    """Penalty, columns, projected columns, and the labels given to validation and test samples, of every step."""
    x, columns = _prepared(samples, target, rows)
    train, validation, test = (torch.from_numpy(samples.split == split) for split in ("train", "validation", "test"))
    labels = samples.labels[target.name]
    if recipe.kind == "ridge":
        keys, known = samples.keys[train.numpy()], {target.name: labels[train]}
        chosen = fit_ridge(x[:, train], known, keys, [target], recipe.lambdas, recipe.seed)[target.name]
    else:
        weight, bias = _fit(x[:, train], labels[train], target, recipe)
        chosen = validated(x[:, validation], labels[validation], target.form, weight, bias, recipe.lambdas)
    values = classes_last(affine(design(x, target.form), chosen.weights, chosen.biases), target.form)
    said = values.argmax(dim=-1)
    sizes = torch.tensor([columns, x.shape[-1]]).expand(len(x), 2)
    return chosen.lambdas, sizes[:, 0], sizes[:, 1], said[:, validation], said[:, test]


def _prepared(
    samples: ProbeSamples, target: Target, rows: Float[Tensor, "sample step region column"]
) -> tuple[Float[Tensor, "step sample _region axis"], int]:
    """Standardised by the training samples, steps first; and how many columns there were before a projection.

    More columns than training samples of the target are brought down to as many, their largest principal axes.
    """
    train = torch.from_numpy(samples.split == "train")
    x = standardise(rows, *spread(rows[train]))
    if target.form == "problem":
        x = x.flatten(2)[:, :, None]
    own = train & _carries(samples, target)
    columns, most = x.shape[-1], int(own.sum())
    if columns > most:
        axes = principal_axes(x[:, own].flatten(1, 2))
        basis = axes.basis[..., -most:]  # largest variance last
        x = ((x.flatten(1, 2) - axes.mean[:, None]) @ basis).unflatten(1, x.shape[1:3])
    return x, columns


def _carries(samples: ProbeSamples, target: Target) -> Bool[Tensor, " sample"]:
    labels = samples.labels[target.name]
    return (labels if labels.ndim == 1 else labels.amin(dim=1)) >= 0


def _fit(
    x: Float[Tensor, "step sample region column"],
    labels: Int[Tensor, " sample *region"],
    target: Target,
    recipe: Recipe,
) -> tuple[Float[Tensor, "step width setting out"], Float[Tensor, "step setting out"]]:
    """Weights and biases at every penalty."""
    if recipe.kind != "ridge":
        found = fit_newton(x, labels, target, recipe.lambdas, gap=GAP)
        return found.weight, found.bias
    keys = np.zeros(len(labels))  # a single penalty needs no folds
    fits = [fit_ridge(x, {target.name: labels}, keys, [target], [value])[target.name] for value in recipe.lambdas]
    return torch.stack([f.weights for f in fits], dim=2), torch.stack([f.biases for f in fits], dim=1)


def _hits(
    x: Tensor, labels: Tensor, target: Target, weight: Tensor, bias: Tensor
) -> Float[Tensor, "step setting sample"]:
    """1 where the fit of each penalty is right; the mean over regions where labels have them."""
    said = classes_last(affine(design(x, target.form), weight, bias), target.form).argmax(dim=-1).movedim(-1, 1)
    right = (said == labels).double()
    return right.mean(dim=-1) if labels.ndim == 2 else right


def _spread_out(values: np.ndarray, steps: int, places: int) -> np.ndarray:
    """To every step and place, where it is the same for all of them."""
    shape = (steps, places, *values.shape[2:])
    return np.broadcast_to(values, shape)
