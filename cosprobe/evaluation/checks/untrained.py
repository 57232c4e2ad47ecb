"""Accuracy of probes on transformers of the same shape without trained weights: permuted and fresh weights.

Other weights need further network evaluations, so `collect` samples them on few samples and at few steps. For a fair
comparison, probes on the trained transformer are refitted on the same samples and steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from cosprobe.activations import RANDOM_WEIGHTS, UNTRAINED, ProbeSamples, StoredSamples
from cosprobe.cells import SPLIT_ORDER, Cell
from cosprobe.config import ProbeConfig, TrainerConfig
from cosprobe.evaluation import ALPHA, LEAST_PROBLEMS, correctness, majority, max_t_permutation, share_interval
from cosprobe.evaluation.checks.refitting import decide, labelled, refit, right, statistics
from cosprobe.probes import ProbeBank, fit, standardise
from cosprobe.tasks import ANSWER_ROLES, Role, Target

TRAINED = "trained"
WEIGHTS = (TRAINED, *RANDOM_WEIGHTS)


@dataclass(frozen=True)
class WeightsTable:
    """Test accuracy by weights of the transformer, all on the same samples.

    accuracy, lower, upper: test accuracy with its 95 % interval. validation: validation accuracy, for choosing a layer.
    samples: number of samples of all splits. evaluations, seconds: cost of the other weights in forward passes of the
    transformer and in wall time.
    """

    targets: tuple[str, ...]
    cells: tuple[Cell, ...]
    accuracy: Float[np.ndarray, "target weights cell"]
    lower: Float[np.ndarray, "target weights cell"]
    upper: Float[np.ndarray, "target weights cell"]
    validation: Float[np.ndarray, "target weights cell"]
    samples: int
    evaluations: int
    seconds: float


def weights_table(
    stored: StoredSamples, samples: ProbeSamples, probe: ProbeConfig, trainer: TrainerConfig, folder: Path, seed: int
) -> WeightsTable | None:
    """Fits probes of every target of role `answer` or `model_answer` to each kind of weights.

    stored: where the samples of the run are read from. samples: these samples. probe, trainer, seed: settings of the
    fits. folder: folder of the trainer.
    Targets with fewer than two classes among the training samples used here are left out, and so are targets without a
    label in one of the splits. Returns None if no target is left, or if no other weights were sampled.
    """
    sampled = _sampled(stored, samples)
    if sampled is None:
        return None
    few, cells = sampled.few, sampled.cells
    targets = tuple(t for t in samples.targets if t.role in ANSWER_ROLES and _enough(few, t.name))
    if not targets:
        return None
    scores = {split: np.full((len(targets), len(WEIGHTS), len(cells)), np.nan) for split in ("validation", "test")}
    lower, upper = np.full_like(scores["test"], np.nan), np.full_like(scores["test"], np.nan)
    for w, features in enumerate(sampled.features.values()):
        these = replace(few, features=features, cells=cells, targets=targets)
        bank = fit(these, replace(probe, kind="newton"), trainer, folder, seed)
        for split, found in scores.items():
            part = these.subset(split)
            for t, target in enumerate(targets):
                labels = part.labels[target.name].numpy()
                carried = labels >= 0
                predicted = bank.predict(part.features, target.name).numpy()
                right = correctness(predicted[:, carried], labels[carried])
                found[t, w] = right.mean(axis=1)
                if split == "test":
                    lower[t, w], upper[t, w] = share_interval(right, part.keys[carried])
    calls, seconds = sampled.spent.sum(dim=0).tolist()
    return WeightsTable(
        tuple(t.name for t in targets), cells, scores["test"], lower, upper, scores["validation"],
        len(few), round(calls), seconds,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class WeightsLine:
    """Accuracy over layers at the first step of probes of one target, by weights of the transformer, on test.

    correct: right (1) or wrong (0). chance: accuracy of the best guess. evident: whether accuracy is above chance in
    some layer on validation (corrected p at most 0.05). rows: indices of the samples among the few test samples.
    """

    target: str
    position: str
    layers: tuple[int, ...]
    correct: dict[str, Float[np.ndarray, "layer sample"]]
    chance: float
    evident: dict[str, bool]
    rows: Int[np.ndarray, " sample"]
    keys: Shaped[np.ndarray, " sample"]


def weights_lines(stored: StoredSamples, samples: ProbeSamples, bank: ProbeBank) -> list[WeightsLine]:
    """Refits probes of every answer and of what is visible to each kind of weights, at the first step.

    stored: where the samples of the run are read from. samples: these samples. bank: its probes; refits have the
    penalty that it has at the same cell. Targets with fewer than two classes among the training samples used here, or
    without a label in one of the splits, are left out.
    Returns an empty list if no other weights were sampled at the first step.
    """
    sampled, step = _sampled(stored, samples), min(cell.step for cell in samples.cells)
    at = [] if sampled is None else [i for i, cell in enumerate(sampled.cells) if cell.step == step]
    if sampled is None or not at:
        return []
    cells = tuple(sampled.cells[i] for i in at)
    of_weights = {
        weights: replace(sampled.few, features=features[:, at], cells=cells)
        for weights, features in sampled.features.items()
    }
    roles, found = (*ANSWER_ROLES, Role.PERCEPTION), list[WeightsLine]()
    for target in bank.targets:
        if target.role in roles and _enough(sampled.few, target.name):
            for position in dict.fromkeys(cell.position for cell in cells):
                here = [cell for cell in cells if cell.position == position]
                found.append(_line(of_weights, target, here, bank.select(here).penalties[target.name]))
    return found


def _line(
    of_weights: dict[str, ProbeSamples], target: Target, cells: Sequence[Cell], penalties: Float[Tensor, " cell"]
) -> WeightsLine:
    """The line of one target over these cells. of_weights: the same samples, with the features of each kind of
    weights."""
    correct, evident = {}, {}
    for weights, samples in of_weights.items():
        train, validation, test = (labelled(samples, target, cells, split) for split in SPLIT_ORDER)
        stat = statistics(samples, cells)
        probes = refit(standardise(train.features, *stat), train.labels, target, penalties)
        decided = [decide(standardise(part.features, *stat), probes, target.form) for part in (validation, test)]
        correct[weights] = right(decided[1], test.labels)
        predicted = decided[0].argmax(dim=-1).numpy()
        p = max_t_permutation(predicted, validation.labels.numpy(), validation.keys).p
        evident[weights] = bool(p.min() <= ALPHA) and len(np.unique(validation.keys)) >= LEAST_PROBLEMS
    labels = test.labels.numpy()
    guess = correctness(np.full((1, *labels.shape), majority(train.labels.numpy())), labels)
    whole = np.flatnonzero(np.asarray(samples.split) == "test")
    return WeightsLine(
        target.name, cells[0].position, tuple(cell.layer for cell in cells), correct,
        max(float(guess.mean()), 1 / target.classes), evident, np.searchsorted(whole, test.where), test.keys,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Sampled:
    """The samples that were run with other weights, and their features. spent: evaluations and seconds of each."""

    few: ProbeSamples
    cells: tuple[Cell, ...]
    features: dict[str, Float[Tensor, "sample cell region channel"]]
    spent: Float[Tensor, "sample 2"]


def _sampled(stored: StoredSamples, samples: ProbeSamples) -> _Sampled | None:
    """Features of all weights on the same samples, at the cells that are read; None if no other weights were sampled.
    Arguments: see `weights_table`."""
    tensors, notes = stored.store.read(UNTRAINED, [stored.table.names[i] for i in stored.few])
    if not tensors:
        return None
    few = samples.rows(np.array(stored.few))
    stored_cells = [
        Cell(step, int(layer), "cond", position)
        for step in notes["untrained_steps"]
        for layer in notes["hook_points"]
        for position in notes["positions"]
    ]
    read = {cell for cell in samples.cells if cell.step in stored.few_steps}
    at = [i for i, cell in enumerate(stored_cells) if cell in read]
    cells = tuple(stored_cells[i] for i in at)
    trained = few.features[:, [few.cells.index(cell) for cell in cells]]
    untrained = tensors[f"{UNTRAINED}features"].flatten(2, 4)[:, :, at].to(trained.dtype)
    features = dict(zip(WEIGHTS, (trained, *untrained.unbind(1)), strict=True))
    return _Sampled(few, cells, features, tensors[f"{UNTRAINED}spent"])


def _enough(samples: ProbeSamples, target: str) -> bool:
    """Whether the target has two classes in train and a label in every split."""
    labels = samples.labels[target].numpy().reshape(len(samples), -1)
    known = (labels >= 0).all(axis=1)
    seen = {split: labels[(samples.split == split) & known] for split in SPLIT_ORDER}
    return len(np.unique(seen["train"])) > 1 and all(len(values) for values in seen.values())
