"""Coverage of `mean_interval` for description lengths, and for other skewed values."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from cosprobe.evaluation import mean_interval
from cosprobe.evaluation.checks.description_length import doubling
from cosprobe.evaluation.intervals import problem_draws
from validity.rows import Row, coverage

SUBJECT = "code lengths"
CLASSES = 4
STRENGTHS = {"weak": 1.0, "medium": 2.0, "strong": 3.0}  # signal of a probe that is fitted to all problems
PROBLEMS = (60, 90, 180, 360)
LABELS = 400_000  # number of labels that the true mean is computed from


def simulate(runs: int, seed: int) -> list[Row]:
    """Coverage of the mean number of bits, given the order of problems and the probes; and of means of skewed values.

    Means of identically distributed skewed values are the harder case: the blocks of a code have different means, but
    fixed sizes.
    """
    found = []
    for problems in PROBLEMS:
        seen = _seen(problems)
        for number, (name, strength) in enumerate(STRENGTHS.items()):
            rng = np.random.default_rng([seed, problems, number])
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
    """For each problem, the number of problems that the probe of its block is fitted to; 0 in the first block."""
    sizes = (0, *doubling(problems, "answer"))
    return np.repeat(sizes[:-1], np.diff(sizes))


def _bits(
    seen: Int[np.ndarray, "*problem"], strength: float, problems: int, rng: np.random.Generator
) -> Float[np.ndarray, "*problem"]:
    """Bits of a label under a softmax over noisy scores, with one uniform pseudo-label as in the code.

    The score of the label is increased by a signal that grows with the number of problems seen.
    """
    signal = strength * np.sqrt(seen / problems)[..., None]
    scores = rng.normal(size=(*np.shape(seen), CLASSES))
    scores[..., :1] += signal
    proba = np.exp(signal * scores)
    of_label = proba[..., 0] / proba.sum(axis=-1)
    return -np.log2((seen * of_label + 1 / CLASSES) / (seen + 1))
