"""Intervals and significance against slow and obvious versions of themselves, and against their promises."""

from __future__ import annotations

import math
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cosprobe.evaluation import intervals, significance
from cosprobe.evaluation.intervals import (
    correctness,
    difference_interval,
    effective_problems,
    grounded,
    majority,
    mean_interval,
    problem_draws,
    share_interval,
)
from cosprobe.evaluation.significance import max_t_bootstrap, max_t_permutation, permuted_blocks, weakest_pair

INTERVALS = (share_interval, difference_interval, mean_interval)
problem_lists = st.lists(st.integers(0, 6), min_size=1, max_size=25).map(np.array)
SETTINGS = settings(max_examples=40, deadline=None)


def draws_of_problems(keys: np.ndarray, draws: int, seed: int) -> list[np.ndarray]:
    """Which samples each draw of the bootstrap takes, problem by problem."""
    names = np.unique(keys)
    times = np.random.default_rng(seed).multinomial(len(names), [1 / len(names)] * len(names), size=draws)
    return [
        np.concatenate([np.tile(np.flatnonzero(keys == n), k) for n, k in zip(names, row, strict=True)]).astype(int)
        for row in times
    ]


def one(rows) -> np.ndarray:
    return np.asarray(rows, dtype=float).reshape(1, -1)


def test_drawing_problems_equals_drawing_them_one_by_one():
    rng = np.random.default_rng(1)
    keys = rng.choice(list("abcdefg"), size=30)
    correct = rng.integers(0, 2, (3, 30)).astype(float)
    means = [correct[:, drawn].mean(axis=1) for drawn in draws_of_problems(keys, 200, 5)]
    np.testing.assert_allclose(problem_draws(keys, 200, 5).means(correct), np.transpose(means), atol=1e-12)


def test_effective_problems_by_hand():
    assert effective_problems(np.arange(7)) == 7
    assert effective_problems(np.repeat(list("abc"), 4)) == 3
    assert effective_problems(np.array(list("aaab"))) == pytest.approx(16 / 10)
    assert effective_problems(np.repeat(np.arange(5), [1, 2, 3, 4, 5])) == pytest.approx(225 / 55)


def test_a_statement_takes_twelve_problems_none_of_which_holds_most_samples():
    assert grounded(np.arange(12)) and not grounded(np.repeat(np.arange(11), 9))
    one_large = np.concatenate([np.zeros(10, dtype=int), np.arange(12)])  # (11 + 11)^2 / (11^2 + 11) = 3.7
    assert len(np.unique(one_large)) == 12 and not grounded(one_large)
    assert grounded(np.repeat(np.arange(12), [1, 2, 3] * 4))
    assert not grounded(np.array([]))


@pytest.mark.parametrize("problems", [1, 2, 12, 90])
def test_one_sample_of_each_problem_gets_scipys_exact_interval(problems):
    hits = range(problems + 1)
    lower, upper = share_interval(np.stack([np.arange(problems) < k for k in hits]).astype(float), np.arange(problems))
    exact = [stats.binomtest(k, problems).proportion_ci(0.95) for k in hits]
    np.testing.assert_allclose(lower, [e.low for e in exact], atol=1e-9)
    np.testing.assert_allclose(upper, [e.high for e in exact], atol=1e-9)


def test_one_more_right_answer_never_lowers_an_end():
    """89 of 90 used to have a higher lower end, 0.967, than 90 of 90, 0.960."""
    lower, upper = share_interval(np.stack([np.arange(90) < k for k in range(91)]).astype(float), np.arange(90))
    assert (np.diff(lower) > 0).all() and (np.diff(upper) > 0).all()
    assert lower[89] == pytest.approx(0.9396, abs=1e-4) and lower[90] == pytest.approx(0.025 ** (1 / 90))
    assert upper[0] == pytest.approx(1 - lower[90]) and (lower[0], upper[90]) == (0, 1)


