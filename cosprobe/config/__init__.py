"""Typed settings of `train.py` and `probe.py`.

These modules import neither torch nor diffusers, so the commands can print their settings at once. The string after a
field explains it; `--help` and the API reference print the same string.
"""

from cosprobe.config.pipeline import DTYPES, SAMPLING, PipelineConfig, own_defaults
from cosprobe.config.plan import PlanConfig
from cosprobe.config.probe import KINDS, POOLINGS, CaptureConfig, ProbeConfig, check_folds, decode_steps
from cosprobe.config.runs import SCHEMAS, ProbeExperiment, TrainRun, UseRun
from cosprobe.config.trainer import TrainerConfig
from cosprobe.config.uses import (
    EDITS,
    ERROR_REFERENCES,
    SIZES,
    BehaviourConfig,
    CompareConfig,
    EarlyConfig,
    EnsembleConfig,
    FilmConfig,
    InterveneConfig,
    LengthsConfig,
    PredictConfig,
    RunsConfig,
    TokensConfig,
    check_promise,
    least_without_errors,
)
from cosprobe.config.video_training import AdapterConfig, AutoencoderConfig, FlowConfig, MiniConfig

__all__ = [
    "DTYPES",
    "EDITS",
    "ERROR_REFERENCES",
    "KINDS",
    "POOLINGS",
    "SAMPLING",
    "SCHEMAS",
    "SIZES",
    "AdapterConfig",
    "AutoencoderConfig",
    "BehaviourConfig",
    "CaptureConfig",
    "CompareConfig",
    "EarlyConfig",
    "EnsembleConfig",
    "FilmConfig",
    "FlowConfig",
    "InterveneConfig",
    "LengthsConfig",
    "MiniConfig",
    "PipelineConfig",
    "PlanConfig",
    "PredictConfig",
    "ProbeConfig",
    "ProbeExperiment",
    "RunsConfig",
    "TokensConfig",
    "TrainRun",
    "TrainerConfig",
    "UseRun",
    "check_promise",
    "check_folds",
    "decode_steps",
    "least_without_errors",
    "own_defaults",
]
