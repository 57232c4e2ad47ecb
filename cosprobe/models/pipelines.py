"""Frozen diffusers video pipelines, and the little that differs between their architectures.

Nothing here re-implements sampling: `sample` calls the pipeline's own `__call__`, once for a batch of
different problems.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from jaxtyping import Float
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from cosprobe.errors import InputError
from cosprobe.models.cpu_layout import arrange
from cosprobe.runtime import enough_memory

KINDS = (".json", ".safetensors")  # of files that make a model

PROMPTS = ("prompt_embeds", "negative_prompt_embeds")  # what a pipeline's loop holds per sample beside its latents
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class PipelineConfig:
    """Which model, and how it samples. path: a diffusers folder; empty or `mini` = the model in the package.
    lora: a folder of adapters that diffusers' `load_lora_weights` reads; empty = none.

    steps: sampler steps. guidance: classifier-free guidance scale, 1 = off. frames: video frames (4k+1 for
    Wan). prompt_tokens: length prompts are padded to. batch: samples per call; part of the store's identity.
    """

    name: str = "mini"
    path: str = ""
    lora: str = ""
    steps: int = 20
    guidance: float = 1.0
    frames: int = 13
    prompt_tokens: int = 32
    negative_prompt: str = ""
    dtype: str = "float32"
    batch: int = 16

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"pipeline.dtype={self.dtype!r}: expected one of {', '.join(DTYPES)}")
        for name in ("steps", "frames", "prompt_tokens", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"pipeline.{name}={getattr(self, name)}: expected at least 1")
        if self.guidance < 1:
            raise InputError(f"pipeline.guidance={self.guidance}: expected 1 (off) or more")

    @property
    def folder(self) -> Path:
        if self.path in ("", "mini"):  # a folder of that name is `./mini`
            return Path(str(files("cosprobe") / "weights" / "mini"))
        return Path(self.path)

    @property
    def parts(self) -> list[Path]:
        """Folders whose files make the model."""
        return [self.folder, *([Path(self.lora)] if self.lora else [])]


@dataclass(frozen=True)
class Architecture:
    """Facts about a transformer class that its signature does not tell.

    blocks: containers of blocks, in order of execution. video: index of the video tokens in what a block
    returns, None when it returns nothing else. layout: axes of the latents the scheduler steps.
    """

    blocks: tuple[str, ...]
    video: int | None
    layout: str = "b c f h w"


ARCHITECTURES = {
    "WanTransformer3DModel": Architecture(("blocks",), None),
    "CogVideoXTransformer3DModel": Architecture(("transformer_blocks",), 0, "b f c h w"),
    "HunyuanVideoTransformer3DModel": Architecture(("transformer_blocks", "single_transformer_blocks"), 0),
}


def architecture(transformer: nn.Module) -> Architecture:
    """Raises ValueError for a transformer class whose blocks are not known."""
    name = type(transformer).__name__
    if name not in ARCHITECTURES:
        raise InputError(
            f"transformer class {name} is not known: expected one of {', '.join(ARCHITECTURES)}; "
            "add its facts to ARCHITECTURES (a compiled transformer must be captured before it is compiled)"
        )
    return ARCHITECTURES[name]


def experts(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The transformers a run may use: `high` and `low` noise for Wan2.2's pair, else `only`."""
    second = getattr(pipeline, "transformer_2", None)
    first = getattr(pipeline, "transformer", None)
    if first is not None and second is not None:
        return {"high": first, "low": second}
    if first is None and second is None:
        raise InputError(f"{type(pipeline).__name__} has no transformer: expected a video diffusion transformer")
    return {"only": first if first is not None else second}


def block_list(transformer: nn.Module) -> list[nn.Module]:
    return [block for name in architecture(transformer).blocks for block in getattr(transformer, name)]


def token_grid(transformer: nn.Module, latent: Tensor) -> tuple[int, int, int]:
    """(frames, rows, columns) of tokens for the latents a transformer is called with."""
    axes = dict(zip(architecture(transformer).layout.split(), latent.shape, strict=True))
    across, height, width = _patch(transformer)
    return axes["f"] // across, axes["h"] // height, axes["w"] // width


