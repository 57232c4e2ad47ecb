"""The rows of the table, and where they go: the terminal, a JSON file, a page of the docs."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import diffusers
import torch
from rich import box
from rich.table import Table

BEGIN, END = "<!-- gpu -->", "<!-- /gpu -->"  # around the table in a page


@dataclass(frozen=True)
class Finding:
    """One row. result, numbers: as text, and by name. holds: None where nothing is promised."""

    what: str
    result: str
    numbers: dict[str, float | str] = field(default_factory=dict)
    holds: bool | None = None

    @property
    def verdict(self) -> str:
        return {True: "yes", False: "NO", None: ""}[self.holds]


def machine(device: str) -> dict[str, str]:
    """The card and the versions that the numbers were measured with."""
    cuda = device.startswith("cuda")
    return {
        "card": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def heading(about: dict[str, str]) -> str:
    return f"{about['card']}, torch {about['torch']}, diffusers {about['diffusers']}"


def table(findings: Sequence[Finding], about: dict[str, str]) -> Table:
    """The table on the terminal."""
    found = Table("check", "result", "holds", box=box.SIMPLE_HEAD, title=heading(about))
    for one in findings:
        found.add_row(one.what, one.result, one.verdict)
    return found


def save(findings: Sequence[Finding], about: dict[str, str], path: Path) -> None:
    """Writes all numbers as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = about | {"findings": [asdict(one) for one in findings]}
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def check_page(page: Path) -> str:
    """Why the table cannot be written into a page; empty if it can."""
    if not page.is_file():
        return f"{page}: there is no such file"
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        return f"{page}: expected {BEGIN} and {END} once each, in this order"
    return ""


def write_page(findings: Sequence[Finding], about: dict[str, str], page: Path) -> None:
    """Replaces what stands between the two comments in a page by the table."""
    lines = [f"Measured on one {heading(about)}.", "", "| check | result | holds |", "|---|---|---|"]
    lines += [f"| {one.what} | {one.result} | {one.verdict} |" for one in findings]
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.split(END)[1]}")
