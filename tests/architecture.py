"""The rooms of the package and the imports between them, read from the code.

`python -m tests.architecture` writes the chart that stands in docs/architecture.md.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = (  # in the order of the method; a room may import any room that stands before it
    *(
        "errors",
        "cells",
        "bounds",
        "differences",
        "files",
        "locks",
        "wrapping",
        "processes",
        "checked",
        "video_files",
        "tasks",
        "config",
        "runs",
        "runtime",
        "cache",
        "monitoring",
        "models.architectures",
        "models",
        "activations",
        "probes",
        "evaluation",
        "evaluation.checks",
    ),
    *(
        "reporting",
        "plan",
        "hub",
        "early_exit",
        "ensembles",
        "causal",
        "behaviour",
        "tokens",
        "webpage",
        "comparison",
        "minimodel",
        "api",
        "command",
    ),
)
# the package itself and the commands import rooms, and no room imports them
ENTRIES = ("cosprobe", "__main__", "train", "probe")
FILES = sorted((ROOT / "cosprobe").rglob("*.py")) + [ROOT / "train.py", ROOT / "probe.py"]


def module_of(path: Path) -> str:
    """`probes.ridge` for cosprobe/probes/ridge.py, `probes` for its __init__, `cosprobe` for the package, `train`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    inside = parts[1:] if parts[0] == "cosprobe" else parts
    return ".".join(inside[:-1] if inside[-1] == "__init__" else inside) or "cosprobe"


def room_of(module: str) -> str:
    """The room a module stands in: the longest of ROOMS or ENTRIES that its name begins with; empty when none does."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((name for name in names if name in (*ROOMS, *ENTRIES)), "")


@cache
def imports(path: Path) -> tuple[tuple[str, str], ...]:
    """(module, name) of everything a file imports, inside functions too; `import module` has an empty name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [("." * node.level + (node.module or ""), alias.name) for alias in node.names]
    return tuple(found)


def inside(path: Path) -> list[tuple[str, str]]:
    """The same of the package's own modules, without `cosprobe.` before them."""
    return [
        (m.removeprefix("cosprobe").lstrip("."), name) for m, name in imports(path) if m.split(".")[0] == "cosprobe"
    ]


def arrows() -> dict[str, set[str]]:
    """By room, the other rooms its modules import."""
    found: dict[str, set[str]] = {room: set() for room in (*ROOMS, *ENTRIES)}
    for path in FILES:
        room = room_of(module_of(path))
        found[room] |= {room_of(module) for module, _ in inside(path)} - {room}
    return found


def drawing() -> str:
    """A Mermaid chart of the rooms; an arrow that a longer way implies is left out."""
    direct = arrows()

    def reach(room: str) -> set[str]:
        return {far for near in direct[room] for far in (near, *reach(near))}

    lines = ["flowchart BT"]
    for room in ROOMS:
        implied = {far for near in direct[room] for far in reach(near)}
        lines += [f"    {room} --> {other}" for other in sorted(direct[room] - implied, key=ROOMS.index)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(drawing() + "\n")
