"""Records of early answers with known confidences and errors."""

from __future__ import annotations

import numpy as np

from cosprobe.activations.cost import Cost
from cosprobe.cells import Cell
from cosprobe.early_exit.calibrate import Records, Stopping
from cosprobe.early_exit.policy import Policy
from cosprobe.tasks import Maze

CELLS = tuple(Cell(step, layer, "cond", "all") for step, layer in ((0, "2"), (1, "1"), (3, "0")))
COST = Cost(1.0, 10.0, (2.0, 4.0, 6.0), 8.0, 20.0)
CLOCK = Cost(0.0, 0.1, (0.01, 0.02, 0.03), 0.04, 0.2)
TOTAL = 5
WHOLE = 1.0 + 10 + 5 * 8 + 20
PROBLEMS = tuple(Maze().problems("test", 40, "one_exit"))


def synthetic(seed: int = 0, against: str = "choice", threshold: float = 0.7) -> Stopping:
    rng = np.random.default_rng(seed)
    confidence = np.sort(rng.uniform(0.3, 1, (40, 3)), axis=1)
    truth = np.array([p.answer for p in PROBLEMS])
    said = np.where(rng.random((40, 3)) < confidence, truth[:, None], (truth[:, None] + 1) % 4)
    drawn = np.where(rng.random(40) < 0.8, truth, -1)
    shown = said[:, :2]
    records = Records(
        PROBLEMS, said, confidence, 1.4 * (1 - confidence), drawn, shown, said == truth[:, None],
        shown == truth[:, None], drawn == truth, (0, 2), 4,
    )  # fmt: skip
    policy = Policy("answer", "maze", "one_exit", against, CELLS, threshold, 0.1, 0.95, 300, 200, 5, 0.02)
    return Stopping(policy, records, records, 0.1)
