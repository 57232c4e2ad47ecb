"""Samples with frozen diffusers video pipelines.

Sampling is not re-implemented. `sample` calls the pipeline's `__call__`, once for a batch of different problems.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor, nn

from cosprobe.config import PipelineConfig
from cosprobe.errors import InputError
from cosprobe.models.architectures import TokenGrid, architecture
from cosprobe.models.defaults import with_defaults
from cosprobe.models.images import Pictures, image_batch
from cosprobe.models.schedulers import from_first_step
from cosprobe.runtime import enough_memory
from cosprobe.tasks import check_lengths

Video = TypeVar("Video", np.ndarray, Tensor)
OWN = Path(__file__).resolve().parent.parent  # the folder of this package
LIBRARIES = Path(diffusers.__file__).resolve().parent.parent  # of diffusers and what is installed beside it


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


def first_transformer(pipeline: DiffusionPipeline) -> nn.Module:
    """The transformer of a pipeline; of two experts, the first."""
    return next(iter(experts(pipeline).values()))


def block_list(pipeline: DiffusionPipeline, transformer: nn.Module | None = None) -> list[nn.Module]:
    """The blocks of a transformer of the pipeline, by default of the first, in order of execution."""
    return architecture(pipeline).blocks(first_transformer(pipeline) if transformer is None else transformer)


def check_size(pipeline: DiffusionPipeline, sides: Sequence[int], frames: int) -> None:
    """Raises InputError for a size or number of frames of the video that diffusers would round.

    sides: height and width in pixels.
    """
    architecture(pipeline).check_video(pipeline, first_transformer(pipeline), sides, frames)


def check_guidance(pipeline: DiffusionPipeline, config: PipelineConfig) -> None:
    """Raises InputError for a scale of guidance that the model has no use for."""
    if config.guidance_2 and len(experts(pipeline)) == 1:
        raise InputError(f"pipeline.guidance_2={config.guidance_2:g}: this model has one transformer; set it to 0")
    architecture(pipeline).check_guidance(pipeline, config.guidance, config.true_cfg)


def check_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str], limit: int) -> None:
    """Raises InputError for a prompt of more than `limit` tokens, which diffusers would truncate without a warning, for
    another limit than the model needs, and for a tokenizer that cannot pad."""
    needed = architecture(pipeline).needed_tokens(first_transformer(pipeline).config)
    if needed is not None and limit != needed:
        raise InputError(f"pipeline.prompt_tokens={limit}: expected {needed} for this model; set it so")
    for prompt in set(prompts):
        try:
            count = len(pipeline.tokenizer(prompt).input_ids)
            pipeline.tokenizer(prompt, padding="max_length", max_length=limit, truncation=True)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:100]
            raise InputError(f"pipeline.path: its tokenizer fails on {prompt[:40]!r} ({reason})") from error
        if count > limit:
            raise InputError(
                f"prompt {prompt[:40]!r}... has {count} tokens: expected at most {limit}; raise pipeline.prompt_tokens "
                "or shorten it"
            )


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

    images: first frames, as `image_batch` takes them; a text-to-video pipeline uses their size only. prompts, seeds:
    one per image. The noise of a sample depends on its seed alone.
    filter_batch: called with the step index after each step. It returns the samples that continue, as indices into the
    samples that are left, in order, or None for all. No transformer runs for the other samples, and none of their
    videos is decoded.
    overrides: more arguments of the pipeline call.
    Returns float video [batch, frame, height, width, 3] in [0, 1], or the latent tensor with `output_type="latent"`.
    Raises InputError for images that `image_batch` refuses, for sides or frames that the model does not take, for
    videos that are not finite or have another size, for other numbers of prompts or seeds than of images, and for a
    prompt that is too long.
    """
    images, config = image_batch(images), with_defaults(config, pipeline)
    check_size(pipeline, images.shape[2:], config.frames)
    check_lengths(len(images), prompts=prompts, seeds=seeds)
    check_guidance(pipeline, config)
    check_prompts(pipeline, [*prompts, config.negative_prompt], config.prompt_tokens)
    family = architecture(pipeline)
    arguments = {
        "prompt": list(prompts),
        "negative_prompt": [config.negative_prompt] * len(prompts),
        "height": images.shape[2],
        "width": images.shape[3],
        "num_frames": config.frames,
        "num_inference_steps": config.steps,
        "guidance_scale": config.guidance,
        "guidance_scale_2": config.guidance_2 or None,
        "true_cfg_scale": config.true_cfg,
        "max_sequence_length": config.prompt_tokens,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "output_type": "np" if family.decodes_itself(pipeline) else "latent",
        "image": images,
    }
    taken = signature(type(pipeline).__call__).parameters
    arguments = {name: value for name, value in arguments.items() if name in taken}
    arguments |= family.arguments(pipeline) | overrides
    grids = list[TokenGrid]()

    def note_grid(model: nn.Module, args: tuple, kwargs: dict) -> None:
        grids[:] = [family.token_grid(model, hidden_states(args, kwargs), kwargs)]

    with ExitStack() as undo:
        held = undo.enter_context(family.batched_images(pipeline))
        if filter_batch is not None:
            arguments |= undo.enter_context(_filtered(pipeline, filter_batch, len(prompts), config.steps, held))
        if not family.decodes_itself(pipeline):
            hook = first_transformer(pipeline).register_forward_pre_hook(note_grid, with_kwargs=True)
            undo.callback(hook.remove)
        undo.enter_context(from_first_step(pipeline.scheduler))
        undo.enter_context(_model_errors(pipeline))
        video = pipeline(**arguments).frames
        if not family.decodes_itself(pipeline) and overrides.get("output_type") != "latent":
            video = decode(pipeline, family.unpacked(video, grids[0]), config.frames)
    return _checked(video, pipeline, (family.video_frames(pipeline, config.frames), *images.shape[2:]))


