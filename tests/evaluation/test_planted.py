"""The whole line on synthetic stores: a planted signal is found where it is and nowhere else, noise gives nothing."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from cosprobe.activations.dataset import InputFeatures, ProbeSamples
from cosprobe.cells import EMBED, NOISE, X0, Cell
from cosprobe.config import ProbeConfig, TrainerConfig
from cosprobe.evaluation.baselines import read_inputs
from cosprobe.evaluation.grid import Grid
from cosprobe.evaluation.intervals import correctness
from cosprobe.evaluation.predictions import Evaluated, evaluate
from cosprobe.evaluation.scoring import build_grid
from cosprobe.evaluation.significance import max_t_bootstrap
from cosprobe.probes.logistic import fit
from cosprobe.tasks import Target
from tests.examples.shapes import unchecked

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

REGIONS, CHANNELS = 4, 8
ANSWER = Target("answer", REGIONS, "candidate", "answer", ("one",))
SIZES = {"train": 100, "validation": 60, "test": 80}  # problems
STRONG = {(step, layer): 2.0 for step in (1, 2, 3) for layer in (2, 3)}
PLANTED = STRONG | {(4, 3): 1.4}  # the last is right on about half of the samples, x0-hat on a quarter: near the limit
LEVEL = 0.05


def store(
    seed: int, layers: int, steps: int, planted: dict[tuple[int, int], float] | None = None, seeds: int = 1
) -> tuple[ProbeSamples, dict[str, InputFeatures]]:
    """Features that share much of their noise between cells and between the noise seeds of a problem, which a null
    store must survive, and inputs that share it too. planted: (step, layer) and how far the answer's region is moved
    there."""
    rng = np.random.default_rng(seed)
    problems = sum(SIZES.values())
    count = problems * seeds
    cells = [Cell(t, n, "cond", "all") for t in range(steps) for n in range(layers)]
    answer = np.repeat(rng.integers(0, REGIONS, problems), seeds)
    beside = 1 + 2 * steps  # the noise, then embed and x0-hat of every step
    x = rng.normal(size=(count, len(cells) + beside, REGIONS, CHANNELS))
    x += 0.7 * rng.normal(size=(count, 1, REGIONS, CHANNELS))
    x += 0.7 * np.repeat(rng.normal(size=(problems, len(cells) + beside, REGIONS, CHANNELS)), seeds, axis=0)
    for (step, layer), strength in (planted or {}).items():
        direction = rng.normal(size=CHANNELS)
        at = cells.index(Cell(step, layer, "cond", "all"))
        x[np.arange(count), at, answer] += 1.5 * strength * direction / np.linalg.norm(direction)
    x0_scores = rng.random((count, steps, REGIONS))
    x0_scores[:, 1::2] = np.nan  # steps that were not decoded
    x, others = x[:, : len(cells)], np.split(x[:, len(cells) :, None], [1, 1 + steps], axis=1)
    named = zip((NOISE, EMBED, X0), (torch.from_numpy(part).float() for part in others), strict=True)
    inputs = {name: InputFeatures(part) for name, part in named}  # in one form only, to save time
    samples = ProbeSamples(
        features=torch.from_numpy(x).float(),
        cells=tuple(cells),
        targets=(ANSWER,),
        labels={"answer": torch.from_numpy(answer)},
        split=np.repeat(np.repeat(list(SIZES), list(SIZES.values())), seeds),
        keys=np.repeat([f"problem {i}" for i in range(problems)], seeds),
        kinds=np.full(count, "one"),
        scores={"x0_scores": x0_scores, "final": rng.random((count, REGIONS))},
        model_answer=rng.integers(0, REGIONS, count),
        replica=np.tile(np.arange(seeds), problems),
    )
    return samples, inputs


def through(
    samples: ProbeSamples, inputs: dict[str, InputFeatures], folder: Path, seed: int, draws: int
) -> tuple[Evaluated, Grid]:
    """Probes fitted, read and scored as a run does it."""
    recipe = ProbeConfig(kind="ridge", penalties=[0.1, 1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bank = fit(samples, recipe, TrainerConfig(precision="32-true"), folder, seed)
    steps = len({cell.step for cell in samples.cells})
    readings = read_inputs(samples, inputs, recipe.kind, recipe.penalties, seed)
    evaluated = evaluate(samples, ("transformer",) * steps, bank, readings)
    return evaluated, build_grid(evaluated, draws, seed)


def p_above_latents(evaluated: Evaluated, draws: int, seed: int) -> dict[tuple[int, int], float]:
    """Corrected p of every layer being above the probe of x0-hat latents at its step."""
    test = evaluated.results[0].test
    right = correctness(test.predicted, test.labels)
    latents = test.inputs[X0][[cell.step for cell in evaluated.cells], 0] == test.labels
    p = max_t_bootstrap(right - latents, test.keys, draws, seed).p
    return {(cell.step, cell.layer): float(value) for cell, value in zip(evaluated.cells, p, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 2])
def test_the_corrected_map_shows_the_planted_cells_and_no_others(tmp_path, seeds):
    worlds, strays, strays_ahead = 8, 0, 0
    for seed in range(worlds):
        evaluated, grid = through(*store(seed, 6, 6, PLANTED, seeds), tmp_path, seed, draws=500)
        plane = grid.plane("answer")
        found, evidence, above_x0 = (
            {(int(step), int(layer)) for step, layer in np.argwhere(plane[name].values <= LEVEL)}
            for name in ("p_permutation", "p_evidence", "p_x0")
        )
        ahead = {cell for cell, p in p_above_latents(evaluated, 500, seed).items() if p <= LEVEL}
        for cells in (found, evidence, ahead, above_x0):
            assert cells >= set(STRONG)
        assert evidence <= found
        strays += bool(found - set(PLANTED))
        strays_ahead += bool(ahead - set(PLANTED))
        best = grid.best("answer").cell
        assert (best.step, best.layer) in STRONG
        assert all(float(plane.skill.sel(step=t, layer=s)) > 0.3 for t, s in STRONG)
    assert strays <= 2  # one of twenty maps may show a cell too many
    assert strays_ahead <= 2


@pytest.mark.slow
@pytest.mark.parametrize("worlds", [40, pytest.param(200, marks=pytest.mark.docs)])
def test_null_stores_show_a_cell_in_at_most_one_map_of_ten(tmp_path, capsys, worlds):
    """Stores without any signal, one and two noise seeds per problem by turns, at level 0.05: one of 20 is expected to
    show a cell, one of 10 may. `make validity` has the same with more stores and narrower limits."""
    alarms, evidence, ahead = 0, 0, 0
    for seed in range(worlds):
        with unchecked(seed > 1):
            evaluated, grid = through(*store(1000 + seed, 4, 4, seeds=1 + seed % 2), tmp_path, seed, draws=199)
            ahead += min(p_above_latents(evaluated, 199, seed).values()) <= LEVEL
        alarms += bool((grid.dataset.p_permutation <= LEVEL).any())
        evidence += bool((grid.dataset.p_evidence <= LEVEL).any())
    said = f"{alarms} show a cell above chance, {evidence} one above inputs too, {ahead} one ahead of x0-hat"
    with capsys.disabled():
        print(f"\nof {worlds} null maps {said}")  # noqa: T201
    assert 1 <= alarms <= worlds // 10
    assert evidence <= worlds // 20  # two conditions: rarer than the level
    assert ahead <= worlds // 10
