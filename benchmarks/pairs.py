"""Times two functions alternately, so that other load on the machine affects both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any


@dataclass(frozen=True)
class Pair:
    """Names of the two sides, and the seconds of every repeat of each.

    gaps: for each side, the relative gaps of its fits to the optimum; empty for exact methods.
    """

    measured: str
    against: str
    seconds: tuple[float, ...]
    other_seconds: tuple[float, ...]
    gaps: tuple[tuple[float, ...], ...] = ()

    @property
    def ratios(self) -> tuple[float, ...]:
        """Seconds of `measured` divided by those of `against`, for each repeat."""
        return tuple(a / b for a, b in zip(self.seconds, self.other_seconds, strict=True))

    @property
    def ratio(self) -> float:
        """Median ratio over repeats, which a single slow start does not change."""
        return median(self.ratios)


def side_by_side(
    measured: str,
    run: Callable[[], Any],
    against: str,
    other: Callable[[], Any],
    repeats: int,
    scale: float = 1.0,
) -> Pair:
    """Times `run` and `other` alternately. Their order changes with every repeat.

    scale: factor for the seconds of `run`, if it does only a part of the work.
    Raises ValueError for no repeats.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: expected at least 1")
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats):
        for which in (0, 1) if repeat % 2 == 0 else (1, 0):
            begin = perf_counter()
            (run, other)[which]()
            seconds[which].append(perf_counter() - begin)
    return Pair(measured, against, tuple(scale * s for s in seconds[0]), tuple(seconds[1]))
