from __future__ import annotations

import re

import pytest
import torch

from cosprobe.probes.linalg import (
    Chosen,
    best_penalty,
    blocks,
    check_penalties,
    curvature,
    design,
    principal_axes,
    row_sums,
    spread,
    standardise,
    turned,
)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_standardised_features_have_unit_spread_and_constant_channels_are_zero_on_any_data(rng):
    features = torch.randn(40, 3, 2, 5, generator=rng) * 7 + 3
    features[..., 4] = 0.1  # not a binary fraction: its fp32 mean is inexact
    mean, std = spread(features)
    x = standardise(features, mean, std)
    assert torch.allclose(x[..., :4].mean((1, 2)), torch.zeros(3, 4), atol=1e-5)
    assert torch.allclose(x[..., :4].square().mean((1, 2)), torch.ones(3, 4), atol=1e-4)
    assert (std[:, 4] == 0).all()
    assert (standardise(features + 1, mean, std)[..., 4] == 0).all()


def test_bf16_features_are_standardised_in_fp32(rng):
    features = torch.randn(30, 2, 1, 4, generator=rng).bfloat16()
    assert standardise(features, *spread(features)).dtype == torch.float32


def test_design_of_problems_puts_the_regions_side_by_side(rng):
    x = torch.randn(2, 5, 3, 4, generator=rng)
    joint = design(x, "problem")
    assert joint.shape == (2, 5, 1, 12)
    assert torch.equal(joint[:, :, 0, 4:8], x[:, :, 1])
    assert design(x, "region") is x


@pytest.mark.parametrize(("rows", "width"), [(30, 8), (8, 30), (12, 12)])
def test_principal_axes_rebuild_the_rows_and_decorrelate_them(rng, rows, width):
    x = torch.randn(3, rows, width, generator=rng) + 2
    axes = principal_axes(x)
    coordinates = (x - axes.mean[:, None]) @ axes.basis
    assert axes.basis.shape == (3, width, min(rows, width))
    assert torch.allclose(coordinates @ axes.basis.mT + axes.mean[:, None], x, atol=1e-4)
    covariance = coordinates.mT @ coordinates / rows
    assert torch.allclose(covariance, torch.diag_embed(axes.variance), atol=1e-4)


@pytest.mark.parametrize(("rows", "width"), [(30, 8), (8, 30), (12, 12)])
def test_rows_are_turned_into_their_principal_axes_and_weights_there_and_back(rng, rows, width):
    x = torch.randn(3, rows, width, generator=rng).double() + 2
    turn, axes = turned(x), principal_axes(x)
    assert torch.allclose(turn.variance, axes.variance, atol=1e-9)
    assert torch.allclose(turn.coordinates.square().mean(dim=2), axes.variance, atol=1e-9)
    weight = torch.randn(3, turn.coordinates.shape[1], 2, generator=rng).double()
    weight[turn.variance == 0] = 0  # of axes that carry nothing
    assert torch.allclose(turn.into(turn.back(weight)), weight)
    assert torch.allclose((x - turn.mean[:, None]) @ turn.back(weight), turn.coordinates.mT @ weight)


def test_axes_of_repeated_rows_carry_no_rounding_noise(rng):
    x = torch.randn(1, 4, 30, generator=rng).repeat(1, 3, 1)
    axes = principal_axes(x)
    assert int((axes.variance > 0).sum()) == 3  # four distinct rows, centred
    assert axes.basis.isfinite().all()


def test_axes_of_fp64_rows_keep_what_fp32_could_not(rng):
    """Axes of a ten-thousandth of the largest spread survive in the dual form."""
    x = torch.randn(1, 10, 30, generator=rng).double() * torch.logspace(0, -4, 10)[:, None]
    single, double = principal_axes(x.float()), principal_axes(x)
    assert (single.basis.dtype, double.basis.dtype) == (torch.float32, torch.float64)
    assert int((double.variance > 0).sum()) == 9
    assert int((single.variance > 0).sum()) < 9
    assert torch.allclose((x - double.mean[:, None]) @ double.basis @ double.basis.mT + double.mean[:, None], x)


