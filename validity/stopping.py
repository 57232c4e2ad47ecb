"""Early answers: how often a calibrated policy exceeds its risk, and coverage of its intervals on fresh problems."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from cosprobe.config import ERROR_REFERENCES
from cosprobe.early_exit.threshold import first_exit, fixed_sequence, outcomes, p_values, starting_point, thresholds
from cosprobe.evaluation import difference_interval, share_interval
from validity.rows import Row, alarms, coverage

RISK, CONFIDENCE, CALIBRATION, FRESH, MANY = 0.1, 0.95, 150, 60, 60_000
HONESTY = (0.5, 1.0, 2.0)  # exponent of confidence: underconfident, calibrated, overconfident probes
TRIED = thresholds(4)[3::4]  # includes the last threshold, at which every run stops
AT_ONCE = 500  # runs processed at a time; bounds memory


STREAM = {"model_answer": 6, "truth": 5}  # seeds of independent random streams


class Runs:
    """Synthetic runs with three exit points. Confidence increases from one exit point to the next.

    The early answer equals that of the finished video with probability confidence ** honesty. The finished video is
    right with probability 0.97. An early answer that differs from it is right with probability 0.5 if the video is
    wrong.
    """

    def __init__(self, rng: np.random.Generator, shape: tuple[int, ...], honesty: float) -> None:
        self.confidence: Float[np.ndarray, "*shape exit_point"] = np.sort(
            1 - 0.75 * rng.random((*shape, 3)) ** 3, axis=-1
        )
        agrees = rng.random((*shape, 3)) < self.confidence**honesty
        self.solved: Bool[np.ndarray, "*shape"] = rng.random(shape) < 0.97
        solved = self.solved[..., None]
        self.right = np.where(agrees, solved, ~solved & (rng.random((*shape, 3)) < 0.5))
        self.wrong = {"model_answer": ~agrees, "truth": ~self.right}

    def stopped(self, threshold: float) -> tuple[Int[np.ndarray, "*shape"], Bool[np.ndarray, "*shape"]]:
        """The exit point at which each run stops, and whether its answer is right."""
        exit_point = first_exit(self.confidence, threshold)
        ends = np.concatenate([self.right, self.solved[..., None]], axis=-1)
        return exit_point, np.take_along_axis(ends, exit_point[..., None], axis=-1)[..., 0]


def simulate(runs: int, seed: int) -> list[Row]:
    """How often the true risk exceeds the allowed risk, and coverage of risk and gain on fresh problems."""
    found = []
    for number, honesty in enumerate(HONESTY):
        crowd = Runs(np.random.default_rng([seed, number]), (MANY,), honesty)
        gains = np.array([crowd.stopped(t)[1].mean() for t in TRIED]) - crowd.solved.mean()
        for reference in ERROR_REFERENCES:
            answered, errors = outcomes(crowd.confidence, crowd.wrong[reference], TRIED)
            truth = errors / (np.maximum(answered, 1) if reference == "truth" else MANY)
            rng = np.random.default_rng([seed, number, STREAM[reference]])
            found += _rows(runs, rng, honesty, reference, truth, gains)
    return found


def _rows(
    runs: int,
    rng: np.random.Generator,
    honesty: float,
    reference: str,
    truth: Float[np.ndarray, " threshold"],
    gains: Float[np.ndarray, " threshold"],
) -> list[Row]:
    validation = Runs(rng, (100,), honesty)
    start = starting_point(validation.confidence, validation.wrong[reference], TRIED, RISK, reference)
    exceeded, risk_held, gain_held, widths = [], [], [], []
    for begin in range(0, runs, AT_ONCE):
        many = Runs(rng, (min(AT_ONCE, runs - begin), CALIBRATION), honesty)
        p = p_values(*outcomes(many.confidence, many.wrong[reference], TRIED), CALIBRATION, RISK, reference)
        for last in fixed_sequence(p, 1 - CONFIDENCE, start):
            stops = last >= start
            # true risks are those of 60,000 runs, so they may exceed RISK by two standard errors
            exceeded.append(stops and truth[last] > RISK + 2 * np.sqrt(RISK / MANY))
            if not stops:
                continue
            fresh = Runs(rng, (FRESH,), honesty)
            exit_point, right = fresh.stopped(TRIED[last])
            early = exit_point < 3
            wrong = early & np.take_along_axis(fresh.wrong[reference], np.minimum(exit_point, 2)[:, None], axis=1)[:, 0]
            among = early if reference == "truth" else np.ones(FRESH, dtype=bool)
            if not among.any():
                continue
            keys = np.arange(FRESH)
            low, high = share_interval(wrong[None, among].astype(float), keys[among])
            less, more = difference_interval((right.astype(float) - fresh.solved)[None], keys)
            risk_held.append(low[0] <= truth[last] <= high[0])
            gain_held.append(less[0] <= gains[last] <= more[0])
            widths.append((high[0] - low[0], more[0] - less[0]))
    setting = f"reference {reference}, confidence ** {honesty:g} agree, risk {RISK:g}, {CALIBRATION} problems calibrate"
    of_risk, of_gain = np.array(widths).T
    fresh_setting = f"{setting}, {FRESH} fresh"
    return [
        alarms("early answers: risk above the one asked for", setting, np.array(exceeded), most=1 - CONFIDENCE),
        coverage("early answers: risk on fresh problems", fresh_setting, np.array(risk_held), of_risk),
        coverage("early answers: gain over finished videos", fresh_setting, np.array(gain_held), of_gain),
    ]
