"""Input baselines: linear probes on what the model is given, before the first block of the transformer runs.

A layer that decodes the answer is a finding only if the inputs do not decode it as well. Probes on inputs therefore get
the same samples, penalties and solver as probes on layers. Each input is tried in several forms:

* `region`, `token` or `whole`: the regions that probes on layers read; with token pooling, all tokens of the frame
  concatenated, where these are at most COLUMNS values; or all coarse cells of the frame (`pooling.whole_frame`)
  concatenated. With `whole`, every candidate has weights of its own for all coarse cells.
* `mean` or `frames`: the mean over latent frames, or all latent frames concatenated.

One form is kept for each target, input and step: the one with the highest accuracy in cross-validation over the
problems of train and validation. Test samples are not used for this choice. The kept form is then fitted as a probe is:
on train, with the penalty chosen on validation (`ridge`: by folds inside train).

The latents of x0-hat are read in the same way. They are not an input and are compared separately (`p_x0`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cosprobe.activations import COLUMNS, InputFeatures, ProbeSamples, StoreSettings
from cosprobe.cache import Saved, cached
from cosprobe.cells import EMBED, FIRST_FRAME, INPUTS, NOISE, X0, X_T, Cell, Place
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
from cosprobe.runtime import return_freed_memory
from cosprobe.tasks import Role, Target, readable_targets

LOCAL = (NOISE, FIRST_FRAME, EMBED, X_T)  # inputs that have frames and regions
# The inputs that a target is compared with, by role of the target. Perception targets are visible in the input by
# definition, and nuisance and control targets are not findings: these roles are compared with chance only.
MUST_BEAT = {Role.ANSWER: INPUTS, Role.MODEL_ANSWER: INPUTS, Role.MEMORY: LOCAL}
GAP = 1e-4  # a fit ends at this relative gap of the objective
NUMERIC = ("accuracy", "penalty", "columns", "projected", "validation", "test")  # fields of `InputReading`
FIELDS = ("form", *NUMERIC)
NUMBERS = 2**24  # feature values processed at a time: 64 MB in fp32
LARGE = NUMBERS // 4  # values of a step from which on freed memory is returned, which takes time


@dataclass(frozen=True)
class Recipe:
    """How probes on inputs are fitted. kind, penalties: as for probes on layers. seed: seed of the folds."""

    kind: str
    penalties: Sequence[float]
    seed: int


@dataclass(frozen=True)
class Form:
    """One form of an input. rows: its features; the region axis has size 1 where the whole frame is read."""

    name: str
    rows: Float[Tensor, "sample step region column"]


def read_inputs(
    samples: ProbeSamples,
    inputs: Mapping[str, InputFeatures],
    kind: str,
    penalties: Sequence[float],
    seed: int = 0,
) -> dict[str, dict[str, InputReading]]:
    """Fits probes on inputs (and on `x0_latent`) for every target that is compared with inputs.

    samples: the samples that the probes on layers are fitted to.
    inputs: features of the inputs, by name.
    Memory targets are compared with inputs that are read where the probe reads. Where that is a single token, any part
    of the input may be read instead, which is harder to beat.
    kind, penalties: solver and penalties of the probes. `logistic` and `newton` have the same optimum, so both use
    Newton's method here.
    seed: seed of the folds.
    Returns the readings by name of the target, then by name of the input. With several processes, every process has to
    call this function; each fits a part of the steps, and all return the same result.
    """
    recipe = Recipe(kind, penalties, seed)
    positions = tuple(dict.fromkeys(cell.position for cell in samples.cells))
    steps = len({cell.step for cell in samples.cells})
    targets = [t for t in readable_targets(samples.targets, samples.regions) if t.role in MUST_BEAT]
    needed = {t.name: [name for name in (*MUST_BEAT[t.role], X0) if name in inputs] for t in targets}
    found: dict[str, dict[str, InputReading]] = {target.name: {} for target in targets}
    for name, source in inputs.items():
        wanted = []
        for target in (t for t in targets if name in needed[t.name]):
            local = target.role is Role.MEMORY and not Place.of(positions[0]).is_token
            wanted += [(target, position) for position in (positions if local else (None,))]
        if not wanted:
            continue
        solved = shared(partial(_read_steps, samples, source, wanted, recipe), source.whole.shape[1])
        for target in (t for t in targets if name in needed[t.name]):
            read = [i for i, (of, _) in enumerate(wanted) if of is target]
            values = {field: np.stack([solved[f"{i}/{field}"].numpy() for i in read], axis=1) for field in FIELDS}
            names = [[one.name for one in forms(source.read(rows=0), *wanted[i])] for i in read]
            values["form"] = np.stack([np.array(names[n])[values["form"][:, n]] for n in range(len(read))], axis=1)
            found[target.name][name] = InputReading(
                **{field: _spread_out(value, steps, len(positions)) for field, value in values.items()}
            )
    return {target: {name: found[target][name] for name in names} for target, names in needed.items() if names}


def read_inputs_once(
    folder: Path,
    samples: ProbeSamples,
    inputs: Mapping[str, InputFeatures],
    settings: StoreSettings,
    kind: str,
    penalties: Sequence[float],
    seed: int = 0,
) -> dict[str, dict[str, InputReading]]:
    """What `read_inputs` returns, kept in a file in `folder` for later calls.

    settings: of the activations; they determine `samples` and `inputs`.
    """
    key = {
        "activations": settings.to_json(),
        "targets": [asdict(target) for target in samples.targets],
        "solver": kind if kind == "ridge" else "newton",
        "penalties": list(penalties),
        "seed": seed,
    }
    if samples.fold is not None:
        key["splits"] = samples.split.tolist()
    arrays, notes = cached(folder, "inputs", key, lambda: _packed(read_inputs(samples, inputs, kind, penalties, seed)))
    found: dict[str, dict[str, InputReading]] = {}
    for number, (target, name, form) in enumerate(notes["readings"]):
        values = {field: arrays[f"{number}.{field}"] for field in NUMERIC}
        found.setdefault(target, {})[name] = InputReading(form=np.array(form), **values)
    return found


def _packed(readings: Mapping[str, Mapping[str, InputReading]]) -> Saved:
    """Readings as arrays, and the names and forms of all of them."""
    each = [(target, name, one) for target, of_target in readings.items() for name, one in of_target.items()]
    arrays = {f"{i}.{field}": getattr(one, field) for i, (_, _, one) in enumerate(each) for field in NUMERIC}
    return arrays, {"readings": [[target, name, one.form.tolist()] for target, name, one in each]}


def forms(source: InputFeatures, target: Target, position: str | None) -> Iterator[Form]:
    """The forms in which `target` may be read from an input, which is read from the disk if it is not in memory.

    position: for a memory target, the position that the probe on a layer reads. The input is then read at that position
    only (the same latent frame, coarse cell or regions). None: any part of the input may be read.
    """
    source = source.read()
    areas = {"region": source.region, "token": source.token, "whole": source.whole}
    if source.token is not None and math.prod(source.token.shape[3:]) > COLUMNS:
        areas.pop("token")
    if position is not None or target.form == "region":
        areas.pop("whole" if source.region is not None else "region")
    for area, values in areas.items():
        if not isinstance(values, Tensor):
            continue
        if position is not None and position.isdigit():
            values = values[:, :, [int(position)]]
        if position is not None and position.startswith("r"):  # a coarse cell, by row and column
            across = round(values.shape[3] ** 0.5)
            row, column = map(int, position[1:].split("c"))
            values = values[:, :, :, [row * across + column]]
        for time in ("mean", "frames") if values.shape[2] > 1 else ("mean",):
            rows = values.mean(dim=2) if time == "mean" else rearrange(values, "n s f p c -> n s p (f c)")
            yield Form(f"{area}, {time}", rows if area == "region" else rows.flatten(2)[:, :, None])


def input_samples(samples: ProbeSamples, source: InputFeatures, target: str, cell: Cell, form: str) -> ProbeSamples:
    """Copies of the samples whose only features are one input, in one form, at the step of `cell`. For refits."""
    kind = next(t for t in readable_targets(samples.targets, samples.regions) if t.name == target)
    step = sorted({c.step for c in samples.cells}).index(cell.step)
    local = kind.role is Role.MEMORY and not Place.of(cell.position).is_token
    position = cell.position if local else None
    at = min(step, source.whole.shape[1] - 1)  # some inputs have one entry for all steps
    of_step = source.read(slice(at, at + 1))
    rows = next(one.rows for one in forms(of_step, kind, position) if one.name == form)
    return replace(samples, features=rows, cells=(cell,))


def _read_steps(
    samples: ProbeSamples,
    source: InputFeatures,
    wanted: Sequence[tuple[Target, str | None]],
    recipe: Recipe,
    part: slice,
) -> dict[str, Tensor]:
    """Reads an input at the steps of `part`, a few steps at a time, for all targets and positions `wanted`.

    Returns the fields of an `InputReading` with the step axis first and without the position axis, as NUMBER/FIELD,
    with the number of the target and position. A form is given by its number among `forms`.
    """
    tensors = (source.whole, source.region, source.token)
    each = sum(len(tensor) * math.prod(tensor.shape[2:]) for tensor in tensors if tensor is not None)
    size = max(1, NUMBERS // each)
    found: list[dict[str, Tensor]] = []
    if each > LARGE:
        return_freed_memory()
    for start in range(part.start, part.stop, size):
        few, values = source.read(slice(start, min(start + size, part.stop))), dict[str, Tensor]()
        for i, (target, position) in enumerate(wanted):
            read = _read(samples, target, partial(forms, few, target, position), recipe)
            values |= {f"{i}/{field}": torch.from_numpy(value) for field, value in read.items()}
        found.append(values)
        return_freed_memory()
    return {name: torch.cat([one[name] for one in found]) for name in found[0]}


def _read(
    samples: ProbeSamples, target: Target, tried: Callable[[], Iterator[Form]], recipe: Recipe
) -> dict[str, np.ndarray]:
    """Fields of an `InputReading`, with the step axis first and without the position axis; forms as numbers.

    tried: returns the forms. They are made twice, one after the other, so that one of them is in memory at a time.
    """
    scores = torch.stack([_by_steps(_cross_validate, samples, target, form, recipe)["accuracy"] for form in tried()])
    steps = scores.shape[1]
    kept = scores.argmax(dim=0)  # on a tie the first
    fields = ("penalty", "columns", "projected", "validation", "test")
    values: dict[str, list] = {field: [None] * steps for field in fields}
    for i, form in enumerate(tried()):
        at = torch.nonzero(kept == i)[:, 0]
        if len(at):
            part = form if len(at) == steps else replace(form, rows=form.rows[:, at])  # no copy of all steps
            fitted = _by_steps(_fit_and_predict, samples, target, part, recipe)
            for field in fields:
                for step, value in zip(at.tolist(), fitted[field].numpy(), strict=True):
                    values[field][step] = value
    return {
        "form": kept.numpy(),
        "accuracy": scores.amax(dim=0).numpy(),
        **{name: np.stack(value) for name, value in values.items()},
    }


def _by_steps(
    work: Callable[[ProbeSamples, Target, Tensor, Recipe], dict[str, Tensor]],
    samples: ProbeSamples,
    target: Target,
    form: Form,
    recipe: Recipe,
) -> dict[str, Tensor]:
    """Applies `work` to a few steps at a time."""
    fitted = replace(target, form="problem") if form.rows.shape[2] == 1 else target  # a single region
    size = max(1, NUMBERS // form.rows[:, 0].numel())
    if form.rows[:, 0].numel() > LARGE:  # what the last form has left behind may have no place for this one
        return_freed_memory()
    parts = [work(samples, fitted, rows, recipe) for rows in form.rows.split(size, dim=1)]
    return {name: torch.cat([one[name] for one in parts]) for name in parts[0]}


def _cross_validate(
    samples: ProbeSamples,
    target: Target,
    rows: Float[Tensor, "sample step region column"],
    recipe: Recipe,
) -> dict[str, Tensor]:
    """Cross-validated accuracy [step] at the best penalty, over the train and validation samples. Folds hold whole
    problems."""
    keep = torch.from_numpy(samples.split != "test") & _carries(samples, target)
    x, labels = _prepared(samples, target, rows, keep)[0], samples.labels[target.name][keep]
    folds = torch.from_numpy(problem_folds(samples.keys[keep.numpy()], recipe.seed))
    right = torch.zeros(len(x), len(recipe.penalties), dtype=torch.float64)
    for fold in folds.unique():
        held_out = folds == fold
        weight, bias = _fit(x[:, ~held_out], labels[~held_out], target, recipe)
        right += _hits(x[:, held_out], labels[held_out], target, weight, bias).sum(dim=2)
    return {"accuracy": right.amax(dim=1) / len(labels)}


def _fit_and_predict(
    samples: ProbeSamples,
    target: Target,
    rows: Float[Tensor, "sample step region column"],
    recipe: Recipe,
) -> dict[str, Tensor]:
    """For every step: penalty, columns, projected columns, and the labels predicted for validation and test samples."""
    x, columns = _prepared(samples, target, rows, slice(None))
    train, validation, test = (torch.from_numpy(samples.split == split) for split in ("train", "validation", "test"))
    labels = samples.labels[target.name]
    if recipe.kind == "ridge":
        keys, known = samples.keys[train.numpy()], {target.name: labels[train]}
        chosen = fit_ridge(x[:, train], known, keys, [target], recipe.penalties, recipe.seed)[target.name]
    else:
        weight, bias = _fit(x[:, train], labels[train], target, recipe)
        chosen = validated(x[:, validation], labels[validation], target.form, weight, bias, recipe.penalties)
    values = classes_last(affine(design(x, target.form), chosen.weights, chosen.biases), target.form)
    predicted = values.argmax(dim=-1)
    sizes = torch.tensor([columns, x.shape[-1]]).expand(len(x), 2)
    return {
        "penalty": chosen.penalties,
        "columns": sizes[:, 0],
        "projected": sizes[:, 1],
        "validation": predicted[:, validation],
        "test": predicted[:, test],
    }


def _prepared(
    samples: ProbeSamples,
    target: Target,
    rows: Float[Tensor, "sample step region column"],
    keep: Bool[Tensor, " sample"] | slice,
) -> tuple[Float[Tensor, "step _kept _region axis"], int]:
    """Features of the samples `keep`, standardised by the training samples, steps first; and the number of columns
    before any projection.

    Where there are more columns than training samples of the target, features are projected onto as many principal axes
    as there are such samples (those with the largest variance).
    """
    train = torch.from_numpy(samples.split == "train")
    x = standardise(rows[keep], *spread(rows[train]))
    if target.form == "problem":
        x = x.flatten(2)[:, :, None]
    used = train & _carries(samples, target)
    columns, most = x.shape[-1], int(used.sum())
    if columns > most:
        axes = principal_axes(x[:, used[keep]].flatten(1, 2))
        basis = axes.basis[..., -most:]  # largest variance last
        x = ((x.flatten(1, 2) - axes.mean[:, None]) @ basis).unflatten(1, x.shape[1:3])
    return x, columns


def _carries(samples: ProbeSamples, target: Target) -> Bool[Tensor, " sample"]:
    """True where a sample has a label of the target."""
    labels = samples.labels[target.name]
    return (labels if labels.ndim == 1 else labels.amin(dim=1)) >= 0


def _fit(
    x: Float[Tensor, "step sample region column"],
    labels: Int[Tensor, " sample *region"],
    target: Target,
    recipe: Recipe,
) -> tuple[Float[Tensor, "step width penalty out"], Float[Tensor, "step penalty out"]]:
    """Weights and biases for every penalty."""
    if recipe.kind != "ridge":
        found = fit_newton(x, labels, target, recipe.penalties, gap=GAP)
        return found.weight, found.bias
    keys = np.zeros(len(labels))  # a single penalty needs no folds
    fits = [fit_ridge(x, {target.name: labels}, keys, [target], [value])[target.name] for value in recipe.penalties]
    return torch.stack([f.weights for f in fits], dim=2), torch.stack([f.biases for f in fits], dim=1)


def _hits(
    x: Tensor, labels: Tensor, target: Target, weight: Tensor, bias: Tensor
) -> Float[Tensor, "step penalty sample"]:
    """1 where the fit with a penalty is right, 0 where it is wrong; the mean over regions for region labels."""
    predicted = classes_last(affine(design(x, target.form), weight, bias), target.form).argmax(dim=-1).movedim(-1, 1)
    right = (predicted == labels).double()
    return right.mean(dim=-1) if labels.ndim == 2 else right


def _spread_out(values: np.ndarray, steps: int, positions: int) -> np.ndarray:
    """Repeats values along the step or position axis where that axis has size 1."""
    shape = (steps, positions, *values.shape[2:])
    return np.broadcast_to(values, shape)
