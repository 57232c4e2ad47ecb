"""The grid: shapes and names others script against, choices made on validation, numbers checked by hand."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from cosprobe.cells import INPUTS, X0, Cell
from cosprobe.errors import InputError
from cosprobe.evaluation.checks.suite import Checks
from cosprobe.evaluation.grid import Grid
from cosprobe.evaluation.intervals import difference_interval, effective_problems, share_interval
from cosprobe.evaluation.latency import latency
from cosprobe.evaluation.predictions import Evaluated, SplitPredictions, TargetPredictions
from cosprobe.evaluation.scoring import Rows, _x0_rows, build_grid
from cosprobe.evaluation.significance import max_t_bootstrap, max_t_permutation, weakest_pair
from cosprobe.evaluation.variables import MEANING
from cosprobe.reporting.summary import ground, remarks
from cosprobe.tasks import Target
from tests.examples.grids import ANSWER, CONTROL, DOORS, MODEL_ANSWER, ORIGIN, START, reading, synthetic

NOTHING = Checks({}, (), (), (), {}, None, ())


@pytest.fixture(scope="module")
def grid() -> Grid:
    """8 layers x 6 steps, every form of target."""
    evaluated = synthetic(steps=6, samples=120, targets=(ANSWER, MODEL_ANSWER, START, DOORS, CONTROL))
    return build_grid(evaluated, draws=200, provenance={"model": {"name": "mini"}, "seed": 0})


def tiny(
    right: dict[int | str, tuple[float, ...]], target: Target = ANSWER, samples: int = 20, steps: int = 1, **changes
) -> Evaluated:
    """A grid whose layers (by number) are right on exactly these shares of (validation, test), x0_parsed likewise if
    given. An input has its accuracy in cross-validation as a third number; without one, that on validation."""

    def rows(share: float) -> np.ndarray:
        labels = np.zeros(samples, dtype=int)
        return np.where(np.arange(samples) < round(share * samples), labels, 1)

    layers = [name for name in right if isinstance(name, int)]
    named = [name for name in right if isinstance(name, str) and name != "x0_parsed"]
    cells = tuple(Cell(t, n, "cond", "all") for t in range(steps) for n in layers)
    labels, keys = np.zeros(samples, dtype=int), np.arange(samples)
    parts = []
    for i in (0, 1):
        x0_parsed = np.tile(rows(right["x0_parsed"][i]), (steps, 1)) if "x0_parsed" in right else None
        predicted = np.array([rows(right[cell.layer][i]) for cell in cells], dtype=int).reshape(len(cells), samples)
        inputs = {name: np.tile(rows(right[name][i]), (steps, 1, 1)) for name in named}
        parts.append(SplitPredictions(labels, keys, predicted, x0_parsed, None, inputs))
    never = np.full(40, target.classes - 1)  # the majority guess is always wrong
    readings = {
        name: reading(parts[0].inputs[name], parts[1].inputs[name], right[name][2 if len(right[name]) > 2 else 0])
        for name in named
    }
    result = TargetPredictions(target, never, np.arange(40), *parts, np.ones(len(cells)), readings=readings)
    return Evaluated(cells, ("transformer",) * steps, (replace(result, **changes),))


def only(evaluated: Evaluated, draws: int = 50) -> xr.Dataset:
    return build_grid(evaluated, draws=draws).dataset.isel(target=0, position=0)


def changed(evaluated: Evaluated, split: str = "test", **changes) -> Evaluated:
    """The same with other predictions of the first target on one split."""
    first = evaluated.results[0]
    result = replace(first, **{split: replace(getattr(first, split), **changes)})
    return replace(evaluated, results=(result, *evaluated.results[1:]))


def test_names_that_others_script_against(grid):
    data = grid.dataset
    assert dict(data.sizes) == {"target": 5, "step": 6, "layer": 8, "position": 1, "baseline": 12}
    for name in (
        "accuracy", "lower", "upper", "skill", "p_permutation", "p_guess", "p_inputs", "p_evidence", "above_x0",
        "above_x0_lower", "above_x0_upper", "p_x0", "validation_accuracy", "penalty", "agreement",
        "correct_when_model_wrong", "selectivity", "selectivity_lower", "selectivity_upper", "temperature", "ece",
        "ece_raw", "brier",
    ):  # fmt: skip
        assert data[name].dims == ("target", "step", "layer", "position")
    counts = ("n_train", "n_validation", "n_test", "n_train_problems", "n_validation_problems", "n_test_problems")
    for name in ("chance", "smallest_detectable_skill", "n_effective", "n_no_answer", "n_model_wrong", *counts):
        assert data[name].dims == ("target",)
    for name in ("accuracy", "lower", "upper", "validation", "cross_validation", "form", "columns", "projected"):
        assert data[f"baseline_{name}"].dims == ("target", "baseline", "step", "position")
    for name in ("reference", "reference_source", "x0_accuracy", "x0_source"):
        assert data[name].dims == ("target", "step", "position")
    assert data.baseline.values.tolist() == [
        "uniform", "majority", "noise", "first_frame", "prompt", "difficulty", "embed", "x_t", "x0_parsed", "x0_latent",
        "permuted_weights", "fresh_weights",
    ]  # fmt: skip
    for name in ("latency", "latency_lower", "latency_upper", "latency_censored", "lag", "lag_lower", "lag_upper"):
        assert data[name].dims == ("target", "layer", "position")
    for name in ("x0_latency", "x0_latency_lower", "x0_latency_upper", "x0_latency_censored"):
        assert data[name].dims == ("target", "position")
    for name in ("depth", "depth_lower", "depth_upper"):
        assert data[name].dims == ("target", "step", "position")
    only_with_folds = {"nested_accuracy", "nested_accuracy_lower", "nested_accuracy_upper"}
    assert set(MEANING) - only_with_folds == set(data.data_vars)
    assert all(values.attrs["long_name"] == MEANING[str(name)] for name, values in data.data_vars.items())
    assert data.layer.dtype.kind == "i"
    assert data.expert.dims == ("step",)
    assert str(data.branch.values) == "cond"
    assert grid.provenance == {"model": {"name": "mini"}, "seed": 0}
    assert grid.with_role("answer", "control") == ("answer", "control")


def test_branches_and_positions_are_dimensions_where_there_are_several():
    evaluated = synthetic(2, 3, 40, positions=("all", "0", "1"), branches=("cond", "uncond"), targets=(ANSWER,))
    built = build_grid(replace(evaluated, experts=("high", "high", "low")), draws=20)
    assert built.dataset.accuracy.dims == ("target", "step", "layer", "branch", "position")
    assert built.dataset.reference.dims == ("target", "step", "branch", "position")
    assert built.dataset.expert.values.tolist() == ["high", "high", "low"]
    test = evaluated.results[0].test
    for i, cell in enumerate(evaluated.cells):
        right = (test.predicted[i] == test.labels).mean()
        assert float(built.at("answer", cell).accuracy) == pytest.approx(right)
    for name, said in test.inputs.items():
        found = built.dataset.baseline_accuracy.sel(target="answer", baseline=name).transpose(
            "branch", "step", "position"
        )
        np.testing.assert_allclose(found, np.stack([(said == test.labels).mean(axis=2)] * 2))  # of either branch
    assert built.plane("answer", position="1", branch="uncond").accuracy.dims == ("step", "layer")
    best = built.best("answer")
    assert float(built.plane("answer").accuracy.sel(step=best.cell.step, layer=best.cell.layer)) == best.accuracy


def test_intervals_and_p_are_those_of_the_rows_of_right_and_wrong(grid):
    evaluated = synthetic(steps=6, samples=120, targets=(ANSWER, MODEL_ANSWER, START, DOORS, CONTROL))
    for result in evaluated.results:
        test, plane = result.test, grid.plane(result.target.name)
        p = max_t_permutation(test.predicted, test.labels, test.keys, 200, 0).p
        np.testing.assert_allclose(plane.p_permutation.values.ravel(), p)
        right = (test.predicted == test.labels).reshape(len(evaluated.cells), 120, -1).mean(-1)
        np.testing.assert_allclose(plane.accuracy.values.ravel(), right.mean(1))
        lower, upper = share_interval(right, test.keys)
        np.testing.assert_allclose(plane.lower.values.ravel(), lower)
        np.testing.assert_allclose(plane.upper.values.ravel(), upper)


@pytest.mark.slow
def test_control_gives_evidence_in_one_grid_of_twenty_and_a_decodable_target_always():
    alarms = 0
    for seed in range(25):
        built = build_grid(synthetic(4, 5, 80, targets=(ANSWER, CONTROL), seed=seed), draws=99)
        assert (built.dataset.p_evidence.sel(target="answer") <= 0.05).any()
        alarms += bool((built.dataset.p_evidence.sel(target="control") <= 0.05).any())
    assert alarms <= 5


# inputs and the reference


def test_the_reference_is_the_best_in_cross_validation_read_on_test():
    data = only(tiny({0: (0.9, 0.9), "embed": (0.4, 0.5, 0.6), "x_t": (0.9, 0.7, 0.5), "prompt": (1.0, 0.8, 0.59)}))
    assert str(data.reference_source.values[0]) == "embed"
    assert float(data.reference[0]) == 0.5
    assert float(data.skill[0, 0]) == pytest.approx((0.9 - 0.5) / (1 - 0.5))
    tied = only(tiny({0: (0.9, 0.9), "x_t": (0.9, 0.7, 0.6), "noise": (0.3, 0.4, 0.6)}))
    assert str(tied.reference_source.values[0]) == "noise"  # of equals the first in the order of INPUTS


def test_the_reference_is_never_below_chance():
    data = only(tiny({0: (0.9, 0.9), "embed": (0.9, 0.2, 0.9), "x_t": (0.1, 0.8, 0.1)}))
    assert str(data.reference_source.values[0]) == "uniform"
    assert float(data.reference[0]) == float(data.chance) == 0.25
    assert float(data.skill[0, 0]) == pytest.approx((0.9 - 0.25) / 0.75)
    level = only(tiny({0: (0.9, 0.9), "embed": (0.9, 0.25, 0.9)}))
    assert str(level.reference_source.values[0]) == "embed"  # not below
    often = only(tiny({0: (0.9, 0.9), "embed": (0.9, 0.9, 0.9)}, train_labels=np.zeros(40, dtype=int)))
    assert (str(often.reference_source.values[0]), float(often.reference[0])) == ("majority", 1.0)


def test_chance_is_the_better_guess_on_test():
    """On validation the more frequent label is right more often than 1 / classes, on test less often."""
    evaluated = tiny({0: (0.9, 0.9)}, train_labels=np.zeros(40, dtype=int))
    unlucky = only(changed(evaluated, labels=np.repeat([0, 1], [2, 18]), predicted=np.zeros((1, 20), dtype=int)))
    assert float(unlucky.baseline_accuracy.sel(baseline="majority").isel(step=0)) == 0.1
    assert float(unlucky.chance) == 0.25
    assert float(only(evaluated).chance) == 1.0


def test_skill_is_undefined_where_the_inputs_leave_no_room():
    assert np.isnan(only(tiny({0: (1.0, 1.0), "x_t": (1.0, 1.0)})).skill).all()
    assert np.isfinite(only(tiny({0: (1.0, 1.0), "x_t": (0.95, 0.95)})).skill).all()


def test_roles_without_inputs_to_beat_are_held_against_chance_alone(grid):
    data = only(tiny({0: (0.9, 0.9)}, START, train_labels=np.repeat([3, 3, 0, 5], 10)))
    assert str(data.reference_source.values[0]) == "uniform"
    assert float(data.skill[0, 0]) == pytest.approx((0.9 - 1 / 9) / (1 - 1 / 9))
    often = only(tiny({0: (0.9, 0.9)}, START, train_labels=np.repeat([0, 3, 0, 5], 10)))
    assert str(often.reference_source.values[0]) == "majority"
    for target in ("start", "corridors", "control"):
        here = grid.dataset.sel(target=target)
        assert np.isnan(here.p_inputs).all()
        np.testing.assert_array_equal(here.p_evidence, np.fmax(here.p_permutation, here.p_guess))
        assert np.isnan(here.baseline_cross_validation).all()
    assert (grid.dataset.p_evidence.sel(target="start") <= 0.05).any()


def test_labels_told_apart_no_more_often_than_by_the_most_frequent_one_are_no_evidence():
    """Of 100 labels 60 are 0. Layer 0 finds half of the others and misses a third of these: its labels go along with
    the true ones, but always saying 0 is right as often. Layer 1 is right on all."""
    labels = np.repeat([0, 1], [60, 40])
    found = np.concatenate([np.repeat([0, 1], [40, 20]), np.repeat([1, 0], [20, 20])])
    split = SplitPredictions(labels, np.arange(100), np.stack([found, labels]))
    cells = (Cell(0, 0, "cond", "all"), Cell(0, 1, "cond", "all"))
    train = np.repeat([0, 1], [120, 80])
    target = replace(START, classes=2)
    result = TargetPredictions(target, train, np.arange(200), split, split, np.ones(2))
    data = build_grid(Evaluated(cells, ("transformer",), (result,)), draws=999).dataset.isel(
        target=0, position=0, step=0
    )
    assert data.accuracy.values.tolist() == [0.6, 1.0]
    assert float(data.chance) == 0.6
    assert float(data.p_guess[0]) > 0.4 and float(data.p_guess[1]) <= 0.01
    assert float(data.p_evidence[0]) > 0.05 >= float(data.p_evidence[1])


def test_evidence_takes_both_more_than_chance_and_more_than_every_input(grid):
    data = grid.dataset.sel(target=["answer", "model_answer"])
    assert np.isfinite(data.p_inputs).all()
    every = np.fmax(np.fmax(data.p_permutation, data.p_guess), data.p_inputs)
    np.testing.assert_array_equal(data.p_evidence, every)
    assert grid.best("answer").p == float(grid.at("answer", grid.best("answer").cell).p_evidence)
    assert (data.p_evidence <= 0.05).any() and ((data.p_permutation <= 0.05) & (data.p_evidence > 0.05)).any()
    random = grid.dataset.sel(target="control")
    assert (random.p_evidence > 0.05).all()


def pairs(test: SplitPredictions, evaluated: Evaluated, others: dict[str, np.ndarray]) -> np.ndarray:
    """Differences [cell, other, sample]; others: labels said [step, position, sample], -1 in steps without any."""
    right = (test.predicted == test.labels).astype(float)
    found = np.full((len(evaluated.cells), len(others), len(test.labels)), np.nan)
    for i, cell in enumerate(evaluated.cells):
        for j, said in enumerate(others.values()):
            row = said[evaluated.steps.index(cell.step), evaluated.positions.index(cell.position)]
            if (row >= 0).all():
                found[i, j] = right[i] - (row == test.labels)
    return found


def test_p_of_inputs_is_that_of_the_weakest_pair():
    evaluated = synthetic(3, 4, 60, positions=("all", "1"), branches=("cond", "uncond"), targets=(ANSWER,), seeds=2)
    test = evaluated.results[0].test
    differences = pairs(test, evaluated, {name: test.inputs[name] for name in INPUTS if name in test.inputs})
    assert differences.shape[:2] == (48, 4)
    data = build_grid(evaluated, draws=99, seed=3).dataset.sel(target="answer")
    found = np.array([
        float(data.p_inputs.sel(step=c.step, layer=c.layer, branch=c.branch, position=c.position))
        for c in evaluated.cells
    ])  # fmt: skip
    np.testing.assert_allclose(found, weakest_pair(differences, test.keys, 99, 3).p)
    every = max_t_bootstrap(differences.reshape(-1, 60), test.keys, 99, 3).p  # and of all pairs the largest
    np.testing.assert_allclose(found, every.reshape(48, 4).max(axis=1))
    assert (found <= 0.05).any() and (found > 0.05).any()


def test_a_cell_that_ties_with_one_input_of_six_has_no_evidence():
    weak = dict.fromkeys(INPUTS, (0.3, 0.3))
    beats = only(tiny({0: (0.9, 0.9), **weak}))
    assert float(beats.p_inputs[0, 0]) <= 0.05
    for name in INPUTS:  # whichever it is, and however poor it was where the reference is chosen
        tied = only(tiny({0: (0.9, 0.9), **weak, name: (0.3, 0.9, 0.1)}))
        assert float(tied.p_inputs[0, 0]) == float(tied.p_evidence[0, 0]) == 1
        assert str(tied.reference_source.values[0]) != name
        assert float(tied.skill[0, 0]) == pytest.approx((0.9 - 0.3) / 0.7)


def test_x0_hat_is_no_input():
    data = only(tiny({0: (0.9, 0.9), "embed": (0.3, 0.3), X0: (1.0, 0.9, 1.0)}))
    assert str(data.reference_source.values[0]) == "embed"
    assert float(data.p_inputs[0, 0]) <= 0.05 < float(data.p_x0[0, 0])


def test_memory_is_compared_position_by_position():
    """At position 0 the inputs say nothing, at position 1 x_t says all that the layer does."""
    evaluated = synthetic(2, 2, 60, positions=("0", "1"), targets=(ORIGIN,))
    result = evaluated.results[0]

    def right_on(count: int, labels: np.ndarray) -> np.ndarray:
        return np.where(np.arange(60) < count, labels, (labels + 1) % 4)

    def told(labels: np.ndarray, first: int, second: int) -> np.ndarray:
        return np.stack([np.stack([right_on(first, labels), right_on(second, labels)])] * 2)

    splits, readings = {}, {}
    for name in ("validation", "test"):
        split = getattr(result, name)
        inputs = {"embed": told(split.labels, 20, 18), "x_t": told(split.labels, 16, 54)}
        predicted = np.stack([right_on(54, split.labels)] * len(evaluated.cells))
        splits[name] = replace(split, predicted=predicted, inputs=inputs)
    for name, cross in (("embed", [0.33, 0.3]), ("x_t", [0.26, 0.9])):
        readings[name] = reading(
            splits["validation"].inputs[name], splits["test"].inputs[name], np.array([cross, cross])
        )
    result = replace(result, readings=readings, **splits)
    data = build_grid(replace(evaluated, results=(result,)), draws=99).dataset.isel(target=0)
    np.testing.assert_allclose(data.baseline_accuracy.sel(baseline="x_t"), [[16 / 60, 0.9]] * 2)
    np.testing.assert_allclose(data.baseline_cross_validation.sel(baseline="embed"), [[0.33, 0.3]] * 2)
    assert data.reference_source.values.tolist() == [["embed", "x_t"]] * 2
    np.testing.assert_allclose(data.reference, [[20 / 60, 0.9]] * 2)
    assert (data.p_inputs.sel(position="0") <= 0.05).all()
    assert (data.p_inputs.sel(position="1") == 1).all()
    every = np.fmax(np.fmax(data.p_permutation, data.p_guess), data.p_inputs)
    np.testing.assert_array_equal(data.p_evidence, every)
    np.testing.assert_allclose(data.skill.sel(position="0"), (0.9 - 1 / 3) / (2 / 3))


def test_how_an_input_was_read_is_in_the_grid():
    evaluated = tiny({0: (0.9, 0.9), "embed": (0.5, 0.4, 0.6), "prompt": (0.3, 0.3, 0.2)}, steps=2)
    result = evaluated.results[0]
    form = np.array([["region, mean"], ["whole, frames"]])
    embed = replace(
        result.readings["embed"], form=form, columns=np.array([[8], [640]]), projected=np.array([[8], [40]])
    )
    result = replace(result, readings=result.readings | {"embed": embed})
    data = only(replace(evaluated, results=(result,)))
    at = data.sel(baseline="embed")
    assert at.baseline_form.values.tolist() == ["region, mean", "whole, frames"]
    assert at.baseline_columns.values.tolist() == [8, 640]
    assert at.baseline_projected.values.tolist() == [8, 40]
    np.testing.assert_allclose(at.baseline_cross_validation, [0.6, 0.6])
    np.testing.assert_allclose(at.baseline_validation, [0.5, 0.5])
    np.testing.assert_allclose(at.baseline_accuracy, [0.4, 0.4])
    lower, upper = share_interval((np.arange(20) < 8).astype(float)[None], np.arange(20))
    np.testing.assert_allclose(at.baseline_lower, [lower[0]] * 2)
    np.testing.assert_allclose(at.baseline_upper, [upper[0]] * 2)
    others = data.sel(baseline=["uniform", "noise", "x0_parsed", "fresh_weights"])
    assert (others.baseline_form == "").all() and np.isnan(others.baseline_columns).all()
    assert np.isnan(data.baseline_accuracy.sel(baseline=["noise", "x0_latent", "permuted_weights"])).all()


# too few problems


def with_few(problems: int, samples: int = 60) -> Evaluated:
    """Test samples of so many problems, the rest as it was."""
    evaluated = synthetic(3, 3, samples, targets=(ANSWER,))
    return changed(evaluated, keys=np.array([f"t{i % problems}" for i in range(samples)]))


def test_eleven_test_problems_carry_no_p_and_no_difference_but_a_share():
    built = build_grid(with_few(11), draws=99)
    data = built.dataset.sel(target="answer")
    for name in ("p_permutation", "p_inputs", "p_evidence", "p_x0", "above_x0_lower", "above_x0_upper", "latency",
                 "depth", "lag", "x0_latency", "smallest_detectable_skill"):  # fmt: skip
        assert np.isnan(data[name]).all(), name
    for name in (
        "accuracy",
        "lower",
        "upper",
        "skill",
        "above_x0",
        "reference",
        "x0_accuracy",
        "correct_when_model_wrong_lower",
    ):
        assert np.isfinite(data[name]).all(), name
    lines = [line for line in ground(built, "answer") if "test problems" in line]
    assert len(lines) == 1 and "answer" in lines[0] and {"11", "12"} <= set(re.findall(r"\d+", lines[0]))
    assert lines[0] in remarks(built, NOTHING)
    assert np.isnan(built.best("answer").p)
    twelve = build_grid(with_few(12), draws=99)
    for name in ("p_evidence", "p_x0", "above_x0_lower", "above_x0_upper"):
        assert np.isfinite(twelve.dataset[name]).all(), name
    assert not any("expected" in line for line in ground(twelve, "answer"))


def test_one_problem_with_nearly_all_seeds_is_no_twelve_problems():
    evaluated = synthetic(3, 3, 60, targets=(ANSWER,))
    keys = np.array([f"t{max(0, i - 40)}" for i in range(60)])  # 41 samples of one problem, one of each of 19
    built = build_grid(changed(evaluated, keys=keys), draws=99)
    data = built.dataset.sel(target="answer")
    assert float(data.n_effective) == pytest.approx(60**2 / (41**2 + 19)) and float(data.n_effective) < 6
    assert int(data.n_test_problems) == 20
    for name in (
        "p_permutation",
        "p_inputs",
        "p_evidence",
        "p_x0",
        "above_x0_lower",
        "latency",
        "smallest_detectable_skill",
    ):
        assert np.isnan(data[name]).all(), name
    assert np.isfinite(data.lower).all() and np.isfinite(data.upper).all()
    worth = f"{float(data.n_effective):.1f}"
    lines = [line for line in remarks(built, NOTHING) if worth in line]
    assert len(lines) == 1 and "answer" in lines[0] and "20" in lines[0]


def test_counts_are_of_samples_and_of_problems():
    evaluated = synthetic(2, 2, 60, targets=(ANSWER,), seeds=3)
    unlabelled = np.where(np.arange(300) < 100, -1, evaluated.results[0].train_labels)
    result = replace(evaluated.results[0], train_labels=unlabelled)
    data = build_grid(replace(evaluated, results=(result,)), draws=20).dataset.isel(target=0)
    names = ("n_train", "n_validation", "n_test", "n_train_problems", "n_validation_problems", "n_test_problems")
    assert [int(data[name]) for name in names] == [200, 60, 60, 100, 20, 20]
    assert float(data.n_effective) == pytest.approx(20)


def test_too_few_problems_of_another_split_are_named():
    evaluated = synthetic(2, 3, 60, targets=(ANSWER,))
    few = changed(evaluated, "validation", keys=np.array([f"v{i % 9}" for i in range(60)]))
    few = replace(few, results=(replace(few.results[0], train_keys=np.arange(300) % 7),))
    built = build_grid(few, draws=99)
    data = built.dataset.sel(target="answer")
    assert np.isfinite(data.p_evidence).all()  # test stands for itself
    assert np.isnan(data.latency).all() and np.isnan(data.depth).all()  # whose evidence comes from validation
    train, validation = (next(line for line in ground(built, "answer") if f"{split} problems" in line)
                         for split in ("train", "validation"))  # fmt: skip
    assert {"7", "12"} <= set(re.findall(r"\d+", train)) and {"9", "12"} <= set(re.findall(r"\d+", validation))


# the smallest skill that could have been shown


def test_the_smallest_skill_is_that_of_the_critical_value():
    shares = np.arange(4, 21) / 20
    evaluated = tiny({**{i: (s, s) for i, s in enumerate(shares)}, "embed": (0.25, 0.25), "noise": (0.2, 0.2)})
    test = evaluated.results[0].test
    right = (test.predicted == test.labels).astype(float)
    others = np.stack([test.inputs[name][0, 0] == test.labels for name in ("noise", "embed")]).astype(float)
    critical = weakest_pair(right[:, None] - others, test.keys, 199, 0).critical
    data = only(evaluated, draws=199)
    assert 0 < critical < np.sqrt(20)
    assert float(data.smallest_detectable_skill) == pytest.approx(critical**2 / 20 / (1 - 0.25))
    # every layer is right wherever the inputs are: what exceeds it is evidence against them, what does not is none
    skill = data.skill.isel(step=0).values
    np.testing.assert_array_equal(
        data.p_inputs.isel(step=0) <= 0.05, skill > float(data.smallest_detectable_skill) + 1e-9
    )
    assert (skill > float(data.smallest_detectable_skill)).any() and (
        skill < float(data.smallest_detectable_skill)
    ).any()


def test_the_smallest_skill_without_inputs_is_that_of_the_permutation(grid):
    evaluated = synthetic(steps=6, samples=120, targets=(ANSWER, MODEL_ANSWER, START, DOORS, CONTROL))
    for result in evaluated.results:
        test, data = result.test, grid.dataset.sel(target=result.target.name)
        chance, count = float(data.chance), effective_problems(test.keys)
        critical = max_t_permutation(test.predicted, test.labels, test.keys, 200, 0).critical
        needed = critical * np.sqrt(chance * (1 - chance) / count)
        if result.readings:
            named = [name for name in INPUTS if name in test.inputs]
            differences = pairs(test, evaluated, {name: test.inputs[name] for name in named})
            needed = max(needed, weakest_pair(differences, test.keys, 200, 0).critical ** 2 / count)
        assert float(data.smallest_detectable_skill) == pytest.approx(needed / (1 - chance))
        said = [
            line for line in ground(grid, result.target.name) if f"{float(data.smallest_detectable_skill):.2f}" in line
        ]
        assert len(said) == (result.target.role in ("answer", "model_answer"))
        assert all("120" in line and "0.05" in line for line in said)


def test_problems_of_several_seeds_count_once_in_the_smallest_skill():
    alone, seeds = (synthetic(2, 2, 60, targets=(START,), seeds=n) for n in (1, 3))
    data = [build_grid(e, draws=99).dataset.isel(target=0) for e in (alone, seeds)]
    for here, evaluated, count in zip(data, (alone, seeds), (60, 20), strict=True):
        test, chance = evaluated.results[0].test, float(here.chance)
        critical = max_t_permutation(test.predicted, test.labels, test.keys, 99, 0).critical
        told = critical * np.sqrt(chance * (1 - chance) / count)
        guess = np.bincount(evaluated.results[0].train_labels).argmax()
        more = (test.predicted == test.labels).astype(float) - (test.labels == guess)
        above = max_t_bootstrap(more, test.keys, 99, 0).critical ** 2 / count
        assert float(here.smallest_detectable_skill) == pytest.approx(max(told, above) / (1 - chance))
    assert float(data[1].smallest_detectable_skill) > 1.3 * float(data[0].smallest_detectable_skill)


@pytest.mark.parametrize(("target", "blind"), [(ANSWER, 0.25), (START, 1 / 9), (DOORS, 0.5)])
def test_chance_is_the_better_one_of_two_guesses(target, blind):
    region = target.form == "region"
    for guess, share in ((0, 1.0), (1, 0.0)):  # every label is 0
        train = np.full((9, 4) if region else 9, guess)
        train[:4] = 1 - guess  # not more often than the guess
        evaluated = tiny({0: (1, 1)}, target, train_labels=train, train_keys=np.arange(9))
        if region:
            parts = [evaluated.results[0].validation, evaluated.results[0].test]
            parts = [replace(p, labels=np.zeros((20, 4), int), predicted=np.zeros((1, 20, 4), int)) for p in parts]
            evaluated = replace(evaluated, results=(replace(evaluated.results[0], validation=parts[0], test=parts[1]),))
        data = only(evaluated)
        accuracy = data.baseline_accuracy.isel(step=0)
        assert float(accuracy.sel(baseline="uniform")) == pytest.approx(blind)
        assert float(accuracy.sel(baseline="majority")) == share
        assert float(data.chance) == pytest.approx(max(blind, share))
        for end in ("lower", "upper"):  # known exactly
            assert float(data[f"baseline_{end}"].sel(baseline="uniform").isel(step=0)) == pytest.approx(blind)
    even = np.repeat([2, 1, 2, 1], 10)
    tied = only(tiny({0: (1, 1)}, train_labels=even))  # of equals the smallest
    assert float(tied.baseline_accuracy.sel(baseline="majority").isel(step=0)) == 0


# what the picture shows


def around(test: SplitPredictions) -> dict[str, np.ndarray]:
    """What x0-hat shows at every step: its latents, and what is parsed at the decoded steps around it."""
    decoded = np.flatnonzero((test.x0_parsed >= 0).all(axis=1))
    steps = np.arange(len(test.x0_parsed))
    before = [max((d for d in decoded if d <= t), default=decoded[0]) for t in steps]
    after = [min((d for d in decoded if d >= t), default=decoded[-1]) for t in steps]
    return {"before": test.x0_parsed[before][:, None], "after": test.x0_parsed[after][:, None], X0: test.inputs[X0]}


def test_p_x0_is_that_of_the_weakest_of_all_that_x0_hat_shows(grid):
    evaluated = synthetic(steps=6, samples=120, targets=(ANSWER, MODEL_ANSWER, START, DOORS, CONTROL))
    for result in evaluated.results[:2]:
        test, plane = result.test, grid.plane(result.target.name)
        expected = weakest_pair(pairs(test, evaluated, around(test)), test.keys, 200, 0).p
        found = [float(plane.p_x0.sel(step=cell.step, layer=cell.layer)) for cell in evaluated.cells]
        np.testing.assert_allclose(found, expected)
    assert (grid.plane("answer").p_x0 <= 0.05).any()
    assert np.isnan(grid.plane("start").p_x0).all()
    assert np.isnan(only(tiny({0: (0.9, 0.9)})).p_x0).all()


@pytest.mark.parametrize("equal", ["before", "after", X0])
def test_a_cell_has_to_be_above_all_that_x0_hat_shows(equal):
    """Of three steps the first and the last are decoded. At the middle one the layer beats two rows and ties with one,
    which validation and cross-validation think the poorest of them."""
    evaluated = tiny({0: (0.9, 0.9), X0: (0.5, 0.3, 0.5)}, steps=3)
    first = evaluated.results[0]
    labels = first.test.labels

    def said(share: float) -> np.ndarray:
        return np.where(np.arange(20) < round(share * 20), labels, 1)

    shares = {"before": 0.3, "after": 0.3, X0: 0.3} | {equal: 0.9}
    x0_parsed = np.stack([said(shares["before"]), np.full(20, -1), said(shares["after"])])
    on_validation = np.stack(
        [said(0.2 if equal == "before" else 0.6), np.full(20, -1), said(0.2 if equal == "after" else 0.6)]
    )
    latent = np.stack([said(0.3), said(shares[X0]), said(0.3)])[:, None]
    cross = reading(first.readings[X0].validation, latent, 0.1)
    test = replace(first.test, x0_parsed=x0_parsed, inputs={X0: latent})
    result = replace(
        first, test=test, validation=replace(first.validation, x0_parsed=on_validation), readings={X0: cross}
    )
    data = only(replace(evaluated, results=(result,))).sel(step=1)
    assert float(data.p_x0[0]) == 1
    assert float(data.above_x0[0]) == pytest.approx(0.9 - 0.3)  # above what was chosen without test
    x0_parsed[[0, 2]], latent[1] = said(0.3), said(0.3)
    assert float(only(replace(evaluated, results=(result,))).sel(step=1).p_x0[0]) <= 0.05


def test_selectivity_is_the_distance_to_the_relabelled_control():
    evaluated = synthetic(3, 2, 60, targets=(ANSWER, START))
    twin = replace(ANSWER, name="answer_relabelled", role="relabelled")
    control = replace(synthetic(3, 2, 60, targets=(ANSWER,), seed=5).results[0], target=twin, readings={})
    plain = replace(control.test, inputs={}), replace(control.validation, inputs={})
    control = replace(control, test=plain[0], validation=plain[1])
    built = replace(evaluated, results=(*evaluated.results, control))
    data = build_grid(built, draws=20).dataset
    expected = data.accuracy.sel(target="answer").values - data.accuracy.sel(target="answer_relabelled").values
    np.testing.assert_allclose(data.selectivity.sel(target="answer"), expected)
    others = data.sel(target=["start", "answer_relabelled"])
    right, of_twin = ((r.test.predicted == r.test.labels).astype(float) for r in (evaluated.results[0], control))
    ends = difference_interval(right - of_twin, evaluated.results[0].test.keys)
    for end, values in zip(("lower", "upper"), ends, strict=True):
        np.testing.assert_allclose(data[f"selectivity_{end}"].sel(target="answer").values.ravel(), values)
        assert np.isnan(others[f"selectivity_{end}"]).all()
    assert np.isnan(others.selectivity).all()


def test_correct_when_model_wrong_counts_the_probe_where_the_finished_video_is_wrong():
    evaluated = tiny({0: (0.5, 0.5), 1: (0.9, 0.9)})  # right on the first ten, on the first eighteen
    model_answer = np.array([0] * 6 + [1] * 9 + [-1] * 5)
    test = replace(evaluated.results[0].test, model_answer=model_answer)
    data = only(replace(evaluated, results=(replace(evaluated.results[0], test=test),)))
    assert int(data.n_model_wrong) == 14
    np.testing.assert_allclose(data.correct_when_model_wrong.isel(step=0), [4 / 14, 12 / 14])
    right = np.stack([np.arange(6, 20) < 10, np.arange(6, 20) < 18]).astype(float)
    lower, upper = share_interval(right, np.arange(6, 20))
    np.testing.assert_allclose(data.correct_when_model_wrong_lower.isel(step=0), lower)
    np.testing.assert_allclose(data.correct_when_model_wrong_upper.isel(step=0), upper)
    own = replace(evaluated.results[0], test=test, target=replace(ANSWER, role="model_answer"))
    data = only(replace(evaluated, results=(own,)))
    assert np.isnan(data.correct_when_model_wrong).all()
    assert int(data.n_model_wrong) == 0


def test_what_is_known_of_probabilities_is_passed_on_by_cell():
    calibration = {"ece": np.array([0.1, 0.3]), "temperature": np.array([1.0, 3.0])}
    data = only(tiny({0: (0.9, 0.9), "embed": (0.5, 0.5), 4: (0.9, 0.9)}, calibration=calibration))
    np.testing.assert_array_equal(data.ece.isel(step=0), [0.1, 0.3])
    np.testing.assert_array_equal(data.temperature.isel(step=0), [1.0, 3.0])
    assert np.isnan(data.brier).all()


def test_timing_is_that_of_the_targets_rows_with_evidence_from_validation():
    evaluated = synthetic(4, 8, 120, targets=(ANSWER, CONTROL))
    data = build_grid(evaluated, draws=50).dataset.isel(position=0)
    result, at = evaluated.results[0].test, {cell: i for i, cell in enumerate(evaluated.cells)}
    right = (result.predicted == result.labels).astype(float)
    lines = np.stack([[right[at[Cell(t, n, "cond", "all")]] for t in range(8)] for n in range(4)])
    here, validation = data.sel(target="answer"), evaluated.results[0].validation
    p = max_t_permutation(validation.predicted, validation.labels, validation.keys, 50, 0).p
    found = np.array([any(p[at[Cell(t, n, "cond", "all")]] <= 0.05 for t in range(8)) for n in range(4)])
    majority = int(np.bincount(evaluated.results[0].train_labels).argmax())
    better = float(here.chance) != 0.25
    guess = (result.labels == majority).astype(float) if better else np.full(120, 0.25)
    expected = latency(lines, np.tile(guess, (4, 1)), range(8), result.keys, found, 50, 0)
    np.testing.assert_allclose(here.latency, expected.value)
    np.testing.assert_allclose(here.latency_upper, expected.upper)
    np.testing.assert_array_equal(here.latency_censored, expected.censored)
    assert np.isfinite(here.latency).any()
    validation = evaluated.results[1].validation
    assert (max_t_permutation(validation.predicted, validation.labels, validation.keys, 50, 0).p > 0.05).all()
    assert np.isnan(data.latency.sel(target="control")).all()


def test_evidence_on_test_makes_no_latency():
    """The labels of validation in another order: nothing is found there, and test is as it was."""
    evaluated = synthetic(4, 6, 120, targets=(ANSWER,))
    labels = evaluated.results[0].validation.labels
    blind = changed(evaluated, "validation", labels=np.random.default_rng(0).permutation(labels))
    before, after = (build_grid(e, draws=99).dataset.isel(target=0) for e in (evaluated, blind))
    assert np.isfinite(before.latency).any() and np.isfinite(before.depth).any()
    np.testing.assert_array_equal(after.p_evidence, before.p_evidence)
    for name in ("latency", "latency_lower", "depth", "lag", "x0_latency"):
        assert np.isnan(after[name]).all(), name


def test_x0_accuracy_is_of_the_stronger_of_parser_and_latents_without_looking_at_test():
    data = only(tiny({0: (0.9, 0.9), X0: (0.9, 0.8, 0.6), "x0_parsed": (0.7, 0.5)}))
    assert str(data.x0_source.values[0]) == "x0_parsed"
    assert float(data.x0_accuracy[0]) == 0.5
    assert float(data.above_x0[0, 0]) == pytest.approx(0.4)
    data = only(tiny({0: (0.9, 0.9), X0: (0.1, 0.8, 0.75), "x0_parsed": (0.7, 0.9)}))
    assert (str(data.x0_source.values[0]), float(data.x0_accuracy[0])) == (X0, 0.8)
    data = only(tiny({0: (0.9, 0.9), X0: (0.6, 0.8)}))
    assert (str(data.x0_source.values[0]), float(data.x0_accuracy[0])) == (X0, 0.8)
    data = only(tiny({0: (0.9, 0.9)}))
    assert str(data.x0_source.values[0]) == ""
    assert np.isnan(data.above_x0).all()
    assert np.isnan(data.above_x0_lower).all()


def test_the_interval_of_above_x0_is_paired():
    """The probe is right wherever the picture is, and on two samples more: the difference hardly varies."""
    data = only(tiny({0: (0.6, 0.6), X0: (0.5, 0.5)}))
    difference = (np.arange(20) >= 10) & (np.arange(20) < 12)
    lower, upper = difference_interval(difference[None].astype(float), np.arange(20))
    assert float(data.above_x0_lower[0, 0]) == pytest.approx(lower[0])
    assert float(data.above_x0_upper[0, 0]) == pytest.approx(upper[0])
    apart = share_interval((np.arange(20) < 12).astype(float)[None], np.arange(20))
    assert upper[0] - lower[0] < apart[1][0] - apart[0][0]  # narrower than that of the accuracy alone


def test_nothing_is_parsed_at_steps_that_were_not_decoded(grid):
    x0_parsed = grid.dataset.baseline_accuracy.sel(baseline="x0_parsed", position="all")
    np.testing.assert_array_equal(np.isnan(x0_parsed.sel(target="answer")), [False, False, False, False, True, False])
    assert np.isnan(x0_parsed.sel(target="start")).all()


def test_a_step_that_was_not_decoded_is_held_against_what_is_parsed_around_it(grid):
    """Step 4 is not decoded: what x0-hat shows there is its latents, or what is parsed at step 3 or 5."""
    data = grid.dataset.sel(target="answer", position="all")
    latent = float(data.baseline_cross_validation.sel(baseline=X0, step=4))
    near = {step: float(data.baseline_validation.sel(baseline="x0_parsed", step=step)) for step in (3, 5)}
    assert max(near.values()) != latent
    source, step = (X0, 4) if latent > max(near.values()) else ("x0_parsed", max(near, key=near.get))
    here = data.sel(step=4)
    assert str(here.x0_source.values) == source
    assert float(here.x0_accuracy) == float(data.baseline_accuracy.sel(baseline=source, step=step))
    np.testing.assert_allclose(here.above_x0, here.accuracy - here.x0_accuracy)


@pytest.mark.parametrize(
    ("decoded", "rows"),
    [
        ([1, 3], ([1, 1, 1, 3, 3], [1, 1, 3, 3, 3])),  # the last decoded step before, the first one after
        ([0, 1, 2, 3, 4], ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])),
        ([], ([-1] * 5, [-1] * 5)),
    ],
)
def test_what_x0_hat_shows_between_decoded_steps(decoded, rows):
    parsed, latent = np.full((5, 1, 1), -1), 10 + np.arange(5).reshape(5, 1, 1)
    parsed[decoded, 0, 0] = decoded
    baseline = {"x0_parsed": parsed, "x0_latent": latent}
    found = _x0_rows(Rows(np.zeros((15, 1)), np.arange(1), np.zeros((5, 1, 1, 1), dtype=int), baseline, (), ()))
    np.testing.assert_array_equal(found[..., 0, 0], [*rows, [10, 11, 12, 13, 14]])


def test_samples_without_a_label_change_nothing_but_are_not_counted():
    clean = synthetic(3, 2, 40, targets=(MODEL_ANSWER, DOORS))
    rng = np.random.default_rng(9)

    def padded(split: SplitPredictions) -> SplitPredictions:
        count = len(split.keys)
        at = rng.permutation(2 * count).argsort()  # clean samples and samples without label, interleaved
        at = np.concatenate([np.sort(at[:count]), np.sort(at[count:])]).argsort()
        missing = np.full_like(split.labels, -1)
        wild = rng.integers(0, 2, split.predicted.shape)
        return SplitPredictions(
            np.concatenate([split.labels, missing])[at],
            np.concatenate([split.keys, split.keys])[at],
            np.concatenate([split.predicted, wild], axis=1)[:, at],
            None if split.x0_parsed is None else np.concatenate([split.x0_parsed, split.x0_parsed * 0], axis=1)[:, at],
            None if split.model_answer is None else np.concatenate([split.model_answer, split.model_answer * 0])[at],
            {name: np.concatenate([said, said * 0], axis=2)[:, :, at] for name, said in split.inputs.items()},
        )

    results = tuple(
        replace(
            r, validation=padded(r.validation), test=padded(r.test),
            train_labels=np.concatenate([r.train_labels, np.full_like(r.train_labels, -1)]),
            train_keys=np.concatenate([r.train_keys, r.train_keys + 1000]),
        )
        for r in clean.results
    )  # fmt: skip
    expected, found = build_grid(clean, draws=50).dataset, build_grid(replace(clean, results=results), draws=50).dataset
    xr.testing.assert_identical(found, expected)
    assert found.n_test.values.tolist() == [40, 40]
    assert found.n_no_answer.values.tolist() == [7, 0]


def test_best_is_chosen_on_validation_and_breaks_ties_by_step_then_layer():
    best = build_grid(tiny({0: (0.5, 1.0), 3: (0.9, 0.6), 7: (0.8, 0.9)}), draws=20).best("answer")
    assert (best.cell, best.accuracy, best.validation_accuracy) == (Cell(0, 3, "cond", "all"), 0.6, 0.9)
    tied = tiny({10: (0.9, 0.6), 2: (0.9, 0.6)}, steps=3)
    assert build_grid(tied, draws=20).best("answer").cell == Cell(0, 2, "cond", "all")
    weak = replace(tied.results[0].validation, predicted=tied.results[0].validation.predicted.copy())
    weak.predicted[:2] = 3  # step 0 fails on validation: the next step wins
    later = replace(tied, results=(replace(tied.results[0], validation=weak),))
    assert build_grid(later, draws=20).best("answer").cell == Cell(1, 2, "cond", "all")


def test_model_accuracy_counts_none_as_wrong_and_agreement_leaves_it_out():
    evaluated = tiny({0: (0.5, 0.5)})
    model_answer = np.array([0] * 8 + [1] * 4 + [-1] * 8)
    test = replace(evaluated.results[0].test, model_answer=model_answer)
    built = build_grid(replace(evaluated, results=(replace(evaluated.results[0], test=test),)), draws=50)
    assert built.dataset.attrs["model_accuracy"] == pytest.approx(8 / 20)
    assert built.dataset.attrs["model_accuracy_lower"] < 0.4 < built.dataset.attrs["model_accuracy_upper"]
    assert float(built.dataset.agreement.squeeze()) == pytest.approx((8 + 2) / 12)  # the probe says 0 ten times
    assert np.isnan(build_grid(evaluated, draws=20).dataset.attrs["model_accuracy"])


def test_cells_that_were_not_captured_are_empty():
    evaluated = tiny({0: (0.9, 0.9), 1: (0.8, 0.8)}, steps=2)
    holes = replace(evaluated, cells=(*evaluated.cells[:3], Cell(5, 4, "cond", "all")))
    data = build_grid(replace(holes, experts=("a",) * 3), draws=20).dataset.isel(target=0, position=0)
    assert data.step.values.tolist() == [0, 1, 5]
    assert data.layer.values.tolist() == [0, 1, 4]
    np.testing.assert_array_equal(np.isfinite(data.accuracy), [[1, 1, 0], [1, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(np.isfinite(data.p_permutation), np.isfinite(data.accuracy))


@pytest.mark.slow
def test_saved_grid_comes_back_the_same(grid, tmp_path):
    path = grid.save(tmp_path / "run" / "report" / "grid.nc")
    for place in (path, path.parent, path.parent.parent, str(path)):
        loaded = Grid.load(place)
        xr.testing.assert_identical(loaded.dataset, grid.dataset)
        assert loaded.best("model_answer") == grid.best("model_answer")
    grid.save(path)  # over an earlier one
    assert [p.name for p in path.parent.iterdir()] == ["grid.nc"]


@pytest.mark.slow
def test_missing_and_damaged_files_are_named(grid, tmp_path):
    with pytest.raises(InputError, match=r"grid '.*/nowhere'.*missing.*grid\.nc"):
        Grid.load(tmp_path / "nowhere")
    path = grid.save(tmp_path / "grid.nc")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"grid '.*/grid\.nc'.*damaged.*netCDF"):
        Grid.load(path)
    for name in ("position", "p_evidence", "x0_accuracy"):  # of an earlier version, or of something else
        path.unlink()
        grid.dataset.drop_vars(name).to_netcdf(path)
        with pytest.raises(InputError, match=rf"grid '.*/grid\.nc'.*\b{name}\b.*version"):
            Grid.load(path)


def test_a_failed_save_leaves_nothing(grid, tmp_path, monkeypatch):
    def broken(self, path, **settings):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(xr.Dataset, "to_netcdf", broken)
    with pytest.raises(InputError, match="disk full"):
        grid.save(tmp_path / "grid.nc")
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_one_line_that_names_it(grid):
    with pytest.raises(ValueError, match=r"^target='anwser'.* answer, model_answer, start, corridors, control"):
        grid.best("anwser")
    with pytest.raises(ValueError, match=r"^target 'answer'.*test.*\b1\b.*task\.problems"):
        evaluated = tiny({0: (1, 1)})
        empty = replace(evaluated.results[0].test, labels=np.full(20, -1))
        build_grid(replace(evaluated, results=(replace(evaluated.results[0], test=empty),)))
    with pytest.raises(ValueError, match="^cells.*layer"):
        build_grid(tiny({"embed": (1, 1)}))
    with pytest.raises(ValueError, match=r"2 experts.*\b1\b"):
        build_grid(replace(tiny({0: (1, 1)}), experts=("a", "b")))
    with pytest.raises(ValueError, match=r"^target 'answer'.*validation.*\(1, 20\).*\(2, 20\)"):
        build_grid(replace(tiny({0: (1, 1)}), cells=(Cell(0, 0, "c", "all"), Cell(0, 1, "c", "all"))))


def test_a_table_has_a_row_for_every_cell_and_a_column_for_every_variable_and_baseline(grid):
    table, data = grid.to_dataframe(), grid.dataset
    assert len(table) == len(grid.targets) * 6 * 8
    assert {"target", "step", "layer", "accuracy", "p_evidence", "baseline x_t", "baseline uniform"} <= set(
        table.columns
    )
    for row in table.sample(20, random_state=0).itertuples(index=False):
        one = data.sel(target=row.target, step=row.step, layer=row.layer).squeeze()
        assert row.accuracy == float(one.accuracy) and row.upper == float(one.upper)
        index = list(table.columns).index("baseline x_t")
        np.testing.assert_equal(row[index], float(one.baseline_accuracy.sel(baseline="x_t")))


def test_a_grid_prints_its_best_cells(grid):
    text, page = repr(grid), grid._repr_html_()
    shown = [target for target in grid.targets if target not in grid.with_role("relabelled")]
    assert "steps: 6, layers: 8" in text and len(text.splitlines()) == len(shown) + 2
    for target in shown:
        best = grid.best(target)
        cell = f"step {best.cell.step}, layer {best.cell.layer}"
        for words in (target, cell, f"{best.accuracy:.2f} [{best.lower:.2f}, {best.upper:.2f}]"):
            assert words in text and words in page
