from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.linear_model import RidgeClassifier, RidgeClassifierCV, RidgeCV
from sklearn.model_selection import PredefinedSplit

from cosprobe.probes.linalg import design
from cosprobe.probes.ridge import FOLDS, Ridge, fit_ridge, problem_folds
from cosprobe.tasks import Target

PENALTIES = [0.01, 1.0]
SEEDS = st.integers(0, 2**31)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def target(form: str, classes: int = 3, name: str = "t") -> Target:
    return Target(name, classes, form, "answer", ("a",))


def names(count: int, each: int = 1) -> np.ndarray:
    return np.array([f"k{i // each}" for i in range(count)])


def planted(rng: torch.Generator, form: str, samples: int = 60, regions: int = 3, channels: int = 8):
    """A signal that a fit can half find; some rows carry nothing."""
    x = torch.randn(2, samples, regions, channels, generator=rng)
    answer = torch.randint(0, regions, (samples,), generator=rng)
    x[:, torch.arange(samples), answer, 0] += 1.5
    labels = (torch.arange(regions) == answer[:, None]).long() if form == "region" else answer
    labels = torch.where(torch.rand(labels.shape, generator=rng) < 0.9, labels, -1)
    return x, labels


@pytest.mark.parametrize(("rows", "width"), [(60, 10), (20, 50), (25, 25)])
def test_it_equals_sklearn_in_primal_and_dual_form(rng, rows, width):
    x = torch.randn(3, rows, width, generator=rng) + 1
    wanted = torch.randn(rows, 4, generator=rng)
    ridge = Ridge.of(x, wanted)
    for alpha in (0.5, 20.0):
        weight, bias = ridge.solve(torch.full((3, 4), alpha).double())
        for cell in range(3):
            oracle = SklearnRidge(alpha=alpha).fit(x[cell].double().numpy(), wanted.double().numpy())
            assert np.allclose(weight[cell].T.numpy(), oracle.coef_, rtol=1e-8, atol=1e-10)
            assert np.allclose(bias[cell].numpy(), oracle.intercept_, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("rows", "width"), [(60, 10), (30, 25), (20, 50)])  # Woodbury, primal, dual
