"""Seed ensembles: one answer from several noise seeds. The ensemble of arXiv 2603.16870, plain and probe-guided
ones."""

from cosprobe.ensembles.probe_scorer import ProbeScorer
from cosprobe.ensembles.report import ensembles
from cosprobe.ensembles.run import ensemble

__all__ = ["ProbeScorer", "ensemble", "ensembles"]
