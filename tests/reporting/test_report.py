"""The report: every number it prints is the grid's, and every file it names exists."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cosprobe.cells import INPUTS
from cosprobe.evaluation.checks.suite import Checks
from cosprobe.evaluation.grid import Grid
from cosprobe.evaluation.scoring import build_grid
from cosprobe.evaluation.variables import GUESSES
from cosprobe.reporting import report
from cosprobe.reporting.report import write_report
from cosprobe.reporting.summary import (
    FRAMES_CAPTION,
    check_table,
    ground,
    print_summary,
    remarks,
    summarise,
    summary_markdown,
)
from cosprobe.reporting.tensorboard import log_tensorboard
from tests.examples.films import film
from tests.examples.grids import ANSWER, CONTROL, MODEL_ANSWER, START, reading, synthetic
from tests.examples.runs import examined, small, world
from tests.examples.runs import run as small_run

pytestmark = pytest.mark.slow  # what all of them read takes seconds to make

FIGURES = {"headline.png", "curves.png", "others.png", "film.png"}
NOTHING = Checks({}, (), (), (), {}, None, ())
PROVENANCE = {"probe": {"kind": "logistic", "penalties": [0.1, 1.0]}, "seed": 3}


@pytest.fixture(scope="module")
def grid() -> Grid:
    evaluated = synthetic(3, 4, 120, targets=(ANSWER, MODEL_ANSWER, START, CONTROL))
    return build_grid(evaluated, draws=100, provenance=PROVENANCE)


@pytest.fixture(scope="module")
def run(grid, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    assert write_report(grid, NOTHING, run, film()) == run / "report"
    return run


def printed(grid: Grid, run: Path, checks: Checks = NOTHING) -> str:
    out = StringIO()
    print_summary(grid, checks, run, Console(file=out, width=80))
    return out.getvalue()


def test_report_holds_grid_summary_and_figures_and_nothing_half_written(grid, run):
    assert {p.name for p in (run / "report").iterdir()} == {"grid.nc", "summary.json", "summary.md"} | FIGURES
    for name in FIGURES:
        assert (run / "report" / name).read_bytes().startswith(b"\x89PNG")
    assert Grid.load(run).best("answer") == grid.best("answer")
    text = (run / "report" / "summary.md").read_text()
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", text)) == FIGURES
    assert "* `probe.kind`: logistic" in text
    assert "* `seed`: 3" in text


def test_a_grid_with_several_positions_gets_frame_maps(tmp_path):
    framed = build_grid(synthetic(2, 2, 60, positions=("all", "0", "1"), targets=(ANSWER,)), draws=30)
    folder = write_report(framed, NOTHING, tmp_path)
    assert {p.name for p in folder.iterdir()} == {
        "grid.nc", "summary.json", "summary.md", "headline.png", "curves.png", "frames_answer.png",
    }  # fmt: skip
    assert FRAMES_CAPTION.format("`answer`") in (folder / "summary.md").read_text()
    assert "position " in summarise(framed)[0].where


def test_a_kill_while_drawing_leaves_no_summary_and_no_half_figure(grid, tmp_path, monkeypatch):
    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "curves", broken)
    with pytest.raises(KeyboardInterrupt):
        write_report(grid, NOTHING, tmp_path)
    assert {p.name for p in (tmp_path / "report").iterdir()} == {"grid.nc", "headline.png"}


def test_summary_rows_are_the_grids_numbers(grid):
    for row in summarise(grid):
        target, cell = row.best.target, row.best.cell
        plane = grid.dataset.sel(target=target, step=cell.step, position=cell.position)
        baselines = plane.baseline_accuracy
        assert row.best == grid.best(target)
        assert row.chance == float(plane.chance)
        assert row.inputs[0] == float(baselines.sel(baseline=row.inputs[1]))
        cross = plane.baseline_cross_validation.sel(baseline=list(INPUTS))
        if np.isfinite(cross).any():
            best = str(cross.baseline.values[int(np.nan_to_num(cross.values, nan=-1).argmax())])
            below = float(baselines.sel(baseline=best)) < row.chance
            assert row.inputs[1] == best if not below else row.inputs[1] in GUESSES
        else:
            assert row.inputs[1] in GUESSES and row.cells()[4] == "-"  # a guess is no input
        np.testing.assert_equal(row.x0, (float(plane.x0_accuracy), str(plane.x0_source.values)))
        assert (row.samples, row.problems) == (120, 120)
        assert row.found == (row.best.p <= 0.05)


def test_targets_without_evidence_say_so(grid):
    lines = {
        line.split("|")[1].strip(): line
        for line in summary_markdown(grid, NOTHING).splitlines()
        if line.startswith("| ")
    }
    best = grid.best("answer")
    assert f"| {best.accuracy:.2f} [{best.lower:.2f}, {best.upper:.2f}] |" in lines["answer"]
    assert f"| p = {best.p:.3f} |" in lines["answer"]
    assert "| no evidence |" in lines["control"]
    weak = grid.dataset.copy(deep=True)
    weak.p_evidence.loc[{"target": "answer"}] = 0.051
    assert not summarise(Grid(weak))[0].found
    assert "no evidence" in summarise(Grid(weak))[0].cells()
    where = f"layer {best.cell.layer}, step {best.cell.step}"
    assert any(where in line for line in remarks(grid, NOTHING))
    assert not any(where in line for line in remarks(Grid(weak), NOTHING))


def test_remarks_tell_model_accuracy_samples_left_out_and_control(grid):
    text = "\n".join(remarks(grid, NOTHING))
    own, lower, upper = (grid.dataset.attrs[f"model_accuracy{end}"] for end in ("", "_lower", "_upper"))
    assert f"{own:.2f} [{lower:.2f}, {upper:.2f}]" in text
    best = grid.best("answer")
    assert re.search(rf"answer.*layer {best.cell.layer}, step {best.cell.step}.*{best.accuracy:.2f}", text)
    assert re.search(r"^model_answer.*\b7 samples", text, re.MULTILINE)
    (good,) = (line for line in text.splitlines() if line.startswith("control"))
    assert re.search(r"\b0 cells", good)
    false = grid.dataset.copy(deep=True)
    false.p_permutation.loc[{"target": "control", "layer": 1}] = 0.01
    (bad,) = (line for line in remarks(Grid(false), NOTHING) if line.startswith("control"))
    assert re.search(r"\b4 cells", bad)
    assert bad.partition("4 cells")[2] != good.partition("0 cells")[2]  # one is as it should be, the other is not


def test_printed_table_is_aligned_and_whole_where_there_is_no_terminal(grid, run):
    lines = printed(grid, run).splitlines()
    header = next(line for line in lines if "best cell" in line)
    rows = [next(line for line in lines if line.strip().startswith(target)) for target in grid.targets]
    for row, line in zip(summarise(grid), rows, strict=True):
        words = row.cells()
        assert all(word in line for word in words)
        for name, word in (("best cell", words[1]), ("accuracy [95 %]", words[2]), ("evidence", words[6])):
            assert line.index(word) == header.index(name)


def test_printed_paths_are_never_broken(grid, tmp_path):
    deep = tmp_path / ("a-very-long-name-" * 12)
    text = printed(grid, deep)
    assert f"{deep}/report/report.html\n" in text and f"{deep}/report/summary.md\n" in text
    assert f"tensorboard --logdir {deep}/tensorboard\n" in text


# with checks


def test_a_run_with_checks_reports_them(tmp_path):
    made = small_run()
    folder = write_report(made.grid, made.checks, tmp_path)
    figures = {"headline.png", "curves.png", "others.png", "checks.png", "generalisation.png"}
    assert {p.name for p in folder.iterdir()} == {"grid.nc", "summary.json", "summary.md"} | figures
    text = (folder / "summary.md").read_text()
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", text)) == figures
    head, rows = check_table(made.grid, made.checks)
    section = text[text.index(head[0]) - 2 :]
    for cells in (head, *rows):
        assert "| " + " | ".join(cells) + " |" in section
    assert Grid.load(folder).dataset.bits.notnull().any()
    out = printed(made.grid, tmp_path, made.checks)
    lines = out[out.index(head[0]) : out.index(remarks(made.grid, made.checks)[0].split(".")[0])].splitlines()[2:]
    starts = [lines.index(line) for row in rows for line in lines if line.strip().startswith(f"{row[0]} ")]
    assert len(starts) == len(rows)
    for row, start, end in zip(rows, starts, [*starts[1:], len(lines)], strict=True):
        shown = " ".join(lines[start:end]).split()  # a long cell goes on in the next line
        assert sorted(shown) == sorted(" ".join(row).split())
    assert "…" not in out


def test_what_was_left_out_and_what_random_weights_cost_is_said():
    few, made = small(), small_run()
    text = "\n".join(remarks(few.grid, few.checks))
    assert few.checks.skipped and not made.checks.skipped
    assert all(reason in text for reason in few.checks.skipped)
    assert "network evaluations" not in text
    (line,) = (line for line in remarks(made.grid, made.checks) if "network evaluations" in line)
    assert re.search(r"\b60 samples.*\b1234\b.*\b8 s\b", line)


def test_fits_that_missed_their_optimum_are_counted():
    grid = small_run().grid
    provenance = json.dumps({"converged": {"answer": [477, 480], "model_answer": [480, 480]}})
    lines = remarks(Grid(grid.dataset.assign_attrs(provenance=provenance)), NOTHING)
    (line,) = (line for line in lines if "fits" in line)  # nothing of those that all reached it
    assert re.search(r"^answer\b.*\b3 of 480\b", line)


def test_relabelled_controls_stay_out_of_tables_figures_and_charts(tmp_path):
    made = small_run()
    assert {"answer_relabelled", "model_answer_relabelled"} <= set(made.grid.targets)
    assert [row.best.target for row in summarise(made.grid)] == ["answer", "model_answer", "start", "length", "control"]
    assert "relabelled" not in summary_markdown(made.grid, made.checks)
    assert "relabelled" not in printed(made.grid, Path("run"), made.checks)
    report = write_report(made.grid, made.checks, tmp_path)
    for run in log_tensorboard(made.grid, report, tmp_path / "tensorboard").iterdir():
        tags = EventAccumulator(str(run)).Reload().Tags()
        assert not any("relabelled" in tag for tag in (*tags["scalars"], *tags["images"]))


def test_the_best_input_is_chosen_among_all_that_need_no_block():
    made = small_run()
    shown = {row.best.target: row for row in summarise(made.grid)}
    for result in made.evaluated.results:
        if result.target.name not in shown:
            continue
        row, cell = shown[result.target.name], made.grid.at(result.target.name, made.grid.best(result.target.name).cell)
        assert row.inputs[0] == float(cell.baseline_accuracy.sel(baseline=row.inputs[1]))
        if result.target.role in ("answer", "model_answer"):
            assert set(result.readings) == {*INPUTS, "x0_latent"}
            step = row.best.cell.step
            best = max(INPUTS, key=lambda name, read=result.readings, at=step: read[name].accuracy[at, 0])
            below = float(cell.baseline_accuracy.sel(baseline=best)) < row.chance
            assert row.inputs[1] in GUESSES if below else row.inputs[1] == best
            assert np.isfinite(cell.baseline_cross_validation.sel(baseline=list(INPUTS))).all()
        else:
            assert result.readings == {} and row.inputs[1] in GUESSES


# what the numbers stand on


def test_targets_that_were_left_out_are_named():
    evaluated = replace(
        synthetic(2, 2, 60, targets=(ANSWER,)), left_out=("target 'model_answer' is left out: reason 7",)
    )
    built = build_grid(evaluated, draws=30)
    (line,) = (line for line in remarks(built, NOTHING) if "reason 7" in line)
    assert evaluated.left_out[0] in line and line in summary_markdown(built, NOTHING)


def test_baselines_that_were_not_measured_are_named():
    evaluated = synthetic(2, 2, 60, targets=(ANSWER, START))
    bare = replace(evaluated.results[0], readings={})
    built = build_grid(replace(evaluated, results=(bare, evaluated.results[1])), draws=30)
    (line,) = (line for line in remarks(built, NOTHING) if "baselines" in line)
    assert "answer" in line and "noise, first_frame, prompt, embed, x_t, so it has no skill" in line
    (line,) = (line for line in remarks(build_grid(evaluated, draws=30), NOTHING) if "baselines" in line)
    assert line.endswith("were not measured: first_frame, prompt.")  # the example has the others


def test_an_input_that_was_projected_is_named_with_its_columns():
    evaluated = synthetic(2, 2, 60, targets=(ANSWER, START))
    result, test = evaluated.results[0], evaluated.results[0].test.inputs
    wide = reading(result.validation.inputs["embed"], test["embed"], 0.5, columns=640)
    wide = replace(wide, columns=np.array([[640], [700]]))
    mixed = replace(wide, columns=np.array([[8], [39]]), projected=np.array([[8], [39]]))  # two forms, both whole
    result = replace(result, readings=result.readings | {"embed": wide, "x_t": mixed})
    built = build_grid(replace(evaluated, results=(result, evaluated.results[1])), draws=30)
    (line,) = (line for line in ground(built, "answer") if "columns" in line)
    assert line in remarks(built, NOTHING)
    assert "answer" in line and "embed" in line and {"700", "300"} <= set(re.findall(r"\d+", line))
    assert "x_t" not in line
    assert not any("columns" in line for line in ground(built, "start"))


def test_the_smallest_skill_is_said_of_every_answer_and_model_answer(grid):
    lines = remarks(grid, NOTHING)
    for target in grid.targets:
        data = grid.dataset.sel(target=target)
        smallest = float(data.smallest_detectable_skill)
        assert 0 < smallest < 1
        said = [line for line in lines if re.match(rf"{target}\b.*\b120 test problems.*\b{smallest:.2f}\b", line)]
        assert len(said) == (target in ("answer", "model_answer"))


def test_a_run_of_few_problems_says_what_it_cannot_show(tmp_path):
    few = small()  # 8 test problems of each kind, 6 of validation, 12 of train
    text = summary_markdown(few.grid, few.checks)
    for target in ("answer", "model_answer"):
        for count, split in ((8, "test"), (6, "validation")):
            assert re.search(rf"^\* {target}\b.*\b{count} {split} problems.*\b12\b", text, re.MULTILINE)
        assert not re.search(rf"^\* {target}\b.*\b12 train", text, re.MULTILINE)
        assert not any(row.found for row in summarise(few.grid) if row.best.target == target)
    assert not re.search(r"^\* start\b.*\b8 test", text, re.MULTILINE)  # all 16 problems have a start
    assert write_report(few.grid, few.checks, tmp_path).is_dir()  # figures of maps without any p


def test_a_grid_without_an_answer_or_a_model_answer_has_no_checks_to_draw(tmp_path):
    samples, inputs = world({"train": 24, "validation": 12, "test": 16})
    plain = tuple(t for t in samples.targets if t.role in ("perception", "control"))
    made = examined(replace(samples, targets=plain), inputs, None)
    assert made.checks.best == {}
    folder = write_report(made.grid, made.checks, tmp_path)
    assert {p.name for p in folder.iterdir()} == {
        "grid.nc", "summary.json", "summary.md", "headline.png", "curves.png",
    }  # fmt: skip
    for text in ((folder / "summary.md").read_text(), printed(made.grid, tmp_path, made.checks)):
        assert "best cell" in text and "selectivity" not in text  # the table of best cells, and none of checks
