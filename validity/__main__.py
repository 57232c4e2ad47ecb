"""Command line: `python -m validity FILE` runs all simulations and writes the page."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

from rich.console import Console

from validity import (
    between_runs,
    centres,
    claims,
    cross_fitting,
    differences,
    effects,
    ensembles,
    guessing,
    inputs,
    lengths,
    maps,
    onsets,
    shares,
    stopping,
)
from validity.rows import Row, page

SEED = 20
SIMULATIONS: dict[str, tuple[Callable[[int, int], list[Row]], int]] = {  # function and number of runs
    "shares": (shares.simulate, 5000),
    "differences": (differences.simulate, 5000),
    "between runs": (between_runs.simulate, 2000),
    "guessing": (guessing.simulate, 2000),
    "inputs": (inputs.simulate, 1000),
    "onsets": (onsets.simulate, 1000),
    "lags": (onsets.simulate_differences, 500),
    "stopping": (stopping.simulate, 2000),
    "ensembles": (ensembles.simulate, 2000),
    "effects": (effects.simulate, 1000),
    "centres": (centres.simulate, 1000),
    "claims": (claims.simulate, 1000),
    "lengths": (lengths.simulate, 5000),
    "maps": (maps.simulate, 100),
    "cross-fitting": (cross_fitting.simulate, 150),
}


def main(arguments: Sequence[str]) -> int:
    """Runs all simulations and writes the page. Returns the exit status."""
    if len(arguments) != 1:
        Console(stderr=True).print(f"error: {len(arguments)} arguments: expected one, the page to write")
        return 2
    console, rows = Console(), list[Row]()
    for name, (simulate, runs) in SIMULATIONS.items():
        began = perf_counter()
        found = simulate(runs, SEED)
        rows += found
        missed = sum(bool(row.promised) and not row.holds for row in found)
        console.print(f"{name}: {len(found)} rows of {runs} runs, {missed} not kept, {perf_counter() - began:.0f} s")
    Path(arguments[0]).write_text(page(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
