"""Features with their labels, and the batches logistic probes are trained on.

Training happens in the principal axes of each cell's rows (a rotation, so the penalty means the same): there
are never more of them than rows, and a gradient step can be scaled axis by axis.
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
from cosprobe.probes.linalg import Axes, design, principal_axes, spread, standardise
from cosprobe.tasks import Target, readable_targets


def check_targets(targets: Sequence[Target], train: ProbeSamples, validation: ProbeSamples) -> None:
    """Raises ValueError for the first target that has no two classes to tell apart, or nothing to validate on."""
    if not targets:
        raise InputError("targets: none can be read from these features; pool by region or add targets")
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
    """Rows in the principal axes, per form; labels per target; size: samples of the batch over all processes."""

    rows: dict[str, Float[Tensor, "cell sample row axis"]]
    labels: dict[str, Int[Tensor, " sample *region"]]
    size: int


class ProbeBatches:
    """The batches one process sees in an epoch.

    The order of all samples follows from (seed, epoch) alone; process `rank` of `world` takes rows
    rank::world of every batch, so any number of processes takes the same steps and no sample is repeated.
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
        if len(self) == 1:  # order does not matter then, and nothing has to be copied twice
            self._only = self._only or self._take(torch.arange(self.whole.size))
            yield self._only
            return
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        for chosen in torch.randperm(self.whole.size, generator=generator).split(self.batch):
            yield self._take(chosen)

    def _take(self, chosen: Int[Tensor, " sample"]) -> ProbeBatch:
        if self.world == 1 and len(chosen) == self.whole.size:
            return self.whole
        mine = chosen[self.rank :: self.world]
        rows = {form: x.index_select(1, mine.to(x.device)) for form, x in self.whole.rows.items()}
        labels = {name: y[mine.to(y.device)] for name, y in self.whole.labels.items()}
        return ProbeBatch(rows, labels, len(chosen))


class ProbeData(L.LightningDataModule):
    """Batches of some cells. `setup` standardises and finds the principal axes, on the trainer's device.

    mean, std and axes (per form) are there after `setup`; with several processes each finds the axes of its
    share of the cells and all end up with the same ones.
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
        device = self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")
        train = self.samples["train"]
        mean, std = spread(train.features)
        self.mean, self.std = mean.to(device), std.to(device)
        self.axes: dict[str, Axes] = {}
        self.whole: dict[str, ProbeBatch] = {}
        rows: dict[str, dict[str, Tensor]] = {name: {} for name in self.samples}
        for name, samples in self.samples.items():
            x = standardise(samples.features, self.mean, self.std)
            for form in self.forms:
                seen = _within(design(x, form), form)
                if name == "train":
                    self.axes[form] = _axes(seen)
                rows[name][form] = _coordinates(seen, self.axes[form])
            labels = {t.name: samples.labels[t.name].to(device) for t in self.targets}
            self.whole[name] = ProbeBatch(rows[name], labels, len(samples))

    def train_dataloader(self) -> ProbeBatches:
        return self._batches("train", self.batch)

    def val_dataloader(self) -> ProbeBatches:
        return self._batches("validation", max(1, len(self.samples["validation"])))

    def transfer_batch_to_device(self, batch: ProbeBatch, device: torch.device, dataloader_idx: int) -> ProbeBatch:
        return batch  # `setup` put everything there once

    def _batches(self, name: str, batch: int) -> ProbeBatches:
        if self.trainer is None:
            return ProbeBatches(self.whole[name], batch, self.seed, 0, 1)
        place = self.trainer.global_rank, self.trainer.world_size
        return ProbeBatches(self.whole[name], batch, self.seed, *place, lambda: self.trainer.current_epoch)


def _within(rows: Float[Tensor, "cell sample row width"], form: str) -> Float[Tensor, "cell sample row width"]:
    """Candidates compete inside a sample: what all of its rows share cannot change their softmax, and is removed."""
    return rows - rows.mean(dim=2, keepdim=True) if form == "candidate" else rows


def _coordinates(rows: Float[Tensor, "cell sample row width"], axes: Axes) -> Float[Tensor, "cell sample row axis"]:
    flat = (rows.flatten(1, 2) - axes.mean[:, None]) @ axes.basis
    return flat.unflatten(1, rows.shape[1:3])


def shared(solve: Callable[[slice], tuple[Tensor, ...]], cells: int) -> tuple[Tensor, ...]:
    """`solve(slice(0, cells))`, whose results have the cells first; processes, if there are several, divide the work.

    Every process ends up with the very same numbers, which data-parallel training relies on.
    """
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world == 1:
        return solve(slice(0, cells))
    workers = min(world, cells)
    edges = [cells * i // workers for i in range(workers + 1)]
    rank = dist.get_rank()
    mine = rank if rank < workers else 0  # with fewer cells than processes the rest learn the shapes from a copy
    own = solve(slice(edges[mine], edges[mine + 1]))
    parts = []
    for worker in range(workers):
        count = edges[worker + 1] - edges[worker]
        if worker == rank:
            part = tuple(tensor.contiguous() for tensor in own)
        else:
            part = tuple(tensor.new_empty(count, *tensor.shape[1:]) for tensor in own)
        for tensor in part:
            dist.broadcast(tensor, src=worker)
        parts.append(part)
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def _axes(rows: Float[Tensor, "cell sample row width"]) -> Axes:
    def solve(part: slice) -> tuple[Tensor, ...]:
        found = principal_axes(rows[part].flatten(1, 2))
        return found.mean, found.basis, found.variance

    return Axes(*shared(solve, len(rows)))
