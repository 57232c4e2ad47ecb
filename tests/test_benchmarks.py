"""The benchmarks run, at a tiny size, and both sides of a pair do the same work; nothing is said about speed."""

from __future__ import annotations

import re
from dataclasses import replace
from multiprocessing import Pipe
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from benchmarks import allocating, capturing, fitting, intervening, learning, pairs, running, scaling, sharing, slopes
from benchmarks.__main__ import main, table
from cosprobe.activations import ActivationStore
from cosprobe.command import load
from cosprobe.config import ProbeConfig, TrainRun
from cosprobe.models.loading import load_pipeline
from cosprobe.probes.newton import PROMISED
from tests.examples.shapes import unchecked

SMALL = {"train": 60, "validation": 30, "test": 10}


def test_sides_take_turns_and_the_middle_ratio_counts(monkeypatch):
    ends = iter([4.0, 1.0, 1.0, 9.0, 6.0, 2.0])  # seconds of each call, in the order they are made
    clock, calls = [0.0, 0], []

    def now() -> float:
        clock[1] += 1
        clock[0] += next(ends) if clock[1] % 2 == 0 else 0.0
        return clock[0]

    monkeypatch.setattr(pairs, "perf_counter", now)
    found = pairs.side_by_side("a", lambda: calls.append("a"), "b", lambda: calls.append("b"), 3, scale=10)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert found.seconds == (40.0, 90.0, 60.0)
    assert found.other_seconds == (1.0, 1.0, 2.0)
    assert found.ratio == 40.0


def test_no_repeats_are_refused():
    with pytest.raises(ValueError, match="repeats=0.*1"):
        pairs.side_by_side("a", lambda: None, "b", lambda: None, 0)


