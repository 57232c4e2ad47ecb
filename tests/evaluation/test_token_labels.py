"""Probes of labels that every token has for itself: a planted signal is found where it is, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cosprobe.activations import InputFeatures, ProbeSamples
from cosprobe.cells import EMBED, FIRST_FRAME, NOISE, X_T, Cell
from cosprobe.errors import InputError
from cosprobe.evaluation import read_path, read_token_labels
from cosprobe.evaluation.significance import max_t_permutation
from cosprobe.tasks import Maze

FRAMES, ROWS, COLUMNS = 2, 2, 3
STEPS, LAYERS = (0, 4), (1, 5)
COUNTS = {"train": 120, "validation": 50, "test": 60}
POSITIONS = [f"f{f}r{r}c{c}" for f in range(FRAMES) for r in range(ROWS) for c in range(COLUMNS)]
CELLS = tuple(Cell(s, n, "cond", p) for s in STEPS for n in LAYERS for p in POSITIONS)
PENALTIES = [0.01, 0.1]


def example(seed=0, channels=4):
    """Labels of every token at random; those of the last token are all false."""
    rng = np.random.default_rng(seed)
    split = np.repeat(list(COUNTS), list(COUNTS.values()))
    labels = rng.random((len(split), ROWS, COLUMNS)) < 0.4
    labels[:, 1, 2] = False
    noise = torch.Generator().manual_seed(seed)
    features = torch.randn(len(split), len(CELLS), 1, channels, generator=noise)
    keys = np.array([f"k{i}" for i in range(len(split))])
    samples = ProbeSamples(features, CELLS, (), {}, split, keys, np.array(["a"] * len(split)))
    inputs = {}
    for name, steps in ((NOISE, 1), (FIRST_FRAME, 1), (EMBED, 2), (X_T, 2)):
        token = torch.randn(len(split), steps, FRAMES, ROWS * COLUMNS, channels, generator=noise)
        inputs[name] = InputFeatures(token.mean(3, keepdim=True), token=token)
    return samples, inputs, labels


def plant(values: torch.Tensor, labels: np.ndarray) -> None:
    values += 4.0 * torch.from_numpy(labels).float() - 2.0


def test_a_planted_token_is_found_exactly_there():
    samples, inputs, labels = example()
    at = CELLS.index(Cell(4, 5, "cond", "f1r0c2"))
    plant(samples.features[:, at, 0, 1], labels[:, 0, 2])
    wrong = CELLS.index(Cell(0, 1, "cond", "f0r1c0"))
    plant(samples.features[:, wrong, 0, 1], labels[:, 0, 2])  # the label of another token is no evidence here
    found = read_token_labels(samples, inputs, labels, PENALTIES, draws=400)
    shown = np.argwhere((found.p_evidence <= 0.05).values)
    assert shown.tolist() == [[1, 1, POSITIONS.index("f1r0c2")]]
    cell = found.sel(step=4, layer=5, position="f1r0c2")
    assert cell.accuracy > 0.9 and cell.lower < cell.accuracy <= cell.upper and cell.skill > 0.7
    assert (int(cell.frame), int(cell.row), int(cell.column)) == (1, 0, 2)


@pytest.mark.parametrize("name", [NOISE, FIRST_FRAME, EMBED, X_T])
def test_what_an_input_of_the_same_token_shows_is_no_evidence(name):
    samples, inputs, labels = example(1)
    at = CELLS.index(Cell(4, 5, "cond", "f1r0c1"))
    plant(samples.features[:, at, 0, 1], labels[:, 0, 1])
    frame = 0 if name == FIRST_FRAME else 1  # the first frame counts wherever its image is
    plant(inputs[name].token[:, -1, frame, 1, 2], labels[:, 0, 1])
    found = read_token_labels(samples, inputs, labels, PENALTIES, draws=200)
    cell = found.sel(step=4, layer=5, position="f1r0c1")
    assert cell.p_permutation <= 0.05 < cell.p_evidence
    assert str(cell.reference_source.values) == name and cell.reference > 0.9
    assert float(cell.baseline_accuracy.sel(baseline=name)) == float(cell.reference)


def test_an_input_of_another_token_frame_or_step_does_not_count():
    samples, inputs, labels = example(2)
    plant(samples.features[:, CELLS.index(Cell(4, 5, "cond", "f1r0c1")), 0, 1], labels[:, 0, 1])
    for step, frame, token in ((1, 1, 2), (1, 0, 1), (0, 1, 1)):
        plant(inputs[X_T].token[:, step, frame, token, 2], labels[:, 0, 1])
    found = read_token_labels(samples, inputs, labels, PENALTIES, draws=200)
    assert float(found.p_evidence.sel(step=4, layer=5, position="f1r0c1")) <= 0.05


def test_tokens_whose_label_never_changes_have_no_probe():
    samples, inputs, labels = example(3)
    found = read_token_labels(samples, inputs, labels, PENALTIES, draws=50)
    never = (found.row == 1) & (found.column == 2)
    assert found.accuracy.isel(position=never).isnull().all() and found.accuracy.isel(position=~never).notnull().all()
    nowhere = read_token_labels(samples, inputs, np.zeros_like(labels), PENALTIES, draws=50)
    assert nowhere.accuracy.isnull().all() and nowhere.p_evidence.isnull().all()


def test_few_problems_have_no_p_and_the_guess_is_the_usual_label():
    samples, inputs, labels = example(4)
    few = np.flatnonzero((samples.split != "test") | (np.arange(len(samples)) >= len(samples) - 8))
    labels[:, 0, 0] = np.arange(len(labels)) % 10 == 9
    cut = {name: InputFeatures(one.whole[few], token=one.token[few]) for name, one in inputs.items()}
    found = read_token_labels(samples.rows(few), cut, labels[few], PENALTIES, draws=50)
    assert found.p_evidence.isnull().all() and found.attrs["n_test"] == 8
    rare = found.isel(step=0, layer=0).sel(position="f0r0c0")
    usual = 1 - labels[few][samples.split[few] == "validation"][:, 0, 0].mean()
    assert float(rare.validation_gain) == pytest.approx(float(rare.validation_accuracy) - usual)
    assert float(rare.baseline_accuracy.sel(baseline="guess")) == 1 - labels[few][-8:, 0, 0].mean()


def test_labels_and_samples_that_do_not_fit_are_refused():
    samples, inputs, labels = example()
    with pytest.raises(InputError, match=r"labels\[230, 2, 2\].*230, 2, 3"):
        read_token_labels(samples, inputs, labels[:, :, :2], PENALTIES)
    frames = replace(samples, cells=tuple(replace(c, position=str(i)) for i, c in enumerate(CELLS)))
    with pytest.raises(InputError, match=r"probe\.pooling: expected token"):
        read_token_labels(frames, inputs, labels, PENALTIES)
    bare = {name: InputFeatures(one.whole) for name, one in inputs.items()}
    with pytest.raises(InputError, match=r"input noise: expected its tokens"):
        read_token_labels(samples, bare, labels, PENALTIES)


def test_only_problems_with_one_right_answer_have_a_path():
    task = Maze()
    problems = [p for split, n in (("train", 40), ("validation", 16), ("test", 30)) for p in task.problems(split, n)]
    positions = [f"f0r{r}c{c}" for r in range(8) for c in range(8)]
    cells = tuple(Cell(0, 2, "cond", p) for p in positions)
    features = torch.randn(len(problems), 64, 1, 3, generator=torch.Generator().manual_seed(0))
    columns = {name: np.array([getattr(p, name) for p in problems]) for name in ("split", "key", "kind")}
    samples = ProbeSamples(features, cells, (), {}, columns["split"], columns["key"], columns["kind"])
    inputs = {X_T: InputFeatures(features[:, None, None, :1, 0], token=features[:, None, None, :, 0])}
    found = read_path(samples, inputs, task, problems, PENALTIES)
    assert found.attrs["n_test"] == 15 and found.sizes["position"] == 64
    inside = (found.row >= 1) & (found.row <= 5) & (found.column >= 1) & (found.column <= 5)
    assert found.accuracy.isel(position=~inside).isnull().all() and found.accuracy.isel(position=inside).notnull().any()
    choice = [i for i, p in enumerate(problems) if p.kind == "choice"]
    several = {X_T: InputFeatures(inputs[X_T].whole[choice], token=inputs[X_T].token[choice])}
    left = samples.rows(np.array(choice))
    assert read_path(left, several, task, [problems[i] for i in choice], PENALTIES) is None


def test_permutation_of_labels_that_differ_between_cells():
    """Predictions of -1 for every other token give the same counts with labels that are shared by all cells."""
    rng = np.random.default_rng(0)
    labels, column = rng.integers(0, 2, (40, 3)), np.array([0, 2, 2, 1, 0])
    predicted = rng.integers(0, 2, (5, 40))
    predicted[2] = labels[:, 2]
    spread = np.full((5, 40, 3), -1)
    spread[np.arange(5), :, column] = predicted
    keys = np.repeat(np.arange(20), 2)
    own = max_t_permutation(predicted, labels, keys, 300, 1, column)
    shared = max_t_permutation(spread, labels, keys, 300, 1)
    np.testing.assert_array_equal(own.p, shared.p)
    assert own.critical == shared.critical and own.p[2] <= 0.01
