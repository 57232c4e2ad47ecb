"""Half-maximum latencies: planted curves of known onset, and a slow and obvious version of the same."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cosprobe.evaluation import latency as module
from cosprobe.evaluation.latency import lag, lag_difference, latency

STEPS = np.arange(20.0)


def logistic(onset: float, ceiling: float, floor: float = 0.25, width: float = 1.0) -> np.ndarray:
    return floor + (ceiling - floor) / (1 + np.exp(-(STEPS - onset) / width))


def exact(curves: np.ndarray, samples: int = 6) -> np.ndarray:
    """Every sample as right as the curve: no sampling error."""
    return np.repeat(np.asarray(curves, dtype=float)[:, :, None], samples, axis=2)


def noisy(curves: np.ndarray, samples: int, seed: int = 0) -> np.ndarray:
    """Right and wrong, a problem's difficulty shared by all lines and points."""
    rng = np.random.default_rng(seed)
    luck = 0.5 * rng.random(samples) + 0.5 * rng.random((*np.shape(curves), samples))
    luck = np.sort(luck.ravel()).searchsorted(luck) / luck.size  # uniform again, still correlated
    return (luck < np.asarray(curves)[:, :, None]).astype(float)


def run(correct: np.ndarray, chance=0.25, at=STEPS, keys=None, found=None, **changes):
    lines, _, samples = correct.shape
    keys = np.arange(samples) if keys is None else keys
    found = np.ones(lines, dtype=bool) if found is None else found
    chance = np.full(lines, chance) if np.isscalar(chance) else chance
    return latency(correct, chance, list(at), keys, found, **({"draws": 200} | changes))


@pytest.mark.parametrize("onset", [3.0, 7.3, 11.5])
def test_onset_of_a_logistic_curve_whatever_its_ceiling(onset):
    ceilings = [0.35, 0.6, 0.95]
    result = run(exact([logistic(onset, ceiling) for ceiling in ceilings]))
    np.testing.assert_allclose(result.value, onset, atol=0.06)  # what is below 0 or after 19 is missing from the curve
    np.testing.assert_allclose(result.value, result.value[0], atol=1e-9)
    np.testing.assert_allclose(result.lower, result.value, atol=1e-9)
    np.testing.assert_allclose(result.upper, result.value, atol=1e-9)
    assert not result.censored.any()


def test_interpolates_between_points_and_takes_positions_as_given():
    curves = [[0.0, 0.2, 0.8, 0.8], [0.0, 0.4, 0.1, 0.8]]  # the second reaches half of 0.8 first, then dips
    result = run(exact(curves), chance=0.0, at=[0, 10, 13, 40])
    np.testing.assert_allclose(result.value, [10 + 3 * (0.4 - 0.2) / 0.6, 10])


def test_reached_at_the_first_point_is_censored():
    result = run(exact([[0.7, 0.9, 0.9], [0.3, 0.9, 0.9]]), at=[4, 6, 8])
    assert result.censored.tolist() == [True, False]
    assert result.value[0] == result.lower[0] == result.upper[0] == 4
    assert result.value[1] > 4


def test_points_that_do_not_exist_are_skipped():
    full = exact([[0.25, 0.25, 0.5, 0.9, 0.9]])
    holes = exact([[np.nan, 0.25, np.nan, 0.9, np.nan], [np.nan] * 5])
    result = run(np.concatenate([full, holes]), at=[0, 1, 2, 3, 4])
    np.testing.assert_allclose(result.value[:2], [2 + (0.575 - 0.5) / 0.4, 2.0])
    assert np.isnan([result.value[2], result.lower[2], result.upper[2]]).all()
    first = run(exact([[np.nan, 0.9, np.nan, 0.9, np.nan]]), at=[0, 1, 2, 3, 4])
    assert (first.value[0], first.censored[0]) == (1.0, True)


def test_no_latency_without_evidence():
    good, chance, below = logistic(5, 0.9), np.full(20, 0.25), np.full(20, 0.1)
    result = run(exact([good, good, chance, below]), found=np.array([True, False, True, True]))
    assert np.isfinite(result.value).tolist() == [True, False, False, False]
    for part in (result.lower, result.upper, result.bootstrap[:, 0]):
        assert np.isnan(part[1:]).all()
    assert not result.censored[1:].any()
    weak = np.zeros((1, 2, 30))
    weak[0, 1, 0] = 1.0  # one problem in thirty: missing from a third of the draws
    assert np.isnan(run(weak, chance=0.0, at=[0, 1]).value).all()


