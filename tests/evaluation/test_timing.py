"""Latency, lag and depth of planted grids: what becomes readable where it was made readable."""

from __future__ import annotations

import numpy as np
import pytest

from cosprobe.evaluation.latency import latency
from cosprobe.evaluation.scoring import Resampling, Rows, timing

STEPS, LAYERS, SAMPLES = tuple(range(0, 16, 2)), (0, 1, 4, 5), 400
CHANCE = 0.25


def right_on(accuracy: np.ndarray, seed: int = 0) -> np.ndarray:
    """Right and wrong [row, sample] at these accuracies; every sample has its own threshold, shared by all rows."""
    return (np.random.default_rng(seed).permutation(SAMPLES) + 0.5 < SAMPLES * accuracy[:, None]).astype(float)


def climbing(at: float, ceiling: float = 0.9) -> np.ndarray:
    """Accuracy over STEPS that is half way up at step `at`, and at its ceiling two steps on."""
    return CHANCE + (ceiling - CHANCE) * np.clip((np.array(STEPS) - at + 2) / 4, 0, 1)


def world(layers: dict[int, np.ndarray], picture: np.ndarray, positions: int = 1, decoded=slice(None)):
    """Rows of a grid, those of x0-hat, and where there is evidence: layers of LAYERS without an entry stay at chance,
    then come the steps of the picture and the guess."""
    lines = np.stack([layers.get(n, np.full(len(STEPS), CHANCE)) for n in LAYERS], axis=1)  # step layer
    right = np.concatenate([right_on(np.concatenate([lines.ravel(), picture])), np.full((1, SAMPLES), CHANCE)])
    layer = np.arange(lines.size).reshape(*lines.shape, 1, 1).repeat(positions, axis=3)
    x0 = np.full((len(STEPS), 1, positions), -1)
    x0[decoded] = (lines.size + np.arange(len(STEPS)))[decoded][:, None, None]
    found = (lines > CHANCE + 0.1)[..., None, None].repeat(positions, axis=3)
    guess = {"uniform": np.full_like(x0, len(right) - 1)}
    return Rows(right, np.arange(SAMPLES), layer, guess, STEPS, LAYERS), x0, found


def timed(rows: Rows, x0: np.ndarray, found: np.ndarray, draws: int = 50) -> dict[str, np.ndarray]:
    table = timing(rows, x0, found, "uniform", Resampling(draws, 0))
    for name, (axes, values) in table.items():
        assert len(axes) == values.ndim, name
    return {name: values for name, (_, values) in table.items()}


def test_a_layer_has_the_latency_it_was_given_and_the_picture_its_own():
    found = timed(*world({1: climbing(3), 4: climbing(7, ceiling=0.5), 5: climbing(7)}, climbing(9)))
    assert found["latency"].shape == (4, 1, 1)
    np.testing.assert_allclose(found["latency"].ravel(), [np.nan, 3, 7, 7], atol=0.3)
    np.testing.assert_allclose(found["x0_latency"].ravel(), [9], atol=0.3)
    np.testing.assert_allclose(found["lag"].ravel(), [np.nan, 6, 2, 2], atol=0.5)
    for name in ("latency", "x0_latency", "lag"):
        known = np.isfinite(found[name])
        assert (found[f"{name}_lower"][known] <= found[name][known] + 1e-9).all()
        assert (found[f"{name}_upper"][known] >= found[name][known] - 1e-9).all()
    assert (found["lag_lower"].ravel()[1:] > 0).all()
    assert not found["latency_censored"].any()


def test_a_picture_that_shows_it_first_gives_a_negative_lag():
    found = timed(*world({5: climbing(9)}, climbing(5)))
    assert found["lag"].ravel()[3] == pytest.approx(-4, abs=0.5)
    assert found["lag_upper"].ravel()[3] < 0


def test_what_is_there_from_the_start_is_at_most_the_first_step():
    found = timed(*world({4: np.full(len(STEPS), 0.9), 5: climbing(5)}, climbing(9)))
    assert found["latency"].ravel()[2] == STEPS[0]
    np.testing.assert_array_equal(found["latency_censored"].ravel(), [False, False, True, False])
    assert not found["x0_latency_censored"]
    clear = timed(*world({5: climbing(5)}, np.full(len(STEPS), 0.9)))
    assert clear["x0_latency_censored"]
    assert not clear["latency_censored"].any()


def test_depth_is_the_layer_where_each_step_gets_half_way():
    early, late = np.where(np.array(STEPS) < 6, CHANCE, 0.9), np.full(len(STEPS), 0.9)
    found = timed(*world({1: early, 4: late, 5: late}, climbing(9)))
    assert found["depth"].shape == (len(STEPS), 1, 1)
    depth = found["depth"].ravel()
    np.testing.assert_allclose(depth[:3], 2.5, atol=0.2)  # half way from layer 1 to layer 4
    np.testing.assert_allclose(depth[3:], 0.5, atol=0.1)  # half way from layer 0 to layer 1
    assert (found["depth_lower"].ravel() <= depth + 1e-9).all()


def test_without_evidence_there_is_no_timing():
    rows, x0, found = world({1: climbing(3)}, climbing(9))
    nothing = timed(rows, x0, np.zeros_like(found))
    for name, values in nothing.items():
        assert np.isnan(values).all() if values.dtype == float else not values.any(), name
    one = timed(rows, x0, found)
    assert np.isfinite(one["latency"].ravel()).tolist() == [False, True, False, False]
    assert np.isnan(one["depth"].ravel()).tolist() == [not f.any() for f in found]


def test_steps_that_were_not_decoded_are_skipped_and_no_picture_gives_no_lag():
    decoded = [0, 3, 4, 7]
    rows, x0, found = world({1: climbing(3)}, climbing(7), decoded=decoded)
    some = timed(rows, x0, found)
    assert some["x0_latency"].item() == pytest.approx(7, abs=0.3)
    at = [STEPS[i] for i in decoded]
    line = rows.right[x0[decoded, 0, 0]][None]
    alone = latency(line, np.full((1, SAMPLES), CHANCE), at, np.arange(SAMPLES), np.array([True]), 50, 0)
    assert some["x0_latency"].item() == pytest.approx(alone.value[0], rel=1e-12)  # sums in another order
    assert some["x0_latency_lower"].item() == pytest.approx(alone.lower[0], rel=1e-12)
    none = timed(rows, np.full_like(x0, -1), found)
    assert np.isnan(none["x0_latency"]).all()
    assert np.isnan(none["lag"]).all()
    assert np.isfinite(none["latency"].ravel()[1])


def test_every_position_is_compared_with_its_own_picture():
    rows, x0, found = world({1: climbing(3), 4: climbing(9)}, climbing(7), positions=2)
    rows.layer[:, 1, :, 1] = rows.layer[:, 2, :, 0]  # at the second position layer 1 is as late as layer 4
    both = timed(rows, x0, found)
    np.testing.assert_allclose(both["latency"][1, 0], [3, 9], atol=0.3)
    np.testing.assert_allclose(both["lag"][1, 0], [4, -2], atol=0.5)
    x0[:-1, 0, 1] = x0[0, 0, 0]  # and its picture shows nothing until the end
    later = timed(rows, x0, found)
    assert later["x0_latency"][0, 1] == pytest.approx(13, abs=0.3)
    assert later["lag"][1, 0, 1] == pytest.approx(4, abs=0.5)
    assert later["lag"][1, 0, 0] == both["lag"][1, 0, 0]
