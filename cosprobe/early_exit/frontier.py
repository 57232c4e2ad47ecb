"""Compute and accuracy of early answers: the calibrated policy compared with simpler stopping rules.

All rules are applied to the same trajectories.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from cosprobe.activations import Cost
from cosprobe.cells import Cell
from cosprobe.early_exit.calibrate import Calibrated
from cosprobe.early_exit.threshold import Policy, first_exit, thresholds
from cosprobe.early_exit.trajectories import Trajectories
from cosprobe.evaluation import difference_interval, share_interval


@dataclass(frozen=True)
class RunCosts:
    """Cost of every run.

    compute: operations as a share of those of a finished and decoded run. evaluations: network evaluations; one that is
    halted counts as the part of its layers that ran. seconds: wall time.
    """

    compute: Float[np.ndarray, " sample"]
    evaluations: Float[np.ndarray, " sample"]
    seconds: Float[np.ndarray, " sample"]


@dataclass(frozen=True)
class Prices:
    """Cost of the parts of a run, in counted operations and in seconds. steps: sampler steps of a finished run."""

    flops: Cost
    seconds: Cost
    steps: int

    def of_runs(self, exit_point: Int[np.ndarray, " sample"], cells: tuple[Cell, ...]) -> RunCosts:
        """Cost of runs that end at these exit points (indices into `cells`; len(cells) for a finished run)."""

        def each(until: Callable[[int, int], float], finished: float) -> Float[np.ndarray, " sample"]:
            return np.array([*(until(c.step, c.layer) for c in cells), finished], dtype=np.float64)[exit_point]

        def evaluations(step: int, layer: int) -> float:
            return step + self.flops.layers[layer] / self.flops.evaluation

        whole = self.flops.run(self.steps)
        return RunCosts(
            each(self.flops.until, whole) / whole,
            each(evaluations, float(self.steps)),
            each(self.seconds.until, self.seconds.run(self.steps)),
        )


@dataclass(frozen=True)
class StoppingRule:
    """Results of one stopping rule at several thresholds, as means over problems.

    compute, evaluations, seconds: see `RunCosts`. agreement: share of runs whose answer equals that of the finished
    video; runs that are finished count as equal. accuracy: share of right answers.
    """

    name: str
    thresholds: tuple[str, ...]
    compute: Float[np.ndarray, " threshold"]
    evaluations: Float[np.ndarray, " threshold"]
    seconds: Float[np.ndarray, " threshold"]
    agreement: Float[np.ndarray, " threshold"]
    accuracy: Float[np.ndarray, " threshold"]


@dataclass(frozen=True)
class PolicyResult:
    """Results of the calibrated policy on fresh problems.

    samples, answered, errors: number of problems, of early answers, and of errors among these.
    risk, interval: share of errors among all problems (`model_answer`) or among early answers (`truth`), with its 95 %
    interval.
    compute, evaluations, seconds: means over problems, see `RunCosts`; problems run one by one. finished_seconds: wall
    time of a finished run.
    accuracy, finished_accuracy: of the policy's answers (those of finished runs included) and of the finished videos.
    gain: accuracy - finished_accuracy, with a paired 95 % interval by problem.
    first_exit_gain: the same if every run stopped at the first exit point.
    """

    samples: int
    answered: int
    errors: int
    risk: float
    interval: tuple[float, float]
    compute: float
    evaluations: float
    seconds: float
    finished_seconds: float
    accuracy: float
    finished_accuracy: float
    gain: tuple[float, float, float]
    first_exit_gain: tuple[float, float, float]


def stopping_rules(calibrated: Calibrated, prices: Prices) -> list[StoppingRule]:
    """Results of four stopping rules on fresh problems: fixed step, parsed x0-hat, entropy rule, and policy.

    Each rule is applied at many thresholds.
    """
    fresh, cells = calibrated.fresh, calibrated.policy.cells
    entropies = np.unique(np.quantile(fresh.entropy, np.linspace(0, 1, 60)))
    tried = thresholds(fresh.classes)[::4]
    of_rule = partial(_rule, fresh, cells, prices)
    every = [(f"step {c.step}, layer {c.layer}", np.full(len(fresh.problems), k)) for k, c in enumerate(cells)]
    by_entropy = [(f"{value:.3f} nats", first_exit(-fresh.entropy, -value)) for value in entropies]
    by_confidence = [(f"{value:.4f}", first_exit(fresh.confidence, value)) for value in tried]
    of_x0 = StoppingRule(
        "parsed x0-hat",
        tuple(f"step {step}" for step in fresh.decoded),
        compute=np.array([prices.flops.run(step + 1) for step in fresh.decoded]) / prices.flops.run(prices.steps),
        evaluations=np.array([step + 1.0 for step in fresh.decoded]),
        seconds=np.array([prices.seconds.run(step + 1) for step in fresh.decoded]),
        agreement=(fresh.x0_predictions == fresh.model_answer[:, None]).mean(axis=0),
        accuracy=fresh.x0_correct.mean(axis=0),
    )
    return [of_rule("fixed step", every), of_x0, of_rule("entropy rule", by_entropy), of_rule("policy", by_confidence)]


def evaluate_policy(calibrated: Calibrated, prices: Prices) -> PolicyResult:
    """Measures the policy on fresh problems."""
    fresh, policy = calibrated.fresh, calibrated.policy
    exit_point = policy_exits(fresh, policy)
    early = exit_point < len(policy.cells)
    rows = np.flatnonzero(early)
    wrong = np.zeros(len(early))
    wrong[rows] = fresh.errors(policy.error_reference)[rows, exit_point[rows]]
    among = early if policy.error_reference == "truth" else np.ones_like(early)
    right, costs = outcome(fresh, exit_point).correct, prices.of_runs(exit_point, policy.cells)
    return PolicyResult(
        samples=len(early),
        answered=len(rows),
        errors=int(wrong.sum()),
        risk=float(wrong[among].mean()) if among.any() else 0.0,
        interval=_share(wrong[among], fresh.keys[among]),
        compute=float(costs.compute.mean()),
        evaluations=float(costs.evaluations.mean()),
        seconds=float(costs.seconds.mean()),
        finished_seconds=prices.seconds.run(prices.steps),
        accuracy=float(right.mean()),
        finished_accuracy=float(fresh.model_correct.mean()),
        gain=_paired(right, fresh),
        first_exit_gain=_paired(fresh.correct[:, 0], fresh),
    )


def policy_exits(trajectories: Trajectories, policy: Policy) -> Int[np.ndarray, " sample"]:
    """Index of the exit point at which each run stops; the number of exit points for a run that is finished."""
    return first_exit(trajectories.confidence, policy.threshold)


@dataclass(frozen=True)
class Outcome:
    """Of each run: whether its answer equals that of the finished video (`agrees`), and whether it is right
    (`correct`)."""

    agrees: Bool[np.ndarray, " sample"]
    correct: Bool[np.ndarray, " sample"]


def outcome(trajectories: Trajectories, exit_point: Int[np.ndarray, " sample"]) -> Outcome:
    """Outcome of runs that end at these exit points. Runs that are finished agree by definition."""
    rows, ends = np.arange(len(exit_point)), np.ones((len(exit_point), 1), dtype=bool)
    agrees = np.concatenate([trajectories.predictions == trajectories.model_answer[:, None], ends], axis=1)
    correct = np.concatenate([trajectories.correct, trajectories.model_correct[:, None]], axis=1)
    return Outcome(agrees[rows, exit_point], correct[rows, exit_point])


def _rule(
    fresh: Trajectories, cells: tuple[Cell, ...], prices: Prices, name: str, exits: Sequence[tuple[str, np.ndarray]]
) -> StoppingRule:
    """Results of a rule at each of its thresholds. exits: name of the threshold, and exit point of every run."""
    costs = [prices.of_runs(at, cells) for _, at in exits]
    ends = [outcome(fresh, at) for _, at in exits]
    return StoppingRule(
        name,
        tuple(threshold for threshold, _ in exits),
        compute=np.array([cost.compute.mean() for cost in costs]),
        evaluations=np.array([cost.evaluations.mean() for cost in costs]),
        seconds=np.array([cost.seconds.mean() for cost in costs]),
        agreement=np.array([end.agrees.mean() for end in ends]),
        accuracy=np.array([end.correct.mean() for end in ends]),
    )


def _share(wrong: Float[np.ndarray, " sample"], keys: Shaped[np.ndarray, " sample"]) -> tuple[float, float]:
    """95 % interval of a share of errors; 0 to 1 if there are no answers."""
    if not len(wrong):
        return 0.0, 1.0
    lower, upper = share_interval(wrong[None], keys)
    return float(lower[0]), float(upper[0])


def _paired(right: Bool[np.ndarray, " sample"], trajectories: Trajectories) -> tuple[float, float, float]:
    """Mean accuracy minus that of the finished videos, and its 95 % interval by problem."""
    difference = right.astype(float) - trajectories.model_correct
    lower, upper = difference_interval(difference[None], trajectories.keys)
    return float(difference.mean()), float(lower[0]), float(upper[0])