def lowest_change(interval, problems: float, step: float) -> float:
    """The most an end falls when a loss becomes a tie or a tie a win, over all tables; counts are multiples of step."""
    counts = np.arange(0, problems + 1e-9, step)
    wins, losses = np.meshgrid(counts, counts, indexing="ij")
    possible = wins + losses <= problems + 1e-9
    lowest = 0.0
    for end in interval(wins, losses, problems):
        known = np.where(possible, end, np.nan)
        changes = np.concatenate([(known[:, :-1] - known[:, 1:]).ravel(), (known[1:] - known[:-1]).ravel()])
        lowest = min(lowest, float(np.nanmin(changes)))
    return lowest


def matched(wins: np.ndarray, losses: np.ndarray, problems: float) -> tuple[np.ndarray, np.ndarray]:
    """What `difference_interval` makes of counts."""
    ends = [intervals._difference_end(a.ravel(), b.ravel(), problems) for a, b in ((wins, losses), (losses, wins))]
    return ends[0].reshape(wins.shape), -ends[1].reshape(wins.shape)


@pytest.mark.parametrize("problems", [1.0, 2.0, 3.5, 6.0, 12.0, 21.7, 60.0, 90.0])
def test_turning_a_loss_into_a_tie_or_a_tie_into_a_win_never_lowers_an_end(problems):
    for step in (1.0, 0.5, 0.1 if problems < 50 else 0.25):
        assert lowest_change(matched, problems, step) >= -1e-12
    assert lowest_change(agresti_min, 12.0, 1.0) < -0.002  # the published formula does


def agresti_min(wins, losses, problems) -> tuple[np.ndarray, np.ndarray]:
    """Agresti and Min (2005): 0.5 added to each of the four cells of the table, then Wald's interval."""
    total, ahead, apart = problems + 2, wins - losses, wins + losses + 1
    width = stats.norm.ppf(0.975) * np.sqrt(apart - ahead**2 / total)
    return np.maximum((ahead - width) / total, -1), np.minimum((ahead + width) / total, 1)


@SETTINGS
@given(problem_lists, st.integers(0, 100), st.data())
def test_any_better_data_have_no_lower_interval(keys, seed, data):
    """One sample rises by any amount: its share, or its difference."""
    rng = np.random.default_rng(seed)
    at = data.draw(st.integers(0, len(keys) - 1))
    for interval, least in ((share_interval, 0.0), (difference_interval, -1.0)):
        values = rng.choice([least, 0.0, 0.25, 1.0], (2, len(keys)))
        values[1] = values[0]
        values[1, at] = rng.uniform(values[0, at], 1)
        lower, upper = interval(values, keys)
        assert lower[1] >= lower[0] - 1e-9
        assert upper[1] >= upper[0] - 1e-9


@pytest.mark.parametrize("problems", [1, 12, 60, 600])
def test_no_interval_of_a_share_or_difference_is_without_width(problems):
    rows = np.stack([np.full(problems, value) for value in (0.0, 0.5, 1.0)])
    keys = np.arange(problems)
    for values, interval in ((rows, share_interval), (2 * rows - 1, difference_interval)):
        lower, upper = interval(values, keys)
        assert (upper - lower > 2 / (problems + 3)).all()
        assert (lower <= values[:, 0]).all() and (values[:, 0] <= upper).all()


def test_the_interval_of_a_difference_is_the_plain_formula():
    """30 wins, 12 losses, 18 ties."""
    values = np.repeat([1.0, -1.0, 0.0], [30, 12, 18])
    won, lost = 30 + 1.5, 12 + 1.5
    width = stats.t.ppf(0.975, 59) * math.sqrt(won + lost - (won - lost) ** 2 / 63) + 0.25
    lower, upper = difference_interval(values[None], np.arange(60))
    assert (lower[0], upper[0]) == pytest.approx(((18 - width) / 63, (18 + width) / 63), abs=1e-12)
    halves = difference_interval(one(values), np.repeat(np.arange(30), 2))  # two samples of each of thirty problems
    width = stats.t.ppf(0.975, 29) * math.sqrt(15 + 6 + 3 - 9**2 / 33) + 0.25
    assert (halves[0][0], halves[1][0]) == pytest.approx(((9 - width) / 33, (9 + width) / 33), abs=1e-12)
    mirrored = difference_interval(-values[None], np.arange(60))
    assert (mirrored[0][0], mirrored[1][0]) == pytest.approx((-upper[0], -lower[0]))


