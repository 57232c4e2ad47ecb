"""Multinomial logistic probes to convergence: truncated Newton, batched over cells, with proof of it per cell.

Each step solves the Newton equations by preconditioned conjugate gradients, which need products with the
Hessian and never the Hessian, and is damped by a backtracking line search of its own in every cell (Nocedal and
Wright 2006, "Numerical Optimization", algorithms 3.1 and 7.1). The preconditioner is the curvature along the
principal axes of a cell's rows if the softmax were equally unsure everywhere: the bound of `solvers.curvature`
with the mean of p (1 - p) at the step in place of 1/2. Penalties are solved from the largest to the smallest, each
from the optimum of the one before. New here: cells that have converged leave the batch, both that of the steps and
that of the conjugate gradients, so a slow cell costs the others next to nothing.

The certificate of a fit is the duality gap: no weights whatever have an objective lower by more. Softmax and entropy
are conjugate, so probabilities q whose mean over the rows is that of the labels bound the optimum from below by
mean H(q) - |mean (q - y) x'|^2 / (2 lambda), and f(W, b) exceeds that by

    mean KL(q | p) + |lambda W + mean (q - y) x'|^2 / (2 lambda),    p = softmax(W x + b).

With the bias at its optimum q = p, and what is left is |gradient|^2 / (2 lambda); without a bias (candidates) always.
(Boyd and Vandenberghe 2004, "Convex Optimization", sections 5.5.1 and 9.1.2; how p becomes q is `_balanced`.)

Without a gap asked for, all of it is fp64. With one, the steps are fp32 as long as that suffices. Both are
deterministic. On a device without fp64 (Apple's mps) torch raises a TypeError: fit on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from cosprobe.cells import Cell
from cosprobe.errors import InputError
from cosprobe.probes.linalg import Divide, Fitted, Turned, blocks, check_penalties, design, turned
from cosprobe.tasks import Target

SUFFICIENT = 1e-4  # share of the decrease the slope promises that a step must bring
HALVINGS = 40
FINEST = 1e-12  # gradients below it are rounding, for standardised features
# Relative error of a mean cross-entropy: differences below it are not seen.
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-14}
PRODUCTS = 300  # products with the Hessian per step, at most; a step cut short still descends
SINGLE = 15  # steps in fp32, at most; what then still misses its gap goes on in fp64
PROMISED = 1e-3  # the relative gap within which a trained fit counts as converged
AIM = 1e-5  # the one that fits are finished to: hardly dearer, as the last steps gain most, and accuracies then agree
NAMED = 3  # fits of a target that a warning names


@dataclass(frozen=True)
class NewtonFit:
    """Logistic probes of one target, one setting per lambda, in the order given.

    weight, bias: on x, in its precision. gradient: largest absolute entry of the gradient where the fit ended,
    along the principal axes of the cell's rows, and by the bias. gap: bound of the share of the objective by which it
    exceeds the lowest there is; where steps in fp32 sufficed it is of that precision too, good to about 1e-6.
    converged: that what was asked for is met. iterations: Newton steps of the cell and lambda that took most.
    """

    weight: Float[Tensor, "cell width setting out"]
    bias: Float[Tensor, "cell setting out"]
    converged: Bool[Tensor, "cell setting"]
    gradient: Float[Tensor, "cell setting"]
    gap: Float[Tensor, "cell setting"]
    iterations: int


@dataclass(frozen=True)
class Certificate:
    """How the fits of one target ended. gap: as in `NewtonFit`."""

    converged: Bool[Tensor, "cell setting"]
    gap: Float[Tensor, "cell setting"]

    @classmethod
    def join(cls, parts: Sequence[Certificate]) -> Certificate:
        """Of chunks of cells together."""
        return cls(torch.cat([p.converged for p in parts]), torch.cat([p.gap for p in parts]))

    @property
    def tally(self) -> list[int]:
        """How many fits, of a cell and a penalty, converged; of how many."""
        return [int(self.converged.sum()), self.converged.numel()]


def fit_newton(
    x: Float[Tensor, "cell sample region channel"],
    labels: Int[Tensor, " sample *region"],
    target: Target,
    lambdas: Sequence[float],
    tolerance: float = 1e-6,
    iterations: int = 50,
    gap: float | None = None,
    start: tuple[Float[Tensor, "cell width setting out"], Float[Tensor, "cell setting out"]] | None = None,
) -> NewtonFit:
    """Minimises mean cross-entropy + lambda / 2 * |w|^2 over the n rows (candidate: samples) with a label; bias free.

    x is standardised; label -1 does not count. Decision values by form of the target: `candidate` w . x per
    region, softmax over regions, bias 0; `region` W x + b per region; `problem` W [x_1 .. x_R] + b. Both are
    centred over classes: the penalty wants it of weights, and the softmax does not see it in biases. A class that no
    row has gets a bias that falls until the tolerance is met (its optimum is minus infinity). Equals scikit-learn's
    `LogisticRegression` at C = 1 / (n lambda), for two classes C = 2 / (n lambda).

    A fit has converged when no entry of its gradient exceeds tolerance * min(1, lambda), or FINEST: the objective
    curves by lambda at least, so weights are then within about `tolerance` of the optimum (root mean square). With a
    `gap`, when its objective exceeds the optimum by that share of itself at most, which is several times faster; the
    tolerance then plays no part. At most `iterations` Newton steps per penalty; what has not converged then is
    returned as it is, and said so. start: weights and biases to begin with; else each penalty begins where the next
    larger one ended, the first at zero.
    Raises ValueError for labels that do not fit x or the target, no label at all, values that are not finite, and
    penalties, tolerance, gap or iterations that are not positive.
    """
    check_penalties(lambdas)
    if tolerance <= 0 or iterations < 1:
        raise InputError(f"tolerance={tolerance}, iterations={iterations}: expected both above 0")
    if gap is not None and gap <= 0:
        raise InputError(f"gap={gap}: expected a share of the objective above 0")
    _check_labels(x, labels, target)
    once = _once(x, labels, target)
    finest = [max(FINEST, tolerance * min(1.0, value)) for value in lambdas]
    parts = []
    for block in blocks(len(x), _numbers(x, target, once)):
        rows = _rows(x[block].double() if gap is None else x[block], labels, target)
        if not rows.isfinite().all():
            cell = block.start + int((~rows.flatten(1).isfinite().all(dim=1)).nonzero()[0])
            raise InputError(f"features of cell {cell}: not all finite; expected numbers, capture that cell again")
        begin = None if start is None else (start[0][block], start[1][block])
        if gap is None:
            parts.append(_path(rows, once, target.form, lambdas, finest, False, iterations, begin))
        else:
            parts.append(_to_gap(rows, once, target.form, lambdas, gap, iterations, begin))
    weight, bias, gradient, reached = (torch.cat([getattr(part, name) for part in parts]) for name in _ENDED)
    converged = reached <= gap if gap is not None else gradient <= gradient.new_tensor(finest)
    weight, bias, gradient, reached = (value.to(x.dtype) for value in (weight, bias, gradient, reached))
    return NewtonFit(weight, bias, converged, gradient, reached, max(part.steps for part in parts))


def relative_gaps(
    x: Float[Tensor, "cell sample region channel"],
    labels: Int[Tensor, " sample *region"],
    target: Target,
    lambdas: Sequence[float],
    weight: Float[Tensor, "cell width setting out"],
    bias: Float[Tensor, "cell setting out"],
) -> Float[Tensor, "cell setting"]:
    """Of probes fitted in any way: bound of the share of the objective of `fit_newton` by which it exceeds the
    optimum. Computed in the precision of x; fp32 sees gaps down to about 1e-7."""
    once, parts = _once(x, labels, target), []
    for block in blocks(len(x), 3 * x[0].numel()):
        rows = _rows(x[block], labels, target).mT
        if target.form != "candidate":
            rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
        found = []
        for setting, value in enumerate(lambdas):
            parameters = weight[block, :, setting].mT
            penalty = rows.new_full((rows.shape[1],), value)
            if target.form != "candidate":
                penalty[-1] = 0.0
                parameters = torch.cat([parameters, bias[block, setting, :, None]], dim=2)
            problem = _Problem(rows, rows[:, :, 0], penalty, once)
            logs = problem.values(parameters).log_softmax(dim=1)
            slope = problem.pull(logs.exp() - once, parameters)
            found.append(problem.gap(logs, parameters, slope) / problem.objective(logs, parameters))
        parts.append(torch.stack(found, dim=1))
    return torch.cat(parts)


def newton_targets(
    x: Float[Tensor, "cell sample region channel"],
    labels: dict[str, Int[Tensor, " sample *region"]],
    targets: Sequence[Target],
    lambdas: Sequence[float],
    divide: Divide,
) -> tuple[Fitted, dict[str, Certificate]]:
    """Weights and biases of every target, and how its fits ended.

    `divide(solve, cells)` hands out the cells to several processes.
    """
    solved = {t.name: divide(partial(_fit_part, x, labels[t.name], t, lambdas), len(x)) for t in targets}
    return _sorted(solved)


def finished(
    fitted: Fitted,
    x: Float[Tensor, "cell sample region channel"],
    labels: dict[str, Int[Tensor, " sample *region"]],
    targets: Sequence[Target],
    lambdas: Sequence[float],
    divide: Divide,
) -> tuple[Fitted, dict[str, Certificate]]:
    """The same probes, those of them that miss AIM brought there by Newton steps; and how each ended.

    One that then is within PROMISED counts as converged. `divide(solve, cells)` hands out the cells to processes.
    """
    solved = {}
    for target in targets:
        solve = partial(_finish_part, *fitted[target.name], x, labels[target.name], target, lambdas)
        solved[target.name] = divide(solve, len(x))
    return _sorted(solved)


def shortfall(kind: str, certificates: dict[str, Certificate], cells: Sequence[Cell], lambdas: Sequence[float]) -> str:
    """One line that names the targets, cells and penalties whose fits did not converge; empty when all did."""
    short = []
    for name, certificate in certificates.items():
        missed = (~certificate.converged).nonzero().tolist()
        if missed:
            done, of = certificate.tally
            first = "; ".join(f"{cells[cell]}, lambda {lambdas[setting]:g}" for cell, setting in missed[:NAMED])
            more = f"; {len(missed) - NAMED} more" if len(missed) > NAMED else ""
            short.append(f"{name} {of - done} of {of} ({first}{more})")
    if not short:
        return ""
    return f"{kind}: fits that did not converge: {', '.join(short)}; read these cells with care or raise probe.lambdas"


def _fit_part(x: Tensor, label: Tensor, target: Target, lambdas: Sequence[float], part: slice) -> tuple[Tensor, ...]:
    found = fit_newton(x[part], label, target, lambdas)
    return found.weight, found.bias, found.converged, found.gap


def _finish_part(
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    label: Tensor,
    target: Target,
    lambdas: Sequence[float],
    part: slice,
) -> tuple[Tensor, ...]:
    found = fit_newton(x[part], label, target, lambdas, gap=AIM, start=(weight[part], bias[part]))
    return found.weight, found.bias, found.gap <= PROMISED, found.gap


def _sorted(solved: dict[str, tuple[Tensor, ...]]) -> tuple[Fitted, dict[str, Certificate]]:
    fitted: Fitted = {name: (weight, bias) for name, (weight, bias, _, _) in solved.items()}
    return fitted, {name: Certificate(met, gap) for name, (_, _, met, gap) in solved.items()}


def _check_labels(x: Tensor, labels: Tensor, target: Target) -> None:
    shape = tuple(x.shape[1:3]) if target.form == "region" else (x.shape[1],)
    choices = x.shape[2] if target.form == "candidate" else target.classes
    if tuple(labels.shape) != shape:
        raise InputError(
            f"target {target.name!r}: labels{list(labels.shape)}, expected {list(shape)}; one per row of x"
        )
    if choices < 2:
        raise InputError(f"target {target.name!r}: {choices} choices, expected at least 2; pool by region")
    if not (labels >= 0).any():
        raise InputError(f"target {target.name!r}: no label among {len(labels)} samples, expected at least 1")
    if not -1 <= int(labels.min()) <= int(labels.max()) < choices:
        wrong = int(labels.min()) if int(labels.min()) < -1 else int(labels.max())
        raise InputError(f"target {target.name!r}: label {wrong}, expected -1 to {choices - 1}; -1 for none")


def _once(x: Tensor, labels: Tensor, target: Target) -> Float[Tensor, "choice group"]:
    """One-hot labels of the groups that have one. A group is what one softmax runs over: the regions of a sample, or
    the outputs of a row."""
    label = labels.flatten().to(x.device)
    choices = x.shape[2] if target.form == "candidate" else target.classes
    return F.one_hot(label[label >= 0], choices).to(x.dtype).T.contiguous()


def _rows(x: Tensor, labels: Tensor, target: Target) -> Float[Tensor, "cell row width"]:
    """What the groups with a label read; of candidates all of the first region, then all of the second, ..."""
    keep = labels.flatten().to(x.device) >= 0
    if target.form == "candidate":  # what all regions of a sample share cannot change their softmax
        own = x[:, keep]
        return (own - own.mean(dim=2, keepdim=True)).transpose(1, 2).flatten(1, 2)
    return design(x, target.form).flatten(1, 2)[:, keep]


def _numbers(x: Tensor, target: Target, once: Tensor) -> int:
    """How many numbers of fp64 a fit of one cell takes."""
    count = once.shape[1] * (x.shape[2] if target.form == "candidate" else 1)
    width = x[0, 0].numel() if target.form == "problem" else x.shape[3]
    return (5 * count + width) * min(count, width) + 2 * count * width + 8 * once.numel()


@dataclass(frozen=True)
class _Problem:
    """Logistic problems of some cells at one penalty; parameters are [cell, out, axis], the intercept an axis of ones.

    Rows are innermost in memory, of which there are many more than columns: products are faster both ways.
    """

    rows: Tensor  # cell axis row
    variance: Tensor  # cell axis
    penalty: Tensor  # axis; 0 for the intercept
    once: Tensor  # choice group: one-hot labels

    def take(self, keep: Tensor) -> _Problem:
        return _Problem(self.rows[keep], self.variance[keep], self.penalty, self.once)

    def values(self, parameters: Tensor) -> Tensor:
        return (parameters @ self.rows).reshape(len(self.rows), *self.once.shape)

    def objective(self, logs: Tensor, parameters: Tensor) -> Tensor:
        """From the logarithms of all probabilities."""
        return self._penalised(parameters) - (logs * self.once).sum(dim=(1, 2)) / self.once.shape[1]

    def loss(self, values: Tensor, parameters: Tensor) -> Tensor:
        fit = values.logsumexp(dim=1) - (values * self.once).sum(dim=1)
        return fit.mean(dim=1) + self._penalised(parameters)

    def _penalised(self, parameters: Tensor) -> Tensor:
        return (self.penalty * parameters.square()).sum(dim=(1, 2)) / 2

    def pull(self, per_choice: Tensor, parameters: Tensor) -> Tensor:
        """From derivatives by decision values to derivatives by parameters, the penalty's included."""
        flat = per_choice.reshape(len(self.rows), parameters.shape[1], -1)
        return flat @ self.rows.mT / self.once.shape[1] + self.penalty * parameters

    def gap(self, logs: Tensor, parameters: Tensor, slope: Tensor) -> Tensor:
        """By how much the objective exceeds its optimum, at most (see the top of this file)."""
        apart = 0.0
        if (self.penalty == 0).any():
            balanced = _balanced(logs.exp(), self.once)
            apart = (torch.special.xlogy(balanced, balanced) - balanced * logs).sum(dim=1).mean(dim=1).clamp(min=0)
            slope = self.pull(balanced - self.once, parameters)
        weights = self.penalty > 0
        return apart + (slope[..., weights].square() / (2 * self.penalty[weights])).sum(dim=(1, 2))

    def scale(self, chances: Tensor) -> Tensor:
        """About the diagonal of the Hessian; exact where the softmax is equally unsure everywhere."""
        unsure = (chances * (1 - chances)).mean(dim=2)
        choices = len(self.once)
        if self.rows.shape[2] != self.once.shape[1]:  # rows of a candidate target compete, and are centred by sample
            unsure = unsure.sum(dim=1, keepdim=True) * choices / (choices - 1)
        least = 1e-12 * unsure.amax(dim=1, keepdim=True) + torch.finfo(unsure.dtype).tiny
        return self.variance[:, None] * torch.maximum(unsure, least)[..., None] + self.penalty


