"""Reads a bank on held-out problems, beside what the inputs tell, and scores it: intervals, significance, the grid."""

from cosprobe.evaluation.baselines import input_samples, read_inputs
from cosprobe.evaluation.grid import ALPHA, FILE, GUESSES, READOUT, Best, Grid
from cosprobe.evaluation.held_out import evaluate
from cosprobe.evaluation.intervals import (
    LEAST_EFFECTIVE,
    LEAST_PROBLEMS,
    correctness,
    difference_interval,
    mean_interval,
    share_interval,
)
from cosprobe.evaluation.predictions import Evaluated, InputReading
from cosprobe.evaluation.scoring import build_grid
from cosprobe.evaluation.significance import max_t_bootstrap

__all__ = [
    "ALPHA",
    "FILE",
    "GUESSES",
    "LEAST_EFFECTIVE",
    "LEAST_PROBLEMS",
    "READOUT",
    "Best",
    "Evaluated",
    "Grid",
    "InputReading",
    "build_grid",
    "correctness",
    "difference_interval",
    "evaluate",
    "input_samples",
    "max_t_bootstrap",
    "mean_interval",
    "read_inputs",
    "share_interval",
]
