"""Directions against autograd, erasers against the closed form and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from concept_erasure import LeaceEraser
from sklearn.linear_model import LogisticRegression

from cosprobe.activations.dataset import ProbeSamples
from cosprobe.causal.directions import (
    Matched,
    concept_erasers,
    on_device,
    probe_directions,
    random_directions,
    random_erasers,
)
from cosprobe.cells import Cell
from cosprobe.errors import InputError
from cosprobe.probes import ProbeBank
from cosprobe.tasks import Target

REGIONS, CHANNELS, COUNT = 3, 12, 120
CELLS = (Cell(0, 1, "cond", "all"), Cell(2, 0, "cond", "all"))
EXIT = Target("exit", REGIONS, "candidate", "answer", ("one",))
THING = Target("thing", 4, "problem", "answer", ("one",))
INSIDE = Target("inside", 3, "region", "memory", ("one",))
TARGETS = (EXIT, THING, INSIDE)


@pytest.fixture(scope="module")
def bank() -> ProbeBank:
    rng = torch.Generator().manual_seed(0)

    def table(*shape):
        return torch.randn(len(CELLS), *shape, generator=rng)

    return ProbeBank(
        CELLS, TARGETS, REGIONS, table(CHANNELS), table(CHANNELS).abs() + 0.1,
        {"exit": table(CHANNELS, 1), "thing": table(REGIONS * CHANNELS, 4), "inside": table(CHANNELS, 3)},
        {"exit": torch.zeros(len(CELLS), 1), "thing": table(4), "inside": table(3)}, {},
    )  # fmt: skip


@pytest.mark.parametrize("target", ["exit", "thing"])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_directions_are_the_gradient_of_the_score_of_the_label_above_the_mean(bank, target, cell):
    labels = torch.arange(bank.target(target).classes)
    x = torch.randn(len(labels), 1, REGIONS, CHANNELS, requires_grad=True)
    score = bank.decision(x, target, [cell])[0]
    above = score[torch.arange(len(labels)), labels] - score.mean(dim=1)
    (gradient,) = torch.autograd.grad(above.sum(), x)
    expected = gradient[:, 0] / gradient.flatten(1).norm(dim=1)[:, None, None]
    torch.testing.assert_close(probe_directions(bank, target, cell, labels), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("target", ["exit", "thing"])
def test_no_other_step_of_this_length_raises_the_label_more(bank, target):
    labels, x = torch.tensor([0, 2, 1]), torch.randn(3, REGIONS, CHANNELS)

    def raised(directions):
        before, after = (bank.decision(y[:, None], target, [CELLS[0]])[0] for y in (x, x + directions))
        gain = after - before
        return gain[torch.arange(3), labels] - gain.mean(dim=1)

    best = raised(probe_directions(bank, target, CELLS[0], labels))
    assert (best > 0).all()
    for _ in range(200):
        other = torch.randn(3, REGIONS, CHANNELS)
        assert (raised(other / other.flatten(1).norm(dim=1)[:, None, None]) <= best + 1e-5).all()


def test_channels_that_are_constant_in_training_are_left_alone(bank):
    still = ProbeBank(
        CELLS, TARGETS, REGIONS, bank.mean, bank.std.clone(), {n: w.clone() for n, w in bank.weights.items()},
        bank.biases, {},
    )  # fmt: skip
    still.std[:, 1] = 0.0
    still.weights["exit"][:, 1] = 0.0  # as fits leave it
    found = probe_directions(still, "exit", CELLS[0], torch.tensor([0, 1]))
    assert found.isfinite().all() and (found[..., 1] == 0).all()
    torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.ones(2))


def test_labels_of_regions_have_no_direction(bank):
    with pytest.raises(InputError, match=r"use\.target='inside'.*one label per problem"):
        probe_directions(bank, "inside", CELLS[0], torch.tensor([0]))


@pytest.mark.parametrize("target", ["exit", "thing"])
def test_random_directions_have_norm_1_and_the_weights_of_the_regions(bank, target):
    like = probe_directions(bank, target, CELLS[1], torch.tensor([2, 0, 1]))
    found = random_directions(like, 3)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.ones(3))
    torch.testing.assert_close(found.norm(dim=2), like.norm(dim=2))
    assert torch.linalg.matrix_rank(found.flatten(0, 1), rtol=1e-4) == 1  # one channel vector
    top = like.norm(dim=2).argmax(dim=1)
    for one, other, strongest in zip(found, like, top, strict=True):
        assert (torch.sign(one @ one[strongest]) == torch.sign(other @ other[strongest])).all()
    assert not torch.equal(found, random_directions(like, 4))
    assert torch.equal(found, random_directions(like, 3))


# erasers


@pytest.fixture(scope="module")
def samples() -> ProbeSamples:
    """Features that have every label, and rest of them correlated; some samples have no label."""
    rng = torch.Generator().manual_seed(1)
    x = (
        torch.randn(COUNT, len(CELLS), REGIONS, CHANNELS, generator=rng)
        @ torch.randn(CHANNELS, CHANNELS, generator=rng)
        + 3
    )
    labels = {
        "exit": torch.randint(REGIONS, (COUNT,), generator=rng),
        "thing": torch.randint(4, (COUNT,), generator=rng),
        "inside": torch.randint(3, (COUNT, REGIONS), generator=rng),
    }
    at = torch.arange(COUNT)
    x[at, :, labels["exit"]] += 2 * torch.randn(CHANNELS, generator=rng)
    moves = torch.randn(4, 1, CHANNELS, generator=rng)[labels["thing"]]
    x[:, :, 1] += moves  # in one region one way,
    x[:, :, 2] -= moves  # in another the other way: regions together have no class means
    x += torch.randn(3, CHANNELS, generator=rng)[labels["inside"]][:, None]
    labels["exit"][:7], labels["thing"][3:9], labels["inside"][110:] = -1, -1, -1
    return ProbeSamples(
        x, CELLS, TARGETS, labels, np.array(["train"] * COUNT), np.array([f"p{i}" for i in range(COUNT)]),
        np.array(["one"] * COUNT),
    )  # fmt: skip


def closed_form(x: torch.Tensor, z: torch.Tensor):
    """LEACE as in the paper: x - W+ P W (x - mean), P on the columns of W cov(x, z), W the whitening."""
    centred, z = x - x.mean(dim=0), z - z.mean(dim=0)
    covariance, cross = centred.T @ centred / len(x), centred.T @ z / len(x)
    size, axes = torch.linalg.eigh(covariance)
    whiten, back = axes @ torch.diag(size**-0.5) @ axes.T, axes @ torch.diag(size**0.5) @ axes.T
    columns = whiten @ cross
    onto = columns @ torch.linalg.pinv(columns, rtol=1e-9)
    return lambda y: y - (y - x.mean(dim=0)) @ (back @ onto @ whiten).T


def vectors_of(samples: ProbeSamples, target: str):
    """Vectors of cell 1 by sample and region, and labels, of the samples that have one."""
    label = samples.labels[target]
    kept = label.reshape(COUNT, -1).amin(dim=1) >= 0
    return samples.features[kept, 1].double(), label[kept]


@pytest.mark.parametrize("target", ["exit", "inside"])
def test_erasers_are_the_closed_form(samples, target):
    x, label = vectors_of(samples, target)
    per_region = torch.nn.functional.one_hot(label, REGIONS) if target == "exit" else label
    onehot = torch.nn.functional.one_hot(per_region.flatten()).double()
    erase = closed_form(x.flatten(0, 1), onehot)
    found = concept_erasers(samples, target, CELLS)
    assert set(found) == {(0, 1), (2, 0)}
    eraser, probe = (
        found[2, 0],
        torch.randn(20, CHANNELS, dtype=torch.float64),
    )  # tokens
    torch.testing.assert_close(eraser(probe.float()).double(), erase(probe), atol=1e-4, rtol=1e-4)
    erased = erase(x.flatten(0, 1))
    means = [erased[per_region.flatten() == c].mean(dim=0) for c in per_region.unique()]
    for mean in means:
        torch.testing.assert_close(mean, means[0])


@pytest.mark.parametrize("target", [t.name for t in TARGETS])
def test_nothing_linear_is_left_of_an_erased_target(samples, target):
    """Class means are equal, and scikit-learn is at the majority rate where it was above it before."""
    x, label = vectors_of(samples, target)
    if target == "exit":
        rows, y = x.flatten(0, 1), torch.nn.functional.one_hot(label, REGIONS).flatten()
    elif target == "inside":
        rows, y = x.flatten(0, 1), label.flatten()
    else:
        rows, y = x.flatten(1), label  # regions side by side
    eraser = concept_erasers(samples, target, [CELLS[1]])[2, 0]
    erased = eraser(x.flatten(0, 1).float()).double().reshape(rows.shape)
    for c in y.unique():
        torch.testing.assert_close(erased[y == c].mean(dim=0), erased.mean(dim=0), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(rows[y == c].mean(dim=0), rows.mean(dim=0), atol=0.02)
    majority = float(torch.bincount(y).max()) / len(y)
    before, after = (
        LogisticRegression(C=100.0, max_iter=5000, tol=1e-8).fit(part.numpy(), y.numpy()) for part in (rows, erased)
    )
    assert before.score(rows.numpy(), y.numpy()) > majority + 0.05
    assert after.score(erased.numpy(), y.numpy()) == pytest.approx(majority)


def test_classes_are_one_hot_and_not_numbers(samples):
    """Of numbers, one dimension would be removed; three classes take two, in regions of their own more."""
    removed = {t: torch.linalg.matrix_rank(_removed(concept_erasers(samples, t, CELLS)[0, 1]), rtol=1e-4)
               for t in ("exit", "inside", "thing")}  # fmt: skip
    assert removed == {"exit": 1, "inside": 2, "thing": 9}  # 3 regions x 3 dimensions


def _removed(eraser: LeaceEraser) -> torch.Tensor:
    return eraser.proj_left @ eraser.proj_right


@pytest.mark.parametrize("target", [t.name for t in TARGETS])
def test_random_erasers_remove_as_many_dimensions(samples, target):
    erasers = concept_erasers(samples, target, CELLS)
    found, other = random_erasers(erasers, 0), random_erasers(erasers, 1)
    for at, eraser in erasers.items():
        matrix = _removed(found[at])
        assert torch.linalg.matrix_rank(matrix, rtol=1e-4) == torch.linalg.matrix_rank(_removed(eraser), rtol=1e-4)
        torch.testing.assert_close(matrix @ matrix, matrix)  # a projection,
        torch.testing.assert_close(matrix, matrix.T)  # orthogonal
        torch.testing.assert_close(found[at](eraser.bias[None]), eraser.bias[None])  # around the same mean
        assert not torch.allclose(matrix, _removed(other[at]))


def test_erasers_are_the_same_on_another_device(samples):
    erasers = concept_erasers(samples, "exit", CELLS)
    moved = on_device(erasers, "meta")
    assert all(e.proj_left.is_meta and e.proj_right.is_meta and e.bias.is_meta for e in moved.values())
    x = torch.randn(4, CHANNELS)
    for at, eraser in on_device(erasers, "cpu").items():
        assert torch.equal(eraser(x), erasers[at](x))


def test_the_random_control_moves_every_vector_as_far_as_the_eraser_and_in_its_own_directions():
    generator = torch.Generator().manual_seed(0)
    vectors, labels = torch.randn(60, 7, generator=generator), torch.arange(60) % 2
    eraser = LeaceEraser.fit(vectors + labels[:, None], torch.nn.functional.one_hot(labels).float())
    random = random_erasers({(0, 0): eraser}, 1)[0, 0]
    moved = Matched(eraser, random)(vectors) - vectors
    torch.testing.assert_close(moved.norm(dim=1), (eraser(vectors) - vectors).norm(dim=1))
    basis = random.proj_left
    torch.testing.assert_close(moved @ basis @ basis.T, moved, rtol=1e-4, atol=1e-4)
