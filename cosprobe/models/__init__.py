"""Loads frozen diffusers pipelines and samples with them. `architectures` has what differs between transformers."""

from diffusers import DiffusionPipeline as DiffusionPipeline  # the type of pipelines, in no list of our own names

from cosprobe.models.architectures import Architecture, architecture
from cosprobe.models.cpu_layout import channels_last
from cosprobe.models.identity import fingerprint, model_fingerprint, pipeline_fingerprint
from cosprobe.models.images import Pictures, image_batch
from cosprobe.models.loading import load_part, load_pipeline
from cosprobe.models.pipelines import (
    block_list,
    check_prompts,
    check_size,
    clean_estimate,
    decode,
    experts,
    sample,
    step_now,
    stop_after,
)

__all__ = [
    "Architecture",
    "Pictures",
    "architecture",
    "block_list",
    "channels_last",
    "check_prompts",
    "check_size",
    "clean_estimate",
    "decode",
    "experts",
    "fingerprint",
    "image_batch",
    "load_part",
    "model_fingerprint",
    "load_pipeline",
    "pipeline_fingerprint",
    "sample",
    "step_now",
    "stop_after",
]
