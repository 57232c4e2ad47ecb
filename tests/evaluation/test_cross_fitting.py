"""Cross-fitting: every problem is tested once, by probes that did not see it, and choices are nested."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from cosprobe.activations import InputFeatures, ProbeSamples, folds_of
from cosprobe.cells import FIRST_FRAME, Cell
from cosprobe.config import ProbeConfig, TrainerConfig
from cosprobe.errors import InputError
from cosprobe.evaluation import build_grid, evaluate_divisions, joined, read_inputs
from cosprobe.evaluation.intervals import CROSS_FITTED, share_interval
from cosprobe.evaluation.variables import MEANING
from cosprobe.probes import fit
from cosprobe.tasks import Role, Target

FOLDS, PENALTY = 4, 0.1
CELLS = tuple(Cell(step, layer, "cond", "all") for step in (0, 1) for layer in (0, 1, 2))


def samples_of(problems: int, shift: float, seed: int = 0, classes: int = 2) -> ProbeSamples:
    """Samples of problems with one or two noise seeds, whose answer shifts one channel of the odd cells."""
    rng = np.random.default_rng(seed)
    keys = np.repeat([f"p{i:02d}" for i in range(problems)], rng.integers(1, 3, problems))
    answer = rng.integers(0, classes, problems)[np.unique(keys, return_inverse=True)[1]]
    features = rng.normal(size=(len(keys), len(CELLS), 1, 6))
    features[:, 1::2, 0, 0] += shift * answer[:, None]
    target = Target("answer", classes, "problem", Role.ANSWER, ("one",), tuple("abc"[:classes]))
    return ProbeSamples(
        torch.from_numpy(features).float(), CELLS, (target,), {"answer": torch.from_numpy(answer)},
        np.full(len(keys), "train"), keys, np.full(len(keys), "one"),
    )  # fmt: skip


def fitted(samples: ProbeSamples, folder, kind: str = "newton", penalties=(PENALTY,)):
    """The banks of all divisions, and the readings of an input that says nothing."""
    rng = np.random.default_rng(1)
    inputs = {FIRST_FRAME: InputFeatures(torch.from_numpy(rng.normal(size=(len(samples), 1, 1, 1, 3))).float())}
    config, trainer = ProbeConfig(kind=kind, penalties=list(penalties)), TrainerConfig(enable_progress_bar=False)
    banks = [fit(part, config, trainer, folder / str(i), 0) for i, part in enumerate(samples.divisions())]
    readings = [read_inputs(part, inputs, kind, penalties, 0) for part in samples.divisions()]
    return banks, readings


@pytest.fixture(scope="module")
def samples():
    return samples_of(40, 1.5).in_folds(FOLDS)


@pytest.fixture(scope="module")
def evaluated(samples, tmp_path_factory):
    banks, readings = fitted(samples, tmp_path_factory.mktemp("fits"))
    return joined(evaluate_divisions(samples, ("transformer",) * 2, banks, readings))


def test_folds_hold_whole_problems_and_are_alike_in_size():
    keys = np.repeat([f"p{i}" for i in range(22)], 3)
    fold = folds_of(keys, 5)
    of_problem = {key: set(fold[keys == key].tolist()) for key in keys}
    assert all(len(found) == 1 for found in of_problem.values())
    assert sorted(np.bincount(fold[::3]).tolist()) == [4, 4, 4, 5, 5]
    order = np.random.default_rng(0).permutation(len(keys))
    np.testing.assert_array_equal(folds_of(keys[order], 5), fold[order])
    with pytest.raises(InputError, match=r"probe\.folds=23: 22 problems"):
        folds_of(keys, 23)


def test_every_problem_is_test_once_and_validation_once(samples):
    splits = np.stack([part.split for part in samples.divisions()])
    assert len(splits) == FOLDS
    assert ((splits == "test").sum(axis=0) == 1).all() and ((splits == "validation").sum(axis=0) == 1).all()
    for split in splits:  # no problem in two splits of a division
        assert all(len(set(split[samples.keys == key])) == 1 for key in samples.keys)
    assert samples_of(20, 0.0).divisions()[0].fold is None  # one split


def test_predictions_are_those_of_scikit_learn_fitted_without_the_fold(samples, evaluated):
    result = evaluated.results[0]
    labels, first = samples.labels["answer"].numpy(), 0
    for k in range(FOLDS):
        here = np.flatnonzero(samples.fold == k)
        train = ~np.isin(samples.fold, (k, (k + 1) % FOLDS))
        of_fold = result.test.predicted[:, first : first + len(here)]
        np.testing.assert_array_equal(result.test.keys[first : first + len(here)], samples.keys[here])
        np.testing.assert_array_equal(result.test.labels[first : first + len(here)], labels[here])
        assert set(result.test.fold[first : first + len(here)].tolist()) == {k}
        for c in range(len(CELLS)):
            x = samples.features[:, c, 0].numpy()
            x = (x - x[train].mean(axis=0)) / x[train].std(axis=0)
            model = LogisticRegression(C=2 / (train.sum() * PENALTY), tol=1e-9, max_iter=10_000)
            model.fit(x[train], labels[train])
            np.testing.assert_array_equal(of_fold[c], model.predict(x[here]))
        first += len(here)
    assert first == len(samples) == len(result.validation.keys)


def test_the_accuracy_of_the_best_cell_is_of_cells_chosen_without_the_fold(samples, evaluated):
    grid, result = build_grid(evaluated, draws=50), evaluated.results[0]
    right, chosen = np.empty(len(samples)), []
    for k in range(FOLDS):
        scores = [
            np.mean((result.validation.predicted[c] == result.validation.labels)[result.validation.fold == k])
            for c in range(len(CELLS))
        ]
        chosen.append(int(np.argmax(scores)))
        test = result.test.fold == k
        right[test] = (result.test.predicted[chosen[-1]] == result.test.labels)[test]
    assert len(set(chosen)) > 1  # the folds do not agree, so the nested number is another one
    best = grid.best("answer")
    assert best.accuracy == pytest.approx(right.mean())
    lower, upper = share_interval(right[None], result.test.keys, CROSS_FITTED)
    assert (best.lower, best.upper) == pytest.approx((lower[0], upper[0]))
    assert float(grid.at("answer", best.cell).accuracy) != pytest.approx(best.accuracy)
    assert set(MEANING) == set(grid.dataset.data_vars)


def test_intervals_are_wider_than_those_of_independent_problems(evaluated):
    grid, test = build_grid(evaluated, draws=50), evaluated.results[0].test
    for i, cell in enumerate(CELLS):
        at = grid.at("answer", cell)
        lower, upper = share_interval((test.predicted[[i]] == test.labels).astype(float), test.keys)
        assert float(at.lower) < lower[0] and float(at.upper) > upper[0]


def test_what_would_use_test_problems_twice_is_not_measured(evaluated):
    data = build_grid(evaluated, draws=50).dataset.sel(target="answer")
    for name in ("latency", "depth", "ece", "temperature"):
        assert data[name].isnull().all()
    assert data.p_guess.notnull().all()  # a guess has to be beaten, whichever is better


@pytest.mark.parametrize(("shift", "found"), [(4.0, True), (0.0, False)])
def test_a_planted_answer_is_found_and_no_answer_is_not(tmp_path, shift, found):
    samples = samples_of(40, shift, seed=3).in_folds(FOLDS)
    banks, readings = fitted(samples, tmp_path, "ridge", (0.1, 1.0))
    evaluated = joined(evaluate_divisions(samples, ("transformer",) * 2, banks, readings))
    grid = build_grid(evaluated, draws=200)
    evident = {cell for cell in CELLS if float(grid.at("answer", cell).p_evidence) <= 0.05}
    assert evident == (set(CELLS[1::2]) if found else set())


def test_another_number_of_banks_than_of_folds_is_refused(samples, tmp_path):
    banks, readings = fitted(samples, tmp_path, "ridge")
    with pytest.raises(InputError, match="3 banks, 4 readings.* 4 folds"):
        evaluate_divisions(samples, ("transformer",) * 2, banks[:3], readings)
    for folds in (1, 2, 51):
        with pytest.raises(InputError, match=rf"probe\.folds={folds}: .*3 to 50"):
            ProbeConfig(folds=folds)