def hidden_states(args: tuple, kwargs: dict) -> Tensor:
    """The hidden states in the arguments of a transformer or block call."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def of_samples(value: Any, size: int, rows: Sequence[int]) -> Any:
    """Some rows of an argument of a transformer call, if it is a tensor with one row for each of `size` rows."""
    return value[list(rows)] if isinstance(value, Tensor) and value.ndim and len(value) == size else value


@contextmanager
def _model_errors(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Raises InputError in place of an error inside the pipeline, such as for a configuration that makes no sense.

    An error that is raised outside of libraries, as in a hook of this package, stays what it is, and so does one of too
    little memory.
    """
    try:
        yield
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:
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


@contextmanager
def _filtered(
    pipeline: DiffusionPipeline,
    filter_batch: Callable[[int], Sequence[int] | None],
    size: int,
    steps: int,
    held: Sequence[Tensor],
) -> Iterator[dict[str, Any]]:
    """Leaves samples out of the transformer calls of one pipeline call, and yields the arguments that the call needs.

    The loop of the pipeline goes on with the whole batch of `size` samples: its arithmetic costs next to nothing, and
    the tensors that it works on are out of reach. Transformers get the rows of the samples that are left; the output of
    the others is 0. After the last of `steps` steps, only the samples that are left stay in the latents, and in the
    image condition, which is in `held`.
    """
    left = list(range(size))

    def on_call(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        rows = len(hidden_states(args, kwargs))
        if len(left) == size:
            return None
        kept = [half * size + sample for half in range(rows // size) for sample in left]
        given = {name: of_samples(value, rows, kept) for name, value in kwargs.items()}
        return tuple(of_samples(value, rows, kept) for value in args), given

    def on_output(model: nn.Module, args: tuple, output: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        found = output[0]
        halves = len(found) // len(left)
        if len(left) == size:
            return None
        whole = found.new_zeros(halves, size, *found.shape[1:])
        whole[:, left] = found.unflatten(0, (halves, len(left)))
        return (whole.flatten(0, 1), *output[1:])

    def callback(running: Any, step: int, timestep: Any, tensors: dict) -> dict:
        if (keep := filter_batch(step)) is not None:
            left[:] = [left[i] for i in keep]
        if step < steps - 1 or len(left) == size:
            return {}
        for condition in held:
            condition.data = condition[left]
        return {"latents": tensors["latents"][left]}

    with ExitStack() as undo:
        for model in experts(pipeline).values():
            undo.callback(model.register_forward_pre_hook(on_call, with_kwargs=True).remove)
            undo.callback(model.register_forward_hook(on_output).remove)
        yield {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents"]}


def stop_after(step: int) -> Callable[[Any, int, Any, dict], dict]:
    """A `callback_on_step_end` that ends sampling after `step` (a step index)."""

    def callback(running: Any, now: int, timestep: Any, tensors: dict) -> dict:
        running._interrupt = now >= step
        return {}

    return callback


@torch.no_grad()
def decode(pipeline: DiffusionPipeline, latents: Tensor, frames: int) -> np.ndarray:
    """Decodes latents in the layout of their family, such as x0-hat, as the pipeline does at its end.

    frames: number of video frames that the pipeline was asked for.
    Returns float video [batch, frame, height, width, 3] in [0, 1].
    """
    where = get_module_execution_device(pipeline.vae)  # not where its weights wait, with offloading
    video = architecture(pipeline).decode(pipeline, latents.to(where), frames)
    return _checked(pipeline.video_processor.postprocess_video(video, output_type="np"), pipeline)
