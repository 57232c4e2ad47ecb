"""Compute and accuracy of every way of stopping, against loops over problems."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from cosprobe.early_exit.frontier import outcome, policy_looks, realised, spent, ways
from cosprobe.evaluation.intervals import difference_interval
from tests.examples.stopping import CELLS, CLOCK, COST, PROBLEMS, TOTAL, WHOLE, synthetic


@pytest.mark.parametrize("against", ["choice", "truth"])
def test_what_is_realised_is_a_loop_over_problems(against):
    stopping = synthetic(against=against)
    records, compute, errors, answered, right = stopping.fresh, [], 0, 0, []
    for i, row in enumerate(records.confidence):
        look = next((k for k, sure in enumerate(row) if sure >= 0.7), None)
        if look is None:
            compute.append(WHOLE)
            right.append(records.solved[i])
            continue
        step, layer = CELLS[look].step, int(CELLS[look].site)
        compute.append(1 + 10 + step * 8 + COST.layers[layer])
        answered += 1
        said = records.said[i, look]
        right.append(said == PROBLEMS[i].answer)
        errors += said != PROBLEMS[i].answer if against == "truth" else said != records.drawn[i]
    done = realised(stopping, COST, CLOCK, TOTAL)
    among = answered if against == "truth" else 40
    exact = stats.binomtest(int(errors), among).proportion_ci(0.95, "exact")
    assert (done.samples, done.answered, done.errors) == (40, answered, errors)
    assert done.risk == pytest.approx(errors / among)
    assert done.interval == pytest.approx((exact.low, exact.high), abs=1e-9)
    assert done.compute == pytest.approx(np.mean(compute) / WHOLE)
    assert done.accuracy == pytest.approx(np.mean(right))
    assert done.gain[0] == pytest.approx(np.mean(right) - records.solved.mean())
    difference = np.array(right, dtype=float) - records.solved
    assert done.gain[1:] == pytest.approx(np.ravel(difference_interval(difference[None], records.keys)))
    assert done.gain[1] < done.gain[0] < done.gain[2]
    assert done.first_gain[0] == pytest.approx(records.right[:, 0].mean() - records.solved.mean())
    assert done.finished_seconds == pytest.approx(0.5) and done.seconds < 0.5


def test_a_policy_that_never_stops_finishes_every_run():
    done = realised(synthetic(threshold=np.inf), COST, CLOCK, TOTAL)
    assert (done.answered, done.errors, done.risk, done.compute, done.evaluations) == (0, 0, 0.0, 1.0, 5.0)
    assert done.gain[0] == 0 and -done.gain[1] == done.gain[2] < 0.1
    nothing = realised(synthetic(against="truth", threshold=np.inf), COST, CLOCK, TOTAL)
    assert (nothing.risk, nothing.interval) == (0.0, (0.0, 1.0))


def test_the_ways_are_these_four():
    stopping = synthetic()
    records = stopping.fresh
    fixed, shown, entropy, policy = ways(stopping, COST, CLOCK, TOTAL)
    assert [way.name for way in (fixed, shown, entropy, policy)] == [
        "fixed step", "readout of x0-hat", "entropy rule", "policy",
    ]  # fmt: skip
    assert fixed.settings == ("step 0, layer 2", "step 1, layer 1", "step 3, layer 0")
    assert fixed.compute == pytest.approx(np.array([17, 23, 37]) / WHOLE)
    assert fixed.evaluations == pytest.approx([0.75, 1.5, 3.25])
    assert fixed.agreement == pytest.approx((records.said == records.drawn[:, None]).mean(axis=0))
    assert shown.compute == pytest.approx(np.array([39, 55]) / WHOLE)
    assert fixed.seconds == pytest.approx([0.13, 0.16, 0.23])
    assert shown.seconds == pytest.approx([0.34, 0.42])
    assert shown.accuracy == pytest.approx(records.shown_right.mean(axis=0))
    # entropy is a falling function of confidence here, so both rules trace one frontier
    assert entropy.compute.min() == policy.compute.min() == pytest.approx(17 / WHOLE)
    assert (np.diff(policy.compute) <= 1e-12).all() and (np.diff(entropy.compute) <= 1e-12).all()


def test_the_entropy_rule_stops_at_the_first_look_with_no_more_than_its_entropy():
    stopping = synthetic()
    records = stopping.fresh
    way = ways(stopping, COST, CLOCK, TOTAL)[2]
    middle = len(way.settings) // 2
    value = np.unique(np.quantile(records.entropy, np.linspace(0, 1, 60)))[middle]
    looks = np.array([next((k for k, e in enumerate(row) if e <= value), 3) for row in records.entropy])
    assert way.compute[middle] == pytest.approx(spent(looks, CELLS, COST.until, WHOLE).mean() / WHOLE)
    assert way.agreement[middle] == pytest.approx(outcome(records, looks)[0].mean())


def test_a_finished_run_agrees_with_itself_even_when_it_ends_in_none():
    records = synthetic().fresh
    agrees, right = outcome(replace(records, drawn=np.full(40, -1)), np.full(40, 3))
    assert agrees.all()
    assert (right == records.solved).all()
    assert (policy_looks(records, synthetic(threshold=0.0).policy) == 0).all()
