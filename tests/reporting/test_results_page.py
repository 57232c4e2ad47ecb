"""The page of results: every number on it is the one in the files of the run."""

from __future__ import annotations

import numpy as np
import pytest

from cosprobe.config import PipelineConfig
from cosprobe.errors import InputError
from cosprobe.evaluation.scoring import build_grid
from cosprobe.evaluation.variables import ALPHA, GUESSES
from cosprobe.files import write_json
from cosprobe.reporting.results_page import main, of_early, of_ensemble, of_map, page
from cosprobe.runs import mark_finished
from tests.examples.banks import bank_for
from tests.examples.grids import ANSWER, CONTROL, synthetic

ESTIMATE = {"mean": 0.9, "lower": 0.85, "upper": 0.95}


@pytest.fixture(scope="module")
def grid():
    return build_grid(synthetic(steps=12, targets=(ANSWER, CONTROL)), draws=100)


def rows(lines, first):
    """Cells of the rows of a Markdown table whose first cell is `first`."""
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [cells for cells in split if cells[0] == first]


def test_counts_and_accuracies_are_those_of_the_grid(grid):
    lines, data = of_map(grid), grid.dataset.sel(target="answer")
    counts = [int((data[p] <= ALPHA).sum()) for p in ("p_permutation", "p_evidence", "p_x0")]
    assert ["answer", str(data.accuracy.size), *map(str, counts)] in rows(lines, "answer")
    best = grid.best("answer")
    assert any(f"{best.accuracy:.2f} [{best.lower:.2f}, {best.upper:.2f}]" in row for row in rows(lines, "answer"))
    (head,) = rows(lines, "`answer`")
    steps = [int(name.removeprefix("step ")) for name in head[1:]]
    assert steps[0] == 0 and steps[-1] == 11 and len(steps) == len(set(steps)) == 8
    plane = grid.plane("answer").sel(step=steps)
    for layer in plane.layer.values:
        expected = [f"{value:.2f}" for value in plane.accuracy.sel(layer=layer).values]
        assert rows(lines, f"layer {int(layer)}") == [[f"layer {int(layer)}", *expected]]
    (inputs,) = rows(lines, "best input")
    named = zip(plane.reference.values, plane.reference_source.values, strict=True)
    assert inputs[1:] == [f"{value:.2f} {'chance' if source in GUESSES else source}" for value, source in named]


def test_only_targets_with_answers_or_memory_get_a_table_of_accuracies(grid):
    assert not rows(of_map(grid), "`control`")


def test_uses_are_left_out_where_there_are_none(tmp_path):
    assert of_early(tmp_path) == of_ensemble(tmp_path) == []


def test_early_answers_and_ensembles_are_those_of_their_files(tmp_path):
    result = {
        "samples": 60, "answered": 50, "errors": 2, "risk": 1 / 30, "interval": [0.004, 0.115], "compute": 0.25,
        "accuracy": 0.98, "finished_accuracy": 0.95, "gain": [0.03, -0.01, 0.07], "first_exit_gain": [0.05, 0.01, 0.09],
    }  # fmt: skip
    early, ensemble = tmp_path / "report" / "early", tmp_path / "report" / "ensemble"
    early.mkdir(parents=True)
    ensemble.mkdir()
    write_json(early / "early.json", {"kinds": {"one_exit": {"result": result}}})
    assert rows(of_early(tmp_path), "one_exit") == [
        ["one_exit", "60", "50", "2", "0.03 [0.00, 0.12]", "0.250", "0.98", "0.95", "+0.030 [-0.010, +0.070]",
         "+0.050 [+0.010, +0.090]"]
    ]  # fmt: skip
    more = {"mean": 0.05, "lower": 0.01, "upper": 0.09}
    chosen = {
        "hidden": {"strategy": "hidden K=3", "gflop": 22.0, "all": {"right": ESTIMATE}},
        "retry": {"strategy": "retry K=2", "gflop": 24.0, "all": {"right": ESTIMATE, "minus_hidden": more}},
    }
    found = {
        "test_problems": 240, "one_run": {"gflop": 20.0, "right": ESTIMATE}, "oracle": {"1": 0.9, "2": 0.97},
        "error_correlation": 0.12, "chosen": {"the paper's": chosen},
        "p_better_than_hidden": {"the paper's": {"retry": 0.004}},
    }  # fmt: skip
    write_json(ensemble / "ensemble.json", found)
    lines = of_ensemble(tmp_path)
    assert rows(lines, "hidden K=3") == [["hidden K=3", "1.10", "0.900 [0.850, 0.950]", "", ""]]
    assert rows(lines, "retry K=2") == [
        ["retry K=2", "1.20", "0.900 [0.850, 0.950]", "+0.050 [+0.010, +0.090]", "0.004"]
    ]
    assert any("240" in line and "0.970" in line and "0.12" in line for line in lines)


def test_command_writes_the_page_or_names_what_is_missing(grid, tmp_path, capsys):
    grid.save(tmp_path / "run" / "report" / "grid.nc")
    main([str(tmp_path / "results.md"), f"maze={tmp_path / 'run'}"])
    text = (tmp_path / "results.md").read_text()
    assert text == page([("maze", tmp_path / "run")]) and "## maze" in text
    assert not np.any([len(line) and line[-1] == " " for line in text.splitlines()])
    with pytest.raises(SystemExit):
        main([str(tmp_path / "other.md"), f"maze={tmp_path / 'none'}"])
    assert "none" in capsys.readouterr().err and not (tmp_path / "other.md").exists()


def test_a_report_of_other_probes_is_refused(grid, tmp_path):
    grid.save(tmp_path / "report" / "grid.nc")
    bank = bank_for(PipelineConfig())
    bank.save(tmp_path / "probes")
    (tmp_path / "report" / "early").mkdir()
    mark_finished(tmp_path / "report" / "early", bank.fingerprint)
    assert "## maze" in page([("maze", tmp_path)])
    mark_finished(tmp_path / "report" / "early", "other")
    with pytest.raises(InputError, match=r"report/early.*other probes.*probe\.py"):
        page([("maze", tmp_path)])
