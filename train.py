"""Where does the answer become decodable? Trains linear probes on every block and denoising step of a frozen
video diffusion transformer while the real pipeline samples puzzles with exact labels.

  python train.py [group=option ...] [name=value ...]
  python train.py probe=layers                               every layer x every step of the model in the package
  python train.py probe=frames task.problems=1000 probe.steps=0:20:5 run_dir=runs/frames

The same command continues its own run folder, which is what `python probe.py run=FOLDER` uses.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cosprobe.card import describe
from cosprobe.collect import collect, draw_samples, load_samples
from cosprobe.config import TrainRun, command, save_config
from cosprobe.devices import launch
from cosprobe.evaluation import evaluate
from cosprobe.film import record
from cosprobe.mini import MiniConfig, train_mini
from cosprobe.pipelines import load_pipeline
from cosprobe.report import log_tensorboard, print_summary, write_report
from cosprobe.scoring import build_grid
from cosprobe.training import fit


def train(run: TrainRun) -> None:
    task, folder = run.task.build(), Path(run.run_dir)
    if isinstance(run.experiment, MiniConfig):
        save_config(run, folder)
        model = train_mini(run.experiment, task, folder)
        print(f"the model and its card: {describe(model, run.pipeline, task, run.seed)}")
        return

    fabric = launch(run.trainer)  # one process per device from here on
    model = load_pipeline(run.pipeline, str(fabric.device))
    store = collect(model, run.pipeline, task, run.task, run.probe, run.seed, folder / "store")
    save_config(run, folder)  # after the store has agreed that these are this folder's settings
    samples, experts = load_samples(store, task)
    bank = fit(samples, run.probe, run.trainer, folder / "tensorboard", run.seed).signed(store=store.settings)
    if not fabric.is_global_zero:
        return

    bank.save(folder / "probes")
    grid = build_grid(evaluate(samples, experts, bank), seed=run.seed, provenance=bank.provenance)
    drawn = draw_samples(task, run.task.problems, run.task.seeds, run.seed)
    write_report(grid, folder, record(model, run.pipeline, task, drawn, samples, run.probe.decode))
    log_tensorboard(grid, folder / "tensorboard", bank.provenance)
    print_summary(grid, folder)


def main(argv: Sequence[str] | None = None) -> int:
    return command(TrainRun, train, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
