"""Capture, early halt and offloading at the width of Wan2.2-A14B, with two of the 40 blocks of each expert."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.device import in_bf16, matmul_rate, peak_memory, waited
from benchmarks.gpu.findings import Finding
from benchmarks.pairs import side_by_side
from cosprobe.activations import ActivationCache, Pooling, capture, halting
from cosprobe.cells import Cell
from cosprobe.models import experts
from cosprobe.models.loading import freeze

GUIDANCE = 3.0
STEPS = 4  # of the run that is halted
HALT = Cell(1, 0, "cond", "all")


@dataclass(frozen=True)
class Size:
    """Sizes of a transformer and of its input. frames, height, width: of the video. matmul: side of matrices."""

    heads: int
    head: int
    ffn: int
    text_tokens: int
    text_width: int
    frames: int
    height: int
    width: int
    matmul: int


A14B = Size(40, 128, 13824, 512, 4096, 81, 480, 832, 8192)  # 21 x 30 x 52 tokens
BLOCKS = 2


def measure(device: str, size: Size = A14B, repeats: int = 5) -> list[Finding]:
    """Two steps, one of each expert, with and without capture; a halted run and a finished one; offloading."""
    pipeline = build(size, device)
    call = partial(run, pipeline, size, device)
    captured = partial(capturing, pipeline, call)
    return [*_capture(call, captured, device, size, repeats), _halt(pipeline, call, device, repeats),
            *_offloading(pipeline, captured, device)]  # fmt: skip


def build(size: Size, device: str) -> WanPipeline:
    """A pipeline with the two experts of Wan2.2-T2V-A14B, without an encoder and a decoder."""
    torch.manual_seed(0)
    with torch.device(device):
        models = [
            WanTransformer3DModel(
                num_attention_heads=size.heads, attention_head_dim=size.head, ffn_dim=size.ffn,
                text_dim=size.text_width, num_layers=BLOCKS,
            )
            for _ in range(2)
        ]  # fmt: skip
    for model in models:
        in_bf16(model)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipeline = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=models[0],
        transformer_2=models[1], boundary_ratio=0.875,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return freeze(pipeline)


def run(pipeline: WanPipeline, size: Size, device: str, steps: int = 2) -> Tensor:
    """The latents of one video. Each step has two transformer calls."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randn(2, 1, size.text_tokens, size.text_width, generator=generator).to(device, torch.bfloat16)
    return pipeline(
        prompt_embeds=prompts[0], negative_prompt_embeds=prompts[1], num_frames=size.frames, height=size.height,
        width=size.width, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generator, output_type="latent",
    ).frames  # fmt: skip


def pooling() -> Pooling:
    """Means over 4 x 4 boxes, and over each latent frame of them."""
    sides = [i / 4 for i in range(4)]
    return Pooling("region", frames=True, boxes=[[(x, y, x + 0.25, y + 0.25) for y in sides for x in sides]])


def capturing(pipeline: WanPipeline, call: Callable[[], Tensor]) -> tuple[ActivationCache, Tensor]:
    """A run with every block and all inputs captured, as `train.py` does it, and its latents."""
    with capture(pipeline, "all", pooling(), inputs=True) as cache:
        latents = call()
    cache.features(), cache.input_features()
    return cache, latents


