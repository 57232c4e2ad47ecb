"""Checks of the best cells: what the grid says of them is what each analysis found."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import xarray as xr

from cosprobe.cells import Cell
from cosprobe.evaluation.checks import suite
from cosprobe.evaluation.checks.confounds import residualised
from cosprobe.evaluation.checks.description_length import description_length
from cosprobe.evaluation.checks.generalisation import matrices
from cosprobe.evaluation.checks.suite import BINS, MEANING, ROWS, examine, with_checks
from cosprobe.evaluation.checks.untrained import WEIGHTS
from cosprobe.evaluation.grid import Grid
from cosprobe.evaluation.scoring import build_grid
from cosprobe.probes.calibration import reliability
from tests.examples.runs import TARGETS, Run, run, small

pytestmark = pytest.mark.slow  # what all of them read takes seconds to make


@pytest.fixture(scope="module")
def made() -> Run:
    return run()


def present(grid: Grid, name: str) -> list[str]:
    """Targets for which a variable holds a number."""
    values = grid.dataset[name]
    return [str(target) for target in values.target.values if np.isfinite(values.sel(target=target)).any()]


def test_best_cells_are_the_grids_and_every_analysis_is_of_them(made):
    assert list(made.checks.best) == ["answer", "model_answer"]
    for name, cell in made.checks.best.items():
        assert cell == made.grid.best(name).cell
    cells = [made.checks.best["answer"]]
    assert cells[0].step == 2
    penalties = made.bank.select(cells).penalties["answer"]
    length = description_length(made.samples, "answer", cells, penalties, 0)
    assert made.checks.lengths[0].bits[0] == length.bits[0]
    np.testing.assert_array_equal(made.checks.lengths[0].accuracy.value[:1], length.accuracy.value)
    residual = residualised(made.samples, "answer", cells[:1], penalties[:1])
    np.testing.assert_array_equal(made.checks.residuals[0].after.value, residual.after.value)
    experts = dict.fromkeys(range(3), "transformer")
    expected = matrices(made.samples, made.bank, made.checks.best, experts)
    assert [(m.target, m.axis) for m in made.checks.matrices] == [(m.target, m.axis) for m in expected]
    assert {m.axis for m in expected} == {"step", "layer", "seed", "rooms", "length"}
    for ours, theirs in zip(made.checks.matrices, expected, strict=True):
        np.testing.assert_array_equal(ours.accuracy, theirs.accuracy)


def test_inputs_are_described_in_the_form_and_at_the_penalty_that_served_them_best(made):
    """Against the same columns put together by hand."""
    for result, found in zip(made.evaluated.results, made.checks.lengths, strict=False):
        name, step = result.target.name, made.checks.best[result.target.name].step
        assert found.names == ("best", "embed", "x0_latent")
        for at, source in ((1, "embed"), (2, "x0_latent")):
            read = result.readings[source]
            area, time = str(read.form[step, 0]).split(", ")
            values = getattr(made.inputs[source], area)[:, step]  # sample frame part channel
            rows = values.mean(1) if time == "mean" else values.transpose(1, 2).flatten(2)
            rows = rows.flatten(1)[:, None] if area == "whole" else rows
            cell = Cell(step, 0, "cond", "all")
            alone = replace(made.samples, features=rows[:, None], cells=(cell,))
            if area == "whole":
                plain = tuple(replace(t, form="problem") for t in made.samples.targets if t.form != "region")
                alone = replace(alone, targets=plain)
            length = description_length(alone, name, [cell], torch.tensor([read.penalty[step, 0]]), 0)
            assert found.bits[at] == pytest.approx(length.bits[0], rel=1e-6)
            np.testing.assert_allclose(found.accuracy.value[at], length.accuracy.value[0])
            assert float(made.grid.dataset.bits.sel(target=name, source=source)) == found.bits[at]


def test_inputs_that_were_not_read_are_not_described(made):
    evaluated = replace(made.evaluated, results=tuple(replace(r, readings={}) for r in made.evaluated.results))
    evaluated = replace(
        evaluated,
        results=tuple(
            replace(r, validation=replace(r.validation, inputs={}), test=replace(r.test, inputs={}))
            for r in evaluated.results
        ),
    )
    _, checks = examine(evaluated, made.samples, {}, made.bank)
    assert all(length.names == ("best",) and len(length.bits) == 1 for length in checks.lengths)
    assert checks.skipped == ()


def test_the_grid_without_its_checks_is_the_grid(made):
    provenance = asdict(made.bank.provenance) | {"bank": made.bank.fingerprint}
    plain = build_grid(made.evaluated, seed=0, provenance=provenance)
    assert made.grid.targets == plain.targets
    assert list(made.grid.dataset.baseline.values) == list(plain.dataset.baseline.values)
    for name in plain.dataset.data_vars:
        theirs, ours = plain.dataset[name], made.grid.dataset[name]
        assert ours.dims == theirs.dims
        if not str(name).startswith("baseline"):  # two baselines are added from few samples
            np.testing.assert_array_equal(ours.values, theirs.values)
    assert made.grid.provenance == plain.provenance == json.loads(json.dumps(provenance))
    assert made.grid.best("model_answer") == plain.best("model_answer")
    bare = with_checks(plain, small().checks)  # a subset of checks, no weights
    assert bare.targets == plain.targets


def test_generalisation_is_in_the_grid(made):
    data = made.grid.dataset
    for matrix in made.checks.matrices:
        kind = int if matrix.axis in ("step", "layer") else str
        where = {
            "target": matrix.target,
            f"train_{matrix.axis}": [kind(name) for name in matrix.train],
            f"test_{matrix.axis}": [kind(name) for name in matrix.test],
        }
        for end, values in (("", matrix.accuracy), ("_lower", matrix.lower), ("_upper", matrix.upper)):
            variable = data[f"transfer_{matrix.axis}{end}"]
            np.testing.assert_array_equal(variable.sel(where).values, values)
            assert present(made.grid, f"transfer_{matrix.axis}{end}") == ["answer", "model_answer"]
            assert matrix.axis in variable.attrs["long_name"]
    frozen = made.grid.dataset.transfer_step.sel(target="answer")
    layer = made.checks.best["answer"].layer
    on_itself = made.grid.plane("answer").accuracy.sel(layer=layer)
    np.testing.assert_allclose(np.diagonal(frozen.values), on_itself.values)


def test_description_lengths_and_residuals_are_in_the_grid(made):
    data = made.grid.dataset
    for length in made.checks.lengths:
        here = data.sel(target=length.target)
        sources = ["best", "embed", "x0_latent"]
        assert list(length.names) == sources
        for name, values in (("bits", length.bits), ("bits_lower", length.lower), ("bits_upper", length.upper)):
            np.testing.assert_array_equal(here[name].sel(source=sources).values, values)
        assert float(here.bits_uniform) == length.uniform == 2
        assert float(here.bits_prior) == length.prior
        curve = here.sel(problems=list(length.sizes))
        np.testing.assert_array_equal(curve.learning.values, length.accuracy.value[0])
        np.testing.assert_array_equal(curve.learning_lower.values, length.accuracy.lower[0])
        np.testing.assert_array_equal(curve.learning_upper.values, length.accuracy.upper[0])
    for found in made.checks.residuals:
        here = data.sel(target=found.target)
        assert float(here.residual_before) == found.before.value[0]
        assert float(here.residual_after) == found.after.value[0]
        assert float(here.residual_lower) == found.difference.lower[0]
        assert float(here.residual_upper) == found.difference.upper[0]
        assert float(here.difficulty_alone) == found.alone.value
    for name in ("bits", "bits_uniform", "bits_prior", "learning", "residual_after", "difficulty_alone"):
        assert present(made.grid, name) == ["answer", "model_answer"]
        assert data[name].attrs["long_name"] == MEANING[name]


def test_weights_are_in_the_grid_and_their_best_layer_is_the_baseline(made):
    table, data = made.weights, made.grid.dataset
    assert data.sizes["weights"] == 3
    for (t, target), (w, weights), (c, cell) in (
        (a, b, d) for a in enumerate(table.targets) for b in enumerate(WEIGHTS) for d in enumerate(table.cells)
    ):
        where = {"target": target, "weights": weights, "step": cell.step, "layer": cell.layer, "position": "all"}
        assert float(data.weights_accuracy.sel(where)) == table.accuracy[t, w, c]
        assert float(data.weights_lower.sel(where)) == table.lower[t, w, c]
        assert float(data.weights_upper.sel(where)) == table.upper[t, w, c]
    for t, target in enumerate(table.targets):
        for w, weights in enumerate(WEIGHTS):
            for step in (0, 1):
                at = [c for c, cell in enumerate(table.cells) if cell.step == step]
                chosen = at[int(table.validation[t, w, at].argmax())]
                if weights == "trained":
                    assert "trained_weights" not in data.baseline.values
                    continue
                where = {"target": target, "baseline": f"{weights}_weights", "step": step, "position": "all"}
                assert float(data.baseline_accuracy.sel(where)) == table.accuracy[t, w, chosen]
                assert float(data.baseline_lower.sel(where)) == table.lower[t, w, chosen]
                assert float(data.baseline_upper.sel(where)) == table.upper[t, w, chosen]
                assert float(data.baseline_validation.sel(where)) == table.validation[t, w, chosen]
    few = data.baseline_accuracy.sel(baseline=["permuted_weights", "fresh_weights"])
    assert np.isnan(few.sel(step=2)).all()
    assert np.isnan(few.sel(target=["start", "control", "answer_relabelled"])).all()
    assert present(made.grid, "weights_accuracy") == ["answer", "model_answer"]
    assert (data.attrs["weights_samples"], data.attrs["weights_evaluations"]) == (60, 1234)
    assert not np.isin(data.reference_source.values, ["permuted_weights", "fresh_weights"]).any()


def test_reliability_is_that_of_the_best_cell_on_test(made):
    test = made.samples.subset("test")
    for name, cell in made.checks.best.items():
        at = made.samples.cells.index(cell)
        heat = made.bank.temperatures[name][at]
        values = made.bank.decision(test.features, name)[at]
        labelled = int((test.labels[name] >= 0).sum())
        for curve, proba in zip(made.checks.reliability[name], (values / heat, values), strict=True):
            expected = reliability(proba.softmax(-1), test.labels[name], BINS)
            np.testing.assert_allclose(curve.confidence, expected.confidence, rtol=1e-5)
            np.testing.assert_array_equal(curve.accuracy, expected.accuracy)
            assert len(curve.count) == BINS
            assert int(curve.count.sum()) == labelled
    few = small()
    curve = few.checks.reliability["answer"][0]
    rows = int((few.samples.subset("test").labels["answer"] >= 0).sum())
    assert len(curve.count) == rows // ROWS < BINS


def test_a_run_too_small_for_an_analysis_says_so_and_has_the_rest():
    few = small()
    assert few.checks.lengths == () and few.checks.residuals == () and few.checks.weights is None
    assert len(few.checks.skipped) == 4
    for target in ("answer", "model_answer"):
        reasons = [line for line in few.checks.skipped if f"target {target!r}" in line]
        assert [bool(re.search(r"\b12\b.*\b20\b", line)) for line in reasons] == [True, False]
        assert [bool(re.search(r"\b1\b.*\b24\b", line)) for line in reasons] == [False, True]
    assert {m.axis for m in few.checks.matrices} == {"step", "layer"}  # groups of seeds would be too small
    for name in ("bits", "learning", "residual_after", "weights_accuracy", "transfer_seed"):
        assert name not in few.grid.dataset
    assert present(few.grid, "transfer_step") == ["answer", "model_answer"]
    assert set(few.checks.best) == set(few.checks.reliability) == {"answer", "model_answer"}


def test_a_grid_with_checks_survives_the_disk(made, tmp_path):
    loaded = Grid.load(made.grid.save(tmp_path / "grid.nc"))
    xr.testing.assert_identical(loaded.dataset, made.grid.dataset)
    assert loaded.targets[: len(TARGETS)] == tuple(t.name for t in TARGETS)
    assert loaded.best("answer") == made.grid.best("answer")
    for variable in loaded.dataset.data_vars.values():
        assert variable.attrs["long_name"]


def test_an_error_that_has_other_causes_than_few_samples_is_no_check_left_out(made, monkeypatch):
    def broken(*_):
        raise ValueError("a bug")

    monkeypatch.setattr(suite, "residualised", broken)
    with pytest.raises(ValueError, match="a bug"):
        examine(made.evaluated, made.samples, made.inputs, made.bank, made.weights, 0)
