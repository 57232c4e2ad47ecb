"""Loads frozen diffusers pipelines and samples with them; knows what differs between transformers."""

from cosprobe.models.cpu_layout import channels_last
from cosprobe.models.pipelines import (
    PipelineConfig,
    architecture,
    block_list,
    clean_estimate,
    decode,
    experts,
    fingerprint,
    latent_tokens,
    load_pipeline,
    patch_columns,
    sample,
    stop_after,
    token_grid,
)

__all__ = [
    "PipelineConfig",
    "architecture",
    "block_list",
    "channels_last",
    "clean_estimate",
    "decode",
    "experts",
    "fingerprint",
    "latent_tokens",
    "load_pipeline",
    "patch_columns",
    "sample",
    "stop_after",
    "token_grid",
]
