"""A small bank for the pipelines of tests/tiny.py: random probes, with the provenance a run gives."""

from __future__ import annotations

from dataclasses import fields

import torch

from cosprobe.cells import Cell
from cosprobe.early_exit.policy import Policy
from cosprobe.ensembles.probe_scorer import ProbeScorer
from cosprobe.models.pipelines import PipelineConfig, fingerprint
from cosprobe.probes.bank import ProbeBank
from cosprobe.tasks import MazeConfig, Target
from tests.examples.pipelines import CONFIG

CHANNELS, REGIONS = 24, 4
TASK = MazeConfig(frames=5).build()
LAYERS, WIDTH = 3, 24
CELLS = tuple(Cell(step, layer, "cond", "all") for step, layer in ((0, "0"), (0, "2"), (1, "2"), (2, "0")))
ANSWER = Target("answer", 4, "candidate", "answer", ("one_exit",))


def bank_for(config: PipelineConfig) -> ProbeBank:
    rng = torch.Generator().manual_seed(3)
    count = len(CELLS)
    store = {f"pipeline.{f.name}": getattr(config, f.name) for f in fields(config) if f.name not in ("name", "path")}
    store |= {"probe.pooling": "region", "probe.frames": False, "model": fingerprint(config.folder)}
    return ProbeBank(
        CELLS, (ANSWER,), REGIONS,
        mean=torch.zeros(count, CHANNELS), std=torch.full((count, CHANNELS), 0.3),
        weights={"answer": torch.randn(count, CHANNELS, 1, generator=rng)},
        biases={"answer": torch.zeros(count, 1)},
        lambdas={"answer": torch.full((count,), 0.1)},
        temperatures={"answer": torch.full((count,), 1.5)},
        provenance={"store": store},
    )  # fmt: skip


def policy_at(threshold: float) -> Policy:
    return Policy("answer", "maze", "one_exit", "choice", CELLS, threshold, 0.05, 0.95, 300, 250, 4, 0.01)


def scorer() -> ProbeScorer:
    """Probes of random weights: they read something, different for every run."""
    draw = torch.Generator().manual_seed(1)
    targets = tuple(t for t in TASK.targets if t.name in ("answer", "choice"))
    cells = tuple(Cell(s, str(n), "cond", "all") for s in range(CONFIG.steps) for n in range(LAYERS))
    tables = {t.name: 3 * torch.randn(len(cells), WIDTH, 1, generator=draw) for t in targets}
    bank = ProbeBank(
        cells, targets, 4, torch.zeros(len(cells), WIDTH), torch.ones(len(cells), WIDTH), tables,
        {t.name: torch.zeros(len(cells), 1) for t in targets}, {t.name: torch.ones(len(cells)) for t in targets},
        provenance={"store": {"probe.pooling": "region", "probe.frames": False, "pipeline.steps": CONFIG.steps,
                              "pipeline.guidance": 1.0}},
    )  # fmt: skip
    accuracy = {c: 0.5 + int(c.site) * (1 if c.step else -1) / 10 for c in cells}  # last layer, at step 0 the first
    return ProbeScorer(bank, {t.name: accuracy for t in targets}, "maze")