def latent_tokens(transformer: nn.Module, latent: Tensor) -> Float[Tensor, "batch token channel"]:
    """Latents cut into the transformer's own patches: one token per patch, channels and pixels flattened."""
    if architecture(transformer).layout == "b f c h w":
        latent = latent.transpose(1, 2)
    (t, h, w), (b, c, f, y, x) = _patch(transformer), latent.shape
    patches = latent.reshape(b, c, f // t, t, y // h, h, x // w, w).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return patches.reshape(b, (f // t) * (y // h) * (x // w), c * t * h * w)


def patch_columns(transformer: nn.Module) -> tuple[int, int]:
    """Numbers in one token of the noisy latent, and of what stands beside it on the channel axis (0 for nothing)."""
    volume, config = math.prod(_patch(transformer)), transformer.config
    return volume * config.out_channels, volume * max(0, config.in_channels - config.out_channels)


def _patch(transformer: nn.Module) -> tuple[int, int, int]:
    size, across = transformer.config.patch_size, transformer.config.get("patch_size_t", None)
    return (across or 1, size, size) if isinstance(size, int) else tuple(size)


def clean_estimate(scheduler: Any, step: int, output: Tensor, noisy: Tensor) -> Tensor:
    """x0-hat, the clean latent the model expects at `step` (a step index).

    Flow matching: x0 = x - sigma v (arXiv 2603.16870, section 3.1). Variance-preserving schedulers: by their
    prediction type. Raises ValueError for a scheduler that predicts something else.
    """
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    output, noisy = output.float(), noisy.float()
    if kind == "flow_prediction":
        return noisy - scheduler.sigmas[step].to(noisy) * output
    if kind == "sample":
        return output
    if kind in ("epsilon", "v_prediction") and hasattr(scheduler, "alphas_cumprod"):
        alpha = scheduler.alphas_cumprod[int(scheduler.timesteps[step])].to(noisy)
        if kind == "epsilon":
            return (noisy - (1 - alpha).sqrt() * output) / alpha.sqrt()
        return alpha.sqrt() * noisy - (1 - alpha).sqrt() * output
    raise InputError(f"{type(scheduler).__name__} predicts {kind!r}: expected flow_prediction, v_prediction or epsilon")


def load_pipeline(config: PipelineConfig, device: str = "cpu") -> DiffusionPipeline:
    """Loads a local diffusers folder, frozen and in eval mode. Nothing is downloaded, only safetensors are read.

    Raises ValueError when the folder is missing or is not a complete pipeline.
    """
    folder = config.folder
    if not (folder / "model_index.json").is_file():
        raise InputError(f"pipeline.path={str(folder)!r}: expected a diffusers folder with a model_index.json")
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            folder, dtype=DTYPES[config.dtype], local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise InputError(f"pipeline.path={str(folder)!r}: not a complete diffusers pipeline ({reason})") from error
    for transformer in experts(pipeline).values():
        architecture(transformer)
    try:
        if config.lora:
            pipeline.load_lora_weights(config.lora, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise InputError(f"pipeline.lora={config.lora!r}: expected adapters of this model ({reason})") from error
    pipeline.set_progress_bar_config(disable=True)
    if device == "cpu":
        arrange(pipeline.vae, *experts(pipeline).values())
    return freeze(pipeline.to(device))


def freeze(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    return pipeline


def check_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str], limit: int) -> None:
    """Raises ValueError for a prompt that would be cut off: diffusers truncates without a word."""
    for prompt in set(prompts):
        count = len(pipeline.tokenizer(prompt).input_ids)
        if count > limit:
            raise InputError(
                f"prompt {prompt[:40]!r}... has {count} tokens: expected at most {limit}; "
                "shorten it or raise pipeline.prompt_tokens"
            )


@contextmanager
def batched_images(pipeline: DiffusionPipeline) -> Iterator[list[Tensor]]:
    """Lets one call serve a batch of different first frames, which diffusers does not offer.

    The pipeline's own `prepare_latents` encodes the whole batch of images once for every generator of noise. Here it is
    encoded once, equal neighbours as one, and the answer for a generator is the image at its place. A sample's noise
    does not depend on its batch, its condition does up to rounding. Undone on exit. Yields a list that will
    hold the condition of the batch, the very tensor the pipeline's loop works with.
    """
    original, encode = pipeline.prepare_latents, pipeline.vae.encode
    held, encoded = list[Tensor](), list[Tensor]()

    def prepare(*arguments: Any) -> tuple[Tensor, ...]:
        noise, condition, *mask = original(*arguments)
        if len(condition) != len(noise):
            raise RuntimeError(f"the pipeline encoded {len(condition)} of {len(noise)} images: expected each once")
        held.append(condition)
        return (noise, condition, *mask)

    def by_turns(videos: Tensor) -> Any:
        if len(videos) == 1:
            return encode(videos)
        if not encoded:
            new = torch.tensor([i == 0 or not torch.equal(videos[i], videos[i - 1]) for i in range(len(videos))])
            encoded.extend(encode(videos[new]).latent_dist.mode()[new.cumsum(0) - 1].split(1))
        return SimpleNamespace(latents=encoded.pop(0))

    with patch.object(pipeline, "prepare_latents", prepare), patch.object(pipeline.vae, "encode", by_turns):
        yield held


@enough_memory("take a smaller pipeline.batch")
@torch.no_grad()
def sample(
    pipeline: DiffusionPipeline,
    config: PipelineConfig,
    images: Float[Tensor, "batch 3 height width"],
    prompts: Sequence[str],
    seeds: Sequence[int],
    filter_batch: Callable[[int], Sequence[int] | None] | None = None,
    **overrides: Any,
) -> np.ndarray | Tensor:
    """Samples a batch of different problems through the pipeline's `__call__`.

    images: first frames in [0, 1]. seeds: one per sample; a sample's noise depends on its seed alone.
    filter_batch: called with each step index when the step is done; says which samples of what is left of the batch
    go on (places, in order), None for all. The others are dropped: nothing more is computed for them.
    Returns float video [batch, frame, height, width, 3] in [0, 1]; `overrides` go to the pipeline (with
    `output_type="latent"` the result is the latent tensor).
    Raises ValueError for `filter_batch` with a transformer whose samples must go one by one.
    """
    check_prompts(pipeline, [*prompts, config.negative_prompt], config.prompt_tokens)
    transformer = next(iter(experts(pipeline).values()))
    if len(images) > 1 and transformer.config.get("image_dim", None) is not None:
        if filter_batch is not None:
            raise InputError(
                "this transformer is given a CLIP image embedding (Wan2.1): expected one whose samples can share a "
                "batch, such as Wan2.2; samples cannot be dropped on the way"
            )
        # Wan2.1 repeats its CLIP image embedding over the batch: different problems must go one by one
        alone = zip(images.split(1), prompts, seeds, strict=True)
        return np.concatenate([sample(pipeline, config, i, [p], [s], **overrides) for i, p, s in alone])
    arguments = {
        "image": images,
        "prompt": list(prompts),
        "negative_prompt": [config.negative_prompt] * len(prompts),
        "height": images.shape[2],
        "width": images.shape[3],
        "num_frames": config.frames,
        "num_inference_steps": config.steps,
        "guidance_scale": config.guidance,
        "max_sequence_length": config.prompt_tokens,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "output_type": "np",
    }
    with batched_images(pipeline) as held:
        if filter_batch is not None:
            names = [n for n in pipeline._callback_tensor_inputs if n in ("latents", *PROMPTS)]
            overrides |= {
                "callback_on_step_end": _filtering(filter_batch, held),
                "callback_on_step_end_tensor_inputs": names,
            }
        return pipeline(**(arguments | overrides)).frames


def _filtering(
    filter_batch: Callable[[int], Sequence[int] | None], held: list[Tensor]
) -> Callable[[Any, int, Any, dict], dict]:
    """A `callback_on_step_end` that drops samples from the running batch.

    What a pipeline takes back from a callback is replaced; the condition is a local variable of its loop, so it is
    cut in place, as is what a multi-step scheduler remembers of earlier steps.
    """

    def callback(running: Any, step: int, timestep: Any, tensors: dict) -> dict:
        keep = filter_batch(step)
        if keep is None:
            return {}
        at, size = list(keep), len(tensors["latents"])
        for condition in held:
            condition.data = condition[at]
        memory = vars(running.scheduler)
        for name in ("model_outputs", "last_sample"):
            value = memory.get(name)
            if isinstance(value, list):
                memory[name] = [v[at] if isinstance(v, Tensor) and len(v) == size else v for v in value]
            elif isinstance(value, Tensor):
                memory[name] = value[at]
        return {name: value[at] for name, value in tensors.items() if value is not None}

    return callback


def stop_after(step: int) -> Callable[[Any, int, Any, dict], dict]:
    """A `callback_on_step_end` that lets a run end after `step` (a step index)."""

    def callback(running: Any, now: int, timestep: Any, tensors: dict) -> dict:
        running._interrupt = now >= step
        return {}

    return callback


@torch.no_grad()
def decode(pipeline: DiffusionPipeline, latents: Tensor) -> np.ndarray:
    """Latents as the scheduler holds them -> float video [batch, frame, height, width, 3] in [0, 1]."""
    vae = pipeline.vae
    latents = latents.to(vae.device, vae.dtype)
    if hasattr(vae.config, "latents_mean"):
        mean, std = (
            torch.tensor(v).view(1, -1, 1, 1, 1).to(latents) for v in (vae.config.latents_mean, vae.config.latents_std)
        )
        latents = latents * std + mean
    else:
        latents = latents / vae.config.scaling_factor
        if type(vae).__name__ == "AutoencoderKLCogVideoX":
            latents = latents.transpose(1, 2)
    video = vae.decode(latents, return_dict=False)[0]
    return pipeline.video_processor.postprocess_video(video, output_type="np")


def fingerprint(*folders: Path) -> str:
    """Identity of a model's folders: every config, and size and 16 spread samples of every weight file."""
    digest = hashlib.sha256()
    paths = [(folder, p) for folder in folders for p in sorted(folder.rglob("*")) if p.suffix in KINDS]
    for folder, path in paths:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}:{size}".encode())
        with path.open("rb") as file:
            for place in range(16) if path.suffix == ".safetensors" else range(1):
                file.seek(place * size // 16)
                digest.update(file.read(65_536 if path.suffix == ".safetensors" else size))
    return digest.hexdigest()[:16]
