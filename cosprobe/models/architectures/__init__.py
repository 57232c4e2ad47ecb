"""Adapters for families of video pipelines: one module for each family, with one interface."""

from typing import Any

from cosprobe.errors import InputError
from cosprobe.models.architectures.allegro import Allegro
from cosprobe.models.architectures.cogvideox import CogVideoX
from cosprobe.models.architectures.hunyuan_video import HunyuanVideo, HunyuanVideoFromImage
from cosprobe.models.architectures.ltx import LTX
from cosprobe.models.architectures.mochi import Mochi
from cosprobe.models.architectures.protocol import COND, UNCOND, Architecture, Branches, PatchColumns, TokenGrid
from cosprobe.models.architectures.wan import SkyReelsV2, Wan

ARCHITECTURES: tuple[Architecture, ...] = (
    *(Wan(), SkyReelsV2(), LTX(), CogVideoX(), HunyuanVideo(), HunyuanVideoFromImage(), Mochi(), Allegro()),
)

__all__ = [
    "ARCHITECTURES",
    "COND",
    "UNCOND",
    "Architecture",
    "Branches",
    "PatchColumns",
    "TokenGrid",
    "adapter",
    "architecture",
    "refusal",
]

# why a video pipeline of diffusers is not supported, by the end of the sentence "PIPELINE ..."
OUTER = "repeats its denoising loop, so a timestep does not name one model call"
WINDOWS = "denoises windows of frames, each with steps of its own"
GRID = "changes the number of tokens while it samples"
TWICE = "calls its scheduler twice per step"
IMAGES = "has a UNet, and no transformer to probe"
NOT_YET = "is not supported yet"
REFUSED = {
    **dict.fromkeys(("WanAnimatePipeline", "HeliosPipeline", "HunyuanVideoFramepackPipeline"), OUTER),
    **dict.fromkeys(("AnyFlowFARPipeline", "LTXI2VLongMultiPromptPipeline", "Kandinsky6SRPipeline"), OUTER),
    "SkyReelsV2DiffusionForcingPipeline": WINDOWS,
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": WINDOWS,
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": WINDOWS,
    **dict.fromkeys(("ChronoEditPipeline", "HeliosPyramidPipeline"), GRID),
    "LTX2DFRPipeline": "calls the transformer several times per step, on parts of the tokens",
    "LTX2DFRTemporalRefinePipeline": "calls the transformer several times per step, on parts of the tokens",
    **dict.fromkeys(("CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline"), TWICE),
    "Cosmos3OmniPipeline": "packs video, text and sound of one sample into one sequence",
    **dict.fromkeys(("AnimateDiffPipeline", "StableVideoDiffusionPipeline"), IMAGES),
}


def adapter(pipeline: str) -> Architecture | None:
    """The adapter for a class of pipelines; None for a class without one."""
    return next((known for known in ARCHITECTURES if pipeline in known.pipelines), None)


def architecture(pipeline: Any) -> Architecture:
    """The adapter for a pipeline. Raises InputError for a pipeline or transformer class without an adapter."""
    name = type(pipeline).__name__
    known = adapter(name)
    if known is None:
        classes = ", ".join(kind for known in ARCHITECTURES for kind in known.pipelines)
        raise InputError(f"{name} {refusal(name)}: expected one of {classes}; docs/support.md says how to add a family")
    for part in ("transformer", "transformer_2"):
        model = getattr(pipeline, part, None)
        if model is not None and type(model).__name__ not in known.transformers:
            raise InputError(
                f"{part} of {name} is a {type(model).__name__}: expected a {' or '.join(known.transformers)}; add a "
                "subclass of Architecture for it, or, if it is compiled, capture it before compilation"
            )
    return known


def refusal(pipeline: str) -> str:
    """Why pipelines of a class without an adapter are refused, as the end of a sentence."""
    return REFUSED.get(pipeline, NOT_YET)
