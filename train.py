"""Finds the layers and denoising steps at which the answer to a visual puzzle can be decoded. The diffusers pipeline
of a frozen video diffusion transformer samples puzzles with exact labels, and one linear probe is trained per cell.
  python train.py probe=layers                               all layers and steps of the model in the package
  python train.py probe=frames task.problems=1000 probe.steps=0:20:5 run_dir=runs/frames
The same command continues an interrupted run. `python probe.py run=FOLDER` uses the probes of a finished run.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from cosprobe.command import check_results, command, save_config, shell_command
from cosprobe.config import ProbeExperiment, TrainRun
from cosprobe.errors import InputError
from cosprobe.locks import held
from cosprobe.runs import REPORT, STORE, check_no_results, finished, mark_finished, outdated_reports, result_name
from cosprobe.tasks import SMALL, DiskTask, WithMargin, with_margin

if TYPE_CHECKING:
    from cosprobe.activations import ProbeSamples, StoreSettings
    from cosprobe.evaluation import InputReading
    from cosprobe.probes import ProbeBank
    from cosprobe.tasks import Task


def train(run: TrainRun) -> None:
    """Trains probes on a frozen pipeline or, with `experiment`, a video model or adapters of one."""
    bare, run_dir = run.task.build(), Path(run.run_dir)  # without a margin
    task = with_margin(bare, run.pipeline.height, run.pipeline.width)
    if isinstance(run.experiment, ProbeExperiment):
        run.pipeline.check_folder()
        check_results(run, run_dir)
    elif run.plan.only:
        raise InputError("plan=true: only runs of probes have a plan; leave experiment out")
    else:
        check_no_results(run_dir)

    # imported here, so that --help and the checks above do not wait for torch and diffusers
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    from cosprobe.activations import StoreSettings
    from cosprobe.minimodel import begin_training, train_and_describe
    from cosprobe.models import download, taken_defaults, with_defaults
    from cosprobe.probes import kept_bank
    from cosprobe.runtime import say
    from cosprobe.tasks import draw_samples

    download(run.pipeline, weights=not run.plan.only)
    asked, run.pipeline = run.pipeline, with_defaults(run.pipeline)
    if taken := taken_defaults(asked, run.pipeline):
        say(f"pipeline: {taken} (defaults of the model)")
    if isinstance(bare, DiskTask):
        for notice in bare.notices:
            say(f"task: {notice}")
        if not (isinstance(run.experiment, ProbeExperiment) and run.probe.folds):
            bare.check_splits()

    if run.plan.only:
        from cosprobe.plan import make_plan

        print(make_plan(run, task, draw_samples(task, run.task, run.seed)))
        return

    if not isinstance(run.experiment, ProbeExperiment):
        with held(run_dir, "run_dir"):
            begin_training(run_dir, run.experiment, task, run.pipeline)
            save_config(run, run_dir)
            print(f"trained; see {train_and_describe(run.experiment, task, run.pipeline, run_dir, run.seed)}")
        return

    folder = run_dir / result_name(run.probe, run.trainer)
    settings = StoreSettings.of(run.pipeline, run.task, run.probe, run.seed)
    check_results(run, run_dir, settings.model)
    with held(run_dir, "run_dir"), held(folder, "run_dir"):
        bank = kept_bank(folder / "probes", settings, run.probe, run.trainer, run.seed)
        if bank is not None and (printed := finished(folder / REPORT, bank.fingerprint)) is not None:
            save_config(run, folder, settings.model)  # the model may have moved
            say(f"{folder}: this command has run to its end; its result is unchanged")
            rank_zero_only(print)(printed, end="")  # `torchrun` and SLURM have started several processes
        else:
            train_probes(run, task, folder, settings)


def train_probes(run: TrainRun, task: Task, folder: Path, settings: StoreSettings) -> None:
    """Collects activations, trains the probes, evaluates them on held-out problems and writes the report.

    folder: of the result, in the run folder. settings: what the activations depend on.
    """
    from lightning import seed_everything

    from cosprobe.activations import (
        NOT_SEEN,
        Sampler,
        SampleTable,
        collect,
        find_store,
        load_samples,
        unprojected_samples,
    )
    from cosprobe.behaviour import BEHAVIOUR, measure, write_behaviours
    from cosprobe.differences import flattened
    from cosprobe.evaluation import evaluate_divisions, joined, read_inputs_once, read_path
    from cosprobe.evaluation.checks import examine, weights_lines, weights_table
    from cosprobe.models import load_pipeline
    from cosprobe.monitoring import SAMPLING, ResourceMonitor, build_logger
    from cosprobe.plan import cells_of, power
    from cosprobe.reporting import log_tensorboard, print_summary, record_once, write_report
    from cosprobe.runtime import launch, say
    from cosprobe.tasks import draw_samples
    from cosprobe.webpage import write_run_page

    run_dir = folder.parent
    seed_everything(run.seed, workers=True, verbose=False)
    fabric = launch(run.trainer)  # one process per device from here on
    sampler = Sampler(load_pipeline(run.pipeline, str(fabric.device)), run.pipeline, task, run.trainer)
    if not sampler.sees_image:
        say(f"warning: {NOT_SEEN}")
    if isinstance(task, WithMargin) and task.share < SMALL:
        say(f"warning: the images fill {task.share:.0%} of the height of the video; set task.image_size")
    draw = cache(lambda: draw_samples(task, run.task, run.seed))
    monitor = ResourceMonitor(build_logger(run.trainer, folder / "tensorboard" / SAMPLING), SAMPLING)
    store = find_store(settings, sampler.depth, run_dir / STORE, run.store)
    monitored = monitor if "resources" in run.trainer.callbacks else None

    def announce_power(table: SampleTable) -> None:
        for line in power(task, table, cells_of(sampler, run.probe), run.probe.folds):
            say(f"power: {line}")

    stored = collect(sampler, draw, settings, store, monitored, announce_power)
    save_config(run, folder, settings.model)  # only after `collect` has checked that the store has these settings
    stored.save(folder)
    samples, inputs, experts = load_samples(stored, run.probe.folds)
    banks: list[ProbeBank] = []
    readings: list[dict[str, dict[str, InputReading]]] = []
    for fold, division in enumerate(samples.divisions()):  # one, without cross-fitting
        banks.append(fitted_once(division, fold, run, folder, settings))
        kind, penalties = run.probe.kind, run.probe.penalties
        readings.append(read_inputs_once(run_dir, division, inputs, settings, kind, penalties, run.seed))
    bank = banks[0]
    weights = weights_table(stored, samples, run.probe, run.trainer, folder / "tensorboard", run.seed)
    if not fabric.is_global_zero:
        return

    evaluated = evaluate_divisions(samples, experts, banks, readings)
    whole = unprojected_samples(stored, samples)
    grid, checks = examine(joined(evaluated), samples, inputs, bank, weights, run.seed, whole=whole)
    path = None
    if run.probe.pooling == "token":
        path = read_path(samples, inputs, task, [one.problem for one in draw()], penalties, run.seed)
    film = record_once(run_dir, settings, sampler, draw, samples)
    behaviours = measure(samples, evaluated[0], bank, grid, weights_lines(stored, samples, bank))
    figures = write_report(grid, checks, folder, film, behaviours.sentences, path)
    write_behaviours(behaviours, folder)
    made_by = shell_command(run)
    mark_finished(folder / REPORT / BEHAVIOUR, bank.fingerprint, made_by=made_by)
    log_tensorboard(grid, figures, folder / "tensorboard", film, flattened(asdict(run)) | {"task": task.name})
    printed = print_summary(grid, checks, folder)
    for report in outdated_reports(folder, bank.fingerprint):
        say(f"{report}: was made with other probes than those in {folder / 'probes'}; run probe.py again for new ones")
    write_run_page(folder, made_by)
    mark_finished(folder / REPORT, bank.fingerprint, printed, made_by)


def fitted_once(samples: ProbeSamples, fold: int, run: TrainRun, folder: Path, settings: StoreSettings) -> ProbeBank:
    """The probes of one division of the samples: those in `folder`, or new ones, which are saved there."""
    from cosprobe.monitoring import SAMPLING, remove_events
    from cosprobe.probes import fit, kept_bank
    from cosprobe.runtime import rank_and_world, say

    place, curves = folder / "probes", folder / "tensorboard"
    if fold:
        place, curves = place / f"fold-{fold}", curves / f"fold-{fold}"
    bank = kept_bank(place, settings, run.probe, run.trainer, run.seed, fold)
    if bank is not None:
        say(f"probes: those of this command are already in {place}; re-using them")
        return bank
    remove_events(curves, keep=[SAMPLING])  # of an earlier attempt
    bank = fit(samples, run.probe, run.trainer, curves, run.seed).with_provenance(store=settings, fold=fold)
    if rank_and_world()[0] == 0:
        bank.save(place)  # here, so that an attempt that is killed later keeps them
    return bank


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code. argv: the arguments; default: the command line."""
    return command(TrainRun, train, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
