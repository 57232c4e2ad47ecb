"""Samples with frozen diffusers video pipelines.

Sampling is not re-implemented. `sample` calls the pipeline's `__call__`, once for a batch of different problems.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import lcm
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import patch

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from cosprobe.config import PipelineConfig
from cosprobe.errors import InputError
from cosprobe.models.architectures import architecture
from cosprobe.models.images import Pictures, image_batch
from cosprobe.runtime import enough_memory
from cosprobe.tasks import check_lengths

SIDE = 16  # the image-to-video pipelines of diffusers take multiples of it
Video = TypeVar("Video", np.ndarray, Tensor)
OWN = Path(__file__).resolve().parent.parent  # the folder of this package
LIBRARIES = Path(diffusers.__file__).resolve().parent.parent  # of diffusers and what is installed beside it
PROMPTS = ("prompt_embeds", "negative_prompt_embeds")  # per-sample tensors of the sampling loop


def experts(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The transformers of a pipeline: `high` and `low` (noise) for the two experts of Wan 2.2, else `only`.

    Raises InputError for a pipeline without a transformer.
    """
    second = getattr(pipeline, "transformer_2", None)
    first = getattr(pipeline, "transformer", None)
    if first is not None and second is not None:
        return {"high": first, "low": second}
    if first is None and second is None:
        raise InputError(f"{type(pipeline).__name__} has no transformer: expected a video diffusion transformer")
    return {"only": first if first is not None else second}


def block_list(transformer: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer, in order of execution."""
    return architecture(transformer).blocks(transformer)


def step_now(pipeline: Any) -> int:
    """The current step index of a running pipeline, found from its current timestep."""
    match = (pipeline.scheduler.timesteps == pipeline._current_timestep).nonzero().flatten()
    if len(match) != 1:
        raise RuntimeError(f"timestep {pipeline._current_timestep} belongs to {len(match)} steps, expected one")
    return int(match)


def clean_estimate(scheduler: Any, step: int, output: Tensor, noisy: Tensor) -> Tensor:
    """x0-hat, the model's estimate of the clean latent at `step` (a step index).

    output: output of the model. noisy: noisy latent at the start of the step.
    Flow matching: x0 = x - sigma v (arXiv 2603.16870, section 3.1). Variance-preserving schedulers: from `epsilon`,
    `v_prediction` or `sample`. Raises InputError for any other prediction type.
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


def check_size(pipeline: DiffusionPipeline, sides: Sequence[int], frames: int) -> None:
    """Raises InputError for a size or number of frames of the video that diffusers would round.

    sides: height and width in pixels. They have to be whole numbers of the model's patches, and the frames 1 more than
    a multiple of its chunks.
    """
    height, width = sides
    transformer = next(iter(experts(pipeline).values()))
    patch = transformer.config.patch_size
    side = lcm(SIDE, pipeline.vae_scale_factor_spatial * (patch if isinstance(patch, int) else patch[-1]))
    if height % side or width % side:
        raise InputError(
            f"images: {height} x {width} pixels, expected multiples of {side} for this model; resize or crop them, or "
            "set task.image_size"
        )
    chunk = getattr(pipeline, "vae_scale_factor_temporal", 1)
    if (frames - 1) % chunk:
        raise InputError(
            f"pipeline.frames={frames}: expected {chunk}k + 1 frames for this model, such as {3 * chunk + 1}"
        )


def check_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str], limit: int) -> None:
    """Raises InputError for a prompt of more than `limit` tokens, which diffusers would truncate without a warning, and
    for a tokenizer that cannot pad."""
    for prompt in set(prompts):
        try:
            count = len(pipeline.tokenizer(prompt).input_ids)
            pipeline.tokenizer(prompt, padding="max_length", max_length=limit, truncation=True)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:100]
            raise InputError(f"pipeline.path: its tokenizer fails on {prompt[:40]!r} ({reason})") from error
        if count > limit:
            raise InputError(
                f"prompt {prompt[:40]!r}... has {count} tokens: expected at most {limit}; "
                "shorten it or raise pipeline.prompt_tokens"
            )


@contextmanager
def batched_images(pipeline: DiffusionPipeline) -> Iterator[list[Tensor]]:
    """Makes pipeline calls with a batch of different first frames possible. Diffusers does not support them.

    `prepare_latents` of the pipeline encodes the whole batch of images once for every noise generator. Inside this
    context the batch is encoded once (equal neighbouring images as one), and each generator gets its own image.
    The noise of a sample does not depend on its batch. Its image condition depends on the batch up to rounding.
    The changes are undone on exit.
    Yields a list that will contain the image condition of the batch: the tensor that the sampling loop uses.
    """
    original, encode = pipeline.prepare_latents, pipeline.vae.encode
    held, encoded = list[Tensor](), list[Tensor]()

    def prepare(*arguments: Any) -> tuple[Tensor, ...]:
        noise, condition, *mask = original(*arguments)
        if len(condition) != len(noise):
            raise RuntimeError(f"the pipeline encoded {len(condition)} of {len(noise)} images: expected all of them")
        held.append(condition)
        return (noise, condition, *mask)

    def one_by_one(videos: Tensor) -> Any:
        if len(videos) == 1:
            return encode(videos)
        if not encoded:
            new = torch.tensor([i == 0 or not torch.equal(videos[i], videos[i - 1]) for i in range(len(videos))])
            encoded.extend(encode(videos[new]).latent_dist.mode()[new.cumsum(0) - 1].split(1))
        return SimpleNamespace(latents=encoded.pop(0))

    with patch.object(pipeline, "prepare_latents", prepare), patch.object(pipeline.vae, "encode", one_by_one):
        yield held


