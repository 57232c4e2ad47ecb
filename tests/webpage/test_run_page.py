"""The page of a run holds what is in its folder, and says what is missing, damaged or outdated."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape

import numpy as np
import pytest

from cosprobe import config
from cosprobe.errors import InputError
from cosprobe.evaluation import Grid
from cosprobe.files import write_json
from cosprobe.reporting import summarise
from cosprobe.webpage import gallery, write_run_page
from cosprobe.webpage import page as pages
from cosprobe.webpage.explanations import CHECKS, EDITS, TERMS
from cosprobe.webpage.grid_charts import colourings, curves, frame_maps, layer_map
from cosprobe.webpage.run_page import run_page
from cosprobe.webpage.sentences import sentences
from tests.examples.pages import COMMAND, SCRIPT, USES, grid, result

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return result(tmp_path_factory.mktemp("run") / "example")


@pytest.fixture(scope="module")
def text(folder):
    path = write_run_page(folder, COMMAND)
    assert path == folder / "report" / "report.html" and path.stat().st_size < 10_000_000
    return path.read_text(encoding="utf-8")


def plain(text: str) -> str:
    """What a reader sees of the HTML before the scripts."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", text.partition('<script type="application/json"')[0])).split())


def test_the_sentences_come_first_and_the_caveat_is_set_apart(folder, text):
    items = re.findall(r"<li( class=\"caveat\")?>(.*?)</li>", text.partition("<nav")[0])
    told = sentences(Grid.load(folder), f"`{SCRIPT}`", "maze")
    assert [plain(item) for _, item in items] == [plain(t.replace("<", "&lt;").replace("`", " ")) for t in told]
    assert [bool(mark) for mark, _ in items] == [False] * 4 + [True] and "Strongest caveat" in items[4][1]


def test_every_part_is_there_with_its_numbers(folder, text):
    seen = plain(text)
    for row in summarise(Grid.load(folder)):
        assert all(cell in seen for cell in row.cells())
    for part in (
        "x0-hat draws two", "It is a mean.", "length at most 3", "0.50 [0.25, 0.75]",
        "64 problems", "+0.30 [+0.10, +0.50]", "calibrated policy 0.125", "untested",
        "The policy is safe.", "Vote is not better.", "Noise replaces it.", "All 1 conditions",  "draw <script>",
        "candidate 0 at step 0 (probability 0.75) and candidate 1 at step 1 (probability 0.90)", COMMAND,
        "python probe.py use=early", "run_dir:", "random labels", "diffusers", "0123", "seed of",
    ):  # fmt: skip
        assert part in seen, part
    assert (folder / "config.yaml").read_text().splitlines()[3] in unescape(text)
    assert text.count("data:image/gif") == 1 and SCRIPT not in text
    assert "Not run" not in seen


def test_what_was_not_run_is_named_with_its_command(folder, tmp_path):
    bare = shutil.copytree(folder, tmp_path / "bare")
    for name in USES:
        shutil.rmtree(bare / "report" / name)
    seen = plain(write_run_page(bare, COMMAND).read_text(encoding="utf-8"))
    for name in ("early", "ensemble", "intervene", "film", "lengths", "tokens"):
        assert re.search(rf"Not run: .*?python probe\.py use={name} run=\S*bare", seen)
    assert "Interventions" not in seen and "Early answers" not in seen


def test_pictures_of_tokens_are_named_by_what_they_show_with_the_claim(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "tokens")
    place = other / "report" / "tokens"
    for name in ("temporal_energy", "components", "channel_variance", "cosine"):
        shutil.copy(place / "maze_1_energy.png", place / f"maze_1_{name}.png")
    claim = {"claim": "Path tokens are larger", "measure": "log ratio", "control": "the input", "value": -0.07,
             "lower": -0.09, "upper": -0.03, "verdict": "does not hold", "n": 17, "cells": {}}  # fmt: skip
    massive = {"0": {"tokens": 2, "of": 60, "channels": 1, "largest": 101.5},
               "1": {"tokens": 1, "of": 60, "channels": 3, "largest": 90.0}}  # fmt: skip
    said = {"runs": [{"massive": massive}, {"massive": massive}], "path": claim}
    write_json(place / "tokens.json", said)
    seen = plain(write_run_page(other, COMMAND).read_text(encoding="utf-8"))
    section = seen[seen.rindex("Single tokens") : seen.rindex("Behaviours")]
    starts = [section.index(text) for text in (
        "Energy: root mean square", "Temporal energy: the change", "Variance of a token", "Cosine between",
        "The first three principal components",
    )]  # fmt: skip
    assert starts == sorted(starts) and section.count("Sample maze_1 , tokens of the last") == 5
    for text in ("-0.07 [-0.09, -0.03]", "does not hold", "n = 17 problems", "6 of 240 tokens have some",
                 "102 times", "8 beyond", "orange outline", "shares of the variance"):  # fmt: skip
        assert text in section, text
    write_json(place / "tokens.json", said | {"path": None})
    assert "was not tested: too few problems" in plain(write_run_page(other, COMMAND).read_text(encoding="utf-8"))


