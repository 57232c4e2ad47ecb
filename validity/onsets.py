"""Coverage of `latency` and `lag` on noisy curves with known half-maximum."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from cosprobe.evaluation.latency import lag, latency
from validity.rows import Row, coverage

STEPS = np.arange(20.0)
CHANCE, DRAWS = 0.25, 300
ONSET, LATER = 5.3, 9.3  # midpoint of the curves of probes, and of x0-hat
CEILINGS = (0.5, 0.7, 0.9)
SHARED = 0.5  # probability that a sample uses the random number of its problem, shared by all steps and lines


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


def _right(
    curves: Float[np.ndarray, "line step"], problems: int, rng: np.random.Generator
) -> Float[np.ndarray, "line step sample"]:
    """Right (1) or wrong (0) at every step. With probability SHARED, the random number of the problem decides."""
    separate = rng.random((*curves.shape, problems))
    shared: Bool[np.ndarray, "line step sample"] = rng.random(separate.shape) < SHARED
    return (np.where(shared, rng.random(problems), separate) < curves[..., None]).astype(float)
