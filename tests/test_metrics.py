"""Intervals and significance against slow and obvious versions of themselves, and against their promises."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cosprobe import metrics
from cosprobe.metrics import (
    cluster_bootstrap,
    correctness,
    majority,
    max_t_bootstrap,
    max_t_permutation,
    permuted_blocks,
    problem_draws,
    share_interval,
)

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


def test_bootstrap_equals_drawing_problems_one_by_one():
    rng = np.random.default_rng(1)
    keys = rng.choice(list("abcdefg"), size=30)
    correct = rng.integers(0, 2, (3, 30)).astype(float)
    means = [correct[:, drawn].mean(axis=1) for drawn in draws_of_problems(keys, 200, 5)]
    np.testing.assert_allclose(problem_draws(keys, 200, 5).means(correct), np.transpose(means), atol=1e-12)
    lower, upper = cluster_bootstrap(correct, keys, draws=200, seed=5)
    np.testing.assert_allclose(lower, np.quantile(means, 0.025, axis=0), atol=1e-12)
    np.testing.assert_allclose(upper, np.quantile(means, 0.975, axis=0), atol=1e-12)


def test_bootstrap_of_independent_samples_has_the_textbook_width():
    correct = one(np.arange(500) % 10 < 7)
    lower, upper = cluster_bootstrap(correct, np.arange(500), draws=4000)
    assert upper[0] - lower[0] == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 500), rel=0.08)
    assert lower[0] < 0.7 < upper[0]


@SETTINGS
@given(problem_lists, st.integers(2, 4), st.integers(0, 100))
def test_more_seeds_of_the_same_problems_do_not_narrow_the_interval(keys, seeds, seed):
    correct = one(np.random.default_rng(seed).integers(0, 2, len(keys)))
    few = cluster_bootstrap(correct, keys, 50, seed)
    many = cluster_bootstrap(np.repeat(correct, seeds, axis=1), np.repeat(keys, seeds), 50, seed)
    np.testing.assert_allclose(few, many, atol=1e-12)


@SETTINGS
@given(problem_lists, st.integers(0, 100))
def test_interval_is_ordered_inside_the_values_and_blind_to_sample_order(keys, seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(2, len(keys)))
    lower, upper = cluster_bootstrap(values, keys, 50, seed)
    assert (lower <= upper).all()
    assert (values.min(1) - 1e-12 <= lower).all()
    assert (upper <= values.max(1) + 1e-12).all()
    order = rng.permutation(len(keys))
    np.testing.assert_allclose(cluster_bootstrap(values[:, order], keys[order], 50, seed), (lower, upper), atol=1e-12)


def test_cells_share_their_draws_so_differences_are_paired(monkeypatch):
    rng = np.random.default_rng(0)
    a, keys = one(rng.integers(0, 2, 40)), np.arange(40)
    both = cluster_bootstrap(np.concatenate([a, a + 1]), keys, 100)
    np.testing.assert_allclose(both[0][0] + 1, both[0][1])
    monkeypatch.setattr(metrics, "CHUNK", 1)  # cells worked on one at a time see the same draws
    np.testing.assert_allclose(cluster_bootstrap(np.concatenate([a, a + 1]), keys, 100), both)


@pytest.mark.parametrize("problems", [1, 12, 200])
def test_a_share_without_any_error_has_scipys_exact_bound_over_problems(problems):
    """Two samples of every problem count as one; a share in between is the bootstrap's."""
    keys = np.repeat(np.arange(problems), 2)
    mixed = np.arange(2 * problems) % 2 / 1
    lower, upper = share_interval(np.stack([np.ones(2 * problems), np.zeros(2 * problems), mixed]), keys)
    exact = [stats.binomtest(k, problems).proportion_ci(0.95) for k in (problems, 0)]
    np.testing.assert_allclose([lower[0], upper[0]], exact[0], atol=1e-12)
    np.testing.assert_allclose([lower[1], upper[1]], exact[1], atol=1e-12)
    plain = np.concatenate(cluster_bootstrap(mixed[None], keys))
    np.testing.assert_allclose([lower[2], upper[2]], plain, atol=1e-12)


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
    np.testing.assert_allclose(max_t_permutation(predictions, labels, keys, 99, 3), expected, atol=1e-12)
    monkeypatch.setattr(metrics, "CHUNK", 3)
    np.testing.assert_allclose(max_t_permutation(predictions, labels, keys, 99, 3), expected, atol=1e-12)


