"""Settings: every file of configs/ composes, values are typed, and a run's settings can be read back."""

from __future__ import annotations

import hashlib
import re
import shlex
from dataclasses import fields
from itertools import product

import pytest
import yaml

from cosprobe.command import CONFIGS, MARK, describe, load, read_run, save_config, shell_command
from cosprobe.config import SCHEMAS, MiniConfig, PredictConfig, ProbeExperiment, TrainRun, UseRun
from cosprobe.errors import InputError
from cosprobe.tasks import MazeConfig

FILES = sorted(path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml"))
GROUPS = sorted({path.parent.name for path in FILES if path.parent.name})


def options(group: str) -> list[str]:
    return [path.stem for path in FILES if path.parent.name == group]


# what there is


@pytest.mark.slow
def test_top_level_names_are_frozen():
    """Others script against these: a new or missing one is a decision, not an accident."""
    assert [f.name for f in fields(TrainRun)] == [
        "task", "pipeline", "probe", "trainer", "experiment", "plan", "run_dir", "store", "seed",
    ]  # fmt: skip
    assert [f.name for f in fields(UseRun)] == ["use", "trainer", "run", "runs", "seed"]
    assert GROUPS == ["experiment", "pipeline", "probe", "task", "trainer", "use"]
    for name in ("layers", "steps", "pooling", "frames", "decode", "kind", "penalties", "random_weights"):
        assert hasattr(load(TrainRun, []).probe, name)


def test_files_hold_values_only():
    assert len(FILES) <= 40
    for path in FILES:
        text = (CONFIGS / path).read_text()
        assert "_target_" not in text, path
        assert path.parent.name == "" or "hydra" not in text, path


def test_groups_of_several_classes_have_a_file_per_class():
    for group, schemas in SCHEMAS.items():
        assert sorted(schemas) == options(group)


def wanted_globally(path) -> bool:
    """Whether the values of a file are settings of the command, not of its group."""
    return (CONFIGS / path).read_text().startswith("# @package _global_\n")


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name], ids=str)
def test_every_file_composes(path):
    root = UseRun if path.parent.name == "use" else TrainRun
    needed = ["run=somewhere"] if root is UseRun and not wanted_globally(path) else []
    needed += ["runs=[one,two]"] if path.stem == "compare" else []
    run = load(root, [f"{path.parent.name}={path.stem}", *needed])
    schemas = SCHEMAS.get(path.parent.name)
    if schemas:
        assert type(getattr(run, path.parent.name)) is schemas[path.stem]
    wanted = yaml.safe_load((CONFIGS / path).read_text())
    for name, value in wanted.items():
        if name != "defaults" and "${" not in str(value):
            whole = run if wanted_globally(path) else getattr(run, path.parent.name)
            found = getattr(whole, name)
            inside = value if isinstance(value, dict) else {}
            assert {key: getattr(found, key) for key in inside} == inside if inside else found == value


@pytest.mark.slow
@pytest.mark.parametrize("combination", list(product(*map(options, ("probe", "trainer", "experiment")))), ids=str)
def test_every_combination_composes(combination):
    probe, trainer, experiment = combination
    run = load(TrainRun, [f"probe={probe}", f"trainer={trainer}", f"experiment={experiment}"])
    assert run.probe.frames == (probe == "frames")
    assert run.trainer.accelerator == trainer


def test_defaults():
    run = load(TrainRun, [])
    assert run.task == MazeConfig()
    assert run.task.problems >= 600
    assert (run.pipeline.path, run.pipeline.steps, run.pipeline.guidance) == ("", 20, 1.0)
    assert (run.probe.layers, run.probe.steps, run.probe.pooling, run.probe.frames) == ("all", "all", "region", False)
    assert (run.trainer.accelerator, run.trainer.devices) == ("auto", "auto")
    assert run.experiment == ProbeExperiment()
    assert run.seed == 0
    assert load(UseRun, ["run=here"]) == UseRun(use=PredictConfig(), run="here")


