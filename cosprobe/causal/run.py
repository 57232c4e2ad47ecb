"""Samples the conditions of an experiment, batch by batch, and keeps what the videos show on disk.

A shard is one batch of samples with all conditions that begin at the same step. Its clean run is sampled once; every
condition starts from the stored first steps of it. A call that was killed continues with the missing shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from cosprobe.activations import (
    ActivationCache,
    ActivationStore,
    FrozenSampling,
    Sampled,
    Sampler,
    Shard,
    capture,
    predict_shards,
)
from cosprobe.causal.clean import NONE, CleanRun, with_steps
from cosprobe.causal.experiments import Condition, Experiment
from cosprobe.causal.patching import patch
from cosprobe.causal.prefix import replayed
from cosprobe.cells import Cell
from cosprobe.ensembles import ProbeScorer
from cosprobe.models import architecture, first_transformer
from cosprobe.runtime import rank_and_world
from cosprobe.tasks import Sample, Task


@dataclass(frozen=True, eq=False)
class Group:
    """The conditions of one batch that begin at the same step of runs with the same number of steps."""

    samples: list[Sample]
    conditions: list[Condition]

    def __len__(self) -> int:
        return len(self.samples)


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What the videos show. NaN or -1 where there is nothing.

    conditions: in the order of the axis condition. keys: the problem of every sample. labels: the label that an
    experiment is about [sample, condition]. clean: answers of the clean runs [sample, condition]; runs with other
    numbers of steps have other clean runs. answers: [sample, condition]. change: mean absolute difference from the
    clean video, in pixels that no solution changes [sample, condition]. evaluations: of the transformer, per sample,
    over all conditions, donor states, and one clean run for each number of steps.
    distance, cka, probe: only for noise, [sample, condition, step]. See `Follower`. clean_probe: [sample, step].
    """

    conditions: list[Condition]
    keys: Shaped[np.ndarray, " sample"]
    labels: Int[np.ndarray, "sample condition"]
    clean: Int[np.ndarray, "sample condition"]
    answers: Int[np.ndarray, "sample condition"]
    change: Float[np.ndarray, "sample condition"]
    evaluations: float
    distance: Float[np.ndarray, "sample condition step"]
    cka: Float[np.ndarray, "sample condition step"]
    probe: Float[np.ndarray, "sample condition step"]
    clean_probe: Int[np.ndarray, "sample step"]

    @property
    def complete(self) -> Bool[np.ndarray, " sample"]:
        """Whether a sample has a label in every condition; the others are left out."""
        return (self.labels != NONE).all(axis=1)


class Follower:
    """Follows runs step by step: x0-hat, and what probes read.

    distance: |x0-hat - clean x0-hat| / |clean x0-hat|. cka: 1 - CKA of both x0-hats, 0 for equal structure. probe:
    the answer that the probe with the best validation accuracy at the step gives, NONE at steps without probes. Axes
    [sample, step].
    CKA is linear, over the tokens of one sample, with the values of a patch as features.
    Source: Kornblith et al. (2019), "Similarity of neural network representations revisited", arXiv 1905.00414. Which
    states the paper compares is not known; here it is x0-hat, which every step has.
    """

    def __init__(self, scorer: ProbeScorer | None, sampler: Sampler):
        self.scorer, self.sampler = scorer, sampler

    def follow(self, run: CleanRun, stack: ExitStack, first: int) -> ActivationCache:
        """Begins to follow the pipeline call that comes next, from step `first` on."""
        steps = range(first, self.sampler.config.steps)
        layers = ["x_t", *sorted({str(c.layer) for s in steps for c in self._cells(s).values()})]
        pooling = self.scorer.pooling(run.problems) if self.scorer is not None else None
        spec = f"{first}:{self.sampler.config.steps}"
        return stack.enter_context(capture(self.sampler.model, layers, pooling, spec, clean=tuple(steps)))

    def _cells(self, step: int) -> dict[str, Cell]:
        """The cells that are read at a step, by target; none at a step without probes."""
        if self.scorer is None or all(c.step != step for table in self.scorer.accuracy.values() for c in table):
            return {}
        return {name: self.scorer.cell(name, step) for name in self.scorer.accuracy}

    def tokens(self, clean: Tensor) -> Float[Tensor, "sample token channel"]:
        """An x0-hat latent as tokens."""
        model = self.sampler.model
        return architecture(model).latent_tokens(first_transformer(model), clean).float().cpu()

    def read(self, run: CleanRun, cache: ActivationCache, step: int) -> Int[Tensor, " sample"]:
        """What probes answer at a step, NONE without probes."""
        if self.scorer is None or not (cells := self._cells(step)):
            return torch.full((len(run.samples),), NONE)
        return self.scorer.read(cells, run.problems, cache.at).argmax(dim=-1)


