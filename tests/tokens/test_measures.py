"""Measures of tokens against states that are known exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cosprobe.activations import Pooling, capture
from cosprobe.models.pipelines import block_list, sample
from cosprobe.tokens.measures import MASSIVE, colour_range, measure_layer, path_contrast
from cosprobe.tokens.run import _measured
from tests.examples.pipelines import CONFIG, PROMPT, wan

SIZE = (2, 2, 3)


def states(seed=0, steps=4, channels=8):
    return torch.randn(steps, int(np.prod(SIZE)), channels, generator=torch.Generator().manual_seed(seed))


def test_against_plain_formulas():
    x = states()
    found = measure_layer(x, SIZE)
    assert found.energy.dims == ("step", "frame", "row", "column") and found.energy.shape == (4, *SIZE)
    for step, frame, row, column in np.ndindex(found.energy.shape):
        token = x[step, (frame * 2 + row) * 3 + column].double().numpy()
        last = x[-1, (frame * 2 + row) * 3 + column].double().numpy()
        at = (step, frame, row, column)
        np.testing.assert_allclose(found.energy.values[at], np.sqrt((token**2).mean()), rtol=1e-5)
        np.testing.assert_allclose(found.channel_variance.values[at], token.var(), rtol=1e-5)
        cosine = token @ last / np.linalg.norm(token) / np.linalg.norm(last)
        np.testing.assert_allclose(found.cosine.values[at], cosine, atol=1e-6)
        before = x[step, row * 3 + column].double().numpy()
        change = np.nan if frame == 0 else np.sqrt(((token - before) ** 2).mean())
        np.testing.assert_allclose(found.temporal_energy.values[at], change, rtol=1e-5)


def test_components_are_those_of_a_singular_value_decomposition():
    x = states(1, channels=5) * torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5])
    found = measure_layer(x, SIZE)
    rows = x.flatten(0, 1).double().numpy()
    _, values, axes = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    expected = (rows - rows.mean(axis=0)) @ axes[:3].T
    flat = found.components.values.reshape(-1, 3)
    np.testing.assert_allclose(np.abs(flat), np.abs(expected), atol=1e-4)
    np.testing.assert_allclose(found.explained.values, values[:3] ** 2 / (values**2).sum(), rtol=1e-4)


def test_fewer_channels_than_components_leave_the_rest_at_zero():
    found = measure_layer(states(2, channels=2), SIZE)
    assert found.components.shape[-1] == 3 and (found.components.values[..., 2] == 0).all()
    assert found.explained.values[2] == 0 and found.explained.values.sum() == pytest.approx(1)


def test_massive_activations_are_counted_and_not_cut():
    x = states(3).clamp(-2, 2)
    x[1, 4, 2] = 5000.0
    x[1, 4, 6] = -5000.0
    found = measure_layer(x, SIZE)
    count = found.massive_channels.values
    assert count.sum() == count[1, 0, 1, 1] == 2
    median = x[1].abs().median()
    assert (
        found.largest.values[1] == pytest.approx(float(5000 / median), rel=1e-5) and found.largest.values[0] < MASSIVE
    )
    assert found.energy.values[1, 0, 1, 1] > 1000
    low, high = colour_range(found.energy.values, count > 0)
    usual = found.energy.values[count == 0]
    assert (low, high) == pytest.approx(tuple(np.quantile(usual, (0.01, 0.99)))) and high < 3


def test_a_colour_range_is_never_empty():
    heavy = np.array([True, True, True, False])
    assert colour_range(np.array([1.0, 2.0, 3.0, 100.0]), heavy)[1] > 50  # most tokens are massive: all of them count
    assert colour_range(np.full(4, 7.0), ~heavy) == (6.5, 7.5)
    assert colour_range(np.full(4, np.nan), heavy) == (0.0, 1.0)


def test_the_contrast_of_the_path_leaves_the_first_frame_and_the_walls_out():
    path = np.array([[True, False, False], [False, False, False]])
    workspace = np.array([[True, True, False], [True, False, False]])
    energy = np.ones((1, 2, 3, 2, 3))
    energy[:, 1, 1:, 0, 0] = 2.0  # on the path, in later frames
    energy[:, :, 0] = 50.0 * np.arange(1, 7).reshape(2, 3)  # the first frame
    energy[:, :, 1:, 1, 1:] = 1e6  # walls
    np.testing.assert_allclose(path_contrast(energy, path, workspace), [[0.0, np.log(2)]], atol=1e-12)


def test_tokens_of_a_run_whose_blocks_are_known():
    """Every block gives a(token, layer) u + b(step) v with orthogonal unit vectors u and v of the channels."""
    pipeline = wan()
    width = pipeline.transformer.config.num_attention_heads * pipeline.transformer.config.attention_head_dim
    u, v = torch.zeros(width), torch.zeros(width)
    u[0::2], v[1::2] = (width / 2) ** -0.5, (width / 2) ** -0.5
    b = [3.0, 2.0, 1.0]

    def known(layer):
        calls = []

        def hook(module, args, output):
            calls.append(None)
            token = torch.arange(output.shape[1], dtype=torch.float32) + 1
            return ((layer + 1) * token[:, None] * u + b[len(calls) - 1] * v).expand_as(output)

        return hook

    handles = [block.register_forward_hook(known(i)) for i, block in enumerate(block_list(pipeline))]
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    try:
        with capture(pipeline, ["0", "2", "embed"], Pooling("token")) as cache:
            sample(pipeline, CONFIG, images, [PROMPT] * 2, [1, 2])
    finally:
        for handle in handles:
            handle.remove()
    found = _measured(cache, 1)
    assert found.layer.values.tolist() == ["embed", "0", "2"] and found.step.values.tolist() == [0, 1, 2]
    frames, rows, columns = (found.sizes[axis] for axis in ("frame", "row", "column"))
    assert frames == 2
    token = np.arange(frames * rows * columns, dtype=float).reshape(frames, rows, columns) + 1
    for layer, scale in (("0", 1.0), ("2", 3.0)):
        one = found.sel(layer=layer)
        a = scale * token
        for step, own in enumerate(b):
            length = np.sqrt(a**2 + own**2)
            np.testing.assert_allclose(one.energy.values[step], length / np.sqrt(width), rtol=1e-5)
            cosine = (a**2 + own * b[-1]) / (length * np.sqrt(a**2 + b[-1] ** 2))
            np.testing.assert_allclose(one.cosine.values[step], cosine, atol=1e-5)
            change = scale * rows * columns / np.sqrt(width)
            np.testing.assert_allclose(one.temporal_energy.values[step, 1], change, rtol=1e-4)
        assert np.isnan(one.temporal_energy.values[:, 0]).all()
        np.testing.assert_allclose(one.explained.values[:2].sum(), 1, atol=1e-5)
        spread = np.array([scale**2 * token.var(), np.var(b)])
        np.testing.assert_allclose(one.explained.values[:2], spread / spread.sum(), atol=1e-4)
        first = one.components.values[..., 0]
        np.testing.assert_allclose(first - first.mean(), np.broadcast_to(a - a.mean(), first.shape), atol=1e-3)
