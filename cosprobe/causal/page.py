"""Writes the claims of finished experiments into a page: `python -m cosprobe.causal.page FILE NAME=RUN NAME=RUN ...`

The table stands between the comments `<!-- claims -->` and `<!-- /claims -->` of the page.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cosprobe.causal.report import CLAIMS, LEAST_PAIRS
from cosprobe.errors import InputError
from cosprobe.evaluation import Claim
from cosprobe.files import read_json, whole_file
from cosprobe.reporting import markdown_table
from cosprobe.runs import REPORT, find_result

BEGIN, END = "<!-- claims -->", "<!-- /claims -->"
HEAD = ["experiment", "claim", "control", "measured", "difference [95 %]", "n", "verdict"]


def rows(name: str, result: Path) -> list[list[str]]:
    """The claims of all experiments of a result. Raises InputError when there are none."""
    files = sorted((result / REPORT).glob(f"causal-*/{CLAIMS}"))
    if not files:
        raise InputError(f"{str(result)!r}: no experiments; run probe.py use=intervene first")
    found = []
    for file in files:
        content = read_json(file, "run probe.py use=intervene again")
        if content["n"] < LEAST_PAIRS:  # a trial
            continue
        about = f"{name}, {content['kind']}: {content['edit']}"
        for saved in content["claims"]:
            fields: dict[str, Any] = {name: math.nan if v is None else v for name, v in saved.items()}
            claim = Claim(**fields)
            texts = (claim.claim, claim.control, claim.measure, claim.estimate)
            found.append([about, *texts, str(content["n"]), claim.verdict])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the arguments and rewrites the page."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("runs", nargs="+", help="name and run folder, as NAME=RUN")
    given = parser.parse_args(argv)
    table = [row for run in given.runs for row in rows(run.partition("=")[0], find_result(run.partition("=")[2]))]
    before, _, rest = given.file.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    with whole_file(given.file) as part:
        part.write_text("\n".join([f"{before}{BEGIN}", *markdown_table(HEAD, *table), f"{END}{after}"]))
    return 0


if __name__ == "__main__":
    main()
