"""Transformers with random weights, as a control: permuted trained weights or a fresh initialisation.

If a probe of such a transformer is as accurate, the accuracy comes from the architecture and the inputs, not from
training. The random transformers get the same inputs as the trained one, as recorded by `capture`. If they sampled
videos themselves, their inputs would be noise at every step, which is a weaker control.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cosprobe.activations.capture import BRANCHES, ActivationCache, conditional, hidden_states
from cosprobe.activations.pooling import Pooling
from cosprobe.errors import InputError
from cosprobe.models import architecture, block_list, experts

PERMUTED, FRESH = "permuted", "fresh"
RANDOM_WEIGHTS = (PERMUTED, FRESH)


@contextmanager
def with_random_weights(pipeline: Any, how: str, seed: int) -> Iterator[None]:
    """Replaces the weights of every transformer of `pipeline`, and restores the trained weights on exit.

    how: `permuted`: the entries of each parameter are shuffled, which keeps their distribution (Chen, Viegas and
    Wattenberg 2023, arXiv 2306.05720). `fresh`: the default initialisation of the transformer class.
    Raises InputError for any other value.
    """
    if how not in RANDOM_WEIGHTS:
        raise InputError(f"weights={how!r}: expected one of {', '.join(RANDOM_WEIGHTS)}")
    trained = {name: [p.detach().clone() for p in model.parameters()] for name, model in experts(pipeline).items()}
    try:
        for number, model in enumerate(experts(pipeline).values()):
            _fill(model, how, seed + number)
        yield
    finally:
        with torch.no_grad():
            for name, model in experts(pipeline).items():
                for parameter, value in zip(model.parameters(), trained[name], strict=True):
                    parameter.copy_(value)


@torch.no_grad()
def _fill(model: Any, how: str, seed: int) -> None:
    """Replaces the weights of one transformer in place."""
    generator = torch.Generator().manual_seed(seed)
    if how == PERMUTED:
        for parameter in model.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        other = type(model).from_config(model.config)
    drawn = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if ".lora_" in name:  # weights of LoRA adapters are learned too
            parameter.zero_()
        else:
            parameter.copy_(drawn[name.replace(".base_layer.", ".")])


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
    context, args, kwargs = cache.recorded[step]
    if rows is not None:
        args, kwargs = _of_samples(context, args, kwargs, rows)
    family = architecture(model)
    size = family.token_grid(model, hidden_states(args, kwargs))
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(block: nn.Module, inputs: tuple, output: Any) -> None:
            found[layer] = pooling(conditional(context, family.video_tokens(output)), size).cpu()

        return hook

    blocks = block_list(model)
    with ExitStack() as undo:
        for layer in layers:
            undo.callback(blocks[layer].register_forward_hook(keep(layer)).remove)
        model(*args, **kwargs)
    return torch.stack([found[layer] for layer in layers], dim=1)


def _of_samples(context: str, args: tuple, kwargs: dict, rows: Sequence[int]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a transformer call for some samples of its batch. Tensors with a row per sample are indexed."""
    size = len(hidden_states(args, kwargs))
    halves = len(BRANCHES[context])
    rows_of_all = [half * (size // halves) + row for half in range(halves) for row in rows]

    def cut(value: Any) -> Any:
        return value[rows_of_all] if isinstance(value, Tensor) and value.ndim and len(value) == size else value

    return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}
