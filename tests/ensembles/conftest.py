"""What every method is run with: a toy pipeline, and probes of random weights."""

from __future__ import annotations

import pytest

from cosprobe.ensembles.ensemble import Bench
from tests.examples.banks import TASK, judge
from tests.examples.pipelines import CONFIG, wan


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(wan(), CONFIG, TASK, judge())
