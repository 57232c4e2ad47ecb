"""Maps of several runs in one picture: each run's own numbers, under its own name."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.collections import QuadMesh
from PIL import Image

from cosprobe.evaluation.scoring import build_grid
from cosprobe.reporting.compare import main, named
from cosprobe.reporting.figures import maps, side_by_side
from tests.examples.figures import apart, check_words
from tests.examples.grids import ANSWER, CONTROL, MODEL_ANSWER, synthetic


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("base", "adapted")):
        build_grid(synthetic(steps=6 + seed, targets=(ANSWER, MODEL_ANSWER, CONTROL)), draws=100).save(
            folder / name / "report" / "grid.nc"
        )
    return folder


def skills(figure) -> list[np.ndarray]:
    meshes = [c for axes in figure.axes if axes.get_xlabel() for c in axes.collections if type(c) is QuadMesh]
    return [np.ma.filled(mesh.get_array(), np.nan) for mesh in meshes]


@pytest.mark.slow
def test_each_map_is_that_of_its_run_and_target(runs):
    shown = [named(f"{runs / 'base'}"), named(f"tuned={runs / 'adapted'}:model_answer")]
    assert [(name, target) for name, _, target in shown] == [("base", "answer"), ("tuned", "model_answer")]
    figure = side_by_side(shown)
    for values, (_, grid, target) in zip(skills(figure), shown, strict=True):
        plane = grid.plane(target)
        expected = plane.skill.where(plane.p_evidence <= 0.05).transpose("layer", "step").values
        np.testing.assert_array_equal(values, expected)
        assert np.isfinite(values).any()
    words = [axes.get_title(loc="left") for axes in figure.axes if axes.get_xlabel()]
    assert words[0].startswith("base: ") and words[1].startswith("tuned: ")
    assert apart(list(check_words(figure).values()))


def test_maps_of_one_grid_have_no_name_before_them(runs):
    _, grid, _ = named(str(runs / "base"))
    (title,) = [axes.get_title(loc="left") for axes in maps(grid, ["answer"]).axes if axes.get_xlabel()]
    assert title.startswith("$")


@pytest.mark.slow
def test_command_draws_the_picture_or_names_what_is_missing(runs, tmp_path, capsys):
    with rc_context({"savefig.dpi": "figure"}):  # not that of tests/matplotlibrc
        main([str(tmp_path / "maps.png"), str(runs / "base"), str(runs / "adapted")])
    assert Image.open(tmp_path / "maps.png").width >= 800
    for run, words in (
        (f"{runs / 'base'}:tea", ("'tea'", "answer, model_answer, control")),
        (f"{tmp_path / 'none'}", (str(tmp_path / "none"), "grid.nc")),
    ):
        with pytest.raises(SystemExit):
            main([str(tmp_path / "other.png"), run])
        said = " ".join(capsys.readouterr().err.split())  # argparse breaks lines
        assert all(word in said for word in words), said
    assert not (tmp_path / "other.png").exists()
    for file, words in (("nowhere/maps.png", "No such file or directory"), ("maps.tea", "tea")):
        with pytest.raises(SystemExit):
            main([str(tmp_path / file), str(runs / "base")])
        assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["maps.png"]
