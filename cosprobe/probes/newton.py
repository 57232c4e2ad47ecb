"""Multinomial logistic regression to convergence: truncated Newton, batched over cells, with a certificate per fit.

Each step solves the Newton equations with preconditioned conjugate gradients, which need products with the Hessian but
not the Hessian itself. A backtracking line search, separate for every cell, sets the length of the step (Nocedal and
Wright 2006, "Numerical Optimization", algorithms 3.1 and 7.1). The preconditioner is diagonal along the principal axes
of the rows of a cell. It is the bound of `linalg.curvature` with the current mean of p (1 - p) in place of 1/2, which
is the curvature if p (1 - p) is the same in all rows. Penalties are solved from the largest to the smallest, each
starting at the optimum of the one before. Departure: cells that have converged are removed from the batch, in the
Newton steps and in the conjugate gradients, so a slow cell costs the others little time.

The certificate of a fit is its duality gap, an upper bound of f(W, b) minus the minimum of the objective f. Softmax and
entropy are conjugate. For all probabilities q whose mean over the rows equals the mean of the labels y, the minimum is
at least mean H(q) - |mean (q - y) x'|^2 / (2 lambda). f(W, b) exceeds this lower bound by

    mean KL(q | p) + |lambda W + mean (q - y) x'|^2 / (2 lambda),    p = softmax(W x + b).

If the bias is optimal, or there is none (form `candidate`), q = p is allowed and the gap is |gradient|^2 / (2 lambda).
Otherwise `_balanced` computes q from p. (Boyd and Vandenberghe 2004, "Convex Optimization", sections 5.5.1 and 9.1.2.)

Without the argument `gap`, all computations are in fp64. With it, steps are in fp32 until that precision is too low.
Both are deterministic. On a device without fp64 (Apple's mps) torch raises a TypeError; fit on the CPU there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from cosprobe.cells import Cell
from cosprobe.errors import InputError
from cosprobe.probes.linalg import Divide, Fitted, Parts, Turned, blocks, check_penalties, design, turned
from cosprobe.tasks import Target

SUFFICIENT = 1e-4  # smallest decrease of a step, as a share of step length * slope
HALVINGS = 40  # most halvings of a step in the line search
FINEST = 1e-12  # smaller gradients are rounding errors, for standardised features
# Relative rounding error of a mean cross-entropy; smaller differences have no meaning.
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-14}
PRODUCTS = 300  # most products with the Hessian per step; a step that is stopped here still descends
SINGLE = 15  # most steps in fp32; fits that miss their gap after them continue in fp64
PROMISED = 1e-3  # largest relative gap of a trained fit that counts as converged
# Relative gap at which `finished` stops. Little slower than PROMISED, as the last steps gain most, and accuracies agree
# with those of complete fits.
AIM = 1e-5
NAMED = 3  # most fits of a target that `shortfall` lists


@dataclass(frozen=True)
class NewtonFit:
    """Logistic probes of one target, with one fit per penalty, in the order of the penalties.

    weight, bias: for features x, in the precision of x. converged: whether the fit reached `tolerance` or `gap`.
    gradient: largest absolute entry of the final gradient, along the principal axes of the rows and for the bias.
    gap: relative duality gap, an upper bound of (f - minimum of f) / f for the objective f. After steps in fp32 alone
    it is accurate to about 1e-6. iterations: largest number of Newton steps of a cell and penalty.
    """

    weight: Float[Tensor, "cell width penalty out"]
    bias: Float[Tensor, "cell penalty out"]
    converged: Bool[Tensor, "cell penalty"]
    gradient: Float[Tensor, "cell penalty"]
    gap: Float[Tensor, "cell penalty"]
    iterations: int


@dataclass(frozen=True)
class Certificate:
    """Convergence of the fits of one target. gap: relative duality gap, see `NewtonFit`."""

    converged: Bool[Tensor, "cell penalty"]
    gap: Float[Tensor, "cell penalty"]

    @classmethod
    def join(cls, parts: Sequence[Certificate]) -> Certificate:
        """The certificate of all cells, from those of chunks of cells."""
        return cls(torch.cat([p.converged for p in parts]), torch.cat([p.gap for p in parts]))

    @property
    def tally(self) -> tuple[int, int]:
        """Number of converged fits and number of all fits. There is a fit per cell and penalty."""
        return int(self.converged.sum()), self.converged.numel()


def fit_newton(
    x: Float[Tensor, "cell sample region channel"],
    labels: Int[Tensor, " *label"],
    target: Target,
    penalties: Sequence[float],
    tolerance: float = 1e-6,
    iterations: int = 50,
    gap: float | None = None,
    start: tuple[Float[Tensor, "cell width penalty out"], Float[Tensor, "cell penalty out"]] | None = None,
) -> NewtonFit:
    """Minimises mean cross-entropy + `lambda / 2 * |w|^2` over the n rows (form `candidate`: samples) with a label.

    The bias is not penalised. x: standardised. labels: -1 for none; [sample], for form `region` [sample, region]. For
    form `problem` they may differ between cells, [cell, sample]; then every sample needs one.
    Decision values by form of the target: `candidate`: w . x per region, softmax over regions, bias 0. `region`:
    W x + b per region. `problem`: W [x_1 .. x_R] + b per sample. Weights and biases have mean 0 over the classes: this
    is optimal for weights, and the softmax does not depend on the mean of the biases. A class without rows gets a bias
    that decreases until the fit has converged (its optimum is minus infinity).
    Equals scikit-learn's `LogisticRegression` with C = 1 / (n lambda), for two classes C = 2 / (n lambda).

    Without `gap`, a fit has converged when no entry of its gradient exceeds max(FINEST, tolerance * min(1, lambda)).
    The curvature of the objective is at least lambda, so the weights are then within about `tolerance` of the optimum
    (root mean square). With `gap`, a fit has converged when its relative duality gap is at most `gap`; `tolerance` is
    then ignored. This is several times faster.
    iterations: most Newton steps per penalty. Fits that have not converged by then are returned with `converged` False.
    start: initial weights and biases. Default: each penalty starts at the result of the next larger one, the first
    at 0.
    Raises InputError for labels that do not fit x or the target, no labels, features that are not finite, and
    penalties, tolerance, gap or iterations that are not above 0.
    """
    check_penalties(penalties)
    if tolerance <= 0 or iterations < 1:
        raise InputError(f"tolerance={tolerance}, iterations={iterations}: expected both to be above 0")
    if gap is not None and gap <= 0:
        raise InputError(f"gap={gap}: expected a relative gap above 0")
    _check_labels(x, labels, target)
    onehot = _onehot(x, labels, target)
    finest = [max(FINEST, tolerance * min(1.0, value)) for value in penalties]
    parts = []
    for block in blocks(len(x), _numbers(x, target, onehot)):
        rows = _rows(x[block].double() if gap is None else x[block], labels, target)
        if not rows.isfinite().all():
            cell = block.start + int((~rows.flatten(1).isfinite().all(dim=1)).nonzero()[0])
            raise InputError(f"features of cell {cell}: not all finite; expected numbers, capture this cell again")
        begin = None if start is None else (start[0][block], start[1][block])
        wanted = _of_cells(onehot, block)
        if gap is None:
            parts.append(_path(rows, wanted, target.form, penalties, _Goal(finest, False, iterations), begin))
        else:
            goal = _Goal([gap] * len(penalties), True, iterations)
            parts.append(_to_gap(rows, wanted, target.form, penalties, goal, begin))
    weight, bias, gradient, reached = (torch.cat([getattr(part, name) for part in parts]) for name in _ENDED)
    converged = reached <= gap if gap is not None else gradient <= gradient.new_tensor(finest)
    weight, bias, gradient, reached = (value.to(x.dtype) for value in (weight, bias, gradient, reached))
    return NewtonFit(weight, bias, converged, gradient, reached, max(part.steps for part in parts))


def relative_gaps(
    x: Float[Tensor, "cell sample region channel"],
    labels: Int[Tensor, " sample *region"],
    target: Target,
    penalties: Sequence[float],
    weight: Float[Tensor, "cell width penalty out"],
    bias: Float[Tensor, "cell penalty out"],
) -> Float[Tensor, "cell penalty"]:
    """The relative duality gap of any weights and biases, for the objective of `fit_newton`.

    It is an upper bound of (f - minimum of f) / f. Computed in the precision of x; in fp32 it is meaningful down to
    about 1e-7.
    """
    onehot, parts = _onehot(x, labels, target), []
    for block in blocks(len(x), 3 * x[0].numel()):
        rows = _rows(x[block], labels, target).mT
        if target.form != "candidate":
            rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
        found = []
        for at, value in enumerate(penalties):
            parameters = weight[block, :, at].mT
            penalty = rows.new_full((rows.shape[1],), value)
            if target.form != "candidate":
                penalty[-1] = 0.0
                parameters = torch.cat([parameters, bias[block, at, :, None]], dim=2)
            problem = _Problem(rows, rows[:, :, 0], penalty, _of_cells(onehot, block))
            logs = problem.values(parameters).log_softmax(dim=1)
            slope = problem.pull(logs.exp() - problem.onehot, parameters)
            found.append(problem.gap(logs, parameters, slope) / problem.objective(logs, parameters))
        parts.append(torch.stack(found, dim=1))
    return torch.cat(parts)


def newton_targets(
    x: Float[Tensor, "cell sample region channel"],
    labels: dict[str, Int[Tensor, " sample *region"]],
    targets: Sequence[Target],
    penalties: Sequence[float],
) -> tuple[Fitted, dict[str, Certificate]]:
    """Fits every target with `fit_newton`. Returns weights and biases, and the certificates, by name of the target."""
    fits = {target.name: fit_newton(x, labels[target.name], target, penalties) for target in targets}
    return _sorted({name: _parts(fit, fit.converged) for name, fit in fits.items()})


def finished(
    fitted: Fitted,
    x: Float[Tensor, "cell sample region channel"],
    labels: dict[str, Int[Tensor, " sample *region"]],
    targets: Sequence[Target],
    penalties: Sequence[float],
    divide: Divide,
) -> tuple[Fitted, dict[str, Certificate]]:
    """Continues fits with Newton steps until their relative gap is at most AIM. Returns probes and certificates.

    Fits with a relative gap of at most PROMISED count as converged. divide(solve, cells): divides the cells
    between processes, for example `shared`.
    """

    def solve(target: Target, part: slice) -> Parts:
        weight, bias = fitted[target.name]
        start = weight[part], bias[part]
        fit = fit_newton(x[part], labels[target.name], target, penalties, gap=AIM, start=start)
        return _parts(fit, fit.gap <= PROMISED)

    return _sorted({target.name: divide(partial(solve, target), len(x)) for target in targets})


def shortfall(
    kind: str, certificates: dict[str, Certificate], cells: Sequence[Cell], penalties: Sequence[float]
) -> str:
    """One line with the targets, cells and penalties of fits that did not converge; empty if all converged."""
    short = []
    for name, certificate in certificates.items():
        missed = (~certificate.converged).nonzero().tolist()
        if missed:
            done, of = certificate.tally
            first = "; ".join(f"{cells[cell]}, penalty {penalties[at]:g}" for cell, at in missed[:NAMED])
            more = f"; {len(missed) - NAMED} more" if len(missed) > NAMED else ""
            short.append(f"{name} {of - done} of {of} ({first}{more})")
    if not short:
        return ""
    return (
        f"{kind}: fits that did not converge: {', '.join(short)}; do not rely on these cells, or raise probe.penalties"
    )


def _parts(fit: NewtonFit, converged: Bool[Tensor, "cell penalty"]) -> Parts:
    """The results of a fit by name, with the axis cell first."""
    return {"weight": fit.weight, "bias": fit.bias, "converged": converged, "gap": fit.gap}


def _sorted(solved: dict[str, Parts]) -> tuple[Fitted, dict[str, Certificate]]:
    """Separates probes and certificates."""
    fitted: Fitted = {name: (one["weight"], one["bias"]) for name, one in solved.items()}
    return fitted, {name: Certificate(one["converged"], one["gap"]) for name, one in solved.items()}


def _check_labels(x: Tensor, labels: Tensor, target: Target) -> None:
    """Raises InputError for labels that do not fit x or the target."""
    shape = tuple(x.shape[1:3]) if target.form == "region" else (x.shape[1],)
    choices = x.shape[2] if target.form == "candidate" else target.classes
    by_cell = _by_cell(labels, target) and tuple(labels.shape) == tuple(x.shape[:2])
    if by_cell and (labels < 0).any():
        raise InputError(f"target {target.name!r}: labels of every cell, some of them -1; expected 0 or more")
    if tuple(labels.shape) != shape and not by_cell:
        raise InputError(
            f"target {target.name!r}: labels{list(labels.shape)}, expected {list(shape)}, one label per row of x"
        )
    if choices < 2:
        raise InputError(f"target {target.name!r}: {choices} choices, expected at least 2; set probe.pooling=region")
    if not (labels >= 0).any():
        raise InputError(f"target {target.name!r}: no label among {len(labels)} samples, expected at least 1")
    if not -1 <= int(labels.min()) <= int(labels.max()) < choices:
        wrong = int(labels.min()) if int(labels.min()) < -1 else int(labels.max())
        raise InputError(f"target {target.name!r}: label {wrong}, expected -1 to {choices - 1} (-1: no label)")


def _by_cell(labels: Tensor, target: Target) -> bool:
    """Whether labels may differ between cells."""
    return target.form == "problem" and labels.ndim == 2


def _onehot(x: Tensor, labels: Tensor, target: Target) -> Float[Tensor, "_cell choice group"]:
    """One-hot labels of the groups with a label: of every cell, or once where all cells have the same.

    A group has one softmax: over the regions of a sample (form `candidate`), or over the outputs of a row.
    """
    label = labels.to(x.device) if _by_cell(labels, target) else labels.flatten()[None].to(x.device)
    choices = x.shape[2] if target.form == "candidate" else target.classes
    kept = label if _by_cell(labels, target) else label[label >= 0][None]
    return F.one_hot(kept, choices).to(x.dtype).mT.contiguous()


def _of_cells(
    onehot: Float[Tensor, "_cell choice group"], cells: slice | Tensor
) -> Float[Tensor, "_part choice group"]:
    """The labels of some cells."""
    return onehot[cells] if len(onehot) > 1 else onehot


def _rows(x: Tensor, labels: Tensor, target: Target) -> Float[Tensor, "cell row width"]:
    """The design rows of the groups with a label. Form `candidate`: all of the first region, then of the second, ..."""
    if _by_cell(labels, target):
        return design(x, target.form).flatten(1, 2)
    keep = labels.flatten().to(x.device) >= 0
    if target.form == "candidate":  # the mean over the regions of a sample has no effect on their softmax
        kept = x[:, keep]
        return (kept - kept.mean(dim=2, keepdim=True)).transpose(1, 2).flatten(1, 2)
    return design(x, target.form).flatten(1, 2)[:, keep]


def _numbers(x: Tensor, target: Target, onehot: Tensor) -> int:
    """Number of fp64 values that the fit of one cell needs in memory."""
    count = onehot.shape[2] * (x.shape[2] if target.form == "candidate" else 1)
    width = x[0, 0].numel() if target.form == "problem" else x.shape[3]
    return (5 * count + width) * min(count, width) + 2 * count * width + 8 * onehot[0].numel()


@dataclass(frozen=True)
class _Problem:
    """The objectives of some cells at one penalty.

    Parameters are [cell, out, axis]. The intercept is an axis of ones. Rows are contiguous in memory: there are many
    more rows than columns, and products in both directions are faster this way.
    """

    rows: Tensor  # cell axis row
    variance: Tensor  # cell axis
    penalty: Tensor  # axis; 0 for the intercept
    onehot: Tensor  # cell choice group: one-hot labels; a single cell where all cells have the same

    def take(self, keep: Tensor) -> _Problem:
        """The objectives of some of the cells."""
        return _Problem(self.rows[keep], self.variance[keep], self.penalty, _of_cells(self.onehot, keep))

    def values(self, parameters: Tensor) -> Tensor:
        """Decision values [cell, choice, group]."""
        return (parameters @ self.rows).reshape(len(self.rows), *self.onehot.shape[1:])

    def objective(self, logs: Tensor, parameters: Tensor) -> Tensor:
        """The objective, from the logarithms of all probabilities."""
        return self._penalised(parameters) - (logs * self.onehot).sum(dim=(1, 2)) / self.onehot.shape[2]

    def loss(self, values: Tensor, parameters: Tensor) -> Tensor:
        """The objective, from the decision values."""
        fit = values.logsumexp(dim=1) - (values * self.onehot).sum(dim=1)
        return fit.mean(dim=1) + self._penalised(parameters)

    def _penalised(self, parameters: Tensor) -> Tensor:
        return (self.penalty * parameters.square()).sum(dim=(1, 2)) / 2

    def pull(self, per_choice: Tensor, parameters: Tensor) -> Tensor:
        """Derivatives with respect to parameters, penalty included, from those with respect to decision values."""
        flat = per_choice.reshape(len(self.rows), parameters.shape[1], -1)
        return flat @ self.rows.mT / self.onehot.shape[2] + self.penalty * parameters

    def gap(self, logs: Tensor, parameters: Tensor, slope: Tensor) -> Tensor:
        """The duality gap, see the docstring of the module."""
        apart = 0.0
        if (self.penalty == 0).any():
            balanced = _balanced(logs.exp(), self.onehot)
            apart = (torch.special.xlogy(balanced, balanced) - balanced * logs).sum(dim=1).mean(dim=1).clamp(min=0)
            slope = self.pull(balanced - self.onehot, parameters)
        weights = self.penalty > 0
        return apart + (slope[..., weights].square() / (2 * self.penalty[weights])).sum(dim=(1, 2))

    def scale(self, chances: Tensor) -> Tensor:
        """Approximate diagonal of the Hessian, exact if p (1 - p) is the same in all rows. The preconditioner."""
        unsure = (chances * (1 - chances)).mean(dim=2)
        choices = self.onehot.shape[1]
        if self.rows.shape[2] != self.onehot.shape[2]:  # form `candidate`: one softmax over rows, centred per sample
            unsure = unsure.sum(dim=1, keepdim=True) * choices / (choices - 1)
        least = 1e-12 * unsure.amax(dim=1, keepdim=True) + torch.finfo(unsure.dtype).tiny
        return self.variance[:, None] * torch.maximum(unsure, least)[..., None] + self.penalty


def _balanced(
    chances: Float[Tensor, "cell choice group"], onehot: Float[Tensor, "_cell choice group"]
) -> Float[Tensor, "cell choice group"]:
    """Probabilities near `chances` whose mean over the groups equals the mean of the labels, for every choice.

    The probabilities of choices with too large a mean are scaled down. What each group loses is distributed over the
    choices with too small a mean, in proportion to what they lack. A choice without labels gets probability 0.
    """
    wanted, given = onehot.mean(dim=2), chances.mean(dim=2)
    kept = torch.where(given > wanted, wanted / given, 1.0)
    lacking = wanted - kept * given
    share = lacking / lacking.sum(dim=1, keepdim=True).clamp(min=torch.finfo(chances.dtype).tiny)
    rest = chances * kept[..., None]
    return rest + share[..., None] * (chances * (1 - kept)[..., None]).sum(dim=1, keepdim=True)


@dataclass
class _Ended:
    """The final state of the fits of some cells. steps: largest number of Newton steps."""

    weight: Float[Tensor, "cell width penalty out"]
    bias: Float[Tensor, "cell penalty out"]
    gradient: Float[Tensor, "cell penalty"]
    gap: Float[Tensor, "cell penalty"]
    steps: int = 0


@dataclass(frozen=True)
class _Goal:
    """When a fit stops.

    values: for each penalty, the relative gap (`by_gap` True) or largest gradient entry to reach. iterations: most
    Newton steps.
    """

    values: Sequence[float]
    by_gap: bool
    iterations: int


_ENDED = ("weight", "bias", "gradient", "gap")


def _to_gap(
    rows: Float[Tensor, "cell row width"],
    onehot: Float[Tensor, "_cell choice group"],
    form: str,
    penalties: Sequence[float],
    goal: _Goal,
    start: tuple[Tensor, Tensor] | None,
) -> _Ended:
    """Fits in fp32. Cells that miss the gap at some penalty continue in fp64."""
    first, second = min(SINGLE, goal.iterations), goal.iterations - SINGLE
    ended = _path(rows.float(), onehot, form, penalties, replace(goal, iterations=first), start)
    for name in _ENDED:
        setattr(ended, name, getattr(ended, name).to(rows.dtype))
    left = (~(ended.gap <= goal.values[0])).any(dim=1).nonzero()[:, 0]
    if len(left) and second > 0:
        begin = ended.weight[left], ended.bias[left]
        more = _path(
            rows[left].double(), _of_cells(onehot, left), form, penalties, replace(goal, iterations=second), begin
        )
        for name in _ENDED:
            getattr(ended, name)[left] = getattr(more, name).to(rows.dtype)
        ended.steps += more.steps
    return ended


def _path(
    rows: Float[Tensor, "cell row width"],
    onehot: Float[Tensor, "_cell choice group"],
    form: str,
    penalties: Sequence[float],
    goal: _Goal,
    start: tuple[Tensor, Tensor] | None,
) -> _Ended:
    """Fits all penalties, from the largest to the smallest, in the precision of the rows."""
    # coordinates from a Gram matrix have the square root of its rounding errors, so it is computed in fp64
    turn = turned(rows.double() if rows.shape[1] <= rows.shape[2] else rows)
    coordinates, variance = turn.coordinates.to(rows.dtype), turn.variance.to(rows.dtype)
    candidate, onehot = form == "candidate", onehot.to(rows.dtype)
    size, out = coordinates.shape[1], 1 if candidate else onehot.shape[1]
    penalised = rows.new_ones(size)
    if not candidate:  # a bias shared by all candidates has no effect
        coordinates = torch.cat([coordinates, torch.ones_like(coordinates[:, :1])], dim=1)
        variance = torch.cat([variance, torch.ones_like(variance[:, :1])], dim=1)
        penalised = torch.cat([penalised, penalised.new_zeros(1)])
    shape = len(rows), len(penalties)
    bias, gradient, gap = rows.new_zeros(*shape, out), rows.new_zeros(shape), rows.new_zeros(shape)
    ended = _Ended(rows.new_zeros(len(rows), rows.shape[2], len(penalties), out), bias, gradient, gap)
    parameters = rows.new_zeros(len(rows), out, coordinates.shape[1])
    for at in sorted(range(len(penalties)), key=lambda i: -penalties[i]):
        if start is not None:
            parameters = _into(turn, start[0][:, :, at], None if candidate else start[1][:, at])
        problem = _Problem(coordinates, variance, penalised * penalties[at], onehot)
        parameters, gradient[:, at], gap[:, at], steps = _minimise(
            problem, parameters.to(rows.dtype), goal.values[at], goal.by_gap, goal.iterations
        )
        solution = parameters.mT.to(turn.mean.dtype)
        if candidate:
            ended.weight[:, :, at] = turn.back(solution)
        else:  # the optimal weights have mean 0 over classes; make this exact, also for biases
            solution = solution - solution.mean(dim=2, keepdim=True)
            back = turn.back(solution[:, :size])
            ended.weight[:, :, at] = back
            bias[:, at] = solution[:, -1] - torch.einsum("cw,cwo->co", turn.mean, back)
        ended.steps = max(ended.steps, steps)
    return ended


def _into(turn: Turned, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Parameters along the principal axes, from weights and (unless None) biases."""
    weight = weight.to(turn.mean.dtype)
    parameters = turn.into(weight).mT
    if bias is None:
        return parameters
    level = bias + torch.einsum("cw,cwo->co", turn.mean, weight)
    return torch.cat([parameters, level[..., None]], dim=2)


