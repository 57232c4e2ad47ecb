"""Early answers: the promise of a calibrated policy, and the intervals printed of it on fresh problems."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from cosprobe.early_exit.policy import (
    AGAINST,
    first_look,
    fixed_sequence,
    outcomes,
    p_values,
    starting_point,
    thresholds,
)
from cosprobe.evaluation import difference_interval, share_interval
from validity.rows import Row, alarms, coverage

RISK, CONFIDENCE, CALIBRATION, FRESH, MANY = 0.1, 0.95, 150, 60, 60_000
HONESTY = (0.5, 1.0, 2.0)  # probes too sure, honest, too modest
TRIED = thresholds(4)[3::4]  # still ends where every run stops
AT_ONCE = 500  # runs; bounds memory


class Runs:
    """Synthetic runs of three looks; confidence rises from look to look.

    A look says what the finished run ends on with probability confidence ** honesty. The finished run is right on
    97 of 100; a look that says something else is right on half of those where it is not.
    """

    def __init__(self, rng: np.random.Generator, shape: tuple[int, ...], honesty: float) -> None:
        self.confidence: Float[np.ndarray, "*shape look"] = np.sort(1 - 0.75 * rng.random((*shape, 3)) ** 3, axis=-1)
        agrees = rng.random((*shape, 3)) < self.confidence**honesty
        self.solved: Bool[np.ndarray, "*shape"] = rng.random(shape) < 0.97
        solved = self.solved[..., None]
        self.right = np.where(agrees, solved, ~solved & (rng.random((*shape, 3)) < 0.5))
        self.wrong = {"choice": ~agrees, "truth": ~self.right}

    def stopped(self, threshold: float) -> tuple[Int[np.ndarray, "*shape"], Bool[np.ndarray, "*shape"]]:
        """The look each run stops at, and whether its answer is right."""
        look = first_look(self.confidence, threshold)
        ends = np.concatenate([self.right, self.solved[..., None]], axis=-1)
        return look, np.take_along_axis(ends, look[..., None], axis=-1)[..., 0]


def simulate(runs: int, seed: int) -> list[Row]:
    """How often the true risk exceeds the one asked for, and coverage of the risk and the gain on fresh problems."""
    found = []
    for place, honesty in enumerate(HONESTY):
        crowd = Runs(np.random.default_rng([seed, place]), (MANY,), honesty)
        gains = np.array([crowd.stopped(t)[1].mean() for t in TRIED]) - crowd.solved.mean()
        for against in AGAINST:
            answered, errors = outcomes(crowd.confidence, crowd.wrong[against], TRIED)
            truth = errors / (np.maximum(answered, 1) if against == "truth" else MANY)
            rng = np.random.default_rng([seed, place, len(against)])
            found += _rows(runs, rng, honesty, against, truth, gains)
    return found


def _rows(
    runs: int,
    rng: np.random.Generator,
    honesty: float,
    against: str,
    truth: Float[np.ndarray, " threshold"],
    gains: Float[np.ndarray, " threshold"],
) -> list[Row]:
    trial = Runs(rng, (100,), honesty)
    start = starting_point(trial.confidence, trial.wrong[against], TRIED, RISK, against)
    exceeded, risk_held, gain_held, widths = [], [], [], []
    for begin in range(0, runs, AT_ONCE):
        many = Runs(rng, (min(AT_ONCE, runs - begin), CALIBRATION), honesty)
        p = p_values(*outcomes(many.confidence, many.wrong[against], TRIED), CALIBRATION, RISK, against)
        for last in fixed_sequence(p, 1 - CONFIDENCE, start):
            stops = last >= start
            # the truth is that of 60,000 runs: within two of its standard errors the risk counts as kept
            exceeded.append(stops and truth[last] > RISK + 2 * np.sqrt(RISK / MANY))
            if not stops:
                continue
            fresh = Runs(rng, (FRESH,), honesty)
            look, right = fresh.stopped(TRIED[last])
            early = look < 3
            wrong = early & np.take_along_axis(fresh.wrong[against], np.minimum(look, 2)[:, None], axis=1)[:, 0]
            among = early if against == "truth" else np.ones(FRESH, dtype=bool)
            if not among.any():
                continue
            keys = np.arange(FRESH)
            low, high = share_interval(wrong[None, among].astype(float), keys[among])
            less, more = difference_interval((right.astype(float) - fresh.solved)[None], keys)
            risk_held.append(low[0] <= truth[last] <= high[0])
            gain_held.append(less[0] <= gains[last] <= more[0])
            widths.append((high[0] - low[0], more[0] - less[0]))
    setting = f"against {against}, confidence ** {honesty:g} agree, risk {RISK:g}, {CALIBRATION} problems calibrate"
    of_risk, of_gain = np.array(widths).T
    fresh_setting = f"{setting}, {FRESH} fresh"
    return [
        alarms("early answers: risk above the one asked for", setting, np.array(exceeded), most=1 - CONFIDENCE),
        coverage("early answers: risk on fresh problems", fresh_setting, np.array(risk_held), of_risk),
        coverage("early answers: gain over finished videos", fresh_setting, np.array(gain_held), of_gain),
    ]
