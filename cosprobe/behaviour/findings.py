"""A finding about a behaviour: a claim with its estimate, interval and verdict."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import xarray as xr
from jaxtyping import Shaped

from cosprobe.evaluation import LEAST_PROBLEMS, UNTESTED, Claim

EXPLORATION, COMMITMENT, CORRECTION = "exploration", "commitment", "self-correction"
MEMORY, PERCEPTION, ROLES, AXES = "working memory", "perception before action", "layer roles", "steps and frames"
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


@dataclass(frozen=True, eq=False)
class Behaviours:
    """All findings of a run.

    sentences: two sentences of plain language for each behaviour. curves: what figures show, each with a description.
    """

    findings: tuple[Finding, ...]
    sentences: dict[str, tuple[str, str]]
    curves: xr.Dataset


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
