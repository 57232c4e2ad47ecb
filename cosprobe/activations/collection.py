"""Problems through the pipeline under capture, into an activation store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosprobe.activations.capture import ActivationCache, capture
from cosprobe.activations.pooling import POOLINGS, Pooling, whole_frame
from cosprobe.activations.random_weights import RANDOMISED, randomised, replay
from cosprobe.activations.store import ActivationStore, fill
from cosprobe.cells import SPLIT_ORDER, X0, parse_selection
from cosprobe.errors import InputError
from cosprobe.models import PipelineConfig, block_list, decode, experts, fingerprint, patch_columns, sample
from cosprobe.runtime import say
from cosprobe.tasks import Problem, Sample, Task, TaskConfig, images

FORMAT = 4  # of what a shard holds
UNTRAINED = "untrained."  # begins the names of what networks without learned weights gave


@dataclass
class CaptureConfig:
    """What is captured.

    layers, steps: selections (`all`, `last`, `0:30:5`, `0,10,20`). pooling: `clip`, `frame`, `grid` or `region`;
    frames: with `region`, every latent frame by itself too. decode: steps whose x0-hat is decoded and read;
    `auto` is at most five. randomised: on how many samples at most permuted and fresh transformer weights are tried;
    0 = none.
    """

    layers: str = "all"
    steps: str = "all"
    pooling: str = "region"
    frames: bool = False
    decode: str = "auto"
    randomised: int = 128

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise InputError(f"probe.pooling={self.pooling!r}: expected one of {', '.join(POOLINGS)}")
        if self.randomised < 0:
            raise InputError(f"probe.randomised={self.randomised}: expected 0 or more samples")


def decode_steps(spec: str, total: int) -> tuple[int, ...]:
    """Steps whose x0-hat is decoded and read: `auto` is at most 5, dense where things happen, early."""
    if spec == "auto":
        return tuple(
            sorted({0, round(0.1 * total), round(0.25 * total), round(0.5 * total), total - 1} & set(range(total)))
        )
    return parse_selection(spec, total, "probe.decode")


def few_samples(drawn: Sequence[Sample], most: int) -> list[int]:
    """Places of the first samples of every split, in the proportions of `drawn`, at most `most` in all; none when a
    split would be empty. Of these, and at `few_steps` alone, transformers without learned weights are asked."""
    share = min(1.0, most / len(drawn))
    splits = np.array([s.problem.split for s in drawn])
    each = [np.flatnonzero(splits == split) for split in SPLIT_ORDER]
    few = [places[: int(share * len(places))] for places in each]
    return [int(i) for places in few for i in places] if all(map(len, few)) else []


def few_steps(probe: CaptureConfig, total: int) -> tuple[int, ...]:
    """Steps of the first half at which x0-hat is decoded too; the first kept step when there is none."""
    kept = parse_selection(probe.steps, total, "probe.steps")
    shown = decode_steps(probe.decode, total)
    return tuple(step for step in kept if step in shown and step < total / 2) or kept[:1]


def settings(pipeline: PipelineConfig, task: TaskConfig, probe: CaptureConfig, seed: int) -> dict[str, Any]:
    """Everything that shapes a store, flat, so that a difference can be named. The order of samples and the
    batch they ran in are part of it: a batch's shape changes the last bits."""
    flat = {f"task.{name}": value for name, value in vars(task).items()}
    flat |= {
        f"pipeline.{f.name}": getattr(pipeline, f.name)
        for f in fields(pipeline)
        if f.name not in ("name", "path", "lora")
    }
    flat |= {f"probe.{f.name}": getattr(probe, f.name) for f in fields(CaptureConfig)}
    flat |= {f"version.{name}": version(name) for name in ("torch", "diffusers")}
    return flat | {"model": fingerprint(*pipeline.parts), "seed": seed, "format": FORMAT}