def test_edits_and_checks_are_explained(folder, text):
    seen = plain(text)
    assert "x0-hat with new noise ( renoised )" in seen and "Top: share of videos that keep the answer" in seen
    assert all(meaning in seen for term, meaning in TERMS if "`" not in meaning)
    data = json.loads((folder / "report" / "summary.json").read_text())
    for name, *_ in data["checks"][1:]:
        assert name in CHECKS and all(plain(part.replace("`", " ")) in seen for part in CHECKS[name])
    assert set(EDITS) == set(config.EDITS)


def test_a_temperature_that_makes_calibration_worse_is_said(folder, tmp_path):
    other, of = shutil.copytree(folder, tmp_path / "worse"), Grid.load(folder)
    best = of.best("answer").cell
    at = {"target": "answer", "step": best.step, "layer": best.layer}
    for error, told in ((0.08, True), (0.01, False)):
        for name, value in (("ece", error), ("ece_raw", 0.05), ("temperature", 1.8)):
            of.dataset[name].loc[at] = value
        of.save(other / "report" / "grid.nc")
        seen = plain(write_run_page(other, COMMAND).read_text(encoding="utf-8"))
        assert ("calibration of answer worse: the error on test problems is 0.080 with T = 1.80, and 0.050" in
                seen.replace(" answer ", " answer ").replace("  ", " ")) == told  # fmt: skip


def test_damaged_outdated_and_unfinished_reports_are_said_to_be_so(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "report" / "early" / "early.json").write_text("{}")
    mark = other / "report" / "ensemble" / "finished.json"
    mark.unlink()
    (other / "report" / "summary.json").unlink()
    shutil.copy(folder / "report" / "grid.nc", other / "report" / "grid.nc")
    seen = plain(write_run_page(other, COMMAND).read_text(encoding="utf-8"))
    assert "early.json' is damaged" in seen and "report/ensemble is not complete" in seen
    assert "table of checks are missing" in seen
    data = Grid.load(other).dataset
    Grid(data.assign_attrs(provenance=json.dumps({"bank": "another"}))).save(other / "report" / "grid.nc")
    seen = plain(write_run_page(other, COMMAND).read_text(encoding="utf-8"))
    assert "report/film was made with other probes" in seen


def test_maps_of_answers_alone_are_shown_where_all_would_be_too_large(folder, tmp_path, monkeypatch):
    other = shutil.copytree(folder, tmp_path / "other")
    whole = write_run_page(other, COMMAND).stat().st_size
    monkeypatch.setattr(pages, "LARGEST", whole - 1000)
    text = write_run_page(other, COMMAND).read_text(encoding="utf-8")
    assert "too large; they are in others.png: start, control." in plain(text)
    assert text.count('<details class="numbers"') == 2 * 3  # two answers with three maps each


def test_a_folder_without_a_result_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"grid.*missing"):
        run_page(tmp_path, COMMAND)


# maps and curves


