"""Differences between runs, against brute force and planted ones."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cosprobe.cells import Cell
from cosprobe.comparison import RunResult, compare
from cosprobe.comparison.differences import ProblemShares, TargetResult, matched
from cosprobe.comparison.page import cell_map, said
from cosprobe.comparison.report import folder_name, names, write_comparison
from cosprobe.config import CompareConfig, PredictConfig, UseRun
from cosprobe.errors import InputError
from cosprobe.evaluation import difference_interval
from cosprobe.tasks import Target

ANSWER = Target("answer", 4, "candidate", "answer", ("one",))
COLOUR = Target("colour", 2, "problem", "perception", ("one",))


def grid(steps=4, layers=3, positions=("all",)):
    return tuple(Cell(s, k, "cond", p) for s in range(steps) for k in range(layers) for p in positions)


def run(name, right, keys=None, target=ANSWER, cells=None, depth=3, total=4, video=None):
    """right: [cell problem]."""
    cells = cells or grid()
    keys = np.array([f"p{i:03d}" for i in range(right.shape[1])]) if keys is None else keys
    result = TargetResult(target, ProblemShares.of(right, keys), right.mean(axis=1))
    shown = None if video is None else ProblemShares.of(video[None], keys)
    return RunResult(name, depth, total, cells, {target.name: result}, shown)


def at(found, step, layer):
    return found.cells.sel(target="answer", step=step, layer=layer, branch="cond", position="all")


def test_a_planted_difference_is_found_where_it_is(rng):
    base = (rng.random((12, 90)) < 0.5).astype(float)
    other = base.copy()
    other[5] = 1.0  # step 1, layer 2
    other[7] = 0.0  # step 2, layer 1
    found = compare(run("a", base), run("b", other))
    assert found.count("answer") == (1, 1, 12) and found.paired
    p = found.cells.p.sel(target="answer").squeeze()
    assert {tuple(where) for where in np.argwhere(p.values <= 0.05)} == {(1, 2), (2, 1)}
    assert float(at(found, 1, 2).difference) == pytest.approx(1 - base[5].mean())
    lower, upper = difference_interval(other[5:6] - base[5:6], np.arange(90))
    assert (float(at(found, 1, 2).lower), float(at(found, 1, 2).upper)) == (lower[0], upper[0])
    assert any("more accurate in 1 and less accurate in 1 of 12" in line for line in said(found))


def test_nothing_is_found_between_runs_that_are_equally_good(rng):
    base, other = ((rng.random((12, 60)) < 0.6).astype(float) for _ in range(2))
    assert compare(run("a", base), run("b", other)).count("answer")[:2] == (0, 0)
    same = compare(run("a", base), run("b", base))
    assert (same.cells.difference == 0).all() and (same.cells.p == 1).all()
    assert "no evidence of a difference" in " ".join(said(same))


def test_shared_problems_are_paired_by_name_and_others_are_left_out(rng):
    """Brute force, with samples in another order, two samples for some problems, and problems of one run only."""
    keys = np.repeat([f"p{i:02d}" for i in range(30)], 2)
    right = (rng.random((12, 60)) < 0.5).astype(float)
    mixed = rng.permutation(60)
    fewer = np.array([f"p{i:02d}" for i in range(40, 9, -1)])
    one, two = right[:, mixed], (rng.random((12, len(fewer))) < 0.5).astype(float)
    found = compare(run("a", one, keys[mixed]), run("b", two, fewer))
    shared = [f"p{i:02d}" for i in range(10, 30)]
    mine = np.mean([right[3][keys == name].mean() for name in shared])
    theirs = np.mean([two[3][fewer == name].mean() for name in shared])
    cell = at(found, 1, 0)
    assert int(cell.n) == 20
    assert (float(cell.base), float(cell.other)) == (pytest.approx(mine), pytest.approx(theirs))


def test_runs_without_shared_problems_get_wider_intervals_and_no_p(rng):
    base, other = (rng.random((12, 50)) < 0.3).astype(float), (rng.random((12, 50)) < 0.8).astype(float)
    keys = np.array([f"q{i:02d}" for i in range(50)])
    apart = compare(run("a", base), run("b", other, keys))
    assert not apart.paired and np.isnan(apart.cells.p).all()
    assert (apart.cells.lower < apart.cells.difference).all() and (apart.cells.difference < apart.cells.upper).all()
    assert "fewer than 12 test problems" in " ".join(said(apart))


@pytest.mark.parametrize(
    ("steps", "layers", "expected"),
    [
        ((4, 4), (3, 3), [((s, k), (s, k)) for s in range(4) for k in range(3)]),
        ((4, 8), (3, 3), [((s, k), (2 * s, k)) for s in range(4) for k in range(3)]),
        ((8, 4), (3, 3), [((2 * s, k), (s, k)) for s in range(4) for k in range(3)]),
        ((4, 4), (3, 6), [((s, k), (s, 2 * k + 1)) for s in range(4) for k in range(3)]),
    ],
)
def test_cells_are_matched_by_the_share_of_steps_and_blocks(rng, steps, layers, expected):
    one, two = (
        run(name, np.ones((s * k, 20)), cells=grid(s, k), depth=k, total=s)
        for name, s, k in zip("ab", steps, layers, strict=True)
    )
    pairs = [
        ((one.cells[i].step, one.cells[i].layer), (two.cells[j].step, two.cells[j].layer)) for i, j in matched(one, two)
    ]
    assert sorted(pairs) == sorted(expected)
    found = compare(one, two).cells
    assert found.other_step.values.tolist() == sorted({theirs[0] for _, theirs in expected})


def test_best_cells_are_chosen_on_validation_and_videos_compared(rng):
    base, other = (rng.random((2, 12, 40)) < 0.5).astype(float)
    base[3], other[8] = 1.0, 1.0
    video = np.ones(40)
    video[:10] = 0
    rows = {row.what: row for row in compare(run("a", base, video=video), run("b", other, video=np.ones(40))).rows}
    assert rows["best cell of answer"].difference == 0 and rows["finished video"].difference == pytest.approx(0.25)
    assert rows["finished video"].lower > 0


def test_what_cannot_be_compared_is_named_or_refused(rng):
    base = np.ones((12, 20))
    with pytest.raises(InputError, match=r"a and b.*target"):
        compare(run("a", base), run("b", base, target=COLOUR))
    both = run("a", base)
    both.targets["colour"] = run("a", base, target=COLOUR).targets["colour"]
    assert any("colour" in reason and "a" in reason for reason in compare(both, run("b", base)).not_compared)
    other = Target("answer", 3, "candidate", "answer", ("one",))
    with pytest.raises(InputError, match="target"):
        compare(run("a", base), run("b", base, target=other))
    with pytest.raises(InputError, match="cell"):
        compare(run("a", base), run("b", base, cells=tuple(Cell(c.step, c.layer, "cond", "0") for c in grid())))


@pytest.mark.slow
def test_the_report_holds_the_numbers(tmp_path, rng):
    base, other = ((rng.random((12, 60)) < share).astype(float) for share in (0.4, 0.8))
    found = compare(run("a", base), run("b x", other))
    runs, command = [tmp_path, tmp_path / "<b>"], "python probe.py <c>"
    place = write_comparison([found], [[("pipeline.steps", "20", "5")]], runs, command)
    assert place.name == "compare-b-x"
    assert {path.name for path in place.iterdir()} == {
        "b-x.nc",
        "b-x.png",
        "compare.json",
        "compare.md",
        "compare.html",
    }
    text = (place / "compare.md").read_text()
    row = found.rows[0]
    assert f"{row.difference:+.2f} [{row.lower:+.2f}, {row.upper:+.2f}]" in text
    assert "| pipeline.steps | 20 | 5 |" in text
    html = (place / "compare.html").read_text()
    assert f"{row.difference:+.2f} [{row.lower:+.2f}, {row.upper:+.2f}]" in html and "/&lt;b&gt;" in html
    assert "python probe.py &lt;c&gt;" in html and "Strongest caveat" in html
    assert all(sentence.replace("'", "&#39;") in html for sentence in said(found))
    written = json.loads((place / "compare.json").read_text())["compared"][0]
    assert written["rows"][0]["difference"] == pytest.approx(row.difference)


def test_names_tell_runs_apart(tmp_path):
    assert names([tmp_path / "a" / "logistic", tmp_path / "b" / "logistic"]) == ["a", "b"]
    assert names([tmp_path / "a" / "logistic", tmp_path / "a" / "ridge"]) == ["a logistic", "a ridge"]
    assert len(folder_name([f"a long name of a run {i}" for i in range(9)])) < 80


def test_settings_of_a_comparison(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    both = UseRun(CompareConfig(), run="", runs=[f"{tmp_path}/*"])
    assert both.runs == [str(tmp_path / "one"), str(tmp_path / "two")]
    for use, runs, match in (
        (CompareConfig(), ["x"], "two or more"),
        (CompareConfig(), ["x", "x"], "different"),
        (CompareConfig(), [f"{tmp_path}/t*e"], "fits no folder"),
        (PredictConfig(), ["x", "y"], "use=compare"),
    ):
        with pytest.raises(InputError, match=match):
            UseRun(use, run="", runs=runs)


def test_cells_that_were_not_tested_are_not_struck_through(rng):
    base, other = ((rng.random((12, 50)) < 0.5).astype(float) for _ in range(2))
    keys = np.array([f"q{i:02d}" for i in range(50)])
    apart, paired = compare(run("a", base), run("b", other, keys)), compare(run("a", base), run("b", base))
    assert not cell_map(apart, "answer").struck.any() and cell_map(paired, "answer").struck.all()