@pytest.mark.parametrize("problems", [12, 30, 90, 600])
def test_shares_are_covered_at_every_truth(problems):
    """Exact: the chance of every number of right answers, summed over those whose interval holds the truth."""
    count = np.arange(problems + 1)
    rows = np.stack([np.arange(problems) < k for k in count]).astype(float)
    lower, upper = share_interval(rows, np.arange(problems))
    truth = np.linspace(0.01, 0.99, 491)[:, None]
    covered = (stats.binom.pmf(count, problems, truth) * ((lower <= truth) & (truth <= upper))).sum(axis=1)
    assert covered.min() >= 0.95
    wald = 1.96 * np.sqrt(count / problems * (1 - count / problems) / problems)
    held = np.abs(count / problems - truth) <= wald
    assert (stats.binom.pmf(count, problems, truth) * held).sum(axis=1).min() < 0.94  # the sum can tell


def covered_differences(interval, problems: int) -> float:
    """The least exact coverage over differences from 0 to 0.5 and shares of problems that differ at all."""
    wins, losses = np.meshgrid(np.arange(problems + 1), np.arange(problems + 1), indexing="ij")
    possible = wins + losses <= problems
    wins, losses = wins[possible], losses[possible]
    lower, upper = interval(wins.astype(float), losses.astype(float), float(problems))
    table = np.stack([wins, losses, problems - wins - losses], axis=1)
    least = 1.0
    for truth in np.linspace(0, 0.5, 11):
        for apart in sorted({truth, min(truth + 0.01, 1), 0.5 + truth / 2, 1.0} - {0.0}):
            proba = np.array([(apart + truth) / 2, (apart - truth) / 2, 1 - apart]).clip(1e-12)
            chance = stats.multinomial.pmf(table, problems, proba / proba.sum())
            least = min(least, float(chance[(lower <= truth + 1e-12) & (truth - 1e-12 <= upper)].sum()))
    return least


@pytest.mark.parametrize("problems", [12, 20, 45, 90])
def test_differences_are_covered_at_every_truth(problems):
    """Exact, over all tables of wins, losses and ties."""
    assert covered_differences(matched, problems) >= 0.94
    assert covered_differences(agresti_min, problems) < 0.94


@SETTINGS
@given(problem_lists, st.integers(2, 4), st.integers(0, 100))
def test_more_seeds_of_the_same_problems_do_not_narrow_an_interval(keys, seeds, seed):
    values = one(np.random.default_rng(seed).integers(0, 2, len(keys)))
    for interval in INTERVALS:
        few = interval(values, keys)
        many = interval(np.repeat(values, seeds, axis=1), np.repeat(keys, seeds))
        np.testing.assert_allclose(few, many, atol=1e-9)


@SETTINGS
@given(problem_lists, st.integers(0, 100))
def test_intervals_hold_the_mean_and_are_blind_to_the_order_of_samples(keys, seed):
    rng = np.random.default_rng(seed)
    values = rng.uniform(size=(3, len(keys)))
    order = rng.permutation(len(keys))
    for interval in INTERVALS:
        lower, upper = interval(values, keys)
        assert (lower <= upper).all()
        np.testing.assert_allclose(interval(values[:, order], keys[order]), (lower, upper), atol=1e-9)
        if interval is not mean_interval:  # a bend for skewness may leave a mean of few problems outside
            assert (lower < values.mean(axis=1)).all() and (values.mean(axis=1) < upper).all()


def test_rounding_beyond_one_is_no_error_and_more_is():
    share_interval(one([1 + 1e-15, 0.5]), np.arange(2))
    for values, first in (([1.2, 0.5], "1.2"), ([0.1, -0.5], "-0.5"), ([np.nan, 0.5], "nan")):
        with pytest.raises(ValueError, match=rf"^right={first}\D.*\b0\b.*\b1\b"):
            share_interval(one(values), np.arange(2))
    with pytest.raises(ValueError, match=r"^difference=-1\.5\D.*-1 .*\b1\b"):
        difference_interval(one([-1.5, 0.5]), np.arange(2))