def cka_distance(
    one: Float[Tensor, "sample token channel"], other: Float[Tensor, "sample token channel"]
) -> Float[Tensor, " sample"]:
    """1 - linear CKA of two sets of tokens, for every sample; NaN where all tokens of one are equal."""
    one, other = (x.double() - x.double().mean(dim=1, keepdim=True) for x in (one, other))
    cross = (other.mT @ one).flatten(1).norm(dim=1) ** 2
    own = (one.mT @ one).flatten(1).norm(dim=1) * (other.mT @ other).flatten(1).norm(dim=1)
    return torch.where(own > 0, 1 - cross / own, torch.nan).float()


class Intervention(FrozenSampling):
    """Samples the conditions of a group of one batch, for `Trainer.predict`.

    experiment: what is changed. layers: blocks whose states are kept. scorer: probes that are read at every step, for
    `follow`; None without probes. follow: whether x0-hat and probes are compared with the clean run at every step.
    """

    def __init__(
        self,
        sampler: Sampler,
        experiment: Experiment,
        layers: Sequence[int],
        scorer: ProbeScorer | None = None,
        follow: bool = False,
    ):
        super().__init__(sampler)
        self.experiment, self.layers = experiment, layers
        self.follower = Follower(scorer, sampler) if follow else None
        self._last: tuple[str, CleanRun, dict[int, tuple[Tensor, Tensor]]] | None = None

    @torch.no_grad()
    def predict_step(self, batch: Shard, index: int) -> Sampled:
        """Outcomes of a group of one batch; see `Outcomes`."""
        samples, conditions = batch.content.samples, batch.content.conditions
        steps = conditions[0].steps
        run, followed = self._clean(samples, steps)
        run.forget_states()  # so that evaluations do not depend on the groups before, which may be on disk already
        before, found = run.evaluations, dict[str, list[Tensor]]()
        labels, total = self.experiment.labels(run), run.sampler.config.steps
        for condition in conditions:
            for name, value in self._outcome(run, condition, followed).items():
                found.setdefault(name, []).append(value)
            run.evaluations += total - condition.first
        spent = torch.full((len(samples),), float(run.evaluations - before))
        tensors = {name: torch.stack(values, dim=1) for name, values in found.items()}
        tensors |= {"labels": labels.clone(), "clean": run.answers, "evaluations": spent}  # shards share no memory
        if followed:
            tensors["clean_probe"] = torch.stack([probe for _, probe in followed.values()], dim=1)
        return tensors, {"condition": [condition.name for condition in conditions]}

    def _clean(self, samples: list[Sample], steps: int) -> tuple[CleanRun, dict[int, tuple[Tensor, Tensor]]]:
        """The clean run of a batch, and by step its x0-hat (as tokens) and what probes read."""
        key = f"{[sample.name for sample in samples]} {steps}"
        if self._last is None or self._last[0] != key:
            run, followed = CleanRun(with_steps(self.sampler, steps), samples, self.layers), {}
            with ExitStack() as stack:
                if self.follower is not None and not steps:
                    cache = self.follower.follow(run, stack, 0)
                run.answers  # noqa: B018 (samples it)
            if self.follower is not None and not steps:
                followed = {
                    step: (self.follower.tokens(clean), self.follower.read(run, cache, step))
                    for step, clean in cache.clean.items()
                }
            self._last = key, run, followed
        return self._last[1:]

    def _outcome(
        self, run: CleanRun, condition: Condition, followed: dict[int, tuple[Tensor, Tensor]]
    ) -> dict[str, Tensor]:
        needed = self.experiment.needed(run, condition)
        sampler, first = run.sampler, condition.first
        with ExitStack() as stack:
            cache = self.follower.follow(run, stack, first) if self.follower is not None and followed else None
            stack.enter_context(replayed(sampler.model, run.prefix, first))
            stack.enter_context(patch(sampler.model, condition.edits, needed.sources, needed.boxes, run.seeds))
            video = np.asarray(sampler(run.samples))
        found = {
            "answers": sampler.parse(run.problems, video).answers,
            "change": _outside(sampler.task, run, video),
        }
        if cache is not None and self.follower is not None:
            distance = torch.zeros(len(run.samples), sampler.config.steps)
            cka, probe = torch.zeros_like(distance), torch.stack([p for _, p in followed.values()], dim=1)
            for step, clean in cache.clean.items():
                tokens, (own, _) = self.follower.tokens(clean), followed[step]
                size = own.flatten(1).norm(dim=1).clamp_min(1e-12)
                distance[:, step] = (tokens - own).flatten(1).norm(dim=1) / size
                cka[:, step] = cka_distance(own, tokens)
                probe[:, step] = self.follower.read(run, cache, step)
            found |= {"distance": distance, "cka": cka, "probe": probe}
        return found


