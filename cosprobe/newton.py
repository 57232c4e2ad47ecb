"""Multinomial logistic probes to convergence: truncated Newton, batched over cells, with proof of it per cell.

Each step solves the Newton equations by preconditioned conjugate gradients, which need products with the
Hessian and never the Hessian, and is damped by a backtracking line search of its own in every cell (Nocedal and
Wright 2006, "Numerical Optimization", algorithms 3.1 and 7.1). The preconditioner is the curvature along the
principal axes of a cell's rows if the softmax were equally unsure everywhere: the bound of `solvers.curvature`
with the mean of p (1 - p) at the step in place of 1/2. Penalties are solved from the largest to the smallest, each
from the optimum of the one before. New here: cells that have converged leave the batch, both that of the steps and
that of the conjugate gradients, so a slow cell costs the others next to nothing.

All of it is fp64 and deterministic. On a device without fp64 (Apple's mps) torch raises a TypeError: fit on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from cosprobe.solvers import Divide, Fitted, blocks, check_penalties, design, principal_axes
from cosprobe.tasks import Target

Tally = dict[str, list[int]]  # per target: how many fits, of a cell and a penalty, converged; of how many

SUFFICIENT = 1e-4  # share of the decrease the slope promises that a step must bring
HALVINGS = 40
FINEST = 1e-12  # gradients below it are rounding, for standardised features
ROUNDING = 1e-14  # relative error of a mean cross-entropy: differences below it are not seen
PRODUCTS = 300  # products with the Hessian per step, at most; a step cut short still descends


@dataclass(frozen=True)
class NewtonFit:
    """Logistic probes of one target, one setting per lambda, in the order given.

    weight, bias: on x, in its precision. gradient: largest absolute entry of the gradient where the fit ended,
    along the principal axes of the cell's rows, and by the bias. converged: that it is within what was asked.
    iterations: Newton steps of the cell and lambda that took most.
    """

    weight: Float[Tensor, "cell width setting out"]
    bias: Float[Tensor, "cell setting out"]
    converged: Bool[Tensor, "cell setting"]
    gradient: Float[Tensor, "cell setting"]
    iterations: int


def fit_newton(
    x: Float[Tensor, "cell sample region channel"],
    labels: Int[Tensor, " sample *region"],
    target: Target,
    lambdas: Sequence[float],
    tolerance: float = 1e-6,
    iterations: int = 50,
) -> NewtonFit:
    """Minimises mean cross-entropy + lambda / 2 * |w|^2 over the n rows (candidate: samples) with a label; bias free.

    x is standardised; label -1 does not count. Decision values by form of the target: `candidate` w . x per
    region, softmax over regions, bias 0; `region` W x + b per region; `problem` W [x_1 .. x_R] + b. Both are
    centred over classes: the penalty wants it of weights, and the softmax does not see it in biases. A class that no
    row has gets a bias that falls until the tolerance is met (its optimum is minus infinity). Equals scikit-learn's
    `LogisticRegression` at C = 1 / (n lambda), for two classes C = 2 / (n lambda).

    A fit has converged when no entry of its gradient exceeds tolerance * min(1, lambda), or FINEST: the objective
    curves by lambda at least, so weights are then within about `tolerance` of the optimum (root mean square). At most
    `iterations` Newton steps per penalty; what has not converged then is returned as it is, and said so.
    Raises ValueError for labels that do not fit x or the target, no label at all, values that are not finite, and
    penalties, tolerance or iterations that are not positive.
    """
    check_penalties(lambdas)
    if tolerance <= 0 or iterations < 1:
        raise ValueError(f"tolerance={tolerance}, iterations={iterations}: expected both above 0")
    _check_labels(x, labels, target)
    candidate = target.form == "candidate"
    rows = design(x, target.form).flatten(1, 2) if target.form == "region" else design(x, target.form)
    label = labels.flatten().to(x.device)
    keep = label >= 0
    count, width = int(keep.sum()) * (x.shape[2] if candidate else 1), rows.shape[-1]
    parts = []
    for block in blocks(len(x), (5 * count + width) * min(count, width) + 2 * count * width):
        own = rows[block][:, keep].double()
        if not own.isfinite().all():
            cell = block.start + int((~own.flatten(1).isfinite().all(dim=1)).nonzero()[0])
            raise ValueError(f"features of cell {cell}: not all finite; expected numbers, capture that cell again")
        if candidate:  # what all regions of a sample share cannot change their softmax
            own = own - own.mean(dim=2, keepdim=True)
        parts.append(_path(own.flatten(1, -2), label[keep], target, lambdas, tolerance, iterations))
    weights, biases, gradients, steps = zip(*parts, strict=True)
    weight, bias, gradient = torch.cat(weights), torch.cat(biases), torch.cat(gradients)
    converged = gradient <= gradient.new_tensor([_goal(tolerance, value) for value in lambdas])
    return NewtonFit(weight.to(x.dtype), bias.to(x.dtype), converged, gradient.to(x.dtype), max(steps))


def newton_targets(
    x: Float[Tensor, "cell sample region channel"],
    labels: dict[str, Int[Tensor, " sample *region"]],
    targets: Sequence[Target],
    lambdas: Sequence[float],
    divide: Divide,
) -> tuple[Fitted, Tally]:
    """Weights and biases of every target, and how many of its fits converged.

    `divide(solve, cells)` hands out the cells to several processes.
    """
    fitted: Fitted = {}
    converged: Tally = {}
    for target in targets:
        solve = partial(_fit_part, x, labels[target.name], target, lambdas)
        weight, bias, done = divide(solve, len(x))
        fitted[target.name], converged[target.name] = (weight, bias), [int(done.sum()), done.numel()]
    return fitted, converged


def add_tallies(one: Tally, other: Tally) -> Tally:
    """Of two chunks of cells together."""
    return {name: [a + b for a, b in zip(one.get(name, [0, 0]), tally, strict=True)] for name, tally in other.items()}


def shortfall(converged: Tally) -> str:
    """One line that names the targets some of whose fits did not converge; empty when all did."""
    short = [f"{name} {of - done} of {of}" for name, (done, of) in converged.items() if done < of]
    if not short:
        return ""
    return f"newton: fits that did not converge: {', '.join(short)}; read these cells with care or raise probe.lambdas"


def _fit_part(x: Tensor, label: Tensor, target: Target, lambdas: Sequence[float], part: slice) -> tuple[Tensor, ...]:
    found = fit_newton(x[part], label, target, lambdas)
    return found.weight, found.bias, found.converged


def _goal(tolerance: float, value: float) -> float:
    return max(FINEST, tolerance * min(1.0, value))


def _check_labels(x: Tensor, labels: Tensor, target: Target) -> None:
    shape = tuple(x.shape[1:3]) if target.form == "region" else (x.shape[1],)
    choices = x.shape[2] if target.form == "candidate" else target.classes
    if tuple(labels.shape) != shape:
        raise ValueError(
            f"target {target.name!r}: labels{list(labels.shape)}, expected {list(shape)}; one per row of x"
        )
    if choices < 2:
        raise ValueError(f"target {target.name!r}: {choices} choices, expected at least 2; pool by region")
    if not (labels >= 0).any():
        raise ValueError(f"target {target.name!r}: no label among {len(labels)} samples, expected at least 1")
    if not -1 <= int(labels.min()) <= int(labels.max()) < choices:
        wrong = int(labels.min()) if int(labels.min()) < -1 else int(labels.max())
        raise ValueError(f"target {target.name!r}: label {wrong}, expected -1 to {choices - 1}; -1 for none")


@dataclass(frozen=True)
class _Problem:
    """Logistic problems of some cells at one penalty; parameters are [cell, axis, out], the intercept an axis of ones.

    A group is what one softmax runs over: the regions of a sample, or the outputs of a row.
    """

    rows: Tensor  # cell row axis
    variance: Tensor  # cell axis
    penalty: Tensor  # axis
    once: Tensor  # group choice: one-hot labels

    def take(self, keep: Tensor) -> _Problem:
        return _Problem(self.rows[keep], self.variance[keep], self.penalty, self.once)

    def values(self, parameters: Tensor) -> Tensor:
        return (self.rows @ parameters).reshape(len(self.rows), *self.once.shape)

    def loss(self, values: Tensor, parameters: Tensor) -> Tensor:
        fit = (values.logsumexp(dim=2) - (values * self.once).sum(dim=2)).mean(dim=1)
        return fit + (self.penalty[:, None] * parameters.square()).sum(dim=(1, 2)) / 2

    def pull(self, per_choice: Tensor, parameters: Tensor) -> Tensor:
        """From derivatives by decision values to derivatives by parameters, the penalty's included."""
        flat = per_choice.reshape(*self.rows.shape[:2], -1)
        return self.rows.mT @ flat / len(self.once) + self.penalty[:, None] * parameters

    def scale(self, chances: Tensor) -> Tensor:
        """About the diagonal of the Hessian; exact where the softmax is equally unsure everywhere."""
        unsure = (chances * (1 - chances)).mean(dim=1)
        choices = self.once.shape[1]
        if self.rows.shape[1] != len(self.once):  # rows of a candidate target compete, and are centred by sample
            unsure = unsure.sum(dim=1, keepdim=True) * choices / (choices - 1)
        least = 1e-12 * unsure.amax(dim=1, keepdim=True) + torch.finfo(unsure.dtype).tiny
        return self.variance[..., None] * torch.maximum(unsure, least)[:, None] + self.penalty[:, None]


