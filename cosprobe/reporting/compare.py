"""Maps of several runs in one figure.

`python -m cosprobe.reporting.compare FILE NAME=RUN:TARGET NAME=RUN:TARGET ...`
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from cosprobe.errors import InputError
from cosprobe.evaluation import Grid
from cosprobe.files import whole_file
from cosprobe.reporting.figures import side_by_side
from cosprobe.tasks import Role


def named(run: str) -> tuple[str, Grid, str]:
    """Name, grid and target of `NAME=FOLDER:TARGET`, for `side_by_side`.

    Defaults: the name of the folder, and the first target of role `answer`. Raises InputError for a folder without a
    grid, and for a target that the grid does not hold.
    """
    where, _, target = run.partition(":")
    name, _, folder = where.rpartition("=")
    grid = Grid.load(folder)
    target = target or (grid.with_role(Role.ANSWER) or grid.targets)[0]
    if target not in grid.targets:
        raise InputError(f"{run!r}: the run has no target {target!r}; expected one of {', '.join(grid.targets)}")
    return name or Path(folder).name, grid, target


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: writes the maps of the given runs to a file."""
    parser = ArgumentParser("python -m cosprobe.reporting.compare", description=__doc__)
    parser.add_argument("file", help="file to write, such as maps.png")
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="NAME=RUN:TARGET",
        help="name, folder and target of a finished run; NAME and TARGET are optional",
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
