"""probe.py with a comparison of ensembles of a few seconds. Lightning starts this script again for a second process."""

from __future__ import annotations

import sys

import probe
from cosprobe.ensembles.comparison import SIZES, Size

TINY = Size(3, 2, 4, ("middle", "early", "all"), ((0,),), (3,))

if __name__ == "__main__":
    SIZES["quick"] = TINY
    sys.exit(probe.main())
