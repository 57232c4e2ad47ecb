"""Training of the model in the package, and of LoRA adapters, both by flow matching."""

from cosprobe.minimodel.card import train_and_describe

__all__ = [
    "train_and_describe",
]