def _minimise(
    problem: _Problem, start: Tensor, goal: float, by_gap: bool, iterations: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Returns final parameters, gradients (largest entry) and relative gaps of each cell, and the number of steps."""
    ended, size = start.clone(), start.new_zeros(len(start))
    gap = torch.zeros_like(size)
    live = torch.arange(len(start), device=start.device)
    here, values = start, problem.values(start)
    for step in range(iterations + 1):
        logs = values.log_softmax(dim=1)
        chances = logs.exp()
        slope = problem.pull(chances - problem.onehot, here)
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
        if by_gap:  # near the goal, a less accurate Newton direction is enough
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
    """The Newton direction -H^-1 slope of each cell, up to a relative residual of `forcing`.

    Cells that have reached it do not change any more. When half of the cells have, they are removed from the batch.
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
    """The step length of each cell: the first of 1, 1/2, 1/4, ... with a sufficient decrease of the objective.

    No product with the rows is needed, as decision values change linearly.
    """
    length = torch.ones_like(slope)[:, None, None]
    before = problem.loss(values, here)
    for _ in range(HALVINGS):
        after = problem.loss(values + length * change, here + length * direction)
        enough = after <= before + SUFFICIENT * length[:, 0, 0] * slope + ROUNDING[values.dtype] * before.abs()
        if enough.all():
            break
        length = torch.where(enough[:, None, None], length, length / 2)
    return length
