"""Features on a CPU and on a device, and videos with and without capture: the same, for pipelines at toy size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from benchmarks.gpu.device import full_precision, in_bf16
from benchmarks.gpu.findings import Finding
from cosprobe.activations import Pooling, capture
from cosprobe.models import sample
from tests.conformity.checks import Case
from tests.examples.families import FAMILIES, PROMPTS

CLOSE = 1e-4  # largest gap in float32


def measure(device: str, families: Sequence[str] = tuple(FAMILIES)) -> list[Finding]:
    """Real diffusers pipelines with random weights, guided. Noise comes from the CPU in both cases."""
    gaps: dict[str, dict[str, float]] = {kind: {} for kind in ("float32", "TF32", "bfloat16")}
    changed = []
    for name in families:
        case = Case(name, guided=True)
        on_cpu = features(case)
        case.pipeline.to(device)
        with full_precision():
            gaps["float32"][name] = gap(on_cpu, features(case))
        gaps["TF32"][name] = gap(on_cpu, features(case))
        if not same_video(case):
            changed.append(name)
        case = Case(name, guided=True)
        for part in case.pipeline.components.values():
            if isinstance(part, nn.Module):
                in_bf16(part)
        on_cpu = features(case)
        case.pipeline.to(device)
        gaps["bfloat16"][name] = gap(on_cpu, features(case))
    worst = {kind: max(found, key=found.__getitem__) for kind, found in gaps.items()}
    numbers = {kind: found[worst[kind]] for kind, found in gaps.items()}
    result = "; ".join(f"{kind} {numbers[kind]:.0e} ({worst[kind]})" for kind in gaps)
    same = f"{len(families) - len(changed)} of {len(families)} the same bits"
    return [
        Finding(
            f"features on CPU and GPU, {len(families)} pipelines: largest gap, relative to the largest feature",
            result, {f"gap {kind}": value for kind, value in numbers.items()}, numbers["float32"] <= CLOSE,
        ),
        Finding(
            "video with and without capture, the same pipelines",
            ": ".join([same, ", ".join(changed)]) if changed else same,
            {"pipelines": len(families), "changed": len(changed)}, not changed,
        ),
    ]  # fmt: skip


def features(case: Case) -> Tensor:
    """All layers, steps and branches, frame by frame."""
    with capture(case.pipeline, "all", Pooling("frame")) as cache:
        sample(case.pipeline, case.config, case.images[:2], PROMPTS, [10, 11], output_type="latent")
    return cache.features().float()


def gap(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((one - other).abs().max() / one.abs().max())


def same_video(case: Case) -> bool:
    """Whether capture leaves every bit of the video."""
    bare = case.run()
    with capture(case.pipeline, "all", Pooling("frame"), clean=[0], inputs=True):
        watched = case.run()
    return np.array_equal(bare, watched)
