"""Seconds, memory and precision of what runs on a device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

MATMUL = 8192  # side of the matrices that the rate is measured with


def wait(device: str) -> None:
    """Waits until a device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def waited(run: Callable[[], Any], device: str) -> Callable[[], None]:
    """A function that also waits until the device has done its work."""

    def whole() -> None:
        run()
        wait(device)

    return whole


def peak_memory(run: Callable[[], Any], device: str) -> tuple[Any, float]:
    """The result of a function, and the most memory in GB (1e9 bytes) that torch had on the device meanwhile."""
    if not device.startswith("cuda"):
        return run(), 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    result = run()
    wait(device)
    return result, torch.cuda.max_memory_allocated(device) / 1e9


def matmul_rate(device: str, side: int = MATMUL, repeats: int = 20) -> float:
    """Operations per second of bf16 matrix products. A multiplication and an addition count as two operations."""
    one, other = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    product = torch.empty_like(one)
    for count in (3, repeats):  # the first is a warm-up
        wait(device)
        begin = time.perf_counter()
        for _ in range(count):
            torch.mm(one, other, out=product)
        wait(device)
        seconds = time.perf_counter() - begin
    return 2 * side**3 * repeats / seconds


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions in float32 as they are on a CPU. By default torch lets GPUs round their inputs to TF32."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def in_bf16(model: nn.Module) -> None:
    """Casts a model in place as `from_pretrained` of diffusers does: what is sensitive stays in float32."""
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or ())} if isinstance(model, ModelMixin) else set[str]()
    for name, values in (*model.named_parameters(), *model.named_buffers()):
        if values.is_floating_point() and not kept & {*name.split(".")}:
            values.data = values.data.bfloat16()
