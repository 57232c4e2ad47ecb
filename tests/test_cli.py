"""What the two commands say: of every mistake one line, with the name, the value and what is possible instead."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import probe
import train
from cosprobe.activations import collection
from cosprobe.activations.collection import StoreSettings
from cosprobe.activations.store import LAYOUT
from cosprobe.command import CONFIGS, MARK, command, job_name, load, read_run, save_config
from cosprobe.config import SCHEMAS, FlowConfig, PipelineConfig, ProbeConfig, TrainerConfig, TrainRun, UseRun
from cosprobe.errors import InputError
from cosprobe.evaluation.grid import Grid
from cosprobe.evaluation.scoring import build_grid
from cosprobe.files import write_json
from cosprobe.probes import bank
from cosprobe.probes.bank import load_probes
from cosprobe.reporting import compare
from cosprobe.tasks import MazeConfig
from tests.examples.banks import bank_for
from tests.examples.grids import ANSWER, synthetic

ROOT = Path(train.__file__).parent
TASKS = sorted(SCHEMAS["task"])
PIPELINES = sorted(path.stem for path in (CONFIGS / "pipeline").glob("*.yaml"))
TOP = "experiment, pipeline, plan, probe, run_dir, seed, store, task, trainer"


def names(schema: type) -> str:
    return ", ".join(sorted(f.name for f in fields(schema)))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty working directory, which every mistake must leave empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


MISTAKES = [
    # names: the nearest one, and all there are
    ("probe.layer=3", rf"probe\.layers\?.*{names(ProbeConfig)}"),
    ("+probe.layer=3", rf"probe\.layers\?.*{names(ProbeConfig)}"),
    ("++probe.layer=3", rf"probe\.layers\?.*{names(ProbeConfig)}"),
    ("probe.lambdas=[1]", names(ProbeConfig)),  # as it was called in earlier versions
    ("probe.randomised=0", rf"probe\.random_weights\?.*{names(ProbeConfig)}"),
    ("task.problem=9", rf"task\.problems\?.*{names(MazeConfig)}"),
    ("pipeline.guidence=2", rf"pipeline\.guidance\?.*{names(PipelineConfig)}"),
    ("trainer.device=2", rf"trainer\.devices\?.*{names(TrainerConfig)}"),
    ("problems=9", rf"task\.problems\?.*{TOP}"),
    ("rundir=x", rf"run_dir\?.*{TOP}"),
    ("sed=3", rf"seed\?.*{TOP}"),
    ("prob=layers", rf"probe\?.*{TOP}"),
    ("xyzzy=1", rf"[^?]*{TOP}"),  # nothing is near: no question
    ("seed.x=1", rf"[^?]*{TOP}"),
    ("experiment.clips=9", "[^?]*experiment"),
    # choices
    ("probe=layerz", r"probe=layers\?.*frames, layers, tokens"),
    ("+probe=frames", r"\bprobe=frames\b"),
    ("probe=", r"[^?]*frames, layers"),
    ("task=maize", rf"task=maze\?.*{', '.join(TASKS)}"),
    ("trainer=tpu", r"trainer=cpu\?.*auto, cpu, gpu"),
    ("experiment=minni", r"experiment=mini\?.*lora, mini, mini_small, probes"),
    # types, and the value as it is
    ("seed=x", r"a whole number\b.*\b0"),
    ("seed=1.5", r"a whole number\b.*\b0"),
    ("seed=true", r"a whole number\b.*\b0"),
    ("seed=", r"a whole number\b.*\b0"),
    ("task.problems=many", r"a whole number\b.*\b600"),
    ("task.rooms=4", r"a list of whole numbers\b.*\[4, 5\]"),
    ("task.rooms=[4", r"name=value.*task\.rooms='"),
    ("task.rooms=[4,x]", r"a list of whole numbers\b.*\[4, 5\]"),
    ("pipeline.guidance=high", r"a number\b.*\b0\.0"),
    ("run_dir=1e3", r"'1e3'"),
    ("store=true", r"'true'"),
    ("probe.frames=maybe", r"true or false\b.*\bfalse"),
    ("run_dir=${sed}", "sed"),
    ("probe.steps=0,10,20", r"-m\b.*\"probe\.steps='0,10,20'\""),
    # form
    ("+seed=3", r"\bseed=3\b"),
    ("~seed", "name=value"),
    ("layers", "name=value"),
    ("=3", TOP),
    ("--multirum", "-m, "),
    # values
    ("seed=-1", r"\b0\b"),
    ("task.problems=0", r"\b1\b"),
    ("task.image_size=70", r"\b16\b.*\b64\b"),
    ("task.rooms=[2]", r"\b4 to 8\b"),
    ("task.length=[9,2]", r"shortest.*longest.*\b1\b"),
    ("pipeline.steps=-1", r"\b0\b"),
    ("pipeline.dtype=float8", "float32, bfloat16, float16"),
    ("probe.kind=deep", "logistic, newton, ridge"),
    ("probe.random_weights=-1", r"\b0\b"),
]
AS_READ = {  # a value that was understood is told as it was read
    "task.length=[9,2]": "task.length=[9, 2]",
    "pipeline.dtype=float8": "pipeline.dtype='float8'",
    "probe.kind=deep": "probe.kind='deep'",
}


def check_told(said: str, *fragments: str) -> None:
    """One line, of an error, that begins with the first fragment and holds the others (patterns), in this order."""
    first, *others = fragments
    assert re.fullmatch(rf"error: {re.escape(first)}.*{'.*'.join(others)}.*\n", said), said


@pytest.mark.slow
@pytest.mark.parametrize(("argument", "message"), MISTAKES, ids=[argument for argument, _ in MISTAKES])
def test_a_mistake_is_one_line_and_leaves_nothing_behind(argument, message, here, capsys, monkeypatch):
    monkeypatch.setattr(train, "train", lambda run: pytest.fail(f"{argument} was accepted"))
    assert train.main([argument]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    check_told(said.err, AS_READ.get(argument, argument), message)
    assert list(here.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "first", "message"),
    [
        ([], "run", r"run=FOLDER.*train\.py"),
        (["run=nowhere"], "run='nowhere'", r"train\.py.*config\.yaml"),
        (
            ["run=x", "use=predikt"],
            "use=predikt",
            r"use=predict\?.*behaviour, compare, early, ensemble, film, intervene, lengths,",
        ),
        (["run=x", "use.stp=3"], "use.stp=3", r"use\.step\?.*layer, problems, step"),
        (["run=x", "use.layer=a"], "use.layer=a", r"a whole number or null\b.*\bnull"),
        (["run=x", "use.step=-1"], "use.step=-1", r"\b0\b"),
        (["run=x", "use.problems=0"], "use.problems=0", r"\b1\b"),
        (["run=x", "use=early", "use.error_reference=choice"], "use.error_reference='choice'", "model_answer, truth"),
        (["run=x", "use=early", "use.against=truth"], "use.against=truth", "error_reference"),
        (["run=x", "use=early", "use.calibration=58"], "use.calibration=58", r"\b59\b.*\b0\.05\b.*\b0\.95\b"),
        (["run=x", "use=ensemble", "use.size=huge"], "use.size='huge'", "quick, full"),
        (["run=x", "task.problems=3"], "task.problems=3", r"use\.problems\?.*run, runs, seed, trainer, use"),
    ],
)
def test_mistakes_in_using_a_run(arguments, first, message, here, capsys):
    assert probe.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    check_told(said.err, first, message)
    assert list(here.iterdir()) == []


@pytest.mark.slow
def test_a_group_cannot_be_set_to_a_value(capsys):
    assert train.main(["experiment=mini", "experiment.flow=3"]) == 2
    check_told(
        capsys.readouterr().err, "experiment.flow=3", *(rf"experiment\.flow\.{f.name}\b" for f in fields(FlowConfig))
    )


@pytest.mark.slow
def test_a_folder_that_is_no_model_is_named_before_anything_is_written(here, capsys):
    assert train.main(["probe=layers", "pipeline.path=nowhere"]) == 2
    check_told(capsys.readouterr().err, "pipeline.path='nowhere'", r"model_index\.json")
    assert list(here.iterdir()) == []


@pytest.mark.slow
def test_settings_reach_the_body_and_success_is_zero():
    seen = []
    assert command(TrainRun, seen.append, "", ["probe=frames", "seed=7", "run_dir=here"]) == 0
    assert (seen[0].probe.frames, seen[0].seed, seen[0].run_dir) == (True, 7, "here")


@pytest.mark.slow
def test_an_error_of_ours_on_several_lines_is_told_on_one(capsys):
    def body(run):
        raise InputError("pipeline.path=x:\n  expected a folder")

    assert command(TrainRun, body, "", []) == 2
    assert capsys.readouterr().err == "error: pipeline.path=x: expected a folder\n"


@pytest.mark.slow
def test_an_error_that_is_a_defect_keeps_its_traceback():
    with pytest.raises(ValueError, match="broadcast"):
        command(TrainRun, lambda run: np.zeros(2) + np.zeros(3), "", [])


@pytest.mark.slow
def test_a_lost_process_is_told_in_one_line_and_other_errors_of_torch_are_not(capsys):
    def body(run):
        raise RuntimeError(f"[gloo/transport/tcp/pair.cc:553] {run.run_dir} Connection closed by peer [127.0.0.1]")

    assert command(TrainRun, body, "", []) == 2
    assert re.fullmatch(r"error: another process .* has ended.*same command continues\n", capsys.readouterr().err)
    with pytest.raises(RuntimeError, match="size of tensor"):
        command(TrainRun, lambda run: torch.zeros(2) + torch.zeros(3), "", [])


@pytest.mark.slow
def test_a_full_disk_that_a_library_wraps_is_told_in_one_line(capsys):
    def body(run):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise ValueError("\n you tried to log 1.0 which is currently not supported") from error

    assert command(TrainRun, body, "", []) == 2
    assert re.fullmatch(r"error: .*No space left on device.*free some space\n", capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize("value", ["1", "-1", "10", "1000000000000", "yes", "1_0"])
def test_a_number_is_no_switch(value, capsys):
    assert command(TrainRun, lambda run: None, "", [f"probe.frames={value}"]) == 2
    check_told(capsys.readouterr().err, f"probe.frames={value}", "true or false")


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(capsys):
    def body(run):
        raise KeyboardInterrupt

    assert command(TrainRun, body, "", []) == 130
    said = capsys.readouterr()
    assert said.out == "" and re.fullmatch(r".*same command.*\n", said.err)


@pytest.mark.slow
def test_help_shows_purpose_groups_and_two_examples(here, capsys):
    for flag in ("--help", "-h"):
        assert train.main([flag]) == 0
        text = capsys.readouterr().out
        assert text.startswith(train.__doc__.strip().splitlines()[0])
        assert text.count("\n  python train.py ") == 2
        tasks = ", ".join(f"{task}*" if task == "maze" else task for task in TASKS)
        for group in (
            f"task        {tasks}",
            f"pipeline    {', '.join(f'{one}*' if one == 'mini' else one for one in PIPELINES)}",
            "probe       frames, layers*, tokens",
            "trainer     auto*, cpu, gpu",
        ):
            assert f"\n  {group}\n" in text
    assert probe.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert text.count("\n  python probe.py ") == 11  # usage and ten examples
    assert (
        "\n  use         behaviour, compare, early, ensemble, film, intervene, lengths, predict*, runs, tokens\n"
        in text
    )
    assert list(here.iterdir()) == []


@pytest.mark.slow
def test_examples_of_the_help_are_valid(capsys):
    for entry, root in ((train, TrainRun), (probe, UseRun)):
        shown = [line.split() for line in entry.__doc__.splitlines() if line.startswith("  python ")]
        examples = [words for words in shown if "[name=value" not in words]
        assert len(examples) == (10 if root is UseRun else 2)
        for words in examples:
            settings = [word for word in words[2:] if "=" in word and "use.delete" not in word]
            assert settings
            assert command(root, lambda run: None, "", settings) == 0


def test_cfg_prints_every_setting(here, capsys):
    assert train.main(["--cfg", "job", "seed=5"]) == 0
    text = capsys.readouterr().out
    assert "\nseed: 5\n" in text
    assert "\n  problems: 600\n" in text
    assert list(here.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "first", "message"),
    [
        (["train.py", "probe=layerz"], "probe=layerz", r"probe=layers\?.*frames, layers, tokens"),
        (["probe.py", "use=predict", "run=nowhere"], "run='nowhere'", r"config\.yaml"),
    ],
)
def test_commands_from_another_folder(arguments, first, message, here):
    script, *rest = arguments
    environment = {k: v for k, v in os.environ.items() if k != "TRANSFORMERS_VERBOSITY"}
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *rest], capture_output=True, text=True, timeout=300, env=environment
    )
    assert (done.returncode, done.stdout) == (2, "")
    check_told(done.stderr, first, message)
    assert list(here.iterdir()) == []


EARLY = """
import json, sys, train, probe
mains = {"train.py": train.main, "probe.py": probe.main}
codes = [mains[script](settings) for script, *settings in json.loads(sys.argv[1])]
print(codes, sorted({"torch", "lightning", "diffusers", "transformers", "xarray"} & set(sys.modules)))
"""


@pytest.mark.slow
def test_other_settings_are_told_before_torch_is_imported(here):
    """Its imports take seconds."""
    told = [
        (["train.py", "task=select", "run_dir=run"], r"run_dir: 'run'.*task family=\"maze\", now.*\"select\""),
        (["train.py", "pipeline.steps=9", "run_dir=run"], r"run_dir: 'run'.*pipeline\.steps=20.*pipeline\.steps=9"),
        (["train.py", "experiment=mini", "run_dir=run"], r"run_dir='run': has results of probes, such as logistic"),
        (["train.py", "pipeline.path=nowhere"], r"pipeline\.path='nowhere'.*model_index\.json"),
        (["probe.py", "run=moved"], r"pipeline\.path='gone'.*model_index\.json"),
    ]
    for folder, settings in (("run", []), ("moved", ["pipeline.path=gone"])):
        save_config(load(TrainRun, settings), here / folder / "logistic", {"index": "0"})
    done = subprocess.run(
        [sys.executable, "-c", EARLY, json.dumps([arguments for arguments, _ in told])],
        capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout == f"{[2] * len(told)} []\n"
    for line, (arguments, message) in zip(done.stderr.splitlines(), told, strict=True):
        assert re.match(f"error: {message}", line), (arguments, line)
    assert {path.name for path in here.rglob("*")} == {"run", "moved", "logistic", "config.yaml"}


# folders that earlier versions wrote


def rewrite(path: Path, text: str) -> None:
    """Writes a configuration as a version that had these settings did, with the checksum."""
    text = text.partition("\n")[2] if text.startswith(MARK) else text
    path.write_text(f"{MARK}{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


@pytest.fixture
def finished(here, capsys) -> Path:
    """The folder of a run with its settings, probes and grid, as this version writes them."""
    folder = here / "run"
    run = load(TrainRun, [f"run_dir={folder}"])
    save_config(run, folder)
    bank_for(run.pipeline).save(folder / "probes")
    build_grid(synthetic(2, 2, 40, targets=(ANSWER,)), draws=20).save(folder / "report" / "grid.nc")
    assert read_run(folder) == run and load_probes(folder).provenance.store and Grid.load(folder).targets == ("answer",)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("now", "before"), [("penalties", "lambdas"), ("random_weights", "randomised")])
def test_settings_of_an_earlier_version_are_named(finished, now, before, capsys):
    path = finished / "config.yaml"
    assert path.read_text().count(f"  {now}:") == 1
    rewrite(path, path.read_text().replace(f"  {now}:", f"  {before}:"))
    assert probe.main([f"run={finished}"]) == 2
    check_told(capsys.readouterr().err, f"run={str(finished)!r}", r"config\.yaml", rf"\b{before}\b")


@pytest.mark.slow
def test_probes_of_an_earlier_version_are_named(finished, capsys):
    path = finished / "probes" / "bank.json"
    saved = json.loads(path.read_text())
    cells = [[step, str(layer), *others] for step, layer, *others in saved["cells"]]
    write_json(path, saved | {"format": 3, "cells": cells, "provenance": {"store": {"model": "none"}}})
    assert probe.main([f"run={finished}"]) == 2
    check_told(capsys.readouterr().err, f"{str(path)!r}", r"\bformat 3\b", rf"\b{bank.FORMAT}\b")
    saved["provenance"]["store"]["format"] = 4
    write_json(path, {name: value for name, value in saved.items() if name != "sha256"})
    with pytest.raises(InputError, match=rf"\b4\b.*\b{collection.FORMAT}\b"):
        load_probes(finished)
    assert probe.main([f"run={finished}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_a_result_of_an_earlier_version_is_kept_and_named(finished, capsys):
    """Its model was one hash, which says of no part whether it differs."""
    path = finished.rename(finished.parent / "logistic") / "config.yaml"
    rewrite(path, path.read_text().replace("model: {}", "model: 0123456789abcdef"))
    before = path.read_bytes()
    assert train.main([f"run_dir={finished.parent}"]) == 2
    check_told(capsys.readouterr().err, f"run_dir: {str(path.parent)!r}", "another version", "run_dir")
    assert path.read_bytes() == before and not (finished.parent / "store").exists()


@pytest.mark.slow
def test_a_grid_of_an_earlier_version_is_named(finished, capsys):
    before = {"position": "place", "penalty": "lambda", "x0_accuracy": "visible", "x0_source": "visible_source",
              "above_x0": "excess", "p_x0": "p_excess", "correct_when_model_wrong": "knew"}  # fmt: skip
    path = finished / "report" / "grid.nc"
    dataset = xr.load_dataset(path, engine="netcdf4").rename(before)
    dataset.to_netcdf(path, engine="netcdf4")
    for where in (finished, path):
        with pytest.raises(InputError, match=f"{re.escape(str(path))}.*(position|x0_accuracy)"):
            Grid.load(where)
    assert probe.main([f"run={finished}", "use.problems=1"]) == 2
    said = capsys.readouterr().err
    assert str(path) in said and said.startswith("error: ") and said.count("\n") == 1
    with pytest.raises(SystemExit) as ended:
        compare.main([str(finished / "maps.png"), str(finished)])
    assert ended.value.code == 2 and not (finished / "maps.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["settings.json", "manifest.json"])
def test_activations_of_an_earlier_version_are_kept_and_named(here, name, capsys):
    """Whether collecting them was finished or not; settings stood in them without a layout."""
    asked = ["task.problems=16", "pipeline.steps=2", f"run_dir={here / 'run'}"]
    run = load(TrainRun, asked)
    before = StoreSettings.of(run.pipeline, run.task, run.probe, run.seed).identity
    content = before if name == "settings.json" else {"fingerprint": "0" * 16, "shards": 1, "settings": before}
    (store := here / "run" / "store").mkdir(parents=True)
    (store / name).write_text(json.dumps(content))
    assert train.main(asked) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    check_told(f"{said}\n", f"{str(store / name)!r}", rf"layout 1\b.*\b{LAYOUT}\b", "run_dir")
    assert [path.name for path in (here / "run").rglob("*")] == ["store", name]
    assert json.loads((store / name).read_text()) == content


# sweeps


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["seed=1", "probe.kind=ridge"], "seed-1-kind-ridge"),
        (["probe.batch=8", "pipeline.batch=2"], "probe-batch-8-pipeline-batch-2"),  # two names that end alike
        (["seed=1", "trainer.devices=2", "run_dir=x"], "seed-1"),
        (["pipeline.steps=4"], "steps-4"),
    ],
)
def test_a_job_is_named_by_what_differs(overrides, name):
    assert job_name(overrides) == name


def test_names_of_jobs_need_no_quotes_and_differ_as_the_jobs_do():
    values = ["0:20:5", "0:20,5", "0,20,5", "[1, 2]", "[1,2]", "a/b", "a b", "1e-3", "all"]
    found = [job_name([f"probe.steps='{value}'"]) for value in values]
    assert len(set(found)) == len(values)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["probe.kindd=ridge,newton"], r"probe\.kindd=ridge: .*probe\.kind\?"),
        (["seed=1,x"], r"seed=x.*a whole number"),
        (["seed=1,-2"], r"seed=-2.*\b0\b"),
        (["probe=layers,framez"], r"probe=framez.*probe=frames\?"),
        (["seed=1,2", "run_dir=runs/same"], r"run_dir=runs/same.*seed=1.*seed=2"),
        (["seed=1,1"], r"run_dir=runs/maze-layers-seed-1\b.*seed=1.*seed=1"),
    ],
)
def test_a_mistake_in_a_sweep_is_told_before_its_first_job(arguments, message, here, capfd):
    assert train.main(["-m", *arguments]) == 2
    said = capfd.readouterr()
    assert re.fullmatch(rf"error: {message}.*\n", said.err), said.err
    assert said.out == "" and list(here.iterdir()) == []


@pytest.mark.slow
def test_every_job_of_a_sweep_has_its_run_folder(here):
    """And a job that fails does not stop the others."""
    script = here / "print_run_dir.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom cosprobe.command import command\n"
        "from cosprobe.config import TrainRun\nfrom cosprobe.errors import InputError\n"
        "def body(run):\n"
        "    if run.seed == 2:\n        raise InputError(f'seed={run.seed}: no')\n"
        "    print(run.run_dir, run.seed, run.probe.kind)\n"
        "if __name__ == '__main__':\n    sys.exit(command(TrainRun, body, ''))\n"
    )
    arguments = [sys.executable, str(script), "-m", "seed=2,3", "probe.kind=ridge"]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=300, cwd=here)
    assert ended.returncode == 2
    lines = [line for line in ended.stdout.splitlines() if line.startswith("runs/")]
    assert lines == ["runs/maze-layers-seed-3-kind-ridge 3 ridge"]
    told = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert told[0] == "error: seed=2: no" and "seed=2" in told[-1] and len(told) == 2
    assert sorted(path.name for path in here.rglob("*")) == ["print_run_dir.py", "runs"]


@pytest.mark.slow
def test_options_of_a_folder_of_ones_own(here, capsys):
    (here / "mine" / "probe").mkdir(parents=True)
    (here / "mine" / "probe" / "few.yaml").write_text("steps: '0'\nlayers: last\n")
    seen = []
    assert command(TrainRun, seen.append, "", ["--config-dir", str(here / "mine"), "probe=few"]) == 0
    assert (seen[0].probe.steps, seen[0].probe.layers, seen[0].run_dir) == ("0", "last", "runs/maze-few")
    for wrong, message in (("probe=fewer", r"probe=few\?.*few, frames, layers"), ("seed=x", "a whole number")):
        assert command(TrainRun, seen.append, "", ["--config-dir", str(here / "mine"), "probe=few", wrong]) == 2
        assert re.search(rf"^error: {wrong}: .*{message}", capsys.readouterr().err)
    assert command(TrainRun, seen.append, "", ["seed=4", "run_dir=runs/s-${seed}"]) == 0
    assert seen[1].run_dir == "runs/s-4"
    for flag in (["--info", "searchpath"], ["--cfg", "job", "-p", "probe"], ["--shell-completion", "install=bash"]):
        assert command(TrainRun, seen.append, "", flag) == 0, flag
        assert capsys.readouterr().out
    assert len(seen) == 2
