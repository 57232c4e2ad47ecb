"""What `probe.project` would cost, measured on a finished run with all channels.

`python -m benchmarks.projection RUN [N ...]`, with numbers of channels N.
Projects the stored features to N channels and fits probes to them and to all channels, in every layer at the step of
the best cell of each answer. A pilot with few problems and all channels says so before a large run is sampled.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from cosprobe.activations import ProbeSamples, StoredSamples, load_samples, random_projection
from cosprobe.cells import Cell
from cosprobe.errors import InputError
from cosprobe.evaluation import Grid
from cosprobe.evaluation.checks import ProjectionCost, projection_cost
from cosprobe.probes import load_probes
from cosprobe.runs import find_result
from cosprobe.tasks import ANSWER_ROLES

CHANNELS = (8, 16, 32, 64)


def costs(
    samples: ProbeSamples, target: str, best: Cell, kept: int, penalties: Sequence[float]
) -> list[ProjectionCost]:
    """What keeping `kept` channels costs in each layer, at the step, branch and position of the best cell."""
    matrix, found = random_projection(samples.features.shape[-1], kept), []
    for i, cell in enumerate(samples.cells):
        if replace(cell, layer=best.layer) == best:
            whole = samples.at(slice(i, i + 1))
            features = whole.features[:].float()
            whole, projected = replace(whole, features=features), replace(whole, features=features @ matrix)
            found.append(projection_cost(projected, whole, target, cell.position, penalties))
    return found


def table(result: Path, channels: Sequence[int]) -> Table:
    """One row per answer and number of channels."""
    samples, bank, grid = load_samples(StoredSamples.load(result))[0], load_probes(result), Grid.load(result)
    heads = ("answer, best cell", "channels", "accuracy", "minus all channels [95 %]")
    found = Table(*heads, "mean over layers", "most in a layer", box=box.SIMPLE_HEAD)
    for target in grid.with_role(*ANSWER_ROLES):
        best = grid.best(target).cell
        for kept in channels:
            each = costs(samples, target, best, kept, bank.provenance.probe["penalties"])
            here = next(one for one in each if one.cell == best)
            change, losses = here.difference, np.array([one.difference.value for one in each])
            found.add_row(
                f"{target}, layer {best.layer}, step {best.step}", f"{kept} of {here.channels}",
                f"{here.projected.value:.2f}", f"{change.value:+.2f} [{change.lower:+.2f}, {change.upper:+.2f}]",
                f"{losses.mean():+.2f}", f"{losses.min():+.2f}",
            )  # fmt: skip
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table of a run. Returns the exit status."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("run", help="folder of a finished run with all channels")
    parser.add_argument("channels", nargs="*", type=int, default=CHANNELS, help="numbers of channels")
    given = parser.parse_args(arguments)
    try:
        Console(width=140).print(table(find_result(given.run), given.channels))
    except InputError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
