"""Samples problems with a pipeline, captures the activations and writes them to an activation store."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import product
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
from cosprobe.activations.sampler import Parsed, Sampler, unparsed
from cosprobe.activations.store import MANIFEST, ActivationStore, Rows
from cosprobe.activations.table import SampleTable
from cosprobe.cells import SPLIT_ORDER, X0
from cosprobe.config import CaptureConfig, PipelineConfig
from cosprobe.differences import first_difference
from cosprobe.errors import InputError
from cosprobe.files import read_json, write_json
from cosprobe.locks import held
from cosprobe.models import (
    Fingerprint,
    TokenGrid,
    architecture,
    check_guidance,
    check_prompts,
    check_size,
    first_transformer,
    model_fingerprint,
    with_defaults,
)
from cosprobe.monitoring import ResourceMonitor
from cosprobe.runs import POINTER, STORE
from cosprobe.runtime import rank_and_world, say
from cosprobe.tasks import Problem, Sample, Task, TaskConfig, shaping

FORMAT = 8  # version of the content of a shard
UNPROJECTED = "unprojected"  # name of the features with all channels, and of their steps and layers in the notes
UNTRAINED = "untrained."  # group of the tensors from transformers with random weights
NOT_DECODED = -2  # value in `x0_answer` where x0-hat was not decoded
# settings of a task that say which samples are drawn, and leave each of them the same
DRAWN = ("problems", "seeds", "verified")
KEPT = ("layers", "steps", "decode")  # settings of the capture that say how much is kept


@dataclass(frozen=True)
class StoreSettings:
    """All settings that determine the activations of a run, and with them its features and probes.

    model: fingerprint of the model's files. seed: base of the noise seeds. pipeline: without name and paths, which the
    fingerprint replaces. task: settings of the task. probe: what is captured. versions: of torch and diffusers; a
    difference is a warning. format: version of the content of a shard.
    The batch size is included, because the batch a sample is in changes its activations by rounding errors.
    """

    model: Fingerprint
    seed: int
    pipeline: PipelineConfig
    task: dict[str, Any]
    probe: CaptureConfig
    versions: dict[str, str]
    format: int = FORMAT

    @classmethod
    def of(cls, pipeline: PipelineConfig, task: TaskConfig, probe: CaptureConfig, seed: int) -> StoreSettings:
        """The settings of a run. Reads the files of the model for the fingerprint."""
        return cls.of_model(model_fingerprint(pipeline), with_defaults(pipeline), shaping(task), probe, seed)

    @classmethod
    def of_model(
        cls, model: Fingerprint, pipeline: PipelineConfig, task: dict[str, Any], probe: CaptureConfig, seed: int
    ) -> StoreSettings:
        """The settings for a model of this fingerprint. task: what was sampled, as JSON."""
        bare = PipelineConfig(name="", **pipeline.shaping)
        captured = CaptureConfig(**{name: getattr(probe, name) for name in asdict(CaptureConfig())})
        versions = {name: version(name) for name in ("torch", "diffusers")}
        return cls(model, seed, bare, task, captured, versions)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> StoreSettings:
        """The settings from the output of `to_json`. Raises InputError for settings of another format."""
        if saved.get("format") != FORMAT:
            raise InputError(
                f"activations of format {saved.get('format')}: expected format {FORMAT}; run train.py again "
                "in another run_dir"
            )
        pipeline, probe = PipelineConfig(**saved["pipeline"]), CaptureConfig(**saved["probe"])
        return cls(**{**saved, "pipeline": pipeline, "probe": probe})

    def to_json(self) -> dict[str, Any]:
        """All settings by name. `probe.project` is left out where it is 0: what was made before it was a setting is
        known by the same settings."""
        saved = asdict(self)
        if not self.probe.project:
            del saved["probe"]["project"]
        return saved

    @property
    def shaping(self) -> dict[str, Any]:
        """All settings but the versions of libraries."""
        return {name: value for name, value in self.to_json().items() if name != "versions"}

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that shape the activations of a sample. Runs that agree in these can share a store.

        Left out are the number of samples, and which layers and steps are kept.
        """
        saved = self.shaping
        for part, names in (("task", DRAWN), ("probe", (*KEPT, "random_weights"))):
            saved[part] = {name: value for name, value in saved[part].items() if name not in names}
        return saved

    @property
    def request(self) -> dict[str, Any]:
        """The settings that say which samples are drawn."""
        return {name: self.task[name] for name in DRAWN if name in self.task}


