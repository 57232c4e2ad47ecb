"""The commands for processes of tests: train.py, and probe.py with a comparison of ensembles of a few seconds."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import probe
import train
from cosprobe.ensembles.comparison import SIZES, Size

TINY = Size(3, 2, 4, ("middle", "early", "all"), ((0,),), (3,))


def probe_tiny(arguments: Sequence[str]) -> None:
    """Ends the process with the exit code of the command."""
    SIZES["quick"] = TINY
    sys.exit(probe.main(arguments))


def run_train(arguments: Sequence[str]) -> None:
    """Ends the process with the exit code of the command."""
    sys.exit(train.main(arguments))
