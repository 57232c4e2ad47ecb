"""Accuracy of probes on transformers of the same shape without trained weights: permuted and fresh weights.

Other weights need further network evaluations, so `collect` samples them on few samples and at few steps. For a fair
comparison, probes on the trained transformer are refitted on the same samples and steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from cosprobe.activations import RANDOM_WEIGHTS, UNTRAINED, ProbeSamples, StoredSamples
from cosprobe.cells import SPLIT_ORDER, Cell
from cosprobe.config import ProbeConfig, TrainerConfig
from cosprobe.evaluation import correctness, share_interval
from cosprobe.probes import fit
from cosprobe.tasks import ANSWER_ROLES

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
    tensors, notes = stored.store.read(UNTRAINED, [stored.table.names[i] for i in stored.few])
    if not tensors:
        return None
    few = samples.rows(np.array(stored.few))
    targets = tuple(t for t in samples.targets if t.role in ANSWER_ROLES and _enough(few, t.name))
    if not targets:
        return None
    stored_cells = [
        Cell(step, int(layer), "cond", position)
        for step in notes["untrained_steps"]
        for layer in notes["hook_points"]
        for position in notes["positions"]
    ]
    read = {cell for cell in samples.cells if cell.step in stored.few_steps}
    at = [i for i, cell in enumerate(stored_cells) if cell in read]
    cells = tuple(stored_cells[i] for i in at)
    scores = {split: np.full((len(targets), len(WEIGHTS), len(cells)), np.nan) for split in ("validation", "test")}
    lower, upper = np.full_like(scores["test"], np.nan), np.full_like(scores["test"], np.nan)
    trained = few.features[:, [few.cells.index(cell) for cell in cells]]
    untrained = tensors[f"{UNTRAINED}features"].flatten(2, 4)[:, :, at].to(trained.dtype)
    for w, features in enumerate((trained, *untrained.unbind(1))):
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
    calls, seconds = tensors[f"{UNTRAINED}spent"].sum(dim=0).tolist()
    return WeightsTable(
        tuple(t.name for t in targets), cells, scores["test"], lower, upper, scores["validation"],
        len(few), round(calls), seconds,
    )  # fmt: skip


def _enough(samples: ProbeSamples, target: str) -> bool:
    """Whether the target has two classes in train and a label in every split."""
    labels = samples.labels[target].numpy()
    seen = {split: labels[(samples.split == split) & (labels >= 0)] for split in SPLIT_ORDER}
    return len(np.unique(seen["train"])) > 1 and all(len(values) for values in seen.values())
