"""Compute and accuracy of every stopping rule, against loops over problems."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from cosprobe.early_exit.frontier import evaluate_policy, outcome, policy_exits, stopping_rules
from cosprobe.evaluation.intervals import difference_interval
from tests.examples.stopping import CELLS, FLOPS, PRICES, PROBLEMS, WHOLE, synthetic


@pytest.mark.parametrize("error_reference", ["model_answer", "truth"])
def test_what_a_policy_does_on_fresh_problems_is_a_loop_over_them(error_reference):
    calibrated = synthetic(error_reference=error_reference)
    trajectories, compute, errors, answered, correct = calibrated.fresh, [], 0, 0, []
    for i, row in enumerate(trajectories.confidence):
        exit_point = next((k for k, confidence in enumerate(row) if confidence >= 0.7), None)
        if exit_point is None:
            compute.append(WHOLE)
            correct.append(trajectories.model_correct[i])
            continue
        step, layer = CELLS[exit_point].step, CELLS[exit_point].layer
        compute.append(1 + 10 + step * 8 + FLOPS.layers[layer])
        answered += 1
        prediction = trajectories.predictions[i, exit_point]
        correct.append(prediction == PROBLEMS[i].answer)
        reference = PROBLEMS[i].answer if error_reference == "truth" else trajectories.model_answer[i]
        errors += prediction != reference
    result = evaluate_policy(calibrated, PRICES)
    among = answered if error_reference == "truth" else 40
    exact = stats.binomtest(int(errors), among).proportion_ci(0.95, "exact")
    assert (result.samples, result.answered, result.errors) == (40, answered, errors)
    assert result.risk == pytest.approx(errors / among)
    assert result.interval == pytest.approx((exact.low, exact.high), abs=1e-9)
    assert result.compute == pytest.approx(np.mean(compute) / WHOLE)
    assert result.accuracy == pytest.approx(np.mean(correct))
    finished = trajectories.model_correct.mean()
    assert result.gain[0] == pytest.approx(np.mean(correct) - finished)
    difference = np.array(correct, dtype=float) - trajectories.model_correct
    assert result.gain[1:] == pytest.approx(np.ravel(difference_interval(difference[None], trajectories.keys)))
    assert result.gain[1] < result.gain[0] < result.gain[2]
    assert result.first_exit_gain[0] == pytest.approx(trajectories.correct[:, 0].mean() - finished)
    assert result.finished_seconds == pytest.approx(0.5) and result.seconds < 0.5


def test_a_policy_that_never_stops_finishes_every_run():
    result = evaluate_policy(synthetic(threshold=np.inf), PRICES)
    assert (result.answered, result.errors, result.risk) == (0, 0, 0.0)
    assert (result.compute, result.evaluations) == (1.0, 5.0)
    assert result.gain[0] == 0 and -result.gain[1] == result.gain[2] < 0.1
    nothing = evaluate_policy(synthetic(error_reference="truth", threshold=np.inf), PRICES)
    assert (nothing.risk, nothing.interval) == (0.0, (0.0, 1.0))


@pytest.mark.slow
def test_the_stopping_rules_are_these_four():
    calibrated = synthetic()
    trajectories = calibrated.fresh
    fixed, x0, entropy, policy = stopping_rules(calibrated, PRICES)
    assert [rule.name for rule in (fixed, x0, entropy, policy)] == [
        "fixed step", "parsed x0-hat", "entropy rule", "policy",
    ]  # fmt: skip
    assert fixed.thresholds == ("step 0, layer 2", "step 1, layer 1", "step 3, layer 0")
    assert fixed.compute == pytest.approx(np.array([17, 23, 37]) / WHOLE)
    assert fixed.evaluations == pytest.approx([0.75, 1.5, 3.25])
    agrees = trajectories.predictions == trajectories.model_answer[:, None]
    assert fixed.agreement == pytest.approx(agrees.mean(axis=0))
    assert x0.compute == pytest.approx(np.array([39, 55]) / WHOLE)
    assert fixed.seconds == pytest.approx([0.13, 0.16, 0.23])
    assert x0.seconds == pytest.approx([0.34, 0.42])
    assert x0.accuracy == pytest.approx(trajectories.x0_correct.mean(axis=0))
    # entropy is a falling function of confidence here, so both rules trace one frontier
    assert entropy.compute.min() == policy.compute.min() == pytest.approx(17 / WHOLE)
    assert (np.diff(policy.compute) <= 1e-12).all() and (np.diff(entropy.compute) <= 1e-12).all()


@pytest.mark.slow
def test_the_entropy_rule_stops_at_the_first_exit_point_with_no_more_than_its_entropy():
    calibrated = synthetic()
    trajectories = calibrated.fresh
    rule = stopping_rules(calibrated, PRICES)[2]
    middle = len(rule.thresholds) // 2
    value = np.unique(np.quantile(trajectories.entropy, np.linspace(0, 1, 60)))[middle]
    exits = np.array([next((k for k, e in enumerate(row) if e <= value), 3) for row in trajectories.entropy])
    spent = [*(FLOPS.until(cell.step, cell.layer) for cell in CELLS), WHOLE]
    assert rule.compute[middle] == pytest.approx(np.mean([spent[exit_point] for exit_point in exits]) / WHOLE)
    assert rule.agreement[middle] == pytest.approx(outcome(trajectories, exits).agrees.mean())


def test_a_finished_run_agrees_with_itself_even_when_it_ends_in_none():
    trajectories = synthetic().fresh
    ends = outcome(replace(trajectories, model_answer=np.full(40, -1)), np.full(40, 3))
    assert ends.agrees.all()
    assert (ends.correct == trajectories.model_correct).all()
    assert (policy_exits(trajectories, synthetic(threshold=0.0).policy) == 0).all()