def test_the_best_penalty_is_right_most_often_and_ties_go_to_the_lower_loss():
    right = torch.tensor([[3, 5, 5], [9, 1, 1], [2, 2, 2]])
    loss = torch.tensor([[0.1, 0.9, 0.4], [9.0, 0.0, 0.0], [0.5, 0.5, 0.7]])
    best = best_penalty(right, loss)
    assert best.tolist() == [2, 0, 0]
    weight, bias = torch.arange(18.0).view(3, 2, 3, 1), torch.arange(9.0).view(3, 3, 1)
    chosen = Chosen.of(weight, bias, [0.1, 1.0, 10.0], best)
    assert torch.equal(chosen.weights[:, :, 0], torch.tensor([[2.0, 5.0], [6.0, 9.0], [12.0, 15.0]]))
    assert torch.equal(chosen.biases[:, 0], torch.tensor([2.0, 3.0, 6.0]))
    assert torch.allclose(chosen.penalties, torch.tensor([10.0, 0.1, 0.1]))


@pytest.mark.parametrize(("numbers", "sizes"), [(1, [7]), (2**24, [2, 2, 2, 1]), (2**30, [1] * 7)])
def test_blocks_cover_all_cells_within_the_memory(numbers, sizes):
    parts = list(blocks(7, numbers))
    assert [part.stop - part.start for part in parts] == sizes
    assert [i for part in parts for i in range(7)[part]] == list(range(7))


@pytest.mark.parametrize("penalties", [[], [1.0, 0.0], [-1.0]])
def test_penalties_must_be_positive(penalties):
    with pytest.raises(ValueError, match=f"{re.escape(f'penalties={penalties}')}.*above 0"):
        check_penalties(penalties)


@pytest.mark.parametrize("form", ["candidate", "problem"])
def test_curvature_bounds_the_hessian(rng, form):
    """The largest eigenvalue of Hessian - h * outer products is never positive, at any weights."""
    samples, regions, width, classes = 12, 3, 4, 3
    x = torch.randn(samples, regions, width, generator=rng).double()
    y = torch.randint(0, classes, (samples,), generator=rng)
    rows = x if form == "candidate" else x[:, :1]

    def loss(w: torch.Tensor) -> torch.Tensor:
        logits = rows @ w if form == "candidate" else rows[:, 0] @ w.view(width, classes)
        return torch.nn.functional.cross_entropy(logits, y)

    outer = torch.einsum("nrw,nrv->wv", rows, rows) / rows[..., 0].numel()
    bound = curvature(form, regions) * (outer if form == "candidate" else torch.kron(outer, torch.eye(classes)))
    for scale in (0.0, 1.0, 5.0):
        size = width if form == "candidate" else width * classes
        w = scale * torch.randn(size, generator=rng).double()
        hessian = torch.autograd.functional.hessian(loss, w)
        assert torch.linalg.eigvalsh(hessian - bound).max() < 1e-9


def test_row_sums_leave_out_rows_without_a_label(rng):
    values = torch.randn(2, 6, 1, 3, generator=rng)
    labels = torch.tensor([0, -1, 2, 1, -1, 2])
    loss, correct, count = row_sums(values, labels)
    keep = labels >= 0
    for cell in range(2):
        logits = values[cell, keep, 0]
        expected = torch.nn.functional.cross_entropy(logits, labels[keep], reduction="sum")
        assert torch.allclose(loss[cell, 0], expected)
        assert correct[cell, 0] == (logits.argmax(1) == labels[keep]).sum()
    assert count == 4
    assert (row_sums(torch.zeros_like(values), labels)[1] == 1).all()  # of equals the first: label 0, once
