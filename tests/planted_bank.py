"""A small bank for the pipelines of tests/tiny.py: random probes, with the provenance a run gives."""

from __future__ import annotations

from dataclasses import fields

import torch
from tiny import CONFIG

from cosprobe.activations.store import fingerprint
from cosprobe.cells import Cell
from cosprobe.early_exit.policy import Policy
from cosprobe.models.pipelines import PipelineConfig
from cosprobe.probes.bank import ProbeBank
from cosprobe.tasks import Target

CHANNELS, REGIONS = 24, 4
CELLS = tuple(Cell(step, layer, "cond", "all") for step, layer in ((0, "0"), (0, "2"), (1, "2"), (2, "0")))
ANSWER = Target("answer", 4, "candidate", "answer", ("one_exit",))

__all__ = ["ANSWER", "CELLS", "CONFIG", "bank_for", "policy_at"]


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
