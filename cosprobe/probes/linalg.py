"""Linear algebra for all probe solvers, batched over cells: standardisation, designs, principal axes, losses.

A design is the input matrix of a linear probe, [cell, sample, row, width]. For targets of form `candidate` and `region`
it has one row per region, and width is the number of channels. For form `problem` it has one row per sample, with the
channels of all regions concatenated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor
from torch.nn import functional as F

from cosprobe.errors import InputError

# Weights and biases of every target and penalty, on standardised features.
Fitted = dict[str, tuple[Float[Tensor, "cell width penalty out"], Float[Tensor, "cell penalty out"]]]
Parts = dict[str, Tensor]  # results of a solver for some cells, by name; the first axis is the cells
Divide = Callable[[Callable[[slice], Parts], int], Parts]

CHUNK = 2**25  # number of fp64 values processed at once, 256 MB
NEGLIGIBLE = 1e-6  # a channel with std below this share of its mean is constant up to rounding
# In the dual form (Gram matrix), axes with less than this share of the largest variance are rounding errors.
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}


@dataclass(frozen=True)
class Chosen:
    """The chosen probe of every cell for one target, and its penalty."""

    weights: Float[Tensor, "cell width out"]
    biases: Float[Tensor, "cell out"]
    penalties: Float[Tensor, " cell"]

    @classmethod
    def of(
        cls,
        weight: Float[Tensor, "cell width penalty out"],
        bias: Float[Tensor, "cell penalty out"],
        penalties: Sequence[float],
        best: Int[Tensor, " cell"],
    ) -> Chosen:
        """The fit of each cell at penalty number `best`."""
        cell = torch.arange(len(best), device=best.device)
        return cls(weight[cell, :, best], bias[cell, best], torch.tensor(penalties, device=best.device)[best])


@dataclass(frozen=True)
class Axes:
    """Principal axes of the rows of each cell. A row x has coordinates (x - mean) @ basis.

    The number of axes is min(row, width): the weights of a penalised linear fit are in the span of the rows.
    variance: mean square of the coordinates over the rows; 0, with a zero column of `basis`, for empty axes.
    """

    mean: Float[Tensor, "cell width"]
    basis: Float[Tensor, "cell width axis"]
    variance: Float[Tensor, "cell axis"]


def spread(
    features: Float[Tensor, "sample cell region channel"],
) -> tuple[Float[Tensor, "cell channel"], Float[Tensor, "cell channel"]]:
    """Mean and standard deviation over samples and regions, per cell and channel, in fp32.

    The standard deviation of a channel that is constant up to rounding is exactly 0.
    """
    means, deviations = [], []
    for cell in features.unbind(1):  # fp64, one cell at a time, to recognise constant channels
        rows = cell.double()
        mean = rows.mean(dim=(0, 1))
        deviation = (rows - mean).square_().mean(dim=(0, 1)).sqrt()
        means.append(mean)
        deviations.append(torch.where(deviation > NEGLIGIBLE * mean.abs(), deviation, 0.0))
    return torch.stack(means).float(), torch.stack(deviations).float()


def standardise(
    features: Float[Tensor, "sample cell region channel"],
    mean: Float[Tensor, "cell channel"],
    std: Float[Tensor, "cell channel"],
) -> Float[Tensor, "cell sample region channel"]:
    """(features - mean) / std in fp32, with the axis cell first. Channels with std 0 become 0 for all data."""
    scale = torch.where(std > 0, 1 / std, 0.0)
    by_cell = features.transpose(0, 1).to(device=mean.device, dtype=torch.float32)
    return (by_cell - mean[:, None, None]).mul_(scale[:, None, None])


def design(x: Float[Tensor, "cell sample region channel"], form: str) -> Float[Tensor, "cell sample row width"]:
    """The design for a target of this form: one row per region, or one row with all regions concatenated."""
    return x.flatten(2)[:, :, None] if form == "problem" else x


@dataclass(frozen=True)
class Turned:
    """Rows of each cell in their principal axes, like `Axes`, but with the basis as a product of matrices.

    coordinates: of the rows, with the axis row last. factors: matrices whose product is the basis. When there are not
    more rows than columns, the basis is never computed: that would cost as much as the Gram matrix, and the coordinates
    follow from the decomposition.
    """

    mean: Float[Tensor, "cell width"]
    coordinates: Float[Tensor, "cell axis row"]
    variance: Float[Tensor, "cell axis"]
    factors: tuple[Tensor, ...]

    def into(self, weight: Float[Tensor, "cell width out"]) -> Float[Tensor, "cell axis out"]:
        """Weights of the columns as weights along the axes. The part that is orthogonal to all rows is lost."""
        for factor in self.factors:
            weight = factor.mT @ weight
        return weight

    def back(self, weight: Float[Tensor, "cell axis out"]) -> Float[Tensor, "cell width out"]:
        """Weights along the axes as weights of the columns."""
        for factor in reversed(self.factors):
            weight = factor @ weight
        return weight


def turned(rows: Float[Tensor, "cell row width"]) -> Turned:
    """The rows of each cell in their principal axes. All computations are in the precision of the rows."""
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
    """Principal axes of the rows of each cell, with the largest variance last.

    Computed from the Gram matrix when there are not more rows than columns. Results have the precision of the rows
    (fp32 or fp64). The decomposition is in fp64.
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
    """The number h for which the Hessian of the mean cross-entropy is at most h * (mean outer product of design rows).

    The Hessian of a softmax, diag(p) - p p', has no eigenvalue above 1/2 (Boehning 1992). For form `candidate` the loss
    is a mean over samples, and each sample has `regions` rows, so the bound is `regions` times as large.
    """
    return 0.5 * regions if form == "candidate" else 0.5


