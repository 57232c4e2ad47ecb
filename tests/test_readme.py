"""Every command that the README and the docs show is read, every snippet is run, and what the commands name is there.

`make docs` also runs every command, at a smaller size: minutes on the model in the package. What they do that the runs
of other tests don't, the tests of `make test` do on a toy model.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch.distributed.run
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

import probe
import train
from cosprobe import Grid
from cosprobe.command import command
from cosprobe.config import TrainRun, UseRun
from cosprobe.ensembles import comparison as seeds
from cosprobe.evaluation import variables
from cosprobe.evaluation.checks import suite as checks
from cosprobe.evaluation.variables import BASELINES
from cosprobe.runs import find_result
from tests.examples.folders import write
from tests.examples.pipelines import save_wan
from tests.examples.shapes import unchecked

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LESS = {
    "predict": ["use.step=1", "use.problems=2"],
    "early": ["use.calibration=59", "use.problems=2"],
    "ensemble": [],
    "behaviour": [],
    "compare": [],
    "film": ["use.steps='0,2'"],
    "tokens": ["use.layers=0"],
    "lengths": ["use.problems=2", "use.frames=[9]", "use.steps=[2]"],
    "intervene": ["use.problems=6", "use.steps=0", "use.layers=3"],
}
SMALL = ["task.problems=24", "pipeline.steps=3", "probe.epochs=3", "pipeline.batch=8"]


def blocks(language):
    for page in PAGES:
        yield from re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def commands():
    lines = {line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()}
    return sorted(line for line in lines if line and not line.startswith("#"))


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text()
    for line in commands():
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", makefile, flags=re.MULTILINE), line


def test_every_link_and_figure_exists():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_safeguard_names_what_the_grid_holds():
    rows = [line for line in (ROOT / "docs" / "claims.md").read_text().splitlines() if line.startswith("| ")]
    table = rows[: next(i for i, row in enumerate(rows) if row.startswith("| claim"))]
    known = {*variables.MEANING, *checks.MEANING, *BASELINES, "control", "transfer_step", "transfer_layer"}
    known |= {f"weights_{end}" for end in ("accuracy", "lower", "upper")} | {"_lower", "_upper"}
    names = {name for row in table for name in re.findall(r"`([a-z0-9_]+)`", row.split("|")[3])}
    assert len(names) > 40 and names <= known, names - known


def scripts():
    """Script and arguments of every command of ours; those that use a run come last."""
    shown = [shlex.split(line)[1:] for line in commands() if line.startswith("python ")]
    assert {script for script, *_ in shown} == {"train.py", "probe.py"}
    return sorted(shown, key=lambda words: words[0] == "probe.py")


def started_by(launcher):
    """What a launcher is given in each line that it begins, the script, and its settings."""
    for words in (shlex.split(line) for line in commands() if line.startswith(f"{launcher} ")):
        at = words.index("train.py")
        yield [word for word in words[1:at] if word != "python"], words[at + 1 :]


def understood(settings):
    runs = []
    assert command(TrainRun, runs.append, "", settings) == 0, settings
    return runs[0].trainer


def test_torchrun_starts_as_many_processes_as_the_settings_name(monkeypatch):
    shown = list(started_by("torchrun"))
    assert len(shown) == 2
    for options, settings in shown:
        asked = torch.distributed.run.get_args_parser().parse_args([*options, "train.py", *settings])
        nodes, trainer = int(asked.nnodes.split(":")[-1]), understood(settings)
        assert nodes == trainer.num_nodes and asked.training_script_args == settings
        monkeypatch.setenv("WORLD_SIZE", str(nodes * int(asked.nproc_per_node)))
        TorchElasticEnvironment().validate_settings(int(trainer.devices), trainer.num_nodes)


def test_a_job_of_slurm_starts_as_many_processes_as_the_settings_name(monkeypatch):
    (job,) = (block for block in blocks("bash") if "#SBATCH" in block)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", job, flags=re.MULTILINE))
    ((flags, settings),) = started_by("srun")
    assert job.startswith("#!/bin/bash\n") and flags == ["--kill-on-bad-exit=1"] and options["job-name"] != "bash"
    tasks, nodes = options["ntasks-per-node"], options["nodes"]
    given = {"SLURM_NTASKS_PER_NODE": tasks, "SLURM_NNODES": nodes, "SLURM_JOB_NAME": options["job-name"]}
    for name, value in (given | {"SLURM_NTASKS": str(int(tasks) * int(nodes))}).items():
        monkeypatch.setenv(name, value)
    trainer = understood(settings)
    SLURMEnvironment().validate_settings(int(trainer.devices), trainer.num_nodes)
    assert options["gpus-per-node"] == trainer.devices


@pytest.mark.slow
def test_every_command_is_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = []
    for script, *settings in scripts():
        if "--help" in settings or "--cfg" in settings:
            assert {"train.py": train, "probe.py": probe}[script].main(settings) == 0
        else:
            root = {"train.py": TrainRun, "probe.py": UseRun}[script]
            assert command(root, runs.append, "", settings) == 0, settings
    made = {run.run_dir for run in runs if isinstance(run, TrainRun)}
    assert made >= {folder for run in runs if isinstance(run, UseRun) for folder in run.runs or [run.run]}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.docs
@pytest.mark.parametrize(
    ("settings", "positions"),
    [
        (["task=select", "probe=frames", "probe.kind=ridge", "probe.steps='0,2'"], 3),
        (["task=hide", "probe.random_weights=0", "pipeline.steps=2"], 1),
    ],
    ids=["frames and ridge", "another family"],
)
def test_the_ways_to_run_that_they_show_end_in_a_grid(tmp_path, settings, positions):
    save_wan(tmp_path / "wan")
    toy = [f"pipeline.path={tmp_path / 'wan'}", "pipeline.frames=5", "task.frames=5"]
    with unchecked():
        assert train.main([*toy, *SMALL, *settings, f"run_dir={tmp_path / 'run'}"]) == 0
    grid = Grid.load(tmp_path / "run").dataset
    assert grid.sizes["position"] == positions and grid.accuracy.notnull().all()
    assert (find_result(tmp_path / "run") / "report" / "summary.md").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.docs
def test_every_command_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f"problems/{number:03d}" for number in range(60)]  # what docs/data.md speaks of
    rows = [f"{name}/first_frame.png,prompt,{number % 3}" for number, name in enumerate(names)]
    for number, name in enumerate(names):
        write(tmp_path / name, number)
    (tmp_path / "problems.csv").write_text("\n".join(["image,prompt,answer", *rows]))
    monkeypatch.setitem(seeds.SIZES, "quick", seeds.Size(3, 2, 4, ("middle", "all"), ((0,),), (3,)))
    for script, *settings in scripts():
        if "--help" in settings or "--cfg" in settings:
            continue
        if any(setting.startswith("experiment=") for setting in settings):  # their own tests train them
            continue
        if any(setting.startswith("pipeline=") for setting in settings):  # models that are not on this machine
            continue
        if script == "train.py":
            keys = {setting.split("=")[0] for setting in settings}
            fewer = ["probe.steps='0,2'"] if "probe.steps" in keys else []
            assert train.main([*settings, *SMALL, *fewer]) == 0, settings
        else:
            use = next(setting.partition("=")[2] for setting in settings if setting.startswith("use="))
            assert probe.main([*settings, *LESS[use]]) == 0, settings


@pytest.mark.slow
def test_every_snippet_runs(tmp_path, monkeypatch):
    """The snippets of a page share their names, as for someone who reads it from top to bottom."""
    monkeypatch.chdir(tmp_path)
    assert any(snippets(page) for page in PAGES)
    for page in PAGES:
        names = {}
        for block in snippets(page):
            fewer = block.replace('problems("test", 80)', 'problems("test", 40)').replace("steps=8", "steps=4")
            with unchecked():
                exec(compile(fewer, f"snippet of {page.name}", "exec"), names)


def snippets(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
