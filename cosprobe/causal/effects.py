"""Numbers of an experiment: shares of each condition, differences from controls, all with intervals by problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int, Shaped
from scipy.special import betaincinv

from cosprobe.causal.clean import NONE
from cosprobe.causal.experiments import CONTROL, PROBE, Condition
from cosprobe.causal.run import Outcomes
from cosprobe.errors import InputError
from cosprobe.evaluation import (
    ALPHA,
    Grid,
    average_ranks,
    difference_interval,
    effective_problems,
    max_t_bootstrap,
    mean_interval,
    problem_draws,
    share_interval,
)
from cosprobe.files import make_folder, whole_file

FILE = "causal.nc"
CLEAN = "clean run"
COORDINATES = ("name", "step", "layer", "frame", "dose", "draw", "steps")
MEANING = {
    "label": "share of the samples whose video shows the label that the experiment is about: of `swap` the answer of "
    "the donor, of `steer` the answer steered towards, of the others the answer of the clean run",
    "unchanged": "share of the samples whose video shows the answer of the clean run",
    "none": "share of the samples whose video shows no answer",
    "right": "share of the samples whose video shows a right answer",
    "change": "mean absolute difference from the clean video, in pixels that no solution changes",
    "distance": "|x0-hat - clean x0-hat| / |clean x0-hat| at every step (a step index)",
    "cka": "1 - linear CKA of x0-hat and clean x0-hat, over the tokens of a sample: 0 where both are alike",
    "probe": "share of the samples in which the probe reads what it reads in the clean run",
    "probe_right": "share of the samples in which the probe reads a right answer",
    "effect": "share of one condition minus that of its control, on the same samples",
    "effect_lower": "lower end of the paired 95 % interval of effect",
    "effect_upper": "upper end of the paired 95 % interval of effect",
    "p": "p of the test that effect is above 0, corrected over all cells of the comparison",
    "lower_bound": "lower 95 % bound of effect, for all cells of the comparison together; above 0 where p <= 0.05",
    "upper_bound": "upper 95 % bound of effect, for all cells of the comparison together",
}
TAIL = 0.005  # of the two distributions that the interval of a rank correlation is made of
SPREADS = np.geomspace(0.003, 0.5, 30)  # standard deviations of true effects around a line that are tried
Values = Float[np.ndarray, "sample condition"]


@dataclass(frozen=True)
class Pairing:
    """A comparison: the share `variable` of the condition `name` minus that of `control`, cell by cell.

    control: another condition, or CLEAN, the clean run, which keeps all answers.

    sign: -1 where a lower share is an effect. A control that has several draws counts with their mean.
    """

    name: str
    control: str
    variable: str = "label"
    sign: int = 1


def summarised(outcomes: Outcomes, pairings: Sequence[Pairing], solutions: Sequence[Sequence[int]]) -> xr.Dataset:
    """The table of an experiment.

    Dimensions: `condition`, `time` (a step of a run), and `comparison`. Samples without a label are left out, also
    where only runs of another number of steps give them none. solutions: right answers of every sample.
    Raises InputError when no sample has a label.
    """
    there = outcomes.complete
    if not there.any():
        raise InputError(
            "no sample has what the experiment needs (an answer in its clean video, and donors): expected at least 20; "
            "raise use.problems"
        )
    keys, answers = outcomes.keys[there], outcomes.answers[there]
    right = np.stack([_right(column, solutions) for column in outcomes.answers.T], axis=1)[there]
    values = {
        "label": (answers == outcomes.labels[there]).astype(float),
        "unchanged": (answers == outcomes.clean[there]).astype(float),
        "none": (answers == NONE).astype(float),
        "right": right.astype(float),
    }
    data: dict[str, tuple] = {}
    for name, value in values.items():
        data[name] = ("condition", value.mean(axis=0), {"description": MEANING[name]})
        for end, bound in zip(("lower", "upper"), share_interval(value.T, keys), strict=True):
            data[f"{name}_{end}"] = ("condition", bound, {"description": f"{end} end of the 95 % interval of {name}"})
    data |= _with_intervals("change", outcomes.change[there].T, keys, ("condition",))
    if np.isfinite(outcomes.distance).any():
        same = (outcomes.probe[there] == outcomes.clean_probe[there, None]).astype(float)
        nothing = np.isnan(outcomes.probe) | (outcomes.clean_probe == NONE)[:, None]
        same[nothing[there]] = np.nan
        skill = np.stack([np.isin(read, good) for read, good in zip(outcomes.probe, solutions, strict=True)])
        skill = np.where(nothing, np.nan, skill.astype(float))[there]
        followed = {"distance": outcomes.distance[there], "cka": outcomes.cka[there], "probe": same}
        for name, follow in (followed | {"probe_right": skill}).items():
            data |= _with_intervals(name, follow.transpose(1, 2, 0), keys, ("condition", "time"))
    coordinates = {name: [getattr(c, name) for c in outcomes.conditions] for name in COORDINATES}
    found = xr.Dataset(
        data,
        coords={name: ("condition", value) for name, value in coordinates.items()},
        attrs={
            "n": int(there.sum()), "problems": len(np.unique(keys)), "left_out": int((~there).sum()),
            "clean_right": float(_right(outcomes.clean[:, 0], solutions)[there].mean()),
            "evaluations": outcomes.evaluations,
        },
    )  # fmt: skip
    return found.merge(compared(outcomes.conditions, values, keys, pairings))


def compared(
    conditions: Sequence[Condition],
    values: dict[str, Values],
    keys: Shaped[np.ndarray, " sample"],
    pairings: Sequence[Pairing],
) -> xr.Dataset:
    """Every pairing in every cell that both its conditions have."""
    rows, cells = [], list[tuple[str, str, Condition]]()
    for pairing in pairings:
        one, other = (_by_cell(conditions, name) for name in (pairing.name, pairing.control))
        shared = [cell for cell in one if cell in other or pairing.control == CLEAN]
        if not shared:
            continue
        value = values[pairing.variable]
        reference = {cell: value[:, other[cell]].mean(axis=1) if cell in other else 1.0 for cell in shared}
        difference = np.stack([pairing.sign * (value[:, one[cell]].mean(axis=1) - reference[cell]) for cell in shared])
        lower, upper = difference_interval(difference, keys)
        above, bound = max_t_bootstrap(difference, keys), upper_bounds(difference, keys)
        rows.append(np.stack([difference.mean(axis=1), lower, upper, above.p, above.lower.clip(-1), bound]))
        cells += [(pairing.name, pairing.control, conditions[one[cell][0]]) for cell in shared]
    names = ("effect", "effect_lower", "effect_upper", "p", "lower_bound", "upper_bound")
    every = np.concatenate(rows, axis=1) if rows else np.empty((len(names), 0))
    columns = {
        "compared": [name for name, _, _ in cells],
        "control": [name for _, name, _ in cells],
        **{f"at_{name}": [getattr(c, name) for _, _, c in cells] for name in ("step", "layer", "frame", "dose")},
    }
    return xr.Dataset(
        {name: ("comparison", row, {"description": MEANING[name]}) for name, row in zip(names, every, strict=True)},
        coords={name: ("comparison", value) for name, value in columns.items()},
    )


def _by_cell(conditions: Sequence[Condition], name: str) -> dict[tuple, list[int]]:
    """The conditions of a name, by step, layer and frame. Of a probe's doses, the one that controls have."""
    controlled = [c.dose for c in conditions if c.name == CONTROL or c.draw != NONE]
    found = dict[tuple, list[int]]()
    for i, c in enumerate(conditions):
        if c.name == name and not (name == PROBE and controlled and c.dose != controlled[0]):
            found.setdefault((c.step, c.layer, c.frame, c.steps), []).append(i)
    return found


