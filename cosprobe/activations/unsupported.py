"""Refuses pipelines whose activations cannot be labelled correctly: step caches, compiled blocks, some schedulers."""

from __future__ import annotations

from typing import Any

from torch import nn

from cosprobe.errors import InputError
from cosprobe.models import architecture


def refuse_unsupported(pipeline: Any, models: dict[str, nn.Module]) -> None:
    """Raises InputError for schedulers and transformers whose activations cannot be labelled correctly."""
    if getattr(pipeline.scheduler, "order", 1) != 1:
        raise InputError(
            f"{type(pipeline.scheduler).__name__} calls the model {pipeline.scheduler.order} times per step: "
            "expected a first-order scheduler, e.g. FlowMatchEulerDiscreteScheduler"
        )
    for expert, model in models.items():
        architecture(model)
        if getattr(model, "is_cache_enabled", False):
            raise InputError(
                f"a step cache is enabled in transformer {expert!r}: a skipped block returns its input, so features "
                "would be wrong; call disable_cache() first"
            )
        if any(getattr(m, "_compiled_call_impl", None) is not None for m in model.modules()):
            raise InputError(f"transformer {expert!r} is compiled: it may ignore hooks; capture before compilation")
