"""Description lengths: `mean_interval` of the bits that probes of growing size need for labels."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from cosprobe.evaluation import mean_interval
from cosprobe.evaluation.checks.description_length import doubling
from cosprobe.evaluation.intervals import problem_draws
from validity.rows import Row, coverage

SUBJECT = "code lengths"
CLASSES = 4
STRENGTHS = {"weak": 1.0, "medium": 2.0, "strong": 3.0}  # of the signal a probe of all problems reads
PROBLEMS = (60, 90, 180, 360)
LABELS = 400_000  # from which the true mean is taken


def simulate(runs: int, seed: int) -> list[Row]:
    """Coverage of the mean number of bits, order of problems and fitted probes taken as given; and of the mean of
    values that are as skewed but alike, which is harder: a code's blocks differ, and how many fall in each is fixed."""
    found = []
    for problems in PROBLEMS:
        seen = _seen(problems)
        for place, (name, strength) in enumerate(STRENGTHS.items()):
            rng = np.random.default_rng([seed, problems, place])
            truth = float(_bits(np.tile(seen, (LABELS // problems, 1)), strength, problems, rng).mean())
            bits = _bits(np.tile(seen, (runs, 1)), strength, problems, rng)
            found += _rows(SUBJECT, f"{problems} training problems, {name} signal", bits, truth)
        rng = np.random.default_rng([seed, problems])
        found += _rows(
            "means of skewed values", f"{problems} problems, exponential", rng.exponential(size=bits.shape), 1
        )
        rare = np.where(rng.random(bits.shape) < 0.08, 3.0, 0.1) * rng.exponential(size=bits.shape)
        found += _rows("means of skewed values", f"{problems} problems, 8 % thirty times larger", rare, 0.332)
    return found


def _rows(subject: str, setting: str, values: Float[np.ndarray, "run problem"], truth: float) -> list[Row]:
    keys = np.arange(values.shape[1])
    lower, upper = mean_interval(values, keys)
    low, high = np.quantile(problem_draws(keys, 500, 0).means(values), [0.025, 0.975], axis=1)
    held, other = (lower <= truth) & (truth <= upper), (low <= truth) & (truth <= high)
    return [
        coverage(subject, setting, held, upper - lower),
        coverage(f"{subject}, bootstrap percentiles", setting, other, high - low, used=False),
    ]


def _seen(problems: int) -> Int[np.ndarray, " problem"]:
    """How many problems the probe that says a problem's label was fitted to; 0 in the first block."""
    sizes = (0, *doubling(problems, "answer"))
    return np.repeat(sizes[:-1], np.diff(sizes))


def _bits(
    seen: Int[np.ndarray, "*problem"], strength: float, problems: int, rng: np.random.Generator
) -> Float[np.ndarray, "*problem"]:
    """Bits of a label under a softmax over noisy scores, the label's own higher by a signal that grows with the number
    of problems seen; mixed with one uniform pseudo-label as the code is."""
    signal = strength * np.sqrt(seen / problems)[..., None]
    scores = rng.normal(size=(*np.shape(seen), CLASSES))
    scores[..., :1] += signal
    proba = np.exp(signal * scores)
    of_label = proba[..., 0] / proba.sum(axis=-1)
    return -np.log2((seen * of_label + 1 / CLASSES) / (seen + 1))
