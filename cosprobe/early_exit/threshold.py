"""Stopping policies: a run stops when the confidence of a probe reaches a threshold that bounds the risk of an error.

A policy has exit points: one cell per step, chosen beforehand on validation problems. The probe is read at each exit
point. The run stops at the first exit point where the confidence reaches the threshold, which is the same for all exit
points. A run that never reaches the threshold is finished.

The threshold is calibrated for the policy as a whole, on calibration problems that no probe was fitted to. Thresholds
are tested in a fixed order, from a starting threshold downwards. Testing ends at the first threshold whose risk is not
shown to be at most alpha. The threshold before it is chosen. For any distribution of problems the chosen policy has

    P(risk <= alpha) >= confidence,

where the probability is over draws of the calibration problems, which must be independent.

Source: learn then test with fixed-sequence testing, Angelopoulos et al. (2021), arXiv 2110.01052, sections 2.2 and 3.1.
Departure: losses are 0 or 1 here, so p-values are exact binomial tails. The Hoeffding-Bentkus bounds of the paper hold
for any bounded loss and give larger p-values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import bdtr

from cosprobe.cells import Cell
from cosprobe.config import check_promise, least_without_errors
from cosprobe.errors import InputError

STEPS = 200  # number of thresholds
SUREST = 0.9999  # the highest threshold
MOST = 20_000  # `least_problems` considers no larger number of calibration problems


@dataclass(frozen=True)
class Policy:
    """A calibrated stopping policy for one kind of problems.

    target, cells, threshold: a run stops at the first of `cells` where the probe of `target` has a confidence of at
    least `threshold`; inf: it never stops.
    task, kind: task and kind of the calibration problems. The policy holds for such problems only.
    error_reference: what counts as an error. With `model_answer`, an early answer is an error if the finished video
    shows another answer or none; the risk is the share of errors among all problems. With `truth`, an early answer is
    an error if it is wrong; the risk is the share of errors among early answers.
    risk, confidence: the risk is at most `risk`, with probability `confidence`.
    problems, answered, errors: number of calibration problems, of early answers, and of errors.
    p: p-value of "the risk is above `risk`" at the chosen threshold; at the first tested threshold if none was chosen.
    """

    target: str
    task: str
    kind: str
    error_reference: str
    cells: tuple[Cell, ...]
    threshold: float
    risk: float
    confidence: float
    problems: int
    answered: int
    errors: int
    p: float

    @property
    def stops(self) -> bool:
        """Whether the threshold is finite."""
        return math.isfinite(self.threshold)

    def described(self) -> dict[str, Any]:
        """The policy as a dictionary for JSON. `read_policy` is the inverse."""
        cells = [astuple(cell) for cell in self.cells]
        return asdict(self) | {"cells": cells, "threshold": self.threshold if self.stops else None}


def read_policy(described: Mapping[str, Any]) -> Policy:
    """The policy that `Policy.described` wrote. Raises InputError for a dictionary of another form."""
    try:
        threshold = math.inf if described["threshold"] is None else float(described["threshold"])
        cells = tuple(Cell(*entry) for entry in described["cells"])
        return Policy(**{**described, "cells": cells, "threshold": threshold})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"stopping policy: damaged or of another version ({error}); run use=early again") from error


def thresholds(classes: int) -> Float[np.ndarray, " threshold"]:
    """Thresholds in the order in which they are tested, the highest first: evenly spaced log odds.

    The last one is 0, at which every run stops at its first exit point. Thresholds do not depend on data, as
    fixed-sequence testing requires.
    """
    log_odds = np.linspace(math.log(SUREST / (1 - SUREST)), math.log(1 / (classes - 1)) if classes > 1 else 0.0, STEPS)
    tried = 1 / (1 + np.exp(-log_odds))
    tried[-1] = 0.0
    return tried


def first_exit(confidence: Float[np.ndarray, "*rows exit_point"], threshold: float) -> Int[np.ndarray, "*rows"]:
    """Index of the first exit point with a confidence of at least `threshold`; the number of exit points if there is
    none."""
    return (np.maximum.accumulate(confidence, axis=-1) < threshold).sum(axis=-1)


def outcomes(
    confidence: Float[np.ndarray, "*draw sample exit_point"],
    wrong: Bool[np.ndarray, "*draw sample exit_point"],
    tried: Float[np.ndarray, " threshold"],
) -> tuple[Int[np.ndarray, "*draw threshold"], Int[np.ndarray, "*draw threshold"]]:
    """Number of early answers at each threshold, and number of errors among them."""
    padded = np.concatenate([wrong, np.zeros_like(wrong[..., :1])], axis=-1)  # a finished run is not an error
    answered = np.empty((*wrong.shape[:-2], len(tried)), dtype=np.int64)
    errors = np.empty_like(answered)
    for t, threshold in enumerate(tried):
        exits = first_exit(confidence, threshold)
        answered[..., t] = (exits < wrong.shape[-1]).sum(axis=-1)
        errors[..., t] = np.take_along_axis(padded, exits[..., None], axis=-1)[..., 0].sum(axis=-1)
    return answered, errors


def p_values(
    answered: Int[np.ndarray, "*draw threshold"],
    errors: Int[np.ndarray, "*draw threshold"],
    samples: int,
    risk: float,
    error_reference: str,
) -> Float[np.ndarray, "*draw threshold"]:
    """p-value of "the risk is above `risk`": the probability of at most this many errors if the risk equals `risk`.

    With `model_answer`, errors are counted among all samples. With `truth`, they are counted among early answers. Given
    the number of early answers, the number of errors is binomial, so the test is valid for every such number and
    therefore overall. p = 1 if there are no early answers.
    """
    tails = binomial_tails(samples, risk)
    return tails[answered if error_reference == "truth" else samples, errors]


def fixed_sequence(p: Float[np.ndarray, "*draw threshold"], delta: float, start: int = 0) -> Int[np.ndarray, "*draw"]:
    """Index of the last threshold with p <= `delta` before the first p above it, from `start` on; start - 1 for none.

    The probability of any false rejection is at most delta, provided that `start` does not depend on these p.
    """
    return np.asarray(start - 1 + np.logical_and.accumulate(p[..., start:] <= delta, axis=-1).sum(axis=-1))


def calibrate(
    confidence: Float[np.ndarray, "sample exit_point"],
    wrong: Bool[np.ndarray, "sample exit_point"],
    classes: int,
    risk: float,
    level: float,
    start: int = 0,
    **about: Any,
) -> Policy:
    """The policy with the lowest threshold that passes the test; if none passes, a policy that never stops.

    confidence, wrong: at each exit point, the confidence of the probe, and whether an early answer would be an error.
    One sample per problem.
    classes: number of classes of the probe.
    risk, level: the bound on the risk, and the probability with which it holds.
    start: index of the first threshold to test, see `starting_point`.
    about: target, task, kind, error_reference and cells of the policy.
    Raises InputError for `risk` or `level` outside 0 to 1, or fewer problems than any policy needs to pass.
    """
    check_promise(risk, level, len(wrong))
    tried = thresholds(classes)
    answered, errors = outcomes(confidence, wrong, tried)
    p = p_values(answered, errors, len(wrong), risk, about["error_reference"])
    last = int(fixed_sequence(p, 1 - level, start))
    found = last >= start
    return Policy(
        threshold=float(tried[last]) if found else math.inf,
        risk=risk,
        confidence=level,
        problems=len(wrong),
        answered=int(answered[last]) if found else 0,
        errors=int(errors[last]) if found else 0,
        p=float(p[last if found else start]),
        **about,
    )


def starting_point(
    confidence: Float[np.ndarray, "sample exit_point"],
    wrong: Bool[np.ndarray, "sample exit_point"],
    tried: Float[np.ndarray, " threshold"],
    risk: float,
    error_reference: str,
) -> int:
    """Index of the threshold that is tested first, chosen on validation samples.

    For `model_answer` it is the highest threshold, which passes whenever there are enough problems. For `truth` it is
    the one with the smallest p on validation, on a tie the first. There, a high threshold leaves few early answers,
    which are too few for a small p.
    """
    if error_reference == "model_answer" or not len(wrong):
        return 0
    return int(np.argmin(p_values(*outcomes(confidence, wrong, tried), len(wrong), risk, error_reference)))


def least_problems(risk: float, confidence: float, rate: float = 0.0) -> int | None:
    """The least number of calibration problems with which a policy passes that has errors on a share `rate` of them.

    None if more than 20,000 are needed (a rate at or above the risk never passes). With rate=0 this is the least number
    for any policy.

    It is the smallest n with P(Binomial(n, risk) <= ceil(rate * n)) <= 1 - confidence.
    """
    count = least_without_errors(risk, confidence)
    if rate <= 0 or rate >= risk:
        return count if rate <= 0 else None
    for errors in range(math.ceil(rate * count), math.ceil(rate * MOST)):
        most = int(errors / rate + 1e-9)  # the largest n with this many errors has the smallest tail
        if bdtr(float(errors), most, risk) <= 1 - confidence:
            first = max(count, int((errors - 1) / rate + 1e-9) + 1)
            return next(n for n in range(first, most + 1) if bdtr(float(errors), n, risk) <= 1 - confidence)
    return None


def binomial_tails(samples: int, rate: float) -> Float[np.ndarray, "count errors"]:
    """P(Binomial(count, rate) <= errors), exact, for every count and number of errors from 0 to `samples`."""
    count, errors = np.ogrid[: samples + 1, : samples + 1]
    return np.where(errors < count, bdtr(np.minimum(errors, count).astype(float), count, rate), 1.0)
