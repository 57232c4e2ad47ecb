"""The commands for processes of tests: train.py, and probe.py with a comparison of ensembles of a few seconds."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import probe
import train
from cosprobe.ensembles.comparison import SIZES, Size
from tests.examples.pictures import undrawn

TINY = Size(3, 2, 4, ("middle", "early", "all"), ((0,),), (3,))


def run_commands(commands: Sequence[Sequence[str]]) -> None:
    """Runs commands one after the other, script first, and ends the process with the highest of their exit codes."""
    SIZES["quick"] = TINY
    with undrawn():
        codes = [{"train": train, "probe": probe}[script].main(settings) for script, *settings in commands]
    sys.exit(max(codes))
