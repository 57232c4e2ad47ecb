"""Predictions and where they stand: the axes of the grid, and samples without a label."""

from __future__ import annotations

import numpy as np
import pytest

from cosprobe.cells import Cell
from cosprobe.evaluation.predictions import Evaluated, SplitPredictions


def test_every_layer_stands_at_its_step_branch_and_position():
    cells = [Cell(t, n, b, p) for t in (0, 4) for n in (7, 2) for b in ("cond", "uncond") for p in "ba"]
    cells = tuple(cell for i, cell in enumerate(cells[::-1]) if i != 3)  # one was not captured
    evaluated = Evaluated(cells, ("x", "x"), ())
    assert (evaluated.steps, evaluated.layers) == ((0, 4), (2, 7))
    assert (evaluated.branches, evaluated.positions) == (("uncond", "cond"), ("a", "b"))  # in order of appearance
    index = evaluated.index()
    assert index.shape == (2, 2, 2, 2)
    for (t, n, b, p), at in np.ndenumerate(index):
        cell = Cell((0, 4)[t], (2, 7)[n], ("uncond", "cond")[b], "ab"[p])
        assert at == (cells.index(cell) if cell in cells else -1)
    assert (index == -1).sum() == 1


def test_only_samples_that_carry_the_target_are_kept():
    labels = np.array([2, -1, 0, -1, 1])
    predicted, x0_parsed = np.arange(10).reshape(2, 5), np.arange(15).reshape(3, 5)
    inputs = {"embed": np.arange(15).reshape(3, 1, 5)}  # step position sample
    whole = SplitPredictions(labels, np.array(list("abcde")), predicted, x0_parsed, np.arange(5), inputs)
    split = whole.carried()
    assert split.labels.tolist() == [2, 0, 1]
    assert split.keys.tolist() == ["a", "c", "e"]
    assert split.predicted.tolist() == [[0, 2, 4], [5, 7, 9]]
    assert split.x0_parsed.tolist() == [[0, 2, 4], [5, 7, 9], [10, 12, 14]]
    assert split.model_answer.tolist() == [0, 2, 4]
    assert split.inputs["embed"].tolist() == [[[0, 2, 4]], [[5, 7, 9]], [[10, 12, 14]]]
    rows = np.array([[0, 1], [-1, -1]])
    named = {"embed": np.arange(4).reshape(1, 1, 2, 2)}
    regions = SplitPredictions(rows, np.array(["a", "b"]), np.zeros((1, 2, 2), int), inputs=named).carried()
    assert regions.labels.tolist() == [[0, 1]]
    assert regions.inputs["embed"].tolist() == [[[[0, 1]]]]
    assert regions.x0_parsed is regions.model_answer is None


def test_a_sample_with_labels_of_some_regions_is_refused():
    torn = SplitPredictions(np.array([[0, 1], [0, -1]]), np.array(["a", "b"]), np.zeros((1, 2, 2), int))
    with pytest.raises(ValueError, match="region.*-1"):
        torn.carried()
