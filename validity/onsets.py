"""Coverage of `latency`, `lag` and `lag_difference` on noisy curves with known half-maximum."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from cosprobe.evaluation.latency import lag, lag_difference, latency
from validity.rows import Row, alarms, coverage

STEPS = np.arange(20.0)
CHANCE, DRAWS = 0.25, 300
ONSET, LATER = 5.3, 9.3  # midpoint of the curves of probes, and of x0-hat
CEILINGS = (0.5, 0.7, 0.9)
SHARED = 0.5  # probability that a sample uses the random number of its problem, shared by all steps and lines


# onsets and ceilings of an answer and of what is visible, with trained weights and then with permuted ones
DIFFERENCES = {
    "trained lag 4, permuted 4": ((9.3, 0.9), (5.3, 0.9), (9.3, 0.9), (5.3, 0.9)),
    "trained lag 4, permuted 2, low": ((9.3, 0.9), (5.3, 0.9), (7.3, 0.6), (5.3, 0.7)),
}


def curve(onset: float, ceiling: float) -> Float[np.ndarray, " step"]:
    """A logistic curve from CHANCE to `ceiling`, with a scale of one step."""
    return CHANCE + (ceiling - CHANCE) / (1 + np.exp(onset - STEPS))


def simulate(runs: int, seed: int, problems: Sequence[int] = (60, 90, 300)) -> list[Row]:
    """Coverage of the latency at each ceiling, and of the lag of x0-hat, whose ceiling is 0.9."""
    curves = np.stack([*(curve(ONSET, ceiling) for ceiling in CEILINGS), curve(LATER, 0.9)])
    lines, shown = len(CEILINGS), len(CEILINGS)
    found = []
    for count in problems:
        rng = np.random.default_rng([seed, count])
        keys, known = np.arange(count), np.full(lines + 1, True)
        exact = latency(np.repeat(curves[:, :, None], 2, axis=2), np.full(lines + 1, CHANCE), list(STEPS),
                        np.arange(2), known, draws=2).value  # fmt: skip
        held, widths = np.empty((2, 2 * lines, runs))
        for run in range(runs):
            read = latency(_right(curves, count, rng), np.full(lines + 1, CHANCE), list(STEPS), keys, known, DRAWS, run)
            late = lag(read, [shown] * lines, list(range(lines)))
            truth = np.concatenate([exact[:lines], exact[shown] - exact[:lines]])
            lower, upper = (
                np.concatenate([read.lower[:lines], late.lower]),
                np.concatenate([read.upper[:lines], late.upper]),
            )
            held[:, run], widths[:, run] = (lower <= truth) & (truth <= upper), upper - lower
        names = [("latencies", f"ceiling {c:g}") for c in CEILINGS]
        names += [("lags", f"ceiling {c:g}, of the picture 0.9") for c in CEILINGS]
        for (subject, name), hits, width in zip(names, held, widths, strict=True):
            given = np.isfinite(width)  # latencies without an interval do not count
            found.append(coverage(subject, f"{count} problems, {name}", hits[given] > 0, width[given]))
    return found


def simulate_differences(runs: int, seed: int, problems: Sequence[int] = (24, 38, 90)) -> list[Row]:
    """Coverage of the difference of two lags. Without a difference, how often its lower end is above zero."""
    found = []
    for count in problems:
        rng = np.random.default_rng([seed, count])
        for name, pairs in DIFFERENCES.items():
            curves = np.stack([curve(*pair) for pair in pairs])
            chance, known = np.full(4, CHANCE), np.full(4, True)
            exact = latency(np.repeat(curves[:, :, None], 2, axis=2), chance, list(STEPS), np.arange(2), known, draws=2)
            truth = lag_difference(exact, (0, 1), (2, 3))[0]
            ends = np.empty((runs, 2))
            for run in range(runs):
                read = latency(_right(curves, count, rng), chance, list(STEPS), np.arange(count), known, DRAWS, run)
                ends[run] = lag_difference(read, (0, 1), (2, 3))[1:]
            lower, upper = ends[np.isfinite(ends).all(axis=1)].T
            setting = f"{count} problems, {name}"
            found.append(coverage("differences of lags", setting, (lower <= truth) & (truth <= upper), upper - lower))
            if abs(truth) < 1e-9:
                found.append(alarms("lags that exceed those of permuted weights", setting, lower > 0))
    return found


def _right(
    curves: Float[np.ndarray, "line step"], problems: int, rng: np.random.Generator
) -> Float[np.ndarray, "line step sample"]:
    """Right (1) or wrong (0) at every step. With probability SHARED, the random number of the problem decides."""
    separate = rng.random((*curves.shape, problems))
    shared: Bool[np.ndarray, "line step sample"] = rng.random(separate.shape) < SHARED
    return (np.where(shared, rng.random(problems), separate) < curves[..., None]).astype(float)
