"""Training of the model in the package, and of LoRA adapters, both by flow matching."""

from cosprobe.minimodel.card import train_and_describe
from cosprobe.minimodel.lora_training import AdapterConfig
from cosprobe.minimodel.recipe import MiniConfig

__all__ = [
    "AdapterConfig",
    "MiniConfig",
    "train_and_describe",
]
