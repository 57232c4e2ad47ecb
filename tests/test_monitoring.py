"""Speed and memory of a fit and a prediction with known seconds; TensorBoard files of earlier attempts."""

from __future__ import annotations

import re
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from cosprobe import monitoring
from cosprobe.config import TrainerConfig
from cosprobe.monitoring import ResourceMonitor, build_logger, peak_resident_memory, remove_events, wandb_names

SECONDS = (2.0, 4.0, 0.5)  # of the batches
SIZES = (4, 4, 2)
SPEED, MEMORY = "speed and memory/{}: samples per second", "speed and memory/{}: peak resident memory in GB"


class Line(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, index):
        return (self.slope * batch).sum()

    def predict_step(self, batch, index):
        return self.slope * batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def clock(monkeypatch):
    """Each batch takes its seconds, and the time between two batches is 100 s."""
    starts = [sum(SECONDS[:i]) + 100 * i for i in range(len(SECONDS))]
    ticks = chain.from_iterable((start, start + length) for start, length in zip(starts, SECONDS, strict=True))
    monkeypatch.setattr(monitoring, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))


def watched(stage: str, folder: Path) -> ResourceMonitor:
    monitor = ResourceMonitor(build_logger(TrainerConfig(), folder), stage)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, callbacks=[monitor], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    loader = DataLoader(torch.arange(10.0), batch_size=4)
    if stage == "fit":
        trainer.fit(Line(), loader)
    else:
        trainer.predict(Line(), loader)
    return monitor


@pytest.mark.parametrize("stage", ["fit", "sampling"])
def test_speed_and_memory_of_every_batch_are_logged(stage, tmp_path, clock):
    watched(stage, tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {SPEED.format(stage), MEMORY.format(stage)}
    speed, memory = events.Scalars(SPEED.format(stage)), events.Scalars(MEMORY.format(stage))
    assert [e.step for e in speed] == [e.step for e in memory] == [4, 8, 10]
    assert [e.value for e in speed] == pytest.approx([n / s for n, s in zip(SIZES, SECONDS, strict=True)])
    assert memory[-1].value == pytest.approx(peak_resident_memory() / 1e9, rel=0.05)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the oracle is a file of Linux")
def test_peak_memory_is_that_of_the_kernel():
    kept = torch.ones(2**24)  # 64 MiB
    before = int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    assert peak_resident_memory() == pytest.approx(before, rel=0.02)
    assert kept.numel() * 4 < peak_resident_memory()


def test_peak_memory_is_unknown_on_windows(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert peak_resident_memory() is None


def test_the_first_value_replaces_the_files_of_an_earlier_attempt(tmp_path):
    for _ in range(2):
        monitor = ResourceMonitor(build_logger(TrainerConfig(), tmp_path), "sampling")
        monitor.done = 20  # samples of shards that exist already
        for size in (8, 4):
            monitor.on_predict_batch_start()
            monitor.on_predict_batch_end(None, SimpleNamespace(device=torch.device("cpu")), None, [0] * size)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in events.Scalars(SPEED.format("sampling"))] == [28, 32]


def test_a_monitor_without_values_leaves_files_alone(tmp_path):
    watched("sampling", tmp_path)
    before = set(tmp_path.iterdir())
    ResourceMonitor(build_logger(TrainerConfig(), tmp_path), "sampling")
    assert set(tmp_path.iterdir()) == before != set()


def test_removing_events_keeps_other_files_and_named_folders(tmp_path):
    events = ["events.out.tfevents.1", "cells_0/events.out.tfevents.2", "cells_0/hparams.yaml",
              "training/median/events.out.tfevents.3", "sampling/events.out.tfevents.4", "mine/events.out.tfevents.5",
              "mine/notes.txt"]  # fmt: skip
    for name in events:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    remove_events(tmp_path, keep=["sampling"])
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")} == {
        "sampling", "sampling/events.out.tfevents.4", "mine", "mine/notes.txt",
    }  # fmt: skip
    remove_events(tmp_path / "missing")


@pytest.mark.parametrize(
    ("folder", "name", "prefix"),
    [
        ("runs/maze-layers/logistic/tensorboard/training/median", "maze-layers/logistic", "training/median"),
        ("runs/maze-layers/logistic/tensorboard/sampling", "maze-layers/logistic", "sampling"),
        ("runs/maze-layers/logistic/tensorboard", "maze-layers/logistic", ""),
    ],
)
def test_values_of_one_wandb_run_have_names_of_their_own(tmp_path, monkeypatch, folder, name, prefix):
    monkeypatch.chdir(tmp_path)
    assert wandb_names(Path(folder)) == (name, prefix) == wandb_names(tmp_path / folder)
