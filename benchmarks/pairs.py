"""Two things measured side by side: in turns, in one process, so that what else the machine does hits both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any


@dataclass(frozen=True)
class Pair:
    """What was measured, against what, and the seconds of every repeat of each.

    gaps: where both stop short of an optimum, by which share of it, fit by fit, for each of the two.
    """

    measured: str
    against: str
    seconds: tuple[float, ...]
    other_seconds: tuple[float, ...]
    gaps: tuple[tuple[float, ...], ...] = ()

    @property
    def ratios(self) -> tuple[float, ...]:
        """Of each repeat: seconds of what was measured over those of the other."""
        return tuple(a / b for a, b in zip(self.seconds, self.other_seconds, strict=True))

    @property
    def ratio(self) -> float:
        """The median over repeats, so that one cold start does not count."""
        return median(self.ratios)


def side_by_side(
    measured: str,
    run: Callable[[], Any],
    against: str,
    other: Callable[[], Any],
    repeats: int,
    scale: float = 1.0,
) -> Pair:
    """Times `run` and `other` in turns, first one first, then the other first, and so on.

    scale: how much larger the whole is than the part of it that `run` does; its seconds are multiplied by that.
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
