"""Captures, pools, edits and stores activations while a pipeline samples, and loads them as samples for probes."""

from cosprobe.activations.calls import RunningCall, watched_calls
from cosprobe.activations.capture import ActivationCache, capture
from cosprobe.activations.collection import (
    UNTRAINED,
    StoredSamples,
    StoreSettings,
    VideoSampler,
    collect,
    few_samples,
    few_steps,
    find_store,
    store_bytes,
    watch,
)
from cosprobe.activations.cost import Cost, flops, seconds
from cosprobe.activations.dataset import (
    InputFeatures,
    LabelledRows,
    ProbeSamples,
    difficulty_columns,
    folds_of,
    load_samples,
    unprojected_samples,
)
from cosprobe.activations.edits import BACK, average_blocks, average_clean, average_latents, check_finite, check_layers
from cosprobe.activations.halt import halting
from cosprobe.activations.pooling import COLUMNS, Pooling, box_masks, random_projection
from cosprobe.activations.predicting import FrozenSampling, Sampled, Shard, ShardWriter, announce, predict_shards
from cosprobe.activations.random_weights import PERMUTED, RANDOM_WEIGHTS
from cosprobe.activations.sampler import NOT_SEEN, Sampler, images
from cosprobe.activations.store import ActivationStore
from cosprobe.activations.stored_tensor import StoredTensor
from cosprobe.activations.table import SampleTable
from cosprobe.activations.unsupported import refuse_step_caches

__all__ = [
    "NOT_SEEN",
    "BACK",
    "COLUMNS",
    "PERMUTED",
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
    "RunningCall",
    "Sampler",
    "Sampled",
    "SampleTable",
    "Shard",
    "ShardWriter",
    "StoreSettings",
    "StoredSamples",
    "StoredTensor",
    "VideoSampler",
    "announce",
    "box_masks",
    "check_layers",
    "watched_calls",
    "average_blocks",
    "average_clean",
    "average_latents",
    "capture",
    "check_finite",
    "collect",
    "few_samples",
    "few_steps",
    "find_store",
    "flops",
    "folds_of",
    "halting",
    "images",
    "load_samples",
    "predict_shards",
    "random_projection",
    "refuse_step_caches",
    "difficulty_columns",
    "seconds",
    "store_bytes",
    "unprojected_samples",
    "watch",
]