@enough_memory("lower pipeline.batch")
@torch.no_grad()
def sample(
    pipeline: DiffusionPipeline,
    config: PipelineConfig,
    images: Pictures,
    prompts: Sequence[str],
    seeds: Sequence[int],
    filter_batch: Callable[[int], Sequence[int] | None] | None = None,
    **overrides: Any,
) -> np.ndarray | Tensor:
    """Samples a batch of different problems through the pipeline's `__call__`.

    images: first frames, as `image_batch` takes them. prompts, seeds: one per image. The noise of a sample depends on
    its seed alone.
    filter_batch: called with the step index after each step. It returns the samples that continue, as indices into the
    samples that are left, in order, or None for all. Nothing more is computed for the other samples.
    overrides: more arguments of the pipeline call.
    Returns float video [batch, frame, height, width, 3] in [0, 1], or the latent tensor with `output_type="latent"`.
    Raises InputError for images that `image_batch` refuses, for sides or frames that the model does not take, for
    videos that are not finite or have another size, for other numbers of prompts or seeds than of images, for a prompt
    that is too long, and for `filter_batch` with a pipeline that takes one problem per call.
    """
    images = image_batch(images)
    check_size(pipeline, images.shape[2:], config.frames)
    check_lengths(len(images), prompts=prompts, seeds=seeds)
    check_prompts(pipeline, [*prompts, config.negative_prompt], config.prompt_tokens)
    transformer = next(iter(experts(pipeline).values()))
    if len(images) > 1 and architecture(transformer).one_problem_a_call(transformer):
        if filter_batch is not None:
            raise InputError(
                f"filter_batch: {type(pipeline).__name__} repeats one CLIP image embedding over the batch (Wan2.1) and "
                "takes one problem per call; expected a pipeline that takes several problems per call, such as Wan2.2"
            )
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
        with _model_errors(pipeline):
            video = pipeline(**(arguments | overrides)).frames
    return _checked(video, pipeline, (config.frames, *images.shape[2:]))


@contextmanager
def _model_errors(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Raises InputError in place of an error inside the pipeline, such as for a configuration that makes no sense.

    An error that is raised outside of libraries, as in a hook of this package, stays what it is, and so does one of too
    little memory.
    """
    try:
        yield
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        files = [Path(frame.f_code.co_filename).resolve() for frame, _ in traceback.walk_tb(error.__traceback__)]
        ours = files[-1].is_relative_to(OWN) or not files[-1].is_relative_to(LIBRARIES)
        if ours or isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"{type(pipeline).__name__} failed ({type(error).__name__}: {reason}); check pipeline.* and the "
            "configuration files of the model"
        ) from error


def _checked(video: Video, pipeline: DiffusionPipeline, size: tuple[int, ...] = ()) -> Video:
    """The videos or latents, if they are finite and have the size that was asked for. size: frames, height, width.

    Raises InputError otherwise.
    """
    if not (video.isfinite() if isinstance(video, Tensor) else np.isfinite(video)).all():
        kind = "latents" if isinstance(video, Tensor) else "a video"
        raise InputError(
            f"{type(pipeline).__name__} gave {kind} with NaN or infinite values; set pipeline.dtype=float32, or check "
            "the weights"
        )
    if size and not isinstance(video, Tensor) and video.shape[1:4] != size:
        raise InputError(
            f"{type(pipeline).__name__} gave videos of {_size(video.shape[1:4])}, expected {_size(size)}; set "
            "pipeline.frames and task.image_size to what the model gives"
        )
    return video


def _size(size: Sequence[int]) -> str:
    return f"{size[0]} frames of {size[1]} x {size[2]} pixels"


def _filtering(
    filter_batch: Callable[[int], Sequence[int] | None], held: list[Tensor]
) -> Callable[[Any, int, Any, dict], dict]:
    """A `callback_on_step_end` that removes samples from the running batch.

    Latents and prompt embeddings are returned to the pipeline. The image condition is a local variable of the sampling
    loop, so its data are replaced in place. The earlier outputs that a multi-step scheduler stores are cut as well.
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
    """A `callback_on_step_end` that ends sampling after `step` (a step index)."""

    def callback(running: Any, now: int, timestep: Any, tensors: dict) -> dict:
        running._interrupt = now >= step
        return {}

    return callback


@torch.no_grad()
def decode(pipeline: DiffusionPipeline, latents: Tensor) -> np.ndarray:
    """Decodes latents of the sampling loop. Returns float video [batch, frame, height, width, 3] in [0, 1]."""
    vae, transformer = pipeline.vae, next(iter(experts(pipeline).values()))
    latents = architecture(transformer).to_decoder(vae, latents.to(vae.device, vae.dtype))
    video = vae.decode(latents, return_dict=False)[0]
    return _checked(pipeline.video_processor.postprocess_video(video, output_type="np"), pipeline)
