from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosprobe.activations.dataset import ProbeSamples
from cosprobe.cells import Cell
from cosprobe.probes.datamodule import ProbeBatch, ProbeBatches, ProbeData, check_targets, shared
from cosprobe.tasks import Target

TARGETS = (
    Target("answer", 3, "candidate", "answer", ("one",)),
    Target("doors", 2, "region", "perception", ("one",)),
)


@pytest.fixture
def samples() -> ProbeSamples:
    rng, count = torch.Generator().manual_seed(0), 20
    return ProbeSamples(
        features=torch.randn(count, 2, 3, 4, generator=rng),
        cells=(Cell(0, 0, "cond", "all"), Cell(0, 1, "cond", "all")),
        targets=TARGETS,
        labels={
            "answer": torch.arange(count) % 3,
            "doors": torch.randint(0, 2, (count, 3), generator=rng),
        },
        split=np.array(["train"] * 12 + ["validation"] * 4 + ["test"] * 4),
        keys=np.array([f"k{i // 2}" for i in range(count)]),
        kinds=np.array(["one"] * count),
        scores={"final": np.arange(count * 3, dtype=np.float32).reshape(count, 3)},
        model_answer=np.arange(count) % 3,
        replica=np.arange(count) % 2,
        difficulty={"rooms": np.arange(count) % 5},
    )


def test_subset_takes_the_same_samples_of_everything(samples):
    part = samples.subset("validation")
    assert len(part) == 4
    assert torch.equal(part.features, samples.features[12:16])
    assert torch.equal(part.labels["doors"], samples.labels["doors"][12:16])
    assert part.keys.tolist() == samples.keys[12:16].tolist()
    assert np.array_equal(part.scores["final"], samples.scores["final"][12:16])
    assert part.model_answer.tolist() == samples.model_answer[12:16].tolist()
    assert part.replica.tolist() == samples.replica[12:16].tolist()
    assert part.difficulty["rooms"].tolist() == samples.difficulty["rooms"][12:16].tolist()
    with pytest.raises(ValueError, match="split='dev'.*train, validation, test"):
        samples.subset("dev")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cells": (Cell(0, 0, "cond", "all"),)}, r"features\[20, 2, 3, 4\].*1 cells"),
        ({"keys": np.array(["k"])}, "keys.*1.*20 samples"),
        ({"split": np.array(["dev"] * 20)}, "split='dev'"),
        (
            {"split": np.array(["train"] * 11 + ["test"] * 9)},
            r"k5.*test and train",
        ),
        ({"difficulty": {"rooms": np.zeros(3)}}, "rooms.*3.*20 samples"),
        ({"labels": {"answer": torch.zeros(20, dtype=torch.long)}}, "target 'doors'.*label"),
    ],
)
def test_samples_that_disagree_are_refused(samples, change, message):
    with pytest.raises(ValueError, match=message):
        replace(samples, **change)


def test_labels_out_of_range_or_shape_are_refused(samples):
    with pytest.raises(ValueError, match="target 'answer'.*3.*-1 to 2"):
        replace(samples, labels=samples.labels | {"answer": torch.full((20,), 3)})
    with pytest.raises(ValueError, match=r"target 'doors'.*\[20\].*\[20, 3\]"):
        replace(samples, labels=samples.labels | {"doors": torch.zeros(20, dtype=torch.long)})


def test_targets_without_two_classes_or_validation_labels_are_named(samples):
    train, validation = samples.subset("train"), samples.subset("validation")
    check_targets(TARGETS, train, validation)
    same = replace(train, labels=train.labels | {"answer": torch.full((12,), 2)})
    with pytest.raises(ValueError, match="target 'answer'.*1 class.*12 training.*2"):
        check_targets(TARGETS, same, validation)
    empty = replace(validation, labels=validation.labels | {"answer": torch.full((4,), -1)})
    with pytest.raises(ValueError, match="target 'answer'.*4 validation.*1"):
        check_targets(TARGETS, train, empty)
    with pytest.raises(ValueError, match="targets.*region"):
        check_targets((), train, validation)


def taken(count: int, batch: int, seed: int, world: int, epoch: int) -> list[list[set[int]]]:
    """Sample numbers by batch and process."""
    whole = ProbeBatch({}, {"number": torch.arange(count)}, count)
    sources = [ProbeBatches(whole, batch, seed, rank, world, lambda: epoch) for rank in range(world)]
    return [[set(b.labels["number"].tolist()) for b in step] for step in zip(*sources, strict=True)]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5), st.integers(1, 4))
def test_any_number_of_processes_sees_the_same_batches_without_repeats(count, batch, seed, world):
    alone = [step[0] for step in taken(count, batch, seed, 1, epoch=2)]
    together = taken(count, batch, seed, world, epoch=2)
    assert [set().union(*step) for step in together] == alone
    assert sum(len(part) for step in together for part in step) == count
    assert len(alone) == -(-count // batch)


def test_order_follows_from_seed_and_epoch():
    assert taken(30, 4, 7, 1, 0) == taken(30, 4, 7, 1, 0)
    assert taken(30, 4, 7, 1, 0) != taken(30, 4, 7, 1, 1)
    assert taken(30, 4, 7, 1, 0) != taken(30, 4, 8, 1, 0)


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    taken(30, 4, 7, 2, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_coordinates_keep_lengths_and_candidates_lose_what_they_share(samples):
    data = ProbeData(samples.subset("train"), samples.subset("validation"), batch=5, seed=0)
    data.setup()
    (batch, *_), first = list(data.train_dataloader()), samples.subset("train").features
    assert batch.rows["region"].shape == (2, 5, 3, 4)
    assert batch.size == 5
    x = (first.transpose(0, 1) - data.mean[:, None, None]) / data.std[:, None, None]
    region, candidate = (data.whole["train"].rows[form] for form in ("region", "candidate"))
    assert torch.allclose(region.square().sum(-1), x.square().sum(-1), atol=1e-3)  # a rotation
    assert torch.allclose(candidate.sum(2), torch.zeros(2, 12, 4), atol=1e-4)
    assert len(list(data.val_dataloader())) == 1


def test_an_empty_batch_size_is_refused(samples):
    with pytest.raises(ValueError, match=r"probe\.batch=0.*1"):
        ProbeData(samples, samples, batch=0, seed=0)


def test_work_is_not_divided_without_processes():
    result = shared(lambda part: {"number": torch.arange(5)[part]}, 5)
    assert {name: values.tolist() for name, values in result.items()} == {"number": [0, 1, 2, 3, 4]}