def test_p_is_that_of_all_permutations():
    labels = np.array([0, 0, 0, 1, 1, 1])
    # as many ones in no two cells, or ties between cells would be broken by sampling error of their spreads
    predictions = np.array([[0, 1, 1, 1, 1, 1], [0, 1, 0, 0, 1, 0], [0, 0, 0, 1, 1, 1]])
    hits = np.array([[(cell == labels[list(o)]).mean() for cell in predictions] for o in permutations(range(6))])
    score = (hits - hits.mean(0)) / hits.std(0)
    exact = [(score.max(1) >= z - 1e-9).mean() for z in score[0]]  # the first permutation is the identity
    found = max_t_permutation(predictions, labels, np.arange(6), draws=20_000)
    np.testing.assert_allclose(found, exact, atol=0.015)


def false_alarms(worlds: int, cells: int, problems: int, seeds: int, by_problem: bool) -> float:
    """Share of worlds without any signal in which some cell is called significant."""
    alarms = 0
    for world in range(worlds):
        rng = np.random.default_rng(world)
        labels = np.repeat(rng.integers(0, 2, problems), seeds)
        predictions = np.repeat(rng.integers(0, 2, (cells, problems)), seeds, axis=1)  # seeds agree
        keys = np.repeat(np.arange(problems), seeds) if by_problem else np.arange(problems * seeds)
        alarms += bool((max_t_permutation(predictions, labels, keys, 99, world) <= 0.05).any())
    return alarms / worlds


def test_without_signal_a_whole_grid_gives_a_false_alarm_in_one_of_twenty():
    assert false_alarms(200, cells=40, problems=60, seeds=1, by_problem=True) < 0.10
    assert false_alarms(200, cells=10, problems=30, seeds=6, by_problem=True) < 0.10
    assert false_alarms(50, cells=10, problems=30, seeds=6, by_problem=False) > 0.5  # what ignoring problems would do


def test_a_planted_cell_is_found_and_only_that_one():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 120)
    predictions = rng.integers(0, 4, (50, 120))
    predictions[17] = np.where(rng.random(120) < 0.4, labels, predictions[17])
    p = max_t_permutation(predictions, labels, np.arange(120))
    assert p[17] == pytest.approx(1 / 1001)
    assert (np.delete(p, 17) > 0.05).all()


def test_a_constant_prediction_is_no_evidence_however_often_right():
    labels = np.array([1] * 95 + [0] * 5)
    assert max_t_permutation(np.ones((2, 100), dtype=int), labels, np.arange(100), 50).tolist() == [1.0, 1.0]


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
        monkeypatch.setattr(metrics, "CHUNK", chunk)
        p, lower = max_t_bootstrap(difference, keys, 99, 7)
        np.testing.assert_allclose(p, expected_p, atol=1e-12)
        np.testing.assert_allclose(lower, expected_lower, atol=1e-9)
    assert p[4] == 0.01  # the loop agrees on evidence, not only on its absence
    assert lower[4] > 0 > lower[moving].min()


def test_one_cell_gets_the_p_of_all_sign_changes():
    values = np.array([3.0, 1, 2, -1, 2, 0, 1, 1])
    signs = np.array(list(product([-1, 1], repeat=8)))
    exact = (signs @ values >= values.sum()).mean()
    assert max_t_bootstrap(values[None], np.arange(8), 20_000)[0][0] == pytest.approx(exact, abs=0.005)


def null_differences(rng: np.random.Generator, cells: int, problems: int, seeds: int, shared: float) -> np.ndarray:
    """Right minus right of probes and a baseline equally good, errors shared by cells and by seeds of a problem."""
    base = rng.random(problems)
    truth = np.where(rng.random((cells, problems)) < shared, base, rng.random((cells, problems)))
    probe = np.repeat(truth, seeds, axis=1) + 0.3 * rng.normal(size=(cells, problems * seeds))
    visible = np.repeat(np.where(rng.random(problems) < shared, base, rng.random(problems)), seeds)
    return (probe > 0.5) * 1.0 - (visible + 0.3 * rng.normal(size=problems * seeds) > 0.5)


@pytest.mark.parametrize(("problems", "seeds", "shared"), [(60, 1, 0.0), (60, 1, 0.8), (40, 3, 0.5)])
def test_equally_good_probes_beat_a_baseline_somewhere_in_one_grid_of_twenty(problems, seeds, shared):
    worlds, alarms, covered = 300, 0, 0
    keys = np.repeat(np.arange(problems), seeds)
    for world in range(worlds):
        difference = null_differences(np.random.default_rng(world), 20, problems, seeds, shared)
        p, lower = max_t_bootstrap(difference, keys, 199, world)
        alarms += bool((p <= 0.05).any())
        covered += bool((lower <= 0).all())
    assert alarms == worlds - covered
    assert 1 <= alarms <= worlds * 0.05 + 3 * np.sqrt(worlds * 0.05 * 0.95)