def test_held_out_predictions_equal_refits_without_the_fold(rng, rows, width):
    x = torch.randn(2, rows, width, generator=rng) + 1
    wanted = torch.randn(rows, 3, generator=rng)
    folds = torch.tensor([0] * 3 + [1] * 12)[torch.randint(0, 15, (rows,), generator=rng)]  # of uneven size
    folds[:4] = torch.tensor([0, 1, 2, 2])
    alphas = [0.02, 7.0]
    held = Ridge.of(x, wanted).held_out(alphas, folds)
    assert held.shape == (2, rows, 2, 3)
    for cell in range(2):
        for i, alpha in enumerate(alphas):
            for fold in (0, 1, 2):
                own = (folds == fold).numpy()
                rest = x[cell].double().numpy()[~own], wanted.double().numpy()[~own]
                expected = SklearnRidge(alpha=alpha).fit(*rest).predict(x[cell].double().numpy()[own])
                assert np.allclose(held[cell, own, i].numpy(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("rows", "width"), [(60, 10), (20, 50)])
def test_leaving_out_one_row_at_a_time_is_what_ridgecv_does(rng, rows, width):
    x, alphas = torch.randn(1, rows, width, generator=rng).double(), [0.03, 1.0, 30.0, 1000.0]
    wanted = x[0, :, :3] @ torch.randn(3, 2, generator=rng).double() + torch.randn(rows, 2, generator=rng)
    held = Ridge.of(x, wanted).held_out(alphas, torch.arange(rows))
    error = (held[0] - wanted[:, None]).square()  # row alpha out
    oracle = RidgeCV(alphas=alphas, store_cv_results=True).fit(x[0].numpy(), wanted.numpy())
    assert np.allclose(error.transpose(1, 2).numpy(), oracle.cv_results_, rtol=1e-6, atol=1e-10)
    assert alphas[int(error.mean(dim=(0, 2)).argmin())] == oracle.alpha_


def test_the_dual_and_the_primal_form_agree(rng):
    """Columns of zeros change nothing but which form is taken."""
    x, wanted = torch.randn(2, 40, 9, generator=rng), torch.randn(40, 2, generator=rng)
    padded = torch.cat([x, torch.zeros(2, 40, 60)], dim=2)
    folds, alphas = torch.arange(40) % 4, torch.full((2, 2), 0.3).double()
    primal, dual = Ridge.of(x, wanted), Ridge.of(padded, wanted)
    assert (primal.coordinates.shape[2], dual.coordinates.shape[2]) == (9, 40)
    assert torch.allclose(primal.solve(alphas)[0], dual.solve(alphas)[0][:, :9], rtol=1e-9)
    assert torch.allclose(primal.held_out([0.3, 3.0], folds), dual.held_out([0.3, 3.0], folds), rtol=1e-9)


def test_a_single_fold_is_refused(rng):
    ridge = Ridge.of(torch.randn(1, 9, 2, generator=rng), torch.randn(9, 1, generator=rng))
    with pytest.raises(ValueError, match=r"folds=\[4\].*2"):
        ridge.held_out([1.0], torch.full((9,), 4))


@pytest.mark.parametrize("channels", [6, 40])
@pytest.mark.parametrize("form", ["candidate", "region", "problem"])
def test_probes_equal_sklearn_classifiers(rng, form, channels):
    samples, regions, classes = 50, 3, 3
    x = torch.randn(2, samples, regions, channels, generator=rng)
    shape = (samples, regions) if form == "region" else (samples,)
    labels = torch.randint(-1, classes, shape, generator=rng)
    for value in PENALTIES:
        found = fit_ridge(x, {"t": labels}, names(samples), (target(form),), [value])["t"]
        rows = design(x, form).flatten(1, 2)
        if form == "candidate":
            keep = (labels >= 0).repeat_interleave(regions)
            y = torch.nn.functional.one_hot(labels.clamp(min=0), regions).flatten()
        else:
            keep, y = labels.flatten() >= 0, labels.flatten()
        oracle = RidgeClassifier(alpha=value * int(keep.sum())).fit(rows[1][keep].numpy(), y[keep].numpy())
        ours = (rows[1] @ found.weights[1] + found.biases[1]).numpy()
        expected = oracle.decision_function(rows[1].numpy())
        assert np.allclose(ours[:, 0] if form == "candidate" else ours, expected, atol=1e-4)
        assert torch.allclose(found.penalties, torch.tensor(value))


@pytest.mark.parametrize(("channels", "penalties"), [(6, [0.1, 1e4]), (40, [1e-4, 0.1, 1e4])])
def test_the_penalty_chosen_by_folds_is_the_one_of_ridgeclassifiercv(rng, channels, penalties):
    """Folds of one size, three classes and penalties far apart, so that accuracy has a clear optimum."""
    samples = 100
    labels = torch.randint(0, 3, (samples,), generator=rng)
    x = torch.randn(3, samples, 1, channels, generator=rng)
    x[:, torch.arange(samples), 0, labels] += torch.tensor([0.0, 1.0, 2.5])[:, None]
    found = fit_ridge(x, {"t": labels}, names(samples), (target("problem"),), penalties, seed=3)["t"]
    folds = PredefinedSplit(problem_folds(names(samples), 3))
    for cell in (1, 2):
        rows = x[cell, :, 0].double().numpy()
        # RidgeClassifierCV keeps alpha as it is in every fold, as the block formula does
        alphas = np.array([value * samples for value in penalties])
        oracle = RidgeClassifierCV(alphas=alphas, cv=folds, scoring="accuracy").fit(rows, labels.numpy())
        assert float(found.penalties[cell]) * samples == pytest.approx(oracle.alpha_)
        ours = x[cell, :, 0] @ found.weights[cell] + found.biases[cell]
        assert np.allclose(ours.numpy(), oracle.decision_function(rows), atol=1e-4)


@pytest.mark.parametrize("form", ["candidate", "region", "problem"])
def test_the_choice_is_that_of_refits_fold_by_fold(rng, form):
    """Brute force of the whole rule: accuracy by the form's own argmax, ties by squared error."""
    x, labels = planted(rng, form)
    keys, penalties, classes = names(60, 2), [1e-3, 0.03, 0.3, 3.0, 100.0], 2 if form == "region" else 3
    found = fit_ridge(x, {"t": labels}, keys, (target(form, classes),), penalties, seed=1)["t"]
    carries = labels >= 0 if form != "region" else (labels >= 0).any(1)
    folds = np.full(60, -1)
    folds[carries] = problem_folds(keys[carries], 1)
    rows = design(x, form).double().numpy()
    regions = rows.shape[2]
    for cell in range(2):
        scores = []
        for value in penalties:
            right, error = 0, 0.0
            for fold in range(FOLDS):
                sets = []
                for member in (carries.numpy() & (folds != fold), folds == fold):
                    known = labels[member].numpy()
                    if form == "candidate":
                        seen, signs = rows[cell, member].reshape(-1, 8), 2.0 * (known[:, None] == np.arange(3)) - 1
                        sets.append((seen, signs.reshape(-1, 1), known))
                    else:
                        keep = known.flatten() >= 0
                        seen = rows[cell, member].reshape(len(known) * regions, -1)[keep]
                        signs = 2.0 * (known.flatten()[keep][:, None] == np.arange(classes)) - 1
                        sets.append((seen, signs, known.flatten()[keep]))
                (seen, signs, _), (held, held_signs, known) = sets
                count = int((labels >= 0).sum()) * (3 if form == "candidate" else 1)
                values = SklearnRidge(alpha=value * count).fit(seen, signs).predict(held).reshape(held_signs.shape)
                guess = values.reshape(-1, 3).argmax(1) if form == "candidate" else values.argmax(1)
                right += int((guess == known).sum())
                error += float(np.square(values - held_signs).sum())
            scores.append((-right, error))
        assert float(found.penalties[cell]) == pytest.approx(penalties[scores.index(min(scores))])


def test_folds_hold_whole_problems_and_all_are_of_one_size():
    keys = names(70, 3)
    folds = problem_folds(keys, seed=0)
    assert all(len(set(folds[keys == key])) == 1 for key in keys)
    problems = [folds[keys == key][0] for key in np.unique(keys)]
    assert sorted(set(folds)) == list(range(FOLDS))
    assert np.ptp(np.bincount(problems)) <= 1
    assert set(problem_folds(names(6, 2), 0)) == {0, 1, 2}  # as many folds as problems when those are few
    assert (problem_folds(keys, 1) != folds).any()


def test_noise_seeds_of_a_problem_never_vote_on_its_penalty(rng):
    """Each problem has two samples of the same features and a label that only its own features tell: with problems
    torn apart the smallest penalty would look perfect, held out together it is worth nothing."""
    x = torch.randn(1, 40, 1, 60, generator=rng).repeat_interleave(2, dim=1)
    labels = torch.randint(0, 2, (40,), generator=rng).repeat_interleave(2)
    ridge = Ridge.of(x[:, :, 0], torch.nn.functional.one_hot(labels, 2) * 2.0 - 1)
    right = {}
    for name, keys in (("whole", names(80, 2)), ("torn", names(80))):
        held = ridge.held_out([1e-3], torch.from_numpy(problem_folds(keys, 0)))
        right[name] = float((held[0, :, 0].argmax(-1) == labels).float().mean())
    assert right["torn"] > 0.85
    assert right["whole"] < 0.65


def test_targets_on_the_same_rows_are_fitted_as_if_alone(rng):
    x, keys = torch.randn(2, 30, 2, 5, generator=rng), names(30)
    targets = (target("candidate", 2, "a"), target("region", 3, "b"))
    labels = {
        "a": torch.randint(0, 2, (30,), generator=rng),
        "b": torch.randint(0, 3, (30, 2), generator=rng),
    }
    both = fit_ridge(x, labels, keys, targets, PENALTIES)
    for one in targets:
        alone = fit_ridge(x, labels, keys, (one,), PENALTIES)[one.name]
        assert torch.allclose(both[one.name].weights, alone.weights, atol=1e-6)
        assert torch.equal(both[one.name].penalties, alone.penalties)


def test_blocks_of_cells_give_the_same_probes(rng, monkeypatch):
    x, labels = planted(rng, "candidate")
    whole = fit_ridge(x, {"t": labels}, names(60), (target("candidate"),), PENALTIES)["t"]
    monkeypatch.setattr("cosprobe.probes.linalg.CHUNK", 1)
    small = fit_ridge(x, {"t": labels}, names(60), (target("candidate"),), PENALTIES)["t"]
    assert torch.allclose(whole.weights, small.weights, atol=1e-6)
    assert torch.equal(whole.penalties, small.penalties)


@given(SEEDS, st.sampled_from(["candidate", "region", "problem"]))
def test_the_order_of_samples_does_not_matter(seed, form):
    rng = torch.Generator().manual_seed(seed)
    x, labels = planted(rng, form, 30)
    keys, order = names(30, 2), torch.randperm(30, generator=rng)
    classes = 2 if form == "region" else 3
    one = fit_ridge(x, {"t": labels}, keys, (target(form, classes),), PENALTIES)["t"]
    shuffled = keys[order.numpy()]
    other = fit_ridge(x[:, order], {"t": labels[order]}, shuffled, (target(form, classes),), PENALTIES)["t"]
    assert torch.equal(one.penalties, other.penalties)
    assert torch.allclose(one.weights, other.weights, atol=1e-5)


@given(SEEDS, st.floats(0.1, 10.0))
def test_rescaled_features_predict_the_same_at_a_rescaled_penalty(seed, scale):
    rng = torch.Generator().manual_seed(seed)
    x, wanted = torch.randn(1, 24, 5, generator=rng).double(), torch.randn(24, 2, generator=rng)
    folds = torch.arange(24) % 3
    held = Ridge.of(x, wanted).held_out([0.7], folds)
    scaled = Ridge.of(scale * x, wanted).held_out([0.7 * scale**2], folds)
    assert torch.allclose(held, scaled, rtol=1e-6, atol=1e-8)


@given(SEEDS, st.floats(-5, 5))
def test_shifted_features_and_levels_shift_nothing_but_the_bias(seed, shift):
    rng = torch.Generator().manual_seed(seed)
    x, wanted = torch.randn(1, 24, 5, generator=rng).double(), torch.randn(24, 2, generator=rng)
    folds = torch.arange(24) % 3
    held = Ridge.of(x, wanted).held_out([0.7], folds)
    moved = Ridge.of(x + shift, wanted + shift).held_out([0.7], folds)
    assert torch.allclose(held + shift, moved, atol=1e-5)  # wanted is fp32


@pytest.mark.parametrize("penalties", [[], [1.0, 0.0]])
def test_penalties_without_a_unique_solution_are_refused(rng, penalties):
    x, labels = planted(rng, "problem")
    with pytest.raises(ValueError, match=f"{re.escape(f'penalties={penalties}')}.*above 0"):
        fit_ridge(x, {"t": labels}, names(60), (target("problem"),), penalties)


def test_one_problem_cannot_choose_between_penalties(rng):
    x, labels = planted(rng, "problem")
    with pytest.raises(ValueError, match="target 't'.*1 problem.*2"):
        fit_ridge(x, {"t": labels}, names(60, 60), (target("problem"),), PENALTIES)
    assert fit_ridge(x, {"t": labels}, names(60, 60), (target("problem"),), [0.1])["t"].weights.isfinite().all()