def upper_bounds(
    difference: Float[np.ndarray, "cell sample"], keys: Shaped[np.ndarray, " sample"]
) -> Float[np.ndarray, " cell"]:
    """Upper 95 % bounds of mean differences between -1 and 1, for all cells together.

    The mean is at most the share of samples with a positive difference. The bound is the exact binomial bound of that
    share, at the effective number of problems, with a level of 0.05 / cells (Bonferroni). It is never of width zero,
    and conservative where losses are frequent.
    """
    count = effective_problems(keys)
    wins = count * np.maximum(difference, 0.0).mean(axis=1)
    level = ALPHA / len(difference)
    return np.where(wins < count, betaincinv(wins + 1, np.maximum(count - wins, 1e-9), 1 - level), 1.0)


@dataclass(frozen=True)
class Agreement:
    """Decodability against the effect of a swap, cell by cell.

    cells: (step index, layer). skill: accuracy of the probe above chance. effect, lower, upper: share of videos with
    the donor's answer, swap minus the same swap from a donor with the host's answer, and its 95 % interval.
    correlation: see `rank_correlation`. not_used: decodable, and the bound of the effect is below `margin`.
    not_decodable: used, and no evidence that it is decodable.
    """

    cells: list[tuple[int, int]]
    skill: Float[np.ndarray, " cell"]
    effect: Float[np.ndarray, " cell"]
    lower: Float[np.ndarray, " cell"]
    upper: Float[np.ndarray, " cell"]
    correlation: tuple[float, float, float]
    not_used: list[tuple[int, int]]
    not_decodable: list[tuple[int, int]]
    margin: float