def _balanced(
    chances: Float[Tensor, "cell choice group"], once: Float[Tensor, "choice group"]
) -> Float[Tensor, "cell choice group"]:
    """Probabilities near `chances` of which each choice gets exactly its share of the labels, as an optimal bias gives.

    Choices with more than their share give of it in proportion; every group hands what it so lost to the choices with
    less, by what these lack. A choice that no row has ends at 0.
    """
    wanted, given = once.mean(dim=1), chances.mean(dim=2)
    kept = torch.where(given > wanted, wanted / given, 1.0)
    lacking = wanted - kept * given
    share = lacking / lacking.sum(dim=1, keepdim=True).clamp(min=torch.finfo(chances.dtype).tiny)
    rest = chances * kept[..., None]
    return rest + share[..., None] * (chances * (1 - kept)[..., None]).sum(dim=1, keepdim=True)


@dataclass
class _Ended:
    """Where the fits of some cells ended, and the steps of the slowest."""

    weight: Float[Tensor, "cell width setting out"]
    bias: Float[Tensor, "cell setting out"]
    gradient: Float[Tensor, "cell setting"]
    gap: Float[Tensor, "cell setting"]
    steps: int = 0


_ENDED = ("weight", "bias", "gradient", "gap")


def _to_gap(
    rows: Float[Tensor, "cell row width"],
    once: Float[Tensor, "choice group"],
    form: str,
    lambdas: Sequence[float],
    gap: float,
    iterations: int,
    start: tuple[Tensor, Tensor] | None,
) -> _Ended:
    """In fp32; the cells that miss the gap at some penalty go on from there in fp64."""
    goals = [gap] * len(lambdas)
    ended = _path(rows.float(), once, form, lambdas, goals, True, min(SINGLE, iterations), start)
    for name in _ENDED:
        setattr(ended, name, getattr(ended, name).to(rows.dtype))
    left = (~(ended.gap <= gap)).any(dim=1).nonzero()[:, 0]
    if len(left) and iterations > SINGLE:
        begin = ended.weight[left], ended.bias[left]
        more = _path(rows[left].double(), once, form, lambdas, goals, True, iterations - SINGLE, begin)
        for name in _ENDED:
            getattr(ended, name)[left] = getattr(more, name).to(rows.dtype)
        ended.steps += more.steps
    return ended


