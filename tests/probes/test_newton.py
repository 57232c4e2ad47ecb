from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from cosprobe.cells import Cell
from cosprobe.errors import InputError
from cosprobe.probes.linalg import affine, classes_last, design, row_sums
from cosprobe.probes.newton import Certificate, NewtonFit, fit_newton, newton_targets, relative_gaps, shortfall
from cosprobe.tasks import Target

PENALTIES = [0.003, 1.0, 0.05]  # not in the order they are solved in
DATA = st.integers(0, 2**31)


def target(form: str, classes: int = 3) -> Target:
    return Target("t", classes, form, "answer", ("a",))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cells(seed: int, samples: int = 60, count: int = 3, regions: int = 3, channels: int = 5) -> torch.Tensor:
    rng = generator(seed)
    x = torch.randn(count, samples, regions, channels, generator=rng, dtype=torch.float64)
    x = x @ torch.randn(channels, channels, generator=rng, dtype=torch.float64)
    return (x - x.mean(dim=(1, 2), keepdim=True)) / x.std(dim=(1, 2), keepdim=True)


def draw_labels(seed: int, form: str, samples: int = 60, regions: int = 3, classes: int = 3) -> torch.Tensor:
    """Every class occurs, and some rows carry nothing."""
    shape = (samples, regions) if form == "region" else (samples,)
    labels = torch.randint(-1, regions if form == "candidate" else classes, shape, generator=generator(seed + 1))
    labels.view(-1)[:classes] = torch.arange(classes)
    return labels


