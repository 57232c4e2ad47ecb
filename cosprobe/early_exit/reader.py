"""Reads answers with a bank while a pipeline samples, and stops the run when the policy allows it.

    with attach(load_probes("runs/maze-layers"), pipeline, problems, tell=print) as reader:
        video = pipeline(...)          # `tell` is called with a Reading at every exit point
    reader.answers                     # one per problem, None if the run was finished

Stopping leaves the `with` block: code after the pipeline call in the block does not run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cosprobe.activations import Pooling, halting
from cosprobe.cells import Cell
from cosprobe.early_exit.threshold import Policy, read_policy
from cosprobe.errors import InputError
from cosprobe.models import load_scheduler, pipeline_fingerprint, with_scheduler
from cosprobe.probes import ProbeBank
from cosprobe.tasks import Problem


class Reading(NamedTuple):
    """Predictions at one exit point, for every problem of the batch.

    step: step index. prediction: the class with the highest probability. confidence: its calibrated probability.
    """

    step: int
    prediction: tuple[int, ...]
    confidence: tuple[float, ...]


class Answer(NamedTuple):
    """The early answer to one problem, read after block `layer` at step index `step`."""

    prediction: int
    confidence: float
    step: int
    layer: int


@dataclass
class Reader:
    """Predictions so far in the run that the reader is attached to.

    answers: per problem, None until the threshold is reached. readings: one per exit point passed so far. stopped:
    whether the run was stopped because every problem has an answer.
    """

    bank: ProbeBank
    pipeline: Any
    policy: Policy
    tell: Callable[[Reading], None] | None
    answers: list[Answer | None]
    readings: list[Reading] = field(default_factory=list)
    stopped: bool = False

    def see(self, cell: Cell, features: Float[Tensor, "sample region channel"]) -> bool:
        """Reads the probe of `cell`. Returns whether all problems have an answer."""
        if not self.readings:
            check_call(self.bank, self.pipeline)
        proba = probabilities(self.bank, features[:, None], self.policy.target, [cell])[0]
        confidence, prediction = proba.max(dim=-1)
        reading = Reading(cell.step, tuple(prediction.tolist()), tuple(confidence.tolist()))
        self.readings.append(reading)
        for i, (probability, label) in enumerate(zip(reading.confidence, reading.prediction, strict=True)):
            if self.answers[i] is None and probability >= self.policy.threshold:
                self.answers[i] = Answer(label, probability, cell.step, cell.layer)
        if self.tell is not None:
            self.tell(reading)
        self.stopped = all(answer is not None for answer in self.answers)
        return self.stopped


@contextmanager
def attach(
    bank: ProbeBank,
    pipeline: Any,
    problems: Sequence[Problem],
    policy: Policy | None = None,
    tell: Callable[[Reading], None] | None = None,
) -> Iterator[Reader]:
    """Reads the probes of a bank during one call of `pipeline`, which is made inside the `with` block.

    problems: the problems of the images of that call, in order. policy: the stopping policy; by default the one that
    `python probe.py use=early` saved in the bank. tell: called with a `Reading` at every exit point.
    As soon as every problem has an answer, the call is stopped, and the rest of the block is skipped.
    Raises InputError that names the difference: for a pipeline with another model, scheduler, number of steps or
    guidance than the bank was made for, and for problems of another task, kind or number of regions.
    """
    check_pipeline(bank, pipeline)
    if not problems:
        raise InputError("problems: none, expected one for every image of the call")
    policy = policy or bank_policy(bank, problems[0].kind)
    check_problems(bank, policy, problems)
    pooling = Pooling.of(bank.store.probe, problems)
    reader = Reader(bank, pipeline, policy, tell, [None] * len(problems))
    with halting(pipeline, policy.cells, pooling, reader.see):
        yield reader


def probabilities(
    bank: ProbeBank, features: Float[Tensor, "sample cell region channel"], target: str, cells: Sequence[Cell]
) -> Float[Tensor, "cell sample out"]:
    """Calibrated probabilities at some cells. Raises InputError when an activation is not finite."""
    if not torch.isfinite(features).all():
        bad = (~torch.isfinite(features)).flatten(2).any(dim=2).any(dim=0)
        where = cells[int(bad.nonzero()[0])]
        raise InputError(
            f"activations at ({where}) are not finite, expected finite values; run in float32 or check the model"
        )
    return bank.probabilities(features, target, cells)


def bank_policy(bank: ProbeBank, kind: str) -> Policy:
    """The stopping policy in the bank for problems of a kind. Raises InputError when there is none."""
    found = [read_policy(entry) for entry in bank.provenance.policies]
    for policy in found:
        if policy.kind == kind:
            return policy
    known = ", ".join(sorted({p.kind for p in found})) or "none"
    raise InputError(
        f"problems of kind {kind!r}: this bank has no stopping policy for them (it has: {known}); run "
        "`python probe.py use=early run=FOLDER`, or pass policy="
    )


def check_problems(bank: ProbeBank, policy: Policy, problems: Sequence[Problem]) -> None:
    """Raises InputError for problems whose task, kind or number of regions differs from that of the bank or policy."""
    for problem in problems:
        for name in ("task", "kind"):
            known, given = getattr(policy, name), getattr(problem, name)
            if known != given:
                raise InputError(
                    f"problem {problem.name}: its {name} is {given!r}, the stopping policy was calibrated for "
                    f"{known!r}; use problems of that {name}, or run use=early for {given!r}"
                )
        regions = len(problem.regions) if bank.store.probe.pooling == "region" else bank.regions
        if regions != bank.regions:
            raise InputError(
                f"problem {problem.name}: {regions} regions, this bank was made for pooling over {bank.regions}; "
                "use the task settings of its run"
            )


def check_pipeline(bank: ProbeBank, pipeline: Any) -> None:
    """Raises InputError that names the difference when the bank was made for another model or scheduler."""
    folder = Path(str(getattr(pipeline, "name_or_path", "") or ""))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    saved = json.loads(scheduler.read_text()) if scheduler.is_file() else {}
    made_for = _described(with_scheduler(load_scheduler(saved), bank.store.pipeline)) if saved else {}
    now = _described(pipeline.scheduler)
    for name, value in made_for.items():
        if now.get(name) != value:
            raise InputError(
                f"this bank was made for a scheduler with {name}={value}, the pipeline's has {name}={now.get(name)}; "
                "use the scheduler the model was loaded with"
            )
    bank.check_model(pipeline_fingerprint(pipeline), str(folder) if saved else "the pipeline")


def _described(scheduler: Any) -> dict[str, Any]:
    """Class and configuration of a scheduler, as JSON has them."""
    about = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return json.loads(json.dumps({"_class_name": type(scheduler).__name__, **about}, default=str))


def check_call(bank: ProbeBank, pipeline: Any) -> None:
    """Raises InputError when the running call has other steps or guidance than the bank was made for."""
    made_for = bank.store.pipeline
    running = {
        "steps": (len(pipeline.scheduler.timesteps), "num_inference_steps"),
        "guidance": (float(getattr(pipeline, "guidance_scale", 1.0)), "guidance_scale"),
    }
    for name, (value, argument) in running.items():
        expected = getattr(made_for, name)
        if value != expected:
            raise InputError(
                f"this bank was made for {name}={expected:g}, this run has {name}={value:g}; "
                f"call the pipeline with {argument}={expected:g}, or retrain the probes"
            )
