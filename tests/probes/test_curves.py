"""Training curves are statistics over all cells, over however many chunks they are fitted in."""

from __future__ import annotations

from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cosprobe.config import TrainerConfig
from cosprobe.monitoring import build_logger
from cosprobe.probes.curves import STATISTICS, TrainingCurves
from cosprobe.probes.logistic import CellScores
from cosprobe.tasks import Target

ANSWER = Target("answer", 4, "candidate", "answer", ("one_exit",))
RELABELLED = Target("answer_relabelled", 4, "candidate", "relabelled", ("one_exit",))
CELLS, PENALTIES = (5, 2), 3  # cells of each chunk
TRAINER = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)


def trained(accuracy, loss, epoch: int = 0) -> SimpleNamespace:
    """A module that has measured accuracy and loss [cell, penalty] on four rows in two batches."""
    metrics = {}
    for target in (ANSWER, RELABELLED):
        for split in ("train", "validation"):
            metrics[f"{split}/{target.name}"] = metric = CellScores(*accuracy.shape)
            for count in (1, 3):
                metric.update(loss * count, accuracy * count, torch.tensor(count))
    return SimpleNamespace(
        current_epoch=epoch, measured=True, targets=(ANSWER, RELABELLED), penalties=torch.ones(PENALTIES, 1),
        metrics=metrics,
    )  # fmt: skip


def test_statistics_are_over_the_cells_of_all_chunks(tmp_path):
    generator = torch.Generator().manual_seed(1)
    accuracy, loss = (torch.rand(sum(CELLS), PENALTIES, generator=generator) for _ in range(2))
    curves = TrainingCurves(lambda name: build_logger(TrainerConfig(), tmp_path / name), sum(CELLS))
    for part in (slice(0, CELLS[0]), slice(CELLS[0], None)):
        assert not list(tmp_path.iterdir())  # nothing is drawn before the last chunk
        for epoch in range(2):
            module = trained(accuracy[part] / (epoch + 1), loss[part], epoch)
            curves.on_validation_epoch_end(TRAINER, module)
            curves.on_train_epoch_end(TRAINER, module)
            assert all(float(module.metrics[name].count) == 0 for name in module.metrics)
    assert {path.name for path in tmp_path.iterdir()} == set(STATISTICS)
    best = accuracy.amax(dim=1).numpy()  # over penalties
    lowest = loss.amin(dim=1).numpy()
    wanted = {
        "best cell": (best.max(), lowest.min()),
        "lower quartile": (np.percentile(best, 25), np.percentile(lowest, 25)),
        "median": (np.median(best), np.median(lowest)),
        "upper quartile": (np.percentile(best, 75), np.percentile(lowest, 75)),
    }
    for name, (right, cross_entropy) in wanted.items():
        events = EventAccumulator(str(tmp_path / name)).Reload()
        assert set(events.Tags()["scalars"]) == {
            f"training {group} by epoch/answer, {split}"
            for group in ("accuracy", "loss") for split in ("train", "validation")
        }  # fmt: skip
        for split in ("train", "validation"):
            points = events.Scalars(f"training accuracy by epoch/answer, {split}")
            assert [(e.step, e.value) for e in points] == [(1, pytest.approx(right)), (2, pytest.approx(right / 2))]
            points = events.Scalars(f"training loss by epoch/answer, {split}")
            assert [(e.step, e.value) for e in points] == [(n, pytest.approx(cross_entropy)) for n in (1, 2)]


def test_epochs_that_are_not_measured_have_no_point(tmp_path):
    curves = TrainingCurves(lambda name: build_logger(TrainerConfig(), tmp_path / name), 2)
    module = trained(torch.ones(2, PENALTIES), torch.ones(2, PENALTIES))
    module.measured = False
    curves.on_train_epoch_end(TRAINER, module)
    assert not list(tmp_path.iterdir())
