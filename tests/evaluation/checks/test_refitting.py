"""What the analyses of chosen cells share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosprobe.cells import Cell
from cosprobe.evaluation.checks.refitting import (
    columns_of,
    estimate_difference,
    estimate_mean,
    estimate_share,
    join_rare,
    labelled,
    readable,
    refit,
    statistics,
)
from cosprobe.evaluation.intervals import difference_interval, mean_interval, share_interval
from cosprobe.probes.linalg import spread, standardise
from cosprobe.probes.newton import fit_newton
from cosprobe.tasks.task import readable_targets
from tests.probes.ddp_fit import planted

counts = st.lists(st.integers(1, 12), min_size=40, max_size=120).map(np.array)


@pytest.fixture
def samples():
    return planted(120)


@given(counts, st.integers(1, 20), st.one_of(st.none(), st.integers(1, 4)))
def test_bins_hold_enough_neighbours_and_all_of_them(values, least, most):
    keys = np.array([f"k{i}" for i in range(len(values))])
    bins = join_rare([(values, keys, least)], most)
    index = bins.index(values)
    held = np.bincount(index, minlength=len(bins.names))
    assert held.sum() == len(values)
    assert held.min() >= least
    assert most is None or len(bins.names) <= most
    assert (np.diff(index[np.argsort(values, kind="stable")]) >= 0).all()
    for name, group in zip(bins.names, range(len(bins.names)), strict=True):
        first, last = values[index == group].min(), values[index == group].max()
        assert name == (str(first) if first == last else f"{first}-{last}")


def test_bins_by_hand():
    values = np.repeat([3, 4, 5, 9], [4, 1, 3, 2])
    keys = np.arange(10).astype(str)
    bins = join_rare([(values, keys, 3)])
    assert bins.names == ("3", "4-9")
    np.testing.assert_array_equal(bins.index(np.array([1, 3, 4, 7, 9, 20])), [0, 0, 1, 1, 1, 1])
    twice = [(np.repeat([3, 4], [6, 4]), np.repeat(keys[:5], 2), 3)]  # five problems: they count, not samples
    assert join_rare(twice).names == ("3-4",)
    even = np.arange(12)
    assert join_rare([(even, even.astype(str), 2)], most=3).names == ("0-3", "4-7", "8-11")
    assert join_rare([(values, keys, 3), (np.array([9, 9]), np.array(["a", "b"]), 2)]).names == ("3-9",)


def test_a_refit_is_the_fit_of_each_cell_at_its_own_penalty(samples):
    target = readable(samples, "doors")
    x = standardise(samples.features, *spread(samples.features))
    penalties = torch.tensor([0.5, 0.02, 0.5, 0.1, 0.02, 3.0])
    probes = refit(x, samples.labels["doors"], target, penalties)
    assert probes.converged.all()
    for cell, value in enumerate(penalties.tolist()):
        alone = fit_newton(x[[cell]], samples.labels["doors"], target, [value])
        torch.testing.assert_close(probes.weight[cell], alone.weight[0, :, 0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(probes.bias[cell], alone.bias[0, 0], atol=1e-5, rtol=1e-4)


def test_labelled_keeps_what_carries_the_target_and_where_it_was(samples):
    part = labelled(samples, readable(samples, "answer"), samples.cells[2:0:-1], "test")
    assert len(part) == 20
    np.testing.assert_array_equal(part.keys, samples.keys[part.where])
    assert (part.labels >= 0).all()
    torch.testing.assert_close(part.features, samples.features[torch.from_numpy(part.where)][:, [2, 1]])
    some = part.take(part.where % 4 == 0)
    assert 0 < len(some) < len(part)
    np.testing.assert_array_equal(some.where % 4, 0)
    torch.testing.assert_close(some.features, samples.features[torch.from_numpy(some.where)][:, [2, 1]])


def test_statistics_are_those_a_bank_standardises_by(samples):
    ours = statistics(samples, samples.cells[1:3])
    for mine, theirs in zip(ours, spread(samples.subset("train").features[:, 1:3]), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_single_region_makes_candidates_classes_of_the_whole(samples):
    labels = {name: samples.labels[name] for name in ("answer", "start", "control")}
    whole = replace(samples, features=samples.features[:, :, :1], labels=labels)
    assert readable(whole, "answer") in readable_targets(samples.targets, 1)
    assert readable(whole, "answer").form == "problem"


def test_bad_requests_are_named(samples):
    with pytest.raises(ValueError, match="target='door'.*answer, doors, start, control"):
        readable(samples, "door")
    with pytest.raises(ValueError, match=r"step 9, layer 0, cond, all.*\b6\b"):
        columns_of(samples, [Cell(9, 0, "cond", "all")])
    answer = readable(samples, "answer")
    empty = replace(samples, labels=samples.labels | {"answer": torch.full((120,), -1)})
    with pytest.raises(ValueError, match=r"'answer'.*validation.*\b1\b.*task\.problems"):
        labelled(empty, answer, samples.cells, "validation")
    torn = samples.labels["doors"].clone()
    torn[0, 1] = -1
    with pytest.raises(ValueError, match="target 'doors'.*-1"):
        labelled(replace(samples, labels=samples.labels | {"doors": torn}), readable(samples, "doors"), (), "train")
    with pytest.raises(ValueError, match=r"^penalties.*\b2\b.*\b6\b"):
        refit(samples.features.transpose(0, 1), samples.labels["doors"], readable(samples, "doors"), torch.ones(2))


@pytest.mark.parametrize(
    ("estimate", "interval"),
    [(estimate_share, share_interval), (estimate_difference, difference_interval), (estimate_mean, mean_interval)],
)
def test_estimates_keep_the_axes_and_are_the_intervals_of_each_row(estimate, interval):
    keys = np.repeat([f"k{i}" for i in range(12)], 2)
    values = np.random.default_rng(0).integers(0, 2, (2, 3, 24)).astype(float)
    found = estimate(values, keys)
    np.testing.assert_allclose(found.value, values.mean(axis=-1))
    for at in np.ndindex(2, 3):
        lower, upper = interval(values[at][None], keys)
        assert (found.lower[at], found.upper[at]) == (lower[0], upper[0])
    alone = estimate(values[0, 0], keys)
    assert alone.value.shape == alone.lower.shape == () and alone.lower == found.lower[0, 0]


def test_shares_without_an_error_are_not_called_certain():
    found = estimate_share(np.ones((1, 24)), np.repeat([f"k{i}" for i in range(12)], 2))
    assert found.lower[0] == pytest.approx(0.025 ** (1 / 12)) and found.upper[0] == 1  # Clopper and Pearson
