"""Evaluates the probes of a bank on test problems: accuracy, baselines, intervals, significance, latency."""

from cosprobe.evaluation.baselines import MUST_BEAT, input_samples, read_inputs, read_inputs_once
from cosprobe.evaluation.claims import (
    FAILS,
    HOLDS,
    UNCLEAR,
    UNTESTED,
    Claim,
    Clearest,
    clearest,
    clearest_either_way,
    verdict,
)
from cosprobe.evaluation.cross_fitting import evaluate_divisions, joined
from cosprobe.evaluation.grid import FILE, Best, Grid
from cosprobe.evaluation.intervals import (
    LEAST_EFFECTIVE,
    LEAST_PROBLEMS,
    correctness,
    difference_interval,
    effective_problems,
    independent_difference_interval,
    majority,
    mean_interval,
    membership,
    problem_draws,
    share_interval,
)
from cosprobe.evaluation.latency import Latency, lag, lag_difference
from cosprobe.evaluation.latency import latency as half_maximum_latency  # evaluation.latency is the module
from cosprobe.evaluation.power import detectable_accuracy
from cosprobe.evaluation.predictions import Evaluated, InputReading, evaluate
from cosprobe.evaluation.ranks import average_ranks
from cosprobe.evaluation.scoring import build_grid
from cosprobe.evaluation.significance import max_t_bootstrap, max_t_permutation
from cosprobe.evaluation.token_labels import read_path, read_token_labels
from cosprobe.evaluation.variables import ALPHA, BASELINES, CEILING, GUESSES, X0_PARSED

__all__ = [
    "ALPHA",
    "BASELINES",
    "CEILING",
    "FAILS",
    "FILE",
    "GUESSES",
    "HOLDS",
    "LEAST_EFFECTIVE",
    "LEAST_PROBLEMS",
    "MUST_BEAT",
    "UNCLEAR",
    "UNTESTED",
    "X0_PARSED",
    "Best",
    "Claim",
    "Clearest",
    "Evaluated",
    "Grid",
    "InputReading",
    "Latency",
    "average_ranks",
    "build_grid",
    "clearest",
    "clearest_either_way",
    "correctness",
    "detectable_accuracy",
    "difference_interval",
    "effective_problems",
    "evaluate",
    "evaluate_divisions",
    "half_maximum_latency",
    "independent_difference_interval",
    "input_samples",
    "joined",
    "lag",
    "lag_difference",
    "majority",
    "max_t_bootstrap",
    "max_t_permutation",
    "mean_interval",
    "membership",
    "problem_draws",
    "read_inputs",
    "read_inputs_once",
    "read_path",
    "read_token_labels",
    "share_interval",
    "verdict",
]
