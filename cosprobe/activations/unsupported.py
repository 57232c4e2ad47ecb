"""Refuses pipelines whose activations cannot be labelled correctly: step caches, compiled blocks, some schedulers."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from cosprobe.errors import InputError
from cosprobe.models import architecture, check_scheduler

REGISTRY = "_diffusers_hook"  # attribute of a module with the hooks that diffusers has put on it
# hooks of diffusers that move or cast weights, and leave what a block computes as it is
HARMLESS = {
    *("group_offloading", "lazy_prefetch_group_offloading", "layer_execution_tracker", "lazy_leafs"),
    *("layerwise_casting", "peft_autocast_disable"),
}


def refuse_unsupported(pipeline: Any, models: dict[str, nn.Module]) -> None:
    """Raises InputError for pipelines, schedulers and transformers whose activations cannot be labelled correctly."""
    architecture(pipeline)
    check_scheduler(pipeline.scheduler)
    for expert, model in models.items():
        if getattr(model, "is_cache_enabled", False):
            raise InputError(
                f"a step cache is enabled in transformer {expert!r}: a skipped block returns its input, so features "
                "would be wrong; call disable_cache() first"
            )
        for name, module in model.named_modules():
            if foreign := sorted({*getattr(module, REGISTRY).hooks} - HARMLESS) if hasattr(module, REGISTRY) else []:
                raise InputError(
                    f"hook {foreign[0]!r} is on {name or 'the whole'} of transformer {expert!r}: it may replace what a "
                    "block computes, as step caches do; load the pipeline again without it"
                )
            if getattr(module, "_compiled_call_impl", None) is not None:
                raise InputError(f"transformer {expert!r} is compiled: it may ignore hooks; capture before compilation")
        if getattr(model, "_parallel_config", None) is not None:
            raise InputError(
                f"transformer {expert!r} runs with context or tensor parallelism: hooks see a part of the tokens; load "
                "it without parallel_config"
            )
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise InputError(
                f"the weights of transformer {expert!r} are divided among devices (tensor parallelism): hooks see a "
                "part of the values; load it without"
            )
