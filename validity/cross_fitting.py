"""Cross-fitted maps of few problems: coverage of intervals, and rates of false positive cells.

Every run draws problems and fits probes with ridge regression to five folds, as `cosprobe.evaluation.joined`
has them, by the code that a run uses. The true value of an accuracy is the mean over the banks of its value on FRESH
problems, each bank weighted by the size of its fold.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from jaxtyping import Float

from cosprobe.activations import InputFeatures, ProbeSamples
from cosprobe.cells import FIRST_FRAME, Cell
from cosprobe.config import ProbeConfig, TrainerConfig
from cosprobe.evaluation import ALPHA, build_grid, evaluate_divisions, joined, read_inputs
from cosprobe.probes import fit
from cosprobe.tasks import Role, Target
from validity.rows import Row, alarms, shares_covered

FOLDS, LAYERS, CHANNELS, FRESH, DRAWS = 5, 8, 32, 2000, 199
CELLS = tuple(Cell(0, layer, "cond", "all") for layer in range(LAYERS))
PENALTIES = [0.01, 0.1, 1.0]
SUBJECT = "intervals of a cross-fitted map"
FALSE = "a cell of a cross-fitted map that has evidence and beats no more than chance and inputs"


@dataclass(frozen=True)
class World:
    """problems: their number. classes: of the answer, equally frequent. shift: length of the mean of each class.
    seen: the same for the input."""

    problems: int
    classes: int
    shift: float = 0.0
    seen: float = 0.0

    def __str__(self) -> str:
        kind = f"cells shifted by {self.shift:g}, the input by {self.seen:g}" if self.shift else "no answer anywhere"
        return f"{self.problems} problems, {self.classes} classes, {kind}"


WORLDS = (World(24, 2), World(48, 2), World(48, 4, 3.0), World(48, 2, 2.0, 2.5))


def simulate(runs: int, seed: int, worlds: Sequence[World] = WORLDS) -> list[Row]:
    """Coverage of accuracies and of nested accuracies, and shares of maps with a false positive cell."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found = []
    for i, world in enumerate(worlds):
        each = [_run(world, np.random.default_rng([seed, i, run])) for run in range(runs)]
        for name in ("accuracy", "nested_accuracy"):
            held, widths = np.array([one[name] for one in each]).T
            what = "accuracies" if name == "accuracy" else "accuracies of the cells that each fit chooses"
            found.append(shares_covered(SUBJECT, f"{what}, {world}", held, widths))
        if world.seen >= world.shift:  # no cell is better than the input
            found.append(alarms(FALSE, str(world), np.array([one["evident"][0] > 0 for one in each])))
    return found


def _run(world: World, rng: np.random.Generator) -> dict[str, tuple[float, float]]:
    """Of one map: the share of accuracies that their interval covers and its mean width, the same for the nested
    accuracy, and the number of cells with evidence."""
    answer = rng.integers(0, world.classes, world.problems + FRESH)
    cells = _features(answer, (LAYERS, 1), world.shift, rng)
    seen = _features(answer, (1, 1, 1), world.seen, rng)
    few, fresh = slice(None, world.problems), slice(world.problems, None)
    target = Target("answer", world.classes, "problem", Role.ANSWER, ("one",), tuple(map(str, range(world.classes))))
    keys = np.array([f"{i:03d}" for i in range(world.problems)])
    samples = ProbeSamples(
        cells[few], CELLS, (target,), {"answer": torch.from_numpy(answer[few])}, np.full(len(keys), "train"), keys,
        np.full(len(keys), "one"),
    ).in_folds(FOLDS)  # fmt: skip
    inputs, banks, readings = {FIRST_FRAME: InputFeatures(seen[few])}, [], []
    config = ProbeConfig(kind="ridge", penalties=PENALTIES, folds=FOLDS)
    for part in samples.divisions():
        with warnings.catch_warnings(), TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            banks.append(fit(part, config, TrainerConfig(precision="32-true"), Path(folder), 0))
        readings.append(read_inputs(part, inputs, "ridge", PENALTIES))
    evaluated = joined(evaluate_divisions(samples, ("transformer",), banks, readings))
    data = build_grid(evaluated, DRAWS).dataset.sel(target="answer").squeeze("step").squeeze("position")
    assert samples.fold is not None
    weights = np.bincount(samples.fold) / len(keys)
    true = np.stack([(bank.predict(cells[fresh], "answer").numpy() == answer[fresh]).mean(axis=1) for bank in banks])
    validation = evaluated.results[0].validation
    right, bank_of = validation.predicted == validation.labels, validation.fold
    chosen = [right[:, bank_of == k].mean(axis=1).round(12).argmax() for k in range(FOLDS)]
    nested = float(weights @ true[np.arange(FOLDS), chosen])
    covered = (data.lower.values <= weights @ true) & (weights @ true <= data.upper.values)
    low, high = float(data.nested_accuracy_lower), float(data.nested_accuracy_upper)
    return {
        "accuracy": (float(covered.mean()), float((data.upper - data.lower).mean())),
        "nested_accuracy": (float(low <= nested <= high), high - low),
        "evident": (float((data.p_evidence <= ALPHA).sum()), 0.0),
    }


def _features(
    answer: np.ndarray, axes: tuple[int, ...], shift: float, rng: np.random.Generator
) -> Float[torch.Tensor, "sample *axes channel"]:
    """Normal features, half of whose variance is shared along the axes. The means of classes are orthogonal vectors of
    length `shift`."""
    means = shift * np.linalg.qr(rng.normal(size=(CHANNELS, int(answer.max()) + 1)))[0].T
    shared = rng.normal(size=(len(answer), *[1] * len(axes), CHANNELS))
    x = np.sqrt(0.5) * (shared + rng.normal(size=(len(answer), *axes, CHANNELS)))
    return torch.from_numpy(x + means[answer].reshape(shared.shape)).float()
