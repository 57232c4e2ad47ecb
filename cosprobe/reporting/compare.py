"""Maps of several runs in one figure.

`python -m cosprobe.reporting.compare FILE NAME=RUN:TARGET NAME=RUN:TARGET ...`
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from cosprobe.errors import InputError
from cosprobe.evaluation import Grid
from cosprobe.reporting.figures import side_by_side
from cosprobe.runtime import whole_file


def named(run: str) -> tuple[str, Grid, str]:
    """`NAME=FOLDER:TARGET` of a finished run, for `side_by_side`; without a name that of the folder, without a target
    the first that asks for the answer. Raises ValueError for a folder without a grid and a target it does not have."""
    where, _, target = run.partition(":")
    name, _, folder = where.rpartition("=")
    grid = Grid.load(folder)
    target = target or (grid.with_role("answer") or grid.targets)[0]
    if target not in grid.targets:
        raise InputError(f"{run!r}: the run has no target {target!r}; expected one of {', '.join(grid.targets)}")
    return name or Path(folder).name, grid, target


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser("python -m cosprobe.reporting.compare", description=__doc__)
    parser.add_argument("file", help="where the picture goes, such as maps.png")
    parser.add_argument(
        "runs", nargs="+", metavar="NAME=RUN:TARGET", help="run folder; NAME and TARGET may be left out"
    )
    chosen = parser.parse_args(argv)
    try:
        figure = side_by_side([named(run) for run in chosen.runs])
        with whole_file(Path(chosen.file)) as part:
            figure.savefig(part)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
