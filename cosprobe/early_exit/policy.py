"""When to stop a run and answer: a threshold on the confidence of probes, chosen so that its risk is bounded.

A policy looks at a run at fixed cells (a plan, chosen beforehand on validation problems) and stops at the first look
whose confidence reaches one threshold, the same at all looks; a run that never gets there is finished. What is
calibrated is the whole policy, not a look: thresholds are tried from the most careful one to more eager ones on
calibration problems that nothing was fitted to, and the walk ends before the first whose risk can't be shown to be
small enough. Whatever the distribution, the chosen policy then has

    P(risk <= alpha) >= confidence       over draws of the calibration problems, which must be independent.

Source: learn then test with fixed-sequence testing, Angelopoulos et al. (2021), arXiv 2110.01052, sections 2.2 and
3.1. Losses are 0 or 1 here, so p-values are exact binomial tails instead of the paper's Hoeffding-Bentkus bounds,
which hold for any bounded loss and are larger.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import bdtr

from cosprobe.cells import Cell
from cosprobe.errors import InputError

AGAINST = ("choice", "truth")
STEPS = 200  # thresholds tried
SUREST = 0.9999  # the most careful threshold tried
MOST = 20_000  # calibration problems thought of when someone asks how many are needed


@dataclass(frozen=True)
class Policy:
    """Stop at the first of `cells` where the probe of `target` is at least `threshold` sure; inf never stops.

    task, kind: of the problems it was calibrated on, the only ones it holds for. against: `choice` - an early answer
    is an error when it is not what the finished run ends on, `none` included, and the risk is the share of all
    problems; `truth` - when it is wrong, and the risk is the share of the early answers.
    problems, answered, errors: on calibration. p: that the risk is above `risk`, of the last threshold that passed.
    """

    target: str
    task: str
    kind: str
    against: str
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
        return math.isfinite(self.threshold)

    def described(self) -> dict[str, Any]:
        """As JSON can hold it; `read_policy` reads it back."""
        cells = [[c.step, c.site, c.branch, c.place] for c in self.cells]
        return asdict(self) | {"cells": cells, "threshold": self.threshold if self.stops else None}


def read_policy(described: Mapping[str, Any]) -> Policy:
    """Raises ValueError for what `described` did not write."""
    try:
        threshold = math.inf if described["threshold"] is None else float(described["threshold"])
        cells = tuple(Cell(*entry) for entry in described["cells"])
        return Policy(**{**described, "cells": cells, "threshold": threshold})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"stopping policy: damaged or of another version ({error}); run use=early again") from error


def thresholds(classes: int) -> Float[np.ndarray, " threshold"]:
    """What is tried, most careful first: even steps of the log odds, down to a guess, where every run stops at once.

    They depend on no data, so that trying them in this order is a fixed sequence.
    """
    odds = np.linspace(math.log(SUREST / (1 - SUREST)), math.log(1 / (classes - 1)) if classes > 1 else 0.0, STEPS)
    tried = 1 / (1 + np.exp(-odds))
    tried[-1] = 0.0
    return tried


def first_look(confidence: Float[np.ndarray, "*rows look"], threshold: float) -> Int[np.ndarray, "*rows"]:
    """Index of the first look at least `threshold` sure; the number of looks where there is none."""
    return (np.maximum.accumulate(confidence, axis=-1) < threshold).sum(axis=-1)


def outcomes(
    confidence: Float[np.ndarray, "*draw sample look"],
    wrong: Bool[np.ndarray, "*draw sample look"],
    tried: Float[np.ndarray, " threshold"],
) -> tuple[Int[np.ndarray, "*draw threshold"], Int[np.ndarray, "*draw threshold"]]:
    """How many samples each threshold answers early, and how many of these answers are errors."""
    padded = np.concatenate([wrong, np.zeros_like(wrong[..., :1])], axis=-1)  # a finished run is no early answer
    answered = np.empty((*wrong.shape[:-2], len(tried)), dtype=np.int64)
    errors = np.empty_like(answered)
    for t, threshold in enumerate(tried):
        look = first_look(confidence, threshold)
        answered[..., t] = (look < wrong.shape[-1]).sum(axis=-1)
        errors[..., t] = np.take_along_axis(padded, look[..., None], axis=-1)[..., 0].sum(axis=-1)
    return answered, errors


def p_values(
    answered: Int[np.ndarray, "*draw threshold"],
    errors: Int[np.ndarray, "*draw threshold"],
    samples: int,
    risk: float,
    against: str,
) -> Float[np.ndarray, "*draw threshold"]:
    """p of "the risk is above `risk`": the chance of so few errors at exactly `risk`.

    `choice` counts errors among all samples. `truth` counts them among those answered: given how many those are, their
    errors are binomial, so the test holds at every such number and therefore on the whole; nothing answered is p = 1.
    """
    tails = binomial_tails(samples, risk)
    return tails[answered if against == "truth" else samples, errors]


def fixed_sequence(p: Float[np.ndarray, "*draw threshold"], delta: float, start: int = 0) -> Int[np.ndarray, "*draw"]:
    """Index of the last threshold rejected when walking from `start` until the first p above `delta`; start - 1 where
    none is. All rejections together are wrong with probability at most delta, if `start` does not depend on these p."""
    return np.asarray(start - 1 + np.logical_and.accumulate(p[..., start:] <= delta, axis=-1).sum(axis=-1))


def calibrate(
    confidence: Float[np.ndarray, "sample look"],
    wrong: Bool[np.ndarray, "sample look"],
    classes: int,
    risk: float,
    level: float,
    start: int = 0,
    **about: Any,
) -> Policy:
    """The most eager policy that passes, one that never stops if none does. One sample per problem.

    wrong: whether an early answer at each look would be an error. level: the confidence asked for. start: see
    `starting_point`. about: target, task, kind, against and cells of the policy. Raises ValueError for a share outside
    0 to 1, or too few problems for any policy to pass.
    """
    check_promise(risk, level, len(wrong))
    tried = thresholds(classes)
    answered, errors = outcomes(confidence, wrong, tried)
    p = p_values(answered, errors, len(wrong), risk, about["against"])
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


def check_promise(risk: float, level: float, problems: int) -> None:
    """Raises ValueError for a risk or confidence outside 0 to 1, or too few calibration problems for any policy."""
    for name, value in (("risk", risk), ("confidence", level)):
        if not 0 < value < 1:
            raise InputError(f"use.{name}={value}: expected more than 0 and less than 1")
    least = least_problems(risk, level)
    if least is None or problems < least:
        raise InputError(
            f"use.calibration={problems}: expected at least {least} problems, the fewest that can show a risk of "
            f"{risk:g} at confidence {level:g} (without a single error); raise it or allow more risk"
        )


def starting_point(
    confidence: Float[np.ndarray, "sample look"],
    wrong: Bool[np.ndarray, "sample look"],
    tried: Float[np.ndarray, " threshold"],
    risk: float,
    against: str,
) -> int:
    """Where to begin the walk, from validation samples: for `choice` with the most careful threshold, which passes
    when there are enough problems at all; for `truth`, where careful means few answers and no evidence, with the
    threshold that looks most certain to pass (the first of equals)."""
    if against == "choice" or not len(wrong):
        return 0
    return int(np.argmin(p_values(*outcomes(confidence, wrong, tried), len(wrong), risk, against)))


def least_problems(risk: float, confidence: float, rate: float = 0.0) -> int | None:
    """The fewest calibration problems from which a policy that errs on a share `rate` of them passes; None if that
    takes more than 20,000 (a rate at or above the risk never passes). rate=0: no policy can pass with fewer.

    The smallest n with P(Binomial(n, risk) <= rate n, rounded up) <= 1 - confidence; (1 - risk)**n for rate 0.
    """
    count = math.ceil(math.log(1 - confidence) / math.log(1 - risk) - 1e-9)
    if rate <= 0 or rate >= risk:
        return count if rate <= 0 else None
    for errors in range(math.ceil(rate * count), math.ceil(rate * MOST)):
        most = int(errors / rate + 1e-9)  # the largest n this many errors belong to has the smallest tail
        if bdtr(float(errors), most, risk) <= 1 - confidence:
            first = max(count, int((errors - 1) / rate + 1e-9) + 1)
            return next(n for n in range(first, most + 1) if bdtr(float(errors), n, risk) <= 1 - confidence)
    return None


def binomial_tails(samples: int, rate: float) -> Float[np.ndarray, "count errors"]:
    """P(Binomial(count, rate) <= errors) for every count and number of errors from 0 to `samples`; exact."""
    count, errors = np.ogrid[: samples + 1, : samples + 1]
    return np.where(errors < count, bdtr(np.minimum(errors, count).astype(float), count, rate), 1.0)
