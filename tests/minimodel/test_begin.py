"""A folder of a training says what its weights were made from, and is used for nothing else."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cosprobe.command import load, save_config
from cosprobe.config import AdapterConfig, FlowConfig, MiniConfig, PipelineConfig, TrainRun
from cosprobe.errors import InputError
from cosprobe.files import write_json
from cosprobe.locks import held
from cosprobe.minimodel.recipe import FORMAT, MADE_FROM, begin_training
from cosprobe.tasks import Maze
from tests.examples.pipelines import save_wan

MINI = load(TrainRun, ["experiment=mini_small"]).experiment
ADAPTER = AdapterConfig()
MODEL = PipelineConfig()


def test_the_same_training_goes_on_and_its_card_may_be_larger(tmp_path):
    begin_training(tmp_path, MINI, Maze(), MODEL)
    begin_training(tmp_path, MINI, Maze(), replace(MODEL, steps=7))
    begin_training(tmp_path, replace(MINI, card=[1, 1, 1], solve_every=3), Maze(), MODEL)
    assert [path.name for path in tmp_path.iterdir()] == [MADE_FROM]


def test_the_files_of_the_hold_are_no_obstacle(tmp_path):
    """`train.py` holds the folder before it begins."""
    for _ in range(2):
        with held(tmp_path / "run", "run_dir"):
            begin_training(tmp_path / "run", MINI, Maze(), MODEL)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [MADE_FROM]


@pytest.mark.parametrize(
    ("experiment", "task", "named"),
    [
        (replace(MINI, seed=1), Maze(), r"experiment\.seed=0, now experiment\.seed=1"),
        (replace(MINI, clips=[100]), Maze(), r"experiment\.clips=\[3072\]"),
        (replace(MINI, flow=replace(MINI.flow, lr=1e-4)), Maze(), r"experiment\.flow\.lr"),
        (MINI, Maze(seed=3), r"task\.maze\.seed=0, now task\.maze\.seed=3"),
        (replace(MINI, families=["maze"]), Maze(), r"experiment\.families"),
        (ADAPTER, Maze(), r"made with .*, now "),
    ],
)
def test_another_training_in_its_folder_is_refused(tmp_path, experiment, task, named):
    begin_training(tmp_path, MINI, Maze(), MODEL)
    before = (tmp_path / MADE_FROM).read_bytes()
    with pytest.raises(InputError, match=rf"run_dir: the training in .*{named}"):
        begin_training(tmp_path, experiment, task, MODEL)
    assert (tmp_path / MADE_FROM).read_bytes() == before


def test_other_weights_to_start_from_are_another_training(tmp_path):
    save_wan(tmp_path / "wan")
    other = PipelineConfig(path=str(tmp_path / "wan"))
    begin_training(tmp_path / "adapter", ADAPTER, Maze(), MODEL)
    with pytest.raises(InputError, match=r"made with model\.scheduler=.*, now model\.scheduler=.*model\.transformer"):
        begin_training(tmp_path / "adapter", ADAPTER, Maze(), other)
    begin_training(tmp_path / "mini", MINI, Maze(), MODEL)
    started = replace(MINI, autoencoder=replace(MINI.autoencoder, start=other.path))
    with pytest.raises(InputError, match=r"starts from model"):
        begin_training(tmp_path / "mini", started, Maze(), MODEL)


def test_a_training_of_an_earlier_version_is_named(tmp_path):
    begin_training(tmp_path, ADAPTER, Maze(), MODEL)
    made = json.loads((tmp_path / MADE_FROM).read_text())
    before = {name: value for name, value in made.items() if name not in ("format", "sha256")}
    write_json(tmp_path / MADE_FROM, before | {"model": "0123456789abcdef"})
    with pytest.raises(InputError, match=rf"{MADE_FROM}' has format 1, expected {FORMAT}.*run_dir"):
        begin_training(tmp_path, ADAPTER, Maze(), MODEL)


def test_a_folder_of_probes_or_of_anything_else_is_refused(tmp_path):
    save_config(load(TrainRun, []), tmp_path / "run" / "logistic")
    with pytest.raises(InputError, match=r"has results of probes, such as logistic"):
        begin_training(tmp_path / "run", MINI, Maze(), MODEL)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"is not empty"):
        begin_training(tmp_path / "mine", MINI, Maze(), MODEL)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flow": {"stages": []}}, r"experiment\.flow\.stages=\[\].*experiment\.flow\.start"),
        ({"flow": {"stages": [[5]]}}, r"experiment\.flow\.stages=\[\[5\]\]"),
        ({"flow": {"lr": float("nan")}}, r"experiment\.flow\.lr=nan"),
        ({"flow": {"dropout": 1.5}}, r"experiment\.flow\.dropout=1\.5"),
        ({"families": []}, r"experiment\.families=\[\]"),
        ({"lengths": []}, r"experiment\.lengths=\[\]"),
        ({"lengths": [6], "clips": [8]}, r"experiment\.lengths=\[6\].*4k \+ 1"),
        ({"clips": [0, 1, 1, 1]}, r"experiment\.clips=\[0, 1, 1, 1\]"),
    ],
)
def test_settings_that_would_train_nothing_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        MiniConfig(**(settings if "flow" not in settings else {"flow": FlowConfig(**settings["flow"])}))
