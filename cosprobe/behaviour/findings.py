"""A finding about a behaviour: a claim with its estimate, interval and verdict."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import xarray as xr
from jaxtyping import Shaped

from cosprobe.evaluation import LEAST_PROBLEMS, UNTESTED, Claim
from cosprobe.tasks import Problem

EXPLORATION, COMMITMENT, CORRECTION = "exploration", "commitment", "self-correction"
MEMORY, PERCEPTION, ROLES, AXES = "working memory", "perception before action", "layer roles", "steps and frames"
LEAST_CHANGES = 6  # with fewer changes, all in one direction, a sign test has a p above 0.05
DESCRIBED = "described only"  # the verdict of what has no null
ORDER = (EXPLORATION, COMMITMENT, CORRECTION, MEMORY, PERCEPTION, ROLES, AXES)


@dataclass(frozen=True)
class Finding:
    """A claim about a behaviour. about: kind of the problems, or targets. n, problems: number of samples and of
    different problems."""

    behaviour: str
    about: str
    claim: Claim
    n: int
    problems: int


@dataclass(frozen=True)
class Group:
    """Samples of one kind and of similar difficulty. shares: by name, a share of the samples with its 95 % interval.
    changes: numbers of answers that change from wrong to right, and from right to wrong, in what x0-hat shows; None
    where right answers or x0-hat are not stored."""

    kind: str
    about: str
    n: int
    shares: dict[str, tuple[float, float, float]]
    changes: tuple[int, int] | None


@dataclass(frozen=True)
class Example:
    """A sample whose x0-hat shows a wrong answer at a step, and whose finished video shows a right one.

    shown: the answer in x0-hat. answer: that of the finished video. fresh: that of the video with fresh noise, -1 for
    none. margin: the highest score of the parser among wrong candidates, minus that among right ones, in x0-hat.
    """

    problem: Problem
    step: int
    shown: int
    answer: int
    fresh: int
    margin: float


@dataclass(frozen=True, eq=False)
class Behaviours:
    """All findings of a run.

    sentences: two sentences of plain language for each behaviour. curves: what figures show, each with a description.
    groups: some numbers by kind and difficulty. examples: corrected answers, the most clearly wrong first; None where
    none were looked for.
    """

    findings: tuple[Finding, ...]
    sentences: dict[str, tuple[str, str]]
    curves: xr.Dataset
    groups: tuple[Group, ...] = ()
    examples: tuple[Example, ...] | None = None


def finding(behaviour: str, about: str, claim: Claim, keys: Shaped[np.ndarray, " sample"]) -> Finding:
    """A finding on samples of these problems. With fewer than LEAST_PROBLEMS problems it has no verdict."""
    problems = len(np.unique(keys))
    if problems < LEAST_PROBLEMS and claim.verdict != DESCRIBED:
        claim = replace(claim, verdict=UNTESTED)
    return Finding(behaviour, about, claim, len(keys), problems)


def without_numbers(
    behaviour: str, about: str, claim: str, why: str, keys: Shaped[np.ndarray, " sample"], verdict: str = UNTESTED
) -> Finding:
    """A finding without an estimate. why: what was measured, or why nothing was."""
    return finding(behaviour, about, Claim(claim, why, "", np.nan, np.nan, np.nan, verdict), keys)


def nothing(behaviour: str, claim: str, why: str) -> Finding:
    """The finding of a behaviour that a run cannot show. why: the reason."""
    return Finding(behaviour, "all kinds", Claim(claim, why, "", np.nan, np.nan, np.nan, UNTESTED), 0, 0)
