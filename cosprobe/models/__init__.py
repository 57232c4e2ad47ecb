"""Loads frozen diffusers pipelines and samples with them. `architectures` has what differs between families."""

from diffusers import DiffusionPipeline as DiffusionPipeline  # the type of pipelines, in no list of our own names

from cosprobe.models.architectures import COND, UNCOND, Architecture, Branches, TokenGrid, architecture
from cosprobe.models.cpu_layout import channels_last
from cosprobe.models.defaults import taken_defaults, with_defaults
from cosprobe.models.identity import Fingerprint, fingerprint, model_fingerprint, pipeline_fingerprint
from cosprobe.models.images import Pictures, image_batch
from cosprobe.models.loading import download, load_part, load_pipeline, load_scheduler, outline, with_scheduler
from cosprobe.models.pipelines import (
    block_list,
    check_guidance,
    check_prompts,
    check_size,
    decode,
    experts,
    first_transformer,
    hidden_states,
    of_samples,
    sample,
    stop_after,
)
from cosprobe.models.schedulers import (
    StepCall,
    StepCount,
    check_scheduler,
    clean_estimate,
    counted_steps,
    noise_level,
    output_for,
    step_call,
    with_output,
)

__all__ = [
    "COND",
    "UNCOND",
    "Architecture",
    "Branches",
    "Fingerprint",
    "Pictures",
    "StepCall",
    "StepCount",
    "TokenGrid",
    "architecture",
    "block_list",
    "channels_last",
    "check_guidance",
    "check_prompts",
    "check_scheduler",
    "check_size",
    "clean_estimate",
    "counted_steps",
    "decode",
    "download",
    "experts",
    "fingerprint",
    "first_transformer",
    "hidden_states",
    "image_batch",
    "load_part",
    "load_pipeline",
    "load_scheduler",
    "model_fingerprint",
    "of_samples",
    "outline",
    "noise_level",
    "output_for",
    "pipeline_fingerprint",
    "sample",
    "step_call",
    "stop_after",
    "taken_defaults",
    "with_defaults",
    "with_output",
    "with_scheduler",
]
