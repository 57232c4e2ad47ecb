"""Flow matching of a video transformer on latents that were encoded once.

x_sigma = (1 - sigma) x0 + sigma noise, and the transformer learns the velocity noise - x0, which is what
diffusers' `FlowMatchEulerDiscreteScheduler` integrates. Source: Lipman et al., arXiv 2210.02747, with the
time shift of Esser et al., arXiv 2403.03206 (the same shift in training and in sampling).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import lightning as L
import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, IterableDataset

Batch = dict[str, Tensor]


@dataclass
class FlowConfig:
    """Recipe. stages: (longest, steps) trained one after another; a batch holds clips of one length, half of them the
    longest of the stage, half the shorter ones. Short clips first: what to draw is learned there, at a third of the
    cost of 13 frames, the usual length, which comes last.
    lr: AdamW, for everything that is not a matrix of a block; muon_lr: `torch.optim.Muon`, for those that are; 0 =
    AdamW for all. emphasis: weight of the tokens a video may change against 1 elsewhere. dropout: share of
    samples that see the empty prompt, so that guidance can be used. decay_from: share of the run after which
    the rate falls linearly to zero. start: `pipeline.path` of the transformer to go on from, such as `mini`; empty =
    random weights. compile: half a minute for each length, then a third less a step."""

    stages: list[list[int]] = field(default_factory=lambda: [[5, 6000], [17, 600], [13, 3000]])
    batch: int = 32
    lr: float = 1.5e-3
    muon_lr: float = 0.02
    weight_decay: float = 0.01
    warmup: int = 100
    decay_from: float = 0.6
    shift: float = 3.0
    emphasis: float = 5.0
    dropout: float = 0.1
    ema: float = 0.998
    start: str = ""
    compile: bool = True

    @property
    def steps(self) -> int:
        return sum(steps for _, steps in self.stages)


@dataclass(frozen=True)
class LatentClips:
    """Pre-encoded clips of one length, normalised. condition: the model's image condition (mask and encoded first
    frame), appended to the noisy channels. active: tokens that a video of this problem may change. text: which of
    `prompts` each clip has; the last prompt is the empty one."""

    latent: Float[Tensor, "clip channel frame height width"]
    condition: Float[Tensor, "clip condition frame height width"]
    active: UInt8[Tensor, "clip frame height width"]
    text: Int[Tensor, " clip"]
    prompts: Float[Tensor, "prompt token feature"]


class FlowBatches(IterableDataset):
    """Batches of the stages' lengths; of every length in epochs of a seeded order. Batch `i` depends on (seed, i)
    alone. clips: by number of frames."""

    def __init__(self, clips: Mapping[int, LatentClips], config: FlowConfig, seed: int, start: int):
        self.clips, self.seed, self.start = clips, seed, start
        self.batch, self.dropout = config.batch, config.dropout
        draw = np.random.default_rng(seed)
        self.plan = np.concatenate([_lengths(sorted(clips), longest, steps, draw) for longest, steps in config.stages])

    def __iter__(self) -> Iterator[Batch]:
        seen = {length: int((self.plan[: self.start] == length).sum()) for length in self.clips}
        orders: dict[tuple[int, int], Tensor] = {}
        for step in range(self.start, len(self.plan)):
            length = int(self.plan[step])
            clips = self.clips[length]
            epoch, place = divmod(seen[length], max(1, len(clips.latent) // self.batch))
            seen[length] += 1
            if (length, epoch) not in orders:
                shuffle = torch.Generator().manual_seed((self.seed * 1009 + epoch) * 101 + length)
                orders = {k: v for k, v in orders.items() if k[0] != length}
                orders[length, epoch] = torch.randperm(len(clips.latent), generator=shuffle)
            chosen = orders[length, epoch][place * self.batch : (place + 1) * self.batch]
            noise = torch.Generator().manual_seed((self.seed * 1009 + step) * 7919 + 1)
            shape = clips.latent[chosen].shape
            batch = {
                "latent": clips.latent[chosen].float(),
                "condition": clips.condition[chosen].float(),
                "active": clips.active[chosen].float(),
                "noise": torch.randn(shape, generator=noise),
                "time": torch.rand(shape[0], generator=noise),
            }
            dropped = torch.rand(shape[0], generator=noise) < self.dropout
            text = torch.where(dropped, len(clips.prompts) - 1, clips.text[chosen])
            yield batch | {"prompt": clips.prompts[text]}


def _lengths(known: Sequence[int], longest: int, steps: int, draw: np.random.Generator) -> np.ndarray:
    """Frames of the clips of each step: the longest length half of the time, the shorter ones alike for the rest."""
    *shorter, last = [length for length in known if length <= longest]
    share = [0.5 / len(shorter)] * len(shorter) + [0.5] if shorter else [1.0]
    return draw.choice([*shorter, last], size=steps, p=share)


class FlowMatching(L.LightningModule):
    """Trains a diffusers video transformer; keeps a running average of its weights, which is what ships."""

    def __init__(
        self, transformer: torch.nn.Module, clips: Mapping[int, LatentClips], config: FlowConfig, seed: int = 0
    ):
        super().__init__()
        self.automatic_optimization = False  # two optimisers on disjoint parameters of one loss
        self.config, self.clips, self.seed = config, clips, seed
        self.transformer = transformer
        self.average = AveragedModel(transformer, multi_avg_fn=self._average)
        self.average.requires_grad_(False)

    @torch.no_grad()
    def _average(self, averaged: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        """Exponential average that starts short, so that the first weights are forgotten."""
        keep = min(self.config.ema, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(list(averaged), list(current), 1 - keep)

    def train_dataloader(self) -> DataLoader:
        batches = FlowBatches(self.clips, self.config, self.seed, self.global_step)
        return DataLoader(batches, batch_size=None)

    def on_fit_start(self) -> None:
        """Makes steps cheap: on CPUs, the backward pass of the fused attention kernel takes half of the whole step."""
        if self.device.type == "cpu":
            self.transformer.set_attention_backend("_native_math")
        if self.config.compile:
            self.transformer.compile(dynamic=False)

    def loss(self, batch: Batch) -> Tensor:
        """Velocity error, weighted. Frame 0 is given, yet it counts: the pipeline samples it like the others, and
        the causal decoder builds every later frame on it."""
        config, latent, noise = self.config, batch["latent"], batch["noise"]
        sigma = config.shift * batch["time"] / (1 + (config.shift - 1) * batch["time"])
        s = sigma[:, None, None, None, None]
        noisy = torch.cat([(1 - s) * latent + s * noise, batch["condition"]], dim=1)
        velocity = self.transformer(noisy, sigma * 1000.0, batch["prompt"], return_dict=False)[0].float()
        weight = (1 + (config.emphasis - 1) * batch["active"])[:, None]
        weight[:, :, 0] = 1.0
        error = (velocity - (noise - latent)).square()
        return (weight * error).sum() / (weight.expand_as(error)).sum()

    def training_step(self, batch: Batch, batch_index: int) -> None:
        factor = self._rate(self.global_step)
        loss = self.loss(batch)
        self.manual_backward(loss)
        torch.nn.utils.clip_grad_norm_(self.transformer.parameters(), 1.0)
        *bare, last = self.optimizers() if isinstance(self.optimizers(), list) else [self.optimizers()]
        for wrapped in (*bare, last):
            for group in wrapped.param_groups:
                group["lr"] = group["highest"] * factor
        for wrapped in bare:  # the bare optimiser: Lightning counts a step for each wrapped one
            wrapped.optimizer.step()
        last.step()
        self.transformer.zero_grad(set_to_none=True)
        self.average.update_parameters(self.transformer)
        self.log_dict({"loss": loss.detach(), "rate": factor}, prog_bar=True)

    def _rate(self, step: int) -> float:
        left = (self.config.steps - step) / ((1 - self.config.decay_from) * self.config.steps)
        return min(1.0, (step + 1) / self.config.warmup, max(0.0, left))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """`highest` is the rate that the schedule scales."""
        config = self.config
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        for name, parameter in self.transformer.named_parameters():
            if parameter.requires_grad:
                inside = config.muon_lr > 0 and ".blocks." in f".{name}" and parameter.ndim == 2
                (matrices if inside else others).append(parameter)
        adam = {"params": others, "highest": config.lr}
        muon = {"params": matrices, "highest": config.muon_lr}
        optimizers: list[torch.optim.Optimizer] = []
        if others:
            optimizers.append(torch.optim.AdamW([adam], config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay))
        if matrices:
            optimizers.append(torch.optim.Muon([muon], config.muon_lr, momentum=0.95, weight_decay=config.weight_decay))
        return optimizers
