"""Latencies and lags: `latency` and `lag` on noisy curves whose half-maximum is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from cosprobe.evaluation.latency import lag, latency
from validity.rows import Row, coverage

STEPS = np.arange(20.0)
CHANCE, DRAWS = 0.25, 300
ONSET, LATER = 5.3, 9.3  # of the probes, and of the picture
CEILINGS = (0.5, 0.7, 0.9)
SHARED = 0.5  # of what decides right or wrong: the problem's, the same at all steps and for all lines


def curve(onset: float, ceiling: float) -> Float[np.ndarray, " step"]:
    """A rise from a guess to the ceiling, a step wide."""
    return CHANCE + (ceiling - CHANCE) / (1 + np.exp(onset - STEPS))


def simulate(runs: int, seed: int, problems: Sequence[int] = (60, 90, 300)) -> list[Row]:
    """Coverage of the latency at each ceiling, and of the lag behind a picture that reaches 0.9."""
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
            given = np.isfinite(width)  # a latency without an interval states nothing
            found.append(coverage(subject, f"{count} problems, {name}", hits[given] > 0, width[given]))
    return found


def _right(
    curves: Float[np.ndarray, "line step"], problems: int, rng: np.random.Generator
) -> Float[np.ndarray, "line step sample"]:
    """Right or wrong at every step: a problem's number, or with probability 1 - SHARED one of this line and step."""
    own = rng.random((*curves.shape, problems))
    mine: Bool[np.ndarray, "line step sample"] = rng.random(own.shape) < SHARED
    return (np.where(mine, rng.random(problems), own) < curves[..., None]).astype(float)
