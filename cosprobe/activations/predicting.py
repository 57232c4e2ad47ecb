"""Sampling under Lightning: `Trainer.predict` calls a frozen pipeline batch by batch, and a writer stores the results.

Devices, nodes, strategies and progress bars are those of the trainer. The dataloader holds the shards that are missing
on disk; Lightning divides them among the processes. A shard has the same content in any process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, Callback, RichProgressBar
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cosprobe.activations.sampler import Sampler
from cosprobe.activations.store import ActivationStore
from cosprobe.config import TrainerConfig
from cosprobe.errors import InputError
from cosprobe.runtime import build_trainer, keyboard_interrupts, rank_and_world, say

Sampled = tuple[dict[str, Tensor], dict[str, Any]]  # the tensors of a shard, and the names along their axes
POLL = 0.5  # seconds between looks at the files of other processes


@dataclass(frozen=True, eq=False)
class Shard:
    """A batch for `Trainer.predict`. index: of the shard in its store. content: what the module samples."""

    store: ActivationStore
    index: int
    content: Any

    def __len__(self) -> int:
        return len(self.content)


class FrozenSampling(L.LightningModule):
    """Base of the modules that sample with a frozen pipeline in `predict_step`.

    The pipeline is not registered as a submodule: Lightning would move it, which undoes offloading. It stays on the
    device on which it was loaded. Raises InputError, in `setup`, for weights that are in training mode or require
    gradients.
    """

    def __init__(self, sampler: Sampler):
        super().__init__()
        self.sampler = sampler

    def setup(self, stage: str) -> None:
        """Checks that the pipeline is frozen."""
        for name, part in self.sampler.model.components.items():
            if isinstance(part, nn.Module) and (part.training or any(p.requires_grad for p in part.parameters())):
                raise InputError(
                    f"pipeline: {name} is in training mode or requires gradients; expected a frozen pipeline, as "
                    "load_pipeline returns it"
                )

    def transfer_batch_to_device(self, batch: Shard, device: torch.device, dataloader_idx: int) -> Shard:
        """Returns the batch as it is: problems are not tensors."""
        return batch


class ShardWriter(BasePredictionWriter):
    """Writes every prediction to the store of its shard as soon as it is there."""

    def __init__(self) -> None:
        super().__init__("batch")

    def write_on_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, prediction: Sampled, indices: Any, batch: Shard, *_: Any
    ) -> None:
        """Writes one shard."""
        batch.store.write(batch.index, *prediction)


def predict_shards(
    module: FrozenSampling, shards: Sequence[Shard], trainer: TrainerConfig, callbacks: Sequence[Callback] = ()
) -> None:
    """Samples the shards that are missing on disk and completes their stores.

    All processes call it with the same shards. Precision is that of the pipeline, not `trainer.precision`.
    Raises InputError when `trainer.limit_predict_batches` ends the sampling before all shards are on disk.
    """
    stores = {shard.store.folder: shard.store for shard in shards}
    absent = {folder: set(store.missing()) for folder, store in stores.items()}
    missing: Any = [shard for shard in shards if shard.index in absent[shard.store.folder]]  # for mypy, a dataset
    if missing:
        bars = [RichProgressBar(leave=True)] if trainer.enable_progress_bar else []
        runner = build_trainer(
            trainer, precision="32-true", inference_mode=False, callbacks=[ShardWriter(), *callbacks, *bars]
        )
        # Lightning needs a batch for every process; a shard that two of them sample is the same in both
        missing = [missing[i % len(missing)] for i in range(max(len(missing), runner.world_size))]
        with keyboard_interrupts():
            runner.predict(module, DataLoader(missing, batch_size=1, collate_fn=_single), return_predictions=False)
        limit = trainer.limit_predict_batches
        if limit is not None and limit * runner.world_size < len(missing):
            left = sum(not shard.store.has(shard.index) for shard in shards)
            raise InputError(
                f"trainer.limit_predict_batches={limit}: {left} of {len(shards)} shards are still to be sampled; the "
                "same command continues"
            )
    _complete(list(stores.values()))


def _single(shards: list[Shard]) -> Shard:
    return shards[0]


def _complete(stores: Sequence[ActivationStore]) -> None:
    """Writes the manifests in the first process, when all processes have written their shards.

    A process looks for the files of the others. A barrier would end with an error when another process samples for
    longer than the communication timeout. Raises InputError in a process whose first process is gone.
    """
    rank, world = rank_and_world()
    parent = os.getppid()
    for store in stores:
        while world > 1 and (store.lacking() if rank == 0 else not store.complete):
            if rank and os.getppid() != parent:
                raise InputError(f"{str(store.folder)!r}: the first process has ended; the same command continues")
            time.sleep(POLL)
        if rank == 0 and not store.complete:
            store.finish()


def announce(store: ActivationStore, size: int, what: str) -> None:
    """Creates the folder of a store and prints what it will hold. size: bytes of the complete store.

    Raises InputError as `ActivationStore.begin` does.
    """
    if rank_and_world()[0] == 0:
        store.begin(size)
    missing, name = store.missing(), store.folder.name
    if not missing:
        say(f"{name}: {what} are already in {store.folder}; re-using them")
        return
    there = store.shards - len(missing)
    done = f"; {there} of {store.shards} shards exist already" if there else ""
    say(f"{name}: {what}, {size / 1e6:.0f} MB in {store.folder}{done}")
