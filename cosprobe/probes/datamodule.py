"""The data module and the batches for the training of logistic probes.

Training uses the principal axes of the rows of each cell. A rotation does not change the penalty. There are never more
axes than rows, and the gradient can be scaled separately along each axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import lightning as L
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from cosprobe.activations import ProbeSamples
from cosprobe.errors import InputError
from cosprobe.probes.linalg import Axes, Parts, design, principal_axes, spread, standardise
from cosprobe.tasks import Target, readable_targets


def check_targets(targets: Sequence[Target], train: ProbeSamples, validation: ProbeSamples) -> None:
    """Raises InputError for the first target with fewer than two training classes or without validation labels.

    Also raises it when there are no targets.
    """
    if not targets:
        raise InputError("targets: none can be decoded from these features; set probe.pooling=region or add targets")
    for target in targets:
        seen = train.labels[target.name]
        classes = seen[seen >= 0].unique().numel()
        if classes < 2:
            raise InputError(
                f"target {target.name!r}: {classes} classes among {len(train)} training samples, expected at least 2; "
                "collect more problems or leave the target out"
            )
        if not (validation.labels[target.name] >= 0).any():
            raise InputError(
                f"target {target.name!r}: no label among {len(validation)} validation samples, expected at least 1; "
                "collect more problems or leave the target out"
            )


@dataclass(frozen=True)
class ProbeBatch:
    """rows: by form, in principal axes. labels: by target. size: number of samples of the batch over all processes."""

    rows: dict[str, Float[Tensor, "cell sample row axis"]]
    labels: dict[str, Int[Tensor, " sample *region"]]
    size: int


class ProbeBatches:
    """The batches of one epoch in one process.

    The order of the samples depends on `seed` and epoch only. Process `rank` of `world` takes the samples rank::world
    of every batch. So the optimiser steps do not depend on the number of processes, and no sample is repeated.
    """

    def __init__(
        self, whole: ProbeBatch, batch: int, seed: int, rank: int, world: int, epoch: Callable[[], int] = lambda: 0
    ):
        self.whole, self.batch, self.seed, self.epoch = whole, batch, seed, epoch
        self.rank, self.world = rank, world
        self._only: ProbeBatch | None = None

    def __len__(self) -> int:
        return math.ceil(self.whole.size / self.batch)

    def __iter__(self) -> Iterator[ProbeBatch]:
        if len(self) == 1:  # the order has no effect, and the copy is reused
            self._only = self._only or self._take(torch.arange(self.whole.size))
            yield self._only
            return
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        for chosen in torch.randperm(self.whole.size, generator=generator).split(self.batch):
            yield self._take(chosen)

    def _take(self, chosen: Int[Tensor, " sample"]) -> ProbeBatch:
        """The part of this process of a batch."""
        if self.world == 1 and len(chosen) == self.whole.size:
            return self.whole
        kept = chosen[self.rank :: self.world]
        rows = {form: x.index_select(1, kept.to(x.device)) for form, x in self.whole.rows.items()}
        labels = {name: y[kept.to(y.device)] for name, y in self.whole.labels.items()}
        return ProbeBatch(rows, labels, len(chosen))


class ProbeData(L.LightningDataModule):
    """Training and validation batches of some cells.

    `setup` standardises the features and computes the principal axes, on the device of the trainer. It sets `mean`,
    `std` and `axes` (by form). Several processes divide the cells for the principal axes and exchange the results.
    Raises InputError for a batch size below 1.
    """

    def __init__(self, train: ProbeSamples, validation: ProbeSamples, batch: int, seed: int):
        super().__init__()
        if batch < 1:
            raise InputError(f"probe.batch={batch}: expected at least 1 sample")
        self.samples = {"train": train, "validation": validation}
        self.targets = readable_targets(train.targets, train.regions)
        self.forms = tuple(dict.fromkeys(t.form for t in self.targets))
        self.batch, self.seed = batch, seed

    def setup(self, stage: str | None = None) -> None:
        """Standardises, computes principal axes, and moves all data to the device of the trainer."""
        device = self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")
        values = {name: samples.features[:] for name, samples in self.samples.items()}
        mean, std = spread(values["train"])
        self.mean, self.std = mean.to(device), std.to(device)
        self.axes: dict[str, Axes] = {}
        self.whole: dict[str, ProbeBatch] = {}
        rows: dict[str, dict[str, Tensor]] = {name: {} for name in self.samples}
        for name, samples in self.samples.items():
            x = standardise(values.pop(name), self.mean, self.std)
            for form in self.forms:
                seen = _within(design(x, form), form)
                if name == "train":
                    self.axes[form] = _axes(seen)
                rows[name][form] = _coordinates(seen, self.axes[form])
            labels = {t.name: samples.labels[t.name].to(device) for t in self.targets}
            self.whole[name] = ProbeBatch(rows[name], labels, len(samples))

    def release(self) -> None:
        """Drops all data. The trainer keeps its data module, in a cycle that is collected much later."""
        for batch in self.whole.values():
            batch.rows.clear()
            batch.labels.clear()
        self.axes.clear()

    def train_dataloader(self) -> ProbeBatches:
        return self._batches("train", self.batch)

    def val_dataloader(self) -> ProbeBatches:
        return self._batches("validation", max(1, len(self.samples["validation"])))

    def transfer_batch_to_device(self, batch: ProbeBatch, device: torch.device, dataloader_idx: int) -> ProbeBatch:
        return batch  # `setup` has moved all data already

    def _batches(self, name: str, batch: int) -> ProbeBatches:
        if self.trainer is None:
            return ProbeBatches(self.whole[name], batch, self.seed, 0, 1)
        process = self.trainer.global_rank, self.trainer.world_size
        return ProbeBatches(self.whole[name], batch, self.seed, *process, lambda: self.trainer.current_epoch)


def _within(rows: Float[Tensor, "cell sample row width"], form: str) -> Float[Tensor, "cell sample row width"]:
    """For form `candidate`, subtracts the mean of the rows of each sample, which has no effect on their softmax."""
    return rows - rows.mean(dim=2, keepdim=True) if form == "candidate" else rows


def _coordinates(rows: Float[Tensor, "cell sample row width"], axes: Axes) -> Float[Tensor, "cell sample row axis"]:
    """Rows in principal axes."""
    flat = (rows.flatten(1, 2) - axes.mean[:, None]) @ axes.basis
    return flat.unflatten(1, rows.shape[1:3])


def shared(solve: Callable[[slice], Parts], cells: int) -> Parts:
    """Returns `solve(slice(0, cells))`. Several processes divide the cells and exchange their results.

    solve: returns tensors whose first axis is the cells of the slice. All processes get identical values, as
    data-parallel training requires.
    """
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world == 1:
        return solve(slice(0, cells))
    workers = min(world, cells)
    edges = [cells * i // workers for i in range(workers + 1)]
    rank = dist.get_rank()
    part_number = rank if rank < workers else 0  # processes without cells solve part 0, to get the shapes
    solved = solve(slice(edges[part_number], edges[part_number + 1]))
    parts = []
    for worker in range(workers):
        count = edges[worker + 1] - edges[worker]
        if worker == rank:
            part = {name: tensor.contiguous() for name, tensor in solved.items()}
        else:
            part = {name: tensor.new_empty(count, *tensor.shape[1:]) for name, tensor in solved.items()}
        for tensor in part.values():  # in the same order in every process
            dist.broadcast(tensor, src=worker)
        parts.append(part)
    return {name: torch.cat([part[name] for part in parts]) for name in solved}


def _axes(rows: Float[Tensor, "cell sample row width"]) -> Axes:
    """Principal axes of the rows of each cell. Several processes divide the cells."""
    return Axes(**shared(lambda part: dict(vars(principal_axes(rows[part].flatten(1, 2)))), len(rows)))
