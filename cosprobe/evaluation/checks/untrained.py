"""What untrained transformers of the same shape would let a probe read: permuted and fresh weights.

They need further network evaluations, so they are asked about few samples and few steps (`collect`), and the trained
transformer is judged again on exactly those: its probes too are refitted on the few.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from cosprobe.activations import RANDOMISED, UNTRAINED, ActivationStore, ProbeSamples
from cosprobe.cells import SPLIT_ORDER, Cell
from cosprobe.evaluation import correctness, share_interval
from cosprobe.probes import ProbeConfig, fit
from cosprobe.runtime import TrainerConfig
from cosprobe.tasks import HEADLINE

TRAINED = "trained"
WEIGHTS = (TRAINED, *RANDOMISED)


@dataclass(frozen=True)
class WeightsTable:
    """Test accuracy by transformer weights, on the same few samples. validation: for choosing a layer.
    samples: how many, over all splits; evaluations: forward passes of the transformer that were added for it."""

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
    store: ActivationStore, samples: ProbeSamples, probe: ProbeConfig, trainer: TrainerConfig, folder: Path, seed: int
) -> WeightsTable | None:
    """Probes of every answer and choice, fitted to each kind of weights and read on test; samples: of the main run.

    Targets with fewer than two classes among the few training samples are left out; None when none is left, or
    when no other weights were tried.
    """
    tensors, notes = store.read(UNTRAINED)
    if not tensors:
        return None
    few = samples.rows(tensors[f"{UNTRAINED}sample"].numpy())
    targets = tuple(t for t in samples.targets if t.role in HEADLINE and _enough(few, t.name))
    if not targets:
        return None
    cells = tuple(
        Cell(step, site, "cond", place)
        for step in notes["untrained_steps"]
        for site in notes["sites"]
        for place in notes["places"]
    )
    scores = {split: np.full((len(targets), len(WEIGHTS), len(cells)), np.nan) for split in ("validation", "test")}
    lower, upper = np.full_like(scores["test"], np.nan), np.full_like(scores["test"], np.nan)
    trained = few.features[:, [few.cells.index(cell) for cell in cells]]
    untrained = tensors[f"{UNTRAINED}features"].flatten(2, 4).to(trained.dtype)
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
    labels = samples.labels[target].numpy()
    seen = {split: labels[(samples.split == split) & (labels >= 0)] for split in SPLIT_ORDER}
    return len(np.unique(seen["train"])) > 1 and all(len(values) for values in seen.values())
