"""`python probe.py use=lengths`: the same problems with other numbers of frames, and with other numbers of steps.

The paper calls video models chains of steps, not chains of frames, and compares numbers of frames and a model of few
steps (arXiv 2603.16870). Here one model samples the same new problems at all settings, and answers are compared problem
by problem.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped

from cosprobe.activations import (
    ActivationStore,
    FrozenSampling,
    Sampled,
    Sampler,
    Shard,
    flops,
    images,
    predict_shards,
)
from cosprobe.config import LengthsConfig, PipelineConfig
from cosprobe.errors import InputError
from cosprobe.evaluation import UNTESTED, Claim, clearest_either_way
from cosprobe.models import check_size
from cosprobe.probes import ProbeBank
from cosprobe.runtime import rank_and_world, say
from cosprobe.tasks import Problem, Sample, TaskConfig, fresh_problems, noise_seed

FOLDER = "lengths"  # in the folder of a result: answers of every setting
RECIPE = "recipe.json"  # in the folder of a model that was trained here
EQUAL_COST = 1.5  # the costs of two settings count as about equal up to this factor


@dataclass(frozen=True, order=True)
class Setting:
    """Numbers of frames and of steps. again: with a noise seed of its own, to see what another seed changes."""

    frames: int
    steps: int
    again: bool = False

    def __str__(self) -> str:
        return f"{self.frames} frames, {self.steps} steps{', another noise seed' if self.again else ''}"


@dataclass(frozen=True, eq=False)
class Lengths:
    """The answers of every setting.

    own: the setting of the run. problems: in the order of the samples. answers: what the videos show, -1 for no answer.
    right: whether that is a right answer. gflop: counted operations of one run, by setting. clips: number of clips of
    each number of frames in the last training of the model; None where it is not known.
    """

    task: str
    kind: str
    own: Setting
    problems: tuple[Problem, ...]
    answers: dict[Setting, Int[np.ndarray, " sample"]]
    right: dict[Setting, Bool[np.ndarray, " sample"]]
    gflop: dict[Setting, float]
    clips: dict[int, int] | None

    @property
    def keys(self) -> Shaped[np.ndarray, " sample"]:
        """The problem of every sample."""
        return np.array([problem.key for problem in self.problems])

    @property
    def settings(self) -> list[Setting]:
        """All settings: the run's own, the same with another noise seed, and the others in order of frames and
        steps."""
        others = sorted(s for s in self.answers if (s.frames, s.steps) != (self.own.frames, self.own.steps))
        return [self.own, replace(self.own, again=True), *others]

    def along(self, axis: str) -> list[Setting]:
        """The settings with other numbers of `frames` or `steps`, and the run's own, in order."""
        other = "steps" if axis == "frames" else "frames"
        return [s for s in sorted(self.answers) if not s.again and getattr(s, other) == getattr(self.own, other)]

    def cost(self, setting: Setting) -> float:
        """Operations of one run, as a multiple of those of the run's own setting."""
        return self.gflop[setting] / self.gflop[self.own]

    def difference(self, one: Setting, other: Setting) -> Float[np.ndarray, " sample"]:
        """Whether the first setting is right minus whether the second is."""
        return self.right[one].astype(float) - self.right[other]

    def same(self, setting: Setting) -> Float[np.ndarray, " sample"]:
        """Whether the videos show what those of the run's own setting show: the same answer, or none in both."""
        return (self.answers[setting] == self.answers[self.own]).astype(float)


