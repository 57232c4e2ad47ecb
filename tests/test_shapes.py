"""Where annotations name a shape, tests check it."""

from __future__ import annotations

from dataclasses import dataclass

import jaxtyping
import pytest
import torch
from beartype import beartype
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from cosprobe.ensembles import strategies
from cosprobe.probes import newton

Rows = dict[str, Float[Tensor, "row width"]]
checked = jaxtyping.jaxtyped(typechecker=beartype)  # as the modules of the package are


@checked
def product(a: Float[Tensor, "row width"], b: Float[Tensor, " width"]) -> Float[Tensor, " row"]:
    return a @ b


@checked
def first(rows: Rows) -> Tensor:
    return rows["first"]


@checked
def plain(rows: Tensor) -> Tensor:
    return rows


@checked
@dataclass
class Kept:
    rows: Float[Tensor, "row width"]
    labels: Float[Tensor, " row"]


def test_a_wrong_shape_is_refused_wherever_one_is_named():
    rows, labels = torch.ones(3, 2), torch.ones(2)
    assert product(rows, labels).shape == (3,) and first({"first": rows}) is rows
    for wrong in (lambda: product(rows, torch.ones(3)), lambda: first({"first": labels}), lambda: Kept(rows, labels)):
        with pytest.raises(TypeCheckError):
            wrong()
    assert not hasattr(plain, "__wrapped__")  # nothing to check, and no time spent on it


def test_the_package_is_checked():
    with pytest.raises(TypeCheckError):
        newton._balanced(torch.ones(1, 2, 3), torch.ones(3, 2))
    assert hasattr(newton._balanced, "__wrapped__") and not hasattr(newton._minimise, "__wrapped__")
    named = [one for one in vars(strategies).values() if "Probabilities" in str(getattr(one, "__annotations__", ""))]
    assert named and all(hasattr(one, "__wrapped__") or isinstance(one, type) for one in named)
