"""A finding about a behaviour: a claim with its estimate, interval and verdict."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

from cosprobe.behaviour.answers import Answers
from cosprobe.evaluation import LEAST_PROBLEMS, UNTESTED, Claim

EXPLORATION, COMMITMENT, CORRECTION = "exploration", "commitment", "self-correction"
MEMORY, PERCEPTION, ROLES, AXES = "working memory", "perception before action", "layer roles", "steps and frames"
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


@dataclass(frozen=True, eq=False)
class Behaviours:
    """All findings of a run.

    sentences: two sentences of plain language for each behaviour. curves: what figures show, each with a description.
    """

    findings: tuple[Finding, ...]
    sentences: dict[str, tuple[str, str]]
    curves: xr.Dataset


def finding(behaviour: str, one: Answers, claim: Claim) -> Finding:
    problems = len(np.unique(one.keys))
    if problems < LEAST_PROBLEMS:
        claim = replace(claim, verdict=UNTESTED)
    return Finding(behaviour, one.kind, claim, len(one), problems)


def untested(behaviour: str, one: Answers, claim: str, why: str) -> Finding:
    return finding(behaviour, one, Claim(claim, why, "", np.nan, np.nan, np.nan, UNTESTED))


def nothing(behaviour: str, claim: str, why: str) -> Finding:
    """The finding of a behaviour that a run cannot show. why: the reason."""
    return Finding(behaviour, "all kinds", Claim(claim, why, "", np.nan, np.nan, np.nan, UNTESTED), 0, 0)
