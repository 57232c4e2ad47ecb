"""A statement about a model, what was measured for it, and whether it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from cosprobe.evaluation.intervals import LEAST_PROBLEMS, difference_interval
from cosprobe.evaluation.significance import max_t_bootstrap
from cosprobe.evaluation.variables import ALPHA

HOLDS, FAILS, UNCLEAR, UNTESTED = "holds", "does not hold", "no evidence", "cannot be tested here"


@dataclass(frozen=True)
class Claim:
    """A statement, what was measured for it, and whether it holds.

    control: the condition under which it is measured, or what it is compared with. value, lower, upper: the estimate
    with its 95 % interval. unit: of the estimate, empty for differences of shares and for correlations.
    """

    claim: str
    measure: str
    control: str
    value: float
    lower: float
    upper: float
    verdict: str
    unit: str = ""

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Claim:
        """The claim of a report's JSON file, where a number that was not measured is null."""
        found: dict[str, Any] = {
            field.name: np.nan if saved[field.name] is None else saved[field.name]
            for field in fields(cls)
            if field.name in saved or field.default is MISSING
        }
        return cls(**found)

    @property
    def estimate(self) -> str:
        """The estimate with its interval; empty if it was not measured.

        Numbers have two decimals. The end that decides a verdict has more where two would show it as zero.
        """
        if not np.isfinite(self.value):
            return ""
        lower, upper = f"{self.lower:+.2f}", f"{self.upper:+.2f}"
        if self.verdict == HOLDS and lower == "+0.00":
            lower = f"{self.lower:+.1g}"
        if self.verdict == FAILS and upper == "-0.00":
            upper = f"{self.upper:+.1g}"
        return f"{self.value:+.2f} [{lower}, {upper}] {self.unit}".rstrip()


def verdict(lower: float, upper: float) -> str:
    """`holds` for an interval above zero, `does not hold` for one below, otherwise `no evidence`."""
    if not np.isfinite([lower, upper]).all():
        return UNTESTED
    return HOLDS if lower > 0 else FAILS if upper < 0 else UNCLEAR


@dataclass(frozen=True)
class Clearest:
    """The difference that is most clearly above zero, of several. at: its row. value, lower, upper: its mean, with
    bounds of which the lower one holds for all rows together, as p does."""

    at: int
    value: float
    lower: float
    upper: float
    p: float

    @property
    def above(self) -> bool:
        """Whether it is above zero, after correction for all rows."""
        return self.p <= ALPHA and self.lower > 0


def clearest(difference: Float[np.ndarray, "row sample"], keys: Shaped[np.ndarray, " sample"]) -> Clearest:
    """The row of paired differences, each from -1 to 1, with the smallest p of `max_t_bootstrap`, and of these the
    largest mean. It may be chosen by what it shows: p and the lower bound are corrected for all rows.

    The lower bound is the lower one of `max_t_bootstrap` and `difference_interval`: that of the test has width zero
    where all samples agree. keys: the problem of each sample.
    """
    found = max_t_bootstrap(difference, keys)
    means = difference.mean(axis=1)
    at = int(np.lexsort([-means, found.p])[0])
    lower, upper = (float(end[at]) for end in difference_interval(difference, keys))
    lower = min(lower, float(max(found.lower[at], -1.0)))
    return Clearest(at, float(means[at]), lower, upper, float(found.p[at]))


def clearest_either_way(
    difference: Float[np.ndarray, "row sample"], keys: Shaped[np.ndarray, " sample"]
) -> tuple[Clearest, str]:
    """The clearest row and the verdict of the claim that some row is above zero.

    It `holds` where `clearest` is above zero. Otherwise it `does not hold` where some row is below zero in the same
    way; then that row is returned. With fewer problems than intervals need, it cannot be tested. See `clearest`.
    """
    above, below = clearest(difference, keys), clearest(-difference, keys)
    if below.above and not above.above:
        at = Clearest(below.at, -below.value, -below.upper, -below.lower, below.p)
        found = at, FAILS
    else:
        found = above, HOLDS if above.above else UNCLEAR
    return found if len(np.unique(keys)) >= LEAST_PROBLEMS else (found[0], UNTESTED)
