"""Checks of the best cells of a map: generalisation, description length, confounds, random weights,
projection."""

from cosprobe.evaluation.checks.generalisation import Matrix
from cosprobe.evaluation.checks.projection import ProjectionCost, projection_cost
from cosprobe.evaluation.checks.suite import Checks, examine
from cosprobe.evaluation.checks.untrained import TRAINED, WEIGHTS, WeightsLine, weights_lines, weights_table

__all__ = [
    "TRAINED",
    "WEIGHTS",
    "Checks",
    "Matrix",
    "ProjectionCost",
    "WeightsLine",
    "examine",
    "projection_cost",
    "weights_lines",
    "weights_table",
]