def slow(correct: np.ndarray, chance: np.ndarray, at: np.ndarray) -> float:
    """One line, one draw: [point sample] and the chance of each sample."""
    points = [(p, np.mean(row) - np.mean(chance)) for p, row in zip(at, correct, strict=True) if not np.isnan(row[0])]
    best = max((height for _, height in points), default=0.0)
    if best <= 0:
        return np.nan
    for i, (position, height) in enumerate(points):
        if height >= best / 2 - 1e-9:
            if i == 0:
                return position
            left, low = points[i - 1]
            return left + (position - left) * (best / 2 - low) / (height - low)
    raise AssertionError


@pytest.mark.parametrize("fixed", [True, False])
def test_bootstrap_equals_a_loop_over_lines_and_draws(fixed, monkeypatch):
    rng = np.random.default_rng(3)
    keys = rng.choice(list("abcdefghijklmnopqr"), 60)
    at = np.array([0, 1, 3, 7, 8, 12.0])
    curve = np.array([0.2, 0.3, 0.6, 0.7, 0.8, 0.8])
    correct = (rng.random((5, 6, 60)) < np.stack([curve, curve[::-1], curve, 0.6 * curve, curve])[..., None]) * 1.0
    correct[2, [0, 3]] = np.nan
    chance = np.full(5, 0.2) if fixed else (rng.random((5, 60)) < 0.2).astype(float)
    guess = np.broadcast_to(chance[:, None], (5, 60)) if fixed else chance
    names = np.unique(keys)
    expected = np.empty((5, 80))
    times = np.random.default_rng(11).multinomial(len(names), [1 / len(names)] * len(names), size=80)
    for b, row in enumerate(times):
        drawn = np.concatenate([np.tile(np.flatnonzero(keys == n), k) for n, k in zip(names, row, strict=True)])
        for line in range(5):
            expected[line, b] = slow(correct[line][:, drawn], guess[line, drawn], at)
    for chunk in (4096, 1):
        monkeypatch.setattr(module, "CHUNK", chunk)
        result = run(correct, chance, at, keys, draws=80, seed=11)
        np.testing.assert_allclose(result.bootstrap, expected, atol=1e-9)
        np.testing.assert_allclose(result.value, [slow(c, g, at) for c, g in zip(correct, guess, strict=True)])
        for line, value in enumerate(result.value):  # bias-corrected percentiles, one line at a time
            below = np.mean(np.where(np.isclose(expected[line], value), 0.5, expected[line] < value))
            shift = 2 * stats.norm.ppf(np.clip(below, 0.5 / 80, 1 - 0.5 / 80))
            ends = np.quantile(expected[line], stats.norm.cdf([shift - 2.24, shift + 2.24]))
            np.testing.assert_allclose([result.lower[line], result.upper[line]], ends, atol=1e-9)


def test_intervals_hold_the_planted_onset_and_the_order_of_lines():
    curves = [logistic(6, 0.9, width=1.5), logistic(6, 0.5, width=1.5), logistic(10, 0.9, width=1.5)]
    inside = np.zeros(3)
    for seed in range(20):
        result = run(noisy(curves, 300, seed), seed=seed)
        inside += (result.lower <= [6, 6, 10]) & (result.upper >= [6, 6, 10])
        late = lag(result, [2, 1], [0, 0])
        assert late.lower[0] > 2  # ten against six, seen every time
        assert abs(late.value[1]) < 2  # half the ceiling, the same onset
    assert (inside >= 15).all()


def test_lag_is_paired():
    """Two lines that share all their luck: each onset is unsure, their difference is not."""
    curve, none = noisy([logistic(6, 0.7, width=2)], 60), np.full((1, 2, 60), np.nan)
    shifted = np.concatenate([none, curve], axis=1)  # the same curve, two steps later
    both = run(np.concatenate([np.concatenate([curve, none], axis=1), shifted]), chance=0.2, at=np.arange(22.0))
    apart = lag(both, [1], [0])
    assert both.upper[0] - both.lower[0] > 0.5
    assert apart.value[0] == pytest.approx(2)
    assert apart.upper[0] - apart.lower[0] < 1e-9
    np.testing.assert_allclose(lag(both, [0], [1]).value, -apart.value)


def test_a_difference_of_lags_is_paired_and_interval_is_that_of_the_draws():
    curves = [logistic(9, 0.9), logistic(4, 0.8), logistic(8, 0.7), logistic(5, 0.9)]
    found = run(exact(curves))
    assert lag_difference(found, (0, 1), (2, 3)) == pytest.approx((2, 2, 2), abs=0.1)
    noise = run(noisy(curves, 120))
    value, lower, upper = lag_difference(noise, (0, 1), (2, 3))
    one, other = (lag(noise, [a], [b]) for a, b in ((0, 1), (2, 3)))
    assert value == pytest.approx(one.value[0] - other.value[0]) and lower < value < upper
    assert lower < 2 < upper
    assert lag_difference(noise, (0, 1), (0, 1)) == (0, 0, 0)  # the same lines: nothing is left
    back = lag_difference(noise, (2, 3), (0, 1))
    assert back == pytest.approx((-value, -upper, -lower), abs=0.05)
    known = np.array([True, True, True, False])
    assert np.isnan(lag_difference(run(noisy(curves, 120), found=known), (0, 1), (2, 3))).all()


def test_lag_says_which_way_censoring_leans():
    early, late, never = [0.9, 0.9, 0.9], [0.25, 0.3, 0.9], [0.25, 0.25, 0.25]
    result = run(exact([early, late, never]), at=[0, 1, 2])
    found = lag(result, [0, 1, 0, 0], [1, 0, 0, 2])
    assert found.at_most.tolist() == [True, False, True, False]
    assert found.at_least.tolist() == [False, True, True, False]
    assert np.isnan([found.value[3], found.lower[3], found.upper[3]]).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(0.2, 4), st.floats(0.5, 3), st.floats(-5, 5))
def test_latency_ignores_the_scale_of_accuracy_and_follows_that_of_positions(seed, scale, stretch, shift):
    rng = np.random.default_rng(seed)
    correct = rng.integers(0, 2, (3, 5, 24)).astype(float)
    at, keys = np.cumsum(rng.random(5) + 0.1), rng.integers(0, 8, 24)
    plain = run(correct, 0.3, at, keys, draws=20, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaled = run(correct * scale, 0.3 * scale, at, keys, draws=20, seed=seed)
    np.testing.assert_allclose(scaled.bootstrap, plain.bootstrap, atol=1e-6)
    moved = run(correct, 0.3, at * stretch + shift, keys, draws=20, seed=seed)
    np.testing.assert_allclose(moved.value, plain.value * stretch + shift, atol=1e-9)
    order = rng.permutation(24)
    shuffled = run(correct[:, :, order], 0.3, at, keys[order], draws=20, seed=seed)
    np.testing.assert_allclose(shuffled.bootstrap, plain.bootstrap, atol=1e-9)
    inside = plain.bootstrap[~np.isnan(plain.bootstrap)]
    assert ((at[0] <= inside) & (inside <= at[-1])).all()


def test_bad_input_is_named():
    correct = exact([[0.2, 0.9]])
    with pytest.raises(ValueError, match=r"^at=\[1, 0\].*\b2\b"):
        run(correct, at=[1, 0])
    with pytest.raises(ValueError, match=r"^at=\[0\].*\b2\b"):
        run(correct, at=[0])
    with pytest.raises(ValueError, match=r"^chance\[1, 3\].*\[1\].*\[1, 6\]"):
        run(correct, chance=np.zeros((1, 3)), at=[0, 1])
    with pytest.raises(ValueError, match="line 0, point 1.*NaN"):
        run(np.where(np.arange(6) + np.arange(2)[:, None] == 6, np.nan, correct), at=[0, 1])
    with pytest.raises(ValueError, match="no samples"):
        run(correct[:, :, :0], at=[0, 1])
    with pytest.raises(ValueError, match="first.*second.*2 and 1"):
        lag(run(correct, at=[0, 1]), [0, 0], [0])
