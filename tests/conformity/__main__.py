"""Checks every family of video pipelines and writes docs/support.md: `make support`, about 20 minutes on one core.

    python -m tests.conformity docs/support.md [FAMILY ...]

With names of families, only these are checked, and no file is written.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tests.conformity.checks import CHECKS, Case
from tests.conformity.page import Row, page
from tests.conformity.runs import end_to_end
from tests.examples.families import FAMILIES


def check(name: str) -> Row:
    """Tries everything with one family. What fails is noted with its reason."""
    numbers: dict[str, float] = {}
    failed: dict[str, str] = {}
    for guided in (False, True):
        case = Case(name, guided)
        for what, function in CHECKS.items():
            try:
                found = function(case)
            except Exception as error:  # a fault of any kind is a row of the table
                failed[what] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            else:
                numbers[what] = max(numbers.get(what, 0.0), found or 0.0)
    with TemporaryDirectory() as folder:
        try:
            end_to_end(name, Path(folder))
        except Exception as error:
            failed["commands"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return Row(name, type(case.pipeline).__name__, numbers, failed)


def main(argv: Sequence[str]) -> int:
    """Prints a line for each family. Returns 1 when something failed."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    target, *names = argv
    rows = []
    for name in names or FAMILIES:
        begin = time.monotonic()
        rows.append(check(name))
        said = "; ".join(f"{what} FAILED ({why})" for what, why in rows[-1].failed.items()) or "all hold"
        print(f"{name}: {said}, {time.monotonic() - begin:.0f} s", flush=True)  # noqa: T201
    if not names:
        path = Path(target)
        path.write_text(page(rows, path.read_text() if path.is_file() else ""))
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