def collect(
    model: Any,
    pipeline: PipelineConfig,
    task: Task,
    probe: CaptureConfig,
    drawn: list[Sample],
    identity: dict,
    folder: Path,
) -> ActivationStore:
    """Collects what is not on disk yet. drawn, identity: what `draw_samples` and `settings` give. Chunks are cut by
    global index: one process and many write the same shards."""
    few = few_samples(drawn, probe.randomised)
    if probe.randomised and not few:
        say(f"random weights are left out: probe.randomised={probe.randomised} of {len(drawn)} samples is too few")
    chunks = [range(i, min(i + pipeline.batch, len(drawn))) for i in range(0, len(drawn), pipeline.batch)]
    store = ActivationStore(folder, identity, len(chunks))
    size = store_bytes(model, pipeline, task, probe, len(drawn), len(few))
    what = f"{len(drawn)} samples" + (f", permuted and fresh weights on {len(few)} of them" if few else "")
    write = partial(_chunk, model, pipeline, task, probe, drawn, frozenset(few), identity["seed"])
    return fill(store, size, what, write, chunks)


def store_bytes(
    model: Any, pipeline: PipelineConfig, task: Task, probe: CaptureConfig, samples: int, few: int = 0
) -> int:
    """Bytes the features will take, from the model's shape alone. few: samples random weights are asked about."""
    transformer = next(iter(experts(model).values()))
    layers = parse_selection(probe.layers, len(block_list(transformer)), "probe.layers")
    steps = parse_selection(probe.steps, pipeline.steps, "probe.steps")
    config = transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    latent_frames = (pipeline.frames - 1) // model.vae_scale_factor_temporal + 1
    boxes = [[(0.0, 0.0, 1.0, 1.0)] * task.regions]
    pooling = Pooling(probe.pooling, probe.frames, boxes if probe.pooling == "region" else ())
    cells = samples * len(steps) * len(layers) * (2 if pipeline.guidance > 1 else 1)
    cells += few * len(RANDOMISED) * len(few_steps(probe, pipeline.steps)) * len(layers)
    features = cells * len(pooling.places(latent_frames)) * pooling.regions * width
    noise, beside = patch_columns(transformer)
    each_step = [width, noise, noise]  # embed, x_t, x0-hat
    inputs = sum(n * input_parts(pooling, n) for n in each_step) * len(steps)
    inputs += sum(n * input_parts(pooling, n) for n in (noise, beside))
    size = next(transformer.parameters()).element_size()
    return (features + samples * latent_frames * inputs) * size


def input_parts(pooling: Pooling, channels: int) -> int:
    """Spatial parts in which an input of so many channels is kept: the regions, and the cells of the whole frame."""
    cells = pooling if pooling.kind == "grid" else whole_frame(channels)
    return cells.across**2 + (pooling.regions if pooling.kind == "region" else 0)


@torch.no_grad()
def _chunk(
    model: Any, pipeline: PipelineConfig, task: Task, probe: CaptureConfig,
    drawn: Sequence[Sample], few: frozenset[int], seed: int, places: range,
) -> tuple[dict[str, Tensor], dict[str, Any]]:  # fmt: skip
    chunk = [drawn[i] for i in places]
    problems = [s.problem for s in chunk]
    asked, steps = [row for row, i in enumerate(places) if i in few], few_steps(probe, pipeline.steps)
    record = steps if asked else ()
    layers = parse_selection(probe.layers, len(block_list(next(iter(experts(model).values())))), "probe.layers")
    decoded = decode_steps(probe.decode, pipeline.steps)
    before_last = [step for step in decoded if step < pipeline.steps - 1]
    sites, pooling = [str(layer) for layer in layers], _pooling(probe, problems)
    with capture(model, sites, pooling, probe.steps, before_last, record, inputs=True) as cache:
        video = sample(model, pipeline, images(task, problems), [p.prompt for p in problems], [s.seed for s in chunk])
    scores, answers = _readouts(task, problems, np.asarray(video))
    x0_scores = torch.full((len(chunk), pipeline.steps, task.candidates), float("nan"))
    x0_answer = torch.full((len(chunk), pipeline.steps), -2, dtype=torch.int64)  # -2: not decoded
    read = [i for i, problem in enumerate(problems) if problem.split != "train"]  # no probe is trained on a readout
    for step in before_last if read else ():
        clips = decode(model, cache.clean[step][read])
        x0_scores[read, step], x0_answer[read, step] = _readouts(task, [problems[i] for i in read], clips)
    if pipeline.steps - 1 in decoded:  # nothing is left to remove after the last step: x0-hat is the video
        x0_scores[:, -1], x0_answer[:, -1] = scores, answers
    tensors = {
        "features": cache.features(),
        "x0_readout": x0_scores,
        "x0_answer": x0_answer,
        "final": scores,
        "choice": answers,
        "solved": torch.tensor([int(a) in task.solutions(p) for a, p in zip(answers, problems, strict=True)]),
    }
    tensors |= {f"input.{name}": value for name, value in cache.input_features().items()}
    tensors |= _labels(task, problems) | {"replica": torch.tensor([s.replica for s in chunk])}
    if asked:
        tensors |= _untrained(model, cache, layers, _pooling(probe, [problems[row] for row in asked]), asked, seed)
        tensors[f"{UNTRAINED}sample"] = torch.tensor([places[row] for row in asked])
    return tensors, _notes(cache) | {"untrained_steps": list(steps)}