def test_an_unknown_name_is_refused(capsys):
    assert main(["captur"]) == 2
    assert re.search(r"\bcaptur\b.*allocate, capture, fit, intervene, learn, run, share", capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.docs
def test_keeping_memory_is_measured():
    small = ["experiment.flow.batch=2", "experiment.flow.compile=false"]
    (pair,) = allocating.measure(repeats=1, batches=1, frames=5, settings=small)
    assert re.search("1 batches.*5 frames.*kept", pair.measured) and pair.ratio > 0


@pytest.mark.slow
def test_capture_is_measured():
    (pair,) = capturing.measure(repeats=1, batch=2, steps=2)
    assert "8 layers and all inputs" in pair.measured
    assert pair.ratio > 0


@pytest.mark.slow
@pytest.mark.docs
def test_shared_first_steps_are_measured_and_change_no_video():
    """Clean run and two donor states on both sides; one cell at step 0, one at step 2 of 3."""
    (pair,) = intervening.measure(repeats=1, batch=2, steps=3, every=2, layers=(4,))
    assert re.search(r"\b2 cells of 2 samples, 9 evaluations", pair.measured)  # 3 + 2 + 3 + 1
    assert re.search(r"\b11 evaluations \(1\.22 times\)", pair.against)  # 3 + 2 + 3 + 3
    assert pair.ratio > 0


@pytest.mark.slow
def test_learning_is_measured_at_both_lengths():
    small = ["experiment.flow.batch=2", "experiment.flow.compile=false"]
    found = learning.measure(repeats=1, batches=1, settings=small)
    assert [pair.measured for pair in found] == [f"2 clips of {n} frames learned from, compiled" for n in (5, 13)]
    assert all(pair.ratio > 0 for pair in found)


RIVALS = [("newton", fitting.logistic), ("ridge", fitting.ridge_by_folds), ("ridge", fitting.ridge_by_rows)]


@pytest.mark.parametrize(("kind", "rival"), RIVALS)
def test_the_loop_finds_the_probes_of_the_fit(kind, rival):
    samples = fitting.synthetic(SMALL, steps=1, layers=2, channels=12)
    config = ProbeConfig(kind=kind, penalties=[0.1])
    bank = fitting.whole_fit(samples, config)
    cells = np.array([0, 1])
    x, held = fitting.standardised(samples, cells)
    loop = fitting.sklearn_loop(x, held, samples, config.penalties, rival)
    assert set(loop) == {(cell, target.name) for cell in range(2) for target in samples.targets}
    validation = samples.subset("validation")
    for target in (t for t in samples.targets if t.form != "candidate"):  # scikit-learn has no shared scorer
        ours = bank.predict(validation.features, target.name)[cells]
        for cell in range(2):
            label = validation.labels[target.name]
            rows, _, _ = fitting.flat(held[cell : cell + 1], label, target)
            agree = loop[cell, target.name].predict(rows) == ours[cell][label >= 0].numpy().flatten()
            assert agree.mean() > 0.97, target.name


def test_candidates_become_one_binary_label_per_region():
    samples = fitting.synthetic(SMALL, steps=1, layers=2, channels=12)
    x, _ = fitting.standardised(samples, np.array([1]))
    train = samples.subset("train")
    answer = next(t for t in samples.targets if t.name == "answer")
    rows, label, fold = fitting.flat(x, train.labels["answer"], answer, np.arange(60))
    known = train.labels["answer"] >= 0
    assert len(rows) == len(label) == len(fold) == 4 * int(known.sum())
    assert (label.reshape(-1, 4).argmax(axis=1) == train.labels["answer"][known].numpy()).all()
    assert (label.reshape(-1, 4).sum(axis=1) == 1).all()
    assert (fold.reshape(-1, 4) == np.flatnonzero(known)[:, None]).all()


@pytest.mark.slow
def test_what_a_run_needs_is_sampled_and_decoded_once():
    run = load(TrainRun, ["task.problems=10", "pipeline.steps=2", "pipeline.batch=6", "probe.decode=all"])
    clips = running.needed(load_pipeline(run.pipeline), run)
    assert clips == 10 + 5  # every video, and x0-hat of step 0 for the problems that are not trained on


@pytest.mark.slow
def test_a_run_that_fails_is_not_timed():
    with pytest.raises(RuntimeError, match=r"task\.problems=1.*\b2\b"):
        running.whole_run(["task.problems=1"])


@pytest.mark.slow
def test_every_kind_of_fit_is_measured():
    sizes = {"kinds": ("logistic", "ridge"), "sizes": SMALL, "steps": 1, "layers": 2, "channels": 8, "some": 1}
    found = fitting.measure(repeats=1, **sizes)
    assert [pair.against for pair in found] == ["fit, kind=logistic"] * 2 + ["fit, kind=ridge"] * 2
    assert ["one thread" in pair.measured for pair in found] == [False, True, False, False]
    assert all("2 cells (measured on 1), 8 targets" in pair.measured for pair in found)
    assert [len(own) for own in found[0].gaps] == [8 * 3, 8 * 3]  # every target and penalty, theirs and ours
    assert all(0 <= gap <= PROMISED for own in found[0].gaps for gap in own)
    assert found[1].gaps == found[0].gaps and found[2].gaps == ()


@pytest.mark.slow
def test_the_gap_of_sklearn_falls_with_its_tolerance_and_the_loosest_that_keeps_the_promise_is_taken():
    samples = fitting.synthetic(SMALL, steps=1, layers=2, channels=12)
    x, held = fitting.standardised(samples, np.array([1]))
    taken, gaps = fitting.loosest(x, held, samples)
    assert max(gaps) <= PROMISED
    rows, label, fold = fitting.flat(x, samples.subset("train").labels["corridors"], samples.targets[3])
    part = fitting.Rows(rows, label, fold, rows, label)
    found = [fitting.sklearn_gap(part, *fitting.each_penalty(part, [0.01], tol), 0.01) for tol in (1e-1, taken, 1e-8)]
    assert found[0] > found[1] > found[2]
    assert found[2] < 1e-5
    weight = fitting.whole_fit(samples, ProbeConfig(kind="newton", penalties=[0.01])).weights["corridors"][1]
    one = fitting.each_penalty(part, [0.01], 1e-8)[0]
    assert np.allclose((weight[:, 1] - weight[:, 0]).numpy(), one.coef_[0], atol=1e-3)


def test_gaps_stand_beside_the_ratio():
    pair = pairs.Pair("a", "b", (9.0,), (3.0,), ((1e-3, 2e-5, 1e-5), (4e-6,)))
    with (console := Console(width=200)).capture() as printed:
        console.print(table([pair, pairs.Pair("c", "d", (1.0,), (1.0,))]))
    assert "1e-03 (2e-05) / 4e-06 (4e-06)" in printed.get()


@pytest.mark.slow
@pytest.mark.docs
def test_the_whole_run_is_measured():
    small = ["pipeline.steps=3", "pipeline.batch=8", "pipeline.frames=5", "task.frames=5"]
    less = ["probe.layers=6:8", "probe.epochs=3", "probe.random_weights=0"]
    with unchecked():
        found = running.measure(1, 24, small + less)
    with (console := Console(width=200)).capture() as printed:
        console.print(table(found))
    assert printed.get().count("train.py probe=layers, 24 problems, no random weights") == len(found) == 1


FEWER = ["task.problems=16", "pipeline.steps=2", "pipeline.batch=4", "pipeline.frames=5", "task.frames=5"]


@pytest.mark.slow
def test_a_process_samples_the_share_that_it_is_given(tmp_path):
    ours, theirs = Pipe()
    for folder, share in (("a", (0, 2)), ("b", (1, 2)), ("c", (0, 1))):
        ours.send((tmp_path / folder / "run", share))
    ours.close()  # what was sent is read before the end of it
    said = []
    end = SimpleNamespace(recv=theirs.recv, send=said.append)
    with unchecked():
        sharing.work(["probe=layers", *sharing.QUIET, *FEWER, "probe.decode=1"], {}, end)
    assert said == [0, 8, 8, 16]
    halves, whole = [ActivationStore.open(tmp_path / name / "run" / "store").names() for name in "ab"], []
    for start in (0, 4):
        whole += [*halves[0][start : start + 4], *halves[1][start : start + 4]]
    assert ActivationStore.open(tmp_path / "c" / "run" / "store").names() == whole and len(set(whole)) == 16


@pytest.mark.slow
@pytest.mark.docs
@pytest.mark.ddp
def test_two_processes_are_measured_beside_their_floor():
    found = sharing.measure(1, 16, FEWER[1:])
    assert ["floor" in pair.measured for pair in found] == [False, True]
    assert all("16 problems" in pair.measured and pair.ratio > 0 for pair in found)


@pytest.mark.slow
def test_peaks_are_measured_on_a_store_of_the_size_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "keep_freed_memory", lambda: None)  # in this process
    receiver, sender = Pipe(duplex=False)
    size = scaling.Size(60, 2, 2, 8, kind="ridge")
    store = scaling.write(size, tmp_path / "store")
    tensors = store.tensors()[0]
    assert tensors["features"].shape == (60, 4, 4, 8) and tensors["embed.whole"].shape == (60, 2, 4, 4, 8)
    with unchecked():
        scaling.run(size, store.folder, sender)
    peak, seconds = receiver.recv()
    assert peak >= 0 and seconds > 0
    monkeypatch.setattr(scaling, "matmul_rate", lambda: 1.0)
    # two forms with 120 rows of 8 columns, one with 30 rows of 32: at one operation per second, for four cells
    assert scaling.floor(size) == 4 * (2 * 2 * 120 * 8 * 8 + 2 * 30 * 32 * 30)


