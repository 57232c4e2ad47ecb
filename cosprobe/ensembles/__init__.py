"""Seed ensembles: one answer from several noise seeds. The ensemble of arXiv 2603.16870, plain and probe-guided
ones."""

from typing import Any

from cosprobe.ensembles.comparison import EnsembleConfig
from cosprobe.ensembles.run import ensemble

__all__ = ["EnsembleConfig", "ensemble", "ensembles"]


def __getattr__(name: str) -> Any:
    """Imports `ensembles` on first access, because it imports matplotlib, which `import cosprobe` should not load."""
    if name == "ensembles":
        from cosprobe.ensembles.report import ensembles

        return ensembles
    raise AttributeError(name)