def test_the_interval_of_a_mean_is_the_plain_formula():
    """A ratio of sums over problems, the t quantile bent by the third moment of what problems leave over."""
    rng = np.random.default_rng(3)
    keys = np.repeat(np.arange(20), rng.integers(1, 6, 20))
    values = rng.exponential(size=len(keys))
    left = [sum(values[keys == k] - values.mean()) for k in range(20)]
    second, third = np.mean(np.square(left)), np.mean(np.power(left, 3))
    error = math.sqrt(20 / 19 * sum(np.square(left))) / len(keys)
    skew = third / second**1.5 / math.sqrt(20)
    quantile = stats.t.ppf(0.975, effective_problems(keys) - 1)
    expected = []
    for x in (quantile, -quantile):
        t = 3 / skew * (np.cbrt(1 + skew * (x - skew / 6)) - 1)
        assert t + skew * t**2 / 3 + skew**2 * t**3 / 27 + skew / 6 == pytest.approx(x)  # Hall's g2 undone
        expected.append(values.mean() - error * t)
    found = mean_interval(values[None], keys)
    assert (found[0][0], found[1][0]) == pytest.approx(expected)
    assert expected[1] - values.mean() > values.mean() - expected[0]  # the tail is on the right


def test_the_interval_of_an_even_mean_is_students():
    values = np.array([1.0, 2, 3, 4, 5, 6])
    exact = stats.t.interval(0.95, 5, 3.5, values.std(ddof=1) / math.sqrt(6))
    assert np.ravel(mean_interval(one(values), np.arange(6))) == pytest.approx(exact)
    shifted = mean_interval(one(-3 * values + 1), np.arange(6))
    assert np.ravel(shifted) == pytest.approx([1 - 3 * exact[1], 1 - 3 * exact[0]])


def test_means_that_cannot_vary_or_do_not():
    assert np.ravel(mean_interval(one([2.0, 2.5]), np.zeros(2))).tolist() == [-np.inf, np.inf]
    assert np.ravel(mean_interval(one([2.0, 2.0, 2.0]), np.arange(3))).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("problems", [60, 200])
def test_skewed_means_are_covered_where_drawing_problems_anew_misses_them(problems):
    """Nine values in ten are small, the others twenty times as large; 4,000 worlds."""
    rng = np.random.default_rng(0)
    values = np.where(rng.random((4000, problems)) < 0.08, 3.0, 0.1) * rng.exponential(size=(4000, problems))
    truth = 0.08 * 3 + 0.92 * 0.1
    keys = np.arange(problems)
    lower, upper = mean_interval(values, keys)
    covered = ((lower <= truth) & (truth <= upper)).mean()
    assert covered >= 0.94 - 2 * math.sqrt(0.94 * 0.06 / 4000)
    drawn = problem_draws(keys, 300, 0).means(values)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=1)
    assert ((low <= truth) & (truth <= high)).mean() < covered - 0.01


@SETTINGS
@given(problem_lists, st.integers(0, 100))
def test_labels_move_as_whole_problems(keys, seed):
    source = permuted_blocks(keys, 5, seed)
    assert (source[0] == np.arange(len(keys))).all()
    for row in source:
        assert sorted(row) == list(range(len(keys)))
        for name in np.unique(keys):
            given_by = keys[row[keys == name]]
            assert len(set(given_by)) == 1
            assert (keys == given_by[0]).sum() == len(given_by)
            assert (np.diff(row[keys == name]) > 0).all()  # seeds keep their order


def test_every_order_of_problems_is_equally_likely():
    orders = permuted_blocks(np.arange(3), 6000, seed=0)[1:]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 6
    assert abs(counts - 1000).max() < 120


