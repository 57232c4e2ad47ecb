"""Training of the model in the package, and of LoRA adapters, both by flow matching."""

from cosprobe.minimodel.card import train_and_describe
from cosprobe.minimodel.recipe import begin_training

__all__ = [
    "begin_training",
    "train_and_describe",
]
