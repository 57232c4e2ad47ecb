"""The promise of a calibrated policy, on synthetic runs whose true risk is known; its tails against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from cosprobe.cells import Cell
from cosprobe.early_exit.threshold import (
    binomial_tails,
    calibrate,
    first_exit,
    fixed_sequence,
    least_problems,
    outcomes,
    p_values,
    read_policy,
    starting_point,
    thresholds,
)

RISK, LEVEL, DRAWS, SAMPLES = 0.05, 0.9, 1000, 150
CELLS = (Cell(0, 5, "cond", "all"), Cell(2, 6, "cond", "all"))
ABOUT = {"target": "answer", "task": "maze", "kind": "one_exit", "cells": CELLS}
TRIED = thresholds(4)[3::4]  # still ends where every run stops; fewer for speed
MANY = 60_000


def runs(rng: np.random.Generator, shape: tuple[int, ...], honest: float) -> tuple[np.ndarray, np.ndarray]:
    """Synthetic runs of three exit points: confidence rises from one to the next, and an answer at one errs with chance
    1 - confidence**honest (at honest=1 confidence is what it says), the exit points of a run independently."""
    confidence = np.sort(1 - 0.75 * rng.random((*shape, 3)) ** 3, axis=-1)
    return confidence, rng.random((*shape, 3)) > confidence**honest


@pytest.fixture(scope="module")
def truth() -> dict[float, tuple[np.ndarray, np.ndarray]]:
    """Per honesty: the true risk of every threshold, among all runs and among those answered."""
    found = {}
    for honest in (0.4, 1.0, 2.0):
        confidence, wrong = runs(np.random.default_rng(99), (MANY,), honest)
        answered, errors = outcomes(confidence, wrong, TRIED)
        found[honest] = errors / len(wrong), errors / np.maximum(answered, 1)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("honest", [0.4, 1.0, 2.0])
@pytest.mark.parametrize("error_reference", ["model_answer", "truth"])
def test_the_risk_is_exceeded_no_more_often_than_promised(error_reference, honest, truth):
    """1,000 calibrations at once; one-sided binomial test of the share whose true risk is above the one asked for.

    The true risk is itself estimated (400,000 runs): thresholds within two of its standard errors count as kept.
    """
    confidence, wrong = runs(np.random.default_rng(1), (DRAWS, SAMPLES), honest)
    start = starting_point(*runs(np.random.default_rng(2), (100,), honest), TRIED, RISK, error_reference)
    p = p_values(*outcomes(confidence, wrong, TRIED), SAMPLES, RISK, error_reference)
    last = fixed_sequence(p, 1 - LEVEL, start)
    risk = truth[honest][0 if error_reference == "model_answer" else 1]
    passed = last >= start
    exceeded = passed & (risk[last] > RISK + 2 * math.sqrt(RISK / MANY))
    assert stats.binomtest(int(exceeded.sum()), DRAWS, 1 - LEVEL, alternative="greater").pvalue > 0.01
    assert passed.mean() > 0.1, "a policy that never stops keeps every promise"


@pytest.mark.slow
def test_the_promise_is_used_not_only_kept(truth):
    """The test above would pass if policies were far too careful: where the risk can be reached, some exceed it."""
    confidence, wrong = runs(np.random.default_rng(1), (DRAWS, SAMPLES), 1.0)
    last = fixed_sequence(p_values(*outcomes(confidence, wrong, TRIED), SAMPLES, RISK, "model_answer"), 1 - LEVEL)
    risk = truth[1.0][0][last]
    assert (risk > RISK).mean() > 0.01
    assert np.median(risk) > RISK / 3


@pytest.mark.slow
def test_choosing_without_a_test_breaks_the_promise(truth):
    """The same runs, the most eager threshold whose *observed* risk is small enough: far above one in ten."""
    confidence, wrong = runs(np.random.default_rng(1), (DRAWS, SAMPLES), 1.0)
    _, errors = outcomes(confidence, wrong, TRIED)
    last = np.array([np.flatnonzero(row <= RISK * SAMPLES)[-1] for row in errors])
    assert (truth[1.0][0][last] > RISK).mean() > 0.3


def test_outcomes_are_those_of_a_loop(rng):
    confidence, wrong = runs(rng, (4, 30), 1.0)
    answered, errors = outcomes(confidence, wrong, TRIED)
    for d in range(4):
        for t, threshold in enumerate(TRIED):
            exits = [next((k for k in range(3) if row[k] >= threshold), None) for row in confidence[d]]
            assert answered[d, t] == sum(k is not None for k in exits)
            assert errors[d, t] == sum(wrong[d, i, k] for i, k in enumerate(exits) if k is not None)


def test_the_first_exit_point_counts_not_the_surest():
    assert first_exit(np.array([[0.2, 0.9, 0.4], [0.1, 0.2, 0.3]]), 0.4).tolist() == [1, 3]


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.4])
def test_tails_are_sums_of_the_chances_of_few_errors(rate):
    table = binomial_tails(60, rate)
    for count, errors in ((0, 0), (1, 0), (7, 2), (60, 0), (60, 11), (60, 60), (30, 45)):
        chances = [math.comb(count, k) * rate**k * (1 - rate) ** (count - k) for k in range(min(errors, count) + 1)]
        assert table[count, errors] == pytest.approx(sum(chances), abs=1e-12)


def test_how_many_problems_a_risk_takes():
    assert least_problems(0.05, 0.95) == 59  # 0.95**59 = 0.0485
    assert least_problems(0.01, 0.95) == 299
    few = least_problems(0.05, 0.95, rate=0.02)
    assert few is not None and few > 59
    assert stats.binom.cdf(math.ceil(0.02 * few), few, 0.05) <= 0.05
    sizes = np.arange(59, few)
    assert (stats.binom.cdf(np.ceil(0.02 * sizes), sizes, 0.05) > 0.05).all()
    assert least_problems(0.05, 0.95, rate=0.05) is None
    assert least_problems(0.05, 0.95, rate=0.0499) is None


def test_a_sequence_ends_before_its_first_failure():
    p = np.array([[0.01, 0.04, 0.2, 0.01], [0.2, 0.01, 0.01, 0.01]])
    assert fixed_sequence(p, 0.05).tolist() == [1, -1]
    assert fixed_sequence(p, 0.05, start=1).tolist() == [1, 3]


def test_thresholds_go_from_careful_to_always():
    tried = thresholds(4)
    assert (np.diff(tried) < 0).all()
    assert tried[0] == pytest.approx(0.9999) and tried[-1] == 0


def test_a_policy_says_what_it_was_made_of(rng):
    confidence, wrong = runs(rng, (300,), 2.0)
    policy = calibrate(confidence[:, :2], wrong[:, :2], 4, 0.2, 0.95, error_reference="model_answer", **ABOUT)
    assert policy.stops and policy.p <= 0.05 and policy.problems == 300
    exit_point = first_exit(confidence[:, :2], policy.threshold)
    assert policy.answered == (exit_point < 2).sum()
    assert policy.errors == wrong[exit_point < 2, exit_point[exit_point < 2]].sum()
    assert read_policy(policy.described()) == policy


def test_probes_that_know_nothing_never_stop():
    confidence, wrong = np.full((100, 2), 0.99999), np.ones((100, 2), dtype=bool)
    policy = calibrate(confidence, wrong, 4, RISK, 0.95, error_reference="model_answer", **ABOUT)
    assert not policy.stops and policy.answered == 0
    assert policy.described()["threshold"] is None
    assert read_policy(policy.described()) == policy


@pytest.mark.parametrize(
    ("count", "risk", "level", "message"),
    [
        (58, 0.05, 0.95, r"use\.calibration=58.*\b59\b.*\b0\.05\b.*\b0\.95\b"),
        (58, 0.0, 0.95, r"use\.risk=0\.0.*\b0\b.*\b1\b"),
        (58, 0.05, 1.0, r"use\.confidence=1\.0.*\b0\b.*\b1\b"),
    ],
)
def test_what_cannot_be_promised_is_refused(count, risk, level, message):
    confidence, wrong = np.ones((count, 2)), np.zeros((count, 2), dtype=bool)
    with pytest.raises(ValueError, match=message):
        calibrate(confidence, wrong, 4, risk, level, error_reference="model_answer", **ABOUT)


def test_a_damaged_policy_is_refused():
    with pytest.raises(ValueError, match="policy.*cells.*use=early"):
        read_policy({"threshold": 0.5})
