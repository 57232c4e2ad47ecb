"""What every solver of probes works with, batched over cells: standardisation, designs, principal axes, losses.

Pure torch, no state. A *design* is what a form of target reads, always laid out as
[cell, sample, row, width]: for `candidate` and `region` targets one row per region, as wide as the channels;
for `problem` targets a single row, all regions side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor
from torch.nn import functional as F

from cosprobe.errors import InputError

# Weights and biases of every target and setting (penalty), on standardised features.
Fitted = dict[str, tuple[Float[Tensor, "cell width setting out"], Float[Tensor, "cell setting out"]]]
Divide = Callable[[Callable[[slice], tuple[Tensor, ...]], int], tuple[Tensor, ...]]

CHUNK = 2**25  # numbers of fp64 worked on at once, 256 MB
NEGLIGIBLE = 1e-6  # a channel whose spread is below this share of its mean is constant up to rounding
# In the dual form, axes with less than this share of the largest variance are rounding noise of the rows.
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}


@dataclass(frozen=True)
class Chosen:
    """The probe that is kept of every cell, of one target, and the penalty it was fitted with."""

    weights: Float[Tensor, "cell width out"]
    biases: Float[Tensor, "cell out"]
    lambdas: Float[Tensor, " cell"]

    @classmethod
    def of(
        cls,
        weight: Float[Tensor, "cell width setting out"],
        bias: Float[Tensor, "cell setting out"],
        lambdas: Sequence[float],
        best: Int[Tensor, " cell"],
    ) -> Chosen:
        """Of each cell the setting `best`."""
        cell = torch.arange(len(best), device=best.device)
        return cls(weight[cell, :, best], bias[cell, best], torch.tensor(lambdas, device=best.device)[best])


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


@dataclass(frozen=True)
class Turned:
    """Rows of each cell in their principal axes, as in `Axes`, but rows innermost, and the basis as a product.

    factors: matrices whose product is the basis. When rows are no more than columns it is never written out, which
    would cost as much as the Gram matrix: coordinates follow from the decomposition itself.
    """

    mean: Float[Tensor, "cell width"]
    coordinates: Float[Tensor, "cell axis row"]
    variance: Float[Tensor, "cell axis"]
    factors: tuple[Tensor, ...]

    def into(self, weight: Float[Tensor, "cell width out"]) -> Float[Tensor, "cell axis out"]:
        """Weights along the axes; what is orthogonal to all rows is lost."""
        for factor in self.factors:
            weight = factor.mT @ weight
        return weight

    def back(self, weight: Float[Tensor, "cell axis out"]) -> Float[Tensor, "cell width out"]:
        """Weights along the axes as weights of the columns."""
        for factor in reversed(self.factors):
            weight = factor @ weight
        return weight


def turned(rows: Float[Tensor, "cell row width"]) -> Turned:
    """The rows of each cell along the axes of `principal_axes`, in the precision of the rows throughout."""
    count, width = rows.shape[1:]
    mean = rows.mean(dim=1)
    centred = rows - mean[:, None]
    if count > width:
        energy, basis = _eigh(centred.mT @ centred)
        return Turned(mean, basis.mT @ centred.mT, energy.clamp(min=0) / count, (basis,))
    energy, vectors = _eigh(centred @ centred.mT)
    energy = torch.where(energy > ROUNDING[rows.dtype] * energy[:, -1:].clamp(min=0), energy, 0.0)
    length = energy.sqrt()[:, None]
    inverse = torch.where(length > 0, 1 / length, 0.0)
    factors = centred.mT, vectors * inverse
    return Turned(mean, (vectors * length).mT.contiguous(), energy / count, factors)


def principal_axes(rows: Float[Tensor, "cell row width"]) -> Axes:
    """Axes of the centred rows, largest variance last; from the Gram matrix when rows are no more than columns.

    In the precision of the rows (fp32 or fp64); the decomposition itself is fp64.
    """
    count, width = rows.shape[1:]
    mean = rows.mean(dim=1)
    centred = rows - mean[:, None]
    primal = count > width
    square = centred.mT @ centred if primal else centred @ centred.mT
    energy, vectors = _eigh(square.double())
    if primal:
        return Axes(mean, vectors.to(rows.dtype).contiguous(), (energy.clamp(min=0) / count).to(rows.dtype))
    energy = torch.where(energy > ROUNDING[rows.dtype] * energy[:, -1:].clamp(min=0), energy, 0.0)
    length = torch.where(energy > 0, energy.rsqrt(), 0.0)
    return Axes(mean, centred.mT @ (vectors * length[:, None]).to(rows.dtype), (energy / count).to(rows.dtype))


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
    # rows last: a softmax and a maximum over few classes are fast when taken for many rows at once
    by_row = values.float().flatten(1, -3).permute(0, 2, 3, 1)  # cell, setting, out, row
    label = labels.flatten().expand(*by_row.shape[:2], -1)
    loss = F.cross_entropy(by_row.flatten(0, 1), label.flatten(0, 1), ignore_index=-1, reduction="none")
    largest = by_row.detach().max(dim=2).indices  # the first of equals, like argmax, in less time
    return loss.sum(dim=-1).unflatten(0, label.shape[:2]), (largest == label).sum(dim=-1).float(), (labels >= 0).sum()


def best_setting(right: Num[Tensor, "cell setting"], loss: Float[Tensor, "cell setting"]) -> Int[Tensor, " cell"]:
    """Of each cell the setting that is right most often; on a tie the one with the lower loss."""
    tied = right == right.amax(dim=1, keepdim=True)
    return loss.masked_fill(~tied, torch.inf).argmin(dim=1)


def blocks(cells: int, numbers: int) -> Iterator[slice]:
    """Slices of cells worked on at once, when each cell needs that many numbers of fp64 memory."""
    size = max(1, CHUNK // max(1, numbers))
    return (slice(start, min(start + size, cells)) for start in range(0, cells, size))


def check_penalties(lambdas: Sequence[float]) -> None:
    """Raises ValueError unless there is at least one penalty and all are positive."""
    if not lambdas or min(lambdas) <= 0:
        raise InputError(f"lambdas={list(lambdas)}: expected one or more penalties above 0; at 0 no fit is unique")


def _eigh(
    square: Float[Tensor, "cell size size"],
) -> tuple[Float[Tensor, "cell size"], Float[Tensor, "cell size size"]]:
    with one_thread(square.device):
        energy, vectors = torch.linalg.eigh(square)
    return energy, vectors


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """LAPACK gains nothing from threads at these sizes and loses a factor of 10 to 100 on busy cores."""
    threads = torch.get_num_threads()
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def affine(
    rows: Float[Tensor, "cell sample row width"],
    weight: Float[Tensor, "cell width *setting out"],
    bias: Float[Tensor, "cell *setting out"] | None,
) -> Float[Tensor, "cell sample row *setting out"]:
    """rows @ weight + bias in one matrix product per cell, however many settings (lambdas, say) there are.

    The rows are innermost in memory, of which there are many more than columns: faster both ways.
    """
    flat, columns = rows.flatten(1, 2).mT, weight.flatten(2).mT
    values = columns @ flat if bias is None else torch.baddbmm(bias.flatten(1)[:, :, None], columns, flat)
    return values.mT.unflatten(2, weight.shape[2:]).unflatten(1, rows.shape[1:3])


def classes_last(
    values: Float[Tensor, "cell sample row *setting out"], form: str
) -> Float[Tensor, "cell sample *rest"]:
    """What `affine` gives, with what the softmax runs over as the last axis.

    candidate: [cell, sample, *setting, region]; problem: [cell, sample, *setting, class];
    region: [cell, sample, region, *setting, class].
    """
    if form == "candidate":
        return values[..., 0].movedim(2, -1)
    return values[:, :, 0] if form == "problem" else values


def validated(
    x: Float[Tensor, "cell sample region channel"],
    labels: Int[Tensor, " sample *region"],
    form: str,
    weight: Float[Tensor, "cell width setting out"],
    bias: Float[Tensor, "cell setting out"],
    lambdas: Sequence[float],
) -> Chosen:
    """Of each cell the fit that is right most often on validation; on a tie the one with the lower cross-entropy.

    x, labels: standardised validation samples, -1 for no label. weight, bias: a fit for each of `lambdas`.
    """
    loss, correct, _ = row_sums(classes_last(affine(design(x, form), weight, bias), form), labels.to(x.device))
    return Chosen.of(weight, bias, lambdas, best_setting(correct, loss))
