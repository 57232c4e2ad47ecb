"""The sentences say what the grid holds, and the strongest caveat is one that is true."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest

from cosprobe.evaluation import Grid
from cosprobe.webpage.sentences import caveat, main_target, nearest, sentences, x0_in_words
from tests.examples.pages import grid

pytestmark = pytest.mark.slow


@cache
def made() -> Grid:
    return grid(positions=("all",))


def changed(**values) -> Grid:
    """The grid with other values of variables, at all cells of the answer or at all cells of a named target."""
    data = made().dataset.copy(deep=True)
    for name, value in values.items():
        variable, _, target = name.partition("__")
        data[variable].loc[{"target": target or "answer"}] = value
    return Grid(data)


def said(of: Grid) -> list[str]:
    return sentences(of, "`mini`", "maze")


def test_there_are_five_and_they_name_model_task_samples_and_the_video():
    found, a = said(made()), made().dataset.attrs
    assert len(found) == 5 and all(text.endswith(".") for text in found)
    assert "`mini`" in found[0] and "maze" in found[0] and "120 samples" in found[0]
    assert "4 layers at 5 denoising steps" in found[0]
    assert f"{a['model_accuracy']:.2f} [{a['model_accuracy_lower']:.2f}, {a['model_accuracy_upper']:.2f}]" in found[0]


def test_where_it_is_decodable_with_interval_input_chance_and_count():
    best, data = made().best("answer"), made().dataset.sel(target="answer")
    text, evidence = said(made())[1], data.p_evidence <= 0.05
    cell = data.sel(step=best.cell.step, layer=best.cell.layer, position=best.cell.position)
    assert text.startswith("`answer` is decodable")
    for part in (
        f"layer {best.cell.layer} at step {best.cell.step}",
        f"{best.accuracy:.2f} [{best.lower:.2f}, {best.upper:.2f}]",
        f"({cell.reference_source.values}) on {float(cell.reference):.2f}", f"chance on {float(cell.chance):.2f}",
        f"{int(evidence.sum())} of 20 cells",
        f"earliest at step {int(data.step.values[evidence.any(['layer', 'position'])].min())}",
    ):  # fmt: skip
        assert part in text, part


def test_without_evidence_it_says_so():
    text = said(changed(p_evidence=0.2))[1]
    assert "there is no evidence that it is decodable" in text and "p = 0.200" in text
    assert "no p-value" in said(changed(p_evidence=np.nan))[1]
    some = changed(p_evidence=0.2)
    some.dataset.p_evidence.loc[{"target": "answer", "step": 1, "layer": 0}] = 0.01
    assert "no evidence" in said(some)[1] and "1 of 20 cells" in said(some)[1]


def test_cells_above_x0_are_counted_and_otherwise_there_is_no_evidence():
    text, data = said(made())[2], made().dataset.sel(target="answer")
    cell = made().at("answer", made().best("answer").cell)
    count = int(((data.p_x0 <= 0.05) & (data.p_evidence <= 0.05)).sum())
    assert count and f"In {count} cell" in text and "earliest at step 2" in text
    difference = f"{float(cell.above_x0):+.2f} [{float(cell.above_x0_lower):+.2f}, {float(cell.above_x0_upper):+.2f}]"
    assert difference in text
    assert said(changed(p_x0=0.5))[2].startswith("There is no evidence")
    assert difference in said(changed(p_x0=0.5))[2]
    other = changed(p_x0=0.5, p_x0__model_answer=1.0)
    assert "of other targets" not in said(other)[2]
    where = {"target": "model_answer", "step": [3, 4], "layer": 3}
    other.dataset.p_x0.loc[where] = other.dataset.p_evidence.loc[where] = 0.01
    assert "of other targets, `model_answer` has 2 cells above x0-hat" in said(other)[2]
    assert said(changed(p_evidence=0.5))[2].startswith("There is no evidence")  # above x0-hat, but not above an input
    assert "not compared" in said(changed(x0_accuracy=np.nan))[2]


def test_random_labels_are_as_expected_or_not():
    assert "0 cells, as expected" in said(made())[3]
    assert "random weights were not measured" in said(made())[3]
    bad = said(changed(p_permutation__control=0.01))
    assert "20 cells, where none is expected" in bad[3]
    assert bad[4].startswith("Strongest caveat: random labels")


@pytest.mark.parametrize(
    ("values", "begins"),
    [
        ({"p_permutation__control": 0.01, "p_evidence": 0.5}, "random labels"),
        ({"n_test_problems": 11, "p_evidence": 0.5}, "11 test problems"),
        ({"n_effective": 3.0}, "120 test problems (effective number 3)"),
        ({"p_evidence": 0.5, "p_x0": 0.5}, "no evidence is not evidence of absence"),
        ({"p_x0": 0.5}, "no probe is shown to be more accurate than what x0-hat shows"),
        ({}, "what is decodable need not be used"),
    ],
)
def test_the_strongest_caveat_comes_first(values, begins):
    assert caveat(changed(**values), "answer").startswith(begins)


def test_a_blank_map_beside_an_x0_hat_that_shows_the_answer_is_a_limit_of_the_probe():
    planted = {"p_evidence": 1.0, "p_x0": 1.0, "above_x0": -0.75, "above_x0_lower": -0.81, "above_x0_upper": -0.67,
               "x0_accuracy": 1.0, "x0_source": "x0_parsed", "baseline_lower": 0.9}  # fmt: skip
    text = caveat(changed(**planted), "answer")
    assert text.startswith("x0-hat shows `answer` at the same step") and "-0.75 [-0.81, -0.67]" in text
    assert "so the model has it" in text and "limit of the probe" in text
    for other in ({"above_x0_upper": 0.01}, {"baseline_lower": 0.2}, {"above_x0_upper": np.nan}):  # unsure; at chance
        assert caveat(changed(**planted | other), "answer").startswith("no evidence is not evidence of absence")
    assert "limit of the probe" not in caveat(changed(**planted | {"p_evidence": 0.01}), "answer")
    undecoded = changed(**planted)
    best = undecoded.best("answer").cell
    undecoded.dataset.baseline_accuracy.loc[{"target": "answer", "baseline": "x0_parsed", "step": best.step}] = np.nan
    assert caveat(undecoded, "answer").startswith("x0-hat shows `answer` at the nearest decoded steps")


def test_the_step_at_which_x0_hat_was_parsed_is_named():
    assert nearest(3, [0, 2, 5]) == [2, 5] and nearest(5, [0, 2, 5]) == [5] and nearest(7, [0, 2, 5]) == [5]
    assert x0_in_words("x0_latent", 3, [0, 2]) == "probe of its latent at this step"
    assert "at this step" in x0_in_words("x0_parsed", 2, [0, 2]) and "nearest" not in x0_in_words(
        "x0_parsed", 2, [0, 2]
    )
    assert "nearest decoded step, 2 or 5" in x0_in_words("x0_parsed", 3, [0, 2, 5])
    of = changed(p_x0=0.5)
    where = {"target": "answer", "baseline": "x0_parsed"}
    of.dataset.baseline_accuracy.loc[where] = 0.9
    assert "already shows at the same step" in said(of)[2]
    of.dataset.baseline_accuracy.loc[where | {"step": 1}] = np.nan
    assert "already shows at that step or the nearest decoded ones" in said(of)[2]


def test_missing_baselines_and_fits_that_did_not_converge_are_caveats():
    data = made().dataset.copy(deep=True)
    names = data.not_measured.values.astype("U40")
    names[data.target.values == "answer"] = "embed,x_t"
    missing = Grid(data.assign_coords(not_measured=("target", names)))
    assert "embed, x_t" in caveat(missing, "answer")
    unfinished = json.dumps(made().provenance | {"converged": {"answer": [7, 9]}})
    assert caveat(Grid(made().dataset.assign_attrs(provenance=unfinished)), "answer").startswith("2 of 9 fits")


def test_confounds_that_explain_a_part_are_a_caveat():
    data = made().dataset.copy(deep=True)
    for name, value in (("residual_before", 0.9), ("residual_after", 0.5), ("residual_upper", -0.1)):
        data[name] = ("target", np.full(data.sizes["target"], value))
    assert "falls from 0.90 to 0.50" in caveat(Grid(data), "answer")


def test_the_main_target_is_the_answer_or_the_first_one():
    assert main_target(made()) == "answer"
    assert main_target(Grid(made().dataset.sel(target=["start", "model_answer"]))) == "model_answer"
    assert main_target(Grid(made().dataset.sel(target=["start", "control"]))) == "start"
    assert len(said(Grid(made().dataset.sel(target=["start", "control"])))) == 5
