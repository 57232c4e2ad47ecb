from __future__ import annotations

import logging
import re
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.linear_model import LogisticRegression
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cosprobe.activations.dataset import ProbeSamples
from cosprobe.cells import Cell
from cosprobe.config import KINDS, ProbeConfig, TrainerConfig
from cosprobe.probes.bank import ProbeBank
from cosprobe.probes.curves import STATISTICS
from cosprobe.probes.linalg import design, spread, standardise
from cosprobe.probes.logistic import chunks, finished, fit
from cosprobe.probes.newton import AIM, PROMISED, fit_newton, relative_gaps
from tests.examples import processes
from tests.probes.ddp_fit import PLANTED, RECIPE, TARGETS, planted

SPEED = "speed and memory/fit: samples per second"

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def run(samples: ProbeSamples, folder: Path, seed: int = 0, **changes) -> ProbeBank:
    trainer = TrainerConfig(precision=changes.pop("precision", "32-true"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit(samples, ProbeConfig(**changes), trainer, folder, seed)


def accuracy(bank: ProbeBank, samples: ProbeSamples, target: str) -> torch.Tensor:
    labels = samples.labels[target]
    right = (bank.predict(samples.features, target) == labels)[:, labels >= 0]
    return right.float().flatten(1).mean(1)


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> ProbeBank:
    return run(planted(), tmp_path_factory.mktemp("fit"))


def standard_rows(samples: ProbeSamples, cell: int, form: str) -> dict[str, np.ndarray]:
    stats = spread(samples.subset("train").features)
    x = design(standardise(samples.features, *stats), form)[cell]
    return {s: x[torch.from_numpy(samples.split == s)].flatten(0, 1).numpy() for s in ("train", "test")}


@pytest.mark.slow
@pytest.mark.parametrize("value", [0.01, 0.1])
@pytest.mark.parametrize(("name", "form"), [("doors", "region"), ("start", "problem")])
def test_logistic_probes_equal_sklearn(tmp_path, name, form, value):
    samples, cell = planted(), 2
    ours = run(samples, tmp_path, penalties=[value])
    labels = {s: samples.subset(s).labels[name].flatten().numpy() for s in ("train", "test")}
    rows = standard_rows(samples, cell, form)
    vectors = 2 if name == "doors" else 1  # scikit-learn keeps one vector for two classes
    oracle = LogisticRegression(C=vectors / (value * len(labels["train"])), max_iter=2000, tol=1e-8)
    oracle.fit(rows["train"], labels["train"])
    test = samples.subset("test")
    expected = np.mean(oracle.predict(rows["test"]) == labels["test"])
    assert abs(float(accuracy(ours, test, name)[cell]) - expected) <= 0.01
    probabilities = ours.decision(test.features, name)[cell].softmax(-1).flatten(0, -2).numpy()  # as fitted
    assert np.abs(probabilities - oracle.predict_proba(rows["test"])).mean() < 0.005


@pytest.mark.slow
def test_two_candidates_are_a_logistic_regression_of_their_difference(tmp_path):
    source, value = planted(), 0.02
    labels = {"answer": source.labels["answer"].clamp(max=1)}
    samples = replace(source, features=source.features[:, :, :2], labels=labels, targets=TARGETS[:1])
    ours = run(samples, tmp_path, penalties=[value], epochs=150)
    train, test = samples.subset("train"), samples.subset("test")
    x = {s.split[0]: standardise(s.features, ours.mean, ours.std)[PLANTED] for s in (train, test)}
    keep = train.labels["answer"] >= 0
    gap = {split: (rows[:, 1] - rows[:, 0]).numpy() for split, rows in x.items()}
    oracle = LogisticRegression(C=1 / (value * int(keep.sum())), fit_intercept=False, max_iter=2000, tol=1e-8)
    oracle.fit(gap["train"][keep], train.labels["answer"][keep])
    decision = ours.decision(test.features, "answer")[PLANTED]
    assert np.allclose((decision[:, 1] - decision[:, 0]).numpy(), oracle.decision_function(gap["test"]), atol=0.02)


def test_the_planted_cell_is_found_and_the_control_stays_at_chance(bank):
    test = planted().subset("test")
    answer = accuracy(bank, test, "answer")
    assert int(answer.argmax()) == PLANTED
    assert answer[PLANTED] > 0.9
    others = answer[torch.arange(6) != PLANTED]
    assert others.max() < 0.55
    assert accuracy(bank, test, "control").max() < 0.45


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_bank_of_many_cells_is_the_separate_runs(tmp_path, kind):
    samples, recipe = planted(), {"kind": kind, "penalties": [0.01, 1.0], "epochs": 10}
    whole = run(samples, tmp_path / "whole", **recipe)
    for cell in (0, PLANTED):
        alone = run(samples.at(slice(cell, cell + 1)), tmp_path / "one", **recipe)
        for target in TARGETS:
            theirs = whole.select(alone.cells)
            assert torch.allclose(theirs.weights[target.name], alone.weights[target.name], atol=1e-4)
            assert torch.equal(theirs.penalties[target.name], alone.penalties[target.name])


@pytest.mark.parametrize("kind", KINDS)
def test_one_cell_and_one_penalty_are_a_bank(tmp_path, kind):
    found = run(planted().at(slice(PLANTED, PLANTED + 1)), tmp_path, kind=kind, penalties=[0.1])
    assert accuracy(found, planted().at(slice(PLANTED, PLANTED + 1)).subset("test"), "answer") > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_cells_do_not_change_the_bank(tmp_path, kind):
    samples, recipe = planted(), {"kind": kind, "epochs": 5}
    small = ProbeConfig(memory=1e-3)
    assert len(chunks(samples, TARGETS, small)) > 2
    whole, parts = run(samples, tmp_path, **recipe), run(samples, tmp_path, memory=1e-3, **recipe)
    assert whole.cells == parts.cells
    for target in TARGETS:
        a, b = (x.decision(samples.features, target.name) for x in (whole, parts))
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bank(tmp_path):
    torch.manual_seed(1)
    first = run(planted(), tmp_path, epochs=4, batch=64)
    torch.manual_seed(2)
    again, other = run(planted(), tmp_path, epochs=4, batch=64), run(planted(), tmp_path, 1, epochs=4, batch=64)
    assert all(torch.equal(first.weights[name], again.weights[name]) for name in first.weights)
    assert not torch.equal(first.weights["start"], other.weights["start"])


@pytest.mark.slow
def test_small_batches_stay_stable_and_reach_the_same_accuracy(tmp_path, bank):
    test = planted().subset("test")
    small = run(planted(), tmp_path, epochs=40, batch=50)
    for name in ("answer", "start", "doors"):
        assert abs(float(accuracy(small, test, name).mean() - accuracy(bank, test, name).mean())) < 0.02


@pytest.mark.slow
def test_more_columns_than_rows_with_wild_scales_converges(tmp_path):
    """Padding, one huge channel and fewer samples than channels, as with wide models."""
    source = planted()
    keep = np.flatnonzero(np.arange(len(source)) % 8 == 0)
    wide = torch.cat([source.features[keep], torch.zeros(len(keep), 6, 3, 30)], dim=-1)
    wide[..., 3] *= 1e4
    labels = {name: y[keep] for name, y in source.labels.items()}
    samples = replace(
        source,
        features=wide,
        labels=labels,
        split=source.split[keep],
        keys=source.keys[keep],
        kinds=source.kinds[keep],
    )
    found = run(samples, tmp_path)
    assert all(weight.isfinite().all() for weight in found.weights.values())
    assert (found.std[:, 10:] == 0).all()
    assert int(accuracy(found, samples.subset("test"), "answer").argmax()) == PLANTED


@pytest.mark.slow
def test_each_cell_gets_the_penalty_that_validates_best(tmp_path):
    samples, penalties = planted(), [0.001, 30.0]
    chosen = run(samples, tmp_path, penalties=penalties, epochs=20)
    held_out = samples.subset("validation")
    singles = [accuracy(run(samples, tmp_path, penalties=[v], epochs=20), held_out, "start") for v in penalties]
    best = torch.stack(singles).amax(0)
    assert torch.allclose(accuracy(chosen, held_out, "start"), best)
    assert set(chosen.penalties["start"].tolist()) <= {torch.tensor(v).item() for v in penalties}


@pytest.mark.slow
def test_bf16_mixed_precision_reads_the_same(tmp_path, bank):
    test = planted().subset("test")
    mixed = run(planted(), tmp_path, precision="bf16-mixed")
    for name in ("answer", "start"):
        assert torch.allclose(accuracy(mixed, test, name), accuracy(bank, test, name), atol=0.04)


@pytest.mark.slow
def test_without_a_region_axis_the_answer_is_a_class_of_the_clip(tmp_path):
    source = planted()
    pooled = replace(source, features=source.features.flatten(2)[:, :, None])
    for kind in KINDS:
        found = run(pooled, tmp_path, kind=kind)
        assert [t.name for t in found.targets] == ["answer", "start", "control"]
        assert found.decision(pooled.features, "answer").shape[-1] == 3
        assert int(accuracy(found, pooled.subset("test"), "answer").argmax()) == PLANTED


def test_newton_finds_the_probes_that_training_is_finished_to(tmp_path, bank, capsys):
    found = run(planted(), tmp_path, kind="newton")
    fits = 6 * len(ProbeConfig().penalties)
    for one, most in ((found, 1e-8), (bank, AIM)):
        assert one.provenance.converged == {target.name: (fits, fits) for target in TARGETS}
        assert all(0 <= gap <= most for gap in one.provenance.gap.values())
    assert "probe.penalties" not in capsys.readouterr().out  # which the line of fits that missed names
    test = planted().subset("test")
    for target in TARGETS:
        assert torch.equal(found.penalties[target.name], bank.penalties[target.name])
        ours, theirs = (b.decision(test.features, target.name).softmax(-1) for b in (found, bank))
        assert (ours - theirs).abs().max() < 0.01


SEPARABLE = 1


def nearly_separable() -> ProbeSamples:
    """The same, but one cell knows `start` and `doors`."""
    source = planted()
    features = source.features.clone()
    features[:, SEPARABLE] += 15.0 * torch.nn.functional.one_hot(source.labels["start"], 10)[:, None]
    features[:, SEPARABLE, :, 5] += 15.0 * source.labels["doors"]
    return replace(source, features=features)


def bank_gaps(bank: ProbeBank, samples: ProbeSamples, name: str, value: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every cell of a bank of one penalty: the bound of its relative gap, and the gap to a far more precise fit."""
    train, target = samples.subset("train"), bank.target(name)
    x, labels = standardise(train.features, bank.mean, bank.std).double(), train.labels[name]
    weight, bias = bank.weights[name].double()[:, :, None], bank.biases[name].double()[:, None]
    best = fit_newton(x, labels, target, [value], tolerance=1e-10)
    rows, keep = design(x, target.form), labels >= 0

    def objective(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        values = torch.einsum("cnrw,cwo->cnro", rows, weight[:, :, 0]) + bias[:, 0, None, None]
        logits = values if target.form == "region" else values.flatten(2)
        losses = [torch.nn.functional.cross_entropy(one[keep], labels[keep]) for one in logits]
        return torch.stack(losses) + value / 2 * weight.square().sum(dim=(1, 2, 3))

    here, lowest = objective(weight, bias), objective(best.weight, best.bias)
    return relative_gaps(x, labels, target, [value], weight, bias)[:, 0], (here - lowest) / here


@pytest.mark.slow
@pytest.mark.parametrize("value", [0.01, 1.0])
def test_every_cell_is_within_its_certificate_of_the_optimum(tmp_path, monkeypatch, value):
    """That of a nearly separable cell too, which training alone leaves far from it."""
    samples, trained = nearly_separable(), {}

    def watched(fitted, x, labels, targets, penalties, divide):
        for t in targets:
            trained[t.name] = relative_gaps(x, labels[t.name], t, penalties, *fitted[t.name])
        return finished(fitted, x, labels, targets, penalties, divide)

    monkeypatch.setattr("cosprobe.probes.logistic.finished", watched)
    found = run(samples, tmp_path, penalties=[value], epochs=60)
    for target in TARGETS:
        bound, gap = bank_gaps(found, samples, target.name, value)
        assert (bound >= gap - 1e-10).all()
        assert (bound <= AIM + 1e-6).all()
        assert float(bound.max()) == pytest.approx(found.provenance.gap[target.name], abs=1e-6)
    assert all(done == of == 6 for done, of in found.provenance.converged.values())
    if value == 0.01:
        assert trained["start"][SEPARABLE] > PROMISED


@pytest.mark.slow
@pytest.mark.parametrize("value", [0.01, 0.1])
def test_accuracies_are_those_of_sklearn_run_to_its_end(tmp_path, value):
    samples = nearly_separable()
    ours, test = run(samples, tmp_path, penalties=[value]), samples.subset("test")
    same = []
    for name, form in (("doors", "region"), ("start", "problem")):
        labels = {s: samples.subset(s).labels[name].flatten().numpy() for s in ("train", "test")}
        for cell in range(6):
            rows = standard_rows(samples, cell, form)
            strength = (2 if name == "doors" else 1) / (value * len(labels["train"]))
            oracle = LogisticRegression(C=strength, max_iter=10000, tol=1e-10).fit(rows["train"], labels["train"])
            expected = np.mean(oracle.predict(rows["test"]) == labels["test"])
            same.append(float(accuracy(ours, test, name)[cell]) - expected)
    assert np.abs(same).max() <= 0.01
    assert np.mean(np.abs(same) < 1e-6) >= 0.9


@pytest.mark.slow
def test_equally_accurate_penalties_go_to_the_lower_validation_loss(tmp_path):
    """The loss is that of finished weights: a single epoch would rank the penalties otherwise."""
    samples, penalties = nearly_separable(), [0.003, 0.1, 3.0]
    held_out = samples.subset("validation")
    labels = held_out.labels["start"]
    for kind in ("logistic", "newton"):
        recipe = {"kind": kind, "epochs": 1}
        found = run(samples, tmp_path, penalties=penalties, **recipe)
        singles = [run(samples, tmp_path, penalties=[value], **recipe) for value in penalties]
        right = torch.stack([accuracy(one, held_out, "start") for one in singles])
        values = [one.decision(held_out.features, "start") for one in singles]
        losses = torch.stack([torch.stack([torch.nn.functional.cross_entropy(v, labels) for v in x]) for x in values])
        tied = (right == right.amax(0)).sum(0) > 1
        assert tied[SEPARABLE]
        best = losses.masked_fill(right < right.amax(0), torch.inf).argmin(0)
        assert torch.allclose(found.penalties["start"], torch.tensor(penalties)[best])


@pytest.mark.parametrize("kind", ["logistic", "newton"])
def test_what_did_not_converge_is_named_and_counted(tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setattr("cosprobe.probes.newton.fit_newton", partial(fit_newton, iterations=1))
    found = run(planted(), tmp_path, kind=kind, penalties=[1e-3, 10.0], epochs=1)
    done, of = found.provenance.converged["doors"]
    assert done < of == 12
    assert found.provenance.gap["doors"] > PROMISED
    printed = capsys.readouterr().out.strip()
    assert "\n" not in printed
    first = re.escape(f"{Cell(0, 0, 'cond', 'all')}, penalty 0.001")
    assert re.search(rf"{kind}.*doors.*{of - done} of {of}\b.*{first}", printed)
    assert "probe.penalties" in printed


def test_ridge_chooses_its_penalty_without_a_look_at_validation(tmp_path):
    source = planted()
    held_out = source.split == "validation"
    labels = {name: y.clone() for name, y in source.labels.items()}
    for y in labels.values():  # validation now says the opposite
        y[held_out] = torch.where(y[held_out] >= 0, (y[held_out] + 1) % (int(y.max()) + 1), -1)
    recipe = {"kind": "ridge", "penalties": [1e-3, 0.1, 10.0]}
    one, other = run(source, tmp_path, **recipe), run(replace(source, labels=labels), tmp_path, **recipe)
    for target in TARGETS:
        assert torch.equal(one.penalties[target.name], other.penalties[target.name])
        assert torch.equal(one.weights[target.name], other.weights[target.name])


@pytest.mark.slow
def test_losses_fall_and_every_epoch_has_one_point_over_all_chunks(tmp_path):
    samples = planted()
    for name, memory in (("whole", 4.0), ("chunks", RECIPE["memory"])):
        run(samples, tmp_path / name, epochs=20, penalties=RECIPE["penalties"], memory=memory)
    found = {}
    for name in ("whole", "chunks"):
        for statistic in STATISTICS:
            events = EventAccumulator(str(tmp_path / name / "training" / statistic)).Reload()
            found[name, statistic] = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
            assert len(found[name, statistic]) == 4 * len(TARGETS)
    for statistic in STATISTICS:
        losses = found["whole", statistic]["training loss by epoch/start, train"]
        assert [e.step for e in losses] == list(range(1, 21))
        assert losses[-1].value < losses[0].value
        for tag, points in found["whole", statistic].items():
            parts = found["chunks", statistic][tag]
            assert [(e.step, pytest.approx(e.value, abs=1e-4)) for e in points] == [(e.step, e.value) for e in parts]
    speed = EventAccumulator(str(tmp_path / "chunks" / "training")).Reload().Scalars(SPEED)
    train = int((samples.split == "train").sum())
    assert [e.step for e in speed] == [train * (n + 1) for n in range(2 * 20)]  # of two chunks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "deep"}, r"probe\.kind='deep'.*logistic, newton, ridge"),
        ({"penalties": [0.0]}, r"probe\.penalties=\[0\.0\].*1e-09"),
        ({"epochs": 0}, r"probe\.epochs=0.*1"),
        ({"lr": 3.0}, r"probe\.lr=3\.0"),
        ({"batch": 0}, r"probe\.batch=0"),
        ({"memory": 0.0}, r"probe\.memory=0\.0"),
    ],
)
def test_impossible_recipes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ProbeConfig(**change)


def test_a_target_that_cannot_be_fitted_is_named(tmp_path):
    source = planted()
    samples = replace(source, labels=source.labels | {"start": torch.zeros(len(source), dtype=torch.long)})
    with pytest.raises(ValueError, match="target 'start'.*1 class.*2"):
        run(samples, tmp_path)


def divided_fit(rank: int, folder: str) -> None:
    """One of two processes, which divide the cells of the kinds not trained and hand each other the weights. Each has
    files of its own: their trainers have one device, so that each takes itself for the first."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for kind in ("newton", "ridge"):
        torch.save(run(planted(), Path(folder, str(rank)), kind=kind).weights, f"{folder}/{kind}_{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_divide_the_cells_and_end_with_the_same_bank(tmp_path):
    assert processes.run(divided_fit, str(tmp_path), processes=2) == [0, 0]
    for kind in ("newton", "ridge"):
        alone = run(planted(), tmp_path, kind=kind)
        ranks = [torch.load(tmp_path / f"{kind}_{rank}.pt") for rank in range(2)]
        for target in TARGETS:
            assert torch.equal(ranks[0][target.name], ranks[1][target.name])
            assert torch.allclose(ranks[0][target.name], alone.weights[target.name], atol=1e-6)
