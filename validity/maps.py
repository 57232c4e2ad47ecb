"""Whole maps with fitted probes: coverage of all intervals, and rates of false positive cells.

Features have a known distribution. Probes on layers and inputs are fitted to 100 training problems, chosen on 40
validation problems and tested on 60 test problems, by the code that a run uses. The true value of every reported number
is its value for the same probes on FRESH further problems. Differences between training sets therefore do not count as
errors of an interval: intervals cover the choice of test problems only.
"""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import xarray as xr

from cosprobe.activations import InputFeatures, ProbeSamples
from cosprobe.activations.dataset import relabelled
from cosprobe.cells import DIFFICULTY, EMBED, FIRST_FRAME, INPUTS, NOISE, PROMPT, X0, X_T, Cell
from cosprobe.config import ProbeConfig, TrainerConfig
from cosprobe.evaluation import ALPHA, evaluate, read_inputs
from cosprobe.evaluation.checks import examine
from cosprobe.probes import fit
from cosprobe.tasks import Role, Target
from validity.rows import Row, alarms, shares_covered

REGIONS, CHANNELS, STEPS, LAYERS, FRAMES = 4, 6, 4, 3, 2
SIZES = {"train": 100, "validation": 40, "test": 60}  # problems
FRESH = 1000  # further problems, which give true values up to 0.015
ROUNDING = 1e-9  # the accuracy of chance is exact up to rounding
BEFORE, AFTER = [0, 0, 2, 3], [0, 2, 2, 3]  # decoded steps around each step: step 1 is not decoded
WORLDS = {
    "planted": "answer in some cells, less in inputs and x0-hat",
    "null": "no answer anywhere",
    "as good": "every cell as good as the best input, which changes from step to step",
}
# variables with an interval, and the names of its lower and upper ends
SHARES = {"accuracy": ("lower", "upper"), "baseline_accuracy": ("baseline_lower", "baseline_upper")}
SHARES |= {
    n: (f"{n}_lower", f"{n}_upper")
    for n in ("correct_when_model_wrong", "transfer_step", "transfer_layer", "transfer_hard")
}
DIFFERENCES = {name: (f"{name}_lower", f"{name}_upper") for name in ("above_x0", "selectivity")}
ONSETS = {name: (f"{name}_lower", f"{name}_upper") for name in ("latency", "x0_latency", "lag", "depth")}


def world(kind: str, rng: np.random.Generator) -> tuple[ProbeSamples, dict[str, InputFeatures]]:
    """Samples and inputs of a run, with FRESH further test problems after its own.

    Problems have one to three noise seeds. One of the four labels is less frequent than the others.
    """
    problems = [*SIZES.values(), FRESH]
    seeds = rng.integers(1, 4, sum(problems))
    keys = np.repeat(np.arange(len(seeds)), seeds)
    split = np.repeat(np.repeat(["train", "validation", "test", "test"], problems), seeds)
    answer = rng.choice(REGIONS, len(seeds), p=[0.1, 0.3, 0.3, 0.3])[keys]
    seen, hard, count = rng.integers(0, 6, len(seeds))[keys], rng.integers(0, 2, len(seeds))[keys], len(keys)

    def features(*axes: int, width: int, strength: np.ndarray | float) -> np.ndarray:
        """Noise, partly shared by the seeds of a problem. The region of the answer is shifted along one direction."""
        shape = (count, *axes, REGIONS, width)
        x = rng.normal(size=shape, scale=0.8) + rng.normal(size=(len(seeds), *shape[1:]), scale=0.6)[keys]
        direction = rng.normal(size=(*axes, width))
        direction *= np.expand_dims(np.asarray(strength), -1) / np.linalg.norm(direction, axis=-1, keepdims=True)
        x[np.arange(count), ..., answer, :] += direction
        return x

    best = np.zeros((len(INPUTS), STEPS))
    layers = np.zeros((STEPS, LAYERS))
    if kind == "planted":
        layers[:, 1:], layers[2:, 0] = [[0.8, 1.6], [1.2, 2.0], [1.6, 2.4], [1.6, 2.4]], 0.8
        best[[INPUTS.index(EMBED), INPUTS.index(X_T)]] = np.linspace(0, 1.2, STEPS)
    elif kind == "as good":
        layers[:], best[INPUTS.index(EMBED)] = 1.4, 1.2
        best[INPUTS.index(NOISE)] = best[INPUTS.index(X_T)] = 1.2
        best[INPUTS.index(EMBED), ::2] = best[INPUTS.index(X_T), 1::2] = 1.4
    inputs = {}
    for name in (NOISE, FIRST_FRAME, EMBED, X_T, X0):
        steps = STEPS if name in (EMBED, X_T, X0) else 1
        of_x0 = np.array([0.4, 0.8, 1.6, 1.6]) * (kind == "planted")
        strength = best[INPUTS.index(name), :steps] if name in INPUTS else of_x0
        parts = features(steps, FRAMES, width=3, strength=np.repeat(strength[:, None] / FRAMES**0.5, FRAMES, axis=1))
        region = torch.from_numpy(parts).float()
        inputs[name] = InputFeatures(region.mean(dim=3, keepdim=True), region)
    for name in (PROMPT, DIFFICULTY):
        inputs[name] = InputFeatures(torch.from_numpy(rng.normal(size=(count, 1, 1, 1, 3))).float())
    labels = {"answer": torch.from_numpy(answer), "seen": torch.from_numpy(seen)}
    labels["control"] = torch.from_numpy(rng.integers(0, REGIONS, len(seeds))[keys])
    targets = (
        Target("answer", REGIONS, "candidate", Role.ANSWER, ("one",)),
        Target("seen", 6, "problem", Role.PERCEPTION, ("one",)),
        Target("control", REGIONS, "candidate", Role.CONTROL, ("one",)),
    )
    controls, relabels = relabelled(targets, labels)
    scores = rng.random((count, STEPS, REGIONS))
    scores[np.arange(count), :, answer] += (kind == "planted") * np.array([0.1, 0.2, 0.4, 0.4])
    scores[:, [step for step in range(STEPS) if step not in BEFORE]] = np.nan
    drawn = np.where(rng.random(count) < 0.7, answer, rng.integers(-1, REGIONS, count))
    samples = ProbeSamples(
        features=torch.from_numpy(features(STEPS, LAYERS, width=CHANNELS, strength=layers)).float().flatten(1, 2),
        cells=tuple(Cell(step, layer, "cond", "all") for step in range(STEPS) for layer in range(LAYERS)),
        targets=(*targets, *controls),
        labels=labels | relabels,
        split=split,
        keys=np.array([f"{key:06d}" for key in keys]),
        kinds=np.full(count, "one"),
        scores={"x0_scores": scores},
        model_answer=drawn,
        difficulty={"hard": hard},
    )
    return samples, inputs


