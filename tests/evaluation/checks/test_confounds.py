"""Removal of confounds against scikit-learn, and against what it must do to planted signals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.preprocessing import OneHotEncoder

from cosprobe.activations.dataset import ProbeSamples, difficulty_columns
from cosprobe.cells import Cell
from cosprobe.evaluation.checks.confounds import partial_out, residualised
from cosprobe.probes.linalg import spread, standardise
from cosprobe.tasks import Target

CELLS = tuple(Cell(step, 3, "cond", "all") for step in range(2))
PENALTIES = torch.tensor([0.01, 0.1])
TARGETS = (
    Target("length", 3, "problem", "nuisance", ("one",)),  # a confound itself
    Target("start", 3, "problem", "perception", ("one",)),  # nothing to do with one
    Target("answer", 4, "candidate", "answer", ("one",)),
    Target("doors", 2, "region", "perception", ("one",)),
)


def confounded(count: int = 600, seed: int = 0) -> ProbeSamples:
    """Every target is planted in every cell, and so are the confounds."""
    rng = torch.Generator().manual_seed(seed)
    length, start, rooms = (torch.randint(0, 3, (count,), generator=rng) for _ in range(3))
    answer = torch.randint(0, 4, (count,), generator=rng)
    doors = torch.randint(0, 2, (count, 4), generator=rng)
    x = torch.randn(count, 2, 4, 12, generator=rng)
    x[torch.arange(count), :, answer, 0] += 4
    x[:, :, :, 1] += 4.0 * (doors[:, None] - 0.5)
    x[:, :, 0, 2:5] += 4 * torch.eye(3)[start][:, None]
    x[:, :, :, 5:8] += 4 * torch.eye(3)[length][:, None, None]
    x[:, :, :, 8:11] += 2 * torch.eye(3)[rooms][:, None, None]
    return ProbeSamples(
        features=7 * x + 30,
        cells=CELLS,
        targets=TARGETS,
        labels={"length": length, "start": start, "answer": answer, "doors": doors},
        split=np.repeat(["train", "validation", "test"], count // 3),
        keys=np.array([f"k{i}" for i in range(count)]),
        kinds=np.full(count, "one"),
        difficulty={
            "length": length.numpy() + 4,
            "rooms": rooms.numpy(),
            "reachable": np.ones(count, dtype=int),
        },
    )


@pytest.fixture(scope="module")
def samples() -> ProbeSamples:
    return confounded()


def test_a_target_that_is_a_confound_falls_to_chance(samples):
    found = residualised(samples, "length", CELLS, PENALTIES)
    assert found.confounds == ("length", "rooms")
    assert found.converged.all()
    assert (found.before.value > 0.95).all()
    assert (found.after.value < 0.45).all()
    assert (found.difference.upper < -0.4).all()
    assert found.alone.value > 0.95
    np.testing.assert_allclose(found.difference.value, found.after.value - found.before.value)


@pytest.mark.parametrize("target", ["start", "answer", "doors"])
def test_a_signal_that_is_independent_of_them_survives(samples, target):
    found = residualised(samples, target, CELLS, PENALTIES)
    assert (found.after.value > 0.9).all()
    assert (np.abs(found.difference.value) < 0.05).all()
    classes = {"start": 3, "answer": 4, "doors": 2}[target]
    assert abs(found.alone.value - 1 / classes) < 0.12


def test_an_answer_that_follows_a_confound_is_read_from_it_even_by_a_shared_scorer(samples):
    follows = torch.from_numpy(samples.difficulty["length"] - 4) + 1
    x = torch.randn(600, 2, 4, 12, generator=torch.Generator().manual_seed(5))
    x[torch.arange(600), :, follows, 0] += 5
    bound = replace(samples, features=x, labels=samples.labels | {"answer": follows})
    found = residualised(bound, "answer", CELLS, PENALTIES)
    assert found.alone.value > 0.95
    assert (found.before.value > 0.9).all()
    assert (found.after.value < 0.4).all()


def test_equals_sklearn_regression_then_classification(samples):
    cell, value = 1, float(PENALTIES[1])
    found = residualised(samples, "start", CELLS, PENALTIES)
    train, test = samples.subset("train"), samples.subset("test")
    stats = spread(train.features)
    rows = [standardise(s.features, *stats)[cell].flatten(1).double().numpy() for s in (train, test)]
    confounds = [np.stack([s.difficulty["length"], s.difficulty["rooms"]], axis=1) for s in (train, test)]
    code = OneHotEncoder(drop="first", sparse_output=False).fit(confounds[0])
    columns = [code.transform(n) for n in confounds]
    line = LinearRegression().fit(columns[0], rows[0])
    left = [x - line.predict(z) for x, z in zip(rows, columns, strict=True)]
    label = [s.labels["start"].numpy() for s in (train, test)]
    for (fit_rows, test_rows), ours in ((rows, found.before), (left, found.after)):
        oracle = LogisticRegression(C=1 / (value * len(label[0])), max_iter=5000, tol=1e-9).fit(fit_rows, label[0])
        assert ours.value[cell] == pytest.approx(oracle.score(test_rows, label[1]), abs=1e-9)

    # and the removal itself, number by number
    x = [standardise(s.features, *stats) for s in (train, test)]
    ours = partial_out(x[0], torch.from_numpy(columns[0]), x[1], torch.from_numpy(columns[1]))
    for mine, theirs in zip(ours, left, strict=True):
        np.testing.assert_allclose(mine[cell].flatten(1).numpy(), theirs, atol=1e-5)


@given(st.integers(0, 1000), st.integers(2, 5))
def test_removal_leaves_nothing_linear_and_takes_nothing_twice(seed, levels):
    rng = np.random.default_rng(seed)
    z = torch.from_numpy(np.eye(levels)[rng.integers(0, levels, 40)])
    z = torch.cat([z, z[:, :1] * 2], dim=1)  # columns that depend on each other
    x = torch.from_numpy(rng.normal(size=(2, 40, 3, 4)))
    left, again = partial_out(x, z, x, z)
    torch.testing.assert_close(left, again)
    torch.testing.assert_close(torch.einsum("sq,csrd->cqrd", z, left), torch.zeros(2, levels + 1, 3, 4).double())
    torch.testing.assert_close(partial_out(left, z, left, z)[0], left)
    pure = torch.einsum("sq,cqrd->csrd", z, torch.from_numpy(rng.normal(size=(2, levels + 1, 3, 4)))) + 3
    torch.testing.assert_close(partial_out(pure, z, x, z)[0], torch.zeros_like(pure))


def test_what_is_explained_entirely_is_not_blown_up_again(samples):
    """Rounding that is left of a channel that was a confound and nothing else must not come back at unit variance."""
    x = samples.features.clone()
    x[..., 6] = torch.from_numpy(samples.difficulty["length"]).float()[:, None, None] * 1000
    found = residualised(replace(samples, features=x), "length", CELLS, PENALTIES)
    assert (found.after.value < 0.45).all()


def test_rare_values_have_a_column_together():
    samples = confounded()
    odd = samples.difficulty["length"].copy()
    odd[:3] = [50, 60, 70]  # three problems of their own values among 200
    odd[-1] = 99  # a test value no training sample has
    found = residualised(replace(samples, difficulty={"length": odd}), "length", CELLS, PENALTIES)
    assert (found.after.value < 0.5).all()


def test_confound_columns_are_values_and_squares_standardised_by_train(samples):
    columns = difficulty_columns(samples)
    assert columns.shape == (600, 6)
    train = samples.split == "train"
    for at, name in enumerate(("length", "rooms")):
        values = samples.difficulty[name].astype(float)
        score = (values - values[train].mean()) / values[train].std()
        np.testing.assert_allclose(columns[:, 2 * at : 2 * at + 2].numpy(), np.stack([score, score**2], 1), atol=1e-5)
    assert (columns[:, 4:] == 0).all()  # a confound that does not vary
    assert torch.equal(difficulty_columns(samples, ["rooms"]), columns[:, 2:4])


def test_a_constant_in_train_says_nothing_elsewhere(samples):
    length = np.where(samples.split == "train", 5, samples.difficulty["length"])
    assert (difficulty_columns(replace(samples, difficulty={"length": length})) == 0).all()


def test_a_probe_of_confounds_alone_prefers_the_common_candidate(samples):
    often = torch.where(torch.arange(600) % 5 > 0, 2, samples.labels["answer"])
    found = residualised(replace(samples, labels=samples.labels | {"answer": often}), "answer", CELLS, PENALTIES)
    test = samples.split == "test"
    assert found.alone.value == pytest.approx(float((often[test] == 2).float().mean()), abs=0.02)
    assert found.alone.value > 0.8


def test_bad_requests_are_named(samples):
    with pytest.raises(ValueError, match="^difficulty"):
        difficulty_columns(replace(samples, difficulty={}))
    constant = replace(samples, difficulty={"rooms": np.ones(600, dtype=int)})
    with pytest.raises(ValueError, match=r"'start'.*\b1\b.*\b200\b"):
        residualised(constant, "start", CELLS, PENALTIES)
    unseen = samples.labels["start"].clone()
    unseen[200:400] = -1
    with pytest.raises(ValueError, match=r"'start'.*validation.*\b1\b.*task\.problems"):
        residualised(replace(samples, labels=samples.labels | {"start": unseen}), "start", CELLS, PENALTIES)
