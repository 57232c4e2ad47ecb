"""Runs whose inside is known: blocks that add constants, and recorders that do without what is tested with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from cosprobe.models import architecture, experts
from tests.conformity.checks import Case, followed, on_blocks, tokens_of


class Adds(nn.Module):
    """A block that adds `amount` to the video tokens and leaves the text as it is. text: whether it returns both."""

    def __init__(self, amount: float, text: bool = False):
        super().__init__()
        self.amount, self.text = amount, text

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *_: Any, **__: Any) -> Any:
        tokens = hidden_states + self.amount
        return (tokens, encoder_hidden_states) if self.text else tokens


def with_blocks(pipeline: Any, blocks: Callable[[str, int], nn.Module], depth: int = 3) -> Any:
    """A pipeline of one transformer or two, with `depth` blocks `blocks(expert, layer)` in place of its own."""
    for expert, model in experts(pipeline).items():
        name = "blocks" if hasattr(model, "blocks") else "transformer_blocks"
        setattr(model, name, nn.ModuleList(blocks(expert, i) for i in range(depth)))
    return pipeline


@contextmanager
def scheduled(pipeline: Any) -> Iterator[list[Tensor]]:
    """The latent that the scheduler is given in each step, as the pipeline gives it."""
    found: list[Tensor] = []
    scheduler = pipeline.scheduler
    outer = vars(scheduler).get("step")
    step, own = scheduler.step, signature(type(scheduler).step)

    @wraps(step)  # pipelines ask for its signature
    def keeps(*args: Any, **kwargs: Any) -> Any:
        found.append(own.bind(scheduler, *args, **kwargs).arguments["sample"].clone())
        return step(*args, **kwargs)

    scheduler.step = keeps
    try:
        yield found
    finally:
        del scheduler.step
        if outer is not None:
            scheduler.step = outer


@contextmanager
def given(pipeline: Any) -> Iterator[list[Tensor]]:
    """The latent that the transformers are given in each of their calls, without the image condition."""
    found: list[Tensor] = []
    family = architecture(pipeline)

    def keep(model: nn.Module, args: tuple, kwargs: dict) -> None:
        latent = kwargs["hidden_states"]
        axis = 2 if latent.ndim == 3 else family.axis("c")
        found.append(latent.narrow(axis, 0, family.noisy_channels(model)).clone())

    with ExitStack() as undo:
        for model in experts(pipeline).values():
            undo.callback(model.register_forward_pre_hook(keep, with_kwargs=True).remove)
        yield found


def own_states(case: Case, **more: Any) -> tuple[dict[tuple[int, int, str], Tensor], Tensor]:
    """The states of a run at every step, layer and branch, its latents at layer -1, and the last latent. The hooks are
    those of the checks of conformity: the branch comes from the prompt, the step from the callback."""
    found: dict[tuple[int, int, str], Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(block: Any, args: tuple, output: Any) -> None:
            for half, branch in zip(tokens_of(output).split(2), now.branches, strict=True):
                found[now.step, layer, branch] = half.clone()

        return hook

    with followed(case) as now, on_blocks(case, keep), scheduled(case.pipeline) as latents:
        end = case.run(callback_on_step_end=now.callback, output_type="latent", **more)
    found |= {(step, -1, ""): latent for step, latent in enumerate(latents)}
    return found, torch.as_tensor(end)


def traces(pipeline: Any) -> list[str]:
    """What is left on a pipeline of hooks and replaced methods; empty for a clean one."""
    left = [name for name in ("prepare_latents", "check_inputs") if name in vars(pipeline)]
    left += [name for name in vars(pipeline.scheduler) if callable(getattr(type(pipeline.scheduler), name, None))]
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            left += [name for name in ("forward", "encode", "cache_context") if name in vars(part)]
    for model in experts(pipeline).values():  # transformers leaves hooks of its own on its encoders
        left += [type(m).__name__ for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    return left