def sample_lengths(
    sampler: Sampler, task: TaskConfig, bank: ProbeBank, use: LengthsConfig, seed: int, folder: Path
) -> Lengths:
    """Samples new problems at every setting, and keeps their answers in `folder`, that of the result.

    What is there already is not sampled again. The noise seeds of a problem are those of every other use. The noise of
    a seed is the same for any number of steps. With another number of frames it has another shape, so it is another
    draw. With several processes, all of them sample.
    Raises InputError for a task without a parser, a kind that the task does not have, and numbers of frames that the
    model or the task does not take.
    """
    if not sampler.task.candidates:
        raise InputError(
            f"task {sampler.task.name!r}: has no parser, so no answer can be read from a video; expected a task with "
            "one"
        )
    kind = use.kind or sampler.task.kinds[0]
    if kind not in sampler.task.kinds:
        raise InputError(f"use.kind={kind!r}: expected one of {', '.join(sampler.task.kinds)}")
    problems = fresh_problems(sampler.task, "test", task.problems, use.problems, [kind])
    settings = settings_of(sampler.config, use)
    for frames in sorted({s.frames for s in settings}):
        check_frames(sampler, task, problems[0], frames, use)
    gflop = {setting: _gflop(sampler, problems[0], setting) for setting in settings}
    own = settings[0]
    runs, spent = sum(gflop.values()) / gflop[own], sum(s.steps for s in settings) * len(problems)
    say(
        f"lengths: {len(settings)} settings of {len(problems)} problems of kind {kind!r}; {spent} network evaluations, "
        f"the operations of {runs:.1f} runs of each problem at {own}"
    )
    answers = _sampled(sampler, bank, problems, settings, seed, folder / FOLDER)
    solutions = np.zeros((len(problems), sampler.task.candidates + 1), dtype=bool)  # last: no answer
    for row, problem in zip(solutions, problems, strict=True):
        row[list(sampler.task.solutions(problem))] = True
    right = {setting: solutions[np.arange(len(problems)), found] for setting, found in answers.items()}
    clips = trained_lengths(sampler.config)
    return Lengths(sampler.task.name, kind, own, tuple(problems), answers, right, gflop, clips)


def settings_of(config: PipelineConfig, use: LengthsConfig) -> list[Setting]:
    """The run's own setting, the same with another noise seed, and those that are asked for."""
    own = Setting(config.frames, config.steps)
    asked = [Setting(frames, config.steps) for frames in use.frames]
    asked += [Setting(config.frames, steps) for steps in use.steps]
    return list(dict.fromkeys([own, replace(own, again=True), *asked]))


def check_frames(sampler: Sampler, task: TaskConfig, problem: Problem, frames: int, use: LengthsConfig) -> None:
    """Raises InputError for a number of frames that the model or the task does not take."""
    try:
        check_size(sampler.model, sampler.task.image(problem).shape[:2], frames)
        if hasattr(task, "frames"):
            replace(task, frames=frames).build()  # type: ignore[type-var]  # settings of tasks are dataclasses
    except InputError as error:
        raise InputError(f"use.frames={list(use.frames)}: {error}") from error


def trained_lengths(config: PipelineConfig) -> dict[int, int] | None:
    """For each number of frames, how many clips the last training of a model had; None where that is not known, or
    where the model has adapters. It is in the `recipe.json` of models that were trained with `train.py`."""
    path = config.folder / RECIPE
    if config.lora or config.lora_2 or not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text())["settings"]
        return {int(frames): int(clips) for frames, clips in zip(settings["lengths"], settings["clips"], strict=True)}
    except (OSError, ValueError, KeyError, TypeError):  # a file of the same name that is something else
        return None


@dataclass(frozen=True)
class Batch:
    """Samples of one setting."""

    setting: Setting
    samples: list[Sample]

    def __len__(self) -> int:
        return len(self.samples)


class LengthSampling(FrozenSampling):
    """Samples batches of one setting each, for `Trainer.predict`."""

    @torch.no_grad()
    def predict_step(self, batch: Shard, index: int) -> Sampled:
        """answers [sample]: what the videos show, -1 for no answer."""
        samples = batch.content.samples
        video = _at(self.sampler, batch.content.setting)(samples)
        return {"answers": self.sampler.parse([s.problem for s in samples], video).answers}, {}