def rank_correlation(
    fixed: Float[np.ndarray, " cell"],
    difference: Float[np.ndarray, "cell sample"],
    keys: Shaped[np.ndarray, " sample"],
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Spearman's correlation over cells of `fixed` with the mean difference, and a 95 % interval for that with the true
    effects. `fixed` counts as known. NaN for less than 3 cells or equal values.

    Noise in the mean differences mixes up the ranks of cells with similar effects, so the correlation is on average too
    close to 0, and the interval reaches further away from 0. It contains the middle 99 % of two sets of correlations
    with `fixed`: of the mean differences of a bootstrap over problems; and of draws of the true effects, given the mean
    differences, in a normal model. In the model, true effects scatter around a line in `fixed`, and mean differences
    around true effects, independently but for a part that all cells share.
    It is wide: with few cells a correlation can hardly be told from 0. In simulations (9 to 60 cells, 24 and 96
    problems, five kinds of effects) it covers 0.90 to 1.00, the least where most effects are nearly equal. With the
    middle 95 % it covers 0.84 to 0.99, the basic bootstrap interval 0.54 to 0.98; percentiles, BCa and Fisher's z with
    the bootstrap error sometimes cover less than 0.1.
    Source of the model: Rubin (1981), "Estimation in parallel randomized experiments", here with a line.
    """
    measured = difference.mean(axis=1)
    if len(fixed) < 3 or np.ptp(fixed) == 0 or np.ptp(measured) == 0:
        return (np.nan,) * 3
    r = float(_spearman(fixed, measured[:, None])[0])
    ends = [r]
    for effects in (
        problem_draws(keys, draws, seed).means(difference),
        _true_effects(fixed, difference, keys, draws, seed),
    ):
        ends += np.nanquantile(_spearman(fixed, effects), [TAIL, 1 - TAIL]).tolist()
    return r, min(ends), max(ends)


def _true_effects(
    fixed: Float[np.ndarray, " cell"],
    difference: Float[np.ndarray, "cell sample"],
    keys: Shaped[np.ndarray, " sample"],
    draws: int,
    seed: int,
) -> Float[np.ndarray, "cell draw"]:
    """Draws of true effects in the model of `rank_correlation`, with flat priors of the line and of SPREADS."""
    rng, cells = np.random.default_rng(seed), len(fixed)
    mean, own = difference.mean(axis=1), difference - difference.mean(axis=0)  # luck of all cells changes no ranks
    error = own.var(axis=1) / max(effective_problems(keys) - 1, 1) * cells / (cells - 1)
    error = 0.9 * error + 0.1 * error.mean() + 1e-9  # few problems do not show the variance of a rare change
    line = np.stack([np.ones(cells), (fixed - fixed.mean()) / fixed.std()], axis=1)
    weight = 1 / (error + SPREADS[:, None] ** 2)  # [spread, cell]
    precision = np.einsum("sc,ci,cj->sij", weight, line, line)
    fitted = np.linalg.solve(precision, np.einsum("sc,ci,c->si", weight, line, mean)[..., None])[..., 0]
    left = mean - fitted @ line.T
    likely = (np.log(weight) - weight * left**2).sum(axis=1) - np.linalg.slogdet(precision)[1]
    chance = np.exp((likely - likely.max()) / 2) * SPREADS  # SPREADS are denser near 0
    at = rng.choice(len(SPREADS), draws, p=chance / chance.sum())
    moved = np.linalg.cholesky(np.linalg.inv(precision))[at] @ rng.normal(size=(draws, 2, 1))
    base = (fitted[at] + moved[..., 0]) @ line.T
    kept = SPREADS[at, None] ** 2 * weight[at]
    return (base + kept * (mean - base) + np.sqrt(kept * error) * rng.normal(size=base.shape)).T


def _spearman(fixed: Float[np.ndarray, " cell"], others: Float[np.ndarray, "cell draw"]) -> Float[np.ndarray, " draw"]:
    one, other = average_ranks(fixed[:, None])[:, 0], average_ranks(others)
    one, other = one - one.mean(), other - other.mean(axis=0)
    size = np.sqrt((one**2).sum() * (other**2).sum(axis=0))
    return np.where(size > 0, one @ other / np.where(size > 0, size, 1.0), np.nan)


def _with_intervals(
    name: str, values: Float[np.ndarray, "*row sample"], keys: Shaped[np.ndarray, " sample"], dims: tuple[str, ...]
) -> dict[str, tuple]:
    """Mean over samples with its interval, for every row."""
    rows = values.reshape(-1, values.shape[-1])
    whole = np.isfinite(rows).all(axis=1)
    mean, lower, upper = np.full((3, len(rows)), np.nan)
    if whole.any():
        mean[whole] = rows[whole].mean(axis=1)
        lower[whole], upper[whole] = mean_interval(rows[whole], keys)
    entries = {name: mean, f"{name}_lower": lower, f"{name}_upper": upper}
    about = {name: MEANING[name], f"{name}_lower": "lower end of its 95 % interval", f"{name}_upper": "upper end of it"}
    return {
        key: (dims, value.reshape(values.shape[:-1]), {"description": about[key]}) for key, value in entries.items()
    }


def _right(answers: Int[np.ndarray, " sample"], solutions: Sequence[Sequence[int]]) -> Bool[np.ndarray, " sample"]:
    return np.array([a in good for a, good in zip(answers, solutions, strict=True)])


def save_table(table: xr.Dataset, path: Path) -> Path:
    """Writes a table as netCDF, atomically."""
    make_folder(path.parent)
    with whole_file(path) as part:
        table.to_netcdf(part, engine="netcdf4")
    return path


def agreement(outcomes: Outcomes, grid: Grid, target: str, margin: float) -> Agreement | None:
    """Decodability of a target beside the effect of a swap; None when they share no cell."""
    there, conditions = outcomes.complete, outcomes.conditions
    hits = (outcomes.answers[there] == outcomes.labels[there]).astype(float)
    swap = {(c.step, c.layer): i for i, c in enumerate(conditions) if c.name == "swap"}
    control = {(c.step, c.layer): i for i, c in enumerate(conditions) if c.name == "same answer"}
    plane = grid.plane(target)
    known = {(int(s), int(n)) for s in plane.step.values for n in plane.layer.values}
    cells = [cell for cell in swap if cell in known and cell in control]
    if not cells:
        return None
    at = [plane.sel(step=step, layer=layer) for step, layer in cells]
    skill = np.array([float(one.accuracy) - float(one.chance) for one in at])
    decodable = np.array([float(one.p_evidence) <= ALPHA for one in at])
    difference = np.stack([hits[:, swap[c]] - hits[:, control[c]] for c in cells])
    keys = outcomes.keys[there]
    lower, upper = difference_interval(difference, keys)
    used = max_t_bootstrap(difference, keys).p <= ALPHA
    below = upper_bounds(difference, keys) < margin
    return Agreement(
        cells, skill, difference.mean(axis=1), lower, upper, rank_correlation(skill, difference, keys),
        [c for c, d, b in zip(cells, decodable, below, strict=True) if d and b],
        [c for c, d, u in zip(cells, decodable, used, strict=True) if u and not d],
        margin,
    )  # fmt: skip
