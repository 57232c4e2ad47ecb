"""Where does the answer become decodable? Trains linear probes on every block and denoising step of a frozen
video diffusion transformer while the real pipeline samples puzzles with exact labels.
  python train.py probe=layers                               every layer x every step of the model in the package
  python train.py probe=frames task.problems=1000 probe.steps=0:20:5 run_dir=runs/frames
The same command continues its own run folder, which is what `python probe.py run=FOLDER` uses.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cosprobe.activations import collect, load_samples, settings
from cosprobe.config import ProbeExperiment, TrainRun, command, save_config
from cosprobe.evaluation import evaluate, read_inputs
from cosprobe.evaluation.checks import examine, weights_table
from cosprobe.minimodel import train_and_describe
from cosprobe.models import load_pipeline
from cosprobe.probes import fit
from cosprobe.reporting import log_tensorboard, print_summary, record, write_report
from cosprobe.runtime import launch
from cosprobe.tasks import draw_samples


def train(run: TrainRun) -> None:
    task, folder = run.task.build(), Path(run.run_dir)
    if not isinstance(run.experiment, ProbeExperiment):  # a model of its own, or adapters of one
        save_config(run, folder)
        print(f"trained, and described in {train_and_describe(run.experiment, task, run.pipeline, folder, run.seed)}")
        return

    fabric = launch(run.trainer)  # one process per device from here on
    model = load_pipeline(run.pipeline, str(fabric.device))
    drawn = draw_samples(task, run.task, run.seed)
    identity = settings(run.pipeline, run.task, run.probe, run.seed)
    store = collect(model, run.pipeline, task, run.probe, drawn, identity, folder / "store")
    save_config(run, folder)  # after the store has agreed that these are this folder's settings
    samples, inputs, experts = load_samples(store, task)
    bank = fit(samples, run.probe, run.trainer, folder / "tensorboard", run.seed).with_provenance(store=store.settings)
    readings = read_inputs(samples, inputs, run.probe.kind, run.probe.lambdas, run.seed)
    weights = weights_table(store, samples, run.probe, run.trainer, folder / "tensorboard", run.seed)
    if not fabric.is_global_zero:
        return

    bank.save(folder / "probes")
    evaluated = evaluate(samples, experts, bank, readings)
    grid, checks = examine(evaluated, samples, inputs, bank, weights, run.seed)
    strips = record(model, run.pipeline, task, drawn, samples, run.probe.decode)
    write_report(grid, checks, folder, strips)
    log_tensorboard(grid, folder / "tensorboard", bank.provenance)
    print_summary(grid, checks, folder)


def main(argv: list[str] | None = None) -> int:
    return command(TrainRun, train, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