def _path(
    rows: Float[Tensor, "cell row width"],
    once: Float[Tensor, "choice group"],
    form: str,
    lambdas: Sequence[float],
    goals: Sequence[float],
    by_gap: bool,
    iterations: int,
    start: tuple[Tensor, Tensor] | None,
) -> _Ended:
    """Every penalty, in the precision of the rows. goals: of each the relative gap, or else the gradient, to reach."""
    # the Gram matrix of few rows gives their coordinates to the root of its rounding only, so it is taken in fp64
    turn = turned(rows.double() if rows.shape[1] <= rows.shape[2] else rows)
    coordinates, variance = turn.coordinates.to(rows.dtype), turn.variance.to(rows.dtype)
    candidate, once = form == "candidate", once.to(rows.dtype)
    size, out = coordinates.shape[1], 1 if candidate else len(once)
    penalised = rows.new_ones(size)
    if not candidate:  # the same bias for every candidate would change nothing
        coordinates = torch.cat([coordinates, torch.ones_like(coordinates[:, :1])], dim=1)
        variance = torch.cat([variance, torch.ones_like(variance[:, :1])], dim=1)
        penalised = torch.cat([penalised, penalised.new_zeros(1)])
    shape = len(rows), len(lambdas)
    bias, gradient, gap = rows.new_zeros(*shape, out), rows.new_zeros(shape), rows.new_zeros(shape)
    ended = _Ended(rows.new_zeros(len(rows), rows.shape[2], len(lambdas), out), bias, gradient, gap)
    parameters = rows.new_zeros(len(rows), out, coordinates.shape[1])
    for setting in sorted(range(len(lambdas)), key=lambda i: -lambdas[i]):
        if start is not None:
            parameters = _into(turn, start[0][:, :, setting], None if candidate else start[1][:, setting])
        problem = _Problem(coordinates, variance, penalised * lambdas[setting], once)
        parameters, gradient[:, setting], gap[:, setting], steps = _minimise(
            problem, parameters.to(rows.dtype), goals[setting], by_gap, iterations
        )
        own = parameters.mT.to(turn.mean.dtype)
        if candidate:
            ended.weight[:, :, setting] = turn.back(own)
        else:  # the optimum is centred over classes, and what the softmax does not see may as well be exact
            own = own - own.mean(dim=2, keepdim=True)
            back = turn.back(own[:, :size])
            ended.weight[:, :, setting] = back
            bias[:, setting] = own[:, -1] - torch.einsum("cw,cwo->co", turn.mean, back)
        ended.steps = max(ended.steps, steps)
    return ended


