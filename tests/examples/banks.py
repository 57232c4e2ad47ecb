"""Small banks for the pipelines of tests/examples/pipelines.py: random probes, with the provenance a run gives."""

from __future__ import annotations

import torch

from cosprobe.activations.collection import StoreSettings
from cosprobe.cells import Cell
from cosprobe.config import CaptureConfig, PipelineConfig
from cosprobe.early_exit.threshold import Policy
from cosprobe.ensembles.probe_scorer import ProbeScorer
from cosprobe.probes.bank import ProbeBank, Provenance
from cosprobe.tasks import MazeConfig, Target
from tests.examples.pipelines import CONFIG

CHANNELS, REGIONS = 24, 4
TASK_CONFIG = MazeConfig(frames=5)
TASK = TASK_CONFIG.build()
LAYERS, WIDTH = 3, 24
CELLS = tuple(Cell(step, layer, "cond", "all") for step, layer in ((0, 0), (0, 2), (1, 2), (2, 0)))
ANSWER = Target("answer", 4, "candidate", "answer", ("one_exit",))


def bank_for(config: PipelineConfig) -> ProbeBank:
    rng = torch.Generator().manual_seed(3)
    count = len(CELLS)
    return ProbeBank(
        CELLS, (ANSWER,), REGIONS,
        mean=torch.zeros(count, CHANNELS), std=torch.full((count, CHANNELS), 0.3),
        weights={"answer": torch.randn(count, CHANNELS, 1, generator=rng)},
        biases={"answer": torch.zeros(count, 1)},
        penalties={"answer": torch.full((count,), 0.1)},
        temperatures={"answer": torch.full((count,), 1.5)},
        provenance=Provenance(StoreSettings.of(config, TASK_CONFIG, CaptureConfig(pooling="region"), 0)),
    )  # fmt: skip


def policy_at(threshold: float) -> Policy:
    return Policy("answer", "maze", "one_exit", "model_answer", CELLS, threshold, 0.05, 0.95, 300, 250, 4, 0.01)


def scorer() -> ProbeScorer:
    """Probes of random weights: they read something, different for every run."""
    draw = torch.Generator().manual_seed(1)
    targets = tuple(t for t in TASK.targets if t.name in ("answer", "model_answer"))
    cells = tuple(Cell(s, n, "cond", "all") for s in range(CONFIG.steps) for n in range(LAYERS))
    tables = {t.name: 3 * torch.randn(len(cells), WIDTH, 1, generator=draw) for t in targets}
    bank = ProbeBank(
        cells, targets, 4, torch.zeros(len(cells), WIDTH), torch.ones(len(cells), WIDTH), tables,
        {t.name: torch.zeros(len(cells), 1) for t in targets}, {t.name: torch.ones(len(cells)) for t in targets},
        provenance=Provenance(StoreSettings({"index": "none"}, 0, CONFIG, {}, CaptureConfig(pooling="region"), {})),
    )  # fmt: skip
    accuracy = {c: 0.5 + c.layer * (1 if c.step else -1) / 10 for c in cells}  # last layer, at step 0 the first
    return ProbeScorer(bank, {t.name: accuracy for t in targets}, "maze")
