"""What a map has to survive: the best cells refitted, read elsewhere, freed of confounds, set beside random weights."""

from cosprobe.evaluation.checks.generalisation import Matrix
from cosprobe.evaluation.checks.suite import Checks, examine
from cosprobe.evaluation.checks.untrained import TRAINED, WEIGHTS, weights_table

__all__ = [
    "TRAINED",
    "WEIGHTS",
    "Checks",
    "Matrix",
    "examine",
    "weights_table",
]
