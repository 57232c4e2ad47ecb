"""Uses trained probes: reads a model's answers from inside, before it has drawn them.

  python probe.py use=predict|early|ensemble run=FOLDER [name=value ...]

Examples:
  python probe.py use=predict run=runs/maze-layers use.step=2  read new problems early, beside what the full run draws
  python probe.py use=early run=runs/maze-layers               stop as soon as a probe is sure, with a stated risk
  python probe.py use=ensemble run=runs/maze-layers            several seeds against one run, at matched compute

FOLDER is the run folder of a finished train.py run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cosprobe.config import UseRun, command, read_run
from cosprobe.early_exit import EarlyConfig, PredictConfig, answer_early, predict
from cosprobe.ensembles import EnsembleConfig, ensembles
from cosprobe.probes import load_probes

USES: dict[type, Callable[..., None]] = {PredictConfig: predict, EarlyConfig: answer_early, EnsembleConfig: ensembles}


def use(run: UseRun) -> None:
    trained = read_run(run.run)
    USES[type(run.use)](trained.pipeline, trained.task, load_probes(run.run), run.use, run.seed, Path(run.run))


def main(argv: Sequence[str] | None = None) -> int:
    return command(UseRun, use, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
