"""Sampling under Lightning: `Trainer.predict` calls a frozen pipeline batch by batch, and a writer stores the results.

Devices, nodes, strategies and progress bars are those of the trainer. The dataloader holds the shards that are missing
on disk; Lightning divides them among the processes. A shard has the same content in any process.
"""

from __future__ import annotations

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
from cosprobe.activations.store import ActivationStore, Rows
from cosprobe.config import TrainerConfig
from cosprobe.errors import InputError
from cosprobe.runtime import build_trainer, keyboard_interrupts, rank_and_world, say

Sampled = tuple[dict[str, Tensor], dict[str, Any]]  # the tensors of a shard, and the names along their axes
POLL = 0.5  # seconds between looks at the files of other processes


@dataclass(frozen=True, eq=False)
class Shard:
    """A batch for `Trainer.predict`. rows: names of its samples, see `ActivationStore`. content: what is sampled."""

    store: ActivationStore
    rows: Rows
    content: Any

    def __len__(self) -> int:
        return len(self.content)

    @property
    def written(self) -> bool:
        """Whether the shard is on disk."""
        return self.store.path(self.rows).is_file()


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
        batch.store.write(batch.rows, *prediction)


def predict_shards(
    module: FrozenSampling,
    shards: Sequence[Shard],
    samples: Sequence[tuple[ActivationStore, Sequence[str]]],
    trainer: TrainerConfig,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Samples shards that are not on disk yet, and completes their stores.

    All processes call it with the same shards. Precision is that of the pipeline, not `trainer.precision`.
    samples: for each store, the names of all samples that it is to hold afterwards.
    Raises InputError when `trainer.limit_predict_batches` ends the sampling before all shards are on disk.
    """
    if shards:
        bars = [RichProgressBar(leave=True)] if trainer.enable_progress_bar else []
        runner = build_trainer(
            trainer, precision="32-true", inference_mode=False, callbacks=[ShardWriter(), *callbacks, *bars]
        )
        # Lightning needs a batch for every process; a shard that two of them sample is the same in both
        each: Any = [shards[i % len(shards)] for i in range(max(len(shards), runner.world_size))]  # for mypy, a dataset
        with keyboard_interrupts():
            runner.predict(module, DataLoader(each, batch_size=1, collate_fn=_single), return_predictions=False)
        limit = trainer.limit_predict_batches
        if limit is not None and limit * runner.world_size < len(each):
            left = sum(not shard.written for shard in shards)
            raise InputError(
                f"trainer.limit_predict_batches={limit}: {left} of {len(shards)} shards are still to be sampled; the "
                "same command continues"
            )
    _complete(shards, samples, trainer.timeout)


def _single(shards: list[Shard]) -> Shard:
    return shards[0]


def _complete(
    shards: Sequence[Shard], samples: Sequence[tuple[ActivationStore, Sequence[str]]], timeout: float
) -> None:
    """Writes the manifests in the first process, when all processes have written their shards.

    A process looks for the files of the others. A barrier would end with an error when another process samples for
    longer than the communication timeout. Raises InputError when no shard appears for `timeout` seconds.
    """
    rank, world = rank_and_world()
    for store, names in samples:
        own = [shard for shard in shards if shard.store is store]
        there, since = -1, time.monotonic()
        while world > 1 and not (all(shard.written for shard in own) and (rank == 0 or store.complete(names))):
            if (written := sum(shard.written for shard in own)) != there:
                there, since = written, time.monotonic()
            if time.monotonic() - since > timeout:
                raise InputError(
                    f"{str(store.folder)!r}: no new shard in {timeout:g} s (trainer.timeout); the same command "
                    "continues"
                )
            time.sleep(POLL)
        if rank == 0 and (own or not store.complete(names)):
            store.finish(names)


def announce(store: ActivationStore, names: Sequence[str], missing: int, size: int, what: str) -> None:
    """Creates the folder of a store and prints what it will hold.

    names: of the samples that are asked for. missing: number of those that are to be sampled. size: bytes of all.
    Raises InputError as `ActivationStore.begin` does.
    """
    needed = size * missing // max(1, len(names))
    if rank_and_world()[0] == 0:
        store.begin(needed)
    name = store.folder.name
    if not missing:
        say(f"{name}: {what} are already in {store.folder}; re-using them")
        return
    there = len(names) - missing
    done = f"; {there} of {len(names)} samples exist already" if there else ""
    say(f"{name}: {what}, {size / 1e6:.0f} MB in {store.folder}{done}")