def test_slopes_are_logarithms_of_ratios_of_medians(monkeypatch):
    """Bytes grow linearly with all four, seconds with the square of the width, the peak with nothing."""
    seen = []

    def costs(size):
        seen.append(size)
        noise = 1e6 if len(seen) == 2 else 0.0  # of one measurement; the median leaves it out
        cells = size.samples * size.steps * size.layers
        return slopes.Cost(cells * size.channels, cells * size.channels**2 + noise, 5e6)

    base = scaling.Size(6, 2, 4, 8)
    found = slopes.measure(costs, base, rounds=3)
    assert len(seen) == 15 and seen[:5] == seen[5:10] == list(slopes.points(base).values())
    grown = {name: found[name].slopes(found["base"]) for name in slopes.DOUBLED}
    assert grown == {"samples": (1, 1, 0), "steps": (1, 1, 0), "layers": (1, 1, 0), "width": (1, 2, 0)}
    with (console := Console(width=140)).capture() as printed:
        console.print(slopes.table("sampling", found))
    assert re.search(r"slope of width +1\.00 +2\.00 +0\.00", printed.get())


@pytest.mark.slow
@pytest.mark.parametrize("doubled", ["base", "layers", "width"])
def test_a_model_of_the_size_that_is_named_is_sampled(monkeypatch, doubled):
    monkeypatch.setattr(slopes, "keep_freed_memory", lambda: None)  # in this process
    small = ["pipeline.frames=5", "task.frames=5", "probe.decode=0"]
    size, sent = slopes.points(scaling.Size(10, 1, 2, 32))[doubled], []
    with unchecked():
        slopes.collect_once(size, small, SimpleNamespace(send=sent.append))
    ((stored, seconds, peak),) = sent
    cells = size.samples * size.layers * 4 * size.channels * 4  # regions, bytes of a number
    assert stored > cells and seconds > 0 and peak >= 0
    model = slopes.of_size(load_pipeline(load(TrainRun, list(slopes.QUIET)).pipeline), size)
    blocks = model.transformer.blocks
    assert len(blocks) == size.layers and blocks[0].ffn.net[2].out_features == size.channels
    assert not any(p.requires_grad for p in model.transformer.parameters())


@pytest.mark.slow
@pytest.mark.docs
def test_slopes_are_measured_in_processes_of_their_own():
    size = scaling.Size(10, 1, 2, 32)
    assert min(vars(slopes.sampling(size)).values()) > 0
    assert min(vars(slopes.fitting(replace(size, samples=60, kind="ridge"))).values()) > 0
