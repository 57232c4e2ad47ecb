"""What two runs got right on test problems, and the differences between them.

Both runs are reduced to a share of right answers per problem. Problems that are test problems of both runs are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Float, Shaped

from cosprobe.cells import Cell
from cosprobe.errors import InputError
from cosprobe.evaluation import (
    ALPHA,
    LEAST_PROBLEMS,
    Evaluated,
    correctness,
    difference_interval,
    independent_difference_interval,
    max_t_bootstrap,
    membership,
    share_interval,
)
from cosprobe.tasks import Role, Target

ORDERED = ("step", "layer")
AXES = (*ORDERED, "branch", "position")
MEANING = {
    "base": "share of right answers of the first run, over problems",
    "other": "the same of the other run",
    "difference": "other - base",
    "lower": "lower end of the 95 % interval of difference",
    "upper": "upper end of the 95 % interval of difference",
    "p": "p of the test that difference is not 0, in either direction, corrected over all cells of the target; NaN for "
    "runs without shared problems, and for few problems",
    "base_validation": "validation accuracy of the first run",
    "other_validation": "validation accuracy of the other run",
}


# rows of two runs on the same problems and these problems; or on problems of their own and None
Shared = tuple[
    Float[np.ndarray, "row problem"], Float[np.ndarray, "row other_problem"], Shaped[np.ndarray, " problem"] | None
]


@dataclass(frozen=True, eq=False)
class ProblemShares:
    """Share of right answers per test problem. keys: the problems, sorted. right: one row per cell, or a single row."""

    keys: Shaped[np.ndarray, " problem"]
    right: Float[np.ndarray, "row problem"]

    @classmethod
    def of(cls, right: Float[np.ndarray, "row sample"], keys: Shaped[np.ndarray, " sample"]) -> ProblemShares:
        """Means over the samples of each problem."""
        member = membership(keys)
        return cls(np.unique(keys), right @ member / member.sum(axis=0))

    def of_problems(self, names: Shaped[np.ndarray, " problem"]) -> Float[np.ndarray, "row problem"]:
        """The rows of these problems, which must be among `keys`."""
        return self.right[:, np.searchsorted(self.keys, names)]


@dataclass(frozen=True, eq=False)
class TargetResult:
    """One target of one run. test: one row per cell. validation: accuracy of every cell."""

    target: Target
    test: ProblemShares
    validation: Float[np.ndarray, " cell"]


@dataclass(frozen=True, eq=False)
class RunResult:
    """What a run got right, without its activations.

    name: unique among the runs that are compared. depth, total: numbers of blocks of the model and of steps of the
    sampler. cells: of all targets. targets: by name, without random relabellings. video: of the answers in finished
    videos, None where the task has none.
    """

    name: str
    depth: int
    total: int
    cells: tuple[Cell, ...]
    targets: dict[str, TargetResult]
    video: ProblemShares | None

    @classmethod
    def of(cls, name: str, evaluated: Evaluated, depth: int, total: int) -> RunResult:
        """Reduces predictions to shares per problem. Targets without test or validation samples are left out."""
        targets: dict[str, TargetResult] = {}
        video = None
        for result in evaluated.results:
            if result.target.role is Role.RELABELLED:
                continue
            test, validation = result.test.carried(), result.validation.carried()
            if not len(test.keys) or not len(validation.keys):
                continue
            shares = ProblemShares.of(correctness(test.predicted, test.labels), test.keys)
            known = correctness(validation.predicted, validation.labels).mean(axis=1)
            targets[result.target.name] = TargetResult(result.target, shares, known)
            if video is None and result.target.role is Role.ANSWER and test.model_answer is not None:
                video = ProblemShares.of(correctness(test.model_answer[None], test.labels), test.keys)
        return cls(name, depth, total, evaluated.cells, targets, video)


@dataclass(frozen=True)
class Row:
    """One number of both runs. what: such as `best cell of answer`. base, other: shares of right answers. difference:
    other - base, with its 95 % interval. n: number of problems; if they are not shared, the smaller number."""

    what: str
    base: float
    other: float
    difference: float
    lower: float
    upper: float
    n: int

    @property
    def change(self) -> str:
        """The difference with its interval."""
        return f"{self.difference:+.2f} [{self.lower:+.2f}, {self.upper:+.2f}]"


@dataclass(frozen=True, eq=False)
class Compared:
    """Differences between a run and a base run.

    cells: variables of MEANING by target, step, layer, branch and position. Coordinates `step` and `layer` are those of
    the base run, `other_step` and `other_layer` those of the other run. paired: by target, whether problems are shared;
    n: by target, the number of problems. rows: finished videos, and best cells. not_compared: a sentence for each
    target of one of the runs that is left out.
    """

    base: str
    other: str
    cells: xr.Dataset
    rows: tuple[Row, ...]
    not_compared: tuple[str, ...]

    @property
    def paired(self) -> bool:
        """Whether all targets were compared on shared problems."""
        return bool(self.cells.paired.all())

    def count(self, target: str) -> tuple[int, int, int]:
        """Number of cells in which the other run is better, worse (corrected p at most 0.05), and of all cells."""
        one = self.cells.sel(target=target)
        found = one.p.values <= ALPHA
        return (
            int((found & (one.difference.values > 0)).sum()),
            int((found & (one.difference.values < 0)).sum()),
            int(np.isfinite(one.difference.values).sum()),
        )


def compare(base: RunResult, other: RunResult, seed: int = 0) -> Compared:
    """Differences of all targets that both runs have, by cell.

    Cells are matched by branch and position, and by step and layer where both runs have as many of them. Otherwise the
    run with fewer steps decides: each of its steps is compared with the nearest step of the other run at the same share
    of the schedule, step / steps. Likewise for blocks, at (layer + 1) / blocks.
    If both runs have at least 12 test problems in common, differences are those on these problems, and their intervals
    and p-values are paired. Otherwise each run is measured on its own problems, without p-values.
    The test is two-sided: the sign test of `max_t_bootstrap` on differences in both directions at once.
    Raises InputError when the runs have no target or no cell in common.
    """
    names = [name for name in base.targets if name in other.targets]
    left_out = [
        f"{name}: only {one.name} has it" for one, two in ((base, other), (other, base)) for name in one.targets
        if name not in two.targets
    ]  # fmt: skip
    for name in list(names):
        one, two = base.targets[name].target, other.targets[name].target
        if (one.classes, one.form) != (two.classes, two.form):
            names.remove(name)
            left_out.append(f"{name}: {one.classes} classes in {base.name}, {two.classes} in {other.name}")
    pairs = matched(base, other)
    if not names or not pairs:
        what = "target" if not names else "cell"
        raise InputError(f"runs: {base.name} and {other.name} have no {what} in common; expected runs on one task")
    found = [of_target(base, other, name, pairs, seed) for name in names]
    rows = [] if base.video is None or other.video is None else [_row("finished video", base.video, other.video)]
    rows += [_row(f"best cell of {name}", *(_best(run.targets[name]) for run in (base, other))) for name in names]
    cells = xr.concat(found, "target", join="outer").assign_coords(target=names)
    return Compared(base.name, other.name, cells, tuple(rows), tuple(left_out))


def matched(base: RunResult, other: RunResult) -> list[tuple[int, int]]:
    """Pairs of indices of cells of both runs that are compared, as `compare` describes."""
    steps = _along([c.step for c in base.cells], [c.step for c in other.cells], base.total, other.total, 0)
    layers = _along([c.layer for c in base.cells], [c.layer for c in other.cells], base.depth, other.depth, 1)
    index = {cell: i for i, cell in enumerate(other.cells)}
    found = []
    for i, cell in enumerate(base.cells):
        if cell.step in steps and cell.layer in layers:
            partner = Cell(steps[cell.step], layers[cell.layer], cell.branch, cell.position)
            if partner in index:
                found.append((i, index[partner]))
    return found


def _along(one: Sequence[int], two: Sequence[int], length: int, other: int, shift: int) -> dict[int, int]:
    """The value of the other axis for each matched value of the first. length, other: numbers of values of the whole
    axes. shift: what is added before values are divided by them."""
    mine, theirs = sorted(set(one)), sorted(set(two))
    if length == other:
        return {value: value for value in mine if value in theirs}
    if length > other:
        return {value: key for key, value in _along(two, one, other, length, shift).items()}
    share = (np.array(theirs) + shift) / other
    return {value: theirs[int(np.abs(share - (value + shift) / length).argmin())] for value in mine}


def of_target(base: RunResult, other: RunResult, name: str, pairs: Sequence[tuple[int, int]], seed: int) -> xr.Dataset:
    """The variables of MEANING for one target. pairs: of indices of cells."""
    mine, theirs = (np.array(side) for side in zip(*pairs, strict=True))
    one, two = base.targets[name], other.targets[name]
    left, right, keys = _on_shared(one.test, two.test)
    left, right = left[mine], right[theirs]
    lower, upper = _interval(left, right, keys)
    p = np.full(len(pairs), np.nan)
    if keys is not None:
        gained = right - left
        both = max_t_bootstrap(np.concatenate([gained, -gained]), keys, seed=seed).p
        p = np.minimum(*np.split(both, 2))
    values = {
        "base": left.mean(axis=1), "other": right.mean(axis=1), "difference": right.mean(axis=1) - left.mean(axis=1),
        "lower": lower, "upper": upper, "p": p, "base_validation": one.validation[mine],
        "other_validation": two.validation[theirs],
    }  # fmt: skip
    found = _by_cell(values, [base.cells[i] for i in mine], [other.cells[i] for i in theirs])
    role = str(one.target.role)
    return found.assign(paired=keys is not None, n=min(left.shape[1], right.shape[1]), role=role)


def _by_cell(values: dict[str, Float[np.ndarray, " cell"]], mine: list[Cell], theirs: list[Cell]) -> xr.Dataset:
    """The values by step, layer, branch and position of the first run, NaN where there is no cell."""
    axes = {axis: list(dict.fromkeys(getattr(cell, axis) for cell in mine)) for axis in AXES}
    axes |= {axis: sorted(axes[axis]) for axis in ORDERED}
    at = tuple(np.array([axes[axis].index(getattr(c, axis)) for c in mine]) for axis in AXES)
    shape = [len(axes[axis]) for axis in AXES]
    found = {}
    for name, column in values.items():
        table = np.full(shape, np.nan)
        table[at] = column
        found[name] = (AXES, table, {"description": MEANING[name]})
    partner = {axis: {getattr(a, axis): getattr(b, axis) for a, b in zip(mine, theirs, strict=True)} for axis in AXES}
    others = {f"other_{axis}": (axis, [partner[axis][v] for v in axes[axis]]) for axis in ORDERED}
    return xr.Dataset(found, coords={**axes, **others})


def _on_shared(one: ProblemShares, two: ProblemShares) -> Shared:
    """The rows of both on their shared problems, with these; or all problems of each, and None, where fewer than 12 are
    shared."""
    shared = np.intersect1d(one.keys, two.keys)
    if len(shared) < LEAST_PROBLEMS:
        return one.right, two.right, None
    return one.of_problems(shared), two.of_problems(shared), shared


def _interval(
    left: Float[np.ndarray, "row problem"],
    right: Float[np.ndarray, "row other_problem"],
    keys: Shaped[np.ndarray, " problem"] | None,
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """95 % interval of the mean of `right` minus that of `left`."""
    if keys is not None:
        return difference_interval(right - left, keys)
    ends = [(side.mean(axis=1), *share_interval(side, np.arange(side.shape[1]))) for side in (left, right)]
    return independent_difference_interval(*ends)


def _best(of: TargetResult) -> ProblemShares:
    """The cell with the highest validation accuracy; on a tie the first."""
    at = int(np.nanargmax(of.validation.round(12)))
    return ProblemShares(of.test.keys, of.test.right[at : at + 1])


def _row(what: str, one: ProblemShares, two: ProblemShares) -> Row:
    left, right, keys = _on_shared(one, two)
    lower, upper = (float(end[0]) for end in _interval(left, right, keys))
    base, other = float(left.mean()), float(right.mean())
    return Row(what, base, other, other - base, lower, upper, min(left.shape[1], right.shape[1]))