def _outside(task: Task, run: CleanRun, video: np.ndarray) -> Float[Tensor, " sample"]:
    """Mean absolute difference from the clean video, in pixels that no solution changes."""
    found = []
    for problem, clip, clean in zip(run.problems, video, run.video, strict=True):
        rest = ~task.workspace(problem)
        found.append(float(np.abs(clip - clean)[:, rest].mean()) if rest.any() else np.nan)
    return torch.tensor(found)


def sample_conditions(
    module: Intervention, batches: Sequence[list[Sample]], folder: Path, identity: dict[str, Any]
) -> Outcomes:
    """Samples what is not on disk yet, and reads all outcomes.

    batches: samples that are sampled together. folder: where outcomes are kept. identity: everything else that they
    depend on. All processes call it with the same arguments.
    """
    groups = dict[tuple[int, int], list[Condition]]()
    for condition in module.experiment.conditions():
        groups.setdefault((condition.steps, condition.first), []).append(condition)
    names = [sample.name for samples in batches for sample in samples]
    identity = identity | {"batches": [len(samples) for samples in batches], "samples": _digest(names)}
    stores = {}
    for (steps, first), conditions in groups.items():
        settings = identity | {"conditions": [_described(condition) for condition in conditions]}
        name = f"steps-{steps or module.sampler.config.steps}-from-{first}-{_digest(settings)}"
        stores[steps, first] = ActivationStore(folder / name, settings)
    if rank_and_world()[0] == 0:
        for store in stores.values():
            store.begin(0)
    shards = []
    for samples in batches:  # the groups of a batch follow each other: they share its clean run
        rows = {"": [sample.name for sample in samples]}
        missing = [key for key, store in stores.items() if store.missing(rows[""])]
        shards += [Shard(stores[key], rows, Group(samples, groups[key])) for key in missing]
    predict_shards(module, shards, [(store, names) for store in stores.values()], module.sampler.trainer)
    read = [store.read(names=names)[0] for store in stores.values()]
    return _joined(
        [c for conditions in groups.values() for c in conditions], read, batches, module.sampler.config.steps
    )


def _joined(
    conditions: list[Condition], read: list[dict[str, Tensor]], batches: Sequence[list[Sample]], steps: int
) -> Outcomes:
    """The outcomes of all groups side by side. conditions: of the groups, in the order of `read`."""
    samples = [sample for batch in batches for sample in batch]

    def along(name: str) -> np.ndarray:
        parts = [one[name] if one[name].ndim > 1 else one[name][:, None].expand_as(one["answers"]) for one in read]
        return torch.cat(parts, dim=1).numpy()

    def followed(name: str) -> np.ndarray:
        parts, shape = [], (len(samples), steps)
        for one in read:
            blank = torch.full((shape[0], one["answers"].shape[1], shape[1]), torch.nan)
            parts.append(one[name].float() if name in one else blank)
        return torch.cat(parts, dim=1).numpy()

    own = next((one for one in read if "clean_probe" in one), None)
    return Outcomes(
        conditions=conditions,
        keys=np.array([sample.problem.key for sample in samples]),
        labels=along("labels"),
        clean=along("clean"),
        answers=along("answers"),
        change=along("change"),
        evaluations=float(sum(one["evaluations"].mean() for one in read)) + clean_evaluations(conditions, steps),
        distance=followed("distance"),
        cka=followed("cka"),
        probe=followed("probe"),
        clean_probe=own["clean_probe"].numpy() if own else np.full((len(samples), steps), NONE),
    )


def clean_evaluations(conditions: Sequence[Condition], steps: int) -> int:
    """Evaluations of one clean run for each number of steps. steps: that of the settings."""
    return sum(length or steps for length in {condition.steps for condition in conditions})


def _described(condition: Condition) -> dict[str, Any]:
    numbers = {name: None if value != value else value for name, value in condition.coordinates.items()}  # NaN: none
    return numbers | {"edits": [json.loads(json.dumps(asdict(edit))) for edit in condition.edits]}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:10]
