"""Samples problems with a pipeline, captures the activations and writes them to an activation store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cosprobe.activations.capture import ActivationCache, capture
from cosprobe.activations.pooling import Pooling, whole_frame
from cosprobe.activations.predicting import FrozenSampling, Sampled, Shard, announce, predict_shards
from cosprobe.activations.random_weights import RANDOM_WEIGHTS, replay, with_random_weights
from cosprobe.activations.sampler import Parsed, Sampler
from cosprobe.activations.store import ActivationStore
from cosprobe.cells import SPLIT_ORDER, X0
from cosprobe.config import CaptureConfig, PipelineConfig
from cosprobe.errors import InputError
from cosprobe.models import architecture, check_prompts, experts, fingerprint
from cosprobe.monitoring import ResourceMonitor
from cosprobe.runtime import say
from cosprobe.tasks import Problem, Sample, Task, TaskConfig

FORMAT = 5  # version of the content of a shard
UNTRAINED = "untrained."  # prefix of the names of tensors from transformers with random weights
NOT_DECODED = -2  # value in `x0_answer` where x0-hat was not decoded


@dataclass(frozen=True)
class StoreSettings:
    """All settings that determine the content of a store, and with it the features and probes made from it.

    model: fingerprint of the model's files. seed: base of the noise seeds. pipeline: without name and paths, which the
    fingerprint replaces. task: settings of the task. probe: what is captured. versions: of torch and diffusers.
    format: version of the content of a shard.
    The batch size is included, because the batch a sample is in changes its activations by rounding errors.
    """

    model: str
    seed: int
    pipeline: PipelineConfig
    task: dict[str, Any]
    probe: CaptureConfig
    versions: dict[str, str]
    format: int = FORMAT

    @classmethod
    def of(cls, pipeline: PipelineConfig, task: TaskConfig, probe: CaptureConfig, seed: int) -> StoreSettings:
        """The settings of a run. Reads the files of the model for the fingerprint."""
        bare = replace(pipeline, name="", path="", lora="")
        captured = CaptureConfig(**{name: getattr(probe, name) for name in asdict(CaptureConfig())})
        versions = {name: version(name) for name in ("torch", "diffusers")}
        return cls(fingerprint(*pipeline.parts), seed, bare, dict(vars(task)), captured, versions)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> StoreSettings:
        """The settings from the output of `asdict`. Raises InputError for settings of another format."""
        if saved.get("format") != FORMAT:
            raise InputError(
                f"activations of format {saved.get('format')}: expected format {FORMAT}; run train.py again "
                "in another run_dir"
            )
        pipeline, probe = PipelineConfig(**saved["pipeline"]), CaptureConfig(**saved["probe"])
        return cls(**{**saved, "pipeline": pipeline, "probe": probe})


def few_samples(samples: Sequence[Sample], most: int) -> list[int]:
    """Indices of the samples on which transformers with random weights run: the first ones of every split.

    At most `most` in total, in the proportions of the splits in `samples`. Empty when a split would have none.
    See `few_steps` for the steps.
    """
    share = min(1.0, most / len(samples))
    splits = np.array([s.problem.split for s in samples])
    each = [np.flatnonzero(splits == split) for split in SPLIT_ORDER]
    few = [indices[: int(share * len(indices))] for indices in each]
    return [int(i) for indices in few for i in indices] if all(map(len, few)) else []


def few_steps(probe: CaptureConfig, total: int) -> tuple[int, ...]:
    """Step indices at which transformers with random weights run.

    These are the captured steps of the first half at which x0-hat is decoded, or else the first captured step.
    """
    kept, decoded = probe.steps_kept(total), probe.steps_decoded(total)
    return tuple(step for step in kept if step in decoded and step < total / 2) or kept[:1]


class VideoSampler(FrozenSampling):
    """Samples batches of problems under capture, for `Trainer.predict`.

    few: indices in the run of the samples for random weights. seed: of the random weights.
    """

    def __init__(self, sampler: Sampler, probe: CaptureConfig, few: frozenset[int], seed: int):
        super().__init__(sampler)
        self.probe, self.few, self.random_seed = probe, few, seed

    def predict_step(self, batch: Shard, index: int) -> Sampled:
        """The tensors of the shard of one batch of samples, and the names along its axes."""
        first = batch.index * self.sampler.config.batch
        rows = [row for row in range(len(batch)) if first + row in self.few]
        return _collect_batch(self.sampler, self.probe, batch.content, rows, first, self.random_seed)


def collect(
    sampler: Sampler,
    probe: CaptureConfig,
    samples: Sequence[Sample],
    settings: StoreSettings,
    folder: Path,
    monitor: ResourceMonitor | None = None,
) -> ActivationStore:
    """Collects the activations of all samples, one shard per batch. Shards that are on disk already are kept.

    samples: as returned by `draw_samples`. Batches do not depend on the number of processes, so one process and several
    write the same shards. monitor: logs speed and memory of every batch.
    Raises InputError when the folder holds a store with other settings, when the disk has too little space, and for a
    prompt that is too long; then nothing is written.
    """
    prompts = [*(s.problem.prompt for s in samples), sampler.config.negative_prompt]
    check_prompts(sampler.model, prompts, sampler.config.prompt_tokens)
    few = frozenset(few_samples(samples, probe.random_weights))
    if probe.random_weights and not few:
        say(
            f"random weights are left out: probe.random_weights={probe.random_weights} of {len(samples)} samples "
            "leaves a split without samples; raise it"
        )
    batches = sampler.batches(list(samples))
    store = ActivationStore(folder, asdict(settings), len(batches))
    what = f"{len(samples)} samples" + (f", permuted and fresh weights on {len(few)} of them" if few else "")
    announce(store, store_bytes(sampler, probe, len(samples), len(few)), what)
    if monitor is not None:
        monitor.done = sum(len(batch) for i, batch in enumerate(batches) if store.has(i))
    module = VideoSampler(sampler, probe, few, settings.seed)
    shards = [Shard(store, i, batch) for i, batch in enumerate(batches)]
    predict_shards(module, shards, sampler.trainer, [monitor] if monitor else [])
    return store


def store_bytes(sampler: Sampler, probe: CaptureConfig, samples: int, few: int = 0) -> int:
    """Size of the store in bytes, computed from the shapes alone. few: number of samples for random weights."""
    pipeline, regions = sampler.config, sampler.task.regions
    transformer = next(iter(experts(sampler.model).values()))
    layers = probe.layers_kept(sampler.depth)
    steps, config = probe.steps_kept(pipeline.steps), transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    pooling = Pooling(probe.pooling, probe.frames, [[(0.0, 0.0, 1.0, 1.0)] * regions])
    cells = samples * len(steps) * len(layers) * (2 if pipeline.guidance > 1 else 1)
    cells += few * len(RANDOM_WEIGHTS) * len(few_steps(probe, pipeline.steps)) * len(layers)
    features = cells * len(pooling.positions(sampler.latent_frames)) * pooling.regions * width
    noise, condition = architecture(transformer).patch_columns(transformer)
    each_step = [width, noise, noise]  # embed, x_t, x0-hat
    inputs = sum(n * input_parts(pooling, n) for n in each_step) * len(steps)
    inputs += sum(n * input_parts(pooling, n) for n in (noise, condition))
    size = next(transformer.parameters()).element_size()
    return (features + samples * sampler.latent_frames * inputs) * size


def input_parts(pooling: Pooling, channels: int) -> int:
    """Number of spatial parts kept of an input with `channels` channels: regions, and cells of the whole frame."""
    cells = pooling if pooling.kind == "grid" else whole_frame(channels)
    return cells.across**2 + (pooling.regions if pooling.kind == "region" else 0)


@torch.no_grad()
def _collect_batch(
    sampler: Sampler, probe: CaptureConfig, batch: list[Sample], rows: list[int], first: int, seed: int
) -> Sampled:
    """The tensors of the shard of one batch, and the names along its axes.

    rows: indices in the batch of the samples for random weights. first: index in the run of the first sample.
    """
    problems, total = [s.problem for s in batch], sampler.config.steps
    decoded, few = probe.steps_decoded(total), few_steps(probe, total)
    before_last = [step for step in decoded if step < total - 1]
    layers = probe.layers_kept(sampler.depth)
    with capture(
        sampler.model, list(map(str, layers)), Pooling.of(probe, problems), probe.steps, before_last,
        few if rows else (), inputs=True,
    ) as cache:  # fmt: skip
        video = sampler(batch)
    final = sampler.parse(problems, video)
    parsed = _parse_estimates(sampler, problems, cache, before_last)
    if total - 1 in decoded:  # at the last step, x0-hat is the finished video
        parsed.scores[:, -1], parsed.answers[:, -1] = final.scores, final.answers
    tensors = {"features": cache.features(), "x0_scores": parsed.scores, "x0_answer": parsed.answers}
    tensors |= _final(sampler.task, problems, final) | _labels(sampler.task, problems)
    tensors |= {f"input.{name}": value for name, value in cache.input_features().items()}
    tensors["replica"] = torch.tensor([s.replica for s in batch])
    if rows:
        pooling = Pooling.of(probe, [problems[row] for row in rows])
        tensors |= _untrained(sampler.model, cache, layers, pooling, rows, seed)
        tensors[f"{UNTRAINED}sample"] = torch.tensor([first + row for row in rows])
    return tensors, _notes(cache) | {"untrained_steps": list(few)}


@dataclass(frozen=True, eq=False)
class _ParsedEstimates:
    """Parsed answers of x0-hat. Where x0-hat was not decoded, scores are NaN and answers are NOT_DECODED."""

    scores: Float[Tensor, "sample step candidate"]
    answers: Int[Tensor, "sample step"]


def _parse_estimates(
    sampler: Sampler, problems: list[Problem], cache: ActivationCache, steps: Sequence[int]
) -> _ParsedEstimates:
    """Decodes and parses x0-hat at some steps. Training samples are skipped: nothing is fitted to these answers."""
    shape = (len(problems), sampler.config.steps)
    scores = torch.full((*shape, sampler.task.candidates), float("nan"))
    answers = torch.full(shape, NOT_DECODED, dtype=torch.int64)
    rows = [i for i, problem in enumerate(problems) if problem.split != "train"]
    for step in steps if rows else ():
        read = sampler.parse([problems[i] for i in rows], sampler.decode(cache.clean[step][rows]))
        scores[rows, step], answers[rows, step] = read.scores, read.answers
    return _ParsedEstimates(scores, answers)


def _final(task: Task, problems: list[Problem], final: Parsed) -> dict[str, Tensor]:
    """Parsed answers of the finished videos: scores, model_answer, and whether it is a right answer."""
    solved = [int(answer) in task.solutions(p) for answer, p in zip(final.answers, problems, strict=True)]
    return {"final": final.scores, "model_answer": final.answers, "solved": torch.tensor(solved)}


def _untrained(
    model: Any, cache: ActivationCache, layers: tuple[int, ...], pooling: Pooling, rows: list[int], seed: int
) -> dict[str, Tensor]:
    """Block outputs of transformers with random weights, for some rows of a batch, computed from the recorded calls.

    Returns features [sample, weights, step, layer, position, region, channel] and spent [sample, 2]: the number of
    transformer evaluations and the seconds per sample.
    """
    begin = time.monotonic()
    features = []
    for how in RANDOM_WEIGHTS:
        with with_random_weights(model, how, seed):
            features.append(replay(model, cache, layers, pooling, rows))
    spent = [len(RANDOM_WEIGHTS) * len(cache.recorded), (time.monotonic() - begin) / len(rows)]
    return {
        f"{UNTRAINED}features": torch.stack(features, dim=1).to(next(iter(cache.parts.values())).dtype),
        f"{UNTRAINED}spent": torch.tensor([spent] * len(rows), dtype=torch.float64),
    }


@torch.no_grad()
def watch(
    sampler: Sampler, samples: Sequence[Sample], steps: Sequence[int]
) -> Float[np.ndarray, "sample step frame height width 3"]:
    """The decoded x0-hat of each sample at each step (a step index), with values in [0, 1]."""
    with capture(sampler.model, [X0], Pooling("clip"), "last", clean=steps) as cache:
        sampler(samples, output_type="latent")
    return np.stack([sampler.decode(cache.clean[step]) for step in steps], axis=1)


def _labels(task: Task, problems: list[Problem]) -> dict[str, Tensor]:
    """Labels of every target but model_answer (-1 where a problem has none), difficulty, key, split and kind."""
    tensors = {}
    for target in task.targets:
        if target.role == "model_answer":
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
    """The names along the axes of the features."""
    return {
        "steps": list(cache.steps),
        "hook_points": list(cache.hook_points),
        "branches": list(cache.branches),
        "positions": list(cache.positions),
        "experts": [cache.experts[step] for step in cache.steps],
    }