def test_the_recipe_of_the_model_has_one_home():
    """configs/ repeats none of it: what ships was trained with the defaults of the dataclass."""
    assert load(TrainRun, ["experiment=mini"]).experiment == MiniConfig()
    assert load(TrainRun, ["experiment=mini", "seed=3"]).experiment == MiniConfig(seed=3)


# overrides


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argument", "group", "name", "value"),
    [
        ("task.problems=12", "task", "problems", 12),
        ("task.rooms=[4,5,5]", "task", "rooms", [4, 5, 5]),
        ("task.rooms=[4, 6]", "task", "rooms", [4, 6]),
        ("pipeline.path='a b/c=[1]'", "pipeline", "path", "a b/c=[1]"),
        ("pipeline.path=", "pipeline", "path", ""),
        ("pipeline.guidance=3", "pipeline", "guidance", 3.0),
        ("probe.steps='0,10,20'", "probe", "steps", "0,10,20"),  # without quotes it is a sweep
        ("probe.steps=1:30:5", "probe", "steps", "1:30:5"),  # 5405 in YAML 1.1
        ("probe.layers=3", "probe", "layers", "3"),
        ("probe.layers=last", "probe", "layers", "last"),
        ("probe.frames=true", "probe", "frames", True),
        ("probe.penalties=[1e-3,2]", "probe", "penalties", [1e-3, 2.0]),
        ("trainer.devices=2", "trainer", "devices", "2"),
        ("trainer.devices='0,2'", "trainer", "devices", "0,2"),
        ("trainer.precision=bf16-mixed", "trainer", "precision", "bf16-mixed"),
    ],
)
def test_overrides_are_read_by_the_type_of_the_option(argument, group, name, value):
    read = getattr(getattr(load(TrainRun, [argument]), group), name)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.slow
def test_nested_and_optional_settings():
    run = load(
        TrainRun, ["experiment=mini", "experiment.flow.warmup=7", "experiment.autoencoder.stages=[[1,2,3],[5,2,1]]"]
    )
    assert run.experiment.flow.warmup == 7
    assert run.experiment.autoencoder.steps == 4
    assert load(UseRun, ["run=x", "use.layer=5"]).use.layer == 5
    assert load(UseRun, ["run=x", "use.layer=5", "use.layer=null"]).use.layer is None


def test_the_last_override_counts():
    assert load(TrainRun, ["seed=1", "seed=2", "probe=frames", "probe=layers"]).seed == 2
    assert not load(TrainRun, ["probe=frames", "probe=layers"]).probe.frames


def test_a_group_keeps_the_overrides_around_it():
    run = load(TrainRun, ["probe.steps=last", "probe=frames"])
    assert (run.probe.steps, run.probe.frames) == ("last", True)


def test_the_model_draws_as_many_frames_as_the_reference_has():
    assert load(TrainRun, ["task.frames=5"]).pipeline.frames == 5
    assert load(TrainRun, ["task.frames=5", "pipeline.frames=9"]).pipeline.frames == 9


@pytest.mark.slow
def test_run_folder_follows_from_the_command():
    """Without a clock in its name, the same command finds its own run again, on every rank."""
    assert load(TrainRun, []).run_dir == "runs/maze-layers"
    assert load(TrainRun, ["probe=frames"]).run_dir == "runs/maze-frames"
    assert load(TrainRun, ["experiment=mini"]).run_dir == "runs/maze-mini"
    assert load(TrainRun, ["run_dir=elsewhere"]).run_dir == "elsewhere"
    assert load(TrainRun, ["seed=4", "task.rooms=[6]"]) == load(TrainRun, ["seed=4", "task.rooms=[6]"])


# help


def test_help_shows_purpose_groups_and_every_setting():
    text = describe(TrainRun, ["experiment=mini"], "What it is for.")
    assert text.startswith("What it is for.\n")
    assert "  probe       frames, layers*, tokens\n" in text
    assert "  experiment  lora, mini*, mini_small, probes\n" in text
    assert "\n  task.rooms=[4, 5]\n" in text
    assert "\n  probe.frames=false\n      With `region`" in text
    assert f"\n  experiment.flow.warmup={MiniConfig().flow.warmup}\n" in text
    text = describe(UseRun, [], "")
    assert "\n  run=(needed)\n" in text
    assert "\n  use.layer=null\n" in text


