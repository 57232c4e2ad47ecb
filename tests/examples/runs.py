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

from cosprobe.activations.collection import StoreSettings
from cosprobe.activations.dataset import InputFeatures, ProbeSamples, difficulty_columns, relabelled
from cosprobe.cells import DIFFICULTY, FIRST_FRAME, NOISE, PROMPT, SOURCES, X0, Cell
from cosprobe.config import CaptureConfig, PipelineConfig, ProbeConfig, TrainerConfig
from cosprobe.evaluation.baselines import read_inputs
from cosprobe.evaluation.checks.suite import Checks, examine
from cosprobe.evaluation.checks.untrained import WEIGHTS, WeightsTable
from cosprobe.evaluation.grid import Grid
from cosprobe.evaluation.predictions import Evaluated, evaluate
from cosprobe.probes.bank import ProbeBank
from cosprobe.probes.logistic import fit
from cosprobe.tasks import Target

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

REGIONS, CHANNELS, STEPS, LAYERS, SEEDS = 4, 16, 3, 3, 2
FRAMES, CELLS = 2, 4  # of the inputs
BOTH = ("one_exit", "choice")
TARGETS = (
    Target("answer", REGIONS, "candidate", "answer", ("one_exit",)),
    Target("model_answer", REGIONS, "candidate", "model_answer", ("choice",)),
    Target("start", 6, "problem", "perception", BOTH),
    Target("length", 2, "problem", "nuisance", BOTH),
    Target("control", REGIONS, "candidate", "control", BOTH),
)
STORE = StoreSettings({"index": "none"}, 0, PipelineConfig(), {}, CaptureConfig(), {})
PROBLEMS = {"train": 96, "validation": 40, "test": 64}


@dataclass(frozen=True)
class Run:
    samples: ProbeSamples
    inputs: dict[str, InputFeatures]
    bank: ProbeBank
    evaluated: Evaluated
    grid: Grid
    checks: Checks
    weights: WeightsTable | None


def world(problems: dict[str, int] | None = None) -> tuple[ProbeSamples, dict[str, InputFeatures]]:
    """The answer stands in layers 1 and 2, better from step to step, and in x0-hat one step later. No input has it."""
    problems = problems or PROBLEMS
    rng, total = np.random.default_rng(4), sum(problems.values())
    count = total * SEEDS
    cells = tuple(Cell(step, layer, "cond", "all") for step in range(STEPS) for layer in range(LAYERS))
    kinds = np.repeat(np.array(BOTH)[np.arange(total) % 2], SEEDS)
    wanted, start, length = (np.repeat(rng.integers(0, n, total), SEEDS) for n in (REGIONS, 6, 9))
    model_answer = np.where(rng.random(count) < 0.8, wanted, rng.integers(-1, REGIONS, count))
    x = rng.normal(size=(count, len(cells), REGIONS, CHANNELS))
    ways, starts = rng.normal(size=(3, CHANNELS)), rng.normal(size=(6, CHANNELS))
    for i, cell in enumerate(cells):
        if cell.layer != 0:
            x[np.arange(count), i, wanted] += (0.35 + 0.25 * cell.step) * ways[cell.step]
        x[:, i, 0] += 0.8 * starts[start]

    def local(steps: int, channels: int = CHANNELS) -> InputFeatures:
        """Noise, whose mean over frames has unit variance."""
        parts = (rng.normal(size=(count, steps, FRAMES, n, channels)) * FRAMES**0.5 for n in (CELLS, REGIONS))
        return InputFeatures(*(torch.from_numpy(part).float() for part in parts))

    inputs = {name: local(STEPS) for name in SOURCES} | {NOISE: local(1, 4), FIRST_FRAME: local(1, 8)}
    for step in range(1, STEPS):
        shift = torch.from_numpy((0.35 + 0.25 * (step - 1)) * ways[step - 1]).float()
        inputs[X0].region[torch.arange(count), step, :, torch.from_numpy(wanted)] += shift
    labels = {
        "answer": np.where(kinds == "one_exit", wanted, -1),
        "model_answer": np.where(kinds == "choice", model_answer, -1),
        "start": start,
        "length": length // 5,
        "control": np.repeat(rng.integers(0, REGIONS, total), SEEDS),
    }
    found = {name: torch.from_numpy(values) for name, values in labels.items()}
    controls, relabels = relabelled(TARGETS, found)
    x0_scores = rng.random((count, STEPS, REGIONS))
    x0_scores[np.arange(count), 2, wanted] += 0.6
    x0_scores[:, 1] = np.nan
    samples = ProbeSamples(
        features=torch.from_numpy(x).float(),
        cells=cells,
        targets=(*TARGETS, *controls),
        labels=found | relabels,
        split=np.repeat(np.repeat(list(problems), list(problems.values())), SEEDS),
        keys=np.repeat([f"problem {i}" for i in range(total)], SEEDS),
        kinds=kinds,
        scores={"x0_scores": x0_scores, "final": rng.random((count, REGIONS))},
        model_answer=model_answer,
        replica=np.tile(np.arange(SEEDS), total),
        difficulty={"rooms": np.repeat(4 + np.arange(total) // 2 % 2, SEEDS), "length": length},
    )
    inputs |= {
        PROMPT: InputFeatures(torch.ones(count, 1, 1, 1, 32)),
        DIFFICULTY: InputFeatures(difficulty_columns(samples)[:, None, None, None]),
    }
    return samples, inputs


def random_weights(targets: tuple[str, ...] = ("answer", "model_answer")) -> WeightsTable:
    """Numbers of no meaning, all different."""
    rng = np.random.default_rng(1)
    cells = tuple(Cell(step, layer, "cond", "all") for step in (0, 1) for layer in range(LAYERS))
    accuracy = rng.uniform(0.3, 0.7, size=(len(targets), len(WEIGHTS), len(cells)))
    validation = rng.permutation(accuracy.ravel()).reshape(accuracy.shape)
    return WeightsTable(targets, cells, accuracy, accuracy - 0.1, accuracy + 0.2, validation, 60, 1234, 7.5)


def examined(samples: ProbeSamples, inputs: dict[str, InputFeatures], weights: WeightsTable | None) -> Run:
    """From samples to checks, as `train.py` does it."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        recipe, trainer = ProbeConfig(kind="ridge", penalties=[0.1, 1.0]), TrainerConfig(precision="32-true")
        bank = fit(samples, recipe, trainer, Path(folder), 0).with_provenance(store=STORE)
        readings = read_inputs(samples, inputs, recipe.kind, recipe.penalties)
    evaluated = evaluate(samples, ("transformer",) * STEPS, bank, readings)
    grid, checks = examine(evaluated, samples, inputs, bank, weights)
    return Run(samples, inputs, bank, evaluated, grid, checks, weights)


@cache
def run() -> Run:
    return examined(*world(), random_weights())


@cache
def small() -> Run:
    """Too few problems for description lengths and for any p, and nothing that could be a confound."""
    samples, inputs = world({"train": 24, "validation": 12, "test": 16})
    inputs.pop(DIFFICULTY)
    return examined(replace(samples, difficulty={"rooms": np.full(len(samples), 4)}), inputs, None)
