"""The compute of a run, part by part: counted floating point operations or measured seconds.

    cost = flops(pipeline, config, images, prompts)
    cost.until(step=0, layer=5) / cost.run(20)   # compute of a run that halts there, relative to a finished run

Hooks measure a short run of the pipeline where its parts begin and end, so nothing is assumed about the architecture.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from cosprobe.activations.capture import capture
from cosprobe.cells import X0
from cosprobe.config import PipelineConfig
from cosprobe.errors import InputError
from cosprobe.models import block_list, decode, first_transformer, sample, stop_after


@dataclass(frozen=True)
class Cost:
    """The compute of the parts of a run, per sample, in operations or seconds.

    A multiplication and an addition count as two operations.
    text: encoding of the prompt. image: everything else before the first transformer evaluation, mainly encoding of
    the first frame. layers: for each block, a transformer evaluation that ends after this block. If guidance makes two
    calls, this is the first call. evaluation: all transformer evaluations of one step (two with guidance).
    decode: decoding of one clip.
    Probes are not counted. They take thousands of operations, a block takes millions.
    """

    text: float
    image: float
    layers: tuple[float, ...]
    evaluation: float
    decode: float

    def run(self, steps: int, decodes: int = 1) -> float:
        """Compute of a run of `steps` complete steps (a number, not an index), decoded `decodes` times."""
        return self.text + self.image + steps * self.evaluation + decodes * self.decode

    def until(self, step: int, layer: int) -> float:
        """Compute of a run that halts after block `layer` of step `step` (a step index), without decoding.

        Raises InputError for a step below 0 or a layer that the transformer does not have.
        """
        if step < 0 or not 0 <= layer < len(self.layers):
            raise InputError(
                f"step={step}, layer={layer}: expected a step from 0, and a layer from 0 to {len(self.layers) - 1}"
            )
        return self.run(step, decodes=0) + self.layers[layer]


def flops(
    pipeline: Any, config: PipelineConfig, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
) -> Cost:
    """Counts the operations per sample of matrix products, convolutions and attention, with torch's FlopCounterMode.

    It runs one step and one decoding. Element-wise operations are not counted. If a pipeline has two experts, the first
    is measured and the second is assumed to be equal.
    Raises InputError unless there are as many images as prompts, at least one.
    """
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter, torch.no_grad():
        return _metered(pipeline, config, images, prompts, counter.get_total_flops)


def seconds(
    pipeline: Any, config: PipelineConfig, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
) -> Cost:
    """Measures the wall time in seconds per sample, on one batch, after a warm-up batch. Errors: see `flops`."""

    device = pipeline._execution_device  # with offloading, that of the weights is another

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    for _ in range(2):
        cost = _metered(pipeline, config, images, prompts, now)
    return cost


def _count_attention(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    return sdpa_flop_count(query, key, value)


# torch counts the attention kernels of GPUs, but not the one that `scaled_dot_product_attention` uses on a CPU
_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_attention}


def _metered(
    pipeline: Any, config: PipelineConfig, images: Tensor, prompts: Sequence[str], read: Callable[[], float]
) -> Cost:
    """Runs one step and one decoding, and calls `read` where their parts begin and end."""
    if len(images) != len(prompts) or not len(images):
        raise InputError(f"{len(images)} images and {len(prompts)} prompts: expected equal numbers, at least 1")
    transformer, depth = first_transformer(pipeline), len(block_list(pipeline))
    encoders = [part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part]
    marks: dict[str, list[float]] = {"text": [], "evaluation": [], **{str(i): [] for i in range(depth)}}

    def mark(name: str) -> Callable[..., None]:
        return lambda *_: marks[name].append(read())

    with ExitStack() as undo:
        for name, modules in (("text", encoders), ("evaluation", [transformer])):
            for module in modules:
                undo.callback(module.register_forward_pre_hook(mark(name)).remove)
                undo.callback(module.register_forward_hook(mark(name)).remove)
        for layer, block in enumerate(block_list(pipeline)):
            undo.callback(block.register_forward_hook(mark(str(layer))).remove)
        cache = undo.enter_context(capture(pipeline, [X0], steps="0", clean=[0]))
        begin = read()
        sample(
            pipeline, config, images, prompts, range(len(images)),
            callback_on_step_end=stop_after(0), output_type="latent",
        )  # fmt: skip
    before = read()
    decode(pipeline, cache.clean[0], config.frames)
    after, each = read(), 1 / len(images)
    first, *borders = marks["evaluation"]
    text = sum(marks["text"][1::2]) - sum(marks["text"][::2])
    evaluation = sum([first, *borders][1::2]) - sum([first, *borders][::2])
    return Cost(
        text * each,
        (first - begin - text) * each,
        tuple((marks[str(layer)][0] - first) * each for layer in range(depth)),
        evaluation * each,
        (after - before) * each,
    )
