"""The table of what the best cells survive: its numbers are the grid's, and what is not known is a dash."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from cosprobe.evaluation.grid import Grid
from cosprobe.evaluation.variables import GUESSES
from cosprobe.reporting.summary import NONE, check_table
from cosprobe.webpage.sentences import caveat, sentences
from tests.examples.runs import Run, run, small


@pytest.fixture(scope="module")
def made() -> Run:
    return run()


ROWS = (  # in the order of the table, whatever words stand before them
    "above inputs", "above x0", "selectivity", "latency", "x0 latency", "lag", "depth", "agreement",
    "correct when model wrong", "calibration", "brier", "bits", "residual", "random weights",
)  # fmt: skip


def column(grid: Grid, checks, target: str) -> dict[str, str]:
    head, rows = check_table(grid, checks)
    at = 1 + list(checks.best).index(target)
    return {name: row[at] for name, row in zip(ROWS, rows, strict=True)}


def numbers(text: str) -> list[float]:
    return [float(n) for n in re.findall(r"[+-]?\d+\.\d+|(?<![\w.])\d+(?![\w.])", text)]


def changed(grid: Grid, cell, target: str, **values) -> Grid:
    """The same grid with other values at one cell."""
    data = grid.dataset.copy(deep=True)
    at = {"target": target, "step": cell.step, "layer": cell.layer, "position": cell.position}
    for name, value in values.items():
        data[name].loc[{axis: at[axis] for axis in data[name].dims}] = value
    return Grid(data)


def test_a_column_per_target_and_a_row_per_check(made):
    head, rows = check_table(made.grid, made.checks)
    cells = made.checks.best
    assert head[1:] == [f"{name}: layer {c.layer}, step {c.step}" for name, c in cells.items()]
    assert all(len(row) == 3 for row in rows)
    assert len({row[0] for row in rows}) == len(rows) == len(ROWS)


def test_numbers_are_those_of_the_best_cell(made):
    for name, at in made.checks.best.items():
        cell, text = made.grid.at(name, at), column(made.grid, made.checks, name)
        above, source = float(cell.accuracy - cell.reference), str(cell.reference_source.values)
        named = "chance" if source in GUESSES else source
        assert text["above inputs"].startswith(f"{above:+.2f} over {named}, p = ")
        assert numbers(text["above inputs"])[-1] == pytest.approx(float(cell.p_inputs), abs=5e-4)
        assert text["above x0"].startswith(f"{float(cell.above_x0):+.2f} over {cell.x0_source.values}")
        ends = float(cell.selectivity_lower), float(cell.selectivity_upper)
        assert text["selectivity"] == f"{float(cell.selectivity):+.2f} [{ends[0]:+.2f}, {ends[1]:+.2f}]"
        lower, upper = float(cell.x0_latency_lower), float(cell.x0_latency_upper)
        assert not cell.x0_latency_censored
        assert text["x0 latency"] == f"{float(cell.x0_latency):.1f} [{lower:.1f}, {upper:.1f}]"
        assert text["depth"].startswith(f"{float(cell.depth):.1f} [")
        assert text["agreement"] == f"{float(cell.agreement):.2f}"
        assert text["brier"] == f"{float(cell.brier):.2f}"
        assert text["calibration"] == (
            f"{float(cell.ece):.3f} at T = {float(cell.temperature):.2f} ({float(cell.ece_raw):.3f} at 1), "
            f"n = {int(cell.n_test)}"
        )
    answer = made.grid.at("answer", made.checks.best["answer"])
    share, wrong = float(answer.correct_when_model_wrong), int(answer.n_model_wrong)
    lower, upper = float(answer.correct_when_model_wrong_lower), float(answer.correct_when_model_wrong_upper)
    assert 0 < wrong < 64
    assert column(made.grid, made.checks, "answer")["correct when model wrong"] == (
        f"{round(share * wrong)} of {wrong} wrong videos, {share:.2f} [{lower:.2f}, {upper:.2f}]"
    )
    assert (
        column(made.grid, made.checks, "model_answer")["correct when model wrong"] == NONE
    )  # its label is never wrong


def test_lengths_residuals_and_weights_are_those_of_the_analyses(made):
    for t, name in enumerate(made.checks.best):
        text, length, residual = (
            column(made.grid, made.checks, name), made.checks.lengths[t], made.checks.residuals[t],
        )  # fmt: skip
        best, embed, latent = (f"{bits:.2f}" for bits in length.bits)
        assert text["bits"] == f"{best} (embed {embed}, x0_latent {latent}, uniform code 2.00)"
        values = [residual.before.value[0], residual.after.value[0], residual.difference.lower[0]]
        values += [residual.difference.upper[0], residual.alone.value]
        np.testing.assert_allclose(numbers(text["residual"]), np.ravel(values).astype(float), atol=0.0051)
        table = made.weights
        first = table.accuracy[t][:, :3]  # the cells of step 0
        best = table.validation[t][:, :3].argmax(axis=1)
        trained, permuted, fresh = first[np.arange(3), best]
        assert text["random weights"] == (
            f"trained {trained:.2f}, permuted {permuted:.2f}, fresh {fresh:.2f} at step 0"
        )


def test_evidence_is_named_only_where_there_is_some(made):
    cell = made.checks.best["answer"]
    for p, words in ((0.05, "p = 0.050"), (0.051, "no evidence")):
        grid = changed(made.grid, cell, "answer", p_inputs=p, p_x0=p)
        text = column(grid, made.checks, "answer")
        assert text["above inputs"].endswith(words)
        assert text["above x0"].endswith(words)


def test_a_latency_at_the_first_step_is_a_bound_and_so_is_its_lag(made):
    cell = made.checks.best["answer"]
    known = {"latency": 0.0, "latency_lower": 0.0, "latency_upper": 0.5, "lag": 2.0}
    known |= {"lag_lower": 1.0, "lag_upper": 2.5}
    known |= {"x0_latency": 3.0, "x0_latency_lower": 2.0, "x0_latency_upper": 4.0}

    def timed(probe: bool, picture: bool) -> list[str]:
        bounds = {"latency_censored": probe, "x0_latency_censored": picture}
        text = column(changed(made.grid, cell, "answer", **known, **bounds), made.checks, "answer")
        return [text[row] for row in ("latency", "x0 latency", "lag")]

    plain, shown, lead = "0.0 [0.0, 0.5]", "3.0 [2.0, 4.0]", "+2.0 [+1.0, +2.5]"
    assert timed(False, False) == [plain, shown, lead]
    assert timed(True, False) == [f"at or before {plain}", shown, f"at least {lead}"]
    assert timed(False, True) == [plain, f"at or before {shown}", f"at most {lead}"]
    assert not numbers(timed(True, True)[2]) and timed(True, True)[2] != NONE
    known |= {"latency_upper": 0.0}  # there at the first step in every draw: no interval
    assert timed(True, False)[0] == "at or before 0.0"


@pytest.mark.slow
def test_what_was_not_made_is_a_dash(made):
    few = small()
    for name in few.checks.best:
        text = column(few.grid, few.checks, name)
        assert text["bits"] == text["residual"] == text["random weights"] == NONE
        selectivity = float(few.grid.at(name, few.checks.best[name]).selectivity)
        assert text["selectivity"] == f"{selectivity:+.2f}"  # of 8 problems: no interval of a difference
        assert text["above inputs"] == text["above x0"] == NONE
    cell = made.checks.best["answer"]
    names = (
        "p_inputs",
        "p_x0",
        "selectivity",
        "latency",
        "x0_latency",
        "lag",
        "depth",
        "agreement",
        "correct_when_model_wrong",
        "ece",
        "brier",
    )
    text = column(changed(made.grid, cell, "answer", **dict.fromkeys(names, np.nan)), made.checks, "answer")
    dashes = [row for row, words in text.items() if words == NONE]
    assert len(dashes) == 11
    assert not any("nan" in words for words in text.values())
    one = replace(made.checks, best={"model_answer": made.checks.best["model_answer"]})
    assert [len(row) for row in check_table(made.grid, one)[1]] == [2] * len(ROWS)


def test_the_page_says_random_weights_with_intervals_and_a_caveat_where_they_do_as_well(made):
    text = sentences(made.grid, "`mini`", "maze")[3]
    data = made.grid.dataset.sel(target="answer", step=0, position="all")
    best = made.grid.best("answer").cell
    trained = data.sel(weights="trained", layer=best.layer)
    assert f"{float(trained.weights_accuracy):.2f} [{float(trained.weights_lower):.2f}" in text
    for name in ("permuted", "fresh"):
        one = data.sel(baseline=f"{name}_weights")
        assert f"{float(one.baseline_accuracy):.2f} [{float(one.baseline_lower):.2f}" in text
    assert re.search(r"\b60 samples", text) and f"with the trained weights (layer {best.layer})" in text
    assert re.search("permuted|few", caveat(made.grid, "answer"))  # their intervals overlap
