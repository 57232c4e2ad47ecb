"""Onsets and roles of layers, and accuracy along steps against accuracy along frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from cosprobe.activations import PERMUTED, ProbeSamples
from cosprobe.behaviour.findings import AXES, PERCEPTION, ROLES, Finding, finding, nothing
from cosprobe.cells import Place
from cosprobe.evaluation import (
    HOLDS,
    UNCLEAR,
    UNTESTED,
    Claim,
    Evaluated,
    Grid,
    Latency,
    correctness,
    half_maximum_latency,
    lag,
    lag_difference,
    mean_interval,
    verdict,
)
from cosprobe.evaluation.checks import TRAINED, WeightsLine
from cosprobe.models import COND
from cosprobe.tasks import ANSWER_ROLES, Role

DRAWS = 1000
DEEPER = "Accuracy for the answer lies in deeper layers than accuracy for what is visible"


@dataclass(frozen=True, eq=False)
class LayerLine:
    """Accuracy of the probes of one target at every step and layer, on test.

    position, best: position and layer of the best cell (on validation). chance: accuracy of the best guess.
    evident: axes along which there is evidence on validation: `layers` at the first step, `steps` at the best layer.
    rows: indices of the samples among all test samples.
    """

    target: str
    role: Role
    position: str
    steps: tuple[int, ...]
    layers: tuple[int, ...]
    correct: Float[np.ndarray, "step layer sample"]
    chance: float
    best: int
    evident: frozenset[str]
    rows: Int[np.ndarray, " sample"]
    keys: Shaped[np.ndarray, " sample"]

    def at(self, rows: Int[np.ndarray, " row"]) -> Float[np.ndarray, "step layer row"]:
        """Correctness of these samples, by their indices among all test samples."""
        return self.correct[:, :, np.searchsorted(self.rows, rows)]


def layer_lines(evaluated: Evaluated, grid: Grid) -> list[LayerLine]:
    """One entry for each target but controls, at the position of its best cell."""
    found, index = [], evaluated.index()
    shown = (*ANSWER_ROLES, Role.PERCEPTION, Role.MEMORY)
    for result in evaluated.results:
        target, test = result.target, result.test
        if target.role not in shown or target.name not in grid.targets or COND not in evaluated.branches:
            continue
        labels = np.asarray(test.labels)
        known = (labels >= 0) if labels.ndim == 1 else (labels >= 0).all(axis=1)
        rows = np.flatnonzero(known)
        if not len(rows):
            continue
        best = grid.best(target.name).cell
        at = index[:, :, evaluated.branches.index(COND), evaluated.positions.index(best.position)]
        if (at < 0).any():  # cells were not trained at every layer of every step
            continue
        correct = correctness(np.asarray(test.predicted)[at.ravel()][:, rows], labels[rows])
        one = grid.plane(target.name, best.position, COND)
        evident = {"layers": bool(np.isfinite(one.depth.values[0])),
                   "steps": bool(np.isfinite(one.latency.sel(layer=best.layer)))}  # fmt: skip
        found.append(
            LayerLine(
                target.name, target.role, best.position, evaluated.steps, evaluated.layers,
                correct.reshape(*at.shape, len(rows)),
                float(one.chance), best.layer, frozenset(name for name, yes in evident.items() if yes), rows,
                np.asarray(test.keys)[rows],
            )
        )  # fmt: skip
    return found


def perception(lines: Sequence[LayerLine], null: Sequence[WeightsLine] = ()) -> list[Finding]:
    """Difference of onset, over layers at the first step and over steps, between the answer and what is visible.

    The onset is where accuracy above chance first reaches half of its maximum (`evaluation.latency`). An onset at the
    first layer or step is only known to be there or before.
    null: lines of other weights. Where both onsets exist with permuted weights, too, the claim on layers holds only if
    the trained difference exceeds the permuted one as well, on the same samples.
    """
    found = []
    for answer, visible, rows, keys in _pairs(lines):
        for axis, places in (("layers", answer.layers), ("steps", answer.steps)):
            if axis not in answer.evident & visible.evident or len(places) < 2:
                continue
            points = np.stack([_along(line, axis, rows) for line in (answer, visible)])
            chance = np.array([answer.chance, visible.chance])
            onset = half_maximum_latency(points, chance, places, keys, np.ones(2, bool), DRAWS)
            late = lag(onset, [0], [1])
            value, lower, upper = (float(getattr(late, name)[0]) for name in ("value", "lower", "upper"))
            neither = bool(late.at_most[0] and late.at_least[0])
            order = "a shallower layer" if axis == "layers" else "an earlier step"
            where = f"step {answer.steps[0]}" if axis == "layers" else "the best layers"
            one, other = (f"{line.target} {_onset(onset, i)}" for i, line in enumerate((answer, visible)))
            unknown = "; both from the first one on: their order is not known" if neither else ""
            outcome, untrained = UNTESTED if neither else verdict(lower, upper), ""
            if axis == "layers":
                untrained, above = _untrained(answer, visible, null)
                outcome = UNCLEAR if outcome == HOLDS and above is False else outcome
            stated = Claim(
                f"What is visible is decodable at {order} than the answer",
                f"onset at {where}: {one}, {other}{unknown}{untrained}", visible.target,
                value, lower, upper, outcome, axis,
            )  # fmt: skip
            about = f"{answer.target}, {visible.target}"
            found.append(finding(PERCEPTION, about, stated, keys))
    why = "no answer and visible target with evidence share samples"
    return found or [nothing(PERCEPTION, "What is visible is decodable at a shallower layer than the answer", why)]


def _untrained(answer: LayerLine, visible: LayerLine, null: Sequence[WeightsLine]) -> tuple[str, bool | None]:
    """What permuted weights show for the same two targets; whether the trained difference of onsets is clearly larger,
    None where permuted weights do not give both onsets."""
    by_name = {(line.target, line.position): line for line in null}
    pair = [by_name.get((line.target, line.position)) for line in (answer, visible)]
    if pair[0] is None or pair[1] is None:
        return "; permuted weights were not run at this step: no null", None
    one, other = pair[0], pair[1]
    rows = np.intersect1d(one.rows, other.rows)
    if len(rows) < 2:
        return "; permuted weights: no samples with both labels, no null", None
    lines = [(line, weights) for weights in (TRAINED, PERMUTED) for line in (one, other)]
    points = np.stack([line.correct[weights][:, np.searchsorted(line.rows, rows)] for line, weights in lines])
    found = np.array([line.evident[weights] for line, weights in lines])
    keys = one.keys[np.searchsorted(one.rows, rows)]
    chance = np.array([line.chance for line, _ in lines])
    onset = half_maximum_latency(points, chance, one.layers, keys, found, DRAWS)
    onsets = ", ".join(f"{line.target} {_onset(onset, i)}" for i, (line, _) in enumerate(lines[2:], start=2))
    said = f"; permuted weights (n = {len(rows)}): {onsets}"
    value, lower, upper = lag_difference(onset, (0, 1), (2, 3))
    if onset.censored[2] and onset.censored[3]:
        return f"{said}: their order is not known, no null", None
    if not np.isfinite([value, lower, upper]).all():
        return f"{said}: no null" if found[:2].all() else f"{said}: too few samples for a null", None
    return f"{said}; trained minus permuted {value:+.2f} [{lower:+.2f}, {upper:+.2f}]", lower > 0


def roles(lines: Sequence[LayerLine]) -> list[Finding]:
    """Centre of mass over layers of accuracy above chance: of answers against what is visible, and of answers at the
    first against the last step. See `centre_difference`."""
    found = []
    for answer, visible, rows, keys in _pairs(lines):
        if "layers" not in answer.evident & visible.evident or len(answer.layers) < 2:
            continue
        pair = answer.at(rows)[0], visible.at(rows)[0]
        centres = centre_difference(*pair, (answer.chance, visible.chance), answer.layers, keys)
        measure = f"centre at step {answer.steps[0]}: layer {centres[0][0]:.1f} and layer {centres[0][1]:.1f}"
        about = f"{answer.target}, {visible.target}"
        found.append(_of_centres(DEEPER, measure, visible.target, centres, about, keys))
    for answer in lines:
        if answer.role not in ANSWER_ROLES or "layers" not in answer.evident or min(answer.correct.shape[:2]) < 2:
            continue
        first, last = answer.correct[0], answer.correct[-1]
        centres = centre_difference(first, last, (answer.chance,) * 2, answer.layers, answer.keys)
        start, end = answer.steps[0], answer.steps[-1]
        measure = f"centre at step {start}: layer {centres[0][0]:.1f}, at step {end}: layer {centres[0][1]:.1f}"
        claim = "Accuracy for the answer lies in shallower layers at the last step than at the first"
        found.append(_of_centres(claim, measure, "at the last step", centres, answer.target, answer.keys))
    why = "no answer has evidence at the first step, or probes are at one layer only"
    return found or [nothing(ROLES, DEEPER, why)]


def axes(evaluated: Evaluated, grid: Grid) -> list[Finding]:
    """Gain of accuracy along steps (last minus first, mean over frames) minus gain along frames (last minus first, mean
    over steps), of the probes of each frame at the layer of the best cell.

    The shares of the variance of accuracy that steps and frames explain (main effects of a two-way table) are described
    only: luck of the samples makes both too large.
    """
    found, index = [], evaluated.index()
    frames = [i for i, name in enumerate(grid.dataset.frame.values.tolist()) if name >= 0]
    stated = "Accuracy gains more along steps than along frames"
    for result in evaluated.results:
        target, test = result.target, result.test
        if target.role not in ANSWER_ROLES or target.name not in grid.targets or COND not in evaluated.branches:
            continue
        if min(len(frames), len(evaluated.steps)) < 2:
            continue
        labels = np.asarray(test.labels)
        rows = np.flatnonzero(labels >= 0)
        layer = evaluated.layers.index(grid.best(target.name).cell.layer)
        at = index[:, layer, evaluated.branches.index(COND)][:, frames]
        if (at < 0).any():  # cells were not trained at every frame of every step
            continue
        keys = np.asarray(test.keys)[rows]
        correct = correctness(np.asarray(test.predicted)[at.ravel()][:, rows], labels[rows]).reshape(*at.shape, -1)
        along = (correct[-1] - correct[0]).mean(axis=0), (correct[:, -1] - correct[:, 0]).mean(axis=0)
        difference = along[0] - along[1]
        lower, upper = (float(end[0]) for end in mean_interval(difference[None], keys))
        step, frame = explained(correct.mean(axis=-1))
        gains = f"gain along steps {along[0].mean():+.2f}, along frames {along[1].mean():+.2f}"
        shares = f"steps explain {step:.2f} of the variance, frames {frame:.2f}"
        measure = f"layer {evaluated.layers[layer]}: {gains}; {shares}"
        claim = Claim(stated, measure, "frames", float(difference.mean()), lower, upper, verdict(lower, upper))
        found.append(finding(AXES, target.name, claim, keys))
    return found or [nothing(AXES, stated, "probes read all frames together; train with probe=frames")]


# numbers


def _pairs(
    lines: Sequence[LayerLine],
) -> list[tuple[LayerLine, LayerLine, Int[np.ndarray, " row"], Shaped[np.ndarray, " row"]]]:
    """Every answer with every visible target, on the samples that have both labels."""
    found = []
    for answer in (line for line in lines if line.role in ANSWER_ROLES):
        for visible in (line for line in lines if line.role is Role.PERCEPTION):
            rows = np.intersect1d(answer.rows, visible.rows)
            if len(rows):
                found.append((answer, visible, rows, answer.keys[np.searchsorted(answer.rows, rows)]))
    return found


def _along(line: LayerLine, axis: str, rows: Int[np.ndarray, " row"]) -> Float[np.ndarray, "place row"]:
    """Correctness over layers at the first step, or over steps at the best layer."""
    correct = line.at(rows)
    return correct[0] if axis == "layers" else correct[:, line.layers.index(line.best)]


def _onset(onset: Latency, line: int) -> str:
    value = float(onset.value[line])
    return "not decodable" if np.isnan(value) else f"{value:.1f}" + (" or before" if onset.censored[line] else "")


def centre_difference(
    one: Float[np.ndarray, "layer row"],
    other: Float[np.ndarray, "layer row"],
    chances: tuple[float, float],
    layers: Sequence[int],
    keys: Shaped[np.ndarray, " row"],
) -> tuple[Float[np.ndarray, " 2"], float, float]:
    """Both centres of mass over layers of accuracy above chance, and the 95 % interval of the first minus the second.

    one, other: right (1) or wrong (0) on the same samples. chances: accuracy of the best guess of each. Layers below
    chance count with negative weight: without them, the luck of layers that know nothing would move the centre.
    The interval is `mean_interval` of the linearised centres (each sample's influence on the ratio of two sums). NaN
    where accuracy is on average not above chance.
    """
    centres, influence = np.full(2, np.nan), np.zeros((2, one.shape[1]))
    for i, (correct, chance) in enumerate(zip((one, other), chances, strict=True)):
        above = correct - chance
        total = above.mean(axis=1).sum()
        if total <= 0:
            return centres, np.nan, np.nan
        centres[i] = (np.array(layers) * above.mean(axis=1)).sum() / total
        influence[i] = ((np.array(layers) - centres[i])[:, None] * above).sum(axis=0) / total
    lower, upper = (float(end[0]) for end in mean_interval((influence[0] - influence[1])[None], keys))
    difference = centres[0] - centres[1]
    return centres, difference + lower, difference + upper


def _of_centres(
    claim: str,
    measure: str,
    control: str,
    found: tuple[Float[np.ndarray, " 2"], float, float],
    about: str,
    keys: Shaped[np.ndarray, " row"],
) -> Finding:
    (one, other), lower, upper = found
    stated = Claim(claim, measure, control, float(one - other), lower, upper, verdict(lower, upper), "layers")
    return finding(ROLES, about, stated, keys)


def explained(accuracy: Float[np.ndarray, "step frame"]) -> tuple[float, float]:
    """Shares of the variance over all cells that the means of steps and those of frames explain."""
    centred = accuracy - accuracy.mean()
    total = float((centred**2).mean())
    if total == 0:
        return np.nan, np.nan
    return float((centred.mean(axis=1) ** 2).mean() / total), float((centred.mean(axis=0) ** 2).mean() / total)


def effective_rank(states: Float[Tensor, "row channel"]) -> float:
    """exp of the entropy of the variances along principal axes, without the channel of the largest mean square.

    Source: Roy and Vetterli (2007), "The effective rank", of centred states here.
    """
    channels = states.square().mean(dim=0)
    kept = states[:, torch.arange(len(channels)) != channels.argmax()]
    variance = torch.linalg.svdvals(kept - kept.mean(dim=0)).square()
    share = variance / variance.sum().clamp_min(1e-30)
    return float(torch.exp(-(share * share.clamp_min(1e-30).log()).sum()))


# curves


def layer_curves(lines: Sequence[LayerLine]) -> dict[str, xr.DataArray]:
    return {
        f"skill_{line.target}": xr.DataArray(
            (line.correct.mean(axis=-1) - line.chance) / max(1 - line.chance, 1e-9),
            {"skill_step": list(line.steps), "skill_layer": list(line.layers)},
            attrs={"description": "accuracy above chance, as a share of what is possible", "role": str(line.role)},
        )
        for line in lines
    }


def energy(samples: ProbeSamples) -> dict[str, xr.DataArray]:
    """Size and spread of the pooled states of every layer and step, on test. Empty where single tokens are kept."""
    here = [i for i, cell in enumerate(samples.cells) if cell.branch == COND]
    positions = list(dict.fromkeys(samples.cells[i].position for i in here))
    if Place.of(positions[0]).is_token:
        return {}
    here = [i for i in here if samples.cells[i].position == positions[0]]
    steps, layers = (sorted({getattr(samples.cells[i], name) for i in here}) for name in ("step", "layer"))
    test = torch.from_numpy(np.flatnonzero(samples.split == "test"))
    energy, top, rank = (np.full((len(steps), len(layers)), np.nan) for _ in range(3))
    for i in here:
        cell = samples.cells[i]
        at = steps.index(cell.step), layers.index(cell.layer)
        states = samples.features[test, i].flatten(0, 1).double()
        channels = states.square().mean(dim=0)
        energy[at], top[at] = float(channels.sum()), float(channels.max() / channels.sum().clamp_min(1e-30))
        rank[at] = effective_rank(states)
    axis = {"energy_step": steps, "energy_layer": layers}
    about = {
        "energy": (energy, "mean squared norm of the pooled states"),
        "top_channel": (top, "share of the largest channel in it: near 1 with massive activations"),
        "effective_rank": (
            rank,
            "effective rank, without the largest channel",
        ),
    }
    return {name: xr.DataArray(values, axis, attrs={"description": text}) for name, (values, text) in about.items()}
