"""A small part of `make torture`: a few faults, and none of them is silent or a traceback.

Kills are in tests of what is killed: stores, fits, trainings.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.torture import bits, inputs
from tests.torture.world import World

pytestmark = [pytest.mark.slow, pytest.mark.docs]
FEW = {"inputs": (inputs.give, 6), "bits": (bits.flip, 30)}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World.build(tmp_path_factory.mktemp("torture"), only_train=True)


@pytest.mark.parametrize("part", FEW)
def test_no_fault_is_silent_and_none_ends_in_a_traceback(world, part):
    fault, count = FEW[part]
    said: list[str] = []
    found = fault(world, count, np.random.default_rng(7), said.append)
    assert not said, "\n".join(said)
    assert found[part] >= count and not any(found.get(name) for name in ("silent", "tracebacks", "lost or doubled"))
