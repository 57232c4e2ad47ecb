"""What happens inside the blocks while a pipeline samples: captured, edited, stored, and read back as samples."""

from cosprobe.activations.capture import ActivationCache, capture
from cosprobe.activations.collection import UNTRAINED, CaptureConfig, collect, decode_steps, settings, watch
from cosprobe.activations.cost import Cost, flops, seconds
from cosprobe.activations.dataset import InputFeatures, ProbeSamples, load_samples, nuisance_columns
from cosprobe.activations.edits import BACK, average_blocks, average_clean, average_latents, check_finite
from cosprobe.activations.halt import halting
from cosprobe.activations.pooling import POOLINGS, Pooling
from cosprobe.activations.random_weights import RANDOMISED
from cosprobe.activations.store import ActivationStore, fill

__all__ = [
    "BACK",
    "POOLINGS",
    "RANDOMISED",
    "UNTRAINED",
    "ActivationCache",
    "ActivationStore",
    "CaptureConfig",
    "Cost",
    "InputFeatures",
    "Pooling",
    "ProbeSamples",
    "average_blocks",
    "average_clean",
    "average_latents",
    "capture",
    "check_finite",
    "collect",
    "decode_steps",
    "fill",
    "flops",
    "halting",
    "load_samples",
    "nuisance_columns",
    "seconds",
    "settings",
    "watch",
]
