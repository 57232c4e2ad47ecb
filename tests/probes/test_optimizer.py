"""The optimizer against the same update by hand, plain SGD, and scikit-learn."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from cosprobe.errors import InputError
from cosprobe.probes.optimizer import PreconditionedNesterov


def quadratic(x: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
    return (curvature * (x - 1).square()).sum() / 2


def test_the_update_is_the_one_written_out_by_hand():
    curvature, bounds = torch.tensor([1.0, 10.0, 100.0]), torch.tensor([2.0, 11.0, 150.0])
    x = torch.nn.Parameter(torch.tensor([3.0, -2.0, 0.5]))
    optimizer = PreconditionedNesterov([{"params": [x], "bounds": [bounds]}], lr=0.7, momentum=0.8)
    position, velocity = x.detach().clone(), torch.zeros(3)
    for step in range(7):
        optimizer.zero_grad()
        quadratic(x, curvature).backward()
        optimizer.step()
        gradient = curvature * (position - 1) / bounds
        velocity = gradient if step == 0 else 0.8 * velocity + gradient
        position = position - 0.7 * (gradient + 0.8 * velocity)
        torch.testing.assert_close(x.detach(), position, rtol=0, atol=1e-6)


def test_exact_bounds_without_momentum_reach_the_minimum_in_one_step():
    curvature = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)
    x = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = PreconditionedNesterov([{"params": [x], "bounds": [curvature]}], momentum=0.0)
    quadratic(x, curvature).backward()
    optimizer.step()
    torch.testing.assert_close(x.detach(), torch.ones(3, dtype=torch.float64))


def test_groups_have_bounds_and_rates_of_their_own_and_a_closure_is_evaluated():
    first, second = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(2))
    groups = [
        {"params": [first], "bounds": [torch.full((3,), 4.0)]},  # broadcast over rows
        {"params": [second], "bounds": [torch.full((2, 3), 2.0)], "lr": 0.5},
    ]
    optimizer = PreconditionedNesterov(groups, lr=1.0, momentum=0.0)

    def closure():
        optimizer.zero_grad()
        loss = first.sum() + second.sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) == 0.0
    assert torch.equal(first.detach(), torch.full((2, 3), -0.25))
    assert torch.equal(second.detach(), torch.full((2, 3), -0.25))


def test_a_saved_state_goes_on_to_the_same_bits():
    def start():
        x = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        optimizer = PreconditionedNesterov([{"params": [x], "bounds": [torch.tensor([3.0, 7.0])]}], lr=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return x, optimizer, schedule

    def go(x, optimizer, schedule, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            quadratic(x, torch.tensor([1.0, 5.0])).backward()
            optimizer.step()
            schedule.step()

    whole = start()
    go(*whole, 9)
    half, rest = start(), start()
    go(*half, 4)
    with torch.no_grad():
        rest[0].copy_(half[0])
    rest[1].load_state_dict(copy.deepcopy(half[1].state_dict()))
    rest[2].load_state_dict(half[2].state_dict())
    go(*rest, 5)
    assert torch.equal(rest[0], whole[0])


@pytest.mark.slow
def test_logistic_regression_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5)) * [1, 2, 3, 0.5, 0.1]
    labels = (x @ rng.normal(size=5) + rng.normal(size=200) > 0).astype(int)
    penalty = 0.05
    oracle = LogisticRegression(C=1 / (200 * penalty), tol=1e-10, max_iter=10_000).fit(x, labels)

    rows, wanted = torch.from_numpy(x), torch.from_numpy(labels).double()
    weight, bias = (torch.nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (5, 1))
    bounds = [rows.square().mean(0) * 5 / 4 + penalty, torch.full((1,), 5 / 4, dtype=torch.float64)]
    optimizer = PreconditionedNesterov([{"params": [weight, bias], "bounds": bounds}])
    losses = []
    for _ in range(2000):
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(rows @ weight + bias, wanted)
        loss = loss + penalty * weight.square().sum() / 2
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    np.testing.assert_allclose(weight.detach().numpy(), oracle.coef_[0], atol=1e-6)
    np.testing.assert_allclose(bias.detach().numpy(), oracle.intercept_, atol=1e-6)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (torch.tensor([1.0, 0.0, 1.0]), r"smallest 0\.0"),
        (torch.tensor([1.0, -2.0, 1.0]), r"smallest -2\.0"),
        (torch.tensor([1.0, float("nan"), 1.0]), "smallest nan"),
        (torch.ones(2), r"\[2\].*\[3\]"),
        (torch.ones(4, 3), r"\[4, 3\].*\[3\]"),
    ],
)
def test_bounds_that_do_not_fit_are_named(bounds, message):
    with pytest.raises(InputError, match=message):
        PreconditionedNesterov([{"params": [torch.nn.Parameter(torch.zeros(3))], "bounds": [bounds]}])
