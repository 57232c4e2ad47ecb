"""Captures, pools, edits and stores activations while a pipeline samples, and loads them as samples for probes."""

from cosprobe.activations.capture import ActivationCache, capture
from cosprobe.activations.collection import (
    UNTRAINED,
    StoredSamples,
    StoreSettings,
    VideoSampler,
    collect,
    find_store,
    watch,
)
from cosprobe.activations.cost import Cost, flops, seconds
from cosprobe.activations.dataset import InputFeatures, LabelledRows, ProbeSamples, difficulty_columns, load_samples
from cosprobe.activations.edits import BACK, average_blocks, average_clean, average_latents, check_finite
from cosprobe.activations.halt import halting
from cosprobe.activations.pooling import Pooling
from cosprobe.activations.predicting import FrozenSampling, Sampled, Shard, ShardWriter, announce, predict_shards
from cosprobe.activations.random_weights import RANDOM_WEIGHTS
from cosprobe.activations.sampler import NOT_SEEN, Sampler, images
from cosprobe.activations.store import ActivationStore

__all__ = [
    "NOT_SEEN",
    "BACK",
    "RANDOM_WEIGHTS",
    "UNTRAINED",
    "ActivationCache",
    "ActivationStore",
    "Cost",
    "FrozenSampling",
    "InputFeatures",
    "LabelledRows",
    "Pooling",
    "ProbeSamples",
    "Sampler",
    "Sampled",
    "Shard",
    "ShardWriter",
    "StoreSettings",
    "StoredSamples",
    "VideoSampler",
    "announce",
    "average_blocks",
    "average_clean",
    "average_latents",
    "capture",
    "check_finite",
    "collect",
    "find_store",
    "flops",
    "halting",
    "images",
    "load_samples",
    "predict_shards",
    "difficulty_columns",
    "seconds",
    "watch",
]
