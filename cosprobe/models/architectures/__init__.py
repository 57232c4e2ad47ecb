"""Adapters for families of video transformers: one module for each family, with one interface."""

from torch import nn

from cosprobe.errors import InputError
from cosprobe.models.architectures.cogvideox import CogVideoX
from cosprobe.models.architectures.hunyuan_video import HunyuanVideo
from cosprobe.models.architectures.protocol import Architecture, PatchColumns, TokenGrid
from cosprobe.models.architectures.wan import Wan

ARCHITECTURES: tuple[Architecture, ...] = (Wan(), CogVideoX(), HunyuanVideo())

__all__ = ["ARCHITECTURES", "Architecture", "PatchColumns", "TokenGrid", "architecture"]


def architecture(transformer: nn.Module) -> Architecture:
    """The adapter for the class of `transformer`. Raises InputError for a class without an adapter."""
    name = type(transformer).__name__
    for known in ARCHITECTURES:
        if name in known.transformers:
            return known
    classes = ", ".join(kind for known in ARCHITECTURES for kind in known.transformers)
    raise InputError(
        f"transformer class {name} is not known: expected one of {classes}; add a subclass of Architecture for it, or, "
        "if the transformer is compiled, capture it before compilation"
    )