@dataclass(frozen=True)
class StoredSamples:
    """The samples of a store that a run reads, and the layers and steps that it reads of them.

    probe: the layers, steps and decoded steps that are read, as in the settings of the run.
    """

    store: ActivationStore
    table: SampleTable
    probe: CaptureConfig

    @classmethod
    def whole(cls, store: ActivationStore) -> StoredSamples:
        """All that is in a store: the largest table of samples, and every layer and step."""
        return cls(store, SampleTable.largest(store.folder), _kept(store, CaptureConfig(**store.settings["probe"])))

    @property
    def settings(self) -> StoreSettings:
        """The settings of a run that reads these samples."""
        saved = self.store.settings
        return StoreSettings.from_json(
            saved
            | {"task": saved["task"] | self.table.request, "probe": asdict(self.probe)}
            | {"versions": self.store.captured["versions"]}
        )

    def save(self, folder: Path) -> None:
        """Writes to a folder which store, table, layers and steps are read."""
        table = self.table.path(self.store.folder, self.table.request, self.table.targets, self.table.kinds)
        where = {"store": os.path.relpath(self.store.folder, folder), "table": table.name, "probe": asdict(self.probe)}
        write_json(folder / POINTER, where)

    @classmethod
    def load(cls, folder: Path) -> StoredSamples:
        """Reads what `save` wrote. Raises InputError when it or the store is missing or damaged."""
        where = read_json(folder / POINTER, "expected that of a finished train.py run; run train.py again")
        path = folder / where["store"]
        return cls(ActivationStore.open(path), SampleTable.load(path / where["table"]), CaptureConfig(**where["probe"]))

    @property
    def steps(self) -> tuple[int, ...]:
        """The step indices that are read."""
        return self.probe.steps_kept(self.store.settings["pipeline"]["steps"])

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are read."""
        return self.probe.layers_kept(self.store.captured["depth"])

    @property
    def few_steps(self) -> tuple[int, ...]:
        """The step indices that are read with random weights."""
        return few_steps(self.probe, self.store.settings["pipeline"]["steps"])

    @property
    def kept(self) -> CaptureConfig:
        """The settings of the run, but with all layers and steps that the store keeps."""
        return _kept(self.store, self.probe)

    @property
    def few(self) -> list[int]:
        """Indices of the samples that are read with random weights."""
        splits = np.array(SPLIT_ORDER)[self.table.columns["split"].numpy()]
        return few_samples(splits, self.probe.random_weights)


def find_store(settings: StoreSettings, depth: int, own: Path, named: str = "") -> ActivationStore:
    """The store of a run: the folder `named`; else `own`; else that of another run beside it with all that is needed.

    own: folder of the store inside the run folder. depth: number of blocks of the transformer.
    A store of another run is taken when its settings agree and it has all layers and steps of this run; of several, the
    one with most samples. The folder may be missing; then the run creates it.
    Raises InputError when the named store, or the run's own, has other settings or lacks layers or steps.
    """
    total = settings.pipeline.steps
    new = _kept_texts(settings.probe, depth, total) | {"depth": depth, "versions": settings.versions}
    given = Path(named) if named else own
    begun = ActivationStore.begun(given)
    if begun is not None:
        ActivationStore(given, settings.identity).check_settings(begun.settings)
        if lacking := _lacking(begun, settings.probe):
            name, value = lacking
            raise InputError(
                f"run_dir: {str(given)!r} holds probe.{name}={value!r}, now "
                f"probe.{name}={getattr(settings.probe, name)!r}; choose another run_dir or delete that folder"
            )
        return _of_versions(begun, settings)
    if not named:
        others = []
        for path in sorted(own.parent.parent.glob(f"*/{STORE}/{MANIFEST}")):
            with suppress(InputError):  # a store that cannot be read is not used
                other = ActivationStore.open(path.parent)
                if other.settings == _as_json(settings.identity) and not _lacking(other, settings.probe):
                    others.append(other)
        if others:
            found = max(others, key=lambda store: len(store.names()))
            say(f"{STORE}: that of {found.folder.parent} has the same settings; reading it, and adding what is missing")
            return _of_versions(found, settings)
    return ActivationStore(given, _as_json(settings.identity), new)


def _of_versions(store: ActivationStore, settings: StoreSettings) -> ActivationStore:
    """The store, after a warning if it was begun with other versions of libraries."""
    if found := first_difference(store.captured["versions"], settings.versions):
        name, made, now = found
        say(f"warning: {store.folder} was sampled with {name} {made}, now it is {now}; numbers may differ slightly")
    return store


def _as_json(content: dict[str, Any]) -> dict[str, Any]:
    """Settings as they are read from a file: with lists for tuples."""
    return json.loads(json.dumps(content))


def _kept_texts(probe: CaptureConfig, depth: int, total: int) -> dict[str, str]:
    """What is kept, as settings: `all` becomes the numbers of all layers or steps."""
    numbers = {"layers": probe.layers_kept(depth), "steps": probe.steps_kept(total)}
    numbers["decode"] = probe.steps_decoded(total)
    return {name: ",".join(map(str, values)) for name, values in numbers.items()}


def _kept(store: ActivationStore, probe: CaptureConfig) -> CaptureConfig:
    """The settings `probe` with all layers, steps and decoded steps of a store."""
    return replace(probe, **{name: store.captured[name] for name in KEPT})


def _lacking(store: ActivationStore, probe: CaptureConfig) -> tuple[str, str] | None:
    """The first setting of the capture for which a store has too little, and what it has; None if there is none."""
    depth, total = store.captured["depth"], store.settings["pipeline"]["steps"]
    kept = _kept(store, probe)
    there, needed = (_kept_texts(one, depth, total) for one in (kept, probe))
    for name in KEPT:
        if not set(needed[name].split(",")) <= set(there[name].split(",")):
            return name, there[name]
    if probe.random_weights and not set(few_steps(probe, total)) <= set(few_steps(kept, total)):
        return "steps", ",".join(map(str, few_steps(kept, total)))
    return None


def few_samples(splits: np.ndarray, most: int) -> list[int]:
    """Indices of the samples on which transformers with random weights run: the first ones of every split.

    splits: of all samples. At most `most` in total, in the proportions of the splits. Empty when a split would have
    none. See `few_steps` for the steps.
    """
    share = min(1.0, most / len(splits))
    each = [np.flatnonzero(splits == split) for split in SPLIT_ORDER]
    few = [indices[: int(share * len(indices))] for indices in each]
    return [int(i) for indices in few for i in indices] if all(map(len, few)) else []


def few_steps(probe: CaptureConfig, total: int) -> tuple[int, ...]:
    """Step indices at which transformers with random weights run.

    These are the captured steps of the first half at which x0-hat is decoded, or else the first captured step.
    """
    kept, decoded = probe.steps_kept(total), probe.steps_decoded(total)
    return tuple(step for step in kept if step in decoded and step < total / 2) or kept[:1]


def unprojected_cells(probe: CaptureConfig, depth: int, total: int) -> list[tuple[int, int]]:
    """The steps and layers whose features are also kept with all channels, to measure what the projection costs.

    The first step and the one in the middle, each with the layer in the middle and the last one; none without a
    projection. depth: number of blocks. total: number of sampler steps.
    """
    if not probe.project:
        return []
    steps, layers = probe.steps_kept(total), probe.layers_kept(depth)
    pairs = product((steps[0], steps[len(steps) // 2]), (layers[len(layers) // 2], layers[-1]))
    return list(dict.fromkeys(pairs))


class VideoSampler(FrozenSampling):
    """Samples batches of problems under capture, for `Trainer.predict`.

    few: names of the samples that are also run with random weights. seed: of the random weights.
    """

    def __init__(self, sampler: Sampler, probe: CaptureConfig, few: frozenset[str], seed: int):
        super().__init__(sampler)
        self.probe, self.few, self.random_seed = probe, few, seed

    def predict_step(self, batch: Shard, index: int) -> Sampled:
        """The tensors of the shard of one batch of samples, and the names along its axes."""
        rows = [row for row, sample in enumerate(batch.content) if sample.name in self.few]
        return _collect_batch(self.sampler, self.probe, batch.content, rows, self.random_seed)


def collect(
    sampler: Sampler,
    draw: Callable[[], Sequence[Sample]],
    settings: StoreSettings,
    store: ActivationStore,
    monitor: ResourceMonitor | None = None,
    before: Callable[[SampleTable], None] = lambda table: None,
) -> StoredSamples:
    """Collects the activations of the samples of a run that are not in the store yet, one shard per batch.

    draw: returns the samples, as `draw_samples` does; it is called only when the store does not know them, or when some
    are missing. store: from `find_store`. monitor: logs speed and memory of every batch. before:
    called with the table of the samples, unless all of them are there.
    Batches do not depend on the number of processes, so one process and several write the same shards. A sample that is
    needed with random weights and is stored without is sampled again.
    Raises InputError when the folder holds a store with other settings, when the disk has too little space, and for a
    prompt that is too long; then nothing is written.
    """
    task, probe = sampler.task, _kept(store, settings.probe)
    path = SampleTable.path(store.folder, settings.request, task.targets, task.kinds)
    known = SampleTable.load(path) if path.is_file() else None
    drawn = list(draw()) if known is None else []
    table = known or SampleTable.of(task, drawn, settings.request)
    stored = StoredSamples(store, table, settings.probe)
    few = [table.names[i] for i in stored.few]
    if probe.random_weights and not few:
        say(
            f"random weights are left out: probe.random_weights={probe.random_weights} of {len(table.names)} samples "
            "leaves a split without samples; raise it"
        )
    absent = {*store.missing(table.names), *store.missing(few, UNTRAINED)}
    missing = [sample for sample in drawn or (draw() if absent else []) if sample.name in absent]
    if missing:
        prompts = [*(sample.problem.prompt for sample in missing), sampler.config.negative_prompt]
        check_prompts(sampler.model, prompts, sampler.config.prompt_tokens)
        check_guidance(sampler.model, sampler.config)
        check_size(sampler.model, task.image(missing[0].problem).shape[:2], sampler.config.frames)
    size = store_bytes(sampler, probe, len(table.names), len(few))
    what = f"{len(table.names)} samples" + (f", permuted and fresh weights on {len(few)} of them" if few else "")
    with held(store.folder, "store") if missing or known is None else nullcontext():
        announce(store, table.names, len(missing), size, what)
        if missing:
            before(table)
        if known is None and rank_and_world()[0] == 0:
            table.save(store.folder)
        if monitor is not None:
            monitor.done = len(table.names) - len(missing)
        shards = [Shard(store, _rows(batch, few), batch) for batch in sampler.batches(missing)]
        module = VideoSampler(sampler, probe, frozenset(few), settings.seed)
        predict_shards(module, shards, [(store, table.names)], sampler.trainer, [monitor] if monitor else [])
    return stored


def _rows(batch: Sequence[Sample], few: Collection[str]) -> Rows:
    """The samples of a shard: of all tensors, and of those with random weights."""
    names = [sample.name for sample in batch]
    chosen = [name for name in names if name in set(few)]
    return {"": names} | ({UNTRAINED: chosen} if chosen else {})


def store_bytes(sampler: Sampler, probe: CaptureConfig, samples: int, few: int = 0) -> int:
    """Size of the store in bytes, computed from the shapes alone. few: number of samples for random weights.

    Raises InputError when `probe.project` is not less than the width of the transformer.
    """
    pipeline, regions = sampler.config, sampler.task.regions
    transformer = first_transformer(sampler.model)
    layers = probe.layers_kept(sampler.depth)
    steps, config = probe.steps_kept(pipeline.steps), transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    if probe.project >= width:
        raise InputError(
            f"probe.project={probe.project}: the transformer has {width} channels; expected fewer than that, or 0 for "
            "all of them"
        )
    pooling = Pooling(probe.pooling, probe.frames, [[(0.0, 0.0, 1.0, 1.0)] * regions])
    cells = samples * len(steps) * len(layers) * (2 if pipeline.guided(architecture(sampler.model).guidance) else 1)
    cells += few * len(RANDOM_WEIGHTS) * len(few_steps(probe, pipeline.steps)) * len(layers)
    grid = sampler.token_grid
    whole = samples * len(unprojected_cells(probe, sampler.depth, pipeline.steps))
    features = (cells * (probe.project or width) + whole * width) * len(pooling.positions(grid)) * pooling.regions
    noise, condition = architecture(sampler.model).patch_columns(sampler.model, transformer)
    each_step = [width, noise, noise]  # embed, x_t, x0-hat
    inputs = sum(n * input_parts(pooling, n, grid) for n in each_step) * len(steps)
    inputs += sum(n * input_parts(pooling, n, grid) for n in (noise, condition))
    size = next(transformer.parameters()).element_size()
    return (features + samples * grid.frames * inputs) * size


def input_parts(pooling: Pooling, channels: int, grid: TokenGrid) -> int:
    """Number of spatial parts kept of an input with `channels` channels: regions or tokens, and cells of the whole
    frame."""
    cells = pooling if pooling.kind == "grid" else whole_frame(channels)
    return cells.across**2 + {"region": pooling.regions, "token": grid.rows * grid.columns}.get(pooling.kind, 0)


@torch.no_grad()
def _collect_batch(sampler: Sampler, probe: CaptureConfig, batch: list[Sample], rows: list[int], seed: int) -> Sampled:
    """The tensors of the shard of one batch, and the names along its axes.

    rows: indices in the batch of the samples for random weights.
    """
    problems, total = [s.problem for s in batch], sampler.config.steps
    parser = sampler.task.candidates > 0
    decoded, few = probe.steps_decoded(total) if parser else (), few_steps(probe, total)
    before_last = [step for step in decoded if step < total - 1]
    layers, whole = probe.layers_kept(sampler.depth), unprojected_cells(probe, sampler.depth, total)
    with capture(
        sampler.model, list(map(str, layers)), Pooling.of(probe, problems), probe.steps, before_last,
        few if rows else (), inputs=True, unprojected=whole,
    ) as cache:  # fmt: skip
        video = sampler(batch, **({} if parser else {"output_type": "latent"}))
    final = sampler.parse(problems, video) if parser else unparsed(len(batch))
    parsed = _parse_estimates(sampler, problems, cache, before_last)
    if total - 1 in decoded:  # at the last step, x0-hat is the finished video
        parsed.scores[:, -1], parsed.answers[:, -1] = final.scores, final.answers
    tensors = {"features": cache.features().flatten(1, 4), "x0_scores": parsed.scores, "x0_answer": parsed.answers}
    tensors |= _final(sampler.task, problems, final)
    tensors |= {f"input.{name}": value for name, value in cache.input_features().items()}
    if rows:
        pooling = Pooling.of(probe, [problems[row] for row in rows])
        tensors |= _untrained(sampler.model, cache, layers, pooling, rows, seed)
    notes = _notes(cache) | {"untrained_steps": list(few)}
    if whole:
        tensors[UNPROJECTED] = torch.cat([cache.unprojected[at] for at in whole], dim=1)
        notes[UNPROJECTED] = [list(at) for at in whole]
    return tensors, notes


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


def _notes(cache: ActivationCache) -> dict[str, Any]:
    """The names along the axes of the features."""
    return {
        "steps": list(cache.steps),
        "hook_points": list(cache.hook_points),
        "branches": list(cache.branches),
        "positions": list(cache.positions),
        "experts": [cache.experts[step] for step in cache.steps],
    }
