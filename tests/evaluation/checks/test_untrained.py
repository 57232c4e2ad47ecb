"""Permuted and fresh weights: few samples and steps, a store that can be continued, a table that can be trusted."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosprobe.activations import images
from cosprobe.activations.capture import capture
from cosprobe.activations.collection import UNTRAINED, StoredSamples, StoreSettings, few_samples, few_steps
from cosprobe.activations.dataset import load_samples
from cosprobe.activations.pooling import Pooling
from cosprobe.activations.random_weights import RANDOM_WEIGHTS, replay, with_random_weights
from cosprobe.activations.sampler import Sampler
from cosprobe.cells import Cell
from cosprobe.config import CaptureConfig, PipelineConfig, ProbeConfig, TrainerConfig
from cosprobe.evaluation.checks.untrained import weights_lines, weights_table
from cosprobe.evaluation.intervals import share_interval
from cosprobe.models.pipelines import sample
from cosprobe.probes.logistic import fit
from cosprobe.tasks import MazeConfig
from cosprobe.tasks.samples import draw_samples
from tests.examples.pipelines import save_wan, wan
from tests.examples.stores import collected

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

TASK = MazeConfig(problems=40, frames=5)
DRAWN = draw_samples(TASK.build(), TASK, 0)
PROBE = ProbeConfig(layers="0,2", penalties=[0.1], random_weights=30)
TRAINER = TrainerConfig(precision="32-true")


@pytest.fixture(scope="module")
def model():
    return wan()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "wan"
    save_wan(path)
    return PipelineConfig(path=str(path), steps=6, frames=5, batch=8)


@pytest.fixture(scope="module")
def store(model, pipeline, tmp_path_factory) -> StoredSamples:
    return asked(model, pipeline, PROBE, tmp_path_factory.mktemp("run"))


def asked(model, pipeline, probe, folder) -> StoredSamples:
    settings = StoreSettings.of(pipeline, TASK, probe, 0)
    return collected(Sampler(model, pipeline, TASK.build()), DRAWN, settings, folder)


@pytest.fixture(scope="module")
def samples(store):
    return load_samples(store)[0]


# what is asked


@given(st.integers(10, 120), st.integers(1, 3), st.integers(1, 200))
def test_few_samples_keep_the_proportions_and_the_first_of_every_split(problems, seeds, most):
    counts = {"train": problems // 2, "validation": problems // 5, "test": problems // 3}
    names = [split for split, count in counts.items() for _ in range(count * seeds)]
    few = few_samples(np.array(names), most)
    assert len(few) <= most
    assert few == sorted(set(few))
    least = min(int(count * seeds * min(1, most / len(names))) for count in counts.values())
    assert (few == []) == (least == 0)
    if not few:
        return
    for split in counts:
        of_split, kept = [[i for i in among if names[i] == split] for among in (range(len(names)), few)]
        assert kept == of_split[: len(kept)]
        exact = len(of_split) * min(1, most / len(names))
        assert exact - 1 - 1e-6 <= len(kept) <= exact + 1e-6
    if most >= len(names):
        assert few == list(range(len(names)))


@pytest.mark.parametrize(
    ("steps", "decode", "total", "expected"),
    [
        ("all", "auto", 20, (0, 2, 5)),
        ("all", "auto", 4, (0, 1)),
        ("0:20:5", "auto", 20, (0, 5)),
        ("3,11", "auto", 20, (3,)),  # nothing is both kept and decoded early: the first that is kept
        ("15,19", "auto", 20, (15,)),
        ("all", "4", 20, (4,)),
    ],
)
def test_few_steps_are_kept_decoded_and_in_the_first_half(steps, decode, total, expected):
    assert few_steps(CaptureConfig(steps=steps, decode=decode), total) == expected


@pytest.mark.slow
def test_no_other_weights_are_tried_when_turned_off_or_when_a_split_would_be_empty(model, pipeline, tmp_path, capsys):
    for count in (0, 3):
        store = asked(model, pipeline, replace(PROBE, random_weights=count), tmp_path / str(count))
        assert ("probe.random_weights=3 of 40 samples" in capsys.readouterr().out) == (count == 3)
        assert store.store.read(UNTRAINED)[0] == {}
        samples, _, _ = load_samples(store)
        assert weights_table(store, samples, PROBE, TRAINER, tmp_path, 0) is None


# what is stored


def test_other_weights_answer_the_very_calls_the_trained_ones_did(model, pipeline, store, samples):
    tensors, notes = store.store.read(UNTRAINED)
    assert notes["untrained_steps"] == [0, 1, 2]
    few = store.few
    assert few == few_samples(np.array([s.problem.split for s in DRAWN]), 30)
    assert store.store.names(UNTRAINED) == [DRAWN[i].name for i in few]
    assert [sum(samples.split[few] == split) for split in ("train", "validation", "test")] == [15, 6, 9]
    features = tensors["untrained.features"]
    assert features.shape == (30, 2, 3, 2, 1, 4, 24)  # sample, weights, step, layer, position, region, channel
    assert not torch.equal(features[:, 0], features[:, 1])
    some = few[16:24]  # validation and test samples, of two batches: here all in one, run again from the start
    chunk, problems = [DRAWN[i] for i in some], [DRAWN[i].problem for i in some]
    pooling = Pooling("region", boxes=[p.regions for p in problems])
    given = (images(TASK.build(), problems), [p.prompt for p in problems], [s.seed for s in chunk])
    with capture(model, "0,2", pooling, "0:3", record=(0, 1, 2)) as cache:
        sample(model, pipeline, *given, output_type="latent")
    trained = cache.features()[:, :, :, 0]
    for w, how in enumerate(RANDOM_WEIGHTS):
        with with_random_weights(model, how, 0):
            expected = replay(model, cache, (0, 2), pooling)
        torch.testing.assert_close(features[16:24, w], expected, atol=1e-5, rtol=1e-5)
        assert (features[16:24, w] - trained).abs().mean() > 0.1 * trained.abs().mean()
    for s, step in enumerate((0, 1, 2)):
        for k, layer in enumerate((0, 2)):
            cell = samples.cells.index(Cell(step, layer, "cond", "all"))
            torch.testing.assert_close(samples.features[some, cell], trained[:, s, k, 0], atol=1e-5, rtol=1e-5)


def test_the_cost_is_what_was_added(store):
    calls, seconds = store.store.read(UNTRAINED)[0]["untrained.spent"].sum(dim=0).tolist()
    assert calls == 30 * 2 * 3  # each kind of weights at three steps
    assert 0 < seconds < 600


def test_the_models_weights_are_as_before(model, store):
    fresh = wan()
    for ours, theirs in zip(model.transformer.parameters(), fresh.transformer.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_a_second_call_reuses_the_store_and_a_third_mends_it(model, pipeline, store, monkeypatch, capsys):
    before = store.store.read(UNTRAINED)[0]["untrained.features"]

    def refuse(*a, **k):
        raise AssertionError("sampled again")

    with monkeypatch.context() as patch:
        patch.setattr(import_module("cosprobe.activations.sampler"), "sample", refuse)
        again = asked(model, pipeline, PROBE, store.store.folder.parent)
    assert again.store == store.store
    said = capsys.readouterr().out
    assert "40 samples" in said and "30 of them" in said and str(store.store.folder) in said
    names, few = [s.name for s in DRAWN], {DRAWN[i].name for i in store.few}
    part = {"": names[16:24], UNTRAINED: [name for name in names[16:24] if name in few]}
    store.store.path(part).unlink()  # as if it had been killed before that shard
    (store.store.folder / "manifest.json").unlink()
    mended = asked(model, pipeline, PROBE, store.store.folder.parent)
    assert "32 of 40" in capsys.readouterr().out
    assert torch.equal(mended.store.read(UNTRAINED)[0]["untrained.features"], before)
    fewer = asked(model, pipeline, replace(PROBE, random_weights=20), store.store.folder.parent)
    assert len(fewer.few) == 20 and set(fewer.few) < set(store.few)


# what is read


def test_the_table_is_that_of_separate_fits_on_the_few(store, samples, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = weights_table(store, samples, PROBE, TRAINER, tmp_path, 0)
        tensors, _ = store.store.read(UNTRAINED)
        few = samples.rows(np.array(store.few))
        assert table.targets == ("answer",)  # a random model settles on no answer
        assert table.cells == tuple(Cell(s, n, "cond", "all") for s in (0, 1, 2) for n in (0, 2))
        assert (table.samples, table.evaluations) == (30, 180)
        target = next(t for t in samples.targets if t.name == "answer")
        for w in range(3):
            features = few.features[:, [few.cells.index(cell) for cell in table.cells]]
            if w:
                features = tensors["untrained.features"][:, w - 1].flatten(1, 3)
            these = replace(few, features=features, cells=table.cells, targets=(target,))
            bank = fit(these, replace(PROBE, kind="newton"), TRAINER, tmp_path, 0)
            for split, found in (("validation", table.validation), ("test", table.accuracy)):
                part = these.subset(split)
                labels = part.labels["answer"]
                right = (bank.predict(part.features, "answer") == labels)[:, labels >= 0].double().numpy()
                np.testing.assert_allclose(found[0, w], right.mean(1))
            lower, upper = share_interval(right, part.keys[labels.numpy() >= 0])
            np.testing.assert_allclose(table.lower[0, w], lower)
            np.testing.assert_allclose(table.upper[0, w], upper)
    for values in (table.accuracy, table.lower, table.upper, table.validation):
        assert values.shape == (1, 3, 6)


def test_targets_the_few_do_not_carry_are_left_out(store, samples, tmp_path):
    few = np.array(store.few)
    labels = samples.labels["answer"].clone()
    test = few[samples.split[few] == "test"]
    labels[torch.from_numpy(test)] = -1
    assert weights_table(
        store, replace(samples, labels=samples.labels | {"answer": labels}), PROBE, TRAINER, tmp_path, 0
    ) is None  # fmt: skip
    one = torch.where(samples.labels["answer"] >= 0, 2, -1)
    single = replace(samples, labels=samples.labels | {"answer": one})
    assert weights_table(store, single, PROBE, TRAINER, tmp_path, 0) is None


def test_lines_over_layers_are_refits_at_the_penalty_of_the_bank(store, samples, tmp_path):
    """Against separate fits: one for each kind of weights, target and layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bank = fit(samples, replace(PROBE, kind="newton"), TRAINER, tmp_path, 0)
        lines = weights_lines(store, samples, bank)
        few = samples.rows(np.array(store.few))
        other = store.store.read(UNTRAINED)[0]["untrained.features"]
        assert {line.target for line in lines} == {"answer", "start", "corridors"}  # and no control
        for line in lines:
            assert line.layers == (0, 2) and line.position == "all"
            target = few.target(line.target)
            labels = few.labels[line.target].reshape(len(few), -1)
            known = (labels >= 0).all(dim=1).numpy()
            rows = np.flatnonzero(known & (few.split == "test"))
            assert line.keys.tolist() == few.keys[rows].tolist()
            assert (np.flatnonzero(few.split == "test")[line.rows] == rows).all()
            for w, (weights, correct) in enumerate(line.correct.items()):
                for i, layer in enumerate(line.layers):
                    cell = Cell(0, layer, "cond", "all")
                    x = few.features[:, [few.cells.index(cell)]] if not w else other[:, w - 1, 0, i]
                    these = replace(
                        few, features=x.reshape(len(few), 1, *x.shape[-2:]), cells=(cell,), targets=(target,)
                    )
                    penalty = float(bank.select([cell]).penalties[line.target][0])
                    one = fit(these, replace(PROBE, kind="newton", penalties=[penalty]), TRAINER, tmp_path, 0)
                    right = one.predict(these.features[rows], line.target)[0].reshape(len(rows), -1) == labels[rows]
                    np.testing.assert_allclose(correct[i], right.double().mean(dim=1)), weights


def test_without_random_weights_at_the_first_step_there_are_no_lines(store, samples, tmp_path):
    later = samples.at(slice(2, None))  # without step 0
    bank = fit(later, replace(PROBE, kind="newton"), TRAINER, tmp_path, 0)
    assert {line.layers for line in weights_lines(store, later, bank)} == {(0, 2)}  # step 1 is stored, too
    last = samples.at(slice(len(samples.cells) - 2, None))  # of the last step only
    assert weights_lines(store, last, fit(last, replace(PROBE, kind="newton"), TRAINER, tmp_path, 0)) == []
