"""Calibrates the stopping policy on problems that no probe was fitted to, and samples fresh problems to test it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from cosprobe.activations import ProbeSamples, Sampler, StoredSamples, StoredTensor, load_samples
from cosprobe.cells import Cell
from cosprobe.config import EarlyConfig, decode_steps
from cosprobe.early_exit.reader import Answer, attach, check_pipeline, probabilities
from cosprobe.early_exit.threshold import Policy, calibrate, first_exit, least_problems, starting_point, thresholds
from cosprobe.early_exit.trajectories import ExitPoints, Trajectories, sample_trajectories
from cosprobe.errors import InputError
from cosprobe.probes import ProbeBank
from cosprobe.runtime import rank_and_world, say
from cosprobe.tasks import ANSWER_ROLES, Problem, Role, Target, TaskConfig, fresh_problems, with_noise


@dataclass(frozen=True)
class Calibrated:
    """The policy for one kind of problems.

    calibration: trajectories that it was calibrated on. fresh: trajectories of fresh problems that test it.
    first_errors: share of errors on validation if every run stopped at the first exit point.
    """

    policy: Policy
    calibration: Trajectories
    fresh: Trajectories
    first_errors: float


@dataclass(frozen=True)
class LiveRun:
    """A run that the policy stops.

    answer: the early answer, None if the run was finished. model_answer: what the finished video shows, -1 for no
    answer. solutions: candidates that count as right. seconds: wall time. same: whether it stopped at the exit point
    computed from the trajectories, with the same answer.
    """

    problem: Problem
    answer: Answer | None
    model_answer: int
    solutions: tuple[int, ...]
    seconds: float
    same: bool


@dataclass(frozen=True, eq=False)
class _Planned:
    """Exit points, and their results on validation. errors: where an early answer would be an error."""

    exits: ExitPoints
    confidence: Float[np.ndarray, "sample exit_point"]
    errors: Bool[np.ndarray, "sample exit_point"]
    classes: int


def calibrate_policies(
    sampler: Sampler, task: TaskConfig, bank: ProbeBank, use: EarlyConfig, seed: int, folder: Path
) -> tuple[list[Calibrated], ProbeBank]:
    """Calibrates a policy for every kind of problems that the bank has answer probes for.

    sampler: the loaded pipeline and the task of the run in `folder`. task: settings of that task.
    Returns the calibrated policies, and the bank with these policies, which is also saved in `folder`.
    Raises InputError when the bank was made for another model, or has no probes of an answer or model_answer.
    """
    check_pipeline(bank, sampler.model)
    samples, _, _ = load_samples(StoredSamples.load(folder), bank.folds)
    validation, total = samples.subset("validation"), sampler.config.steps
    decoded = tuple(step for step in decode_steps("auto", total) if step < total - 1)
    found = []
    for kind in sampler.task.kinds:
        target = probe_for(bank, kind, use.error_reference)
        if target is None:
            continue
        planned = _plan(bank, target, validation.rows(np.flatnonzero(validation.kinds == kind)), use.error_reference)
        first_errors = float(planned.errors[:, 0].mean())
        _announce(kind, use, first_errors)

        held_out = with_noise(sampler.task.problems("calibration", use.calibration, kind), seed)
        calibration = sample_trajectories(sampler, planned.exits, held_out, (), folder)
        tried = thresholds(planned.classes)
        start = starting_point(planned.confidence, planned.errors, tried, use.risk, use.error_reference)
        policy = calibrate(
            calibration.confidence, calibration.errors(use.error_reference), calibration.classes,
            use.risk, use.confidence, start, target=target.name, task=sampler.task.name, kind=kind,
            error_reference=use.error_reference, cells=planned.exits.cells,
        )  # fmt: skip

        fresh = with_noise(fresh_problems(sampler.task, "test", task.problems, use.problems, [kind]), seed)
        tested = sample_trajectories(sampler, planned.exits, fresh, decoded, folder)
        found.append(Calibrated(policy, calibration, tested, first_errors))
    if not found:
        raise InputError(
            f"run={str(folder)!r}: no probe of an answer or model_answer in its bank; train with more problems"
        )
    bank = bank.with_provenance(policies=tuple(one.policy.described() for one in found))
    if rank_and_world()[0] == 0:
        bank.save(folder / "probes")
    return found, bank


def probe_for(bank: ProbeBank, kind: str, error_reference: str) -> Target | None:
    """The target whose probes answer problems of a kind; None if the bank has no such target.

    If the bank has targets of both roles, the role is `model_answer` for the reference `model_answer`, and `answer` for
    `truth`.
    """
    role = {"model_answer": Role.MODEL_ANSWER, "truth": Role.ANSWER}[error_reference]
    able = [t for t in bank.targets if t.role in ANSWER_ROLES and kind in t.kinds]
    return min(able, key=lambda t: t.role != role, default=None)


def _plan(bank: ProbeBank, target: Target, validation: ProbeSamples, error_reference: str) -> _Planned:
    """Exit points for problems of one kind, from the validation samples of that kind."""
    # probes of a target of role model_answer are chosen by the model's answers, for either reference
    ends = error_reference == "model_answer" or target.role is Role.MODEL_ANSWER
    labels = np.asarray(validation.model_answer if ends else validation.labels[target.name])
    cells = plan(bank, target.name, validation.features, validation.cells, labels)
    exits = ExitPoints(bank, target.name, cells)
    proba = exits.probabilities(validation.features[:, [validation.cells.index(cell) for cell in cells]]).numpy()
    return _Planned(exits, proba.max(axis=-1).T, (proba.argmax(axis=-1) != labels).T, proba.shape[-1])


def plan(
    bank: ProbeBank,
    target: str,
    features: Float[torch.Tensor | StoredTensor, "sample cell region channel"],
    cells: tuple[Cell, ...],
    labels: Int[np.ndarray, " sample"],
) -> tuple[Cell, ...]:
    """Chooses one cell per step: the one with the lowest mean log loss on validation, on a tie the lowest layer.

    features, cells: of validation samples. labels: of validation samples, -1 for no label. With guidance, only cells of
    the conditional branch are considered, because it runs first. Raises InputError for no labels.
    """
    able = [c for c in cells if c.branch == "cond"]
    labelled = np.flatnonzero(labels >= 0)
    if not len(labelled):
        raise InputError(f"target {target!r}: no validation sample has a label; train with more problems")
    losses: dict[Cell, float] = {}
    for step in dict.fromkeys(cell.step for cell in able):
        here = [cell for cell in able if cell.step == step]
        values = features[labelled[:, None], [cells.index(cell) for cell in here]].float()
        proba = probabilities(bank, values, target, here)
        wanted = torch.from_numpy(labels[labelled]).expand(len(here), -1)[..., None]
        loss = -proba.gather(2, wanted)[..., 0].clamp(min=1e-12).log().mean(dim=1)
        losses |= dict(zip(here, loss.tolist(), strict=True))
    order = sorted(losses.items(), key=lambda one: (round(one[1], 9), one[0].layer, one[0]))
    best = {cell.step: cell for cell, _ in reversed(order)}  # the first in `order` is written last
    return tuple(best[step] for step in sorted(best))


def run_live(sampler: Sampler, bank: ProbeBank, calibrated: Calibrated, count: int, seed: int) -> list[LiveRun]:
    """Samples the first `count` fresh problems again, one by one, in runs that the policy stops."""
    fresh, policy, found = calibrated.fresh, calibrated.policy, []
    exit_points = first_exit(fresh.confidence, policy.threshold)
    for i, problem in enumerate(fresh.problems[:count]):
        end = -1
        with attach(bank, sampler.model, [problem], policy) as reader:
            begin = time.perf_counter()  # after the check that the model is that of the bank
            video = sampler(with_noise([problem], seed))
            end = int(sampler.parse([problem], video).answers[0])
        spent, answer, at = time.perf_counter() - begin, reader.answers[0], int(exit_points[i])
        if answer is None:
            same = at == len(policy.cells) and end == fresh.model_answer[i]
        else:
            expected = (policy.cells[at].step, fresh.predictions[i, at]) if at < len(policy.cells) else None
            same = (answer.step, answer.prediction) == expected
        solutions = sampler.task.solutions(problem)
        found.append(LiveRun(problem, answer, int(fresh.model_answer[i]), solutions, spent, bool(same)))
    return found


def _announce(kind: str, use: EarlyConfig, rate: float) -> None:
    """Prints how many calibration problems the risk needs, before any are sampled."""
    least, needed = least_problems(use.risk, use.confidence), least_problems(use.risk, use.confidence, rate)
    takes = "no number of problems is enough for that" if needed is None else f"that needs {needed} problems"
    say(
        f"{kind}: a risk of {use.risk:g} at confidence {use.confidence:g} needs at least {least} calibration problems "
        f"(without a single error). If every run stops at its first exit point, {rate:.3f} of the validation problems "
        f"are errors: {takes}. Sampling {use.calibration} calibration problems."
    )