def simulate(runs: int, seed: int = 0) -> list[Row]:
    """Rows of all simulated maps. runs: number of maps of each kind of world."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    covered: dict[str, list[tuple[float, float]]] = defaultdict(list)
    rows: list[Row] = []
    for kind, about in WORLDS.items():
        wrong: dict[str, list[bool]] = defaultdict(list)
        for number in range(runs):
            run, truth = maps_of(kind, np.random.default_rng([seed, list(WORLDS).index(kind), number]))
            for name, alarm in false_cells(run, truth).items():
                wrong[name].append(alarm)
            if kind == "planted":
                for name, hits in coverage(run, truth):
                    covered[name].append(hits)
        rows += [alarms(name, about, np.array(found)) for name, found in wrong.items()]
    for name, found in covered.items():
        held, widths = np.array(found).T
        rows.append(shares_covered("intervals of a whole map, of frozen probes on fresh problems", name, held, widths))
    return rows


def maps_of(kind: str, rng: np.random.Generator) -> tuple[xr.Dataset, xr.Dataset]:
    """The map of a run, and the map of the same probes on fresh problems."""
    samples, inputs = world(kind, rng)
    test = np.flatnonzero(samples.split == "test")
    of_run = np.isin(samples.keys[test], np.unique(samples.keys[test])[: SIZES["test"]])
    learned = np.flatnonzero(samples.split != "test")
    grids = []
    bank = None
    for part, draws in ((test[of_run], 199), (test[~of_run], 99)):
        at = np.concatenate([learned, part])
        these = samples.rows(at)
        of_these = {name: replace(one, whole=one.whole[at], region=None if one.region is None else one.region[at])
                    for name, one in inputs.items()}  # fmt: skip
        if bank is None:
            recipe = ProbeConfig(kind="ridge", penalties=[0.1, 1.0])
            with warnings.catch_warnings(), TemporaryDirectory() as folder:
                warnings.simplefilter("ignore")
                bank = fit(these, recipe, TrainerConfig(precision="32-true"), Path(folder), 0)
        readings = read_inputs(these, of_these, "ridge", [0.1, 1.0])
        grid, _ = examine(evaluate(these, ("transformer",) * STEPS, bank, readings), these, of_these, bank, draws=draws)
        grids.append(grid.dataset.isel(position=0))
    return grids[0], grids[1]


def false_cells(run: xr.Dataset, truth: xr.Dataset) -> dict[str, bool]:
    """Whether a map has a significant cell whose true accuracy is not above that of its baselines, by test."""
    here, there = run.sel(target="answer"), truth.sel(target="answer")
    rivals = there.baseline_accuracy.sel(baseline=list(INPUTS)).max("baseline")
    parsed = there.baseline_accuracy.sel(baseline="x0_parsed").values
    shown = np.fmax(np.fmax(parsed[BEFORE], parsed[AFTER]), there.baseline_accuracy.sel(baseline=X0).values)
    no_better = there.accuracy.transpose("step", "layer") <= np.maximum(rivals, there.chance)
    behind = there.accuracy.transpose("step", "layer").values <= shown[:, None]
    p, above_x0 = (here[name].transpose("step", "layer").values for name in ("p_evidence", "p_x0"))
    return {
        "a cell with evidence that beats no more than chance and inputs": bool(((p <= ALPHA) & no_better.values).any()),
        "a cell above x0-hat that is not": bool(((above_x0 <= ALPHA) & behind).any()),
        "random labels decodable": bool((run.p_permutation.sel(target="control") <= ALPHA).any()),
    }


def coverage(run: xr.Dataset, truth: xr.Dataset) -> Iterator[tuple[str, tuple[float, float]]]:
    """For each variable, the share of intervals that contain the true value, and their mean width."""
    for name, (low, high) in (SHARES | DIFFERENCES | ONSETS).items():
        if name in run:
            yield from _held(name, truth[name].values, run[low].values, run[high].values)
    yield from _held("learning", truth.learning.values, run.learning_lower.values, run.learning_upper.values)
    change = (truth.residual_after - truth.residual_before).values
    yield from _held("confounds removed", change, run.residual_lower.values, run.residual_upper.values)


def _held(name: str, value: np.ndarray, low: np.ndarray, high: np.ndarray) -> Iterator[tuple[str, tuple[float, float]]]:
    known = np.isfinite(value) & np.isfinite(low) & np.isfinite(high)
    if known.any():
        value, low, high = value[known], low[known], high[known]
        yield name, (float(((low - ROUNDING <= value) & (value <= high + ROUNDING)).mean()), float((high - low).mean()))
