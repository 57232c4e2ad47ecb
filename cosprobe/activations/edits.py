"""Edits of a run of the real pipeline, as context managers that always undo.

A batch holds groups of `group` consecutive samples, the noise seeds of one problem. Inside the block, what the seeds
of a group have in common is averaged: block outputs, latents or clean estimates. The mean is written back into the
first sample of each group (`back="first"`: one run goes on, the others are only asked) or into all (`back="all"`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cosprobe.activations.capture import wrapped
from cosprobe.errors import InputError
from cosprobe.models import architecture, block_list, clean_estimate, experts, token_grid

BACK = ("first", "all")
Weigh = Callable[[int, int, Tensor, tuple[int, int, int]], Float[Tensor, " batch"]]


def step_now(pipeline: Any) -> int:
    """The step index a running pipeline is at, from its own timestep."""
    match = (pipeline.scheduler.timesteps == pipeline._current_timestep).nonzero().flatten()
    if len(match) != 1:
        raise RuntimeError(f"timestep {pipeline._current_timestep} names {len(match)} steps, expected one")
    return int(match)


def group_mean(
    values: Float[Tensor, "batch *rest"], group: int, back: str, weights: Float[Tensor, " batch"] | None = None
) -> Float[Tensor, "batch *rest"]:
    """The mean of each group of consecutive samples, written back into its first sample or into all of them.

    weights: of every sample, not negative, by which its group's mean is weighed; equal where all of a group are 0.
    Raises ValueError for a batch that is not whole groups.
    """
    if len(values) % group:
        raise InputError(f"a batch of {len(values)} samples is not whole groups of {group} seeds")
    parts = values.unflatten(0, (-1, group))
    if weights is None:
        mean = parts.mean(dim=1, keepdim=True)
    else:
        shares = weights.unflatten(0, (-1, group)).to(parts)
        total = shares.sum(dim=1, keepdim=True)
        shares = torch.where(total > 0, shares / total.clamp_min(torch.finfo(total.dtype).tiny), 1 / group)
        mean = (parts * shares.reshape(*shares.shape, *[1] * (parts.ndim - 2))).sum(dim=1, keepdim=True)
    rest = mean.expand_as(parts[:, 1:]) if back == "all" else parts[:, 1:]
    return torch.cat([mean, rest], dim=1).flatten(0, 1)


@contextmanager
def average_blocks(
    pipeline: Any,
    group: int,
    layers: Sequence[int],
    steps: Sequence[int],
    back: str = "first",
    weigh: Weigh | None = None,
) -> Iterator[None]:
    """Averages the hidden states of the seeds of each problem: the output of the blocks `layers` at `steps`.

    layers: block indices; steps: step indices. Video tokens only, position by position, in every guidance branch; a
    block gets what the block before it gave after averaging. weigh(step, layer, tokens, size): a weight per sample,
    from the block's own output before it is averaged (size: latent frames, token rows, token columns); asked at the
    first call of a step, which is that of the `cond` branch, and used for the other branch too.
    Raises ValueError for a layer the transformer does not have, and for an output that is not finite.
    Source: the training-free ensemble of arXiv 2603.16870, which averages three seeds at the first step in the middle
    layers (10 of 40); which runs go on it leaves open.
    """
    if back not in BACK:
        raise InputError(f"back={back!r}: expected one of {', '.join(BACK)}")
    size = (0, 0, 0)
    weights: dict[tuple[int, int], Tensor] = {}

    def on_model(model: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal size
        size = token_grid(model, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    def on_block(layer: int, index: int | None) -> Callable:
        def hook(block: nn.Module, args: tuple, output: Any) -> Any:
            step = step_now(pipeline)
            if step not in steps:
                return None
            tokens = output if index is None else output[index]
            check_finite(tokens, step, layer)
            if weigh is not None and (step, layer) not in weights:
                weights[step, layer] = weigh(step, layer, tokens, size)
            mean = group_mean(tokens, group, back, weights.get((step, layer)))
            return mean if index is None else (*output[:index], mean, *output[index + 1 :])

        return hook

    with ExitStack() as undo:
        for model in experts(pipeline).values():
            index, blocks = architecture(model).video, block_list(model)
            check_layers(layers, len(blocks))
            undo.callback(model.register_forward_pre_hook(on_model, with_kwargs=True).remove)
            for layer in layers:
                undo.callback(blocks[layer].register_forward_hook(on_block(layer, index)).remove)
        yield


@contextmanager
def average_clean(pipeline: Any, group: int, steps: Sequence[int], back: str = "first") -> Iterator[None]:
    """Averages x0-hat, the clean latents the seeds of each problem expect at `steps` (step indices).

    A sample keeps its own noisy latent; the model's output is changed so that the scheduler steps towards the mean.
    """

    def around(original: Callable, output: Tensor, timestep: Any, noisy: Tensor, *a: Any, **k: Any) -> Any:
        step = step_now(pipeline)
        if step in steps:
            mean = group_mean(clean_estimate(pipeline.scheduler, step, output, noisy), group, back)
            changed = output_for(pipeline.scheduler, step, mean, noisy).to(output.dtype)
            if back == "first":  # the other runs stay exactly as they are: no rounding there and back
                changed = torch.where(_is_first(output, group), changed, output)
            output = changed
        return original(output, timestep, noisy, *a, **k)

    with wrapped(pipeline.scheduler, "step", around):
        yield


@contextmanager
def average_latents(pipeline: Any, group: int, steps: Sequence[int], back: str = "first") -> Iterator[None]:
    """Averages the noisy latents themselves after `steps` (step indices). Independent noise is averaged away with
    them: the mean of K seeds has 1 / sqrt(K) of the noise the model expects at the next step."""

    def around(original: Callable, *args: Any, **kwargs: Any) -> Any:
        step = step_now(pipeline)
        result = original(*args, **kwargs)
        if step not in steps:
            return result
        if not isinstance(result, tuple):
            result.prev_sample = group_mean(result.prev_sample, group, back)
            return result
        return (group_mean(result[0], group, back), *result[1:])

    with wrapped(pipeline.scheduler, "step", around):
        yield


def output_for(scheduler: Any, step: int, clean: Tensor, noisy: Tensor) -> Tensor:
    """The model output at `step` (a step index) whose x0-hat is `clean`: the inverse of `clean_estimate`."""
    kind, noisy = scheduler.config.get("prediction_type", "flow_prediction"), noisy.float()
    if kind == "flow_prediction":
        return (noisy - clean) / scheduler.sigmas[step].to(noisy)
    if kind == "sample":
        return clean
    alpha = scheduler.alphas_cumprod[int(scheduler.timesteps[step])].to(noisy)
    if kind == "epsilon":
        return (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
    return (alpha.sqrt() * noisy - clean) / (1 - alpha).sqrt()


def check_layers(layers: Sequence[int], depth: int) -> None:
    """Raises ValueError for a window of layers that a transformer with `depth` blocks does not have."""
    outside = [layer for layer in layers if not 0 <= layer < depth]
    if outside:
        raise InputError(f"layers={list(layers)}: layer {outside[0]} is outside the model, expected 0 to {depth - 1}")


def check_finite(values: Float[Tensor, "batch *rest"], step: int, layer: int) -> None:
    """Raises ValueError naming the first sample of the batch whose activations are NaN or infinite."""
    whole = values.isfinite().flatten(1).all(dim=1)
    if not whole.all():
        bad = int((~whole).nonzero()[0])
        raise InputError(
            f"layer {layer} gave NaN or infinite activations at step {step} (sample {bad} of the batch): expected "
            "finite numbers; check the weights, or try pipeline.dtype=float32"
        )


def _is_first(values: Tensor, group: int) -> Tensor:
    """True for the first sample of each group, in a shape that broadcasts against `values`."""
    first = torch.arange(len(values), device=values.device) % group == 0
    return first.reshape(-1, *[1] * (values.ndim - 1))
