"""Probes fitted on a device and on the CPU: the same accuracies, and the seconds of both."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu.findings import Finding
from cosprobe.activations import ProbeSamples
from cosprobe.cells import Cell
from cosprobe.config import KINDS, ProbeConfig, TrainerConfig
from cosprobe.probes import ProbeBank, fit
from cosprobe.tasks import Role, Target

SIZES = {"train": 240, "validation": 80, "test": 80}
SIGNAL, SHIFT = 64, 0.7  # channels that differ between the classes; by how much in the last cell, in deviations
TARGET = Target("answer", 2, "problem", Role.ANSWER, ("any",))


def measure(
    device: str, cells: int = 64, channels: int = 5120, sizes: dict[str, int] = SIZES, kinds: Sequence[str] = KINDS
) -> list[Finding]:
    """One row for each kind of probe. An accuracy may differ by one sample, whose decision value is about 0."""
    samples, warm = synthetic(cells, channels, sizes), synthetic(2, 16, sizes)
    test, findings = samples.subset("test"), []
    for kind in kinds:
        _fitted(warm, kind, device)  # libraries of the device begin with seconds of work
        (there, seconds), (here, cpu_seconds) = _fitted(samples, kind, device), _fitted(samples, kind, "cpu")
        right = [(bank.predict(test.features, "answer") == test.labels["answer"]).sum(dim=1) for bank in (there, here)]
        apart = (right[0] - right[1]).abs()
        equal, most = int((apart == 0).sum()), int(apart.max())
        accuracy = float(right[1].double().mean()) / len(test)
        findings.append(
            Finding(
                f"probe.kind={kind} on GPU and CPU: {cells} cells of {channels} channels, {sizes['train']} samples",
                f"{seconds:.1f} s, {cpu_seconds:.1f} s with {torch.get_num_threads()} threads; test accuracy equal in "
                f"{equal} of {cells} cells, largest difference {most} of {len(test)} samples; mean {accuracy:.3f}",
                {"seconds": seconds, "seconds on the CPU": cpu_seconds, "threads": torch.get_num_threads(),
                 "equal cells": equal, "largest difference in samples": most, "mean accuracy": accuracy},
                most <= 1,
            )
        )  # fmt: skip
    return findings


def synthetic(cells: int, channels: int, sizes: dict[str, int]) -> ProbeSamples:
    """Two classes of normal noise, equal in the first cell and apart by SHIFT in SIGNAL channels of the last."""
    generator, count = torch.Generator().manual_seed(0), sum(sizes.values())
    label = torch.randint(2, (count,), generator=generator)
    features = torch.randn(count, cells, 1, channels, generator=generator)
    features[..., :SIGNAL] += (torch.linspace(0, SHIFT, cells) * (label[:, None] - 0.5))[:, :, None, None]
    return ProbeSamples(
        features=features,
        cells=tuple(Cell(0, layer, "cond", "all") for layer in range(cells)),
        targets=(TARGET,),
        labels={"answer": label},
        split=np.repeat(list(sizes), list(sizes.values())),
        keys=np.array([f"problem {i}" for i in range(count)]),
        kinds=np.full(count, "any"),
    )


def _fitted(samples: ProbeSamples, kind: str, device: str) -> tuple[ProbeBank, float]:
    """The probes, and the seconds of `fit`."""
    index = device.partition(":")[2]
    trainer = TrainerConfig(
        accelerator=device.partition(":")[0], devices=f"[{index}]" if index else "1", callbacks=[],
        enable_progress_bar=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        begin = time.perf_counter()
        bank = fit(samples, ProbeConfig(kind=kind), trainer, Path(folder), seed=0)
        return bank, time.perf_counter() - begin
