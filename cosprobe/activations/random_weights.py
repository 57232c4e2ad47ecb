"""Transformers with random weights, as a control: permuted trained weights or a fresh initialisation.

If a probe of such a transformer is as accurate, the accuracy comes from the architecture and the inputs, not from
training. The random transformers get the same inputs as the trained one, as recorded by `capture`. If they sampled
videos themselves, their inputs would be noise at every step, which is a weaker control.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cosprobe.activations.capture import ActivationCache, conditional
from cosprobe.activations.pooling import Pooling
from cosprobe.activations.unsupported import hooks_of
from cosprobe.errors import InputError
from cosprobe.models import Branches, architecture, block_list, experts, hidden_states, of_samples

PERMUTED, FRESH = "permuted", "fresh"
RANDOM_WEIGHTS = (PERMUTED, FRESH)


@contextmanager
def with_random_weights(pipeline: Any, how: str, seed: int) -> Iterator[None]:
    """Replaces the weights of every transformer of `pipeline`, and restores the trained weights on exit.

    how: `permuted`: the entries of each parameter are shuffled, which keeps their distribution (Chen, Viegas and
    Wattenberg 2023, arXiv 2306.05720). `fresh`: the default initialisation of the transformer class.
    Raises InputError for any other value, for weights that are not in memory but loaded for every call, and, with
    `fresh`, for weights of whole numbers.
    """
    if how not in RANDOM_WEIGHTS:
        raise InputError(f"weights={how!r}: expected one of {', '.join(RANDOM_WEIGHTS)}")
    for expert, model in experts(pipeline).items():
        _check_replaceable(model, expert, how)
    with ExitStack() as undo:
        for number, model in enumerate(experts(pipeline).values()):
            replace_weights = _shuffled if how == PERMUTED else _redrawn
            undo.enter_context(replace_weights(model, seed + number))
        yield


def _check_replaceable(model: nn.Module, expert: str, how: str) -> None:
    """Raises InputError for weights whose replacement would be lost, or would make no sense."""
    offload = (hooks_of(module).get("group_offloading") for module in model.modules())
    on_disk = any(hook is not None and hook.config.offload_to_disk_path for hook in offload)
    for name, parameter in model.named_parameters():
        if on_disk or parameter.is_meta:
            raise InputError(
                f"{name} of transformer {expert!r} is not in memory, but loaded for every call: expected a pipeline "
                "without sequential offload and without offload to a disk"
            )
        if how == FRESH and not parameter.is_floating_point():
            raise InputError(
                f"{name} of transformer {expert!r} has whole numbers ({parameter.dtype}): expected weights that are "
                f"not quantised, or weights={PERMUTED!r}"
            )


@contextmanager
def _shuffled(model: Any, seed: int) -> Iterator[None]:
    """Shuffles the entries of each parameter in place. Nothing is copied: the same order, inverted, restores them."""
    done = 0
    try:
        for parameter, order in _orders(model, seed):
            done += 1
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
        yield
    finally:
        for parameter, order in islice(_orders(model, seed), done):
            restored = torch.empty_like(parameter).flatten()
            restored[order] = parameter.flatten()
            parameter.copy_(restored.view_as(parameter))


def _orders(model: Any, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The parameters of a transformer, each with an order of its entries, always the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        yield parameter.data, torch.randperm(parameter.numel(), generator=generator).to(parameter.device)


@contextmanager
def _redrawn(model: Any, seed: int) -> Iterator[None]:
    """Replaces the weights by a new initialisation. The trained ones wait in the memory of the CPU."""
    trained = [parameter.detach().to("cpu", copy=True) for parameter in model.parameters()]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drawn = dict(type(model).from_config(model.config).named_parameters())
        for name, parameter in model.named_parameters():
            if ".lora_" in name:  # weights of LoRA adapters are learned too
                parameter.data.zero_()
            else:
                parameter.data.copy_(drawn[name.replace(".base_layer.", ".")])
        yield
    finally:
        for parameter, value in zip(model.parameters(), trained, strict=True):
            parameter.data.copy_(value)


@torch.no_grad()
def replay(
    pipeline: Any, cache: ActivationCache, layers: tuple[int, ...], pooling: Pooling, rows: Sequence[int] | None = None
) -> Float[Tensor, "sample step layer position region channel"]:
    """Repeats the transformer calls recorded in `cache`, with the current weights, and returns pooled block outputs.

    Only the `cond` branch is returned. rows: indices of the samples of the batch to run; None for all. pooling: the
    pooling for these samples. Raises InputError when the cache has no recorded calls.
    """
    if not cache.recorded:
        raise InputError("cache: it has no recorded transformer calls; expected a cache of capture(..., record=steps)")
    steps = sorted(cache.recorded)
    return torch.stack([_replayed(pipeline, cache, step, layers, pooling, rows) for step in steps], dim=1)


def _replayed(
    pipeline: Any,
    cache: ActivationCache,
    step: int,
    layers: tuple[int, ...],
    pooling: Pooling,
    rows: Sequence[int] | None,
) -> Tensor:
    model = experts(pipeline)[cache.experts[step]]
    branches, args, kwargs = cache.recorded[step]
    if rows is not None:
        args, kwargs = _of_samples(branches, args, kwargs, rows)
    family = architecture(pipeline)
    size = family.token_grid(model, hidden_states(args, kwargs), kwargs)
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(block: nn.Module, inputs: tuple, output: Any) -> None:
            found[layer] = pooling(conditional(branches, family.video_tokens(output)), size)

        return hook

    blocks = block_list(pipeline, model)
    with ExitStack() as undo:
        for layer in layers:
            undo.callback(blocks[layer].register_forward_hook(keep(layer)).remove)
        model(*args, **kwargs)
    return torch.stack([found[layer].cpu() for layer in layers], dim=1)  # at the end: each block would wait for a GPU


def _of_samples(branches: Branches, args: tuple, kwargs: dict, rows: Sequence[int]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a transformer call for some samples of its batch. Tensors with a row per sample are indexed."""
    size = len(hidden_states(args, kwargs))
    each = size // len(branches)
    kept = [half * each + row for half in range(len(branches)) for row in rows]
    given = {name: of_samples(value, size, kept) for name, value in kwargs.items()}
    return tuple(of_samples(value, size, kept) for value in args), given
