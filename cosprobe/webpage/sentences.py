"""The sentences a page begins with, made from the numbers of a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import xarray as xr

from cosprobe.cells import X0
from cosprobe.evaluation import (
    ALPHA,
    GUESSES,
    LEAST_EFFECTIVE,
    LEAST_PROBLEMS,
    MUST_BEAT,
    X0_PARSED,
    Best,
    Grid,
)
from cosprobe.reporting import counted
from cosprobe.tasks import ANSWER_ROLES, Role

X0_HAT = "x0-hat, the model's estimate of the clean video at a step,"


def sentences(grid: Grid, model: str, task: str) -> list[str]:
    """Five sentences: what was done, where the first target is decodable, what x0-hat shows, whether it could be chance
    or the architecture, and the strongest caveat, which comes last.

    The first target is the first one of role `answer`, or else the first of the grid. model, task: their names.
    """
    target = main_target(grid)
    return [
        _done(grid, target, model, task),
        _decodable(grid, target),
        _beside_x0(grid, target),
        _control(grid, target),
        f"Strongest caveat: {caveat(grid, target)}",
    ]


def main_target(grid: Grid) -> str:
    """The first target of role `answer`, or of role `model_answer`, or else the first of the grid."""
    return next(iter([*grid.with_role(Role.ANSWER), *grid.with_role(Role.MODEL_ANSWER), *grid.targets]))


def decoded_steps(data: xr.Dataset) -> list[int]:
    """Steps of a target at which x0-hat was decoded and parsed."""
    known = data.baseline_accuracy.sel(baseline=X0_PARSED).notnull()
    return data.step.values[known.any([axis for axis in known.dims if axis != "step"])].tolist()


def nearest(step: int, decoded: Sequence[int]) -> list[int]:
    """The last decoded step up to a step and the first one from it on: those whose parser x0-hat is compared by."""
    before, after = [one for one in decoded if one <= step][-1:], [one for one in decoded if one >= step][:1]
    return sorted({*before, *after})


def x0_in_words(source: str, step: int, decoded: Sequence[int]) -> str:
    """Where the accuracy of x0-hat at a step comes from."""
    if source == X0:
        return "probe of its latent at this step"
    if source != X0_PARSED:
        return source
    if step in decoded:
        return "parser on its decoded video at this step"
    steps = " or ".join(map(str, nearest(step, decoded)))
    return f"parser at the nearest decoded step, {steps}; not decoded at this step"


def _done(grid: Grid, target: str, model: str, task: str) -> str:
    data, a = grid.dataset, grid.dataset.attrs
    size = counted(data.sizes["layer"], "layer") + " at " + counted(data.sizes["step"], "denoising step")
    ends = [float(a[f"model_accuracy{end}"]) for end in ("", "_lower", "_upper")]
    own = "" if np.isnan(ends[0]) else f"; its finished video is right on {_ends(*ends)} of them"
    here = data.sel(target=target)
    apart = ", each with probes that were trained on others" if grid.folds else " that no probe was trained on"
    return (
        f"Linear probes read {size} of the model {model} on problems of the task {task}, and are tested on "
        f"{_samples(here)}{apart}{own}."
    )


def _samples(here: xr.Dataset) -> str:
    samples, problems = int(here.n_test), int(here.n_test_problems)
    each = "" if samples == problems else f" of {counted(problems, 'problem')}"
    return f"{counted(samples, 'sample')}{each}"


def _decodable(grid: Grid, target: str) -> str:
    best = grid.best(target)
    cell, p = grid.at(target, best.cell), grid.dataset.p_evidence.sel(target=target)
    count, total = int((p <= ALPHA).sum()), int(grid.dataset.accuracy.sel(target=target).notnull().sum())
    compared, share = _reference(cell), _ends(best.accuracy, best.lower, best.upper)
    probe = f"the probe of {_where(grid, best)} is right on {share} of {counted(int(cell.n_test), 'test sample')}"
    if best.p <= ALPHA:
        first = int(p.step.values[(p <= ALPHA).any([axis for axis in p.dims if axis != "step"])].min())
        return (
            f"`{target}` is decodable: {probe}, {compared}; {count} of {counted(total, 'cell')} (layer and step) have "
            f"evidence after correction for all of them, the earliest at step {first}."
        )
    if np.isnan(best.p):
        return f"`{target}`: {probe}, {compared}, but it has no p-value, so there is no evidence that it is decodable."
    none = "there is no evidence that it is decodable"
    if count:
        none += f" at the best cell (but there is in {count} of {counted(total, 'cell')})"
    others = _others(grid, target, grid.dataset.p_evidence <= ALPHA, "with evidence")
    return f"`{target}`: {none}: {probe}, {compared}, corrected p = {best.p:.3f}{others}."


def _reference(cell: xr.Dataset) -> str:
    source, chance = str(cell.reference_source.values), float(cell.chance)
    if np.isnan(cell.reference):
        return f"chance on {chance:.2f}"
    if source in GUESSES:
        return f"chance, which no input beats, on {chance:.2f}"
    return f"the best input ({source}) on {float(cell.reference):.2f} and chance on {chance:.2f}"


def _beside_x0(grid: Grid, target: str) -> str:
    best = grid.best(target)
    cell, data = grid.at(target, best.cell), grid.dataset.sel(target=target)
    if data.x0_accuracy.isnull().all():
        return (
            f"`{target}` was not compared with {X0_HAT} so nothing here says that it is decodable before it is visible."
        )
    every = (grid.dataset.p_x0 <= ALPHA) & (grid.dataset.p_evidence <= ALPHA)
    above, others = every.sel(target=target), _others(grid, target, every, "above x0-hat")
    decoded = decoded_steps(data)
    at = "at that step or the nearest decoded ones" if 0 < len(decoded) < data.sizes["step"] else "at the same step"
    source = x0_in_words(str(cell.x0_source.values), best.cell.step, decoded)
    shows = (
        f"at {_where(grid, best)} the probe is right on {best.accuracy:.2f} and x0-hat ({source}) on "
        f"{float(cell.x0_accuracy):.2f}"
    )
    if np.isfinite(cell.above_x0_lower):
        shows += (
            f", a difference of {float(cell.above_x0):+.2f} [{float(cell.above_x0_lower):+.2f}, "
            f"{float(cell.above_x0_upper):+.2f}]"
        )
    if not above.any():
        none = f"There is no evidence that a probe of `{target}` reads more than {X0_HAT} already shows {at}"
        return f"{none}: {shows}{others}."
    first = int(data.step.values[above.any([axis for axis in above.dims if axis != "step"])].min())
    return (
        f"In {counted(int(above.sum()), 'cell')}, the earliest at step {first}, a probe of `{target}` is more accurate "
        f"than what {X0_HAT} already shows {at}; {shows}{others}."
    )


def _others(grid: Grid, target: str, true: xr.DataArray, what: str) -> str:
    """Other targets that have to beat inputs, with the number of their cells for which something is true."""
    named = [name for name in grid.with_role(*MUST_BEAT) if name != target]
    counts = {name: int(true.sel(target=name).sum()) for name in named}
    found = [f"`{name}` has {counted(count, 'cell')}" for name, count in counts.items() if count]
    return f"; of other targets, {' and '.join(found)} {what}" if found else ""


def _control(grid: Grid, target: str) -> str:
    parts = []
    for name in grid.with_role(Role.CONTROL):
        count = int((grid.dataset.p_permutation.sel(target=name) <= ALPHA).sum())
        parts.append(f"random labels (`{name}`) are decodable in {counted(count, 'cell')}, " + (
            "where none is expected" if count else "as expected"
        ))  # fmt: skip
    if weights := _weights(grid, target):
        others = [f"{_ends(*ends)} with {name} ones" for name, ends in weights.items() if name != "trained"]
        named = " and on ".join(others)
        samples = counted(int(grid.dataset.attrs["weights_samples"]), "sample")
        parts.append(
            f"other probes of `{target}`, fitted only on the {samples} (training samples included) that random weights "
            f"were run on, are right at step {_first_step(grid, target)} on {_ends(*weights['trained'])} with the "
            f"trained weights (layer {grid.best(target).cell.layer}), on {named} (each at its best layer on validation)"
        )
    if not parts:
        return (
            "Neither random labels nor random weights were measured, so chance and the architecture are not ruled out."
        )
    if not weights:
        parts.append("random weights were not measured")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _first_step(grid: Grid, target: str) -> int:
    known = grid.dataset.weights_accuracy.sel(target=target, weights="trained")
    return int(known.step.values[known.notnull().any([axis for axis in known.dims if axis != "step"])].min())


def _weights(grid: Grid, target: str) -> dict[str, tuple[float, float, float]]:
    """Accuracy with its interval by kind of weights, at the first step where all were sampled. Trained weights: at the
    layer of the best cell. Others: at their own layer with the best validation accuracy. Empty if not measured."""
    data = grid.dataset
    if "weights_accuracy" not in data or data.weights_accuracy.sel(target=target).isnull().all():
        return {}
    best, step = grid.best(target).cell, _first_step(grid, target)
    where = {"position": best.position, "branch": best.branch}
    here = data.sel(target=target, step=step, **{k: v for k, v in where.items() if k in data.dims})
    trained = here.sel(weights="trained", layer=best.layer)
    ends = ("accuracy", "lower", "upper")
    found = {"trained": tuple(float(trained[f"weights_{end}"]) for end in ends)}
    for name in data.weights.values[1:]:
        one = here.sel(baseline=f"{name}_weights")
        found[str(name)] = tuple(float(one[f"baseline_{end}"]) for end in ends)
    return {name: (a, b, c) for name, (a, b, c) in found.items() if np.isfinite(a)}


def caveat(grid: Grid, target: str) -> str:
    """The first of these that is true: random labels are decodable; baselines are missing; fits did not converge; there
    are too few problems; there is no evidence, although x0-hat shows the answer; there is no evidence; random weights
    do as well; confounds explain a part; no cell is above x0-hat. Otherwise: what is decodable need not be used."""
    data, best = grid.dataset.sel(target=target), grid.best(target)
    for name in grid.with_role(Role.CONTROL):
        if count := int((grid.dataset.p_permutation.sel(target=name) <= ALPHA).sum()):
            cells = counted(count, "cell")
            return f"random labels (`{name}`) are decodable in {cells}; results of this grid are not reliable."
    if missing := str(data.not_measured.values):
        so = "it has no skill and no evidence" if data.reference.isnull().all() else "what they tell is not ruled out"
        return f"`{target}` was not compared with these baselines: {missing.replace(',', ', ')}; {so}."
    done, fits = grid.provenance.get("converged", {}).get(target, (0, 0))
    if done < fits:
        return f"{fits - done} of {fits} fits of `{target}` did not converge; their accuracy may be too low."
    problems = int(data.n_test_problems)
    if problems < LEAST_PROBLEMS or float(data.n_effective) < LEAST_EFFECTIVE:
        return (
            f"{counted(problems, 'test problem')} (effective number {float(data.n_effective):.0f}) are too few for "
            f"p-values and for intervals of differences; expected at least {LEAST_PROBLEMS}."
        )
    if not (data.p_evidence <= ALPHA).any():
        if shown := _blind(grid, target):
            return shown
        least = float(data.smallest_detectable_skill)
        so = "nothing was found"
        if np.isfinite(least):
            so = f"a skill above chance of less than {least:.2f} cannot count as evidence"
        return f"no evidence is not evidence of absence: with {counted(problems, 'test problem')}, {so}."
    weights = _weights(grid, target)
    alike = [name for name, ends in weights.items() if name != "trained" and ends[2] >= weights["trained"][1]]
    if alike:
        return (
            f"with {' and '.join(alike)} weights, probes are not clearly less accurate (intervals overlap), so the "
            "architecture alone may explain what is decodable."
        )
    if "residual_upper" in data and float(data.residual_upper) < 0:
        return (
            "confounds explain a part: without the difficulty of the problem, accuracy falls from "
            f"{float(data.residual_before):.2f} to {float(data.residual_after):.2f}."
        )
    role = Role(str(data.role.values))
    if role in ANSWER_ROLES and not ((data.p_x0 <= ALPHA) & (data.p_evidence <= ALPHA)).any():
        return (
            "no probe is shown to be more accurate than what x0-hat shows, so nothing here says that the model knows "
            f"the answer before it is visible ({counted(problems, 'test problem')}, one model, one task)."
        )
    return (
        f"what is decodable need not be used by the model, and this is one model on one task ({best.target}, "
        f"{counted(problems, 'test problem')}); only interventions show use."
    )


def _blind(grid: Grid, target: str) -> str:
    """That x0-hat shows what the best probe does not read; empty unless the 95 % intervals say so: of the difference,
    and of x0-hat above chance."""
    best, data = grid.best(target), grid.dataset.sel(target=target)
    cell, source = grid.at(target, best.cell), str(grid.at(target, best.cell).x0_source.values)
    if not (cell.above_x0_upper < 0) or source not in (X0, X0_PARSED):
        return ""
    decoded, step = decoded_steps(data), best.cell.step
    steps = nearest(step, decoded) if source == X0_PARSED else [step]
    lower = [float(grid.at(target, replace(best.cell, step=s)).baseline_lower.sel(baseline=source)) for s in steps]
    if max(lower) <= float(cell.chance):
        return ""
    where = "at the same step" if step in steps else "at the nearest decoded steps"
    difference = _ends(*(float(cell[f"above_x0{end}"]) for end in ("", "_lower", "_upper")))
    return (
        f"x0-hat shows `{target}` {where} (right on {float(cell.x0_accuracy):.2f}; the probe of {_where(grid, best)} "
        f"on {best.accuracy:.2f}, a difference of {difference}), so the model has it there. The linear probe, or the "
        "mean over tokens that it reads (pooling), cannot read it: a blank map is a limit of the probe."
    )


def _where(grid: Grid, best: Best) -> str:
    text = f"layer {best.cell.layer} at step {best.cell.step}"
    text += f", position {best.cell.position}" if grid.dataset.sizes["position"] > 1 else ""
    return text + (f", {best.cell.branch}" if "branch" in grid.dataset.dims else "")


def _ends(value: float, lower: float, upper: float) -> str:
    return f"{value:.2f} [{lower:.2f}, {upper:.2f}]"