def _capture(
    call: Callable[[], Tensor],
    captured: Callable[[], tuple[ActivationCache, Tensor]],
    device: str,
    size: Size,
    repeats: int,
) -> list[Finding]:
    captured()  # a warm-up
    bare, plain_memory = peak_memory(call, device)
    (_, watched), memory = peak_memory(captured, device)
    with FlopCounterMode(display=False) as counter:
        call()
    pair = side_by_side("captured", waited(captured, device), "bare", waited(call, device), repeats)
    rate = matmul_rate(device, size.matmul)
    with_it, without = (sorted(side)[repeats // 2] / 2 for side in (pair.seconds, pair.other_seconds))
    floor = counter.get_total_flops() / 2 / rate
    numbers: dict[str, float | str] = {
        "ratio": pair.ratio, "lowest ratio": min(pair.ratios), "highest ratio": max(pair.ratios),
        "seconds captured": with_it, "seconds bare": without, "seconds of the floor": floor,
        "bf16 TFLOP/s": rate / 1e12,
    }  # fmt: skip
    return [
        Finding(
            f"step of two calls of {BLOCKS} of the 40 blocks of Wan2.2-A14B, every block and all inputs captured",
            f"{pair.ratio:.3f} of the same without capture ({min(pair.ratios):.3f} to {max(pair.ratios):.3f} of "
            f"{repeats}); {with_it:.3f} s, {without:.3f} s; its operations at the rate of bf16 products, "
            f"{rate / 1e12:.0f} TFLOP/s: {floor:.3f} s",
            numbers,
        ),
        Finding(
            "peak memory of the same with capture and without",
            f"{memory:.2f} GB, {plain_memory:.2f} GB",
            {"GB captured": memory, "GB bare": plain_memory},
        ),
        Finding(
            "latents of the same with capture and without",
            "the same bits" if torch.equal(bare, watched) else "different", {}, torch.equal(bare, watched),
        ),
    ]  # fmt: skip


def _halt(pipeline: WanPipeline, call: Callable[..., Tensor], device: str, repeats: int) -> Finding:
    whole = partial(call, steps=STEPS)

    def halted() -> ActivationCache:
        with halting(pipeline, [HALT], Pooling("clip"), lambda *_: True) as cache:
            whole()
        return cache

    with capture(pipeline, "0", Pooling("clip"), str(HALT.step)) as cache:
        whole()
    same = torch.equal(halted().parts[HALT.step, str(HALT.layer), HALT.branch], cache.at(HALT)[:, None])
    pair = side_by_side("halted", waited(halted, device), "finished", waited(whole, device), repeats)
    blocks, all_blocks = (2 * HALT.step) * BLOCKS + HALT.layer + 1, 2 * STEPS * BLOCKS
    first, second = (sorted(side)[repeats // 2] for side in (pair.seconds, pair.other_seconds))
    return Finding(
        f"run of {STEPS} steps, halted after {blocks} of its {all_blocks} blocks: seconds, relative to a finished one",
        f"{pair.ratio:.2f} ({blocks / all_blocks:.2f} of the blocks); {first:.2f} s, {second:.2f} s; "
        f"features {'the same bits' if same else 'different'}",
        {"ratio": pair.ratio, "share of blocks": blocks / all_blocks, "seconds": first, "seconds finished": second},
        same,
    )


def _offloading(
    pipeline: WanPipeline, captured: Callable[[], tuple[ActivationCache, Tensor]], device: str
) -> list[Finding]:
    (cache, _), plain = peak_memory(captured, device)
    findings = []
    for name, begin, end in (
        ("whole models", _offload_models, _keep_models),
        ("blocks, with a stream", _offload_blocks, None),
    ):
        begin(pipeline, device)
        captured()  # in the first call, the order of the blocks is noted
        (moved, _), memory = peak_memory(captured, device)
        same = torch.equal(moved.features(), cache.features())
        findings.append(
            Finding(
                f"features with offloading of {name}; peak memory with it and without",
                f"{'the same bits' if same else 'different'}; {memory:.2f} GB, {plain:.2f} GB",
                {"GB": memory, "GB without": plain}, same,
            )
        )  # fmt: skip
        if end is not None:
            end(pipeline, device)
    return findings


def _offload_models(pipeline: WanPipeline, device: str) -> None:
    pipeline.enable_model_cpu_offload(device=device)


def _keep_models(pipeline: WanPipeline, device: str) -> None:
    pipeline.remove_all_hooks()
    pipeline._all_hooks = []


def _offload_blocks(pipeline: WanPipeline, device: str) -> None:
    stream = device.startswith("cuda")  # CPUs have none
    for model in experts(pipeline).values():
        model.to("cpu")
        model.enable_group_offload(
            torch.device(device), torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1,
            use_stream=stream,
        )  # fmt: skip
