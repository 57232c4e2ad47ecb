"""Calibrates when to stop, on problems that nothing was fitted to, and checks the promise on fresh ones.

Every problem is sampled once, to its end, with the features of the cells a policy may look at kept. What any policy
would have said and cost is read from these records; nothing is sampled twice, and whole batches stay on disk.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cosprobe.activations import ActivationStore, capture, decode_steps, fill, load_samples
from cosprobe.cells import Cell
from cosprobe.early_exit.policy import (
    AGAINST,
    Policy,
    calibrate,
    check_promise,
    first_look,
    least_problems,
    starting_point,
    thresholds,
)
from cosprobe.early_exit.reader import Answer, attach, check_pipeline, pooling_of, probabilities
from cosprobe.errors import InputError
from cosprobe.models import PipelineConfig, decode, sample
from cosprobe.probes import ProbeBank
from cosprobe.runtime import say
from cosprobe.tasks import (
    HEADLINE,
    Problem,
    Sample,
    Target,
    Task,
    TaskConfig,
    fresh_problems,
    images,
    noise_seed,
    with_noise,
)

RECORDS = "early"  # folder of the records, inside the run's


@dataclass
class EarlyConfig:
    """Stop runs as soon as a probe is sure: the risk of an error is at most `risk`, with probability `confidence`.

    against: an error is to differ from what the finished run ends on (`choice`), or to be wrong (`truth`).
    calibration, problems: how many problems of each kind calibrate the policy, and how many fresh ones it is judged on.
    """

    risk: float = 0.05
    confidence: float = 0.95
    against: str = "choice"
    calibration: int = 300
    problems: int = 60

    def __post_init__(self) -> None:
        if self.against not in AGAINST:
            raise InputError(f"use.against={self.against!r}: expected one of {', '.join(AGAINST)}")
        check_promise(self.risk, self.confidence, self.calibration)
        if self.problems < 1:
            raise InputError(f"use.problems={self.problems}: expected at least 1")


@dataclass(frozen=True)
class Records:
    """What runs of many problems, one sample each, would have given at every look.

    said: class the probe finds most probable, with its calibrated confidence and the entropy (nats) of all classes.
    drawn: what the finished run ends on, -1 for none. shown: forced choice of the decoded x0-hat at `steps` (step
    indices). right, shown_right, solved: whether that counts as right.
    """

    problems: tuple[Problem, ...]
    said: Int[np.ndarray, "sample look"]
    confidence: Float[np.ndarray, "sample look"]
    entropy: Float[np.ndarray, "sample look"]
    drawn: Int[np.ndarray, " sample"]
    shown: Int[np.ndarray, "sample step"]
    right: Bool[np.ndarray, "sample look"]
    shown_right: Bool[np.ndarray, "sample step"]
    solved: Bool[np.ndarray, " sample"]
    steps: tuple[int, ...]
    classes: int

    def wrong(self, against: str) -> Bool[np.ndarray, "sample look"]:
        """Whether an early answer at each look would be an error; against: see `Policy`."""
        return ~self.right if against == "truth" else self.said != self.drawn[:, None]

    @property
    def keys(self) -> np.ndarray:
        return np.array([p.key for p in self.problems])


@dataclass(frozen=True)
class Stopping:
    """One kind of problems: the policy that was calibrated, and fresh problems to judge it by. first_errors: share of
    errors on validation if every run stopped at the first look."""

    policy: Policy
    calibration: Records
    fresh: Records
    first_errors: float


@dataclass(frozen=True)
class Live:
    """A run that was free to stop itself. answer: None when it was finished. drawn: what the finished run ends on, -1
    for none. right: candidates that count as right. same: it stopped where the records say, with the same answer."""

    problem: Problem
    answer: Answer | None
    drawn: int
    right: tuple[int, ...]
    seconds: float
    same: bool


def stop_early(
    pipeline: PipelineConfig,
    settings: TaskConfig,
    bank: ProbeBank,
    use: EarlyConfig,
    seed: int,
    folder: Path,
    model: Any,
) -> tuple[list[Stopping], ProbeBank]:
    """A policy for every kind of problems the bank can answer, and the bank that carries them (saved in `folder`).

    pipeline, settings: of the run in `folder`, of its model and its task. model: the loaded pipeline of that run.
    Raises ValueError when the bank was made for another model, and when no probe answers anything.
    """
    check_pipeline(bank, model)
    task = settings.build()
    samples, _, _ = load_samples(ActivationStore.open(folder / "store"), task)
    validation, found = samples.subset("validation"), []
    known = [(kind, target) for kind in task.kinds if (target := probe_for(bank, kind, use.against)) is not None]
    if not known:
        raise InputError(f"run={str(folder)!r}: no probe of an answer or choice in its bank; train with more problems")
    for kind, target in known:
        here = validation.rows(np.flatnonzero(validation.kinds == kind))
        ends = use.against == "choice" or target.role == "choice"  # where several answers are right, the model's own
        labels = np.asarray(here.choice if ends else here.labels[target.name])
        cells = plan(bank, target.name, here.features, here.cells, labels)
        looked = [here.cells.index(cell) for cell in cells]
        proba = probabilities(bank, here.features[:, looked].float(), target.name, cells).numpy()
        confidence, wrong = proba.max(axis=-1).T, (proba.argmax(axis=-1) != labels).T
        start = starting_point(confidence, wrong, thresholds(proba.shape[-1]), use.risk, use.against)
        _say_how_many(kind, use, float(wrong[:, 0].mean()))
        setting = (model, pipeline, task, bank, target.name, cells)
        drawn = with_noise(task.problems("calibration", use.calibration, kind), seed)
        fresh = with_noise(fresh_problems(task, "test", settings.problems, use.problems, [kind]), seed)
        calibration = record(*setting, drawn, (), folder)
        decoded = tuple(s for s in decode_steps("auto", pipeline.steps) if s < pipeline.steps - 1)
        policy = calibrate(
            calibration.confidence, calibration.wrong(use.against), calibration.classes, use.risk, use.confidence,
            start, target=target.name, task=task.name, kind=kind, against=use.against, cells=cells,
        )  # fmt: skip
        found.append(Stopping(policy, calibration, record(*setting, fresh, decoded, folder), float(wrong[:, 0].mean())))
    bank = bank.with_provenance(policies=[stopping.policy.described() for stopping in found])
    bank.save(folder / "probes")
    return found, bank


def probe_for(bank: ProbeBank, kind: str, against: str) -> Target | None:
    """The target whose probes answer problems of a kind: of role `choice` or, against the truth, `answer`, where the
    bank has both; None where it has neither."""
    role = {"choice": "choice", "truth": "answer"}[against]
    able = [t for t in bank.targets if t.role in HEADLINE and kind in t.kinds]
    return min(able, key=lambda t: t.role != role, default=None)


def plan(
    bank: ProbeBank,
    target: str,
    features: Float[Tensor, "sample cell region channel"],
    cells: tuple[Cell, ...],
    labels: Int[np.ndarray, " sample"],
) -> tuple[Cell, ...]:
    """One cell per step: the one whose calibrated probabilities are best on validation (mean log loss), the lowest
    layer on a tie. features, cells: of validation samples; labels: -1 where there is none.

    With guidance, cells of the conditional half, which is the one that runs first. Raises ValueError for no labels.
    """
    able = [c for c in cells if c.is_layer and c.branch == "cond"]
    labelled = np.flatnonzero(labels >= 0)
    if not len(labelled):
        raise InputError(f"target {target!r}: no validation sample has a label; train with more problems")
    at = [cells.index(c) for c in able]
    proba = probabilities(bank, features[labelled][:, at].float(), target, able)
    wanted = torch.from_numpy(labels[labelled]).expand(len(able), -1)[..., None]
    loss = -proba.gather(2, wanted)[..., 0].clamp(min=1e-12).log().mean(dim=1)
    best: dict[int, tuple[float, int, Cell]] = {}
    for cell, value in zip(able, loss.tolist(), strict=True):
        best[cell.step] = min(best.get(cell.step, (float("inf"), 0, cell)), (round(value, 9), int(cell.site), cell))
    return tuple(best[step][2] for step in sorted(best))


def record(
    model: Any,
    pipeline: PipelineConfig,
    task: Task,
    bank: ProbeBank,
    target: str,
    cells: tuple[Cell, ...],
    drawn: Sequence[Sample],
    decoded: tuple[int, ...],
    folder: Path,
) -> Records:
    """Samples what is not on disk yet and reads it with the bank. decoded: steps (indices) whose x0-hat is read."""
    first = drawn[0].problem
    identity = bank.provenance["store"] | {
        "kind": first.kind,
        "split": first.split,
        "samples": [[s.problem.index, s.seed] for s in drawn],
        "cells": [str(cell) for cell in cells],
        "decoded": list(decoded),
    }
    chunks = [list(drawn[i : i + pipeline.batch]) for i in range(0, len(drawn), pipeline.batch)]
    store = ActivationStore(folder, identity, len(chunks))
    name = f"{first.kind}-{first.split}-{store.fingerprint[:8]}"  # other settings, other folder
    store = ActivationStore(folder / RECORDS / name, identity, len(chunks))
    size = 4 * len(drawn) * len(cells) * bank.regions * bank.mean.shape[1]
    what = f"{len(drawn)} {first.kind} problems of split {first.split}"
    tensors, _ = fill(store, size, what, partial(_chunk, model, pipeline, task, bank, cells, decoded), chunks).read()
    proba = probabilities(bank, tensors["features"].float(), target, cells).double()
    problems = tuple(s.problem for s in drawn)
    said, choice, shown = proba.argmax(dim=-1).T.numpy(), tensors["choice"].numpy(), tensors["shown"].numpy()
    good = np.zeros((len(drawn), max(task.candidates, proba.shape[-1]) + 1), dtype=bool)  # the last column: none
    for row, problem in zip(good, problems, strict=True):
        row[list(task.solutions(problem))] = True
    rows = np.arange(len(drawn))
    return Records(
        problems, said, proba.amax(dim=-1).T.numpy(), torch.special.entr(proba).sum(dim=-1).T.numpy(), choice, shown,
        good[rows[:, None], said], good[rows[:, None], shown], good[rows, choice], decoded, proba.shape[-1],
    )  # fmt: skip


@torch.no_grad()
def _chunk(
    model: Any,
    pipeline: PipelineConfig,
    task: Task,
    bank: ProbeBank,
    cells: tuple[Cell, ...],
    decoded: tuple[int, ...],
    chunk: list[Sample],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    problems, store = [s.problem for s in chunk], bank.provenance["store"]
    pooling = pooling_of(store["probe.pooling"], store["probe.frames"], problems)
    layers, steps = (sorted({pick(c) for c in cells}) for pick in (lambda c: int(c.site), lambda c: c.step))
    with capture(model, list(map(str, layers)), pooling, ",".join(map(str, steps)), clean=decoded) as cache:
        video = sample(model, pipeline, images(task, problems), [p.prompt for p in problems], [s.seed for s in chunk])
    features = cache.features()
    looks = [
        features[:, cache.steps.index(c.step), cache.sites.index(c.site), cache.branches.index(c.branch),
                 cache.places.index(c.place)]
        for c in cells
    ]  # fmt: skip
    ends = [task.readout(problem, clip).answer for problem, clip in zip(problems, video, strict=True)]
    shown = torch.zeros((len(chunk), len(decoded)), dtype=torch.int64)
    for i, step in enumerate(decoded):
        clips = zip(problems, decode(model, cache.clean[step]), strict=True)
        shown[:, i] = torch.tensor([task.readout(problem, clip).forced for problem, clip in clips])
    choice = torch.tensor([-1 if end is None else end for end in ends])
    return {"features": torch.stack(looks, dim=1), "choice": choice, "shown": shown}, {"cells": list(map(str, cells))}


def run_live(
    model: Any, pipeline: PipelineConfig, task: Task, bank: ProbeBank, stopping: Stopping, count: int, seed: int
) -> list[Live]:
    """The first `count` fresh problems again, one by one, in runs that really stop themselves."""
    records, policy, found = stopping.fresh, stopping.policy, []
    looks = first_look(records.confidence, policy.threshold)
    for i, problem in enumerate(records.problems[:count]):
        begin, end = time.perf_counter(), None
        with attach(bank, model, [problem], policy) as reader:
            clip = sample(model, pipeline, images(task, [problem]), [problem.prompt], [noise_seed(problem, 0, seed)])
            end = task.readout(problem, np.asarray(clip)[0]).answer
        spent, answer, look = time.perf_counter() - begin, reader.answers[0], int(looks[i])
        if answer is None:
            same = look == len(policy.cells) and (-1 if end is None else end) == records.drawn[i]
        else:
            expected = (policy.cells[look].step, records.said[i, look]) if look < len(policy.cells) else None
            same = (answer.step, answer.prediction) == expected
        found.append(Live(problem, answer, int(records.drawn[i]), task.solutions(problem), spent, bool(same)))
    return found


def _say_how_many(kind: str, use: EarlyConfig, rate: float) -> None:
    """How many calibration problems the risk takes, before any is sampled."""
    least, needed = least_problems(use.risk, use.confidence), least_problems(use.risk, use.confidence, rate)
    say(
        f"{kind}: a risk of {use.risk:g} at confidence {use.confidence:g} takes {least} calibration problems without "
        f"an error; stopping every run at its first look errs on {rate:.3f} of validation problems, which "
        f"{'no number of them would show' if needed is None else f'takes {needed}'}; sampling {use.calibration}"
    )
