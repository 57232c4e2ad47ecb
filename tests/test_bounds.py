"""Numbers that are not finite, or that no run can use, are refused at once and by name."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from cosprobe.bounds import check_bounds
from cosprobe.config import EarlyConfig, PipelineConfig, PredictConfig, ProbeConfig, TrainerConfig, TrainRun, UseRun
from cosprobe.errors import InputError
from cosprobe.tasks import HideConfig, LineConfig, MazeConfig, SelectConfig
from cosprobe.tasks.task import distinct

NAN, INF = math.nan, math.inf


@dataclass
class Settings:
    some: object


@pytest.mark.parametrize("value", [1, 5, 2.5, None, [], [1, 5], [[1], [2, 3]]])
def test_what_is_within_its_bounds_passes(value):
    check_bounds("group.", Settings(value), some=(1, 5))


@pytest.mark.parametrize("value", [0, 6, NAN, INF, -INF, [1, 6], [[1], [NAN]], 10**400])
def test_what_is_outside_or_not_finite_is_refused_with_its_name_and_the_bounds(value):
    with pytest.raises(InputError, match=r"^group\.some=.*: expected 1 to 5$"):
        check_bounds("group.", Settings(value), some=(1, 5))


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [
        (PipelineConfig, {"guidance": NAN}, r"pipeline\.guidance=nan"),
        (PipelineConfig, {"guidance": INF}, r"pipeline\.guidance=inf"),
        (PipelineConfig, {"prompt_tokens": 100_000}, r"pipeline\.prompt_tokens=100000"),
        (ProbeConfig, {"penalties": [NAN, 0.1]}, r"probe\.penalties=\[nan, 0\.1\]"),
        (ProbeConfig, {"penalties": [INF]}, r"probe\.penalties=\[inf\]"),
        (ProbeConfig, {"lr": NAN}, r"probe\.lr=nan"),
        (ProbeConfig, {"memory": INF}, r"probe\.memory=inf"),
        (TrainerConfig, {"timeout": NAN}, r"trainer\.timeout=nan"),
        (TrainerConfig, {"precision": "bf16-true"}, r"trainer\.precision='bf16-true'"),
        (TrainerConfig, {"precision": "foo"}, r"trainer\.precision='foo'"),
        (EarlyConfig, {"risk": NAN}, r"use\.risk=nan"),
        (PredictConfig, {"problems": 10**12}, r"use\.problems=10+"),
        (TrainRun, {"seed": 2**32}, r"seed=4294967296"),
        (UseRun, {"seed": -1}, r"seed=-1"),
        *((family, {"problems": 10**12}, r"task\.problems=10+") for family in (MazeConfig, HideConfig, LineConfig)),
        *(
            (family, {"image_size": 10**6}, r"task\.image_size=10+")
            for family in (MazeConfig, SelectConfig, LineConfig)
        ),
        (MazeConfig, {"seeds": 10**9}, r"task\.seeds=10+"),
    ],
)
def test_settings_that_no_run_can_use_are_refused_before_it_begins(kind, settings, named):
    with pytest.raises(InputError, match=f"^{named}: expected"):
        kind(**settings)


def test_a_length_that_no_maze_has_or_that_is_never_drawn_ends_in_an_error():
    with pytest.raises(InputError, match=r"task\.length=\[63, 64\]: expected .* from 1 to 24"):
        MazeConfig(length=[63, 64])
    with pytest.raises(InputError, match=r"task\.problems=3.*\b0 distinct"):
        distinct(iter([None] * 50), "train", 3, patience=10)


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert PipelineConfig(path="~/wan", lora="~/lora").parts[1].as_posix() == "/home/me/lora"
    assert (TrainRun(run_dir="~/runs/a").run_dir, UseRun(run="~/runs/a").run) == ("/home/me/runs/a",) * 2
    assert TrainRun(store="~/store").store == "/home/me/store" and TrainRun().run_dir == ""
