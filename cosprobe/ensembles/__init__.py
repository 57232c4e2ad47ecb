"""Several noise seeds, one answer: the ensemble of the paper beside plain and probe-guided ones, at equal compute."""

from cosprobe.ensembles.comparison import EnsembleConfig
from cosprobe.ensembles.ensemble import ensemble
from cosprobe.ensembles.report import ensembles

__all__ = [
    "EnsembleConfig",
    "ensemble",
    "ensembles",
]
