"""What every strategy is run with: a toy pipeline, and probes of random weights."""

from __future__ import annotations

import pytest

from cosprobe.activations.sampler import Sampler
from cosprobe.ensembles.run import RunContext
from tests.examples.banks import TASK, scorer
from tests.examples.pipelines import CONFIG, wan


@pytest.fixture(scope="module")
def context() -> RunContext:
    return RunContext(Sampler(wan(), CONFIG, TASK), scorer())