@pytest.mark.parametrize("shape", [(24,), (24, 4)])
def test_permutation_equals_a_loop_over_draws_and_cells(shape, monkeypatch):
    rng = np.random.default_rng(2)
    labels, keys = rng.integers(0, 3, shape), np.repeat(np.arange(12), 2)
    keys[-1] = 99  # two problems with a single seed
    predictions = rng.integers(0, 3, (7, *shape))
    predictions[2] = np.where(rng.random(shape) < 0.7, labels, predictions[2])
    predictions[3] = 1
    accuracy = np.array(
        [[np.mean(cell == labels[row]) for row in permuted_blocks(keys, 99, 3)] for cell in predictions]
    )
    spread = accuracy.std(1)
    spread[spread < 1e-9] = np.inf
    score = (accuracy - accuracy.mean(1, keepdims=True)) / spread[:, None]
    expected = [(1 + sum(score[:, 1:].max(0) >= z - 1e-9)) / 100 for z in score[:, 0]]
    found = max_t_permutation(predictions, labels, keys, 99, 3)
    np.testing.assert_allclose(found.p, expected, atol=1e-12)
    assert ((found.p <= 0.05) == (score[:, 0] > found.critical + 1e-9)).all() and found.p.min() <= 0.05
    assert max_t_permutation(predictions, labels, keys, 18, 3).critical == np.inf
    monkeypatch.setattr(significance, "CHUNK", 3)
    np.testing.assert_allclose(max_t_permutation(predictions, labels, keys, 99, 3).p, expected, atol=1e-12)


def test_p_is_that_of_all_permutations():
    labels = np.array([0, 0, 0, 1, 1, 1])
    # as many ones in no two cells, or ties between cells would be broken by sampling error of their spreads
    predictions = np.array([[0, 1, 1, 1, 1, 1], [0, 1, 0, 0, 1, 0], [0, 0, 0, 1, 1, 1]])
    hits = np.array([[(cell == labels[list(o)]).mean() for cell in predictions] for o in permutations(range(6))])
    score = (hits - hits.mean(0)) / hits.std(0)
    exact = [(score.max(1) >= z - 1e-9).mean() for z in score[0]]  # the first permutation is the identity
    found = max_t_permutation(predictions, labels, np.arange(6), draws=20_000).p
    np.testing.assert_allclose(found, exact, atol=0.015)


def false_alarms(worlds: int, cells: int, problems: int, seeds: int, by_problem: bool) -> float:
    """Share of worlds without any signal in which some cell is called significant."""
    alarms = 0
    for world in range(worlds):
        rng = np.random.default_rng(world)
        labels = np.repeat(rng.integers(0, 2, problems), seeds)
        predictions = np.repeat(rng.integers(0, 2, (cells, problems)), seeds, axis=1)  # seeds agree
        keys = np.repeat(np.arange(problems), seeds) if by_problem else np.arange(problems * seeds)
        alarms += bool((max_t_permutation(predictions, labels, keys, 99, world).p <= 0.05).any())
    return alarms / worlds


@pytest.mark.slow
def test_without_signal_a_whole_grid_gives_a_false_alarm_in_one_of_twenty():
    assert false_alarms(200, cells=40, problems=60, seeds=1, by_problem=True) < 0.10
    assert false_alarms(200, cells=10, problems=30, seeds=6, by_problem=True) < 0.10
    assert false_alarms(50, cells=10, problems=30, seeds=6, by_problem=False) > 0.5  # what ignoring problems would do


def test_a_planted_cell_is_found_and_only_that_one():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 120)
    predictions = rng.integers(0, 4, (50, 120))
    predictions[17] = np.where(rng.random(120) < 0.4, labels, predictions[17])
    p = max_t_permutation(predictions, labels, np.arange(120)).p
    assert p[17] == pytest.approx(1 / 1001)
    assert (np.delete(p, 17) > 0.05).all()


def test_a_constant_prediction_is_no_evidence_however_often_right():
    labels = np.array([1] * 95 + [0] * 5)
    assert max_t_permutation(np.ones((2, 100), dtype=int), labels, np.arange(100), 50).p.tolist() == [1.0, 1.0]


def p_and_lower(*arguments) -> tuple[np.ndarray, np.ndarray]:
    found = max_t_bootstrap(*arguments)
    return found.p, found.lower


def mean_rejected(row: np.ndarray, keys: np.ndarray, critical: float) -> float:
    """The largest mean that a cell's statistic still reaches `critical` against, by bisection."""
    low, high = -50.0, row.mean()
    for _ in range(80):
        middle = (low + high) / 2
        sums = np.array([(row[keys == name] - middle).sum() for name in np.unique(keys)])
        low, high = (middle, high) if sums.sum() > critical * np.sqrt((sums**2).sum()) else (low, middle)
    return low


