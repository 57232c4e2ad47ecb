"""Captures, pools, edits and stores activations while a pipeline samples, and loads them as samples for probes."""

from cosprobe.activations.capture import ActivationCache, capture
from cosprobe.activations.collection import UNTRAINED, StoreSettings, collect, watch
from cosprobe.activations.cost import Cost, flops, seconds
from cosprobe.activations.dataset import InputFeatures, ProbeSamples, difficulty_columns, load_samples
from cosprobe.activations.edits import BACK, average_blocks, average_clean, average_latents, check_finite
from cosprobe.activations.halt import halting
from cosprobe.activations.pooling import Pooling
from cosprobe.activations.random_weights import RANDOM_WEIGHTS
from cosprobe.activations.sampler import Sampler, images
from cosprobe.activations.store import ActivationStore, fill, flattened

__all__ = [
    "BACK",
    "RANDOM_WEIGHTS",
    "UNTRAINED",
    "ActivationCache",
    "ActivationStore",
    "Cost",
    "InputFeatures",
    "Pooling",
    "ProbeSamples",
    "Sampler",
    "StoreSettings",
    "average_blocks",
    "average_clean",
    "average_latents",
    "capture",
    "check_finite",
    "collect",
    "fill",
    "flattened",
    "flops",
    "halting",
    "images",
    "load_samples",
    "difficulty_columns",
    "seconds",
    "watch",
]
