"""Temperatures and calibration errors against scipy, scikit-learn and torchmetrics, and on simulated forecasters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from cosprobe.probes.calibration import brier, ece, reliability, temperatures


def forecaster(rows: int, out: int, seed: int, temperature: float = 1.0, cells: int = 1):
    """Decision values of cells that are calibrated at this temperature, and the labels drawn from the first of them."""
    rng = torch.Generator().manual_seed(seed)
    truth = 1.5 * torch.randn(1, rows, out, generator=rng, dtype=torch.float64)
    labels = torch.multinomial(truth[0].softmax(-1), 1, generator=rng)[:, 0]
    return (truth * temperature).expand(cells, -1, -1), labels


def loss(decision: np.ndarray, labels: np.ndarray, log_t: float) -> float:
    """Cross-entropy to labels of which one in len(labels) + 1 is uniform."""
    count, classes = decision.shape
    wanted = (count * np.eye(classes)[labels] + 1 / classes) / (count + 1)
    return -(wanted * log_softmax(decision / np.exp(log_t), axis=-1)).sum(axis=-1).mean()


def test_temperature_is_the_minimum_scipy_finds():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 150)
    scale = np.geomspace(0.1, 12, 30)  # hot, cold, and some near the bounds
    decision = scale[:, None, None] * (rng.normal(size=(30, 150, 4)) + 1.2 * np.eye(4)[labels])
    found = temperatures(torch.from_numpy(decision), torch.from_numpy(labels))
    bounds = (np.log(0.05), np.log(20))
    for cell, t in zip(decision, found.tolist(), strict=True):
        oracle = minimize_scalar(
            lambda s, c=cell: loss(c, labels, s), bounds=bounds, method="bounded", options={"xatol": 1e-9}
        )
        assert np.log(t) == pytest.approx(oracle.x, abs=1e-4)
        assert loss(cell, labels, np.log(t)) <= oracle.fun + 1e-12


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0, 8.0])
def test_an_overconfident_forecaster_gets_its_temperature_back(temperature):
    decision, labels = forecaster(20_000, 4, seed=1, temperature=temperature)
    found = temperatures(decision, labels)
    assert float(found) == pytest.approx(temperature, rel=0.03)
    calm, before = ece((decision / found[:, None, None]).softmax(-1), labels), ece(decision.softmax(-1), labels)
    assert float(calm) < 0.012
    assert float(before) > 0.05 or temperature == 1.0


def test_temperatures_stay_within_bounds():
    labels = torch.arange(40) % 4
    right = 3.0 * torch.eye(4)[labels]
    decision = torch.stack([right, -right, torch.zeros(40, 4), 5 + torch.zeros(40, 4), 1e-4 * right, -1e4 * right])
    found = temperatures(decision, labels)
    share = (40 + 1 / 4) / 41  # what the wanted probability of a row is that is always right
    sure = 3 / np.log(3 * share / (1 - share))
    np.testing.assert_allclose(found, [sure, 20, 1, 1, 0.05, 20], rtol=1e-6)
    assert found.dtype == torch.float32


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(0.4, 2.5))
def test_temperature_follows_the_scale_and_ignores_shifts_order_and_missing_labels(seed, scale):
    decision, labels = forecaster(60, 3, seed, temperature=1.2)
    plain = float(temperatures(decision, labels))
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(60, generator=rng)
    shifted = decision + torch.randn(60, 1, generator=rng)
    assert float(temperatures(shifted[:, order], labels[order])) == pytest.approx(plain, rel=1e-6)
    if 0.2 < plain < 5:
        assert float(temperatures(scale * decision, labels)) == pytest.approx(scale * plain, rel=1e-6)
    padded = torch.cat([decision, 9 * torch.randn(1, 20, 3, generator=rng, dtype=torch.float64)], dim=1)
    missing = torch.cat([labels, torch.full((20,), -1)])
    assert float(temperatures(padded, missing)) == pytest.approx(plain, rel=1e-9)
    for score in (ece, brier):
        assert float(score(padded.softmax(-1), missing)) == pytest.approx(float(score(decision.softmax(-1), labels)))


def sweep(confidence: np.ndarray, right: np.ndarray) -> float:
    """Algorithm 1 of Roelofs et al., one cell, no two confidences equal."""
    order, n = np.argsort(confidence), len(right)
    confidence, right = confidence[order], right[order]
    parts = [np.arange(n)]
    for bins in range(2, n + 1):
        new = [np.arange(n * i // bins, n * (i + 1) // bins) for i in range(bins)]
        if any(right[b].mean() < right[a].mean() for a, b in zip(new, new[1:], strict=False)):
            break
        parts = new
    return sum(len(part) / n * abs(right[part].mean() - confidence[part].mean()) for part in parts)


def test_ece_is_the_sweep_cell_by_cell():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 47)
    strength = np.linspace(0, 6, 40)[:, None, None]
    decision = rng.normal(size=(40, 47, 3)) + strength * np.eye(3)[labels]
    decision[0] = 4 * np.eye(3)[labels] * np.linspace(1, 2, 47)[:, None]  # always right
    decision[1] = np.where(np.arange(47)[:, None] < 20, -1, 1) * np.eye(3)[labels] * np.linspace(2, 1, 47)[:, None]
    p = torch.from_numpy(decision).softmax(-1)
    expected = [sweep(cell.max(1), (cell.argmax(1) == labels) * 1.0) for cell in p.numpy()]
    np.testing.assert_allclose(ece(p, torch.from_numpy(labels)), expected, atol=1e-12)


def test_one_bin_is_the_calibration_error_of_torchmetrics():
    """Where accuracy falls with confidence only one bin is left, and then every estimator is the same."""
    confidence = torch.linspace(0.4, 0.9, 30)
    p = torch.stack([confidence, (1 - confidence) / 2, (1 - confidence) / 2], dim=1)
    labels = (torch.arange(30) >= 15).long()  # right below, wrong above
    expected = multiclass_calibration_error(p, labels, num_classes=3, n_bins=1, norm="l1")
    assert float(ece(p[None], labels)) == pytest.approx(float(expected), abs=1e-6)


def test_reliability_gives_torchmetrics_error_where_its_bins_hold_equally_many():
    width = torch.linspace(0, 1, 11)
    confidence = torch.cat([torch.linspace(a + 0.01, a + 0.09, 9) for a in width[5:10].tolist()])
    p = torch.stack([confidence, 1 - confidence], dim=1)
    labels = (torch.rand(45, generator=torch.Generator().manual_seed(3)) > 0.8).long()
    curve = reliability(p, labels, bins=5)
    assert curve.count.tolist() == [9] * 5
    error = float(((curve.accuracy - curve.confidence).abs() * curve.count / 45).sum())
    expected = multiclass_calibration_error(p, labels, num_classes=2, n_bins=10, norm="l1")
    assert error == pytest.approx(float(expected), abs=1e-6)
    right = (p.argmax(1) == labels).numpy()
    accuracy, mean = calibration_curve(right, p.max(1).values.numpy(), n_bins=5, strategy="quantile")
    np.testing.assert_allclose(curve.accuracy, accuracy, atol=1e-6)
    np.testing.assert_allclose(curve.confidence, mean, atol=1e-6)


def test_equal_confidences_are_one_group_in_any_order():
    p = torch.full((1, 40, 2), 0.5) + torch.tensor([0.2, -0.2])
    labels = (torch.arange(40) >= 28).long()  # right on 28 of 40
    for order in (torch.arange(40), torch.arange(39, -1, -1)):
        assert float(ece(p, labels[order])) == pytest.approx(0.0, abs=1e-6)
        np.testing.assert_allclose(reliability(p[0], labels[order], bins=4).accuracy, [0.7] * 4, atol=1e-6)


def fixed_bins(p: torch.Tensor, labels: torch.Tensor, bins: int) -> float:
    curve = reliability(p, labels, bins)
    return float(((curve.accuracy - curve.confidence).abs() * curve.count / curve.count.sum()).sum())


def test_the_error_of_a_calibrated_forecaster_is_as_near_zero_as_documented():
    few, many, fixed = [], [], []
    for seed in range(20):
        (d, labels), (more, truth) = forecaster(100, 4, seed), forecaster(2000, 4, seed)
        few.append(float(ece(d.softmax(-1), labels)))
        many.append(float(ece(more.softmax(-1), truth)))
        fixed.append(fixed_bins(d[0].softmax(-1), labels, 15))
    assert np.mean(few) == pytest.approx(0.06, abs=0.01)
    assert np.mean(many) == pytest.approx(0.02, abs=0.005)
    assert np.mean(fixed) == pytest.approx(0.14, abs=0.01)


def test_brier_is_that_of_sklearn():
    rng = np.random.default_rng(0)
    for out in (2, 5):
        labels = rng.integers(0, out, 80)
        p = torch.from_numpy(rng.dirichlet(np.ones(out), (3, 80)))
        expected = [brier_score_loss(labels, cell.numpy(), scale_by_half=False, labels=np.arange(out)) for cell in p]
        np.testing.assert_allclose(brier(p, torch.from_numpy(labels)), expected, atol=1e-12)
    labels = torch.tensor([0, 1, 2])
    scores = brier(torch.stack([torch.eye(3), torch.full((3, 3), 1 / 3), torch.eye(3)[[1, 2, 0]]]), labels)
    np.testing.assert_allclose(scores, [0, 2 / 3, 2], atol=1e-6)


def test_bad_input_is_named():
    p, labels = torch.full((2, 4, 3), 1 / 3), torch.tensor([0, 1, 2, -1])
    for score in (temperatures, ece, brier):
        with pytest.raises(ValueError, match="labels.*4 rows.*1"):
            score(p, torch.full((4,), -1))
        with pytest.raises(ValueError, match="labels.*3.*-1 to 2"):
            score(p, labels + 1)
    for score in (ece, brier):
        for wrong in (3 * p, p - 1, p * torch.nan):
            with pytest.raises(ValueError, match="probabilities.*0.*1"):
                score(wrong, labels)
    with pytest.raises(ValueError, match="decision.*finite"):
        temperatures(p / 0, labels)
    for bins in (0, 4):
        with pytest.raises(ValueError, match=f"bins={bins}.*1 to 3"):
            reliability(p[0], labels, bins)
