"""Context managers that change activations while a pipeline samples. They undo the change on exit, also after errors.

A batch consists of groups of `group` consecutive samples, the noise seeds of one problem. Inside the context, block
outputs, noisy latents or x0-hat are averaged over each group. The mean replaces the value of the first sample of the
group (`back="first"`: the other samples of the group do not change) or of all its samples (`back="all"`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cosprobe.activations.calls import watched_calls
from cosprobe.errors import InputError
from cosprobe.models import (
    architecture,
    block_list,
    clean_estimate,
    counted_steps,
    experts,
    output_for,
    step_call,
    with_output,
)
from cosprobe.wrapping import wrapped

BACK = ("first", "all")
Weigh = Callable[[int, int, Tensor, tuple[int, int, int]], Float[Tensor, " batch"]]


def group_mean(
    values: Float[Tensor, "batch *rest"], group: int, back: str, weights: Float[Tensor, " batch"] | None = None
) -> Float[Tensor, "batch *rest"]:
    """`values` with the mean of each group of consecutive samples in its first sample, or in all its samples.

    back: `first` or `all`. weights: weight of every sample in the mean, 0 or more; equal weights where all weights of a
    group are 0. Raises InputError for a batch whose size is not a multiple of `group`.
    """
    if len(values) % group:
        raise InputError(f"a batch of {len(values)} samples: expected whole problems, with {group} seeds each")
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
    """Averages the outputs of the blocks `layers` at `steps` over the noise seeds of each problem.

    layers: block indices. steps: step indices. Only video tokens are averaged, each token position separately, in every
    guidance branch. The next block receives the averaged output. group: seeds of each problem, consecutive samples of
    the batch. back: `first` writes the mean into the first sample of each group, `all` into all of them.
    weigh(step, layer, tokens, size): returns a weight per sample. tokens: output of the block before averaging. size:
    latent frames, token rows, token columns. It is called once per step and layer, in the first transformer call of the
    step (the `cond` branch). The weights are used for the other branch too.
    Raises InputError for a layer that the transformer does not have, and for an output that is not finite.
    Source: the training-free ensemble of arXiv 2603.16870. It averages three seeds at the first step in the middle
    layers (10 of 40). The paper does not say which of the runs continue after that.
    """
    if back not in BACK:
        raise InputError(f"back={back!r}: expected one of {', '.join(BACK)}")
    family, weights = architecture(pipeline), dict[tuple[int, int], Tensor]()

    def on_block(layer: int) -> Callable:
        def hook(block: nn.Module, args: tuple, output: Any) -> Any:
            step = call.step
            if step not in steps:
                return None
            tokens = family.video_tokens(output)
            check_finite(tokens, step, layer)
            if weigh is not None and (step, layer) not in weights:
                weights[step, layer] = weigh(step, layer, tokens, call.grid)
            mean = group_mean(tokens, group, back, weights.get((step, layer)))
            return family.with_video_tokens(output, mean)

        return hook

    with ExitStack() as undo:
        call = undo.enter_context(watched_calls(pipeline))
        for model in experts(pipeline).values():
            blocks = block_list(pipeline, model)
            check_layers(layers, len(blocks))
            for layer in layers:
                undo.callback(blocks[layer].register_forward_hook(on_block(layer)).remove)
        yield


@contextmanager
def average_clean(pipeline: Any, group: int, steps: Sequence[int], back: str = "first") -> Iterator[None]:
    """Averages x0-hat over the noise seeds of each problem at `steps` (step indices).

    Each sample keeps its own noisy latent. The model output is replaced by the output whose x0-hat is the mean, and the
    scheduler continues from there.
    """

    def around(original: Callable, *args: Any, **kwargs: Any) -> Any:
        if count.now in steps:
            scheduler, call = pipeline.scheduler, step_call(pipeline.scheduler, args, kwargs)
            mean = group_mean(clean_estimate(scheduler, call), group, back)
            changed = output_for(scheduler, call, mean).to(call.output.dtype)
            if back == "first":  # the other samples keep their exact output, without rounding errors
                changed = torch.where(_is_first(call.output, group), changed, call.output)
            args, kwargs = with_output(scheduler, args, kwargs, changed)
        return original(*args, **kwargs)

    with counted_steps(pipeline) as count, wrapped(pipeline.scheduler, "step", around):
        yield


@contextmanager
def average_latents(pipeline: Any, group: int, steps: Sequence[int], back: str = "first") -> Iterator[None]:
    """Averages the noisy latents over the noise seeds of each problem after `steps` (step indices).

    This reduces the noise too: the mean of K seeds has 1 / sqrt(K) of the noise the model expects at the next step.
    """

    def around(original: Callable, *args: Any, **kwargs: Any) -> Any:
        step = count.now
        result = original(*args, **kwargs)
        if step not in steps:
            return result
        if not isinstance(result, tuple):
            result.prev_sample = group_mean(result.prev_sample, group, back)
            return result
        return (group_mean(result[0], group, back), *result[1:])

    with counted_steps(pipeline) as count, wrapped(pipeline.scheduler, "step", around):
        yield


def check_layers(layers: Sequence[int], depth: int) -> None:
    """Raises InputError for layers that a transformer with `depth` blocks does not have."""
    outside = [layer for layer in layers if not 0 <= layer < depth]
    if outside:
        raise InputError(f"layers={list(layers)}: layer {outside[0]} is outside the model, expected 0 to {depth - 1}")


def check_finite(values: Float[Tensor, "batch *rest"], step: int, layer: int) -> None:
    """Raises InputError, with the first bad sample of the batch, for activations that are NaN or infinite."""
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
