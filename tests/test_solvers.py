from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge, RidgeClassifier

from cosprobe.solvers import curvature, design, fit_ridge, principal_axes, ridge, row_sums, spread, standardise
from cosprobe.tasks import Target

LAMBDAS = [0.01, 1.0]


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


def test_axes_of_repeated_rows_carry_no_rounding_noise(rng):
    x = torch.randn(1, 4, 30, generator=rng).repeat(1, 3, 1)
    axes = principal_axes(x)
    assert int((axes.variance > 0).sum()) == 3  # four distinct rows, centred
    assert axes.basis.isfinite().all()


@pytest.mark.parametrize(("rows", "width"), [(60, 10), (20, 50), (25, 25)])
def test_ridge_equals_sklearn_in_primal_and_dual_form(rng, rows, width):
    x = torch.randn(3, rows, width, generator=rng) + 1
    wanted = torch.randn(rows, 4, generator=rng)
    weight, bias = ridge(x, wanted, [0.5, 20.0])
    for cell in range(3):
        for i, alpha in enumerate([0.5, 20.0]):
            oracle = Ridge(alpha=alpha).fit(x[cell].numpy(), wanted.numpy())
            ours = x[cell] @ weight[cell, :, i] + bias[cell, i]
            assert np.allclose(ours.numpy(), oracle.predict(x[cell].numpy()), atol=1e-4)


@pytest.mark.parametrize("alphas", [[], [1.0, 0.0]])
def test_ridge_refuses_penalties_without_a_unique_solution(rng, alphas):
    with pytest.raises(ValueError, match="expected positive penalties"):
        ridge(torch.randn(1, 5, 2, generator=rng), torch.randn(5, 1, generator=rng), alphas)


@pytest.mark.parametrize("channels", [6, 40])
@pytest.mark.parametrize("form", ["candidate", "region", "problem"])
def test_ridge_probes_equal_sklearn_classifiers(rng, form, channels):
    samples, regions, classes = 50, 3, 3
    x = torch.randn(2, samples, regions, channels, generator=rng)
    shape = (samples, regions) if form == "region" else (samples,)
    labels = torch.randint(-1, classes, shape, generator=rng)
    target = Target("t", classes, form, "answer", ("a",))
    weight, bias = fit_ridge(x, {"t": labels}, (target,), LAMBDAS)["t"]
    rows = design(x, form).flatten(1, 2)
    if form == "candidate":
        keep = (labels >= 0).repeat_interleave(regions)
        y = torch.nn.functional.one_hot(labels.clamp(min=0), regions).flatten()
    else:
        keep, y = labels.flatten() >= 0, labels.flatten()
    for i, value in enumerate(LAMBDAS):
        alpha = value * int(keep.sum())
        oracle = RidgeClassifier(alpha=alpha).fit(rows[1][keep].numpy(), y[keep].numpy())
        ours = (rows[1] @ weight[1, :, i] + bias[1, i]).numpy()
        expected = oracle.decision_function(rows[1].numpy())
        assert np.allclose(ours[:, 0] if form == "candidate" else ours, expected, atol=1e-4)


def test_targets_on_the_same_rows_are_fitted_as_if_alone(rng):
    x = torch.randn(2, 30, 2, 5, generator=rng)
    targets = (Target("a", 2, "candidate", "answer", ("k",)), Target("b", 3, "region", "nuisance", ("k",)))
    labels = {
        "a": torch.randint(0, 2, (30,), generator=rng),
        "b": torch.randint(0, 3, (30, 2), generator=rng),
    }
    both = fit_ridge(x, labels, targets, LAMBDAS)
    for target in targets:
        alone = fit_ridge(x, labels, (target,), LAMBDAS)[target.name]
        assert torch.allclose(both[target.name][0], alone[0], atol=1e-6)


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
    labels = torch.tensor([0, -1, 2, 1, -1, 0])
    loss, correct, count = row_sums(values, labels)
    keep = labels >= 0
    for cell in range(2):
        logits = values[cell, keep, 0]
        expected = torch.nn.functional.cross_entropy(logits, labels[keep], reduction="sum")
        assert torch.allclose(loss[cell, 0], expected)
        assert correct[cell, 0] == (logits.argmax(1) == labels[keep]).sum()
    assert count == 4
