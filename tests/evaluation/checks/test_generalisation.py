"""Generalisation matrices against the bank read cell by cell, and against planted codes that last or change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cosprobe.activations.dataset import ProbeSamples
from cosprobe.cells import Cell
from cosprobe.evaluation.checks import generalisation as module
from cosprobe.evaluation.checks.generalisation import matrices
from cosprobe.evaluation.checks.refitting import labelled, readable, refit
from cosprobe.evaluation.intervals import correctness, share_interval
from cosprobe.probes.bank import ProbeBank
from cosprobe.probes.linalg import spread, standardise
from cosprobe.tasks import Target

STEPS, LAYERS, BRANCHES = range(4), range(3), ("cond", "uncond")
CELLS = tuple(Cell(step, layer, branch, "all") for step in STEPS for layer in LAYERS for branch in BRANCHES)
TARGETS = (
    Target("answer", 4, "candidate", "answer", ("one",)),
    Target("start", 3, "problem", "perception", ("one",)),
    Target("doors", 2, "region", "perception", ("one",)),
)
BEST = Cell(2, 1, "cond", "all")
EXPERTS = {0: "high", 1: "high", 2: "low", 3: "low"}


def coded(problems: int = 270, seed: int = 0) -> ProbeSamples:
    """Two noise seeds per problem. In layer 1 the answer stands in one channel at steps 0 and 1 and in another at steps
    2 and 3; in the other layers nowhere. Start and doors are planted everywhere, in one code."""
    rng = torch.Generator().manual_seed(seed)
    count = 2 * problems

    def twice(high: int, *more: int) -> torch.Tensor:
        return torch.randint(0, high, (problems, *more), generator=rng).repeat_interleave(2, 0)

    answer, start, doors = twice(4), twice(3), twice(2, 4)
    x = torch.randn(count, len(CELLS), 4, 8, generator=rng)
    for i, cell in enumerate(CELLS):
        if cell.layer == 1:
            x[torch.arange(count), i, answer, 0 if cell.step < 2 else 1] += 5
    x[:, :, 0, 2:5] += 4 * torch.eye(3)[start][:, None]
    x[:, :, :, 5] += 3.0 * (doors[:, None] - 0.5)
    return ProbeSamples(
        features=x * 2 + 50,
        cells=CELLS,
        targets=TARGETS,
        labels={"answer": torch.where(torch.arange(count) % 10 < 8, answer, -1), "start": start, "doors": doors},
        split=np.repeat(["train", "validation", "test"], count // 3),
        keys=np.repeat([f"k{i}" for i in range(problems)], 2),
        kinds=np.full(count, "one"),
        replica=np.tile([0, 1], problems),
        difficulty={"rooms": np.arange(problems).repeat(2) % 3 + 3},
    )


def bank_of(samples: ProbeSamples) -> ProbeBank:
    train = samples.subset("train")
    mean, std = spread(train.features)
    x, penalty = standardise(train.features, mean, std), torch.full((len(samples.cells),), 0.02)
    fits = {t.name: refit(x, train.labels[t.name], t, penalty) for t in samples.targets}
    return ProbeBank(
        samples.cells, samples.targets, samples.regions, mean, std,
        {name: fit.weight for name, fit in fits.items()}, {name: fit.bias for name, fit in fits.items()},
        dict.fromkeys(fits, penalty),
    )  # fmt: skip


@pytest.fixture(scope="module")
def samples() -> ProbeSamples:
    return coded()


@pytest.fixture(scope="module")
def bank(samples) -> ProbeBank:
    return bank_of(samples)


@pytest.fixture(scope="module")
def found(samples, bank):
    return {(m.target, m.axis): m for m in matrices(samples, bank, {t.name: BEST for t in TARGETS}, EXPERTS)}


def test_there_is_a_matrix_per_target_and_axis(found):
    axes = ("step", "expert", "layer", "branch", "seed", "rooms")
    assert set(found) == {(t.name, axis) for t in TARGETS for axis in axes}
    assert found["answer", "step"].train == found["answer", "step"].test == ("0", "1", "2", "3")
    assert found["answer", "layer"].train == ("0", "1", "2")
    assert found["answer", "branch"].train == ("cond", "uncond")
    assert found["answer", "expert"].train == ("high", "low")
    assert found["answer", "seed"].train == ("all", "0", "1")
    assert found["answer", "rooms"].train == ("all", "3", "4", "5")
    assert found["answer", "rooms"].test == ("3", "4", "5")
    assert all(m.converged for m in found.values())


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize("axis", ["step", "layer", "branch"])
def test_each_square_is_the_frozen_probe_read_on_the_other_cell(samples, bank, found, target, axis):
    cells = {
        "step": [replace(BEST, step=step) for step in STEPS],
        "layer": [replace(BEST, layer=layer) for layer in LAYERS],
        "branch": [replace(BEST, branch=branch) for branch in BRANCHES],
    }[axis]
    matrix = found[target.name, axis]
    test = labelled(samples, target, cells, "test")
    for i, one in enumerate(cells):
        for j in range(len(cells)):
            guess = bank.predict(test.features[:, [j]], target.name, [one])  # standardised by the training cell
            right = correctness(guess.numpy(), test.labels.numpy())
            assert matrix.accuracy[i, j] == pytest.approx(right.mean(), abs=1e-12)
            lower, upper = share_interval(right, test.keys)
            assert (matrix.lower[i, j], matrix.upper[i, j]) == pytest.approx((lower[0], upper[0]), abs=1e-12)
    assert (matrix.n == len(test)).all()
    assert (matrix.trained == len(labelled(samples, target, cells, "train"))).all()


def test_a_code_that_changes_is_a_block_matrix_and_one_that_lasts_is_full(found):
    same = np.kron(np.eye(2), np.ones((2, 2))) > 0
    answer = found["answer", "step"].accuracy
    assert answer[same].min() > 0.9
    assert answer[~same].max() < 0.45
    assert found["start", "step"].accuracy.min() > 0.85
    elsewhere = found["answer", "layer"].accuracy[1]
    assert elsewhere[1] > 0.9 > 0.45 > max(elsewhere[0], elsewhere[2])


def test_experts_are_blocks_of_the_step_matrix(found):
    steps, experts = found["answer", "step"].accuracy, found["answer", "expert"]
    blocks = steps.reshape(2, 2, 2, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(experts.accuracy, blocks)
    assert (experts.lower <= blocks + 1e-12).all()
    assert (blocks <= experts.upper + 1e-12).all()


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_groups_are_refitted_one_by_one(samples, bank, found, target):
    train, test = (labelled(samples, target, [BEST], split) for split in ("train", "test"))
    rooms = [samples.difficulty["rooms"][part.where] for part in (train, test)]
    matrix = found[target.name, "rooms"]
    for i, row in enumerate((None, 3, 4, 5)):
        group = train if row is None else train.take(rooms[0] == row)
        assert matrix.trained[i] == len(group)
        stats = spread(group.features)
        probe = refit(standardise(group.features, *stats), group.labels, target, torch.tensor([0.02]))
        own = replace(
            bank.select([BEST]), mean=stats[0], std=stats[1], targets=(target,),
            weights={target.name: probe.weight}, biases={target.name: probe.bias},
            penalties={target.name: torch.tensor([0.02])},
        )  # fmt: skip
        for j, column in enumerate((3, 4, 5)):
            part = test.take(rooms[1] == column)
            right = correctness(own.predict(part.features, target.name).numpy(), part.labels.numpy())
            assert matrix.accuracy[i, j] == pytest.approx(right.mean(), abs=1e-12)
            assert matrix.n[j] == len(part)


def test_a_code_of_one_noise_seed_does_not_serve_the_other(samples, bank):
    """With the second seed the answer moves to another channel: only probes that saw it can read it."""
    x, at = samples.features.clone(), CELLS.index(BEST)
    second = torch.from_numpy(samples.replica == 1)
    x[second, at] = x[second, at].flip(-1)
    matrix = next(
        m for m in matrices(replace(samples, features=x), bank, {"answer": BEST}, EXPERTS) if m.axis == "seed"
    )
    assert matrix.accuracy[0].min() > 0.85
    assert np.diag(matrix.accuracy[1:]).min() > 0.85
    assert max(matrix.accuracy[1, 1], matrix.accuracy[2, 0]) < 0.5


def test_standardisation_stays_that_of_the_training_cell(samples, bank):
    """A shift of a whole cell is a difference of code to a frozen probe with an intercept, as in use."""
    x = samples.features.clone()
    x[:, CELLS.index(replace(BEST, step=3)), :, 5] += 60
    shifted = next(m for m in matrices(replace(samples, features=x), bank, {"doors": BEST}, EXPERTS))
    assert shifted.axis == "step"
    assert shifted.accuracy[2, 2] > 0.85
    assert shifted.accuracy[2, 3] < 0.65


def test_chunks_change_nothing(samples, bank, found, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 1)
    step = next(m for m in matrices(samples, bank, {"doors": BEST}, EXPERTS))
    np.testing.assert_array_equal(step.accuracy, found["doors", "step"].accuracy)


def test_rare_difficulties_join_and_hopeless_ones_make_no_matrix(samples, bank):
    length = np.arange(270).repeat(2) % 12 + 1
    constant = np.ones(540, dtype=int)
    rare = np.where(np.arange(540) < 4, 9, 1)  # two training problems only
    hard = replace(samples, replica=None, difficulty={"length": length, "walls": constant, "rare": rare})
    by_axis = {m.axis: m for m in matrices(hard, bank, {"start": BEST}, EXPERTS)}
    assert set(by_axis) == {"step", "expert", "layer", "branch", "length"}
    assert by_axis["length"].test == ("1-4", "5-8", "9-12")

    one_class = replace(samples, difficulty={"start": samples.labels["start"].numpy()})
    assert "start" not in {m.axis for m in matrices(one_class, bank, {"start": BEST}, EXPERTS)}


def test_bad_requests_are_named(samples, bank):
    with pytest.raises(ValueError, match="target='exit'.*answer, start, doors"):
        matrices(samples, bank, {"exit": BEST}, EXPERTS)
    with pytest.raises(ValueError, match=r"step 9, layer 1, cond, all"):
        matrices(samples, bank, {"answer": replace(BEST, step=9)}, EXPERTS)
    with pytest.raises(ValueError, match=r"^experts.*step 3\b"):
        matrices(samples, bank, {"answer": BEST}, {0: "high", 1: "high", 2: "low"})
    assert readable(samples, "answer") == TARGETS[0]
