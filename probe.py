"""Uses trained probes to read the answer of a video model from its hidden states, before the video is finished.

  python probe.py use=predict|early|ensemble|intervene|behaviour|lengths|film|tokens run=FOLDER [name=value ...]

Examples:
  python probe.py use=predict run=runs/maze-layers use.step=2  predict the answers that finished videos show
  python probe.py use=early run=runs/maze-layers               stop sampling early, at a stated risk of error
  python probe.py use=ensemble run=runs/maze-layers            several noise seeds against one, at equal compute
  python probe.py use=intervene run=runs/maze-layers use.edit=swap  change hidden states: do answers follow?
  python probe.py use=behaviour run=runs/maze-layers           exploration, commitment, corrections, roles of layers
  python probe.py use=lengths run=runs/maze-layers             other numbers of frames and steps: answers and cost
  python probe.py use=film run=runs/maze-layers use.kind=choice  x0-hat at every step as a video
  python probe.py use=compare runs=[runs/maze-layers,runs/few-steps]  two runs, cell by cell
  python probe.py use=tokens run=runs/maze-layers              energy and components of every token, as pictures
  python probe.py use=runs                                     list run folders; use.delete=NAME deletes one

FOLDER is the run folder of a finished train.py run. With several results, it is the folder of one of them, such as
runs/maze-layers/ridge.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosprobe.command import command, read_run, shell_command
from cosprobe.config import (
    BehaviourConfig,
    CompareConfig,
    EarlyConfig,
    EnsembleConfig,
    FilmConfig,
    InterveneConfig,
    LengthsConfig,
    PredictConfig,
    RunsConfig,
    TokensConfig,
    TrainRun,
    UseRun,
)
from cosprobe.errors import InputError
from cosprobe.locks import held
from cosprobe.runs import REPORT, delete_run, find_result, list_runs, mark_finished, print_runs
from cosprobe.tasks import with_margin

if TYPE_CHECKING:
    from cosprobe.probes import ProbeBank

READ_VIDEOS = (EarlyConfig, EnsembleConfig, InterveneConfig, FilmConfig, LengthsConfig, BehaviourConfig)


def use(run: UseRun) -> None:
    """Reads the settings and probes of a finished run and does what `run.use` selects."""
    if isinstance(run.use, RunsConfig):
        if run.use.delete:
            print(f"{run.use.delete}: deleted, {delete_run(run.run, run.use.delete) / 1e6:.0f} MB are free again")
        print_runs(list_runs(run.run))
        return

    if isinstance(run.use, CompareConfig):
        chosen = [(find_result(name), read_run(name)) for name in run.runs]
        from cosprobe.comparison import compare_runs

        with held(chosen[0][0], "runs"):
            compare_runs(chosen, run.seed, shell_command(run))
        return

    trained = read_run(run.run)
    stored = isinstance(run.use, BehaviourConfig) and not run.use.problems  # which needs no model
    if not stored:
        trained.pipeline.check_folder()
        task = with_margin(trained.task.build(), trained.pipeline.height, trained.pipeline.width)
        if isinstance(run.use, READ_VIDEOS) and not task.candidates:
            raise InputError(
                f"run={run.run!r}: task {task.name!r} has no parser, which reads answers from videos; expected "
                "use=predict or use=tokens, or a run with task.parser=package.module:function"
            )

    # imported here, so that --help and the checks above do not wait for torch and diffusers
    from lightning import seed_everything

    from cosprobe.activations import Sampler
    from cosprobe.behaviour import compare_lengths, film, sample_behaviours, show_behaviours
    from cosprobe.causal import intervene
    from cosprobe.early_exit import answer_early, predict
    from cosprobe.ensembles import ensembles
    from cosprobe.evaluation import Grid
    from cosprobe.models import load_pipeline
    from cosprobe.probes import load_probes
    from cosprobe.runtime import launch
    from cosprobe.tokens import tokens

    uses: dict[type, Any] = {
        PredictConfig: predict,
        EarlyConfig: answer_early,
        EnsembleConfig: ensembles,
        InterveneConfig: intervene,
        FilmConfig: film,
        TokensConfig: tokens,
        LengthsConfig: compare_lengths,
        BehaviourConfig: sample_behaviours,
    }
    folder = find_result(run.run)
    bank = load_probes(folder)
    bank.check_result(trained, Grid.load(folder).provenance["bank"], folder)
    if stored:
        with held(folder, "run"):
            show_behaviours(folder, bank)
            finish(run, trained, folder, bank)
        return
    seed_everything(run.seed, workers=True, verbose=False)
    with held(folder, "run"):
        fabric = launch(run.trainer)  # one process per device from here on
        pipeline = load_pipeline(trained.pipeline, str(fabric.device))
        sampler = Sampler(pipeline, trained.pipeline, task, run.trainer)
        uses[type(run.use)](sampler, trained.task, bank, run.use, run.seed, folder)
        if fabric.is_global_zero and not isinstance(run.use, PredictConfig):  # which writes no report
            finish(run, trained, folder, bank)


def finish(run: UseRun, trained: TrainRun, folder: Path, bank: ProbeBank) -> None:
    """Notes that the report is complete, and writes the page of the result again, with the report in it.

    trained: settings of the run whose result is in `folder`.
    """
    from cosprobe.runtime import say
    from cosprobe.webpage import write_run_page

    mark_finished(folder / REPORT / run.use.report, bank.fingerprint, made_by=shell_command(run))
    say(f"on the page of the run: {write_run_page(folder, shell_command(trained))}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code. argv: the arguments; default: the command line."""
    return command(UseRun, use, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