def _sampled(
    sampler: Sampler, bank: ProbeBank, problems: Sequence[Problem], settings: Sequence[Setting], seed: int, folder: Path
) -> dict[Setting, Int[np.ndarray, " sample"]]:
    """The answers of every setting, in the order of `problems`. Missing ones are sampled."""
    shards, stores = list[Shard](), dict[Setting, tuple[ActivationStore, list[str]]]()
    for setting in settings:
        samples = [Sample(p, noise_seed(p, int(setting.again), seed), int(setting.again)) for p in problems]
        identity: dict[str, Any] = bank.store.identity | asdict(setting)
        fingerprint = ActivationStore(folder, identity).fingerprint[:8]
        name = (
            f"{problems[0].kind}-{setting.frames}-frames-{setting.steps}-steps{'-again' * setting.again}-{fingerprint}"
        )
        store = ActivationStore(folder / name, identity)
        if rank_and_world()[0] == 0:
            store.begin(0)
        stores[setting] = store, [sample.name for sample in samples]
        missing = set(store.missing(stores[setting][1]))
        for batch in sampler.batches([sample for sample in samples if sample.name in missing]):
            shards.append(Shard(store, {"": [sample.name for sample in batch]}, Batch(setting, batch)))
    predict_shards(LengthSampling(sampler), shards, list(stores.values()), sampler.trainer)
    return {setting: store.read(names=names)[0]["answers"].numpy() for setting, (store, names) in stores.items()}


def _at(sampler: Sampler, setting: Setting) -> Sampler:
    return replace(sampler, config=replace(sampler.config, frames=setting.frames, steps=setting.steps))


def _gflop(sampler: Sampler, problem: Problem, setting: Setting) -> float:
    """Counted operations of one run with decoding."""
    config = _at(sampler, setting).config
    return flops(sampler.model, config, images(sampler.task, [problem]), [problem.prompt]).run(setting.steps) / 1e9


# claims


def claims(found: Lengths) -> list[Claim]:
    """The paper's claims about numbers of frames and steps, on one model that was trained for neither.

    Each claim is about several settings, of which the clearest counts, with p and the lower bound corrected for all of
    them. It `does not hold` where the opposite is clear in the same way.
    """
    own, stated = found.own, list[Claim]()
    for axis, fewer, more in (
        ("frames", "Fewer frames hurt (the paper: little down to 17 frames, sharply below)", "More frames help"),
        ("steps", "Fewer steps hurt (the paper, of a model that was distilled to 4 steps)", "More steps help"),
    ):
        at = getattr(own, axis)
        less = [(own, s) for s in found.along(axis) if getattr(s, axis) < at]
        beyond = [(s, own) for s in found.along(axis) if getattr(s, axis) > at]
        stated += [
            _about_pairs(found, claim, pairs, f"no {word} {axis} than the {at} of the run were sampled", "own setting")
            for claim, pairs, word in ((fewer, less, "fewer"), (more, beyond, "more"))
        ]
    claim = "Leaving out steps hurts more than leaving out frames, at about equal cost"
    why = f"no two settings with fewer frames and with fewer steps cost the same up to a factor of {EQUAL_COST:g}"
    return [*stated, _about_pairs(found, claim, matched(found), why, "fewer steps")]


def matched(found: Lengths) -> list[tuple[Setting, Setting]]:
    """For each setting with fewer frames, the one with fewer steps whose cost is nearest, if it is about equal."""
    shorter = [s for s in found.along("steps") if s.steps < found.own.steps]
    pairs = []
    for one in (s for s in found.along("frames") if s.frames < found.own.frames):
        apart = {other: abs(math.log(found.cost(one) / found.cost(other))) for other in shorter}
        if apart and min(apart.values()) <= math.log(EQUAL_COST):
            pairs.append((one, min(apart, key=apart.__getitem__)))
    return pairs


def _about_pairs(found: Lengths, claim: str, pairs: Sequence[tuple[Setting, Setting]], why: str, control: str) -> Claim:
    """A claim that in one of the pairs, the first setting is right more often than the second. why: there is none."""
    if not pairs:
        return Claim(claim, why, "", np.nan, np.nan, np.nan, UNTESTED)
    difference = np.stack([found.difference(*pair) for pair in pairs])
    best, outcome = clearest_either_way(difference, found.keys)
    rights = [f"{found.right[s].mean():.2f} right at {s} (cost {found.cost(s):.2f})" for s in pairs[best.at]]
    several = f"clearest of {len(pairs)}, " if len(pairs) > 1 else ""
    measure = f"{' against '.join(rights)}; {several}p {best.p:.3f}"
    return Claim(claim, measure, control, best.value, best.lower, best.upper, outcome)
