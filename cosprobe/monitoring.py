"""TensorBoard runs of a run folder, and the speed and memory of sampling and fitting.

TensorBoard calls each folder with event files a run. The runs of one run folder are `sampling`, `training` and its
subfolders, and those that the report writes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from cosprobe.config import TrainerConfig
from cosprobe.errors import InputError
from cosprobe.files import make_folder, writable

TENSORBOARD = "tensorboard"  # folder of TensorBoard runs in that of a result
SAMPLING, TRAINING = "sampling", "training"  # names of TensorBoard runs
FILES = ("events.out.tfevents.*", "hparams.yaml")  # what `TensorBoardLogger` writes
SPEED_AND_MEMORY = "speed and memory"  # the group of the tags


def build_logger(config: TrainerConfig, folder: Path) -> Logger:
    """The Lightning logger that the settings name, with its files in `folder` itself.

    TensorBoard files are not written before the first value. Raises InputError when wandb is chosen and not installed.
    """
    if config.logger == "csv":
        return CSVLogger(folder, name="", version="")
    if config.logger == "wandb":
        try:
            name, prefix = wandb_names(folder)
            return WandbLogger(save_dir=make_folder(folder), name=name, prefix=prefix)
        except ModuleNotFoundError as error:
            raise InputError("trainer.logger='wandb': wandb is not installed; pip install wandb, or use csv") from error
    return TensorBoardLogger(folder, name="", version="")


def log(logger: Logger, values: dict[str, float], step: int) -> None:
    """Logs values, and keeps them if the process is killed later. Raises InputError when they cannot be written."""
    with writable(Path(logger.log_dir or logger.save_dir or "."), among_others=True):
        logger.log_metrics(values, step=step)
        logger.save()


def wandb_names(folder: Path) -> tuple[str, str]:
    """Name of the W&B run, and what stands before the names of its values, for the logger of a folder.

    A process has one W&B run, so the values of `tensorboard/training/median` and of `tensorboard/sampling` are told
    apart by their names. The run is named by the folder of the result: `maze-layers/logistic`.
    """
    parts = folder.resolve().parts
    at = len(parts) - 1 - parts[::-1].index(TENSORBOARD) if TENSORBOARD in parts else len(parts) - 1
    return "/".join(parts[max(1, at - 2) : at]), "/".join(parts[at + 1 :])


@rank_zero_only
def remove_events(folder: Path, keep: Collection[str] = ()) -> None:
    """Deletes the TensorBoard files in `folder` and its subfolders, and subfolders that are empty then.

    Other files stay. Without this, TensorBoard would read the files of an earlier attempt together with the new ones.
    With several processes, the first one deletes. keep: names of subfolders whose files stay.
    """
    for name in FILES:
        for file in folder.rglob(name):
            if file.relative_to(folder).parts[0] not in keep:
                file.unlink()
    for path in sorted(folder.rglob("*"), reverse=True):  # a folder comes after its subfolders
        if path.is_dir():
            with suppress(OSError):  # not empty
                path.rmdir()


class ResourceMonitor(L.Callback):
    """Logs samples per second and peak memory for every batch of `Trainer.fit` and `Trainer.predict`.

    The time of a batch runs from its start to its end, and in `fit` includes the optimizer step. Loading of data and
    validation are not included. Memory is the peak since the process was started, in GB (1e9 bytes): resident memory,
    and on CUDA what PyTorch allocated on the device. With several processes, the values are those of the first. The
    axis is the number of samples so far. The first value replaces the TensorBoard files of an earlier attempt in the
    folder of the logger.
    Lightning's `ThroughputMonitor` has no memory, and logs up to seven values per batch to every logger of the trainer.

    logger: gets the values. stage: `sampling` or `fit`, part of the tags. size: number of samples of a batch. The
    attribute `done` is the number of samples so far, and is part of Lightning's checkpoints; a caller that goes on from
    an earlier attempt otherwise sets it.
    """

    def __init__(self, logger: Logger, stage: str, size: Callable[[Any], int] = len):
        self.logger, self.stage, self.size = logger, stage, size
        self.done, self.begin, self.fresh = 0, 0.0, True

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]

    def on_train_batch_start(self, *_: Any) -> None:
        self.begin = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        samples, device = self.size(batch), module.device
        memory = {"resident": peak_resident_memory()}
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # kernels run asynchronously
            memory["device"] = torch.cuda.max_memory_allocated(device)
        self.done += samples
        values = {"samples per second": samples / (time.perf_counter() - self.begin)}
        values |= {f"peak {name} memory in GB": size / 1e9 for name, size in memory.items() if size is not None}
        tags = {f"{SPEED_AND_MEMORY}/{self.stage}: {name}": value for name, value in values.items()}
        if self.fresh and self.logger.log_dir is not None:
            self._replace(Path(self.logger.log_dir))
        self.fresh = False
        log(self.logger, tags, self.done)

    on_predict_batch_start = on_train_batch_start
    on_predict_batch_end = on_train_batch_end

    @rank_zero_only
    def _replace(self, folder: Path) -> None:
        for name in FILES:
            for file in folder.glob(name):
                file.unlink()


def peak_resident_memory() -> int | None:
    """Peak resident memory of this process in bytes. None on Windows, where Python cannot read it."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB
