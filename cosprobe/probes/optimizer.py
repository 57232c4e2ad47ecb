"""Gradient descent with Nesterov momentum and a diagonal preconditioner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cosprobe.errors import InputError


class PreconditionedNesterov(torch.optim.SGD):
    """Nesterov's accelerated gradient descent, with each gradient divided by a bound of the curvature.

    With upper bounds of the diagonal of the Hessian in a basis in which it is nearly diagonal, a step of `lr` = 1 never
    increases a convex objective (Boehning 1992, "Multinomial logistic regression algorithm"), so no learning rate has
    to be tuned. The update is that of `torch.optim.SGD` with `nesterov=True` (Sutskever et al. 2013, "On the importance
    of initialization and momentum in deep learning") for the divided gradients.

    groups: parameter groups, or parameters, each with its `bounds`: one tensor of the shape of each parameter or one
    that broadcasts to it. lr: fraction of the largest safe step, above 0. momentum: from 0 (plain descent) to below 1.
    Raises InputError for bounds that are not above 0, or do not broadcast to their parameter.
    """

    def __init__(
        self,
        groups: Iterable[Mapping[str, Any]],
        lr: float = 1.0,
        momentum: float = 0.9,
    ):
        listed = [dict(group) for group in groups]
        for group in listed:
            group["params"] = list(group["params"])
            for parameter, bound in zip(group["params"], group["bounds"], strict=True):
                _check(parameter, bound)
        super().__init__(listed, lr=lr, momentum=momentum, nesterov=momentum > 0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step. closure: evaluates the objective again and returns its value."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter, bound in zip(group["params"], group["bounds"], strict=True):
                if parameter.grad is not None:
                    parameter.grad /= bound
        super().step()
        return loss


def _check(parameter: Float[Tensor, "*shape"], bound: Float[Tensor, "*bound"]) -> None:
    try:
        fits = torch.broadcast_shapes(parameter.shape, bound.shape) == parameter.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise InputError(f"bounds{list(bound.shape)}: expected the shape of the parameter, {list(parameter.shape)}")
    if not bool((bound > 0).all()):
        raise InputError(f"bounds: smallest {float(bound.min())}; expected numbers above 0")
