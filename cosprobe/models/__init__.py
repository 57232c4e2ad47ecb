"""Loads frozen diffusers pipelines and samples with them. `architectures` has what differs between transformers."""

from cosprobe.models.architectures import Architecture, architecture
from cosprobe.models.cpu_layout import channels_last
from cosprobe.models.pipelines import (
    block_list,
    check_prompts,
    clean_estimate,
    decode,
    experts,
    fingerprint,
    load_pipeline,
    sample,
    step_now,
    stop_after,
)

__all__ = [
    "Architecture",
    "architecture",
    "block_list",
    "channels_last",
    "check_prompts",
    "clean_estimate",
    "decode",
    "experts",
    "fingerprint",
    "load_pipeline",
    "sample",
    "step_now",
    "stop_after",
]
