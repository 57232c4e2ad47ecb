"""Ridge classifiers in closed form, with the penalty chosen by cross-validation inside the training samples.

Each cell needs one eigendecomposition for all penalties, all folds, and all targets with labels on the same rows. With
rows Z in principal axes, the fitted values are H y with H = Z (Z'Z + alpha)^-1 Z' + 1/n. If the rows g are left out,
their residuals change from r_g to (I - H_gg)^-1 r_g. This is exact and includes the refitted intercept (Cook and
Weisberg 1982, "Residuals and Influence in Regression", for one row; Woodbury's identity gives the same for a block).
So no fit is repeated, and validation and test samples have no influence on the penalty.

alpha = lambda * n, where n is the number of rows of the whole training set. Fits without a fold use the same alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from cosprobe.errors import InputError
from cosprobe.probes.linalg import (
    Axes,
    Chosen,
    Parts,
    best_penalty,
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
    """The decomposition for ridge regressions of all cells. The fit at any penalty follows from it. All in fp64.

    Minimises |rows w + b - wanted|^2 + alpha |w|^2 with b free, like scikit-learn's `Ridge`.
    axes: principal axes of the rows. coordinates: rows in principal axes. energy: squared length of the rows along each
    axis. level: mean of `wanted`. aim: wanted - level. projected: transposed coordinates @ aim.
    """

    axes: Axes
    coordinates: Float[Tensor, "cell row axis"]
    energy: Float[Tensor, "cell axis"]
    level: Float[Tensor, " out"]
    aim: Float[Tensor, "row out"]
    projected: Float[Tensor, "cell axis out"]

    @classmethod
    def of(cls, rows: Float[Tensor, "cell row width"], wanted: Float[Tensor, "row out"]) -> Ridge:
        """Decomposes the Gram matrix if there are not more rows than columns (dual), else the covariance matrix."""
        rows, wanted = rows.double(), wanted.double()
        axes = principal_axes(rows)
        coordinates = (rows - axes.mean[:, None]) @ axes.basis
        level = wanted.mean(dim=0)
        aim = wanted - level
        return cls(axes, coordinates, axes.variance * rows.shape[1], level, aim, coordinates.mT @ aim)

    def solve(
        self, alphas: Float[Tensor, "cell out"]
    ) -> tuple[Float[Tensor, "cell width out"], Float[Tensor, "cell out"]]:
        """Weight and bias. alphas: one for each cell and output column."""
        weight = self.axes.basis @ (self.projected / (self.energy[..., None] + alphas[:, None]))
        return weight, self.level - torch.einsum("cw,cwo->co", self.axes.mean, weight)

    def held_out(self, alphas: Sequence[float], folds: Int[Tensor, " row"]) -> Float[Tensor, "cell row alpha out"]:
        """The prediction for each row by the fit to the rows of the other folds.

        If a fold has more rows than there are axes, (I - H_gg)^-1 is computed with Woodbury's identity: the normal
        equations of the other rows are solved. Raises InputError when there is only one fold.
        """
        labels = folds.unique().tolist()
        if len(labels) < 2:
            raise InputError(f"folds={labels}: expected at least 2 folds, to fit on the others")
        cells, count, _ = self.coordinates.shape
        ones = self.coordinates.new_ones(cells, count, 1)
        level = torch.cat([self.coordinates, ones], dim=2)  # the intercept is one more axis, without penalty
        penalised = [torch.cat([self.energy + alpha, ones[:, 0] * count], dim=1) for alpha in alphas]
        projected = torch.cat([self.projected, torch.zeros_like(self.projected[:, :1])], dim=1)
        residuals = [self.aim - level @ (projected / total[..., None]) for total in penalised]
        left = torch.empty(cells, count, len(alphas), self.aim.shape[1], dtype=level.dtype, device=level.device)
        for label in labels:
            in_fold = folds == label
            z = level[:, in_fold]
            narrow = z.shape[1] > z.shape[2]
            square = z.mT @ z if narrow else None
            for i, total in enumerate(penalised):
                r = residuals[i][:, in_fold]
                if square is None:
                    left[:, in_fold, i] = _solve(_identity(z) - (z / total[:, None]) @ z.mT, r)
                else:
                    left[:, in_fold, i] = r + z @ _solve(torch.diag_embed(total) - square, z.mT @ r)
        return (self.level + self.aim)[:, None] - left


def problem_folds(keys: Shaped[np.ndarray, " sample"], seed: int) -> Int[np.ndarray, " sample"]:
    """The fold of each sample. Problems are shuffled and divided into FOLDS folds (fewer if there are fewer problems).

    All samples of a problem are in one fold. The fold depends on the set of problems and the seed, not on their order.
    """
    problems, member = np.unique(keys, return_inverse=True)
    return (np.random.default_rng(seed).permutation(len(problems)) % FOLDS)[member]


def fit_ridge(
    x: Float[Tensor, "cell sample region channel"],
    labels: dict[str, Int[Tensor, " sample *region"]],
    keys: Shaped[np.ndarray, " sample"],
    targets: Sequence[Target],
    penalties: Sequence[float],
    seed: int = 0,
) -> dict[str, Chosen]:
    """Fits ridge classifiers: regression to +1 for the class (or the region that is the answer), -1 for the others.

    x: standardised. labels: rows with label -1 are ignored. keys: the problem of each sample.
    The penalty of a target and cell is the one with the most right predictions on held-out folds of whole problems
    (ties: the lower squared error there). Weights have the precision of x.
    Raises InputError for penalties that are not above 0. With several penalties, also for a target with labels
    in only one problem.
    """
    check_penalties(penalties)
    groups: dict[tuple[bool, bytes], list[Target]] = {}
    for target in targets:
        groups.setdefault((target.form == "problem", _carried(x, labels[target.name], target)), []).append(target)
    found: dict[str, Chosen] = {}
    for (joint, mask), members in groups.items():
        keep = torch.frombuffer(bytearray(mask), dtype=torch.bool).to(x.device)
        rows = design(x, "problem" if joint else "region")
        of_row = np.repeat(np.asarray(keys), rows.shape[2])[keep.cpu().numpy()]
        folds = torch.from_numpy(problem_folds(of_row, seed)).to(x.device)
        if len(penalties) > 1 and len(folds.unique()) < 2:
            raise InputError(
                f"target {members[0].name!r}: its training samples come from 1 problem, expected at least 2 to choose "
                "a penalty by folds; collect more problems or set a single penalty"
            )
        known = {t.name: labels[t.name].to(x.device).flatten() for t in members}
        known = {name: label[label >= 0] for name, label in known.items()}
        values = _fit_cells(rows, keep, folds, known, members, penalties)
        for target in members:
            fields = ("weights", "biases", "penalties")
            found[target.name] = Chosen(**{field: values[f"{target.name}/{field}"] for field in fields})
    return found


def _carried(x: Tensor, label: Tensor, target: Target) -> bytes:
    """The rows of the design with a label of the target, as bytes. Targets with equal rows share a decomposition."""
    known = label >= 0
    if target.form == "candidate":
        known = known[:, None].expand(-1, x.shape[2])
    return known.flatten().cpu().numpy().tobytes()


def _fit_cells(
    rows: Float[Tensor, "cell sample row width"],
    keep: Bool[Tensor, " flat"],
    folds: Int[Tensor, " kept"],
    known: dict[str, Int[Tensor, " label"]],
    targets: Sequence[Target],
    penalties: Sequence[float],
) -> Parts:
    """Fits a few cells at a time. Returns the fields of `Chosen` for every target, with names `TARGET/FIELD`."""
    regions = rows.shape[2]
    wanted = [_wanted(known[t.name], t, regions) for t in targets]
    outs = [aim.shape[1] for aim in wanted]
    tried = torch.tensor(penalties, dtype=torch.float64, device=rows.device)
    count, width = len(folds), rows.shape[3]
    numbers = (3 * count + width) * min(count, width) + 2 * count * (width + len(penalties) * sum(outs))
    found: list[Parts] = []
    for block in blocks(len(rows), numbers):
        cells = rows[block].flatten(1, 2)[:, keep]
        ridge = Ridge.of(cells, torch.cat(wanted, dim=1))
        best = [torch.zeros(len(cells), dtype=torch.long, device=rows.device) for _ in targets]
        if len(penalties) > 1:
            held = ridge.held_out([value * count for value in penalties], folds).split(outs, dim=-1)
            best = [
                _best(held[i], known[t.name], aim, regions if t.form == "candidate" else 1)
                for i, (t, aim) in enumerate(zip(targets, wanted, strict=True))
            ]
        alphas = [(count * tried[at])[:, None].expand(-1, out) for at, out in zip(best, outs, strict=True)]
        weight, bias = (value.to(rows.dtype) for value in ridge.solve(torch.cat(alphas, dim=1)))
        of_block: Parts = {}
        for t, w, b, at in zip(targets, weight.split(outs, -1), bias.split(outs, -1), best, strict=True):
            of_block |= {f"{t.name}/weights": w, f"{t.name}/biases": b, f"{t.name}/penalties": tried[at].to(rows.dtype)}
        found.append(of_block)
    return {name: torch.cat([of_block[name] for of_block in found]) for name in found[0]}


def _wanted(label: Int[Tensor, " label"], target: Target, regions: int) -> Float[Tensor, "row out"]:
    """The values to regress on: +1 for the label, -1 for the others."""
    signs = F.one_hot(label, regions if target.form == "candidate" else target.classes).double() * 2 - 1
    return signs.reshape(-1, 1) if target.form == "candidate" else signs


def _best(
    held: Float[Tensor, "cell row alpha out"],
    label: Int[Tensor, " label"],
    wanted: Float[Tensor, "row out"],
    competing: int,
) -> Int[Tensor, " cell"]:
    """Index of the penalty with the most right held-out predictions.

    competing: number of rows of one prediction: the regions for form `candidate`, else 1.
    """
    error = (held - wanted[:, None]).square().sum(dim=(1, 3))
    choices = held[..., 0].unflatten(1, (-1, competing)).movedim(2, -1) if competing > 1 else held
    right = (choices.argmax(dim=-1) == label[:, None]).sum(dim=1)
    return best_penalty(right, error)


def _identity(z: Float[Tensor, "cell row axis"]) -> Float[Tensor, "row row"]:
    """The identity matrix of the number of rows."""
    return torch.eye(z.shape[1], dtype=z.dtype, device=z.device)


def _solve(
    square: Float[Tensor, "cell size size"], right: Float[Tensor, "cell size out"]
) -> Float[Tensor, "cell size out"]:
    """Solves square systems of equations."""
    with one_thread(square.device):
        return torch.linalg.solve(square, right)
