"""Where, inside a video diffusion transformer, does the answer become decodable?

In the order of the data:
  tasks       problems with exact labels, and rules that read answers from video
  pipelines   frozen diffusers pipelines; batches of different problems
  capture     every block at every denoising step, labelled, pooled on the device
  pooling     from tokens to features
  store       activations on disk: sharded, fingerprinted, resumable
  collect     problems through the pipeline under capture, into a store
  data, devices, training, solvers, probes     fit every probe of a grid at once; keep them
  evaluation, scoring, metrics, grid  accuracy, intervals, baselines, significance
  figures, film, report, beside       what a person sees
  halting, reading    runs that end behind a block, answers that stream out of them
  policy, stopping    when to stop, with a stated risk
  cost, frontier, savings     what that saves, counted
  methods, ensemble, trials, seeds    several noise seeds against one run, at matched compute
  early       trained probes at work
  mini, autoencoding, flowmatching, card     the model in the package, and how it was trained
"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its notes on import would stand beside our one line

from cosprobe.activations import ActivationStore, Pooling, Tape, capture, collect, load_samples
from cosprobe.cells import Cell
from cosprobe.ensembles import ensemble
from cosprobe.evaluation import Grid
from cosprobe.models import PipelineConfig, load_pipeline, sample
from cosprobe.probes import ProbeBank, ProbeConfig, fit, load_probes
from cosprobe.runtime import TrainerConfig

__all__ = [
    "ActivationStore",
    "Cell",
    "Grid",
    "PipelineConfig",
    "Pooling",
    "ProbeBank",
    "ProbeConfig",
    "Tape",
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
