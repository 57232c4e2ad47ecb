"""Uses trained probes: reads a model's answers from inside, before it has drawn them.

  python probe.py use=predict|early run=FOLDER [name=value ...]

Examples:
  python probe.py use=predict run=runs/maze-layers                     at step 0, from the best layer
  python probe.py use=predict run=runs/maze-layers use.step=2 use.layer=5 use.problems=8
  python probe.py use=early run=runs/maze-layers               stop as soon as a probe is sure, with a stated risk

FOLDER is the run folder of a finished train.py run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cosprobe.config import UseRun, command, read_run
from cosprobe.early import predict
from cosprobe.probes import load_probes
from cosprobe.savings import answer_early
from cosprobe.stopping import EarlyConfig


def use(run: UseRun) -> None:
    settings = (read_run(run.run), load_probes(run.run), run.use, run.seed, Path(run.run))
    if isinstance(run.use, EarlyConfig):
        answer_early(*settings)
    else:
        predict(*settings)


def main(argv: Sequence[str] | None = None) -> int:
    return command(UseRun, use, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