def test_max_bootstrap_equals_a_loop_over_draws_and_cells(monkeypatch):
    rng = np.random.default_rng(4)
    names = np.arange(20)
    keys = np.concatenate([names, rng.choice(names, size=30)])
    difference = rng.choice([-1.0, 0.0, 1.0], (9, 50), p=[0.25, 0.4, 0.35])
    difference[3], difference[4] = 0.0, np.where(rng.random(50) < 0.7, 1.0, 0.0)
    sums = [[sum(row[keys == name]) for name in names] for row in difference]
    signs = np.random.default_rng(7).choice([-1.0, 1.0], size=(20, 99))
    moving = [i for i in range(9) if i != 3]
    statistic = {i: sum(sums[i]) / sum(s * s for s in sums[i]) ** 0.5 for i in moving}
    largest = []
    for b in range(99):
        turned = [sum(k * s for k, s in zip(signs[:, b], sums[i], strict=True)) for i in moving]
        largest.append(max(t / sum(s * s for s in sums[i]) ** 0.5 for i, t in zip(moving, turned, strict=True)))
    expected_p, expected_lower = np.ones(9), np.zeros(9)
    for i in moving:
        expected_p[i] = (1 + sum(m >= statistic[i] - 1e-9 for m in largest)) / 100
        expected_lower[i] = mean_rejected(difference[i], keys, sorted(largest)[-5])  # 5 of 100 may reach it
    for chunk in (4096, 2):
        monkeypatch.setattr(significance, "CHUNK", chunk)
        found = max_t_bootstrap(difference, keys, 99, 7)
        np.testing.assert_allclose(found.p, expected_p, atol=1e-12)
        np.testing.assert_allclose(found.lower, expected_lower, atol=1e-9)
        assert found.critical == pytest.approx(sorted(largest)[-5])
    p, lower = found.p, found.lower
    assert p[4] == 0.01  # the loop agrees on evidence, not only on its absence
    assert lower[4] > 0 > lower[moving].min()


def test_one_cell_gets_the_p_of_all_sign_changes():
    values = np.array([3.0, 1, 2, -1, 2, 0, 1, 1])
    signs = np.array(list(product([-1, 1], repeat=8)))
    exact = (signs @ values >= values.sum()).mean()
    assert max_t_bootstrap(values[None], np.arange(8), 20_000).p[0] == pytest.approx(exact, abs=0.005)


def null_differences(rng: np.random.Generator, cells: int, problems: int, seeds: int, shared: float) -> np.ndarray:
    """Right minus right of probes and a baseline equally good, errors shared by cells and by seeds of a problem."""
    base = rng.random(problems)
    truth = np.where(rng.random((cells, problems)) < shared, base, rng.random((cells, problems)))
    probe = np.repeat(truth, seeds, axis=1) + 0.3 * rng.normal(size=(cells, problems * seeds))
    baseline = np.repeat(np.where(rng.random(problems) < shared, base, rng.random(problems)), seeds)
    return (probe > 0.5) * 1.0 - (baseline + 0.3 * rng.normal(size=problems * seeds) > 0.5)


@pytest.mark.parametrize(("problems", "seeds", "shared"), [(60, 1, 0.0), (60, 1, 0.8), (40, 3, 0.5)])
def test_equally_good_probes_beat_a_baseline_somewhere_in_one_grid_of_twenty(problems, seeds, shared):
    worlds, alarms, covered = 300, 0, 0
    keys = np.repeat(np.arange(problems), seeds)
    for world in range(worlds):
        difference = null_differences(np.random.default_rng(world), 20, problems, seeds, shared)
        p, lower = p_and_lower(difference, keys, 199, world)
        alarms += bool((p <= 0.05).any())
        covered += bool((lower <= 0).all())
    assert alarms == worlds - covered
    assert 1 <= alarms <= worlds * 0.05 + 3 * np.sqrt(worlds * 0.05 * 0.95)


def test_a_probe_that_beats_the_baseline_is_found_among_many_that_do_not():
    difference = null_differences(np.random.default_rng(0), 400, 100, 1, 0.5)
    difference[123] = np.where(np.arange(100) < 30, 1.0, np.where(np.arange(100) < 34, -1.0, 0.0))
    p, lower = p_and_lower(difference, np.arange(100))
    assert p[123] == pytest.approx(1 / 1001)
    assert 0 < lower[123] < 0.26
    assert (np.delete(p, 123) > 0.05).all()


