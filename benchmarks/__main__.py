"""Command line: `python -m benchmarks [allocate] [capture] [fit] [intervene] [learn] [run] [share]`. Default: all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from statistics import median

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import allocating, capturing, fitting, intervening, learning, running, sharing
from benchmarks.pairs import Pair

MEASURES: dict[str, Callable[..., list[Pair]]] = {
    "allocate": allocating.measure,
    "capture": capturing.measure,
    "fit": fitting.measure,
    "intervene": intervening.measure,
    "learn": learning.measure,
    "run": running.measure,
    "share": sharing.measure,
}


def table(pairs: Sequence[Pair]) -> Table:
    """One row per pair. The ratio is the seconds of `measured` divided by those of `against`."""
    columns = ("measured", "against", "ratio", "lowest to highest", "seconds", "largest gap (median)")
    found = Table(*columns, box=box.SIMPLE_HEAD)
    for pair in pairs:
        low, high = min(pair.ratios), max(pair.ratios)
        spread = f"{low:.2f} to {high:.2f} of {len(pair.ratios)}"
        seconds = " / ".join(f"{sorted(s)[len(s) // 2]:.1f}" for s in (pair.seconds, pair.other_seconds))
        gaps = " / ".join(f"{max(values):.0e} ({median(values):.0e})" for values in pair.gaps)
        found.add_row(pair.measured, pair.against, f"{pair.ratio:.2f}", spread, seconds, gaps)
    return found


def main(names: Sequence[str]) -> int:
    """Runs the named benchmarks and prints the table. Returns the exit status."""
    if unknown := [name for name in names if name not in MEASURES]:
        Console(stderr=True).print(
            f"error: {unknown[0]}: expected some of {', '.join(MEASURES)}", highlight=False, soft_wrap=True
        )
        return 2
    pairs = [pair for name, measure in MEASURES.items() if not names or name in names for pair in measure()]
    Console().print(table(pairs))
    Console().print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; seconds are medians, measured / against"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
