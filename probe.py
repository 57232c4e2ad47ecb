"""Uses trained probes: reads a model's answers from inside, before it has drawn them.

  python probe.py use=predict|ensemble run=FOLDER [name=value ...]

Examples:
  python probe.py use=predict run=runs/maze-layers                     at step 0, from the best layer
  python probe.py use=ensemble run=runs/maze-layers                    seed ensembles at matched compute

FOLDER is the run folder of a finished train.py run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cosprobe.config import PredictConfig, UseRun, command, read_run
from cosprobe.early import predict
from cosprobe.probes import load_probes
from cosprobe.seedreport import ensembles
from cosprobe.seeds import EnsembleConfig

USES = {PredictConfig: predict, EnsembleConfig: ensembles}


def use(run: UseRun) -> None:
    USES[type(run.use)](read_run(run.run), load_probes(run.run), run.use, run.seed, Path(run.run))


def main(argv: Sequence[str] | None = None) -> int:
    return command(UseRun, use, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