@SETTINGS
@given(problem_lists, st.integers(0, 1000), st.integers(1, 6))
def test_max_bootstrap_keeps_its_promises_on_any_differences(keys, seed, cells):
    rng = np.random.default_rng(seed)
    difference = rng.choice([-1.0, 0.0, 0.5, 1.0], (cells, len(keys)))
    p, lower = p_and_lower(difference, keys, 39, seed)
    assert ((p > 0) & (p <= 1)).all()
    assert ((lower > 0) == (p <= 0.05)).all()
    assert (lower <= difference.mean(1) + 1e-9).all()
    order = rng.permutation(len(keys))
    np.testing.assert_allclose(p_and_lower(difference[:, order], keys[order], 39, seed), (p, lower), atol=1e-9)
    np.testing.assert_allclose(max_t_bootstrap(difference * 3, keys, 39, seed).p, p)
    sums = np.stack([difference[:, keys == name].sum(1) for name in np.unique(keys)], axis=1)
    moving = np.abs(sums).max(1) > 0
    by_statistic = np.argsort(sums[moving].sum(1) / np.linalg.norm(sums[moving], axis=1))
    assert (np.diff(p[moving][by_statistic]) <= 0).all()  # more evidence, no larger p
    twice = p_and_lower(np.concatenate([difference, difference]), keys, 39, seed)
    np.testing.assert_allclose(np.reshape(twice, (2, 2, cells)), np.stack([(p, p), (lower, lower)]), atol=1e-9)
    more = p_and_lower(np.concatenate([difference, rng.choice([-1.0, 1.0], (3, len(keys)))]), keys, 39, seed)
    assert (more[0][:cells] >= p).all()  # looking at more cells never makes one look better
    assert (more[1][:cells] <= lower + 1e-9).all()


def test_a_difference_that_never_varies_is_judged_by_the_sign_test():
    for problems in (1, 3, 6):
        p, lower = p_and_lower(np.ones((1, 12)), np.arange(12) % problems, 19_999)
        assert p[0] == pytest.approx(0.5**problems, abs=0.01)
        assert (lower[0] > 0) == (problems == 6)  # one problem proves nothing, however many samples it has
    rows = np.array([1.0, 0.0, -1.0, 0.25])[:, None] * np.ones(60)
    p, lower = p_and_lower(rows, np.arange(60), 999)
    np.testing.assert_allclose(p, [1 / 1000, 1, 1, 1 / 1000])
    np.testing.assert_allclose(lower, [1, 0, -1, 0.25], atol=1e-6)


def test_too_few_draws_can_bound_nothing():
    values = np.where(np.arange(60) < 50, 1.0, 0.0)[None]
    assert max_t_bootstrap(values, np.arange(60), 18).lower.tolist() == [-np.inf]
    assert max_t_bootstrap(values, np.arange(60), 18).critical == np.inf
    assert max_t_bootstrap(values, np.arange(60), 19).lower[0] > 0


@SETTINGS
@given(problem_lists, st.integers(0, 1000), st.integers(1, 6))
def test_a_cell_is_significant_where_its_statistic_exceeds_the_critical_value(keys, seed, cells):
    difference = np.random.default_rng(seed).choice([-1.0, 0.0, 0.5, 1.0], (cells, len(keys)))
    found = max_t_bootstrap(difference, keys, 39, seed)
    sums = np.stack([difference[:, keys == name].sum(1) for name in np.unique(keys)], axis=1)
    length = np.linalg.norm(sums, axis=1)
    statistic = np.where(length > 0, sums.sum(1) / np.where(length > 0, length, 1), -np.inf)
    assert ((found.p <= 0.05) == (statistic > found.critical + 1e-9)).all()
    assert np.isinf(found.critical) or found.critical < np.sqrt(len(np.unique(keys)))


def test_four_problems_can_make_no_cell_significant():
    assert max_t_bootstrap(np.ones((1, 4)), np.arange(4), 999).critical == np.inf  # 1 / 16 at best
    assert max_t_bootstrap(np.ones((1, 5)), np.arange(5), 999).critical < np.sqrt(5)  # 1 / 32


