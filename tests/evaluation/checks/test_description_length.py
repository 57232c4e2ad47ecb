"""Description lengths against a plain loop of scikit-learn fits, and against what they must say of planted signals."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from cosprobe.activations.dataset import ProbeSamples
from cosprobe.cells import Cell
from cosprobe.evaluation.checks import description_length as module
from cosprobe.evaluation.checks.description_length import FIRST, code_length, description_length, doubling, side_by_side
from cosprobe.probes.linalg import design, spread, standardise
from cosprobe.tasks import Target
from tests.probes.ddp_fit import planted

STRENGTHS = (0.0, 1.5, 2.5, 5.0)
TARGETS = (
    Target("answer", 4, "candidate", "answer", ("one",)),
    Target("start", 4, "problem", "perception", ("one",)),
    Target("doors", 2, "region", "perception", ("one",)),
)


def graded(problems: int = 240, replicas: int = 1, seed: int = 0) -> ProbeSamples:
    """Noise with every target planted the stronger the later the cell; the first cell knows nothing."""
    rng = torch.Generator().manual_seed(seed)
    count, regions, channels = problems * replicas, 4, 6

    def labels(high: int, *more: int) -> torch.Tensor:
        return torch.randint(0, high, (problems, *more), generator=rng).repeat_interleave(replicas, 0)

    answer, start, doors = labels(4), labels(4), labels(2, regions)
    x = torch.randn(count, len(STRENGTHS), regions, channels, generator=rng)
    strength = torch.tensor(STRENGTHS)
    x[torch.arange(count), :, answer, 0] += strength
    x[:, :, :, 1] += strength[:, None] * (doors[:, None] - 0.5)
    x[:, :, 0, 2:] += strength[:, None] * torch.eye(4)[start][:, None]
    return ProbeSamples(
        features=x,
        cells=tuple(Cell(0, layer, "cond", "all") for layer in range(len(STRENGTHS))),
        targets=TARGETS,
        labels={"answer": answer, "start": start, "doors": doors},
        split=np.repeat(["train", "validation", "test"], count // 3),
        keys=np.repeat([f"k{i}" for i in range(problems)], replicas),
        kinds=np.full(count, "one"),
    )


PENALTIES = torch.full((len(STRENGTHS),), 0.1)


@pytest.mark.parametrize("name", ["start", "doors"])
def test_equals_a_plain_loop_of_sklearn_fits(name):
    samples, cell, value = planted(), 2, 0.05
    target = next(t for t in samples.targets if t.name == name)
    found = description_length(samples, name, [samples.cells[cell]], torch.tensor([value]), seed=5)
    train, test = samples.subset("train"), samples.subset("test")
    stats = spread(train.features)
    rows = {s: design(standardise(p.features, *stats), target.form)[cell].numpy() for s, p in
            (("train", train), ("test", test))}  # fmt: skip
    label = train.labels[name].numpy().reshape(len(train), -1)
    order = np.argsort(np.random.default_rng(5).permutation(len(train))[np.unique(train.keys, return_inverse=True)[1]])
    bits = [np.log2(target.classes)] * label[order[: found.sizes[0]]].size
    for i, size in enumerate(found.sizes):
        seen, n = order[:size], label[order[:size]].size
        vectors = 2 if target.classes == 2 else 1
        oracle = LogisticRegression(C=vectors / (value * n), max_iter=5000, tol=1e-9)
        oracle.fit(rows["train"][seen].reshape(n, -1), label[seen].ravel())
        assert len(oracle.classes_) == target.classes
        for sample in order[size : 2 * size + 1] if i + 1 < len(found.sizes) else ():
            if np.flatnonzero(order == sample)[0] < found.sizes[i + 1]:
                p = oracle.predict_proba(rows["train"][sample])[np.arange(label.shape[1]), label[sample]]
                bits += list(-np.log2((n * p + 1 / target.classes) / (n + 1)))
        guess = oracle.predict(rows["test"].reshape(-1, rows["test"].shape[-1]))
        expected = np.mean(guess == test.labels[name].numpy().ravel())
        assert found.accuracy.value[0, i] == pytest.approx(expected, abs=0.5 / len(test))
    assert len(bits) == label.size == found.labels
    assert found.bits[0] == pytest.approx(np.mean(bits), abs=1e-4)
    assert found.compression[0] == pytest.approx(np.log2(target.classes) / np.mean(bits), abs=1e-3)


@pytest.mark.parametrize("target", ["answer", "start", "doors"])
def test_the_more_signal_the_fewer_bits(target):
    found = description_length(graded(), target, graded().cells, PENALTIES)
    assert found.converged.all()
    assert (np.diff(found.bits) < 0).all()
    assert found.bits[0] > found.uniform - 0.02
    assert found.lower[0] > found.upper[-1]
    assert found.compression[-1] > 1.5
    assert (found.lower <= found.bits).all()
    assert (found.bits <= found.upper).all()
    assert found.accuracy.value[-1, -1] > 0.9
    assert (found.accuracy.value[-1] >= found.accuracy.lower[-1]).all()
    assert found.n == 80


def test_frequent_labels_are_cheap_without_features():
    samples = graded()
    rare = torch.where(torch.arange(240) % 8 == 0, 1, 0)
    skewed = replace(samples, labels=samples.labels | {"start": rare})
    found = description_length(skewed, "start", samples.cells[:1], PENALTIES[:1])
    entropy = -(7 / 8 * np.log2(7 / 8) + 1 / 8 * np.log2(1 / 8))
    assert entropy < found.prior < 1.2
    assert found.bits[0] > found.prior - 0.05  # noise is no better than the prior, though compression is above 1
    assert found.compression[0] > 1


def test_blocks_are_of_whole_problems(monkeypatch):
    """Seeds of a problem that are exact copies must not pay for each other: bits stay those of one copy."""
    whole = partial(code_length, seen=10**6)  # two copies are twice the labels, which the pseudo-label would notice
    monkeypatch.setattr(module, "code_length", lambda decision, labels, seen: whole(decision, labels))
    one = graded()
    twice = torch.arange(240).repeat_interleave(2)
    at = twice.numpy()
    two = replace(
        one,
        features=one.features[twice],
        labels={name: label[twice] for name, label in one.labels.items()},
        split=one.split[at],
        keys=one.keys[at],
        kinds=one.kinds[at],
    )
    single, double = (description_length(s, "start", one.cells, PENALTIES, seed=2) for s in (one, two))
    assert double.sizes == single.sizes
    assert double.labels == 2 * single.labels
    np.testing.assert_allclose(double.bits, single.bits, atol=1e-4)
    np.testing.assert_allclose(double.accuracy.value, single.accuracy.value, atol=1e-9)


def test_a_class_no_early_block_has_costs_a_bounded_number_of_bits():
    samples = graded()
    label = torch.zeros(240, dtype=torch.long)
    last = np.argsort(np.random.default_rng(0).permutation(80)[np.unique(samples.keys[:80], return_inverse=True)[1]])[
        -1
    ]
    label[last] = 3
    found = description_length(
        replace(samples, labels=samples.labels | {"start": label}), "start", samples.cells, PENALTIES
    )
    assert found.sizes == (10, 20, 40, 80)
    assert (found.bits * 80 < 10 * 2 + 70 * 0.1 + np.log2(4 * 41) + 0.1).all()


def test_code_length_by_hand():
    proba = torch.tensor([[[0.9, 0.1], [0.5, 0.5]]])
    bits = code_length(proba.log(), torch.tensor([1, 0]), 9)
    np.testing.assert_allclose(bits, -np.log2([[(9 * 0.1 + 0.5) / 10, 0.5]]), atol=1e-6)
    by_region = code_length(proba.log()[:, None], torch.tensor([[1, 0]]), 9)
    np.testing.assert_allclose(by_region, bits.mean(keepdims=True), atol=1e-12)
    whole = sum(2 ** -code_length(torch.randn(1, 1, 3, generator=torch.Generator().manual_seed(k)) * 9,
                                  torch.tensor([c]), 7)[0, 0] for k in (4,) for c in range(3))  # fmt: skip
    assert whole == pytest.approx(1)  # a code: the probabilities of all classes add up to 1


def test_sizes_double_up_to_all_problems():
    assert doubling(180, "answer") == (11, 22, 45, 90, 180)
    assert doubling(2 * FIRST, "answer") == (FIRST, 2 * FIRST)
    with pytest.raises(ValueError, match=r"target 'answer'.*\b19\b.*\b20\b.*task\.problems"):
        doubling(19, "answer")


@pytest.mark.parametrize("target", ["answer", "doors"])
def test_results_side_by_side_are_those_of_one_call(target):
    samples = graded()
    whole = description_length(samples, target, samples.cells, PENALTIES, seed=1)
    order = {"third": 2, "last": 3, "first": 0, "second": 1}
    joined = side_by_side({
        name: description_length(samples, target, [samples.cells[i]], PENALTIES[:1], seed=1)
        for name, i in order.items()
    })  # fmt: skip
    assert whole.names == tuple(map(str, samples.cells)) and joined.names == tuple(order)
    order = list(order.values())
    for name in ("bits", "lower", "upper", "compression", "converged"):
        np.testing.assert_allclose(getattr(joined, name), getattr(whole, name)[order], rtol=1e-6)
    for name in ("value", "lower", "upper"):
        np.testing.assert_allclose(getattr(joined.accuracy, name), getattr(whole.accuracy, name)[order])
    for name in ("target", "sizes", "uniform", "prior", "labels", "n"):
        assert getattr(joined, name) == getattr(whole, name)


def test_bad_requests_are_named():
    samples = graded()
    with pytest.raises(ValueError, match="target='exit'.*answer, start, doors"):
        description_length(samples, "exit", samples.cells, PENALTIES)
    with pytest.raises(ValueError, match=r"^penalties.*\b3\b.*\b4\b"):
        description_length(samples, "start", samples.cells, PENALTIES[:3])
