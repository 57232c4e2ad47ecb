"""A finished run against its second derivation (`tests/oracles/derive.py`), which shares no code with the project."""

from __future__ import annotations

from pathlib import Path

import pytest

import train
from tests.examples.pipelines import save_wan
from tests.examples.shapes import unchecked
from tests.oracles.derive import compare

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder, model = tmp_path_factory.mktemp("runs") / "maze", save_wan(tmp_path_factory.mktemp("model") / "wan")
    settings = ["task.problems=120", "pipeline.steps=3", "probe.steps='0,2'", "probe.decode=0", "probe.layers='0,2'"]
    settings += [
        f"pipeline.path={model}",
        "probe.random_weights=0",
        "probe.penalties=[0.1,1.0]",
        "pipeline.frames=5",
        "task.frames=5",
    ]
    with unchecked():
        assert train.main(["probe=layers", *settings, f"run_dir={folder}"]) == 0
    return folder / "logistic-penalties-0.1-1.0"


@pytest.mark.slow
def test_the_grid_is_what_its_files_say(run):
    """Accuracies of the frozen probes and their intervals agree to the last digit. Inputs are fitted anew by another
    solver: on test every answer is the same, in cross-validation one sample of 42 that lies on a border may differ. The
    p are within five standard errors of the draws on both sides."""
    distances = compare(run, "answer")
    assert {"reference", "skill", "p_inputs", "p_evidence", "p_x0", "accuracy of x_t"} <= set(distances)
    for name, distance in distances.items():
        limit = 5 if name.startswith("p_") else 1 / 42 if name.startswith("cross-validation") else 0
        assert distance <= limit + 1e-9, f"{name} differs by {distance}"
