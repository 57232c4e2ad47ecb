"""Planted samples, and the fit of them by processes of their own, which may kill themselves."""

from __future__ import annotations

import os
import signal
from functools import cache
from pathlib import Path

import numpy as np
import torch

from cosprobe.activations.dataset import ProbeSamples
from cosprobe.cells import Cell
from cosprobe.config import ProbeConfig, TrainerConfig
from cosprobe.probes import checkpoints
from cosprobe.probes.logistic import ProbeTraining, fit
from cosprobe.tasks import Target
from tests.examples import processes

RECIPE = {"penalties": [0.01, 1.0], "epochs": 6, "batch": 101, "memory": 2e-3}  # memory: two chunks of the cells
TARGETS = (
    Target("answer", 3, "candidate", "answer", ("one",)),
    Target("doors", 2, "region", "perception", ("one", "two")),
    Target("start", 5, "problem", "perception", ("one", "two")),
    Target("control", 3, "candidate", "control", ("one", "two")),
)
PLANTED = 4  # the cell that knows the answer


@cache
def planted(count: int = 700, regions: int = 3, channels: int = 10, cells: int = 6) -> ProbeSamples:
    """Correlated noise; `answer` in one cell, `doors` and `start` a little in all, `control` nowhere."""
    rng = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    answer = torch.randint(0, regions, (count,), generator=rng)
    doors = torch.randint(0, 2, (count, regions), generator=rng)
    start = torch.randint(0, 5, (count,), generator=rng)
    x = normal(count, cells, regions, channels) @ (normal(channels, channels) * torch.logspace(0, -1, channels))
    x[torch.arange(count), PLANTED, answer] += 1.5 * normal(channels)
    x += 0.6 * (2 * doors - 1)[:, None, :, None] * normal(channels)
    x[:, :, 0] += 0.8 * normal(5, channels)[start][:, None]
    third = count // 3
    return ProbeSamples(
        features=x * 3 + 1,
        cells=tuple(Cell(0, layer, "cond", "all") for layer in range(cells)),
        targets=TARGETS,
        labels={
            "answer": torch.where(torch.arange(count) % 2 == 0, answer, -1),
            "doors": doors,
            "start": start,
            "control": torch.randint(0, regions, (count,), generator=rng),
        },
        split=np.array(["train"] * third + ["validation"] * third + ["test"] * (count - 2 * third)),
        keys=np.array([f"k{i}" for i in range(count)]),
        kinds=np.where(np.arange(count) % 2 == 0, "one", "two"),
    )


def run_killed(folder: Path, step: int) -> None:
    """The fit of one process, which kills itself before this training step."""
    assert processes.run(one_process, folder, step) == [-signal.SIGKILL]


def one_process(rank: int, folder: Path, step: int) -> None:
    main(folder, 1, step)


def kill_before(step: int) -> None:
    """Lets the process kill itself before this training step, counted from 1 over all chunks."""
    training_step, steps = ProbeTraining.training_step, iter(range(1, step))

    def counted(*args):
        if next(steps, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return training_step(*args)

    ProbeTraining.training_step = counted


def main(folder: Path, devices: int, step: int | None = None) -> None:
    """Saves the decision values of each process. step: the training step before which every process kills itself."""
    torch.set_num_threads(1)
    checkpoints.INTERVAL = 0.0
    if step is not None:
        kill_before(step)
    samples = planted()
    bank = fit(samples, ProbeConfig(**RECIPE), TrainerConfig(devices=devices), folder / "fit", seed=0)
    values = {t.name: bank.decision(samples.features, t.name) for t in bank.targets}
    torch.save(values, folder / f"values_{os.environ.get('LOCAL_RANK', 0)}.pt")
