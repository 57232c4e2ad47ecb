"""What a killed fit leaves on disk, so that it can go on: finished chunks of cells, and a checkpoint of the next.

Every file has a SHA-256 checksum of its content, because neither safetensors nor `torch.load` notice changed bytes.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import platform
import shutil
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from cosprobe.activations import ProbeSamples, StoredTensor
from cosprobe.checked import read_tensors, write_tensors
from cosprobe.config import ProbeConfig, TrainerConfig
from cosprobe.errors import InputError
from cosprobe.files import make_folder, whole_file
from cosprobe.runs import code_fingerprint
from cosprobe.runtime import accelerator

# Least number of seconds between two checkpoints. A checkpoint is up to `probe.memory` (4 GB) large and takes seconds
# to write, while most fits take less than a minute in all.
INTERVAL = 300.0
CHECKSUM = "sha256"
DIGEST = 32  # bytes of a SHA-256 checksum
ENTRIES = {  # of a checkpoint of Lightning, which it reads without looking whether they are there
    *("state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers", "epoch", "global_step"),
    "pytorch-lightning_version",
}


class ChecksumIO(TorchCheckpointIO):
    """Writes Lightning checkpoints atomically, after a checksum of their content. Loads tensors and plain values only.

    The folder of a file is created when needed.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        make_folder(Path(path).parent)
        with whole_file(Path(path)) as part, part.open("w+b") as file:
            file.write(bytes(DIGEST))
            torch.save(checkpoint, file)
            file.seek(DIGEST)
            digest = hashlib.file_digest(file, CHECKSUM).digest()
            file.seek(0)
            file.write(digest)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Raises InputError for a file that is not a whole checkpoint of Lightning."""
        try:
            with Path(path).open("rb") as file:
                file.seek(DIGEST)
                found = torch.load(file, map_location=map_location, weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise InputError(f"{str(path)!r} is damaged, or is no checkpoint: delete it") from error
        if not isinstance(found, dict) or not isinstance(found.get("state_dict"), dict) or not found.keys() >= ENTRIES:
            raise InputError(f"{str(path)!r} is no checkpoint of this version: delete it")
        return found

    @staticmethod
    def intact(path: Path) -> bool:
        """Whether the file exists, and its content has the checksum before it."""
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(DIGEST) == hashlib.file_digest(file, CHECKSUM).digest()


def check_state(module: L.LightningModule, checkpoint: Mapping[str, Any], path: Path | str) -> None:
    """Raises InputError, with a name, unless the tensors of a checkpoint are those of a module, in its shapes."""
    found, own = (
        {name: tuple(getattr(values, "shape", ())) for name, values in state.items()}
        for state in (checkpoint["state_dict"], module.state_dict())
    )
    if others := sorted(name for name in {*found, *own} if found.get(name) != own.get(name)):
        raise InputError(f"{str(path)!r} is a checkpoint of something else ({others[0]} differs): delete it")


class EpochCheckpoint(ModelCheckpoint):
    """Saves one checkpoint at the end of an epoch, when the last one is at least INTERVAL seconds old.

    `ModelCheckpoint(train_time_interval=...)` saves inside an epoch. The batches left of the epoch and its metrics are
    not part of a checkpoint, so such a fit would go on with other batches. `every_n_epochs` alone would save at every
    epoch of a fit of seconds. There is no checkpoint of the last epoch: the trainer would skip `on_train_end`, which
    makes the Newton steps.
    """

    def __init__(self, path: Path):
        super().__init__(
            path.parent, path.stem, every_n_epochs=1, save_on_train_epoch_end=True, enable_version_counter=False
        )
        self.saved = time.monotonic()

    def setup(self, *args: Any, **named: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*exists and is not empty")  # as expected when a fit goes on
            super().setup(*args, **named)

    def state_dict(self) -> dict[str, Any]:
        return {}  # the name of the file does not change, and paths would be wrong in a folder that was moved

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        due = trainer.strategy.broadcast(time.monotonic() - self.saved >= INTERVAL)  # the same in all processes
        if due and trainer.current_epoch + 1 < trainer.max_epochs:
            super().on_train_epoch_end(trainer, module)
            self.saved = time.monotonic()


class SavedFit:
    """The files of one fit, in a subfolder of `folder` that is named after everything that determines the fit.

    Files of other fits are not read. With several processes, the first one writes, and decides for all of them what is
    read. `trainer` is the trainer of the chunk in question.
    """

    def __init__(self, folder: Path, samples: ProbeSamples, config: ProbeConfig, trainer: TrainerConfig, seed: int):
        self.folder = folder
        self.own = folder / fingerprint(samples, config, trainer, seed)

    def checkpoint(self, number: int) -> Path:
        """The checkpoint of a chunk."""
        return self.own / f"chunk-{number}.ckpt"

    def resumed(self, number: int, trainer: L.Trainer) -> Path | None:
        """The checkpoint of a chunk if there is one that is not damaged."""
        path = self.checkpoint(number)
        return path if trainer.strategy.broadcast(ChecksumIO.intact(path)) else None

    def load(self, number: int, trainer: L.Trainer) -> dict[str, Tensor] | None:
        """The results of a finished chunk; None if it is not finished, or the file is damaged."""
        tensors: dict[str, Tensor] | None = None
        with suppress(InputError):
            tensors, _ = read_tensors(self._finished(number))
        return tensors if trainer.strategy.broadcast(tensors is not None) else None

    def save(self, number: int, tensors: Mapping[str, Tensor], trainer: L.Trainer) -> None:
        """Saves the results of a finished chunk, and deletes its checkpoint."""
        if trainer.is_global_zero:
            make_folder(self.own)
            write_tensors(self._finished(number), tensors, {})
            self.checkpoint(number).unlink(missing_ok=True)

    def remove(self, trainer: L.Trainer) -> None:
        """Deletes the files of this and of other fits, after all processes have read theirs."""
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _finished(self, number: int) -> Path:
        return self.own / f"chunk-{number}.safetensors"


def fingerprint(samples: ProbeSamples, config: ProbeConfig, trainer: TrainerConfig, seed: int) -> str:
    """A checksum of everything that determines a fit: samples, settings, seed, versions and kind of machine.

    The kind of device is included because principal axes have an arbitrary sign, and checkpoints hold weights in them.
    The number of devices is not: it changes the rounding of sums only.
    """
    device = accelerator(trainer)
    cpu = torch.backends.cpu.get_cpu_capability()
    settings: dict[str, Any] = {
        "cells": [asdict(cell) for cell in samples.cells], "targets": [asdict(target) for target in samples.targets],
        "shapes": [list(samples.features.shape), str(samples.features.dtype)], "labels": list(samples.labels),
        "split": list(map(str, samples.split)), "keys": list(map(str, samples.keys)), "probe": asdict(config),
        "precision": trainer.precision, "deterministic": trainer.deterministic, "seed": seed,
        "versions": [torch.__version__, L.__version__, code_fingerprint()],
        "device": [device, torch.cuda.get_device_name() if device in ("cuda", "gpu") else platform.machine(), cpu],
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(settings).encode())
    for tensor in (samples.features, *samples.labels.values()):
        if isinstance(tensor, StoredTensor):
            digest.update(tensor.digest().encode())
        else:
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
