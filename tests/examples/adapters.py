"""LoRA adapters of the toy pipeline, with random numbers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

FILE = "pytorch_lora_weights.safetensors"


def adapter(folder: Path, prefix: str = "transformer.", layers: tuple[str, ...] = ("attn1.to_q", "ffn.net.2")) -> Path:
    """Writes adapters for layers of block 0, and returns the file. prefix: begins the names of tensors."""
    torch.manual_seed(1)
    tensors = {}
    for layer in layers:
        rows, columns = (24, 32) if layer == "ffn.net.2" else (24, 24)
        tensors[f"{prefix}blocks.0.{layer}.lora_A.weight"] = torch.randn(2, columns)
        tensors[f"{prefix}blocks.0.{layer}.lora_B.weight"] = torch.randn(rows, 2)
    folder.mkdir(parents=True)
    save_file(tensors, folder / FILE, {"format": "pt"})
    return folder / FILE
