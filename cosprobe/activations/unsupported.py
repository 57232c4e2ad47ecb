"""Refuses pipelines whose activations cannot be labelled correctly: step caches, compiled blocks, some schedulers."""

from __future__ import annotations

import os
import sys
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from cosprobe.errors import InputError
from cosprobe.models import architecture, block_list, check_scheduler

REGISTRY = "_diffusers_hook"  # attribute of a module with the hooks that diffusers has put on it
# hooks of diffusers that move or cast weights, and leave what a block computes as it is
HARMLESS = {
    *("group_offloading", "lazy_prefetch_group_offloading", "layer_execution_tracker", "lazy_leafs"),
    *("layerwise_casting", "peft_autocast_disable"),
}
DIFFUSERS = "diffusers"
AROUND = ("accelerate", DIFFUSERS, "torch")  # run `forward` inside of functions of their own: hooks, `torch.compile`


def refuse_unsupported(pipeline: Any, models: dict[str, nn.Module]) -> None:
    """Raises InputError for pipelines, schedulers and transformers whose activations cannot be labelled correctly."""
    architecture(pipeline)
    check_scheduler(pipeline.scheduler)
    refuse_step_caches(models)
    for expert, model in models.items():
        for name, module in model.named_modules():
            where = _named(name, expert)
            whole = not name and hasattr(module.forward, "_torchdynamo_orig_callable")
            if whole or getattr(module, "_compiled_call_impl", None) is not None:
                raise InputError(f"transformer {expert!r} is compiled: it may ignore hooks; capture before compilation")
            if other := _replacement(module):
                raise InputError(
                    f"{other!r} runs in place of the forward of {where}: it may replace what a block computes, as step "
                    "caches do; load the pipeline again without it"
                )
        for layer, block in enumerate(block_list(pipeline, model)):
            if _package(block) not in (_package(model), DIFFUSERS):
                raise InputError(
                    f"block {layer} of transformer {expert!r} is a {type(block).__name__} of {_package(block)}: "
                    f"expected one of {_package(model)}; load the pipeline again without what wraps its blocks"
                )
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


def refuse_step_caches(models: dict[str, nn.Module]) -> None:
    """Raises InputError where diffusers may skip a block, or replace what it computes."""
    for expert, model in models.items():
        if getattr(model, "is_cache_enabled", False):
            raise InputError(
                f"a step cache is enabled in transformer {expert!r}: a skipped block returns its input, so its states "
                "would be wrong; call disable_cache() first"
            )
        for name, module in model.named_modules():
            if foreign := sorted(hooks_of(module).keys() - HARMLESS):
                raise InputError(
                    f"hook {foreign[0]!r} is on {_named(name, expert)}: it may replace what a block computes, as step "
                    "caches do; load the pipeline again without it"
                )


def _named(module: str, expert: str) -> str:
    """A part of a transformer as text. module: its name, empty for the whole."""
    return f"{module} of transformer {expert!r}" if module else f"transformer {expert!r}"


def hooks_of(module: nn.Module) -> dict[str, Any]:
    """The hooks that diffusers has put on a module, by name."""
    return getattr(module, REGISTRY).hooks if hasattr(module, REGISTRY) else {}


def _replacement(module: nn.Module) -> str:
    """The name of a function that runs in place of the `forward` of a module, or around it; empty for none.

    Libraries in AROUND may have functions around it. Modules without parts are skipped: they have no blocks.
    """
    own = _home(_package(module))
    forward = module.forward if own and any(module.children()) else None
    homes = (own, *filter(None, map(_home, AROUND)))
    while forward is not None:
        code = getattr(getattr(forward, "func", forward), "__code__", None)  # func: of a partial
        if code is None or not code.co_filename.startswith(homes):
            return type(forward).__name__ if code is None else code.co_qualname
        forward = getattr(forward, "__wrapped__", None)
    return ""


def _package(module: nn.Module) -> str:
    """The package that the class of a module is from."""
    return type(module).__module__.partition(".")[0]


def _home(package: str) -> str:
    """The folder of an imported package, with a separator; empty for one without a file, such as a notebook."""
    file = getattr(sys.modules.get(package), "__file__", None)
    return os.path.dirname(file) + os.sep if file else ""
