"""Generalisation matrices: test accuracy of a probe that is trained at one cell and applied at another.

The probe of one cell is applied without refitting to the features of another cell, on the same problems (King and
Dehaene 2014, "Characterizing the dynamics of mental representations: the temporal generalization method";
`GeneralizingEstimator` of MNE-Python). If accuracy is high in the whole matrix, the cells share one representation of
the target. If it is high on the diagonal only, every cell decodes the target, but the representation changes from cell
to cell.

Features are standardised with the mean and standard deviation of the cell that the probe was trained at, not of the
cell it is applied to. A shift or another scale of the features therefore counts as a change of representation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cosprobe.activations import ProbeSamples
from cosprobe.cells import Cell
from cosprobe.errors import InputError
from cosprobe.evaluation.checks.refitting import (
    Estimate,
    Labelled,
    columns_of,
    estimate_share,
    join_rare,
    labelled,
    refit,
    right,
)
from cosprobe.probes import ProbeBank, affine, blocks, classes_last, design, spread, standardise
from cosprobe.tasks import Target

EVERYTHING = "all"  # first row of matrices with refitted probes: trained on all groups
TRAIN_PROBLEMS, TEST_PROBLEMS = 20, 8  # the least number of problems in a group
MOST_BINS = 3  # the largest number of groups of one difficulty

CHUNK = 2**26  # values standardised at a time, 256 MB in fp32


@dataclass(frozen=True)
class Matrix:
    """Test accuracy of probes, by what they were trained on (rows) and tested on (columns), with 95 % intervals.

    axis: `step` (sampler step index), `layer`, `branch`, `expert`, `seed` or the name of a difficulty.
    train, test: names of rows and columns.
    trained: number of training samples of each row. Fewer training samples also make a row less accurate.
    n: number of test samples of each column.
    converged: whether every refit met its tolerance (true for probes of the bank).
    """

    target: str
    axis: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    accuracy: Float[np.ndarray, "train test"]
    lower: Float[np.ndarray, "train test"]
    upper: Float[np.ndarray, "train test"]
    trained: Int[np.ndarray, " train"]
    n: Int[np.ndarray, " test"]
    converged: bool = True


@dataclass(frozen=True)
class _Frozen:
    """Probes in the order of rows, with the mean and standard deviation that features are standardised by."""

    mean: Float[Tensor, "train channel"]
    std: Float[Tensor, "train channel"]
    weight: Float[Tensor, "train width out"]
    bias: Float[Tensor, "train out"]


def matrices(
    samples: ProbeSamples,
    bank: ProbeBank,
    best: Mapping[str, Cell],
    experts: Mapping[int, str],
) -> list[Matrix]:
    """Computes all matrices for which there are enough samples, for every target of `best`.

    best: the best cell of each target, chosen on validation. experts: the transformer of each step.

    Axes:

    * `step`, `layer`, `branch`: probes of the bank at the cells that differ from the best cell in this axis only. There
      is no matrix for an axis with one entry.
    * `expert`: means over blocks of the step matrix. The steps of one expert form one block, diagonal included.
    * `seed`: trained on samples with one noise seed, tested on samples with another.
    * a difficulty: trained on problems with some values of it, tested on problems with others. Neighbouring values are
      merged until each group has 20 training and 8 test problems, with three groups at most.

    For seeds and difficulties the probe of the best cell is refitted in each group with the penalty of the bank. The
    first row `all` is trained on all groups. There is no matrix if there is only one group, or if a group has only one
    class of the target.
    Raises InputError for a target or cell that the bank or the samples do not hold, or a step without an expert.
    """
    found = []
    for name, cell in best.items():
        target = bank.target(name)
        bank.select([cell])
        columns_of(samples, [cell])
        found += list(_between_cells(samples, bank, target, cell, experts))
        found += list(_between_groups(samples, bank, target, cell))
    return found


def _between_cells(
    samples: ProbeSamples,
    bank: ProbeBank,
    target: Target,
    best: Cell,
    experts: Mapping[int, str],
) -> Iterator[Matrix]:
    """Matrices by step, layer, branch and expert, from the probes of the bank."""
    trained = len(labelled(samples, target, [best], "train"))
    for axis, cells in _lines(bank.cells, best).items():
        if len(cells) < 2:
            continue
        part = bank.select(cells)
        probes = _Frozen(part.mean, part.std, part.weights[target.name], part.biases[target.name])
        found = []
        for few in blocks(len(cells), math.prod(samples.features.shape) // len(samples.cells)):
            test = labelled(samples, target, cells[few], "test")
            found.append(_cross(probes, test, target))
        hits = np.concatenate(found, axis=1)
        names = tuple(str(getattr(cell, axis)) for cell in cells)
        yield _matrix(target, axis, names, estimate_share(hits, test.keys), trained, len(test))
        if axis != "step":
            continue
        if missing := [cell.step for cell in cells if cell.step not in experts]:
            raise InputError(f"experts: none given for step {missing[0]}; expected the transformer of every step kept")
        ran = [experts[cell.step] for cell in cells]
        names = tuple(dict.fromkeys(ran))
        if len(names) > 1:
            member = np.array([[one == name for one in ran] for name in names], dtype=np.float64)
            member /= member.sum(axis=1, keepdims=True)
            means = np.einsum("ei,fj,ijn->efn", member, member, hits, optimize=True)
            yield _matrix(target, "expert", names, estimate_share(means, test.keys), trained, len(test))


def _lines(cells: tuple[Cell, ...], best: Cell) -> dict[str, list[Cell]]:
    """The cells that differ from the best cell in step only, in layer only, or in branch only."""
    return {
        "step": sorted((c for c in cells if replace(c, step=best.step) == best), key=lambda c: c.step),
        "layer": sorted((c for c in cells if replace(c, layer=best.layer) == best), key=lambda c: c.layer),
        "branch": [c for c in cells if replace(c, branch=best.branch) == best],
    }


def _between_groups(samples: ProbeSamples, bank: ProbeBank, target: Target, best: Cell) -> Iterator[Matrix]:
    """Matrices by noise seed and by difficulty, from refitted probes."""
    penalty = bank.select([best]).penalties[target.name]
    train, test = (labelled(samples, target, [best], split) for split in ("train", "test"))
    for axis, (names, of_train, of_test) in _groups(samples, train, test).items():
        chosen = [np.isin(of_train, range(len(names))), *(of_train == group for group in range(len(names)))]
        rows = [train.take(keep) for keep in chosen]
        if len(names) < 2 or any(row.labels.unique().numel() < 2 for row in rows):
            continue
        stats = [spread(row.features) for row in rows]
        fits = [
            refit(standardise(row.features, *stat), row.labels, target, penalty)
            for row, stat in zip(rows, stats, strict=True)
        ]
        probes = _Frozen(
            torch.cat([mean for mean, _ in stats]),
            torch.cat([std for _, std in stats]),
            torch.cat([fit.weight for fit in fits]),
            torch.cat([fit.bias for fit in fits]),
        )
        hits = _cross(probes, test, target)[:, 0]
        columns = [estimate_share(hits[:, of_test == g], test.keys[of_test == g]) for g in range(len(names))]
        yield Matrix(
            target.name,
            axis,
            (EVERYTHING, *names),
            names,
            np.stack([column.value for column in columns], axis=1),
            np.stack([column.lower for column in columns], axis=1),
            np.stack([column.upper for column in columns], axis=1),
            np.array([len(row) for row in rows]),
            np.array([int((of_test == g).sum()) for g in range(len(names))]),
            all(bool(fit.converged.all()) for fit in fits),
        )


def _groups(
    samples: ProbeSamples, train: Labelled, test: Labelled
) -> dict[str, tuple[tuple[str, ...], Int[np.ndarray, " train"], Int[np.ndarray, " test"]]]:
    """For each axis the names of its groups, and the group index of every training and test sample; -1 for none."""
    found: dict[str, tuple[tuple[str, ...], np.ndarray, np.ndarray]] = {}
    if samples.replica is not None:  # noise seeds are not ordered, so they are not merged
        of = [np.asarray(samples.replica)[part.where] for part in (train, test)]
        enough = [
            value
            for value in np.unique(of[0])
            if len(np.unique(train.keys[of[0] == value])) >= TRAIN_PROBLEMS
            and len(np.unique(test.keys[of[1] == value])) >= TEST_PROBLEMS
        ]
        position = {int(value): group for group, value in enumerate(enough)}
        groups = [np.array([position.get(int(value), -1) for value in values]) for values in of]
        found["seed"] = (tuple(str(value) for value in enough), groups[0], groups[1])
    for name, column in samples.difficulty.items():
        of = [np.asarray(column)[part.where] for part in (train, test)]
        bins = join_rare([(of[0], train.keys, TRAIN_PROBLEMS), (of[1], test.keys, TEST_PROBLEMS)], MOST_BINS)
        found[name] = (bins.names, bins.index(of[0]), bins.index(of[1]))
    return found


def _cross(probes: _Frozen, test: Labelled, target: Target) -> Float[np.ndarray, "train cell sample"]:
    """1 where a probe is right on a sample at a cell of `test`, 0 where it is wrong.

    Standardisation is folded into the weights, so one matrix product computes all pairs. It runs in fp64, because the
    mean of raw features may be large compared to their standard deviation.
    """
    regions = test.features.shape[2] if target.form == "problem" else 1
    scale = torch.where(probes.std > 0, 1 / probes.std.double(), 0.0).repeat(1, regions)
    weight = probes.weight.double() * scale[..., None]
    bias = probes.bias.double() - torch.einsum("iw,iwo->io", probes.mean.double().repeat(1, regions), weight)
    weight, bias = weight.movedim(0, 1)[None], bias[None]  # probes take the place of the penalties of each cell
    each = test.features[:, 0].numel() + len(probes.mean) * test.labels.numel() * weight.shape[-1]
    size = max(1, CHUNK // (2 * each))
    values = []
    for start in range(0, test.features.shape[1], size):
        rows = design(test.features[:, start : start + size].transpose(0, 1).double(), target.form)
        cells = len(rows)
        scores = affine(rows, weight.expand(cells, -1, -1, -1), bias.expand(cells, -1, -1))
        last = classes_last(scores, target.form)  # axes: cell, sample, regions, probe, class
        values.append(last.movedim(-2, 1).flatten(0, 1))
    hits = np.concatenate([right(value, test.labels) for value in values])
    return np.moveaxis(hits.reshape(test.features.shape[1], len(probes.mean), -1), 0, 1)


def _matrix(target: Target, axis: str, names: tuple[str, ...], seen: Estimate, trained: int, n: int) -> Matrix:
    of_rows, of_columns = np.full(len(names), trained), np.full(len(names), n)
    return Matrix(target.name, axis, names, names, seen.value, seen.lower, seen.upper, of_rows, of_columns)
