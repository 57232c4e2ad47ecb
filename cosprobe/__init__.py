"""Where, inside a video diffusion transformer, does the answer become decodable?

The rooms, in the order of the method; each `__init__` says what happens there:
  tasks         problems with exact labels, and parsers that read answers from video
  models        frozen diffusers pipelines
  activations   what happens inside blocks while a pipeline samples: captured, edited, stored
  probes        every probe of a grid fitted at once, and kept
  evaluation    accuracy, baselines, intervals, significance; checks
  reporting     what a person sees
  early_exit    answers before the video is finished, at a stated risk
  ensembles     several noise seeds against one run, at equal compute
  minimodel     how the model in the package was trained
"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its notes on import would stand beside our one line

from cosprobe.activations import ActivationCache, ActivationStore, Pooling, capture, collect, load_samples
from cosprobe.cells import Cell
from cosprobe.ensembles import ensemble
from cosprobe.evaluation import Grid
from cosprobe.models import PipelineConfig, load_pipeline, sample
from cosprobe.probes import ProbeBank, ProbeConfig, fit, load_probes
from cosprobe.runtime import TrainerConfig

__all__ = [
    "ActivationCache",
    "ActivationStore",
    "Cell",
    "Grid",
    "PipelineConfig",
    "Pooling",
    "ProbeBank",
    "ProbeConfig",
    "TrainerConfig",
    "capture",
    "collect",
    "ensemble",
    "fit",
    "load_pipeline",
    "load_probes",
    "load_samples",
    "sample",
]