def _untrained(
    model: Any, cache: ActivationCache, layers: tuple[int, ...], pooling: Pooling, rows: list[int], seed: int
) -> dict[str, Tensor]:
    """Block outputs without learned weights for these rows of a batch, from the calls its run recorded: features
    [sample, weights, step, layer, place, region, channel]; spent [sample, 2], evaluations and seconds."""
    begin = time.monotonic()
    features = []
    for how in RANDOMISED:
        with randomised(model, how, seed):
            features.append(replay(model, cache, layers, pooling, rows))
    spent = [len(RANDOMISED) * len(cache.recorded), (time.monotonic() - begin) / len(rows)]
    return {
        f"{UNTRAINED}features": torch.stack(features, dim=1).to(next(iter(cache.parts.values())).dtype),
        f"{UNTRAINED}spent": torch.tensor([spent] * len(rows), dtype=torch.float64),
    }


def _pooling(probe: CaptureConfig, problems: Sequence[Problem]) -> Pooling:
    return Pooling(probe.pooling, probe.frames, [p.regions for p in problems] if probe.pooling == "region" else ())


@torch.no_grad()
def watch(
    model: Any, pipeline: PipelineConfig, task: Task, drawn: Sequence[Sample], steps: Sequence[int]
) -> np.ndarray:
    """The decoded x0-hat of each sample at each step: float [sample, step, frame, height, width, 3] in [0, 1]."""
    problems = [s.problem for s in drawn]
    with capture(model, [X0], Pooling("clip"), "last", clean=steps) as cache:
        sample(
            model, pipeline, images(task, problems), [p.prompt for p in problems], [s.seed for s in drawn],
            output_type="latent",
        )  # fmt: skip
    return np.stack([decode(model, cache.clean[step]) for step in steps], axis=1)


def _readouts(task: Task, problems: list[Problem], video: np.ndarray) -> tuple[Tensor, Tensor]:
    """Forced-choice scores [sample, candidate] and answers [sample], -1 for none."""
    read = [task.readout(problem, clip) for problem, clip in zip(problems, video, strict=True)]
    answers = [-1 if r.answer is None else r.answer for r in read]
    return torch.tensor([r.scores for r in read]), torch.tensor(answers)


def _labels(task: Task, problems: list[Problem]) -> dict[str, Tensor]:
    tensors = {}
    for target in task.targets:
        if target.role == "choice":
            continue
        missing = (-1,) * task.regions if target.form == "region" else -1
        rows = [p.labels.get(target.name, missing) if p.kind in target.kinds else missing for p in problems]
        tensors[f"label.{target.name}"] = torch.tensor(rows)
    for name in problems[0].difficulty:
        tensors[f"difficulty.{name}"] = torch.tensor([p.difficulty[name] for p in problems])
    tensors["key"] = torch.tensor([int(p.key[:15], 16) for p in problems])
    tensors["split"] = torch.tensor([SPLIT_ORDER.index(p.split) for p in problems])
    tensors["kind"] = torch.tensor([task.kinds.index(p.kind) for p in problems])
    return tensors


def _notes(cache: ActivationCache) -> dict[str, Any]:
    return {
        "steps": list(cache.steps),
        "sites": list(cache.sites),
        "branches": list(cache.branches),
        "places": list(cache.places),
        "experts": [cache.experts[step] for step in cache.steps],
    }
