"""Predictions and where they stand: the site axis, and samples without a label."""

from __future__ import annotations

import numpy as np
import pytest

from cosprobe.predictions import Evaluated, SplitPredictions
from cosprobe.types import EVERY_STEP, FIXED, SOURCES, Cell


def test_fixed_cells_serve_every_step_and_branch_of_their_place():
    moving = [Cell(t, s, b, p) for t in (0, 4) for s in ("7", "2", "embed") for b in ("cond", "uncond") for p in "ab"]
    still = [Cell(EVERY_STEP, site, "cond", place) for site in ("noise", "nuisance") for place in "ab"]
    cells = (*still[:2], *moving, *still[2:])
    evaluated = Evaluated(cells, ("x", "x"), ())
    assert (evaluated.steps, evaluated.layers) == ((0, 4), (2, 7))
    position, branches, places = evaluated.index()
    assert (branches, places) == (("cond", "uncond"), ("a", "b"))
    sites = ("2", "7", *SOURCES, *FIXED)
    assert position.shape == (2, len(sites), 2, 2)
    for (t, s, b, p), at in np.ndenumerate(position):
        step, site, branch, place = (0, 4)[t], sites[s], branches[b], places[p]
        moves = Cell(step, site, branch, place)
        stays = Cell(EVERY_STEP, site, "cond", place)
        expected = cells.index(moves) if moves in cells else cells.index(stays) if stays in cells else -1
        assert at == expected
    assert (position == -1).sum() == 4 * 8  # x_t, x0_latent, first_frame and prompt were not captured


def test_only_samples_that_carry_the_target_are_kept():
    labels = np.array([2, -1, 0, -1, 1])
    predicted, readout = np.arange(10).reshape(2, 5), np.arange(15).reshape(3, 5)
    split = SplitPredictions(labels, np.array(list("abcde")), predicted, readout, np.arange(5)).carried()
    assert split.labels.tolist() == [2, 0, 1]
    assert split.keys.tolist() == ["a", "c", "e"]
    assert split.predicted.tolist() == [[0, 2, 4], [5, 7, 9]]
    assert split.readout.tolist() == [[0, 2, 4], [5, 7, 9], [10, 12, 14]]
    assert split.drawn.tolist() == [0, 2, 4]
    regions = SplitPredictions(np.array([[0, 1], [-1, -1]]), np.array(["a", "b"]), np.zeros((1, 2, 2), int)).carried()
    assert regions.labels.tolist() == [[0, 1]]
    assert regions.readout is regions.drawn is None


def test_a_sample_with_labels_of_some_regions_is_refused():
    torn = SplitPredictions(np.array([[0, 1], [0, -1]]), np.array(["a", "b"]), np.zeros((1, 2, 2), int))
    with pytest.raises(ValueError, match="region labels: expected -1 in every region of a sample or in none"):
        torn.carried()
