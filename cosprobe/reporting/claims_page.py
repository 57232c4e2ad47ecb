"""Writes the claims of finished runs into a page: `python -m cosprobe.reporting.claims_page FILE REPORT NAME=RUN ...`

REPORT is a pattern of files in the report of a result, such as `causal-*/claims.json`, or several with commas between
them, such as `behaviour/behaviour.json,lengths/lengths.json`.
The table stands between the comments `<!-- claims -->` and `<!-- /claims -->` of the page.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from cosprobe.errors import InputError
from cosprobe.evaluation import Claim
from cosprobe.files import read_json, whole_file
from cosprobe.reporting.summary import markdown_table
from cosprobe.runs import REPORT, find_result

BEGIN, END = "<!-- claims -->", "<!-- /claims -->"
HEAD = ["experiment", "claim", "control", "measured", "difference [95 %]", "n", "verdict"]


def rows(name: str, result: Path, pattern: str) -> list[list[str]]:
    """The claims of all reports of a result that fit the pattern. Raises InputError when there are none.

    Where there is a report of full size, such as `causal-noise-full`, it stands for the quick one.
    A report has `claims`, `about`, and `n` for all or each of them. Claims of trials (`trial` is true) are left out.
    """
    fitting = [file for part in pattern.split(",") for file in sorted((result / REPORT).glob(part))]
    files = [file for file in fitting if file.parent.with_name(f"{file.parent.name}-full") / file.name not in fitting]
    if not files:
        raise InputError(f"{str(result / REPORT)!r}: no {pattern}; run the command that writes it first")
    found = []
    for file in files:
        content = read_json(file, "run the command that writes it again")
        for saved in [] if content.get("trial") else content["claims"]:
            claim, about = Claim.of(saved), saved.get("about", content.get("about"))
            texts = (claim.claim, claim.control, claim.measure, claim.estimate)
            n = saved.get("n", content.get("n")) or ""
            found.append([f"{name}, {about}", *texts, str(n), claim.verdict])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the arguments and rewrites the page."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("report", help="pattern of files in the report of a result; several with commas between them")
    parser.add_argument("runs", nargs="+", help="name and run folder, as NAME=RUN")
    given = parser.parse_args(argv)
    pairs = [(run.partition("=")[0], find_result(run.partition("=")[2])) for run in given.runs]
    table = [row for name, result in pairs for row in rows(name, result, given.report)]
    before, _, rest = given.file.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    with whole_file(given.file) as part:
        part.write_text("\n".join([f"{before}{BEGIN}", *markdown_table(HEAD, *table), f"{END}{after}"]))
    return 0


if __name__ == "__main__":
    main()
