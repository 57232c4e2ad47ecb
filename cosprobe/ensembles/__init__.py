"""Several noise seeds, one answer: the ensemble of the paper beside plain and probe-guided ones, at equal compute."""

from typing import Any

from cosprobe.ensembles.comparison import EnsembleConfig
from cosprobe.ensembles.ensemble import ensemble

__all__ = ["EnsembleConfig", "ensemble", "ensembles"]


def __getattr__(name: str) -> Any:
    """`ensembles` draws figures: it is loaded when asked for, so that `import cosprobe` loads no reporting."""
    if name == "ensembles":
        from cosprobe.ensembles.report import ensembles

        return ensembles
    raise AttributeError(name)
