"""What answering early saves and what it costs in accuracy: the policy beside simpler ways of stopping.

Compute is a share of a finished, decoded run (1 = that run). Every way reads the same records.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from cosprobe.activations import Cost
from cosprobe.cells import Cell
from cosprobe.early_exit.calibrate import Records, Stopping
from cosprobe.early_exit.policy import Policy, first_look, thresholds
from cosprobe.evaluation import difference_interval, share_interval


@dataclass(frozen=True)
class Way:
    """One way of stopping, at several settings, as means over problems. compute: share of a finished run.
    evaluations: number of network evaluations, a halted one by the part of its layers that ran. seconds: wall time.
    agreement: share of runs whose answer is what the finished run ends on; a run that is finished agrees with itself.
    accuracy: share of right answers."""

    name: str
    settings: tuple[str, ...]
    compute: Float[np.ndarray, " setting"]
    evaluations: Float[np.ndarray, " setting"]
    seconds: Float[np.ndarray, " setting"]
    agreement: Float[np.ndarray, " setting"]
    accuracy: Float[np.ndarray, " setting"]


@dataclass(frozen=True)
class Realised:
    """The calibrated policy on fresh problems. risk: errors among all problems (`choice`) or among `answered`
    (`truth`), with its 95 % interval. seconds: mean wall time per problem, run one by one, and that of a finished
    run. gain: accuracy of the early answers minus that of the finished videos, by problem, with a paired 95 %
    interval. first_gain: the same if every run stopped at the first look."""

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
    first_gain: tuple[float, float, float]


def ways(stopping: Stopping, cost: Cost, clock: Cost, total: int) -> list[Way]:
    """Fixed step, forced choice of x0-hat, entropy rule and the policy's own threshold, over their settings, on fresh
    problems. cost: operations, clock: seconds; total: steps of a finished run."""
    records, cells = stopping.fresh, stopping.policy.cells
    entropies = np.unique(np.quantile(records.entropy, np.linspace(0, 1, 60)))
    tried = thresholds(records.classes)[::4]
    every = [np.full(len(records.said), k) for k in range(len(cells))]
    by_entropy = [first_look(-records.entropy, -value) for value in entropies]
    by_confidence = [first_look(records.confidence, value) for value in tried]
    whole = cost.run(total)
    shown = np.array([cost.run(step + 1) / whole for step in records.steps])
    return [
        _way(
            "fixed step", [f"step {c.step}, layer {c.site}" for c in cells], every, records, cells, cost, clock, total
        ),
        Way(
            "readout of x0-hat",
            tuple(f"step {step}" for step in records.steps),
            shown,
            np.array([step + 1.0 for step in records.steps]),
            np.array([clock.run(step + 1) for step in records.steps]),
            (records.shown == records.drawn[:, None]).mean(axis=0),
            records.shown_right.mean(axis=0),
        ),
        _way(
            "entropy rule", [f"{value:.3f} nats" for value in entropies], by_entropy, records, cells, cost, clock, total
        ),
        _way("policy", [f"{value:.4f}" for value in tried], by_confidence, records, cells, cost, clock, total),
    ]


def realised(stopping: Stopping, cost: Cost, clock: Cost, total: int) -> Realised:
    """How the policy did on fresh problems. cost: operations, clock: seconds; total: steps of a finished run."""
    records, policy = stopping.fresh, stopping.policy
    look = policy_looks(records, policy)
    early = look < len(policy.cells)
    rows = np.flatnonzero(early)
    wrong = np.zeros(len(early))
    wrong[rows] = records.wrong(policy.against)[rows, look[rows]]
    among = early if policy.against == "truth" else np.ones_like(early)
    _, right = outcome(records, look)
    return Realised(
        samples=len(early),
        answered=len(rows),
        errors=int(wrong.sum()),
        risk=float(wrong[among].mean()) if among.any() else 0.0,
        interval=_share(wrong[among], records.keys[among]),
        compute=float(spent(look, policy.cells, cost.until, cost.run(total)).mean() / cost.run(total)),
        evaluations=float(_evaluations(look, policy.cells, cost, total).mean()),
        seconds=float(spent(look, policy.cells, clock.until, clock.run(total)).mean()),
        finished_seconds=clock.run(total),
        accuracy=float(right.mean()),
        finished_accuracy=float(records.solved.mean()),
        gain=_paired(right, records),
        first_gain=_paired(records.right[:, 0], records),
    )


def policy_looks(records: Records, policy: Policy) -> Int[np.ndarray, " sample"]:
    """The look each run stops at; the number of looks for a run that is finished."""
    return first_look(records.confidence, policy.threshold)


def outcome(
    records: Records, look: Int[np.ndarray, " sample"]
) -> tuple[Bool[np.ndarray, " sample"], Bool[np.ndarray, " sample"]]:
    """Whether each run's answer agrees with its end, and whether it is right."""
    rows, ends = np.arange(len(look)), np.ones((len(look), 1), dtype=bool)
    agrees = np.concatenate([records.said == records.drawn[:, None], ends], axis=1)
    right = np.concatenate([records.right, records.solved[:, None]], axis=1)
    return agrees[rows, look], right[rows, look]


def spent(
    look: Int[np.ndarray, " sample"], cells: tuple[Cell, ...], until: Callable[[int, int], float], finished: float
) -> Float[np.ndarray, " sample"]:
    """Cost of every run. until: of one that halts at (step, layer); finished: of one that is not stopped."""
    return np.array([*(until(c.step, int(c.site)) for c in cells), finished], dtype=np.float64)[look]


def _evaluations(
    look: Int[np.ndarray, " sample"], cells: tuple[Cell, ...], cost: Cost, total: int
) -> Float[np.ndarray, " sample"]:
    return spent(look, cells, lambda step, layer: step + cost.layers[layer] / cost.evaluation, float(total))


def _way(
    name: str,
    settings: list[str],
    looks: list[Int[np.ndarray, " sample"]],
    records: Records,
    cells: tuple[Cell, ...],
    cost: Cost,
    clock: Cost,
    total: int,
) -> Way:
    whole = cost.run(total)
    ends = [outcome(records, look) for look in looks]
    return Way(
        name,
        tuple(settings),
        np.array([spent(look, cells, cost.until, whole).mean() / whole for look in looks]),
        np.array([_evaluations(look, cells, cost, total).mean() for look in looks]),
        np.array([spent(look, cells, clock.until, clock.run(total)).mean() for look in looks]),
        np.array([agreed.mean() for agreed, _ in ends]),
        np.array([right.mean() for _, right in ends]),
    )


def _share(wrong: Float[np.ndarray, " sample"], keys: Shaped[np.ndarray, " sample"]) -> tuple[float, float]:
    """Interval of a share of errors; all there is between 0 and 1 where nothing was answered."""
    if not len(wrong):
        return 0.0, 1.0
    lower, upper = share_interval(wrong[None], keys)
    return float(lower[0]), float(upper[0])


def _paired(right: Bool[np.ndarray, " sample"], records: Records) -> tuple[float, float, float]:
    """Mean difference to the finished video, and its interval by problem."""
    difference = right.astype(float) - records.solved
    lower, upper = difference_interval(difference[None], records.keys)
    return float(difference.mean()), float(lower[0]), float(upper[0])
