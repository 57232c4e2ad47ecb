"""The commands of an installed package: `cosprobe train ...` is `python train.py ...`, and so is `cosprobe probe`."""

from __future__ import annotations

import runpy
import sys

from cosprobe.command import CONFIGS

COMMANDS = ("train", "probe")


def main() -> None:
    """Runs the command that the first argument names, with the arguments after it, and exits with its code."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        known = "; ".join(f"cosprobe {command} --help" for command in COMMANDS)
        sys.stderr.write(f"error: cosprobe {name}: expected {' or '.join(COMMANDS)}; see {known}\n")
        sys.exit(2)
    sys.exit(runpy.run_path(str(CONFIGS.parent / f"{name}.py"))["main"](sys.argv[2:]))


if __name__ == "__main__":
    main()