def test_the_weakest_pair_is_the_largest_p_of_one_call_over_all_pairs():
    rng = np.random.default_rng(0)
    keys = np.repeat(np.arange(30), 2)
    differences = rng.choice([-1.0, 0.0, 1.0], (5, 3, 60), p=[0.2, 0.3, 0.5])
    differences[1, 2] = np.nan
    differences[3] = np.nan
    pairs = [(c, i) for c in range(5) for i in range(3) if c != 3 and (c, i) != (1, 2)]
    alone = max_t_bootstrap(np.stack([differences[pair] for pair in pairs]), keys, 199, 4)
    found = weakest_pair(differences, keys, 199, 4)
    for cell in (0, 1, 2, 4):
        mine = [k for k, (c, _) in enumerate(pairs) if c == cell]
        assert found.p[cell] == max(alone.p[mine])
        assert found.lower[cell] == min(alone.lower[mine])
    assert np.isnan(found.p[3]) and np.isnan(found.lower[3])
    assert found.critical == alone.critical
    assert (found.p[[0, 1, 2, 4]] < 0.05).any()


def test_a_cell_that_beats_all_inputs_but_one_is_not_called():
    better = np.where(np.arange(90) < 40, 1.0, 0.0)
    even = np.where(np.arange(90) % 2, 1.0, -1.0)
    found = weakest_pair(np.stack([[better, better, even], [better, better, better]]), np.arange(90))
    assert found.p[0] > 0.3 and found.lower[0] < 0
    assert found.p[1] == pytest.approx(1 / 1001) and found.lower[1] > 0


def test_cells_without_any_input_have_no_p():
    found = weakest_pair(np.full((2, 3, 20), np.nan), np.arange(20))
    assert np.isnan(found.p).all() and np.isnan(found.lower).all() and found.critical == np.inf
    assert np.isnan(weakest_pair(np.zeros((2, 0, 20)), np.arange(20)).p).all()


def test_a_pair_that_is_missing_on_some_samples_is_refused():
    differences = np.zeros((2, 2, 20))
    differences[1, 0, 3] = np.nan
    with pytest.raises(ValueError, match="cell 1, input 0.*NaN"):
        weakest_pair(differences, np.arange(20))


def test_cells_as_good_as_their_best_input_are_called_in_one_grid_of_twenty():
    """Forty cells, three inputs, of which the first is exactly as good as every cell; 300 worlds."""
    worlds, alarms = 300, 0
    for world in range(worlds):
        rng = np.random.default_rng(world)
        shared = rng.normal(size=60)
        score = 0.6 * shared + 0.8 * rng.normal(size=(43, 60))
        right = (score < np.repeat([0.5, 0.5, 0.3, 0.3], [40, 1, 1, 1])[:, None]).astype(float)
        found = weakest_pair(right[:40, None] - right[None, 40:], np.arange(60), 199, world)
        alarms += bool((found.p <= 0.05).any())
    assert alarms <= worlds * 0.05 + 3 * np.sqrt(worlds * 0.05 * 0.95)


def test_correctness_averages_over_regions_and_majority_skips_missing_labels():
    assert correctness(np.array([[[1, 0, 1, 1]]]), np.array([[1, 1, 1, 1]])).tolist() == [[0.75]]
    assert correctness(np.array([[1, 0]]), np.array([1, 1])).tolist() == [[1.0, 0.0]]
    assert majority(np.array([[-1, -1], [2, 0], [2, 0]])) == 0
    assert majority(np.array([-1, -1, -1, 3])) == 3


def test_no_samples_is_an_error():
    for interval in INTERVALS:
        with pytest.raises(ValueError, match="no samples"):
            interval(np.zeros((2, 0)), np.array([]))
    with pytest.raises(ValueError, match="no samples"):
        effective_problems(np.array([]))
    with pytest.raises(ValueError, match="no samples"):
        max_t_permutation(np.zeros((2, 0), dtype=int), np.zeros(0, dtype=int), np.array([]))
    with pytest.raises(ValueError, match="no samples"):
        max_t_bootstrap(np.zeros((2, 0)), np.array([]))
    with pytest.raises(ValueError, match="no samples"):
        weakest_pair(np.zeros((2, 1, 0)), np.array([]))
