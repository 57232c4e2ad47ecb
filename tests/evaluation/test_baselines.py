"""Input baselines: each is read in the form that serves it best, without a look at test, by the solvers of probes."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from threadpoolctl import threadpool_limits

from cosprobe.activations import COLUMNS
from cosprobe.activations.collection import StoreSettings
from cosprobe.activations.dataset import InputFeatures, ProbeSamples
from cosprobe.cells import INPUTS, X0, Cell
from cosprobe.config import CaptureConfig, PipelineConfig
from cosprobe.evaluation import baselines as module
from cosprobe.evaluation.baselines import MUST_BEAT, forms, input_samples, read_inputs, read_inputs_once
from cosprobe.evaluation.predictions import InputReading
from cosprobe.probes.linalg import spread, standardise
from cosprobe.probes.newton import fit_newton
from cosprobe.probes.ridge import fit_ridge, problem_folds
from cosprobe.tasks import FAMILIES, Problem, Target
from tests.examples import processes

STEPS, FRAMES, REGIONS, CELLS, CHANNELS = 2, 4, 4, 4, 6
ANSWER = Target("answer", REGIONS, "candidate", "answer", ("one",))
START = Target("start", 5, "problem", "answer", ("one",))
ORIGIN = Target("origin", 5, "problem", "memory", ("one",))
INSIDE = Target("inside", 3, "region", "memory", ("one",))
KEPT = ("form", "accuracy", "penalty", "columns", "projected")
FORMS = ("region, mean", "region, frames", "whole, mean", "whole, frames")


def samples_of(
    targets: tuple[Target, ...],
    labels: dict[str, torch.Tensor],
    positions: tuple[str, ...] = ("all",),
    keys: np.ndarray | None = None,
    regions: int = REGIONS,
    steps: int = STEPS,
) -> ProbeSamples:
    """Samples without anything to read in their layers; train, validation and test are thirds."""
    count = len(next(iter(labels.values())))
    third = count // 3
    cells = tuple(Cell(3 * step, 0, "cond", position) for step in range(steps) for position in positions)
    return ProbeSamples(
        features=torch.zeros(count, len(cells), regions, 2),
        cells=cells,
        targets=targets,
        labels=labels,
        split=np.array(["train"] * third + ["validation"] * third + ["test"] * (count - 2 * third)),
        keys=np.array([f"k{i}" for i in range(count)]) if keys is None else keys,
        kinds=np.full(count, "one"),
    )


def noise(count: int, steps: int = STEPS, seed: int = 0, cells: int = CELLS) -> InputFeatures:
    rng = torch.Generator().manual_seed(seed)
    whole, region = (torch.randn(count, steps, FRAMES, n, CHANNELS, generator=rng) for n in (cells, REGIONS))
    return InputFeatures(whole, region)


def planted(where: str, labels: torch.Tensor, candidate: bool = True, strength: float = 4.0, seed: int = 0):
    """Noise with the label in one form only: `region` or `whole`; `mean`, the same in all frames, or `frames`, with
    opposite signs that cancel in the mean. In the regions a label moves that candidate, or region 0 by a code."""
    area, time = where.split(", ")
    source = noise(len(labels), seed=seed)
    rng = torch.Generator().manual_seed(99)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0] if time == "frames" else [1.0] * FRAMES)[:, None]  # frame, 1
    rows = torch.arange(len(labels))
    values = getattr(source, area)
    if area == "region" and candidate:
        move = strength * torch.randn(CHANNELS, generator=rng) / CHANNELS**0.5
        values[rows, :, :, labels] += signs * move
    else:
        codes = strength * torch.linalg.qr(torch.randn(CHANNELS, CHANNELS, generator=rng))[0]
        values[:, :, :, 0] += (signs * codes[labels][:, None])[:, None]
    return source


def only(source: InputFeatures, samples: ProbeSamples, target: str = "answer", name: str = "x_t", **more):
    given = {"kind": "newton", "penalties": [0.01, 1.0]} | more
    return read_inputs(samples, {name: source}, **given)[target][name]


def right(found: InputReading, samples: ProbeSamples, target: str = "answer", split: str = "test") -> np.ndarray:
    """Share of right labels [step, position]."""
    labels = samples.subset(split).labels[target].numpy()
    said = getattr(found, split)
    return (said == labels)[:, :, labels.reshape(len(labels), -1)[:, 0] >= 0].reshape(*said.shape[:2], -1).mean(axis=2)


@cache
def drawn(count: int = 300, classes: int = REGIONS, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(seed))


# static inputs


@cache
def answered(family: str, counts: tuple[int, int, int]) -> list[Problem]:
    """Problems of train, validation and test that have one answer."""
    task = FAMILIES[family]().build()
    (kind,) = task.targets[0].kinds
    splits = zip(("train", "validation", "test"), counts, strict=True)
    return [p for split, count in splits for p in task.problems(split, count, kind)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "counts"),
    [("maze", (80, 40, 40)), ("hide", (160, 60, 60)), ("select", (80, 40, 40)), ("line", (500, 150, 100))],
)
@pytest.mark.parametrize("kind", ["newton", "ridge"])
def test_static_features_reach_a_shared_scorer_with_nothing_lost(family, counts, kind):
    """A prompt that states the answer reads 1.00 on every task, whatever form its answer has."""
    task = FAMILIES[family]().build()
    target = next(t for t in task.targets if t.role == "answer")
    problems = answered(family, counts)
    labels = torch.tensor([p.labels["answer"] for p in problems])
    assert set(labels[: counts[0]].tolist()) == set(labels.tolist())  # train has every class that is asked for
    cells = (Cell(0, 0, "cond", "all"),)
    samples = ProbeSamples(
        features=torch.zeros(len(problems), 1, task.regions, 2),
        cells=cells,
        targets=(target,),
        labels={"answer": labels},
        split=np.array([p.split for p in problems]),
        keys=np.array([p.key for p in problems]),
        kinds=np.array([p.kind for p in problems]),
    )
    rng = torch.Generator().manual_seed(5)
    code = torch.linalg.qr(torch.randn(64, 64, generator=rng))[0][: target.classes]
    prompt = code[labels] + 0.01 * torch.randn(len(labels), 64, generator=rng)
    found = only(InputFeatures(prompt[:, None, None, None]), samples, name="prompt", kind=kind, penalties=[1e-4, 1e-2])
    assert right(found, samples).item() == 1
    assert right(found, samples, split="validation").item() == 1
    assert found.accuracy.item() > 0.99
    assert found.form.item() == "whole, mean"
    shuffled = InputFeatures(prompt[torch.randperm(len(labels), generator=rng)][:, None, None, None])
    told = right(only(shuffled, samples, name="prompt", kind=kind, penalties=[1e-4, 1e-2]), samples).item()
    assert told < 0.5  # what states another problem's answer does not


# forms


@pytest.mark.slow
@pytest.mark.parametrize("where", FORMS)
def test_an_input_is_read_in_the_form_that_carries_the_answer(where):
    labels = drawn()
    samples = samples_of((ANSWER,), {"answer": labels})
    area, time = where.split(", ")
    source = planted(where, labels, strength=4.0 if time == "frames" else 2.5)
    found = only(source, samples)
    assert (found.form == where).all() and found.form.shape == (STEPS, 1)
    assert (right(found, samples) > 0.85).all()
    assert (found.accuracy > 0.85).all()
    width = (CELLS if area == "whole" else 1) * CHANNELS * (FRAMES if time == "frames" else 1)
    assert (found.columns == width).all() and (found.projected == width).all()
    # nor is it in the others, but that frames side by side hold their mean
    for other in set(FORMS) - {where} - ({f"{area}, frames"} if time == "mean" else set()):
        blind = next(form.rows for form in forms(source, ANSWER, None) if form.name == other)[:, :, None]
        regions = other.startswith("region")
        alone = InputFeatures(torch.zeros_like(blind[:, :, :, :1]), blind) if regions else InputFeatures(blind)
        assert (right(only(alone, samples), samples) < 0.45).all(), other


@pytest.mark.slow
def test_every_step_has_a_form_of_its_own():
    labels = drawn()
    samples = samples_of((ANSWER,), {"answer": labels})
    first, second = planted("region, frames", labels), planted("whole, mean", labels)
    mixed = InputFeatures(
        torch.stack([first.whole[:, 0], second.whole[:, 1]], 1),
        torch.stack([first.region[:, 0], second.region[:, 1]], 1),
    )
    found = only(mixed, samples)
    assert found.form[:, 0].tolist() == ["region, frames", "whole, mean"]
    assert found.columns[:, 0].tolist() == [FRAMES * CHANNELS, CELLS * CHANNELS]
    assert (right(found, samples) > 0.9).all()
    apart = [only(source, samples) for source in (first, second)]
    for field in (*KEPT, "validation", "test"):
        np.testing.assert_array_equal(getattr(found, field)[0], getattr(apart[0], field)[0])
        np.testing.assert_array_equal(getattr(found, field)[1], getattr(apart[1], field)[1])


@pytest.mark.slow
def test_a_scorer_shared_by_the_candidates_needs_fewer_samples_than_a_weight_for_each():
    """Why regions are tried at all: what is the same in every candidate is learnt from all of them."""
    labels = drawn(120)
    samples = samples_of((ANSWER,), {"answer": labels})
    source = planted("region, mean", labels, strength=1.5)
    beside = InputFeatures(source.region)  # the same numbers, told apart by position
    shared, apart = right(only(source, samples), samples).mean(), right(only(beside, samples), samples).mean()
    assert shared > apart + 0.05


@pytest.mark.slow
def test_problem_and_region_targets_keep_their_form():
    labels = drawn(300, 5)
    told = planted("region, mean", labels, candidate=False)
    samples = samples_of((START,), {"start": labels})
    found = only(told, samples, "start")
    assert (found.form == "region, mean").all()
    assert (found.columns == REGIONS * CHANNELS).all()  # all regions side by side
    assert (right(found, samples, "start") > 0.9).all()
    inside = torch.randint(0, 3, (300, REGIONS), generator=torch.Generator().manual_seed(3))
    source = noise(300)
    source.region[..., 0] += 4.0 * (inside - 1)[:, None, None]
    samples = samples_of((INSIDE,), {"inside": inside})
    found = only(source, samples, "inside")
    assert found.test.shape == (STEPS, 1, 100, REGIONS)
    assert all(form.startswith("region") for form in found.form.ravel())
    assert (right(found, samples, "inside") > 0.9).all()


def test_the_forms_of_an_input():
    source, static = noise(10), InputFeatures(torch.randn(10, 1, 1, 1, 7))
    assert [form.name for form in forms(source, ANSWER, None)] == list(FORMS)
    shapes = {form.name: tuple(form.rows.shape[2:]) for form in forms(source, ANSWER, None)}
    assert shapes == {
        "region, mean": (REGIONS, CHANNELS), "region, frames": (REGIONS, FRAMES * CHANNELS),
        "whole, mean": (1, CELLS * CHANNELS), "whole, frames": (1, CELLS * FRAMES * CHANNELS),
    }  # fmt: skip
    assert [form.name for form in forms(static, ANSWER, None)] == ["whole, mean"]
    assert [form.name for form in forms(source, INSIDE, "all")] == ["region, mean", "region, frames"]
    one = list(forms(source, ORIGIN, "1"))
    assert [form.name for form in one] == ["region, mean"]
    assert torch.equal(one[0].rows, source.region[:, :, 1])
    grid = InputFeatures(source.whole)  # no regions: coarse cells of a 2 x 2 grid, by row and column
    cell = list(forms(grid, ORIGIN, "r1c0"))
    assert [form.name for form in cell] == ["whole, mean", "whole, frames"]
    assert torch.equal(cell[0].rows[:, :, 0], source.whole[:, :, :, 2].mean(2))


def test_tokens_of_an_input_are_read_where_they_are_few_numbers():
    """In a run with token pooling: answers are compared with all tokens of narrow inputs, concatenated."""
    token = torch.randn(10, STEPS, FRAMES, 9, CHANNELS)
    source = InputFeatures(token.mean(3, keepdim=True), token=token)
    found = {form.name: form.rows for form in forms(source, ANSWER, None)}
    assert list(found) == ["token, mean", "token, frames", "whole, mean", "whole, frames"]
    assert torch.equal(found["token, frames"][:, :, 0], token.permute(0, 1, 3, 2, 4).flatten(2))
    count = COLUMNS // CHANNELS + 1
    wide = InputFeatures(source.whole, token=torch.randn(10, STEPS, FRAMES, count, CHANNELS))
    assert [form.name for form in forms(wide, ANSWER, None)] == ["whole, mean", "whole, frames"]


# which targets are compared with what


@pytest.mark.slow
def test_findings_have_to_beat_inputs_by_role():
    labels = drawn(120)
    roles = ("answer", "model_answer", "memory", "perception", "nuisance", "control", "relabelled")
    targets = tuple(Target(role, REGIONS, "candidate", role, ("one",)) for role in roles)
    samples = samples_of(targets, dict.fromkeys(roles, labels), steps=1)
    static = InputFeatures(torch.randn(120, 1, 1, 1, 3))
    inputs = {name: static if name in ("prompt", "difficulty") else noise(120, 1) for name in (*INPUTS, X0)}
    found = read_inputs(samples, inputs, "ridge", [1.0])
    assert {role: set(names) for role, names in found.items()} == {
        "answer": {*INPUTS, X0}, "model_answer": {*INPUTS, X0}, "memory": {"noise", "first_frame", "embed", "x_t", X0},
    }  # fmt: skip
    assert set(MUST_BEAT) == set(found)
    fewer = read_inputs(samples, {"embed": noise(120, 1)}, "ridge", [1.0])
    assert all(set(names) == {"embed"} for names in fewer.values())
    assert read_inputs(samples, {}, "ridge", [1.0]) == {}


def test_readings_are_computed_once_and_read_as_they_were(tmp_path, monkeypatch):
    labels = {"answer": torch.randint(0, REGIONS, (120,)), "start": torch.randint(0, 5, (120,))}
    samples, inputs = samples_of((ANSWER, START), labels), {"embed": noise(120), "x_t": noise(120, seed=1)}
    settings = StoreSettings({"index": "model"}, 0, PipelineConfig(), {"problems": 120}, CaptureConfig(), {})
    expected = read_inputs(samples, inputs, "newton", [0.1, 1.0])
    first = read_inputs_once(tmp_path, samples, inputs, settings, "newton", [0.1, 1.0])
    monkeypatch.setattr(module, "read_inputs", lambda *given: pytest.fail("computed again"))
    again = read_inputs_once(tmp_path, samples, inputs, settings, "logistic", [0.1, 1.0])  # has the same optimum
    for found in (first, again):
        assert {target: list(of) for target, of in found.items()} == {t: list(of) for t, of in expected.items()}
        for target, of_target in expected.items():
            for name, reading in of_target.items():
                for field in fields(InputReading):
                    values = getattr(found[target][name], field.name)
                    np.testing.assert_array_equal(values, getattr(reading, field.name))
    for changed in (("ridge", [0.1, 1.0]), ("newton", [0.1])):
        with pytest.raises(pytest.fail.Exception):
            read_inputs_once(tmp_path, samples, inputs, settings, *changed)


@pytest.mark.slow
def test_memory_gets_only_the_frame_and_region_that_is_read():
    """The label stands in latent frame 0 of the regions, and everywhere in the whole frame."""
    labels = drawn(300, 5)
    samples = samples_of((ORIGIN, START), {"origin": labels, "start": labels}, positions=("all", "0", "1"))
    source = noise(300)
    codes = 6 * torch.eye(CHANNELS)[:5]
    source.region[:, :, 0, 0] += codes[labels][:, None]
    source.whole[:, :, :, 0] += codes[labels][:, None, None]
    found = read_inputs(samples, {"x_t": source}, "newton", [0.01, 1.0])
    memory, answer = found["origin"]["x_t"], found["start"]["x_t"]
    everywhere, first, second = right(memory, samples, "origin").T
    assert (everywhere > 0.9).all() and (first > 0.9).all()
    assert (second < 0.4).all()  # neither the other frame nor the whole frame is shown there
    assert (memory.accuracy[:, 2] < 0.4).all()
    assert all(form.startswith("region") for form in memory.form.ravel())
    assert (memory.form[:, 1:] == "region, mean").all()
    assert (right(answer, samples, "start") > 0.95).all()  # an answer has to beat the input wherever it is
    assert (answer.test == answer.test[:, :1]).all()


def test_what_does_not_change_along_the_steps_is_the_same_at_all_of_them():
    labels = drawn()
    samples = samples_of((ANSWER,), {"answer": labels}, positions=("all", "1"), steps=3)
    static = planted("region, frames", labels)
    once = InputFeatures(static.whole[:, :1], static.region[:, :1])
    found = only(once, samples, name="first_frame")
    for field in (*KEPT, "validation", "test"):
        values = getattr(found, field)
        assert values.shape[:2] == (3, 2)
        assert (values == values[:1, :1]).all()
    assert (right(found, samples) > 0.9).all()


# nothing leaks


@pytest.mark.slow
def test_the_form_is_chosen_without_looking_at_test():
    labels = drawn()
    samples = samples_of((ANSWER,), {"answer": labels})
    source = planted("whole, mean", labels, strength=1.5)
    before = only(source, samples)
    test = torch.from_numpy(samples.split == "test")
    other = planted("region, frames", labels, strength=9.0)  # by test alone another form would be the best
    changed = InputFeatures(*(torch.where(test[:, None, None, None, None], getattr(other, part), getattr(source, part))
                              for part in ("whole", "region")))  # fmt: skip
    moved = replace(samples, labels={"answer": torch.where(test, (labels + 1) % REGIONS, labels)})
    after = only(changed, moved)
    for field in (*KEPT, "validation"):
        np.testing.assert_array_equal(getattr(after, field), getattr(before, field))
    assert (after.test != before.test).any()
    wild = replace(samples, labels={"answer": torch.where(test, -1, labels)})
    np.testing.assert_array_equal(only(source, wild).accuracy, before.accuracy)


def test_problems_make_the_folds():
    """Seeds of one problem share features and a random label: only a fold that holds the twin could read it."""
    problems, seeds, width = 120, 5, 400
    rng = torch.Generator().manual_seed(7)
    of = torch.arange(problems).repeat_interleave(seeds)
    labels = torch.randint(0, REGIONS, (problems,), generator=rng)[of]
    values = torch.randn(problems, 1, 1, 1, width, generator=rng)[of]
    keys = np.array([f"problem {i}" for i in of.tolist()])
    samples = samples_of((ANSWER,), {"answer": labels}, keys=keys, steps=1)
    found = only(InputFeatures(values), samples, name="prompt", penalties=[0.01])
    assert found.accuracy.item() < 0.4
    samples = replace(samples, keys=np.array([f"{split} {i}" for i, split in enumerate(samples.split)]))
    assert only(InputFeatures(values), samples, name="prompt", penalties=[0.01]).accuracy.item() > 0.9  # what it guards


@pytest.mark.slow
def test_folds_and_hence_accuracy_follow_the_seed_and_nothing_else_of_a_run():
    labels = drawn(150)
    samples = samples_of((ANSWER,), {"answer": labels}, steps=1)
    source = planted("region, mean", labels, strength=1.0)
    source = InputFeatures(source.whole[:, :1], source.region[:, :1])
    first, again, other = (only(source, samples, seed=seed) for seed in (0, 0, 1))
    for field in (*KEPT, "validation", "test"):
        np.testing.assert_array_equal(getattr(first, field), getattr(again, field))
    assert first.accuracy.item() != other.accuracy.item()
    if first.form.item() == other.form.item():
        np.testing.assert_array_equal(first.test, other.test)  # the fit itself has no folds


@pytest.mark.slow
def test_samples_without_a_label_take_no_part():
    labels = drawn(240)
    keep = torch.arange(240) % 4 > 0
    samples = samples_of((ANSWER,), {"answer": torch.where(keep, labels, -1)}, steps=1)
    source = planted("region, mean", labels, strength=1.5)
    source = InputFeatures(source.whole[:, :1], source.region[:, :1])
    found = only(source, samples)
    wild = InputFeatures(source.whole.clone(), source.region.clone())
    moved = ~keep & torch.from_numpy(samples.split != "train")  # all training samples standardise
    wild.region[moved] *= 50
    again = only(wild, samples)
    np.testing.assert_array_equal(found.accuracy, again.accuracy)
    np.testing.assert_array_equal(found.test[:, :, keep[160:]], again.test[:, :, keep[160:]])


# against scikit-learn


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["newton", "ridge"])
@pytest.mark.parametrize("where", ["region, mean", "whole, mean"])
@threadpool_limits.wrap(limits=1)
def test_equals_a_plain_loop_of_sklearn_fits(kind, where):
    penalties, seed, classes = [0.003, 0.1, 3.0], 4, 5
    labels, target = drawn(240, classes), START
    source = planted(where, labels, candidate=False, strength=2.0)
    source = InputFeatures(source.whole[:, :, :2], source.region[:, :, :2])  # two frames: fewer columns for sklearn
    samples = samples_of((target,), {"start": labels}, keys=np.array([f"k{i // 2}" for i in range(240)]))
    found = only(source, samples, "start", kind=kind, penalties=penalties, seed=seed)
    y = labels.numpy()
    known = samples.split != "test"
    train, validation, test = (samples.split == split for split in ("train", "validation", "test"))
    folds = problem_folds(samples.keys[known], seed)

    def model(value: float, count: int):
        if kind == "ridge":
            return RidgeClassifier(alpha=value * count)
        return LogisticRegression(C=1 / (value * count), max_iter=2000, tol=1e-5)

    for step in range(STEPS):
        best: tuple[float, str] = (-1.0, "")
        columns = {}
        for form in forms(source, target, None):
            rows = form.rows[:, [step]]
            x = standardise(rows, *spread(rows[torch.from_numpy(train)]))[0].flatten(1).double().numpy()
            columns[form.name] = x
            hits = np.zeros(len(penalties))
            for i, value in enumerate(penalties):
                for fold in range(5):
                    inside, outside = (np.flatnonzero(known)[chosen] for chosen in (folds != fold, folds == fold))
                    fit = model(value, len(inside)).fit(x[inside], y[inside])
                    hits[i] += (fit.predict(x[outside]) == y[outside]).sum()
            best = max(best, (hits.max() / known.sum(), form.name), key=lambda pair: pair[0])
        # a sample on a boundary may fall on either side of it
        assert found.accuracy[step, 0] == pytest.approx(best[0], abs=1.01 / known.sum())
        assert found.form[step, 0] == best[1] == where
        x = columns[where]
        if kind == "ridge":  # chosen by folds inside train, as every ridge probe
            inner = problem_folds(samples.keys[train], seed)
            score = []
            for value in penalties:
                held = np.zeros(train.sum(), dtype=int)
                for fold in range(5):
                    own = inner == fold
                    held[own] = RidgeClassifier(alpha=value * train.sum()).fit(x[train][~own], y[train][~own]).predict(
                        x[train][own]
                    )  # fmt: skip
                score.append((held == y[train]).sum())
        else:  # most right on validation, then the lowest cross-entropy
            fits = [model(value, train.sum()).fit(x[train], y[train]) for value in penalties]
            score = [
                (fit.predict(x[validation]) == y[validation]).sum()
                + 0.5 * np.log(fit.predict_proba(x[validation])[np.arange(80), y[validation]]).mean() / 10
                for fit in fits
            ]
        chosen = float(found.penalty[step, 0])
        kept = next(i for i, value in enumerate(penalties) if value == pytest.approx(chosen))
        assert score[kept] >= max(score) - (kind == "ridge")  # a tie may be broken by the squared error
        oracle = model(penalties[kept], train.sum()).fit(x[train], y[train])
        for part, split in ((validation, "validation"), (test, "test")):
            assert (getattr(found, split)[step, 0] != oracle.predict(x[part])).sum() <= 1


@pytest.mark.slow
def test_logistic_and_newton_have_one_optimum():
    labels = drawn(120)
    samples = samples_of((ANSWER,), {"answer": labels})
    source = planted("region, mean", labels, strength=1.5)
    one, other = (only(source, samples, kind=kind) for kind in ("newton", "logistic"))
    for field in (*KEPT, "validation", "test"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


@pytest.mark.parametrize("kind", ["newton", "ridge"])
def test_candidates_in_their_regions_equal_probes_on_the_same_columns(kind):
    """The kept form is fitted as a probe is: the same features as a layer give the same predictions."""
    labels, value = drawn(240), 0.05
    source = planted("region, frames", labels, strength=2.5)
    samples = samples_of((ANSWER,), {"answer": labels})
    found = only(source, samples, kind=kind, penalties=[value])
    assert (found.form == "region, frames").all()
    rows = source.region.transpose(2, 3).flatten(3)
    train = torch.from_numpy(samples.split == "train")
    x = standardise(rows, *spread(rows[train]))
    if kind == "newton":
        weight = fit_newton(x[:, train], labels[train], ANSWER, [value]).weight[:, :, 0, 0]
    else:
        fit = fit_ridge(x[:, train], {"answer": labels[train]}, samples.keys[:80], [ANSWER], [value])
        weight = fit["answer"].weights[..., 0]
    said = torch.einsum("csrd,cd->csr", x, weight).argmax(dim=-1)[:, 160:].numpy()
    assert (found.test[:, 0] != said).mean() <= 0.01


# projection


@pytest.mark.parametrize("kind", ["newton", "ridge"])
def test_a_source_wider_than_the_training_samples_is_projected_at_no_loss(kind):
    """The span of the training rows is all that a penalised fit on them can use."""
    labels, width = drawn(180), 150
    samples = samples_of((ANSWER,), {"answer": labels}, steps=1)
    rng = torch.Generator().manual_seed(2)
    values = torch.randn(180, width, generator=rng) + 3 * torch.randn(REGIONS, width, generator=rng)[labels] / 4
    found = only(InputFeatures(values[:, None, None, None]), samples, name="prompt", kind=kind, penalties=[0.1])
    assert (found.columns.item(), found.projected.item()) == (width, 60)
    narrow = only(InputFeatures(values[:, None, None, None, :60]), samples, name="prompt", kind=kind, penalties=[0.1])
    assert (narrow.columns.item(), narrow.projected.item()) == (60, 60)
    train, y = samples.split == "train", labels.numpy()
    x = (
        standardise(values[:, None, None], *spread(values[torch.from_numpy(train), None, None]))[0, :, 0]
        .double()
        .numpy()
    )
    if kind == "ridge":
        oracle = RidgeClassifier(alpha=0.1 * 60).fit(x[train], y[train])
    else:
        oracle = LogisticRegression(C=1 / (0.1 * 60), max_iter=10_000, tol=1e-8).fit(x[train], y[train])
    for split in ("validation", "test"):
        part = samples.split == split
        assert abs(right(found, samples, split=split).item() - oracle.score(x[part], y[part])) <= 1 / 60 + 1e-9
    assert right(found, samples).item() > 0.5


def test_a_wide_input_of_regions_is_projected_by_all_of_them():
    labels = drawn(90)
    samples = samples_of((ANSWER,), {"answer": labels}, steps=1)
    rng = torch.Generator().manual_seed(4)
    region = torch.randn(90, 1, 1, REGIONS, 50, generator=rng)
    region[torch.arange(90), :, :, labels] += 0.8 * torch.randn(50, generator=rng)
    found = only(InputFeatures(torch.randn(90, 1, 1, 1, 50, generator=rng), region), samples, penalties=[0.1])
    assert found.form.item() == "region, mean"
    assert (found.columns.item(), found.projected.item()) == (50, 30)
    assert right(found, samples).item() > 0.8
    problem = samples_of((START,), {"start": labels}, steps=1)
    joint = only(InputFeatures(torch.randn(90, 1, 1, 1, 50, generator=rng), region), problem, "start", penalties=[0.1])
    assert (joint.columns.item(), joint.projected.item()) == (200, 30)  # side by side, then projected


# for analyses that refit


def test_an_input_as_a_cell_of_its_own():
    labels = drawn(60)
    samples = samples_of((ANSWER, ORIGIN), {"answer": labels, "origin": labels}, positions=("all", "1"))
    source, cell = noise(60), Cell(3, 0, "cond", "1")
    for form in forms(source, ANSWER, None):
        made = input_samples(samples, source, "answer", cell, form.name)
        assert made.cells == (cell,) and made.labels is samples.labels
        assert torch.equal(made.features[:, 0], form.rows[:, 1])
    assert torch.equal(
        input_samples(samples, source, "origin", cell, "region, mean").features[:, 0], source.region[:, 1, 1]
    )
    once = InputFeatures(source.whole[:, :1], source.region[:, :1])
    made = input_samples(samples, once, "answer", cell, "region, mean")
    assert torch.equal(made.features[:, 0], source.region[:, 0].mean(1))


@pytest.mark.slow
def test_steps_worked_on_one_by_one_give_the_same(monkeypatch):
    labels = drawn(120)
    samples = samples_of((ANSWER,), {"answer": labels}, steps=5)
    source = noise(120, 5)
    source.region[torch.arange(120), :, :, labels] += 0.5
    whole = only(source, samples)
    monkeypatch.setattr(module, "NUMBERS", 1)
    parts = only(source, samples)
    for field in (*KEPT, "validation", "test"):
        np.testing.assert_array_equal(getattr(whole, field), getattr(parts, field))


def five_steps(kind: str) -> dict[str, InputReading]:
    """Readings of an input of five steps and of one that does not change, their forms mixed."""
    labels = drawn(120)
    samples = samples_of((ANSWER,), {"answer": labels}, steps=5)
    source, still = noise(120, 5), noise(120, 1, seed=2)
    source.region[torch.arange(120), :2, :, labels] += 0.5
    source.whole[:, 2:, :, 0] += 2 * torch.eye(CHANNELS)[labels][:, None, None]
    return read_inputs(samples, {"x_t": source, "noise": still}, kind, [0.01, 1.0])["answer"]


def as_process(rank: int, rendezvous: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=2)
    torch.save({kind: five_steps(kind) for kind in ("newton", "ridge")}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_give_the_readings_of_one(tmp_path):
    assert processes.run(as_process, str(tmp_path / "rendezvous"), str(tmp_path), processes=2) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    for kind in ("newton", "ridge"):
        alone = five_steps(kind)
        assert len(set(alone["x_t"].form.ravel())) > 1
        for name, reading in alone.items():
            for field in (*KEPT, "validation", "test"):
                for other in (first, second):
                    np.testing.assert_array_equal(getattr(other[kind][name], field), getattr(reading, field))


def test_a_clip_without_regions_is_read_over_the_whole_frame():
    labels = drawn()
    samples = samples_of((ANSWER, INSIDE), {"answer": labels, "inside": labels[:, None] % 3}, regions=1, steps=1)
    source = planted("whole, frames", labels)
    found = read_inputs(samples, {"x_t": InputFeatures(source.whole[:, :1])}, "newton", [0.01, 1.0])
    assert list(found) == ["answer"]  # targets of regions do not exist
    assert found["answer"]["x_t"].form.item() == "whole, frames"
    assert right(found["answer"]["x_t"], samples).item() > 0.9
