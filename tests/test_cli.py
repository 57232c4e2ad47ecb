"""What the two commands say. The messages are part of the product: they are pinned here."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import probe
import train
from cosprobe.config import SCHEMAS, TrainRun, UseRun, command
from cosprobe.errors import InputError
from cosprobe.models.pipelines import PipelineConfig
from cosprobe.probes.logistic import ProbeConfig
from cosprobe.runtime import TrainerConfig
from cosprobe.tasks import MazeConfig

ROOT = Path(train.__file__).parent
TASKS = sorted(SCHEMAS["task"])
TOP = "experiment, pipeline, probe, run_dir, seed, task, trainer"


def names(schema: type) -> str:
    return ", ".join(sorted(f.name for f in fields(schema)))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty working directory, which every mistake must leave empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


MISTAKES = [
    # names
    ("probe.layer=3", f"unknown option. Did you mean probe.layers? Options of probe: {names(ProbeConfig)}"),
    ("+probe.layer=3", f"unknown option. Did you mean probe.layers? Options of probe: {names(ProbeConfig)}"),
    ("++probe.layer=3", f"unknown option. Did you mean probe.layers? Options of probe: {names(ProbeConfig)}"),
    ("task.problem=9", f"unknown option. Did you mean task.problems? Options of task: {names(MazeConfig)}"),
    ("pipeline.guidence=2", f"unknown option. Did you mean pipeline.guidance? Options of pipeline: "
     f"{names(PipelineConfig)}"),
    ("trainer.device=2", f"unknown option. Did you mean trainer.devices? Options of trainer: {names(TrainerConfig)}"),
    ("problems=9", f"unknown option. Did you mean task.problems? Options: {TOP}"),
    ("rundir=x", f"unknown option. Did you mean run_dir? Options: {TOP}"),
    ("sed=3", f"unknown option. Did you mean seed? Options: {TOP}"),
    ("prob=layers", f"unknown option. Did you mean probe? Options: {TOP}"),
    ("xyzzy=1", f"unknown option. Options: {TOP}"),
    ("hydra.run.dir=x", f"unknown option. Did you mean run_dir? Options: {TOP}"),
    ("seed.x=1", f"unknown option. Options: {TOP}"),
    ("experiment.clips=9", "unknown option. Options of experiment: none"),
    # choices
    ("probe=layerz", "unknown option. Did you mean probe=layers? Options of probe: frames, layers"),
    ("+probe=layerz", "unknown option. Did you mean probe=layers? Options of probe: frames, layers"),
    ("probe=", "unknown option. Options of probe: frames, layers"),
    ("task=maize", f"unknown option. Did you mean task=maze? Options of task: {', '.join(TASKS)}"),
    ("trainer=tpu", "unknown option. Did you mean trainer=cpu? Options of trainer: cpu, gpu"),
    ("experiment=minni",
     "unknown option. Did you mean experiment=mini? Options of experiment: lora, mini, mini_small, probes"),
    # types
    ("seed=x", "expected a whole number; now it is 0"),
    ("seed=1.5", "expected a whole number; now it is 0"),
    ("seed=true", "expected a whole number; now it is 0"),
    ("seed=", "expected a whole number; now it is 0"),
    ("task.problems=many", "expected a whole number; now it is 600"),
    ("task.rooms=4", "expected a list of whole numbers; now it is [4, 5]"),
    ("task.rooms=[4", "expected a list of whole numbers; now it is [4, 5]"),
    ("task.rooms=[4,x]", "expected a list of whole numbers; now it is [4, 5]"),
    ("pipeline.guidance=high", "expected a number; now it is 1.0"),
    ("probe.frames=maybe", "expected true or false; now it is false"),
    ("run_dir=${seed}", "expected a value; interpolations belong into configs/"),
    ("run_dir=???", "expected a value; interpolations belong into configs/"),
    # form
    ("+seed=3", "seed exists; write seed=3, without the +"),
    ("~seed", "expected name=value, such as seed=0"),
    ("layers", "expected name=value, such as seed=0"),
    ("=3", "expected name=value, such as seed=0"),
    ("--multirun", "unknown flag; flags: --help, --cfg; settings are name=value"),
    # values
    ("seed=-1", "expected 0 or more"),
    ("task.problems=0", "expected at least 1"),
    ("task.image_size=70", "expected a multiple of 16, at least 64"),
    ("task.rooms=[2]", "expected rooms per side from 4 to 8"),
    ("task.length=[9,2]", None),
    ("pipeline.steps=0", "expected at least 1"),
    ("pipeline.dtype=float8", None),
    ("probe.kind=deep", None),
    ("probe.randomised=-1", "expected 0 or more samples"),
]  # fmt: skip
REWORDED = {
    "task.length=[9,2]": "task.length=[9, 2]: expected [shortest, longest] with 1 <= shortest",
    "pipeline.dtype=float8": "pipeline.dtype='float8': expected one of float32, bfloat16, float16",
    "probe.kind=deep": "probe.kind='deep': expected one of logistic, newton, ridge",
}


@pytest.mark.parametrize(("argument", "message"), MISTAKES, ids=[argument for argument, _ in MISTAKES])
def test_a_mistake_is_one_line_and_leaves_nothing_behind(argument, message, here, capsys):
    assert train.main([argument, "probe=layers"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"error: {REWORDED.get(argument) or f'{argument}: {message}'}\n"
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run: expected run=FOLDER, the folder of a finished train.py run"),
        (["run=nowhere"], "run='nowhere': expected the folder of a train.py run, found no config.yaml"),
        (["run=x", "use=predikt"], "use=predikt: unknown option. Did you mean use=predict? "
         "Options of use: early, ensemble, predict"),
        (["run=x", "use.stp=3"],
         "use.stp=3: unknown option. Did you mean use.step? Options of use: layer, problems, step"),
        (["run=x", "use.layer=a"], "use.layer=a: expected a whole number or null; now it is null"),
        (["run=x", "use.step=-1"], "use.step=-1: expected at least 0"),
        (["run=x", "use.problems=0"], "use.problems=0: expected at least 1"),
        (["run=x", "use=early", "use.against=votes"], "use.against='votes': expected one of choice, truth"),
        (["run=x", "use=early", "use.calibration=58"],
         "use.calibration=58: expected at least 59 problems, the fewest that can show a risk of 0.05 at confidence "
         "0.95 (without a single error); raise it or allow more risk"),
        (["run=x", "use=ensemble", "use.size=huge"], "use.size='huge': expected one of quick, full"),
        (["run=x", "task.problems=3"],
         "task.problems=3: unknown option. Did you mean use.problems? Options: run, seed, use"),
    ],
)  # fmt: skip
def test_mistakes_in_using_a_run(arguments, message, here, capsys):
    assert probe.main(arguments) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")
    assert list(here.iterdir()) == []


def test_a_group_cannot_be_set_to_a_value(capsys):
    assert train.main(["experiment=mini", "experiment.flow=3"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "error: experiment.flow=3: experiment.flow holds several options, set one of experiment.flow."
    )
    assert said.count("\n") == 1


def test_a_folder_that_is_no_model_is_named_before_anything_is_written(here, capsys):
    assert train.main(["probe=layers", "pipeline.path=nowhere"]) == 2
    said = capsys.readouterr().err
    assert said == "error: pipeline.path='nowhere': expected a diffusers folder with a model_index.json\n"
    assert list(here.iterdir()) == []


def test_settings_reach_the_body_and_success_is_zero():
    seen = []
    assert command(TrainRun, seen.append, "", ["probe=frames", "seed=7", "run_dir=here"]) == 0
    assert (seen[0].probe.frames, seen[0].seed, seen[0].run_dir) == (True, 7, "here")


def test_an_error_of_ours_on_several_lines_is_told_on_one(capsys):
    def body(run):
        raise InputError("pipeline.path=x:\n  expected a folder")

    assert command(TrainRun, body, "", []) == 2
    assert capsys.readouterr().err == "error: pipeline.path=x: expected a folder\n"


def test_an_error_that_is_a_defect_keeps_its_traceback():
    with pytest.raises(ValueError, match="broadcast"):
        command(TrainRun, lambda run: np.zeros(2) + np.zeros(3), "", [])


def test_ctrl_c_says_how_to_go_on(capsys):
    def body(run):
        raise KeyboardInterrupt

    assert command(TrainRun, body, "", []) == 130
    assert capsys.readouterr().err == "stopped; the same command continues from what is on disk\n"


def test_help_shows_purpose_groups_and_two_examples(here, capsys):
    for flag in ("--help", "-h"):
        assert train.main([flag]) == 0
        text = capsys.readouterr().out
        assert text.startswith("Where does the answer become decodable?")
        assert text.count("\n  python train.py ") == 2
        tasks = ", ".join(f"{task}*" if task == "maze" else task for task in TASKS)
        for group in (
            f"task        {tasks}",
            "pipeline    mini*",
            "probe       frames, layers*",
            "trainer     cpu*, gpu",
        ):
            assert f"\n  {group}\n" in text
    assert probe.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert text.count("\n  python probe.py ") == 4  # usage and three examples
    assert "\n  use         early, ensemble, predict*\n" in text
    assert list(here.iterdir()) == []


def test_examples_of_the_help_are_valid(capsys):
    for entry, root in ((train, TrainRun), (probe, UseRun)):
        shown = [line.split() for line in entry.__doc__.splitlines() if line.startswith("  python ")]
        examples = [words for words in shown if "[name=value" not in words]
        assert len(examples) == (3 if root is UseRun else 2)
        for words in examples:
            settings = [word for word in words[2:] if "=" in word]
            assert settings
            assert command(root, lambda run: None, "", settings) == 0


def test_cfg_prints_every_setting(here, capsys):
    assert train.main(["--cfg", "seed=5"]) == 0
    text = capsys.readouterr().out
    assert "\nseed: 5\n" in text
    assert "\nrun_dir: runs/maze-layers\n" in text
    assert list(here.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train.py", "probe=layerz"],
            "error: probe=layerz: unknown option. Did you mean probe=layers? Options of probe: frames, layers\n",
        ),
        (
            ["probe.py", "use=predict", "run=nowhere"],
            "error: run='nowhere': expected the folder of a train.py run, found no config.yaml\n",
        ),
    ],
)
def test_commands_from_another_folder(arguments, message, here):
    script, *rest = arguments
    environment = {k: v for k, v in os.environ.items() if k != "TRANSFORMERS_VERBOSITY"}
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *rest], capture_output=True, text=True, timeout=300, env=environment
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
    assert list(here.iterdir()) == []
