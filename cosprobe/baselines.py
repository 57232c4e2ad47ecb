"""What untrained transformers of the same shape would let a probe read: permuted and fresh weights.

They need further network evaluations, so they are asked about few problems and few steps, and the trained
transformer is judged again on exactly those: its probes too are refitted on the few.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cosprobe.capture import capture
from cosprobe.collect import Sample, decode_steps, fill, images, say
from cosprobe.data import ProbeSamples
from cosprobe.devices import TrainerConfig
from cosprobe.metrics import correctness, share_interval
from cosprobe.pipelines import PipelineConfig, block_list, experts, sample, stop_after
from cosprobe.pooling import Pooling
from cosprobe.randomised import RANDOMISED, randomised, replay
from cosprobe.samples import HEADLINE
from cosprobe.store import ActivationStore
from cosprobe.tasks import Task
from cosprobe.training import fit
from cosprobe.types import SPLIT_ORDER, Cell, parse_selection

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


def few_samples(drawn: Sequence[Sample], most: int) -> list[int]:
    """Places of the first samples of every split, in the proportions of `drawn`, at most `most` in all."""
    share = min(1.0, most / len(drawn))
    splits = np.array([s.problem.split for s in drawn])
    each = [np.flatnonzero(splits == split) for split in SPLIT_ORDER]
    return [int(i) for places in each for i in places[: int(share * len(places))]]


def few_steps(probe: Any, total: int) -> tuple[int, ...]:
    """Steps of the first half at which x0-hat is decoded too; the first kept step when there is none."""
    kept = parse_selection(probe.steps, total, "probe.steps")
    shown = decode_steps(probe.decode, total)
    return tuple(step for step in kept if step in shown and step < total / 2) or kept[:1]


def collect_weights(
    model: Any, pipeline: PipelineConfig, task: Task, probe: Any, drawn: list[Sample], identity: dict, folder: Path
) -> ActivationStore | None:
    """Features [sample, weights, step, layer, place, region, channel] of the few samples, on disk; None when
    `probe.randomised` is 0, or so small that a split would be empty. Runs end after the last of the few steps and
    nothing is decoded. drawn, identity: as for `collect`."""
    if not probe.randomised:
        return None
    places = few_samples(drawn, probe.randomised)
    if len({drawn[i].problem.split for i in places}) < len(SPLIT_ORDER):
        say(f"random weights are left out: probe.randomised={probe.randomised} of {len(drawn)} samples is too few")
        return None
    chunks = [places[i : i + pipeline.batch] for i in range(0, len(places), pipeline.batch)]
    steps = few_steps(probe, pipeline.steps)
    store = ActivationStore(folder, identity | {"probe.randomised": probe.randomised}, len(chunks))
    transformer = next(iter(experts(model).values()))
    layers = parse_selection(probe.layers, len(block_list(transformer)), "probe.layers")
    frames = (pipeline.frames - 1) // model.vae_scale_factor_temporal + 1
    some = Pooling(probe.pooling, probe.frames, [drawn[0].problem.regions] if probe.pooling == "region" else ())
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    size = 4 * len(places) * len(WEIGHTS) * len(steps) * len(layers) * len(some.places(frames)) * some.regions * width
    what = f"{len(places)} samples again, to step {steps[-1]}, for permuted and fresh weights"
    return fill(
        store, size, what, partial(_chunk, model, pipeline, task, probe, steps, layers, drawn, identity["seed"]), chunks
    )


@torch.no_grad()
def _chunk(
    model: Any,
    pipeline: PipelineConfig,
    task: Task,
    probe: Any,
    steps: tuple[int, ...],
    layers: tuple[int, ...],
    drawn: Sequence[Sample],
    seed: int,
    places: list[int],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    begin = time.monotonic()
    chunk = [drawn[i] for i in places]
    problems = [s.problem for s in chunk]
    pooling = Pooling(probe.pooling, probe.frames, [p.regions for p in problems] if probe.pooling == "region" else ())
    arguments = (images(task, problems), [p.prompt for p in problems], [s.seed for s in chunk])
    stop: dict[str, Any] = {"callback_on_step_end": stop_after(steps[-1]), "output_type": "latent"}
    with capture(model, ",".join(map(str, layers)), pooling, ",".join(map(str, steps)), record=True) as tape:
        sample(model, pipeline, *arguments, **stop)
    features = [tape.features()[:, :, :, tape.branches.index("cond")].float()]
    for how in RANDOMISED:
        with randomised(model, how, seed):
            features.append(replay(model, tape, layers, pooling))
    calls = len(chunk) * ((steps[-1] + 1) * len(tape.branches) + len(RANDOMISED) * len(steps))
    spent = torch.tensor([calls / len(chunk), (time.monotonic() - begin) / len(chunk)], dtype=torch.float64)
    notes = {"steps": list(steps), "layers": list(layers), "places": list(tape.places)}
    return {
        "features": torch.stack(features, dim=1),
        "sample": torch.tensor(places),
        "spent": spent.expand(len(chunk), 2),
    }, notes


def weights_table(
    store: ActivationStore | None, samples: ProbeSamples, probe: Any, trainer: TrainerConfig, folder: Path, seed: int
) -> WeightsTable | None:
    """Probes of every answer and choice, fitted to each kind of weights and read on test; samples: of the main run.

    Targets with fewer than two classes among the few training samples are left out; None when none is left.
    """
    if store is None:
        return None
    tensors, notes = store.read()
    few = samples.rows(tensors["sample"].numpy())
    targets = tuple(t for t in samples.targets if t.role in HEADLINE and _enough(few, t.name))
    if not targets:
        return None
    cells = tuple(
        Cell(step, str(layer), "cond", place)
        for step in notes["steps"]
        for layer in notes["layers"]
        for place in notes["places"]
    )
    scores = {split: np.full((len(targets), len(WEIGHTS), len(cells)), np.nan) for split in ("validation", "test")}
    lower, upper = np.full_like(scores["test"], np.nan), np.full_like(scores["test"], np.nan)
    for w in range(len(WEIGHTS)):
        features = tensors["features"][:, w].flatten(1, 3)
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
                    lower[t, w], upper[t, w] = share_interval(right, part.keys[carried], seed=seed)
    calls, seconds = tensors["spent"].sum(dim=0).tolist()
    return WeightsTable(
        tuple(t.name for t in targets), cells, scores["test"], lower, upper, scores["validation"],
        len(few), round(calls), seconds,
    )  # fmt: skip


def _enough(samples: ProbeSamples, target: str) -> bool:
    labels = samples.labels[target].numpy()
    seen = {split: labels[(samples.split == split) & (labels >= 0)] for split in SPLIT_ORDER}
    return len(np.unique(seen["train"])) > 1 and all(len(values) for values in seen.values())
