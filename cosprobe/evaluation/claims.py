"""A statement about a model, what was measured for it, and whether it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

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

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Claim:
        """The claim of a report's JSON file, where a number that was not measured is null."""
        found: dict[str, Any] = {
            field.name: np.nan if saved[field.name] is None else saved[field.name] for field in fields(cls)
        }
        return cls(**found)

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