def _path(
    rows: Float[Tensor, "cell row width"],
    label: Int[Tensor, " group"],
    target: Target,
    lambdas: Sequence[float],
    tolerance: float,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Weight, bias and gradient of every penalty, and the most steps any took."""
    axes = principal_axes(rows)
    coordinates, variance = (rows - axes.mean[:, None]) @ axes.basis, axes.variance
    candidate = target.form == "candidate"
    size = coordinates.shape[2]
    out, choices = (1, rows.shape[1] // len(label)) if candidate else (target.classes, target.classes)
    once = F.one_hot(label, choices).to(rows.dtype)
    penalised = rows.new_ones(size)
    if not candidate:  # the same bias for every candidate would change nothing
        coordinates = torch.cat([coordinates, torch.ones_like(coordinates[..., :1])], dim=2)
        variance = torch.cat([variance, torch.ones_like(variance[:, :1])], dim=1)
        penalised = torch.cat([penalised, penalised.new_zeros(1)])
    weight = rows.new_zeros(len(rows), rows.shape[2], len(lambdas), out)
    bias, gradient = rows.new_zeros(len(rows), len(lambdas), out), rows.new_zeros(len(rows), len(lambdas))
    parameters, most = rows.new_zeros(len(rows), coordinates.shape[2], out), 0
    for setting in sorted(range(len(lambdas)), key=lambda i: -lambdas[i]):
        problem = _Problem(coordinates, variance, penalised * lambdas[setting], once)
        parameters, gradient[:, setting], steps = _minimise(
            problem, parameters, _goal(tolerance, lambdas[setting]), iterations
        )
        if candidate:
            weight[:, :, setting] = axes.basis @ parameters
        else:  # the optimum is centred over classes, and what the softmax does not see may as well be exact
            centred = parameters - parameters.mean(dim=2, keepdim=True)
            weight[:, :, setting] = axes.basis @ centred[:, :size]
            bias[:, setting] = centred[:, -1] - torch.einsum("cw,cwo->co", axes.mean, weight[:, :, setting])
        most = max(most, steps)
    return weight, bias, gradient, most


def _minimise(problem: _Problem, start: Tensor, tolerance: float, iterations: int) -> tuple[Tensor, Tensor, int]:
    """Where each cell ends, its gradient there, and the steps of the slowest."""
    ended, size = start.clone(), start.new_zeros(len(start))
    live = torch.arange(len(start), device=start.device)
    here, values = start, problem.values(start)
    for step in range(iterations + 1):
        chances = values.softmax(dim=2)
        slope = problem.pull(chances - problem.once, here)
        ended[live], size[live] = here, slope.abs().amax(dim=(1, 2))
        going = (size[live] > tolerance).nonzero()[:, 0]
        if len(going) == 0 or step == iterations:
            break
        if len(going) < len(live):
            live, problem = live[going], problem.take(going)
            here, values, chances, slope = here[going], values[going], chances[going], slope[going]
        forcing = size[live].sqrt().clamp(max=0.1)
        direction = _conjugate_gradients(problem, chances, slope, forcing)
        change = problem.values(direction)
        length = _search(problem, here, values, direction, change, (slope * direction).sum(dim=(1, 2)))
        here, values = here + length * direction, values + length * change
    return ended, size, step


def _conjugate_gradients(
    problem: _Problem,
    chances: Tensor,
    slope: Tensor,
    forcing: Tensor,
) -> Tensor:
    """Newton's direction -H^-1 slope of each cell, up to the share `forcing` of its first residual.

    A cell that is there moves no more; when half of the cells are, they leave the batch.
    """
    result = torch.zeros_like(slope)
    live = torch.arange(len(slope), device=slope.device)
    scale = problem.scale(chances)
    x, residual = torch.zeros_like(slope), -slope
    step = residual / scale
    energy = (residual * step).sum(dim=(1, 2))
    goal = forcing.square() * energy
    moving = energy > goal
    for _ in range(min(PRODUCTS, 2 * slope[0].numel())):
        if int(moving.sum()) * 2 <= len(live):
            result[live] = x
            keep = moving.nonzero()[:, 0]
            if len(keep) == 0:
                return result
            problem, live, moving = problem.take(keep), live[keep], moving[keep]
            chances, scale, x, residual = chances[keep], scale[keep], x[keep], residual[keep]
            step, energy, goal = step[keep], energy[keep], goal[keep]
        seen = problem.values(step)
        spread = chances * (seen - (chances * seen).sum(dim=2, keepdim=True))
        bent = problem.pull(spread, step)
        share = torch.where(moving, energy / (step * bent).sum(dim=(1, 2)), 0.0)[:, None, None]
        x, residual = x + share * step, residual - share * bent
        scaled = residual / scale
        left = torch.where(moving, (residual * scaled).sum(dim=(1, 2)), energy)
        step = torch.where(moving[:, None, None], scaled + (left / energy)[:, None, None] * step, step)
        energy, moving = left, moving & (left > goal)
    result[live] = x
    return result


def _search(
    problem: _Problem,
    here: Tensor,
    values: Tensor,
    direction: Tensor,
    change: Tensor,
    slope: Tensor,
) -> Tensor:
    """The first of 1, 1/2, 1/4, ... that lowers each cell's loss enough; no product with the rows is needed."""
    length = torch.ones_like(slope)[:, None, None]
    before = problem.loss(values, here)
    for _ in range(HALVINGS):
        after = problem.loss(values + length * change, here + length * direction)
        enough = after <= before + SUFFICIENT * length[:, 0, 0] * slope + ROUNDING * before.abs()
        if enough.all():
            break
        length = torch.where(enough[:, None, None], length, length / 2)
    return length
