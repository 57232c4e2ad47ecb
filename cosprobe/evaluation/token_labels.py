"""Probes of a label that every token has for itself, such as whether it lies on the path of the solution.

The targets of a task have one label per problem, or one per region. Here the label differs between the tokens of a
frame, so every token position has labels of its own. Each probe reads one token at one layer and step. It is compared
with the more frequent label of its position and with inputs of the same token, fitted to the same samples with the same
penalties and solver. All cells are tested together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cosprobe.activations import InputFeatures, ProbeSamples
from cosprobe.cells import EMBED, FIRST_FRAME, NOISE, SPLIT_ORDER, X_T, Place
from cosprobe.errors import InputError
from cosprobe.evaluation.intervals import grounded, share_interval
from cosprobe.evaluation.significance import max_t_permutation, weakest_pair
from cosprobe.evaluation.variables import CEILING
from cosprobe.models import COND
from cosprobe.probes import affine, blocks, classes_last, design, fit_newton, spread, standardise, validated
from cosprobe.tasks import Problem, Role, Target, Task, has_path, on_path

GUESS = "guess"  # the more frequent label of the position, or a coin where that is right more often
OF_TOKEN = (NOISE, FIRST_FRAME, EMBED, X_T)  # inputs of a token
TARGET = Target("on path", 2, "problem", Role.MEMORY, ())
GAP = 1e-4  # a fit ends at this relative gap of the objective
MEANING = {
    "accuracy": "test accuracy of the probe of one token", "lower": "lower end of its 95 % interval",
    "upper": "upper end of its 95 % interval", "validation_accuracy": "validation accuracy of the probe",
    "validation_gain": "validation_accuracy minus that of the usual label of the position",
    "reference": "test accuracy of the input with the best validation accuracy, or of the guess if that is higher",
    "reference_source": "name of the reference", "skill": "(accuracy - reference) / (1 - reference)",
    "p_evidence": "the largest of p_permutation and p_inputs",
    "p_permutation": "p of the test that predictions go along with labels, corrected for all cells",
    "p_inputs": "p of the test that accuracy is above the guess and above every input, corrected for all cells",
    "baseline_accuracy": "test accuracy of the guess, and of probes on inputs of the same token",
    "share": "share of test samples in which the token has the label",
}  # fmt: skip


@dataclass(frozen=True)
class _Read:
    """What probes predict: 0 or 1, for each cell."""

    validation: Int[np.ndarray, "cell validation"]
    test: Int[np.ndarray, "cell test"]


def read_token_labels(
    samples: ProbeSamples,
    inputs: Mapping[str, InputFeatures],
    labels: Bool[np.ndarray, "sample row column"],
    penalties: Sequence[float],
    draws: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """Fits a probe for every token, layer and step, and compares it with inputs of the same token.

    samples: with token pooling. inputs: of the same samples. labels: of every token position, the same in all latent
    frames. penalties: the one with the best validation accuracy is kept, for probes and for inputs. draws, seed: of the
    tests, as in `build_grid`.

    Probes are logistic, fitted by Newton's method, whatever the kind of the other probes is. Inputs of a token are the
    noise, the noisy latent x_t and the input of block 0 in the same patch and latent frame, and the first frame in the
    same patch (its condition in all latent frames, as the image is in one of them only). With classifier-free guidance
    only the branch of the prompt is read. A position whose labels are all the same in train, validation or test has no
    probe: its values are NaN.

    Returns a dataset with the axes step, layer and position, the variables of MEANING, and the coordinates frame, row
    and column. Evidence is p_evidence <= 0.05: better than chance, the guess and every input, after correction for all
    cells. With too few problems, p is NaN.
    Raises InputError for samples without token pooling, or labels that do not fit.
    """
    every = [(i, cell, Place.of(cell.position)) for i, cell in enumerate(samples.cells) if cell.branch == COND]
    if not every or not all(place.is_token for _, _, place in every):
        raise InputError("probe.pooling: expected token, where every position is a single token")
    rows, columns = (1 + max(getattr(place, axis) for _, _, place in every) for axis in ("row", "column"))
    if labels.shape != (len(samples), rows, columns):
        raise InputError(f"labels{list(labels.shape)}: expected {[len(samples), rows, columns]}")
    truth = labels.reshape(len(labels), -1)
    parts = {split: np.asarray(samples.split) == split for split in ("train", "validation", "test")}
    varied = np.all([truth[part].any(axis=0) & ~truth[part].all(axis=0) for part in parts.values()], axis=0)
    steps, layers = (sorted({getattr(cell, axis) for _, cell, _ in every}) for axis in ("step", "layer"))
    positions = list(dict.fromkeys(cell.position for _, cell, _ in every))
    places = [Place.of(name) for name in positions]
    kept = [(i, cell, place) for i, cell, place in every if varied[place.row * columns + place.column]]
    shape = len(steps), len(layers), len(positions)
    at = tuple(
        np.array([axis.index(getattr(cell, name)) for _, cell, _ in kept], dtype=int)
        for axis, name in ((steps, "step"), (layers, "layer"), (positions, "position"))
    )
    of_cell = np.array([place.row * columns + place.column for _, _, place in kept], dtype=int)
    numbers = np.array([i for i, _, _ in kept], dtype=int)
    few = blocks(len(kept), len(samples) * samples.features.shape[-1])
    read = _joined(
        [_fit_and_predict(samples.features[:, numbers[one]], truth, of_cell[one], parts, penalties) for one in few],
        parts,
    )
    keys = np.asarray(samples.keys)[parts["test"]]
    wanted = {split: truth[parts[split]].astype(int) for split in ("validation", "test")}
    right = (read.test == wanted["test"][:, of_cell].T).astype(float)
    on_validation = (read.validation == wanted["validation"][:, of_cell].T).mean(axis=1)

    usual = truth[parts["train"]].mean(axis=0) > 0.5  # the more frequent training label of every token
    gain = on_validation - (truth[parts["validation"]] == usual).mean(axis=0)[of_cell]
    names, tested, validation = [GUESS], [_guess(usual, truth[parts["test"]])[of_cell]], [np.full(len(kept), -1.0)]
    for name in (name for name in OF_TOKEN if name in inputs):
        of_test, of_validation = _read_input(inputs[name], name, truth, kept, steps, columns, varied, parts, penalties)
        names, tested, validation = [*names, name], [*tested, of_test], [*validation, of_validation]
    others = np.stack(tested)  # baseline, cell, sample: 1 where right
    accuracy, baseline = right.mean(axis=1), others.mean(axis=2)
    best = np.argmax(np.stack(validation), axis=0)
    below = np.take_along_axis(baseline, best[None], axis=0)[0] < baseline[0]
    best = np.where(below, 0, best)
    reference = np.take_along_axis(baseline, best[None], axis=0)[0]
    lower, upper = share_interval(right, keys)
    p = np.full((2, len(kept)), np.nan)
    if len(kept) and grounded(keys):
        p[0] = max_t_permutation(read.test, wanted["test"], keys, draws, seed, of_cell).p
        p[1] = weakest_pair(np.moveaxis(right[None] - others, 0, 1), keys, draws, seed).p
    room = np.where(reference > CEILING, np.nan, 1 - reference)
    values = {
        "accuracy": accuracy, "lower": lower, "upper": upper, "validation_accuracy": on_validation,
        "validation_gain": gain,
        "reference": reference, "skill": (accuracy - reference) / room, "p_permutation": p[0], "p_inputs": p[1],
        "p_evidence": p.max(axis=0),
    }  # fmt: skip
    found = {name: _on_axes(value, shape, at) for name, value in values.items()}
    sources = np.full(shape, "", dtype=object)
    sources[at] = np.array(names)[best]
    variables: dict[str, tuple] = {name: (("step", "layer", "position"), value) for name, value in found.items()}
    variables["reference_source"] = (("step", "layer", "position"), sources.astype(str))
    spread_out = np.stack([_on_axes(value, shape, at) for value in baseline])
    variables["baseline_accuracy"] = (("baseline", "step", "layer", "position"), spread_out)
    share = wanted["test"].mean(axis=0)
    variables["share"] = ("position", np.array([share[p.row * columns + p.column] for p in places]))
    dataset = xr.Dataset(
        {name: (*value, {"long_name": MEANING[name]}) for name, value in variables.items()},
        {"step": steps, "layer": layers, "position": positions, "baseline": names}
        | {axis: ("position", [getattr(p, axis) for p in places]) for axis in ("frame", "row", "column")},
        {f"n_{split}": int(part.sum()) for split, part in parts.items()},
    )
    return dataset.assign_attrs(n_test_problems=len(np.unique(keys)), target=TARGET.name)


def _on_axes(values: Float[np.ndarray, " cell"], shape: tuple[int, ...], at: tuple) -> np.ndarray:
    """Values of cells on the axes step, layer and position; NaN where there is no cell."""
    found = np.full(shape, np.nan)
    found[at] = values
    return found


def _guess(usual: Bool[np.ndarray, " token"], truth: Bool[np.ndarray, "test token"]) -> Float[np.ndarray, "token test"]:
    """How right the guess is on every test sample: the usual label, or 1/2 where that is better."""
    right = (truth == usual).astype(float).T
    return np.where(right.mean(axis=1, keepdims=True) < 0.5, 0.5, right)


def _read_input(
    source: InputFeatures,
    name: str,
    truth: Bool[np.ndarray, "sample token"],
    cells: Sequence[tuple],
    steps: Sequence[int],
    columns: int,
    varied: Bool[np.ndarray, " token"],
    parts: Mapping[str, np.ndarray],
    penalties: Sequence[float],
) -> tuple[Float[np.ndarray, "cell test"], Float[np.ndarray, " cell"]]:
    """Where an input of the token of every cell is right on test, and its validation accuracy.

    An input is fitted once per step, latent frame and token, and then taken for all layers.
    """
    if source.token is None:
        raise InputError(f"input {name}: expected its tokens, of samples with token pooling")
    token = np.flatnonzero(varied)
    times, frames = source.token.shape[1], 1 if name == FIRST_FRAME else source.token.shape[2]
    of_row, found = np.tile(token, frames), []
    for step in range(times if len(token) else 0):
        tokens = source.token[:, step][:, :, torch.from_numpy(token)]
        if name == FIRST_FRAME:
            tokens = tokens.movedim(1, 2).flatten(2)[:, None]  # the channels of all latent frames
        found.append(_fit_and_predict(tokens.flatten(1, 2)[:, :, None], truth, of_row, parts, penalties))
    read, of_row = _joined(found, parts), np.tile(of_row, times)
    right = (read.test == truth[parts["test"]][:, of_row].T).astype(float)
    validation = (read.validation == truth[parts["validation"]][:, of_row].T).mean(axis=1)
    rank = {int(one): i for i, one in enumerate(token)}
    at = np.array(
        [
            (min(steps.index(cell.step), times - 1) * frames + min(place.frame, frames - 1)) * len(token)
            + rank[place.row * columns + place.column]
            for _, cell, place in cells
        ],
        dtype=int,
    )
    return right[at], validation[at]


def _joined(found: Sequence[_Read], parts: Mapping[str, np.ndarray]) -> _Read:
    """The predictions of all cells."""
    none = _Read(*(np.zeros((0, int(parts[split].sum())), dtype=int) for split in ("validation", "test")))
    return _Read(*(np.concatenate([getattr(one, split) for one in (none, *found)]) for split in ("validation", "test")))


def _fit_and_predict(
    features: Float[Tensor, "sample cell 1 channel"],
    truth: Bool[np.ndarray, "sample token"],
    of_cell: Int[np.ndarray, " cell"],
    parts: Mapping[str, np.ndarray],
    penalties: Sequence[float],
) -> _Read:
    """Fits probes whose labels are those of the token of their cell, and predicts validation and test samples."""
    labels = torch.from_numpy(truth[:, of_cell].T.astype(np.int64))  # cell, sample
    train, validation, test = (torch.from_numpy(parts[split]) for split in ("train", "validation", "test"))
    x = standardise(features, *spread(features[train]))
    fit = fit_newton(x[:, train], labels[:, train], TARGET, penalties, gap=GAP)
    chosen = validated(x[:, validation], labels[:, validation], TARGET.form, fit.weight, fit.bias, penalties)
    values = classes_last(affine(design(x, TARGET.form), chosen.weights, chosen.biases), TARGET.form)
    predicted = values.argmax(dim=-1)
    return _Read(predicted[:, validation].numpy(), predicted[:, test].numpy())


def read_path(
    samples: ProbeSamples,
    inputs: Mapping[str, InputFeatures],
    task: Task,
    problems: Sequence[Problem],
    penalties: Sequence[float],
    seed: int = 0,
) -> xr.Dataset | None:
    """Which tokens know that they lie on the path of the solution? See `read_token_labels` and `tasks.on_path`.

    samples, inputs: of a run with token pooling. problems: of the samples, in the same order. Problems with several
    right answers have no single path and are left out, as are problems from disk. Returns None where a split has no
    problem with a path.
    """
    single = np.array([has_path(task, problem) for problem in problems], dtype=bool)
    left = samples.rows(np.flatnonzero(single))
    if not all((np.asarray(left.split) == split).any() for split in SPLIT_ORDER):
        return None
    rows, columns = (1 + max(getattr(Place.of(c.position), axis) for c in samples.cells) for axis in ("row", "column"))
    labels = [on_path(task, problem, rows, columns) for problem, one in zip(problems, single, strict=True) if one]
    of_left = {name: source.rows(np.flatnonzero(single)) for name, source in inputs.items()}
    return read_token_labels(left, of_left, np.stack(labels), penalties, seed=seed)