def test_a_probe_that_beats_the_baseline_is_found_among_many_that_do_not():
    difference = null_differences(np.random.default_rng(0), 400, 100, 1, 0.5)
    difference[123] = np.where(np.arange(100) < 30, 1.0, np.where(np.arange(100) < 34, -1.0, 0.0))
    p, lower = max_t_bootstrap(difference, np.arange(100))
    assert p[123] == pytest.approx(1 / 1001)
    assert 0 < lower[123] < 0.26
    assert (np.delete(p, 123) > 0.05).all()


@SETTINGS
@given(problem_lists, st.integers(0, 1000), st.integers(1, 6))
def test_max_bootstrap_keeps_its_promises_on_any_differences(keys, seed, cells):
    rng = np.random.default_rng(seed)
    difference = rng.choice([-1.0, 0.0, 0.5, 1.0], (cells, len(keys)))
    p, lower = max_t_bootstrap(difference, keys, 39, seed)
    assert ((p > 0) & (p <= 1)).all()
    assert ((lower > 0) == (p <= 0.05)).all()
    assert (lower <= difference.mean(1) + 1e-9).all()
    order = rng.permutation(len(keys))
    np.testing.assert_allclose(max_t_bootstrap(difference[:, order], keys[order], 39, seed), (p, lower), atol=1e-9)
    np.testing.assert_allclose(max_t_bootstrap(difference * 3, keys, 39, seed)[0], p)
    sums = np.stack([difference[:, keys == name].sum(1) for name in np.unique(keys)], axis=1)
    moving = np.abs(sums).max(1) > 0
    by_statistic = np.argsort(sums[moving].sum(1) / np.linalg.norm(sums[moving], axis=1))
    assert (np.diff(p[moving][by_statistic]) <= 0).all()  # more evidence, no larger p
    twice = max_t_bootstrap(np.concatenate([difference, difference]), keys, 39, seed)
    np.testing.assert_allclose(np.reshape(twice, (2, 2, cells)), np.stack([(p, p), (lower, lower)]), atol=1e-9)
    more = max_t_bootstrap(np.concatenate([difference, rng.choice([-1.0, 1.0], (3, len(keys)))]), keys, 39, seed)
    assert (more[0][:cells] >= p).all()  # looking at more cells never makes one look better
    assert (more[1][:cells] <= lower + 1e-9).all()


def test_a_difference_that_never_varies_is_judged_by_the_sign_test():
    for problems in (1, 3, 6):
        p, lower = max_t_bootstrap(np.ones((1, 12)), np.arange(12) % problems, 19_999)
        assert p[0] == pytest.approx(0.5**problems, abs=0.01)
        assert (lower[0] > 0) == (problems == 6)  # one problem proves nothing, however many samples it has
    rows = np.array([1.0, 0.0, -1.0, 0.25])[:, None] * np.ones(60)
    p, lower = max_t_bootstrap(rows, np.arange(60), 999)
    np.testing.assert_allclose(p, [1 / 1000, 1, 1, 1 / 1000])
    np.testing.assert_allclose(lower, [1, 0, -1, 0.25], atol=1e-6)


def test_too_few_draws_can_bound_nothing():
    values = np.where(np.arange(60) < 50, 1.0, 0.0)[None]
    assert max_t_bootstrap(values, np.arange(60), 18)[1].tolist() == [-np.inf]
    assert max_t_bootstrap(values, np.arange(60), 19)[1][0] > 0


def test_correctness_averages_over_regions_and_majority_skips_missing_labels():
    assert correctness(np.array([[[1, 0, 1, 1]]]), np.array([[1, 1, 1, 1]])).tolist() == [[0.75]]
    assert correctness(np.array([[1, 0]]), np.array([1, 1])).tolist() == [[1.0, 0.0]]
    assert majority(np.array([[-1, -1], [2, 0], [2, 0]])) == 0
    assert majority(np.array([-1, -1, -1, 3])) == 3


def test_no_samples_is_an_error():
    with pytest.raises(ValueError, match="no samples: expected at least one"):
        cluster_bootstrap(np.zeros((2, 0)), np.array([]))
    with pytest.raises(ValueError, match="no samples: expected at least one"):
        max_t_permutation(np.zeros((2, 0), dtype=int), np.zeros(0, dtype=int), np.array([]))
    with pytest.raises(ValueError, match="no samples: expected at least one"):
        max_t_bootstrap(np.zeros((2, 0)), np.array([]))