def objective(
    x: torch.Tensor, labels: torch.Tensor, form: str, value: float, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Written out from its definition for one cell, in the original coordinates."""
    rows = design(x[None], form)[0]
    logits = rows @ weight + bias
    logits = logits[..., 0] if form == "candidate" else logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=-1)
    return loss + value / 2 * weight.square().sum()


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("channels", [5, 60])
@pytest.mark.parametrize("form", ["region", "problem"])
def test_decision_values_equal_sklearn(form, channels, classes):
    x, labels = cells(0, channels=channels), draw_labels(0, form, classes=classes)
    found = fit_newton(x, labels, target(form, classes), PENALTIES)
    assert found.converged.all()
    rows, keep = design(x, form).flatten(1, 2), labels.flatten() >= 0
    for cell in range(len(x)):
        for i, value in enumerate(PENALTIES):
            strength = (2 if classes == 2 else 1) / (value * int(keep.sum()))
            oracle = LogisticRegression(C=strength, solver="newton-cholesky", max_iter=2000, tol=1e-10)
            oracle.fit(rows[cell][keep].numpy(), labels.flatten()[keep].numpy())
            values = (rows[cell] @ found.weight[cell, :, i] + found.bias[cell, i]).numpy()
            ours = values[:, 1] - values[:, 0] if classes == 2 else values
            assert np.abs(ours - oracle.decision_function(rows[cell].numpy())).max() < 1e-4


@pytest.mark.parametrize("channels", [6, 100])
@pytest.mark.parametrize("regions", [2, 4])
def test_candidates_equal_a_general_minimiser_of_the_same_objective(regions, channels):
    x, labels = cells(2, 30, 2, regions, channels), draw_labels(2, "candidate", 30, regions, 2)
    found = fit_newton(x, labels, target("candidate", regions), PENALTIES)
    assert not found.bias.any()
    for i, value in enumerate(PENALTIES):

        def both(w: np.ndarray, value: float = value) -> tuple[float, np.ndarray]:
            weight = torch.from_numpy(w)[:, None].requires_grad_()
            loss = objective(x[1], labels, "candidate", value, weight, torch.zeros(1, dtype=torch.float64))
            loss.backward()
            return loss.item(), weight.grad[:, 0].numpy()

        oracle = minimize(both, np.zeros(channels), jac=True, method="L-BFGS-B", options={"gtol": 1e-10, "ftol": 1e-16})
        ours = x[1] @ found.weight[1, :, i, 0]
        theirs = x[1] @ torch.from_numpy(oracle.x)
        gaps = [v - v.mean(dim=1, keepdim=True) for v in (ours, theirs)]  # what the softmax sees
        assert (gaps[0] - gaps[1]).abs().max() < 1e-4


@pytest.mark.parametrize("form", ["candidate", "region", "problem"])
def test_it_ends_at_the_optimum_of_the_documented_objective(form):
    x, labels = cells(3), draw_labels(3, form)
    found = fit_newton(x, labels, target(form), PENALTIES)
    assert found.weight.shape[2] == len(PENALTIES)
    assert (found.gradient <= 1e-6).all()
    for cell in range(len(x)):
        for i, value in enumerate(PENALTIES):
            weight = found.weight[cell, :, i].clone().requires_grad_()
            bias = found.bias[cell, i].clone().requires_grad_()
            objective(x[cell], labels, form, value, weight, bias).backward()
            assert weight.grad.abs().max() < 1e-5  # entries along other axes than the ones it stops by
            if form != "candidate":
                assert bias.grad.abs().max() <= 1.1e-6
                assert abs(float(found.bias[cell, i].mean())) < 1e-12


def test_a_separable_cell_beside_noise_converges_and_changes_nothing_there():
    x, labels = cells(4, samples=80), draw_labels(4, "problem", samples=80)
    labels = labels.clamp(min=0)
    x[1, torch.arange(80), 0, :3] += 50.0 * torch.nn.functional.one_hot(labels, 3)
    x[1] *= torch.logspace(0, -6, 5)  # and as badly conditioned as features get
    found = fit_newton(x, labels, target("problem"), [1e-5, 1e-2])
    assert found.converged.all()
    right = (design(x, "problem")[1, :, 0] @ found.weight[1, :, 0] + found.bias[1, 0]).argmax(1) == labels
    assert right.all()
    noise = fit_newton(x[[0, 2]], labels, target("problem"), [1e-5, 1e-2])
    assert torch.allclose(noise.weight, found.weight[[0, 2]], atol=1e-9)


def test_fewer_steps_than_needed_are_reported_not_hidden():
    x, labels = cells(5), draw_labels(5, "candidate")
    x[0] = 0.0  # nothing to learn
    short = fit_newton(x, labels, target("candidate"), [1e-4], iterations=1)
    assert short.converged[:, 0].tolist() == [True, False, False]
    assert short.iterations == 1
    assert (short.gradient[1:] > 1e-6).all()
    assert not short.weight[0].any()
    whole = fit_newton(x, labels, target("candidate"), [1e-4])
    assert whole.converged.all() and 1 < whole.iterations < 20


def test_a_class_without_rows_is_never_predicted():
    x, labels = cells(6), draw_labels(6, "problem", classes=3)
    found = fit_newton(x, labels, target("problem", 5), [0.01])
    assert found.converged.all()
    values = design(x, "problem")[:, :, 0] @ found.weight[:, :, 0] + found.bias[:, None, 0]
    assert values.softmax(-1)[..., 3:].max() < 1e-4
    three = fit_newton(x, labels, target("problem", 3), [0.01])
    alone = design(x, "problem")[:, :, 0] @ three.weight[:, :, 0] + three.bias[:, None, 0]
    assert torch.allclose(alone.softmax(-1), values.softmax(-1)[..., :3], atol=1e-4)


def test_the_precision_of_the_features_is_kept():
    x, labels = cells(7), draw_labels(7, "problem")
    single = fit_newton(x.float(), labels, target("problem"), [0.1])
    assert {single.weight.dtype, single.bias.dtype, single.gradient.dtype} == {torch.float32}
    assert torch.allclose(single.weight.double(), fit_newton(x, labels, target("problem"), [0.1]).weight, atol=1e-5)


def test_blocks_of_cells_do_not_change_the_fit(monkeypatch):
    x, labels = cells(8, count=5), draw_labels(8, "region")
    whole = fit_newton(x, labels, target("region"), PENALTIES)
    monkeypatch.setattr("cosprobe.probes.linalg.CHUNK", 1)
    assert torch.allclose(fit_newton(x, labels, target("region"), PENALTIES).weight, whole.weight, atol=1e-9)


def close(one: NewtonFit, other: NewtonFit, at: float = 1e-5) -> bool:
    return torch.allclose(one.weight, other.weight, atol=at) and torch.allclose(one.bias, other.bias, atol=at)


@pytest.mark.slow
@given(DATA, st.sampled_from(["candidate", "region", "problem"]))
def test_the_order_of_samples_does_not_matter(seed, form):
    x, labels = cells(seed, 30), draw_labels(seed, form, 30)
    order = torch.randperm(30, generator=generator(seed))
    fit = fit_newton(x, labels, target(form), [0.05], tolerance=1e-8)
    assert close(fit, fit_newton(x[:, order], labels[order], target(form), [0.05], tolerance=1e-8))


@pytest.mark.slow
@given(DATA, st.floats(0.1, 10.0), st.sampled_from(["candidate", "region", "problem"]))
def test_rescaled_features_give_rescaled_weights(seed, scale, form):
    """(x, w, lambda) and (s x, w / s, s^2 lambda) are the same problem."""
    x, labels = cells(seed, 30), draw_labels(seed, form, 30)
    fit = fit_newton(x, labels, target(form), [0.05], tolerance=1e-8)
    scaled = fit_newton(scale * x, labels, target(form), [0.05 * scale**2], tolerance=1e-8)
    assert torch.allclose(scaled.weight * scale, fit.weight, atol=1e-5)
    assert torch.allclose(scaled.bias, fit.bias, atol=1e-5)


@pytest.mark.slow
@given(DATA, st.sampled_from(["candidate", "region", "problem"]))
def test_a_cell_and_a_penalty_do_not_depend_on_their_company(seed, form):
    x, labels = cells(seed, 30, count=4), draw_labels(seed, form, 30)
    x[3] *= 30
    together = fit_newton(x, labels, target(form), PENALTIES, tolerance=1e-8)
    for cell in (0, 3):
        alone = fit_newton(x[cell : cell + 1], labels, target(form), PENALTIES, tolerance=1e-8)
        assert torch.allclose(alone.weight[0], together.weight[cell], atol=1e-9)
    single = fit_newton(x, labels, target(form), PENALTIES[:1], tolerance=1e-8)
    assert torch.allclose(single.weight[:, :, 0], together.weight[:, :, 0], atol=1e-5)


@pytest.mark.slow
@given(DATA)
def test_rows_without_a_label_do_not_count(seed):
    x, labels = cells(seed, 30), draw_labels(seed, "problem", 30)
    keep = labels >= 0
    fit = fit_newton(x, labels, target("problem"), [0.05], tolerance=1e-8)
    assert close(fit, fit_newton(x[:, keep], labels[keep], target("problem"), [0.05], tolerance=1e-8))


@pytest.mark.slow
@given(DATA, st.sampled_from(["candidate", "region", "problem"]))
def test_a_larger_penalty_gives_smaller_weights(seed, form):
    x, labels = cells(seed, 30), draw_labels(seed, form, 30)
    size = fit_newton(x, labels, target(form), [0.01, 0.1, 1.0]).weight.square().sum(dim=(1, 3))
    assert (size[:, 1:] <= size[:, :-1] + 1e-9).all()


def test_the_same_input_gives_the_same_bits():
    x, labels = cells(9), draw_labels(9, "region")
    one, other = (fit_newton(x, labels, target("region"), PENALTIES) for _ in range(2))
    assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)


def test_targets_together_are_certified_by_name():
    x = cells(10)
    labels = {"a": draw_labels(10, "problem"), "b": draw_labels(11, "region")}
    targets = (Target("a", 3, "problem", "answer", ("k",)), Target("b", 3, "region", "answer", ("k",)))
    fitted, ended = newton_targets(x, labels, targets, PENALTIES)
    assert {name: one.tally for name, one in ended.items()} == {"a": (9, 9), "b": (9, 9)}
    assert torch.equal(fitted["b"][0], fit_newton(x, labels["b"], targets[1], PENALTIES).weight)
    assert all((one.gap < 1e-8).all() for one in ended.values())
    assert shortfall("newton", ended, [Cell(0, i, "cond", "all") for i in range(3)], PENALTIES) == ""


def test_fits_that_miss_are_named_with_their_cell_and_penalty_and_the_rest_counted():
    good, bad = torch.ones(3, 3, dtype=torch.bool), torch.tensor([[True, False, True], [False] * 3, [True] * 3])
    parts = {"a": [good, good], "b": [good, bad]}
    ended = {name: Certificate.join([Certificate(p, torch.zeros(3, 3)) for p in own]) for name, own in parts.items()}
    line = shortfall("logistic", ended, [Cell(2, i, "cond", "all") for i in range(6)], PENALTIES)
    named = [f"{Cell(2, layer, 'cond', 'all')}.*{penalty}" for layer, penalty in ((3, 1), (4, 0.003), (4, 1))]
    assert re.search(rf"logistic.*\bb\b.*\b4 of 18\b.*{'.*'.join(named)}.*\b1 more", line)
    assert line.count("cond, all") == 3 and line.count("of 18") == 1  # of `a` nothing is said
    assert len(line.splitlines()) == 1


def excess(x: torch.Tensor, labels: torch.Tensor, found: NewtonFit, one: Target) -> torch.Tensor:
    """(f - f*) / f of every cell and penalty, both objectives written out, f* from a fit in fp64 to 1e-10."""
    best = fit_newton(x.double(), labels, one, PENALTIES, tolerance=1e-10)
    shares = torch.zeros(len(x), len(PENALTIES), dtype=torch.float64)
    for cell in range(len(x)):
        for i, value in enumerate(PENALTIES):
            f, lowest = (
                objective(x[cell].double(), labels, one.form, value, w[cell, :, i].double(), b[cell, i].double())
                for w, b in ((found.weight, found.bias), (best.weight, best.bias))
            )
            shares[cell, i] = (f - lowest) / f
    return shares


@pytest.mark.slow
@pytest.mark.parametrize("channels", [5, 60])
@pytest.mark.parametrize("form", ["candidate", "region", "problem"])
def test_the_gap_is_never_less_than_what_is_left_to_the_optimum(form, channels):
    """From anywhere, biases far from their best included, with a class that no row has."""
    x, labels, one = cells(12, channels=channels), draw_labels(12, form), target(form, 4)
    done = fit_newton(x, labels, one, PENALTIES, tolerance=1e-10)
    for away in (0.0, 1e-3, 0.1, 1.0):
        noise = [away * torch.randn(t.shape, generator=generator(13), dtype=t.dtype) for t in (done.weight, done.bias)]
        if form == "candidate":
            noise[1] *= 0
        moved = NewtonFit(done.weight + noise[0], done.bias + noise[1], done.converged, done.gradient, done.gap, 0)
        bound = relative_gaps(x, labels, one, PENALTIES, moved.weight, moved.bias)
        assert (bound + 1e-12 >= excess(x, labels, moved, one)).all()
        assert (bound > 1e-8).all() if away else (bound < 1e-6).all()


@pytest.mark.parametrize("channels", [5, 60])
@pytest.mark.parametrize("form", ["candidate", "region", "problem"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fit_to_a_gap_ends_within_it(dtype, form, channels):
    x, labels, one = cells(14, channels=channels).to(dtype), draw_labels(14, form), target(form)
    for gap in (1e-2, 1e-4, 1e-6):
        found = fit_newton(x, labels, one, PENALTIES, gap=gap)
        assert found.converged.all() and (found.gap <= gap).all() and found.weight.dtype == dtype
        exact = relative_gaps(x.double(), labels, one, PENALTIES, found.weight.double(), found.bias.double())
        assert (exact <= gap + 1e-6).all()  # what fp32 sees
        assert (excess(x, labels, found, one) <= exact + 1e-12).all()


def test_what_fp32_cannot_reach_is_reached_in_fp64():
    x, labels, one = cells(15), draw_labels(15, "problem"), target("problem")
    assert fit_newton(x, labels, one, [1e-5], gap=1e-13).converged.all()
    short = fit_newton(x, labels, one, [1e-5], gap=1e-13, iterations=5)
    assert not short.converged.any()
    assert torch.equal(short.converged, short.gap <= 1e-13)


def test_a_fit_goes_on_from_where_it_is_told_to():
    x, labels, one = cells(16), draw_labels(16, "region"), target("region")
    done = fit_newton(x, labels, one, PENALTIES)
    again = fit_newton(x, labels, one, PENALTIES, start=(done.weight, done.bias))
    assert again.iterations == 0 and close(again, done, 1e-9)
    other = fit_newton(x, labels, one, PENALTIES, start=(done.weight.flip(2), torch.randn_like(done.bias)))
    assert other.iterations > 0 and close(other, done)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"penalties": []}, r"penalties=\[\].*above 0"),
        ({"penalties": [0.1, 0.0]}, r"penalties=\[0\.1, 0\.0\].*above 0"),
        ({"tolerance": 0.0}, r"tolerance=0\.0.*above 0"),
        ({"iterations": 0}, r"iterations=0.*above 0"),
        ({"gap": 0.0}, r"gap=0\.0.*above 0"),
        ({"labels": torch.full((60,), -1)}, r"target 't'.*60 samples.*1"),
        ({"labels": torch.full((60,), 3)}, r"target 't'.*3.*-1 to 2"),
        ({"labels": torch.arange(60) % 3 - 2}, r"target 't'.*-2.*-1 to 2"),
        ({"target": target("region")}, r"target 't'.*\[60\].*\[60, 3\]"),
        ({"target": target("problem", 1)}, r"target 't'.*1.*2"),
        ({"x": cells(0).index_fill(0, torch.tensor([2]), torch.nan)}, r"cell 2.*finite"),
    ],
)
def test_impossible_fits_are_refused(change, message):
    good = {"x": cells(0), "labels": draw_labels(0, "problem"), "target": target("problem"), "penalties": [0.1]}
    with pytest.raises(ValueError, match=message):
        fit_newton(**good | change)


@pytest.mark.parametrize("gap", [None, 1e-6])
def test_labels_may_differ_between_cells(gap):
    x = cells(7, regions=1)
    labels = torch.randint(0, 2, (3, 60), generator=generator(8))
    found = fit_newton(x, labels, target("problem", 2), PENALTIES, gap=gap)
    assert found.converged.all()
    for cell in range(3):
        alone = fit_newton(x[[cell]], labels[cell], target("problem", 2), PENALTIES, gap=gap)
        torch.testing.assert_close(found.weight[[cell]], alone.weight, atol=1e-4 if gap else 1e-9, rtol=0)
        torch.testing.assert_close(found.bias[[cell]], alone.bias, atol=1e-4 if gap else 1e-9, rtol=0)
    values = classes_last(affine(design(x, "problem"), found.weight, found.bias), "problem")
    loss, right, _ = row_sums(values, labels)
    for cell in range(3):
        one = row_sums(values[[cell]], labels[cell])
        torch.testing.assert_close((loss[[cell]], right[[cell]]), one[:2])
    with pytest.raises(InputError, match=r"labels of every cell, some of them -1"):
        fit_newton(x, labels.clone().fill_(-1), target("problem", 2), PENALTIES)