def test_a_map_has_the_numbers_of_its_target():
    of = grid()
    plane = of.plane("answer").transpose("layer", "step", ...)
    found = layer_map(of, "answer")
    for name, variable in (("accuracy", "accuracy"), ("lower", "lower"), ("skill", "skill"), ("p", "p_evidence")):
        np.testing.assert_array_equal(found.fields[name], plane[variable].values)
    np.testing.assert_array_equal(found.fields["x0"], plane.x0_accuracy.values[None])
    np.testing.assert_array_equal(found.fields["embed"], plane.baseline_accuracy.sel(baseline="embed").values[None])
    np.testing.assert_array_equal(found.struck, ~(plane.p_evidence.values <= 0.05))
    assert found.outlined.sum() == ((plane.p_x0 <= 0.05) & (plane.p_evidence <= 0.05)).sum() > 0
    best = of.best("answer").cell
    assert found.best == (best.layer, best.step) and f"layer {best.layer}, step {best.step}" in found.label
    assert f"{int((plane.p_evidence <= 0.05).sum())} of 20 cells" in found.caption


def test_no_star_and_no_comparison_where_there_is_none():
    of = grid()
    control, start = layer_map(of, "control"), layer_map(of, "start")
    assert control.best is None and "no evidence" in control.caption
    assert "not compared with x0-hat" in start.caption and not start.outlined.any()


def test_frames_are_shown_by_step_and_by_layer():
    of = grid()
    by_step, by_layer = frame_maps(of, "answer")
    best = of.best("answer").cell
    data = of.dataset.sel(target="answer")
    np.testing.assert_array_equal(
        by_step.fields["accuracy"], data.accuracy.sel(layer=best.layer).transpose("position", "step").values
    )
    np.testing.assert_array_equal(
        by_layer.fields["accuracy"], data.accuracy.sel(step=best.step).transpose("layer", "position").values
    )
    np.testing.assert_array_equal(by_step.fields["reference"], data.reference.transpose("position", "step").values)
    assert by_step.rows == by_layer.columns == ["all", "0", "1"]
    assert frame_maps(grid(positions=("all",)), "answer") == ()


def test_colours_can_be_compared_with_every_baseline_there_is():
    of = grid()
    found = colourings(of, ["answer", "start"])
    minus = {one.minus for one in found}
    assert {"", "chance", "x0", "noise", "difficulty", "embed", "x_t", "x0_latent", "x0_parsed"} == minus
    assert {one.minus for one in colourings(of, ["start"])} == {"", "chance", "x0"}


def test_curves_hold_accuracy_with_intervals_and_baselines():
    of = grid()
    chart, plane = curves(of, "answer"), of.plane("answer")
    traces = {trace.name: trace for trace in chart.figure.data if trace.name}
    best = of.best("answer").cell
    line = traces[f"layer {best.layer}"]
    np.testing.assert_allclose(line.y, plane.accuracy.sel(layer=best.layer))
    lower = float(plane.lower.sel(layer=best.layer, step=0))
    assert f"[{lower:.2f}" in line.text[0]
    parsed = plane.baseline_accuracy.sel(baseline="x0_parsed")
    assert len(traces["x0-hat: answer parsed from its video"].x) == int(parsed.notnull().sum())
    assert traces["x0-hat: answer parsed from its video"].mode == "markers"  # rings, no line between decoded steps
    assert {name for name, _, dashes in chart.keys if dashes == "ring"} == {"x0-hat: answer parsed from its video"}
    assert [name for name, *_ in chart.keys][-2:] == ["chance", "finished video"]
    np.testing.assert_allclose(traces["best input (the reference)"].y, plane.reference)
    assert traces["best input (the reference)"].line.dash == "dash"


def test_the_gallery_has_the_map_and_the_sentences_of_every_run(folder, tmp_path, capsys):
    mine = shutil.copytree(folder, tmp_path / "mine")
    (tmp_path / "figures").mkdir()
    text = gallery.page([("mine", mine), ("other", mine)], tmp_path / "figures")
    for told in sentences(Grid.load(mine), "in the package", "maze"):
        assert text.count(told) == 2
    for name in ("mine", "other"):
        assert f"figures/gallery-{name}.png" in text and f"## {name}\n" in text
        assert (tmp_path / "figures" / f"gallery-{name}.png").stat().st_size > 10_000
    gallery.main([str(tmp_path / "gallery.md"), f"mine={mine}", f"other={mine}"])
    assert (tmp_path / "gallery.md").read_text() == text
    (mine / "report" / "grid.nc").unlink()
    with pytest.raises(SystemExit):
        gallery.main([str(tmp_path / "none.md"), f"mine={mine}"])
    assert "is missing" in capsys.readouterr().err and not (tmp_path / "none.md").exists()