def _into(turn: Turned, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Parameters of these weights, and biases if there are any."""
    weight = weight.to(turn.mean.dtype)
    parameters = turn.into(weight).mT
    if bias is None:
        return parameters
    level = bias + torch.einsum("cw,cwo->co", turn.mean, weight)
    return torch.cat([parameters, level[..., None]], dim=2)


def _minimise(
    problem: _Problem, start: Tensor, goal: float, by_gap: bool, iterations: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Where each cell ends, its gradient and relative gap there, and the steps of the slowest."""
    ended, size = start.clone(), start.new_zeros(len(start))
    gap = torch.zeros_like(size)
    live = torch.arange(len(start), device=start.device)
    here, values = start, problem.values(start)
    for step in range(iterations + 1):
        logs = values.log_softmax(dim=1)
        chances = logs.exp()
        slope = problem.pull(chances - problem.once, here)
        ended[live], size[live] = here, slope.abs().amax(dim=(1, 2))
        gap[live] = problem.gap(logs, here, slope) / problem.objective(logs, here)
        off = (gap if by_gap else size)[live]
        going = (off > goal).nonzero()[:, 0]
        if len(going) == 0 or step == iterations:
            break
        if len(going) < len(live):
            live, problem, off = live[going], problem.take(going), off[going]
            here, values, chances, slope = here[going], values[going], chances[going], slope[going]
        forcing = off.sqrt().clamp(max=0.1)
        if by_gap:  # a step that is to end within the goal need not be closer to Newton's
            forcing = torch.maximum(forcing, (goal / off).sqrt() / 2)
        direction = _conjugate_gradients(problem, chances, slope, forcing)
        change = problem.values(direction)
        length = _search(problem, here, values, direction, change, (slope * direction).sum(dim=(1, 2)))
        here, values = here + length * direction, values + length * change
    return ended, size, gap, step


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
        spread = chances * (seen - (chances * seen).sum(dim=1, keepdim=True))
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
        enough = after <= before + SUFFICIENT * length[:, 0, 0] * slope + ROUNDING[values.dtype] * before.abs()
        if enough.all():
            break
        length = torch.where(enough[:, None, None], length, length / 2)
    return length
