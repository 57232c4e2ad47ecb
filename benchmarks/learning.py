"""Flow matching with the settings of the recipe, compared with a plain version: loss and gradients of as many clips.

Recipe: compiled, attention with a fast backward pass on CPUs, and mostly short clips. Plain: not compiled, default
attention, and only clips of the length that is sampled later. Latents are noise of the same shapes, because run time
does not depend on their content. Only this benchmark: `python -m benchmarks learn`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.pairs import Pair, side_by_side
from cosprobe.command import load
from cosprobe.config import MiniConfig, TrainRun
from cosprobe.minimodel.encoding import TEXT_TOKENS, TEXT_WIDTH
from cosprobe.minimodel.flow_matching import Batch, FlowMatching
from cosprobe.models import load_pipeline


def measure(repeats: int = 5, batches: int = 4, frames: int = 13, settings: Sequence[str] = ()) -> list[Pair]:
    """Two pairs: the recipe at 5 and at `frames` frames, each compared with the plain version at `frames` frames."""
    run: Any = load(TrainRun, ["experiment=mini", *settings])
    config: MiniConfig = run.experiment
    vae = load_pipeline(run.pipeline).vae
    plain, quick = (learner(run, compiled) for compiled in (False, True))
    pairs = []
    for length in (5, frames):
        short, long = noise_batch(vae, config.flow.batch, length), noise_batch(vae, config.flow.batch, frames)
        gradients(quick, short, 1)  # compiling is not measured
        pairs.append(
            side_by_side(
                f"{batches * config.flow.batch} clips of {length} frames learned from, compiled",
                partial(gradients, quick, short, batches),
                f"of {frames} frames, the plain way",
                partial(gradients, plain, long, batches),
                repeats,
            )
        )
    return pairs


def learner(run: Any, compiled: bool) -> FlowMatching:
    """The module that trains the model in the package."""
    model = load_pipeline(run.pipeline)
    module = FlowMatching(model.transformer.requires_grad_(True).train(), {}, run.experiment.flow)
    if compiled:
        module.on_fit_start()
    return module


def noise_batch(vae: Any, size: int, frames: int) -> Batch:
    """A batch of `size` clips of `frames` frames whose latents are noise."""
    config = vae.config
    latent = (size, config.z_dim, 1 + (frames - 1) // 4, 8, 8)
    condition = (size, config.z_dim + config.scale_factor_temporal, *latent[2:])
    return {
        "latent": torch.randn(latent),
        "condition": torch.randn(condition),
        "active": torch.ones(size, *latent[2:]),
        "noise": torch.randn(latent),
        "time": torch.rand(size),
        "prompt": torch.randn(size, TEXT_TOKENS, TEXT_WIDTH),
    }


def gradients(module: FlowMatching, batch: Batch, times: int) -> None:
    """Computes loss and gradients of the same batch `times` times."""
    for _ in range(times):
        with torch.autocast("cpu", torch.bfloat16):
            loss = module.loss(batch)
        loss.backward()
        module.zero_grad(set_to_none=True)
