"""A bank at work on a pipeline: answers that stream out of a run, which ends itself when one is sure enough.

    with attach(load_probes("runs/maze-layers"), pipeline, problems, tell=print) as reader:
        video = pipeline(...)          # each look is told as (step, prediction, confidence)
    reader.answers                     # one per problem, None where the run was finished instead

A stopped call is left, so that what follows it in the block does not run either.
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
from cosprobe.early_exit.policy import Policy, read_policy
from cosprobe.errors import InputError
from cosprobe.probes import ProbeBank
from cosprobe.tasks import Problem


class Reading(NamedTuple):
    """One look. step: a step index. prediction, confidence: of every problem of the batch, the class the probe finds
    most probable and its calibrated probability."""

    step: int
    prediction: tuple[int, ...]
    confidence: tuple[float, ...]


class Answer(NamedTuple):
    """What was said of one problem, behind block `layer` of step `step` (a step index)."""

    prediction: int
    confidence: float
    step: int
    layer: int


@dataclass
class Reader:
    """What has been read so far in the run it is attached to. answers: per problem, None while nothing is sure enough.
    stopped: the run was left because every problem has an answer."""

    bank: ProbeBank
    pipeline: Any
    policy: Policy
    tell: Callable[[Reading], None] | None
    answers: list[Answer | None]
    readings: list[Reading] = field(default_factory=list)
    stopped: bool = False

    def see(self, cell: Cell, features: Float[Tensor, "sample region channel"]) -> bool:
        """Asks the probe of `cell`; whether all problems now have an answer."""
        if not self.readings:
            check_call(self.bank, self.pipeline)
        proba = probabilities(self.bank, features[:, None], self.policy.target, [cell])[0]
        confidence, said = proba.max(dim=-1)
        reading = Reading(cell.step, tuple(said.tolist()), tuple(confidence.tolist()))
        self.readings.append(reading)
        for i, (sure, prediction) in enumerate(zip(reading.confidence, reading.prediction, strict=True)):
            if self.answers[i] is None and sure >= self.policy.threshold:
                self.answers[i] = Answer(prediction, sure, cell.step, int(cell.site))
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
    """Lets the probes of a bank answer from inside one call of `pipeline`, made in the block this opens.

    problems: of the images of that call, in order. policy: when to stop; without one, the policy that
    `python probe.py use=early` has left in the bank. tell: gets (step, prediction, confidence) at every look.
    The call is left, with what follows it in the block, as soon as every problem has an answer.
    Raises ValueError naming the difference for a pipeline with another model, scheduler, number of steps or
    guidance, and for problems of another task, kind or number of regions than the bank was made for.
    """
    check_pipeline(bank, pipeline)
    if not problems:
        raise InputError("problems: none, expected one for every image of the call")
    policy = policy or bank_policy(bank, problems[0].kind)
    check_problems(bank, policy, problems)
    store = bank.provenance["store"]
    pooling = pooling_of(store["probe.pooling"], store["probe.frames"], problems)
    reader = Reader(bank, pipeline, policy, tell, [None] * len(problems))
    with halting(pipeline, policy.cells, pooling, reader.see):
        yield reader


def probabilities(
    bank: ProbeBank, features: Float[Tensor, "sample cell region channel"], target: str, cells: Sequence[Cell]
) -> Float[Tensor, "cell sample out"]:
    """Calibrated probabilities at some cells. Raises ValueError when an activation is not finite."""
    if not torch.isfinite(features).all():
        bad = (~torch.isfinite(features)).flatten(2).any(dim=2).any(dim=0)
        where = cells[int(bad.nonzero()[0])]
        raise InputError(
            f"activations at ({where}) are not finite, expected finite ones; run in float32 or look at the model"
        )
    wider = bank.mean.shape[1] - features.shape[-1]
    return bank.probabilities(torch.nn.functional.pad(features, (0, wider)), target, cells)


def pooling_of(kind: str, frames: bool, problems: Sequence[Problem]) -> Pooling:
    return Pooling(kind, frames, [p.regions for p in problems] if kind == "region" else ())


def bank_policy(bank: ProbeBank, kind: str) -> Policy:
    """The stopping policy the bank carries for problems of a kind. Raises ValueError when there is none."""
    found = [read_policy(entry) for entry in bank.provenance.get("policies", ())]
    for policy in found:
        if policy.kind == kind:
            return policy
    known = ", ".join(sorted({p.kind for p in found})) or "none"
    raise InputError(
        f"problems of kind {kind!r}: this bank has no stopping policy for them (it has: {known}); run "
        "`python probe.py use=early run=FOLDER`, or pass policy="
    )


def check_problems(bank: ProbeBank, policy: Policy, problems: Sequence[Problem]) -> None:
    """Raises ValueError for problems of a task, kind or number of regions that bank and policy were not made for."""
    for problem in problems:
        for name in ("task", "kind"):
            known, given = getattr(policy, name), getattr(problem, name)
            if known != given:
                raise InputError(
                    f"problem {problem.name}: its {name} is {given!r}, the stopping policy was calibrated for "
                    f"{known!r}; take problems of that {name}, or run use=early for this one"
                )
        regions = len(problem.regions) if bank.provenance["store"]["probe.pooling"] == "region" else bank.regions
        if regions != bank.regions:
            raise InputError(
                f"problem {problem.name}: {regions} regions, this bank was made for pooling over {bank.regions}; "
                "use the task settings of its run"
            )


def check_pipeline(bank: ProbeBank, pipeline: Any) -> None:
    """Raises ValueError naming the difference when the bank was made for another model or scheduler."""
    folder = Path(str(getattr(pipeline, "name_or_path", "") or ""))
    if not (folder / "model_index.json").is_file():
        raise InputError("the pipeline comes from no folder, so its weights can't be compared: save and load it first")
    bank.check_model(folder)
    saved = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    now = {"_class_name": type(pipeline.scheduler).__name__, **pipeline.scheduler.config}
    for name, value in saved.items():
        if name != "_diffusers_version" and json.loads(json.dumps(now.get(name), default=str)) != value:
            raise InputError(
                f"this bank was made for a scheduler with {name}={value}, the pipeline's has {name}={now.get(name)}; "
                "use the scheduler the model was loaded with"
            )


def check_call(bank: ProbeBank, pipeline: Any) -> None:
    """Raises ValueError when the call that is running has other steps or guidance than the bank was made for."""
    store = bank.provenance["store"]
    running = {
        "steps": (len(pipeline.scheduler.timesteps), "num_inference_steps"),
        "guidance": (float(getattr(pipeline, "guidance_scale", 1.0)), "guidance_scale"),
    }
    for name, (value, argument) in running.items():
        expected = store[f"pipeline.{name}"]
        if value != expected:
            raise InputError(
                f"this bank was made for {name}={expected:g}, this run has {name}={value:g}; "
                f"call the pipeline with {argument}={expected:g}, or retrain the probes"
            )