def row_sums(
    values: Float[Tensor, "cell *rows penalty out"], labels: Int[Tensor, "..."]
) -> tuple[Float[Tensor, "cell penalty"], Float[Tensor, "cell penalty"], Int[Tensor, ""]]:
    """Sum of the cross-entropy, number of right predictions, and number of rows, over the rows with a label.

    labels: of the rows, or [cell, *rows] where they differ between cells.
    """
    # rows last: softmax and maximum over few classes are faster if the rows are contiguous in memory
    by_row = values.float().flatten(1, -3).permute(0, 2, 3, 1)  # cell, penalty, out, row
    own = labels.ndim == values.ndim - 2  # labels of every cell
    label = (labels.flatten(1)[:, None] if own else labels.flatten()).expand(*by_row.shape[:2], -1)
    loss = F.cross_entropy(by_row.flatten(0, 1), label.flatten(0, 1), ignore_index=-1, reduction="none")
    largest = by_row.detach().max(dim=2).indices  # the first maximum, like argmax, but faster
    return loss.sum(dim=-1).unflatten(0, label.shape[:2]), (largest == label).sum(dim=-1).float(), (labels >= 0).sum()


def best_penalty(right: Num[Tensor, "cell penalty"], loss: Float[Tensor, "cell penalty"]) -> Int[Tensor, " cell"]:
    """Index of the penalty with the most right predictions of each cell. Ties: the one with the lower loss."""
    tied = right == right.amax(dim=1, keepdim=True)
    return loss.masked_fill(~tied, torch.inf).argmin(dim=1)


def blocks(cells: int, numbers: int) -> Iterator[slice]:
    """Slices of cells that are processed at once. numbers: number of fp64 values that a cell needs in memory."""
    size = max(1, CHUNK // max(1, numbers))
    return (slice(start, min(start + size, cells)) for start in range(0, cells, size))


def check_penalties(penalties: Sequence[float]) -> None:
    """Raises InputError unless there is at least one penalty and all are above 0."""
    if not penalties or min(penalties) <= 0:
        raise InputError(f"penalties={list(penalties)}: expected one or more above 0; at 0 a fit is not unique")


def _eigh(
    square: Float[Tensor, "cell size size"],
) -> tuple[Float[Tensor, "cell size"], Float[Tensor, "cell size size"]]:
    """Eigenvalues, in ascending order, and eigenvectors of symmetric matrices. CPU threads divide the matrices."""
    threads = min(torch.get_num_threads(), len(square)) if square.device.type == "cpu" else 1
    with one_thread(square.device):
        if threads < 2:
            energy, vectors = torch.linalg.eigh(square)
            return energy, vectors
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            parts = list(pool.map(torch.linalg.eigh, square.chunk(threads)))
    energy, vectors = (torch.cat(side) for side in zip(*parts, strict=True))
    return energy, vectors


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Limits torch to one thread on CPUs.

    More threads do not speed up LAPACK at these sizes. On busy cores they slow it down by a factor of 10 to 100.
    """
    threads = torch.get_num_threads()
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def affine(
    rows: Float[Tensor, "cell sample row width"],
    weight: Float[Tensor, "cell width *penalty out"],
    bias: Float[Tensor, "cell *penalty out"] | None,
) -> Float[Tensor, "cell sample row *penalty out"]:
    """rows @ weight + bias, with one matrix product per cell for all penalties.

    The product is computed transposed, with the rows contiguous in memory. There are many more rows than outputs, so
    this is faster, for the gradient too.
    """
    flat, columns = rows.flatten(1, 2).mT, weight.flatten(2).mT
    values = columns @ flat if bias is None else torch.baddbmm(bias.flatten(1)[:, :, None], columns, flat)
    return values.mT.unflatten(2, weight.shape[2:]).unflatten(1, rows.shape[1:3])


def classes_last(
    values: Float[Tensor, "cell sample row *penalty out"], form: str
) -> Float[Tensor, "cell sample *rest"]:
    """The output of `affine`, with the axis of the softmax last.

    candidate: `[cell, sample, *penalty, region]`; problem: `[cell, sample, *penalty, class]`;
    region: `[cell, sample, region, *penalty, class]`.
    """
    if form == "candidate":
        return values[..., 0].movedim(2, -1)
    return values[:, :, 0] if form == "problem" else values


def validated(
    x: Float[Tensor, "cell sample region channel"],
    labels: Int[Tensor, " *label"],
    form: str,
    weight: Float[Tensor, "cell width penalty out"],
    bias: Float[Tensor, "cell penalty out"],
    penalties: Sequence[float],
) -> Chosen:
    """The fit of each cell with the highest validation accuracy. Ties: the one with the lower cross-entropy.

    x, labels: standardised validation samples, label -1 for none; labels [cell, sample] may differ between cells.
    weight, bias: a fit for each of `penalties`.
    """
    loss, correct, _ = row_sums(classes_last(affine(design(x, form), weight, bias), form), labels.to(x.device))
    return Chosen.of(weight, bias, penalties, best_penalty(correct, loss))
