"""Trajectories of early answers with known confidences and errors."""

from __future__ import annotations

import numpy as np

from cosprobe.activations.cost import Cost
from cosprobe.cells import Cell
from cosprobe.early_exit.calibrate import Calibrated
from cosprobe.early_exit.frontier import Prices
from cosprobe.early_exit.threshold import Policy
from cosprobe.early_exit.trajectories import Trajectories
from cosprobe.tasks import Maze

CELLS = tuple(Cell(step, layer, "cond", "all") for step, layer in ((0, 2), (1, 1), (3, 0)))
STEPS = 5
FLOPS = Cost(1.0, 10.0, (2.0, 4.0, 6.0), 8.0, 20.0)
PRICES = Prices(FLOPS, Cost(0.0, 0.1, (0.01, 0.02, 0.03), 0.04, 0.2), STEPS)
WHOLE = 1.0 + 10 + 5 * 8 + 20
PROBLEMS = tuple(Maze().problems("test", 40, "one_exit"))


def synthetic(seed: int = 0, error_reference: str = "model_answer", threshold: float = 0.7) -> Calibrated:
    rng = np.random.default_rng(seed)
    confidence = np.sort(rng.uniform(0.3, 1, (40, 3)), axis=1)
    truth = np.array([p.answer for p in PROBLEMS])
    predictions = np.where(rng.random((40, 3)) < confidence, truth[:, None], (truth[:, None] + 1) % 4)
    model_answer = np.where(rng.random(40) < 0.8, truth, -1)
    x0_predictions = predictions[:, :2]
    trajectories = Trajectories(
        problems=PROBLEMS,
        predictions=predictions,
        confidence=confidence,
        entropy=1.4 * (1 - confidence),
        model_answer=model_answer,
        x0_predictions=x0_predictions,
        correct=predictions == truth[:, None],
        x0_correct=x0_predictions == truth[:, None],
        model_correct=model_answer == truth,
        decoded=(0, 2),
        classes=4,
    )
    policy = Policy("answer", "maze", "one_exit", error_reference, CELLS, threshold, 0.1, 0.95, 300, 200, 5, 0.02)
    return Calibrated(policy, trajectories, trajectories, 0.1)
