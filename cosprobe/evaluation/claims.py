"""A statement about a model, what was measured for it, and whether it holds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HOLDS, FAILS, UNCLEAR, UNTESTED = "holds", "does not hold", "no evidence", "cannot be tested here"


@dataclass(frozen=True)
class Claim:
    """A statement, what was measured for it, and whether it holds.

    control: the condition under which it is measured, or what it is compared with. value, lower, upper: the estimate
    with its 95 % interval.
    """

    claim: str
    measure: str
    control: str
    value: float
    lower: float
    upper: float
    verdict: str

    @property
    def estimate(self) -> str:
        """The estimate with its interval; empty if it was not measured."""
        if not np.isfinite(self.value):
            return ""
        return f"{self.value:+.2f} [{self.lower:+.2f}, {self.upper:+.2f}]"


def verdict(lower: float, upper: float) -> str:
    """`holds` for an interval above zero, `does not hold` for one below, otherwise `no evidence`."""
    if not np.isfinite([lower, upper]).all():
        return UNTESTED
    return HOLDS if lower > 0 else FAILS if upper < 0 else UNCLEAR
