"""Linear algebra of probes, batched over cells: standardisation, designs, principal axes, ridge, losses.

Pure torch, no state. A *design* is what a form of target reads, always laid out as
[cell, sample, row, width]: for `candidate` and `region` targets one row per region, as wide as the channels;
for `problem` targets a single row, all regions side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from cosprobe.tasks import Target

# Weights and biases of every target and setting (penalty), on standardised features.
Fitted = dict[str, tuple[Float[Tensor, "cell width setting out"], Float[Tensor, "cell setting out"]]]
Divide = Callable[[Callable[[slice], tuple[Tensor, ...]], int], tuple[Tensor, ...]]

NEGLIGIBLE = 1e-6  # a channel whose spread is below this share of its mean is constant up to rounding
ROUNDING = 1e-5  # in the dual form, axes with less than this share of the largest variance are fp32 noise


@dataclass(frozen=True)
class Axes:
    """Principal axes of the rows of each cell. A row x has coordinates (x - mean) @ basis.

    `axis` is min(row, width): no more are needed, a penalised linear fit lives in the span of its rows.
    variance: mean square of the coordinates over the rows; 0 (and a zero column of `basis`) for empty axes.
    """

    mean: Float[Tensor, "cell width"]
    basis: Float[Tensor, "cell width axis"]
    variance: Float[Tensor, "cell axis"]


def spread(
    features: Float[Tensor, "sample cell region channel"],
) -> tuple[Float[Tensor, "cell channel"], Float[Tensor, "cell channel"]]:
    """Mean and standard deviation over samples and regions, per cell and channel, in fp32.

    The deviation of a channel that is constant (up to rounding) is exactly 0.
    """
    means, deviations = [], []
    for cell in features.unbind(1):  # fp64 of one cell at a time: a constant channel must come out constant
        rows = cell.double()
        mean = rows.mean(dim=(0, 1))
        deviation = (rows - mean).square().mean(dim=(0, 1)).sqrt()
        means.append(mean)
        deviations.append(torch.where(deviation > NEGLIGIBLE * mean.abs(), deviation, 0.0))
    return torch.stack(means).float(), torch.stack(deviations).float()


def standardise(
    features: Float[Tensor, "sample cell region channel"],
    mean: Float[Tensor, "cell channel"],
    std: Float[Tensor, "cell channel"],
) -> Float[Tensor, "cell sample region channel"]:
    """(features - mean) / std with the cells first; a channel with std 0 becomes 0 on any data."""
    scale = torch.where(std > 0, 1 / std, 0.0)
    by_cell = features.transpose(0, 1).to(device=mean.device, dtype=torch.float32)
    return (by_cell - mean[:, None, None]) * scale[:, None, None]


def design(x: Float[Tensor, "cell sample region channel"], form: str) -> Float[Tensor, "cell sample row width"]:
    """What a target of this form reads: one row per region, or one row of all regions side by side."""
    return x.flatten(2)[:, :, None] if form == "problem" else x


def principal_axes(rows: Float[Tensor, "cell row width"]) -> Axes:
    """Axes of the centred rows, largest variance last; from the Gram matrix when rows are fewer than columns."""
    count, width = rows.shape[1:]
    mean = rows.mean(dim=1)
    centred = rows - mean[:, None]
    primal = count > width
    square = centred.mT @ centred if primal else centred @ centred.mT
    energy, vectors = _eigh(square)
    if primal:
        return Axes(mean, vectors.float().contiguous(), (energy.clamp(min=0) / count).float())
    energy = torch.where(energy > ROUNDING * energy[:, -1:].clamp(min=0), energy, 0.0)
    length = torch.where(energy > 0, energy.rsqrt(), 0.0)
    return Axes(mean, centred.mT @ (vectors * length[:, None]).float(), (energy / count).float())


def ridge(
    rows: Float[Tensor, "cell row width"], wanted: Float[Tensor, "row out"], alphas: Sequence[float]
) -> tuple[Float[Tensor, "cell width alpha out"], Float[Tensor, "cell alpha out"]]:
    """Exact ridge regression with an unpenalised intercept: weight and bias for every alpha.

    Minimises |rows w + b - wanted|^2 + alpha |w|^2, as scikit-learn's `Ridge`. One eigendecomposition per cell
    serves all alphas and outputs: of the Gram matrix (dual form) when there are no more rows than columns, of
    the covariance (primal form) otherwise. Statistics in fp32, decomposition and solution in fp64.
    Raises ValueError for an alpha that is not positive.
    """
    if not alphas or min(alphas) <= 0:
        raise ValueError(f"alphas={list(alphas)}: expected positive penalties; alpha 0 has no unique solution")
    mean, level = rows.mean(dim=1), wanted.double().mean(dim=0)
    centred = rows - mean[:, None]
    aim = wanted.double() - level
    dual = rows.shape[1] <= rows.shape[2]
    square = centred @ centred.mT if dual else centred.mT @ centred
    energy, vectors = _eigh(square)
    energy = energy.clamp(min=0)
    projected = vectors.mT @ (aim if dual else centred.mT.double() @ aim)
    weights = []
    for alpha in alphas:
        solution = vectors @ (projected / (energy + alpha)[..., None])
        weights.append(centred.mT.double() @ solution if dual else solution)
    weight = torch.stack(weights, dim=2)
    bias = level - torch.einsum("cw,cwao->cao", mean.double(), weight)
    return weight.float(), bias.float()


def curvature(form: str, regions: int) -> float:
    """h such that the Hessian of the mean cross-entropy never exceeds h * (mean outer product of design rows).

    The Hessian of a softmax, diag(p) - p p', has no eigenvalue above 1/2 (Boehning 1992). A candidate target
    averages over samples what is summed over `regions` rows.
    """
    return 0.5 * regions if form == "candidate" else 0.5


def row_sums(
    values: Float[Tensor, "cell *rows setting out"], labels: Int[Tensor, " *rows"]
) -> tuple[Float[Tensor, "cell setting"], Float[Tensor, "cell setting"], Int[Tensor, ""]]:
    """Cross-entropy and number right, summed over the rows with a label, and how many those are."""
    flat = values.float().flatten(1, -3)
    label = labels.flatten()[None, :, None].expand(flat.shape[:3])
    loss = F.cross_entropy(flat.reshape(-1, flat.shape[-1]), label.reshape(-1), ignore_index=-1, reduction="none")
    correct = flat.detach().argmax(dim=-1) == label
    return loss.view(label.shape).sum(dim=1), correct.sum(dim=1).float(), (labels >= 0).sum()


def fit_ridge(
    x: Float[Tensor, "cell sample region channel"],
    labels: dict[str, Int[Tensor, " sample *region"]],
    targets: Sequence[Target],
    lambdas: Sequence[float],
    divide: Divide | None = None,
) -> Fitted:
    """Exact ridge classifiers: +1 for the class (or the region that is the answer), -1 for the others.

    Weights [cell, width, lambda, out] for alpha = lambda * rows. Targets carried by the same rows share one
    decomposition. `divide(solve, cells)` may hand out the cells to several processes.
    """
    groups: dict[tuple[bool, bytes], list[tuple[str, Tensor]]] = {}
    for target in targets:
        label = labels[target.name].to(x.device)
        wanted = F.one_hot(label.clamp(min=0), x.shape[2] if target.form == "candidate" else target.classes) * 2.0 - 1
        if target.form == "candidate":
            label, wanted = label[:, None].expand(-1, x.shape[2]), wanted[..., None]
        keep = label.flatten() >= 0
        key = (target.form == "problem", keep.cpu().numpy().tobytes())
        groups.setdefault(key, []).append((target.name, wanted.flatten(0, -2)[keep]))
    fitted: Fitted = {}
    for (joint, mask), members in groups.items():
        keep = torch.frombuffer(bytearray(mask), dtype=torch.bool).to(x.device)
        rows = design(x, "problem" if joint else "region").flatten(1, 2)[:, keep]
        wanted = torch.cat([aim for _, aim in members], dim=1)
        alphas = [value * rows.shape[1] for value in lambdas]
        solve = partial(_ridge_part, rows, wanted, alphas)
        weight, bias = solve(slice(None)) if divide is None else divide(solve, len(rows))
        outs = [aim.shape[1] for _, aim in members]
        for (name, _), w, b in zip(members, weight.split(outs, -1), bias.split(outs, -1), strict=True):
            fitted[name] = (w, b)
    return fitted


def _ridge_part(rows: Tensor, wanted: Tensor, alphas: Sequence[float], part: slice) -> tuple[Tensor, Tensor]:
    return ridge(rows[part], wanted, alphas)


def _eigh(
    square: Float[Tensor, "cell size size"],
) -> tuple[Float[Tensor, "cell size"], Float[Tensor, "cell size size"]]:
    with _one_thread(square.device):
        energy, vectors = torch.linalg.eigh(square.double())
    return energy, vectors


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """LAPACK gains nothing from threads at these sizes and loses a factor of 10 to 100 on busy cores."""
    threads = torch.get_num_threads()
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)
