"""Training of a small causal video autoencoder (diffusers' `AutoencoderKLWan`) on the videos of several tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from diffusers import AutoencoderKLWan
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from cosprobe.config import AutoencoderConfig
from cosprobe.tasks import Problem, Task

IDLE = 0.25  # a channel is unused if its standard deviation is at most this share of the largest one


def build_autoencoder(config: AutoencoderConfig) -> AutoencoderKLWan:
    """Builds an autoencoder; by default it compresses 4x in time and 8x in space (patches of 2, two halvings)."""
    pixels = 3 * config.patch_size**2
    halvings = len(config.dim_mult) - 1
    return AutoencoderKLWan(
        base_dim=config.base_dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=1,
        temperal_downsample=[True] * halvings,
        in_channels=pixels,
        out_channels=pixels,
        patch_size=config.patch_size,
        latents_mean=[0.0] * config.z_dim,
        latents_std=[1.0] * config.z_dim,
        scale_factor_temporal=2**halvings,
        scale_factor_spatial=config.patch_size * 2**halvings,
    )


@torch.no_grad()
def revive(vae: AutoencoderKLWan) -> list[int]:
    """Initialises unused latent channels again and returns their indices.

    A channel is unused if its `latents_std` is at most `IDLE` times the largest one. The KL term has reduced it to
    noise, and the decoder ignores it, so further training does not bring it back.
    The 1 x 1 x 1 convolutions before and after the latent are first merged into their neighbours, so that each channel
    has its own weights. Apart from the border of the image, this leaves the outputs unchanged.
    """
    deviations = torch.tensor(vae.config["latents_std"])
    # `measure_scale` raised smaller deviations to this share, so they are equal to it up to rounding
    idle = torch.nonzero(deviations <= 1.001 * IDLE * deviations.max()).flatten().tolist()
    if not idle:
        return idle
    z, outer, inner = len(deviations), cast(Any, vae.quant_conv), cast(Any, vae.encoder.conv_out)
    mix = outer.weight[:, :, 0, 0, 0]
    inner.weight.copy_(torch.einsum("oi,i...->o...", mix, inner.weight))
    inner.bias.copy_(mix @ inner.bias + outer.bias)
    after, first = cast(Any, vae.post_quant_conv), cast(Any, vae.decoder.conv_in)
    first.bias.add_(torch.einsum("oi...,i->o", first.weight, after.bias))
    first.weight.copy_(torch.einsum("oi...,ij->oj...", first.weight, after.weight[:, :, 0, 0, 0]))
    for single in (outer, after):
        single.weight.copy_(torch.eye(single.weight.shape[0]).reshape(single.weight.shape))
        single.bias.zero_()
    bound = (3 / first.weight[0].numel()) ** 0.5
    for channel in idle:
        inner.weight[channel].uniform_(-bound, bound)
        inner.bias[channel] = 0
        inner.weight[z + channel] = 0
        inner.bias[z + channel] = -4  # logarithm of the variance: little noise
        first.weight[:, channel].uniform_(-bound, bound)
    return idle


def to_model_range(frames: np.ndarray) -> Tensor:
    """uint8 [..., frame, height, width, 3] -> float [..., 3, frame, height, width] in [-1, 1]."""
    return rearrange(torch.from_numpy(frames).float() / 127.5 - 1, "... f h w c -> ... c f h w")


Family = tuple[Task, Sequence[Problem]]


def video_of(task: Task, problem: Problem, frames: int) -> np.ndarray:
    """The reference video of a problem at another length: uint8 [frame, height, width, 3]."""
    return cast(Task, replace(cast(Any, task), frames=frames)).video(problem)


class ClipBatches(IterableDataset):
    """Endless batches of videos of one length, each of a random task and problem.

    Batch `i` depends on (seed, i) only, so a resumed run gets the same batches. start: index of the first batch.
    """

    def __init__(
        self, families: Sequence[Family], lengths: Sequence[int], config: AutoencoderConfig, seed: int, start: int
    ):
        self.families, self.lengths, self.config, self.seed, self.start = families, lengths, config, seed, start

    def __iter__(self) -> Iterator[Float[Tensor, "batch 3 frame height width"]]:
        plan = [(longest, batch) for longest, batch, steps in self.config.stages for _ in range(steps)]
        for step, (longest, batch) in enumerate(plan[self.start :], start=self.start):
            rng = np.random.default_rng([self.seed, step])
            length = int(rng.choice([n for n in self.lengths if n <= longest] or self.lengths[:1]))
            clips = []
            for number in rng.integers(len(self.families), size=batch):
                task, problems = self.families[number]
                video = video_of(task, problems[rng.integers(len(problems))], length)
                first = int(rng.integers(length)) if longest == 1 else 0
                clips.append(video[first : first + 1] if longest == 1 else video)
            yield to_model_range(np.stack(clips))


class AutoencoderTraining(L.LightningModule):
    """Trains the autoencoder on weighted absolute plus squared reconstruction error and a KL term. Can be resumed."""

    def __init__(
        self, config: AutoencoderConfig, families: Sequence[Family], lengths: Sequence[int] = (13,), seed: int = 0
    ):
        super().__init__()
        self.config, self.families, self.lengths, self.seed = config, families, lengths, seed
        torch.manual_seed(seed)
        self.vae = build_autoencoder(config)

    def train_dataloader(self) -> DataLoader:
        """Batches from the current step on."""
        batches = ClipBatches(self.families, self.lengths, self.config, self.seed, self.global_step)
        return DataLoader(batches, batch_size=None)

    def training_step(self, clips: Tensor, batch_index: int) -> Tensor:
        """Loss of one batch of clips [batch, 3, frame, height, width]."""
        posterior = self.vae.encode(clips).latent_dist
        step = self.seed * 1_000_003 + self.global_step  # the same noise in a resumed run
        noise = torch.Generator(self.device).manual_seed(step)
        error = self.vae.decode(posterior.sample(noise)).sample.float() - clips
        moved = (clips != clips[:, :, :1]).any(dim=1, keepdim=True)
        weight = 1 + (self.config.emphasis - 1) * moved
        loss = (weight * (error.abs() + error.square())).mean() / weight.mean()
        loss = loss + self.config.kl * posterior.kl().mean()
        self.log_dict({"mse": error.square().mean(), "loss": loss}, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict:
        """Adam with linear warm-up and linear decay over the last 30 % of steps."""
        optimizer = torch.optim.Adam(self.vae.parameters(), lr=self.config.lr, betas=(0.9, 0.95))

        def factor(step: int) -> float:
            left = (self.config.steps - step) / (0.3 * self.config.steps)
            return min(1.0, (step + 1) / self.config.warmup, max(0.02, left))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
