"""Flow matching of a video transformer on pre-encoded latents.

With x_sigma = (1 - sigma) x0 + sigma noise, the transformer learns the velocity noise - x0, which the
`FlowMatchEulerDiscreteScheduler` of diffusers integrates. Source: Lipman et al., arXiv 2210.02747, with the time shift
of Esser et al., arXiv 2403.03206 (the same shift in training and in sampling).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import lightning as L
import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, IterableDataset

from cosprobe.config import FlowConfig

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class LatentClips:
    """Pre-encoded, normalised clips of one length.

    condition: image condition (mask and encoded first frame), appended to the noisy channels. active: 1 for tokens that
    may change in the video. text: index of the prompt of each clip. prompts: embeddings; the last one is the empty
    prompt.
    """

    latent: Float[Tensor, "clip channel frame height width"]
    condition: Float[Tensor, "clip condition frame height width"]
    active: UInt8[Tensor, "clip frame height width"]
    text: Int[Tensor, " clip"]
    prompts: Float[Tensor, "prompt token feature"]


class FlowBatches(IterableDataset):
    """Batches for all stages. Clips of each length are visited in epochs of seeded order.

    Batch `i` depends on (seed, i) only. clips: by number of frames. start: index of the first batch.
    """

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
            epoch, part = divmod(seen[length], max(1, len(clips.latent) // self.batch))
            seen[length] += 1
            if (length, epoch) not in orders:
                shuffle = torch.Generator().manual_seed((self.seed * 1009 + epoch) * 101 + length)
                orders = {k: v for k, v in orders.items() if k[0] != length}
                orders[length, epoch] = torch.randperm(len(clips.latent), generator=shuffle)
            chosen = orders[length, epoch][part * self.batch : (part + 1) * self.batch]
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
    """Number of frames at each step: the longest with probability 1/2, otherwise one of the shorter lengths."""
    *shorter, last = [length for length in known if length <= longest]
    share = [0.5 / len(shorter)] * len(shorter) + [0.5] if shorter else [1.0]
    return draw.choice([*shorter, last], size=steps, p=share)


class FlowMatching(L.LightningModule):
    """Trains a diffusers video transformer and keeps a running average of its weights, which is exported."""

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
        """Exponential average with a shorter memory at the start, so that the first weights have no lasting effect."""
        keep = min(self.config.ema, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(list(averaged), list(current), 1 - keep)

    def train_dataloader(self) -> DataLoader:
        """Batches from the current step on."""
        batches = FlowBatches(self.clips, self.config, self.seed, self.global_step)
        return DataLoader(batches, batch_size=None)

    def on_fit_start(self) -> None:
        """Chooses attention without a fused kernel on CPUs, where its backward pass takes half of a step; compiles."""
        if self.device.type == "cpu":
            self.transformer.set_attention_backend("_native_math")
        if self.config.compile:
            self.transformer.compile(dynamic=False)

    def loss(self, batch: Batch) -> Tensor:
        """Weighted velocity error.

        Frame 0 is included although it is given: the pipeline samples it like the others, and the causal decoder
        computes all later frames from it.
        """
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
        """One step of all optimisers."""
        factor = self._rate(self.global_step)
        loss = self.loss(batch)
        self.manual_backward(loss)
        torch.nn.utils.clip_grad_norm_(self.transformer.parameters(), 1.0)
        *bare, last = self.optimizers() if isinstance(self.optimizers(), list) else [self.optimizers()]
        for wrapped in (*bare, last):
            for group in wrapped.param_groups:
                group["lr"] = group["highest"] * factor
        for wrapped in bare:  # unwrapped, because Lightning counts a step for each wrapped optimiser
            wrapped.optimizer.step()
        last.step()
        self.transformer.zero_grad(set_to_none=True)
        self.average.update_parameters(self.transformer)
        self.log_dict({"loss": loss.detach(), "rate": factor}, prog_bar=True)

    def _rate(self, step: int) -> float:
        left = (self.config.steps - step) / ((1 - self.config.decay_from) * self.config.steps)
        return min(1.0, (step + 1) / self.config.warmup, max(0.0, left))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW and Muon. `highest` is the learning rate that the schedule scales."""
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