# settings of a run on disk


@pytest.mark.slow
@pytest.mark.parametrize("experiment", options("experiment"))
def test_settings_are_read_back_as_they_were(tmp_path, experiment):
    run = load(TrainRun, [f"experiment={experiment}", "task.rooms=[5]", "probe.steps=0:9:2", f"run_dir={tmp_path}"])
    path = save_config(run, tmp_path / "new" / "run")
    assert path == tmp_path / "new" / "run" / "config.yaml"
    assert [p.name for p in path.parent.iterdir()] == ["config.yaml"]
    assert read_run(path.parent) == run
    assert "${" not in path.read_text()
    assert save_config(run, path.parent).read_text() == path.read_text()


@pytest.mark.parametrize(
    ("root", "overrides"),
    [
        (TrainRun, []),
        (TrainRun, ["task=select", "task.problems=90", "probe=frames", "probe.penalties=[1,2.5]", "run_dir='my run'"]),
        (TrainRun, ["pipeline=wan2_2_i2v_a14b", "pipeline.negative_prompt='it\\'s \"blurred\", 5 % = $1 `x` !\\\\'"]),
        (TrainRun, ["run_dir='true'", "pipeline.path='1e3'", "trainer=cpu", "trainer.limit_predict_batches=2"]),
        (TrainRun, ["experiment=mini_small", "seed=5", "run_dir='é/ü\\\\'"]),
        (UseRun, ["use=intervene", "run=runs/x", "use.steps='0,5'", "use.doses=[0.1,1]"]),
        (UseRun, ["use=film", "run=x", "use.image=a.png", "use.prompt='draw, a (line)'"]),
        (UseRun, ["use=predict", "run=/a/b-1.5", "use.layer=3"]),
    ],
)
def test_the_command_of_settings_gives_them_again(root, overrides):
    run = load(root, overrides)
    program, script, *words = shlex.split(shell_command(run))
    assert (program, script) == ("python", f"{root.entry}.py")
    assert load(root, words) == run


def test_the_command_names_what_differs_from_the_defaults():
    words = shlex.split(shell_command(load(TrainRun, ["seed=3", "task=hide"])))
    assert "task=hide" in words and "seed=3" in words and "run_dir=runs/hide-layers" in words
    assert not any(word.startswith(("trainer.", "probe.", "store=")) for word in words)


def test_a_run_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ValueError, match=r"^run_dir='.*/taken'.*file.*folder"):
        save_config(load(TrainRun, []), tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("content", ["", "seed: [", "seed: 3\n", "- 3\n", "\x00\xff", f"{MARK}0\nseed: 3\n"])
def test_damaged_and_edited_settings_are_refused(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=rf"\Arun={str(tmp_path)!r}: config\.yaml is damaged, was edited.*\Z"):
        read_run(tmp_path)


def test_every_letter_of_saved_settings_counts(tmp_path, rng):
    path = save_config(load(TrainRun, []), tmp_path)
    whole = path.read_bytes()
    for at in rng.choice(len(whole) * 8, 200, replace=False):
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"config\.yaml"):
            read_run(tmp_path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"config\.yaml"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("seed: 3\n", "groups"),
        ("groups: {task: sudoku}\n", "sudoku"),
        ("groups: {task: maze, experiment: probes}\nsed: 3\n", "sed"),
        ("groups: {task: maze, experiment: probes}\nseed: x\n", "x"),
    ],
)
def test_settings_of_another_version_are_named(tmp_path, content, reason):
    checksum = hashlib.sha256(content.encode()).hexdigest()
    (tmp_path / "config.yaml").write_text(f"{MARK}{checksum}\n{content}")
    named = re.escape(f"run={str(tmp_path)!r}")
    with pytest.raises(ValueError, match=rf"\A{named}.*config\.yaml.*\(.*{re.escape(reason)}.*\Z"):  # one line
        read_run(tmp_path)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"^{re.escape(f'run={str(tmp_path)!r}')}.*train\.py.*config\.yaml"):
        read_run(tmp_path)
