"""Ridge classifiers in closed form, their penalty chosen by folds inside the training samples.

One eigendecomposition per cell serves every penalty, every target carried by the same rows, and every fold:
with rows Z in principal axes, the fit is H y with H = Z (Z'Z + alpha)^-1 Z' + 1/n, and leaving out the block
of rows g changes its residuals r_g to (I - H_gg)^-1 r_g, exactly, the refitted intercept included (Cook
and Weisberg 1982, "Residuals and Influence in Regression", for one row; Woodbury's identity gives the same for a
block). Nothing is refitted, and nothing outside `train` takes part in the choice.

alpha = lambda * rows, the rows of the whole training set: a fit without a fold keeps that alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from cosprobe.errors import InputError
from cosprobe.probes.linalg import (
    Axes,
    Chosen,
    Divide,
    best_setting,
    blocks,
    check_penalties,
    design,
    one_thread,
    principal_axes,
)
from cosprobe.tasks import Target

FOLDS = 5


@dataclass(frozen=True)
class Ridge:
    """Ridge regressions of the cells of a design on the columns of `aim`, ready for any penalty; all fp64.

    Minimises |rows w + b - wanted|^2 + alpha |w|^2 with b free, as scikit-learn's `Ridge`.
    coordinates: rows in principal axes. energy: their squared length along each axis. level: mean of wanted.
    aim: wanted - level. projected: coordinates' aim.
    """

    axes: Axes
    coordinates: Float[Tensor, "cell row axis"]
    energy: Float[Tensor, "cell axis"]
    level: Float[Tensor, " out"]
    aim: Float[Tensor, "row out"]
    projected: Float[Tensor, "cell axis out"]

    @classmethod
    def of(cls, rows: Float[Tensor, "cell row width"], wanted: Float[Tensor, "row out"]) -> Ridge:
        """Decomposes: the Gram matrix when there are no more rows than columns (dual), else the covariance."""
        rows, wanted = rows.double(), wanted.double()
        axes = principal_axes(rows)
        coordinates = (rows - axes.mean[:, None]) @ axes.basis
        level = wanted.mean(dim=0)
        aim = wanted - level
        return cls(axes, coordinates, axes.variance * rows.shape[1], level, aim, coordinates.mT @ aim)

    def solve(
        self, alphas: Float[Tensor, "cell out"]
    ) -> tuple[Float[Tensor, "cell width out"], Float[Tensor, "cell out"]]:
        """Weight and bias, each cell and column at its own alpha."""
        weight = self.axes.basis @ (self.projected / (self.energy[..., None] + alphas[:, None]))
        return weight, self.level - torch.einsum("cw,cwo->co", self.axes.mean, weight)

    def held_out(self, alphas: Sequence[float], folds: Int[Tensor, " row"]) -> Float[Tensor, "cell row alpha out"]:
        """What each row is predicted by the fit on the rows of the other folds.

        (I - H_gg)^-1 is taken by Woodbury's identity where a fold has more rows than there are axes, which
        leaves the normal equations of the remaining rows to solve. Raises ValueError for a single fold.
        """
        labels = folds.unique().tolist()
        if len(labels) < 2:
            raise InputError(f"folds={labels}: expected at least 2; there is nothing to fit without the only one")
        cells, count, _ = self.coordinates.shape
        ones = self.coordinates.new_ones(cells, count, 1)
        level = torch.cat([self.coordinates, ones], dim=2)  # the intercept is one more axis, unpenalised
        penalised = [torch.cat([self.energy + alpha, ones[:, 0] * count], dim=1) for alpha in alphas]
        projected = torch.cat([self.projected, torch.zeros_like(self.projected[:, :1])], dim=1)
        residuals = [self.aim - level @ (projected / total[..., None]) for total in penalised]
        left = torch.empty(cells, count, len(alphas), self.aim.shape[1], dtype=level.dtype, device=level.device)
        for label in labels:
            own = folds == label
            z = level[:, own]
            narrow = z.shape[1] > z.shape[2]
            square = z.mT @ z if narrow else None
            for i, total in enumerate(penalised):
                r = residuals[i][:, own]
                if square is None:
                    left[:, own, i] = _solve(_identity(z) - (z / total[:, None]) @ z.mT, r)
                else:
                    left[:, own, i] = r + z @ _solve(torch.diag_embed(total) - square, z.mT @ r)
        return (self.level + self.aim)[:, None] - left


def problem_folds(keys: Shaped[np.ndarray, " sample"], seed: int) -> Int[np.ndarray, " sample"]:
    """A fold for each sample: problems are shuffled and dealt out to FOLDS folds, or one each when they are fewer.

    All samples of a problem share its fold, which depends on the set of problems and the seed, not on their order.
    """
    problems, member = np.unique(keys, return_inverse=True)
    return (np.random.default_rng(seed).permutation(len(problems)) % FOLDS)[member]


def fit_ridge(
    x: Float[Tensor, "cell sample region channel"],
    labels: dict[str, Int[Tensor, " sample *region"]],
    keys: Shaped[np.ndarray, " sample"],
    targets: Sequence[Target],
    lambdas: Sequence[float],
    seed: int = 0,
    divide: Divide | None = None,
) -> dict[str, Chosen]:
    """Ridge classifiers: +1 for the class (or the region that is the answer), -1 for the others.

    Of every target and cell the lambda whose held-out predictions are right most often (ties: the smaller held-out
    squared error), over folds of whole problems (`keys`). x is standardised; rows with label -1 do not
    count. Weights are in the precision of x.

    `divide(solve, cells)` may hand out the cells to several processes. Cells are divided, not rows, as sums of Gram
    matrices over processes would have it: no Gram matrix then goes from one process to another (it is larger than the
    features themselves unless rows are more than the columns), and only weights do. Each process must see all rows.
    Raises ValueError for penalties that are not positive and for a target that a single problem carries.
    """
    check_penalties(lambdas)
    groups: dict[tuple[bool, bytes], list[Target]] = {}
    for target in targets:
        groups.setdefault((target.form == "problem", _carried(x, labels[target.name], target)), []).append(target)
    found: dict[str, Chosen] = {}
    for (joint, mask), members in groups.items():
        keep = torch.frombuffer(bytearray(mask), dtype=torch.bool).to(x.device)
        rows = design(x, "problem" if joint else "region")
        of_row = np.repeat(np.asarray(keys), rows.shape[2])[keep.cpu().numpy()]
        folds = torch.from_numpy(problem_folds(of_row, seed)).to(x.device)
        if len(lambdas) > 1 and len(folds.unique()) < 2:
            raise InputError(
                f"target {members[0].name!r}: 1 problem among the training samples that carry it, expected at least 2 "
                "to choose a penalty by folds; collect more problems or give one lambda"
            )
        known = {t.name: labels[t.name].to(x.device).flatten() for t in members}
        known = {name: label[label >= 0] for name, label in known.items()}
        part = partial(_fit_part, rows, keep, folds, known, members, lambdas)
        values = part(slice(0, len(x))) if divide is None else divide(part, len(x))
        for i, target in enumerate(members):
            found[target.name] = Chosen(*values[3 * i : 3 * i + 3])
    return found


def _carried(x: Tensor, label: Tensor, target: Target) -> bytes:
    """Which rows of the design carry the target: targets that agree in it share a decomposition."""
    known = label >= 0
    if target.form == "candidate":
        known = known[:, None].expand(-1, x.shape[2])
    return known.flatten().cpu().numpy().tobytes()


def _fit_part(
    rows: Float[Tensor, "cell sample row width"],
    keep: Bool[Tensor, " flat"],
    folds: Int[Tensor, " kept"],
    known: dict[str, Int[Tensor, " label"]],
    targets: Sequence[Target],
    lambdas: Sequence[float],
    part: slice,
) -> tuple[Tensor, ...]:
    """Weight, bias and lambda of each target, in a row, for the cells of `part`."""
    regions = rows.shape[2]
    wanted = [_wanted(known[t.name], t, regions) for t in targets]
    outs = [aim.shape[1] for aim in wanted]
    penalties = torch.tensor(lambdas, dtype=torch.float64, device=rows.device)
    count, width = len(folds), rows.shape[3]
    numbers = (3 * count + width) * min(count, width) + 2 * count * (width + len(lambdas) * sum(outs))
    parts: list[tuple[Tensor, ...]] = []
    for block in blocks(part.stop - part.start, numbers):
        cells = rows[part][block].flatten(1, 2)[:, keep]
        ridge = Ridge.of(cells, torch.cat(wanted, dim=1))
        best = [torch.zeros(len(cells), dtype=torch.long, device=rows.device) for _ in targets]
        if len(lambdas) > 1:
            held = ridge.held_out([value * count for value in lambdas], folds).split(outs, dim=-1)
            best = [
                _best(held[i], known[t.name], aim, regions if t.form == "candidate" else 1)
                for i, (t, aim) in enumerate(zip(targets, wanted, strict=True))
            ]
        alphas = [(count * penalties[at])[:, None].expand(-1, out) for at, out in zip(best, outs, strict=True)]
        weight, bias = (value.to(rows.dtype) for value in ridge.solve(torch.cat(alphas, dim=1)))
        split = zip(weight.split(outs, -1), bias.split(outs, -1), best, strict=True)
        parts.append(tuple(v for w, b, at in split for v in (w, b, penalties[at].to(rows.dtype))))
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def _wanted(label: Int[Tensor, " label"], target: Target, regions: int) -> Float[Tensor, "row out"]:
    signs = F.one_hot(label, regions if target.form == "candidate" else target.classes).double() * 2 - 1
    return signs.reshape(-1, 1) if target.form == "candidate" else signs


def _best(
    held: Float[Tensor, "cell row alpha out"],
    label: Int[Tensor, " label"],
    wanted: Float[Tensor, "row out"],
    competing: int,
) -> Int[Tensor, " cell"]:
    """Index of the penalty with most rows (for candidates: samples, of `competing` rows) right when held out."""
    error = (held - wanted[:, None]).square().sum(dim=(1, 3))
    choices = held[..., 0].unflatten(1, (-1, competing)).movedim(2, -1) if competing > 1 else held
    right = (choices.argmax(dim=-1) == label[:, None]).sum(dim=1)
    return best_setting(right, error)


def _identity(z: Float[Tensor, "cell row axis"]) -> Float[Tensor, "row row"]:
    return torch.eye(z.shape[1], dtype=z.dtype, device=z.device)


def _solve(
    square: Float[Tensor, "cell size size"], right: Float[Tensor, "cell size out"]
) -> Float[Tensor, "cell size out"]:
    with one_thread(square.device):
        return torch.linalg.solve(square, right)
