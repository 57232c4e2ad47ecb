"""A small run with everything in it, made once for the tests of what is read from checks."""

from __future__ import annotations

import logging
import tempfile
import warnings
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from cosprobe.baselines import WEIGHTS, WeightsTable
from cosprobe.checks import Checks, examine
from cosprobe.data import ProbeSamples
from cosprobe.devices import TrainerConfig
from cosprobe.evaluation import evaluate
from cosprobe.grid import Grid
from cosprobe.predictions import Evaluated
from cosprobe.probes import ProbeBank
from cosprobe.samples import relabelled, with_fixed
from cosprobe.tasks import Target
from cosprobe.training import ProbeConfig, fit
from cosprobe.types import FIRST_FRAME, NOISE, PROMPT, SOURCES, X0, Cell

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

REGIONS, CHANNELS, STEPS, LAYERS, SEEDS = 4, 16, 3, 3, 2
BOTH = ("one_exit", "choice")
TARGETS = (
    Target("answer", REGIONS, "candidate", "answer", ("one_exit",)),
    Target("choice", REGIONS, "candidate", "choice", ("choice",)),
    Target("start", 6, "problem", "perception", BOTH),
    Target("length", 2, "problem", "nuisance", BOTH),
    Target("control", REGIONS, "candidate", "control", BOTH),
)
PROBLEMS = {"train": 96, "validation": 40, "test": 64}


@dataclass(frozen=True)
class Run:
    samples: ProbeSamples
    bank: ProbeBank
    evaluated: Evaluated
    grid: Grid
    checks: Checks
    weights: WeightsTable | None


def world(problems: dict[str, int] | None = None) -> ProbeSamples:
    """The answer stands in layers 1 and 2, better from step to step, and in x0-hat one step later."""
    problems = problems or PROBLEMS
    rng, total = np.random.default_rng(4), sum(problems.values())
    count = total * SEEDS
    sites = (*map(str, range(LAYERS)), *SOURCES)
    cells = tuple(Cell(step, site, "cond", "all") for step in range(STEPS) for site in sites)
    kinds = np.repeat(np.array(BOTH)[np.arange(total) % 2], SEEDS)
    wanted, start, length = (np.repeat(rng.integers(0, n, total), SEEDS) for n in (REGIONS, 6, 9))
    choice = np.where(rng.random(count) < 0.8, wanted, rng.integers(-1, REGIONS, count))
    x = rng.normal(size=(count, len(cells), REGIONS, CHANNELS))
    ways, places = rng.normal(size=(3, CHANNELS)), rng.normal(size=(6, CHANNELS))
    for i, cell in enumerate(cells):
        late = cell.step - 1 if cell.site == X0 else cell.step if cell.site in ("1", "2") else -1
        if late >= 0:
            x[np.arange(count), i, wanted] += (0.35 + 0.25 * late) * ways[late]
        x[:, i, 0] += 0.8 * places[start]
    labels = {
        "answer": np.where(kinds == "one_exit", wanted, -1),
        "choice": np.where(kinds == "choice", choice, -1),
        "start": start,
        "length": length // 5,
        "control": np.repeat(rng.integers(0, REGIONS, total), SEEDS),
    }
    found = {name: torch.from_numpy(values) for name, values in labels.items()}
    controls, relabels = relabelled(TARGETS, found)
    readout = rng.random((count, STEPS, REGIONS))
    readout[np.arange(count), 2, wanted] += 0.6
    readout[:, 1] = np.nan
    samples = ProbeSamples(
        features=torch.from_numpy(x).float(),
        cells=cells,
        targets=(*TARGETS, *controls),
        labels=found | relabels,
        split=np.repeat(np.repeat(list(problems), list(problems.values())), SEEDS),
        keys=np.repeat([f"problem {i}" for i in range(total)], SEEDS),
        kinds=kinds,
        scores={"x0_readout": readout, "final": rng.random((count, REGIONS))},
        choice=choice,
        replica=np.tile(np.arange(SEEDS), total),
        difficulty={"rooms": np.repeat(4 + np.arange(total) // 2 % 2, SEEDS), "length": length},
    )
    fixed = {
        NOISE: torch.from_numpy(rng.normal(size=(count, 1, REGIONS, 4))).float(),
        FIRST_FRAME: torch.from_numpy(rng.normal(size=(count, 1, REGIONS, 8))).float(),
        PROMPT: torch.ones(count, 32),
    }
    return with_fixed(samples, fixed, "cond", ["all"])


def random_weights(targets: tuple[str, ...] = ("answer", "choice")) -> WeightsTable:
    """Numbers of no meaning, all different."""
    rng = np.random.default_rng(1)
    cells = tuple(Cell(step, str(layer), "cond", "all") for step in (0, 1) for layer in range(LAYERS))
    accuracy = rng.uniform(0.3, 0.7, size=(len(targets), len(WEIGHTS), len(cells)))
    validation = rng.permutation(accuracy.ravel()).reshape(accuracy.shape)
    return WeightsTable(targets, cells, accuracy, accuracy - 0.1, accuracy + 0.2, validation, 60, 1234, 7.5)


def examined(samples: ProbeSamples, weights: WeightsTable | None) -> Run:
    """From samples to checks, as `train.py` does it."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        recipe, trainer = ProbeConfig(kind="ridge", lambdas=[0.1, 1.0]), TrainerConfig(precision="32-true")
        bank = fit(samples, recipe, trainer, Path(folder), 0).signed(store={"model": "none"})
    evaluated = evaluate(samples, ("transformer",) * STEPS, bank)
    grid, checks = examine(evaluated, samples, bank, weights)
    return Run(samples, bank, evaluated, grid, checks, weights)


@cache
def run() -> Run:
    return examined(world(), random_weights())


@cache
def small() -> Run:
    """Too few problems for description lengths, and nothing that could be a nuisance."""
    samples = world({"train": 24, "validation": 12, "test": 16})
    return examined(replace(samples, difficulty={"rooms": np.full(len(samples), 4)}), None)
