"""The same architecture without what it has learned: transformer weights shuffled or drawn anew.

A probe that reads as much from such a network tells about the architecture and the inputs, not about learning.
Randomised transformers are asked about the very inputs the trained one saw (recorded by `capture`): left to
sample by themselves they would only ever see their own noise, a weaker control.
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
from cosprobe.models import architecture, block_list, experts, token_grid

PERMUTED, FRESH = "permuted", "fresh"
RANDOMISED = (PERMUTED, FRESH)


@contextmanager
def randomised(pipeline: Any, how: str, seed: int) -> Iterator[None]:
    """Replaces the weights of every transformer of `pipeline`; puts the trained ones back on exit.

    how: `permuted`, the entries of each parameter shuffled within it, so that its distribution stays (Chen,
    Viegas and Wattenberg 2023, arXiv 2306.05720); `fresh`, drawn as the class itself initialises.
    Raises ValueError for another word.
    """
    if how not in RANDOMISED:
        raise InputError(f"weights={how!r}: expected one of {', '.join(RANDOMISED)}")
    trained = {name: [p.detach().clone() for p in model.parameters()] for name, model in experts(pipeline).items()}
    try:
        for place, model in enumerate(experts(pipeline).values()):
            _fill(model, how, seed + place)
        yield
    finally:
        with torch.no_grad():
            for name, model in experts(pipeline).items():
                for parameter, value in zip(model.parameters(), trained[name], strict=True):
                    parameter.copy_(value)


@torch.no_grad()
def _fill(model: Any, how: str, seed: int) -> None:
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
        if ".lora_" in name:  # what a loaded adapter adds was learned too
            parameter.zero_()
        else:
            parameter.copy_(drawn[name.replace(".base_layer.", ".")])


@torch.no_grad()
def replay(
    pipeline: Any, cache: ActivationCache, layers: tuple[int, ...], pooling: Pooling, rows: Sequence[int] | None = None
) -> Float[Tensor, "sample step layer place region channel"]:
    """Block outputs for the transformer calls recorded on `cache`, by the weights the pipeline has now (`cond` only).

    rows: the samples of the batch to run, in order; None for all. pooling: of these samples.
    Raises ValueError when nothing was recorded on the cache.
    """
    if not cache.recorded:
        raise InputError("the cache holds no transformer calls: expected capture(..., record=steps)")
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
    size, index = token_grid(model, hidden_states(args, kwargs)), architecture(model).video
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(block: nn.Module, inputs: tuple, output: Any) -> None:
            tokens = output if index is None else output[index]
            found[layer] = pooling(conditional(context, tokens), size).cpu()

        return hook

    blocks = block_list(model)
    with ExitStack() as undo:
        for layer in layers:
            undo.callback(blocks[layer].register_forward_hook(keep(layer)).remove)
        model(*args, **kwargs)
    return torch.stack([found[layer] for layer in layers], dim=1)


def _of_samples(context: str, args: tuple, kwargs: dict, rows: Sequence[int]) -> tuple[tuple, dict[str, Any]]:
    """A transformer call with these samples of its batch alone: of every tensor that has a row for each."""
    size = len(hidden_states(args, kwargs))
    halves = len(BRANCHES[context])
    places = [half * (size // halves) + row for half in range(halves) for row in rows]

    def cut(value: Any) -> Any:
        return value[places] if isinstance(value, Tensor) and value.ndim and len(value) == size else value

    return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}
