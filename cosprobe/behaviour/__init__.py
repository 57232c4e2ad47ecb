"""Behaviours along denoising steps, as numbers: exploration, commitment, corrections, memory, roles of layers."""

from cosprobe.behaviour.films import film, read_image
from cosprobe.behaviour.findings import Behaviours, Finding
from cosprobe.behaviour.lengths_report import compare_lengths
from cosprobe.behaviour.measure import measure
from cosprobe.behaviour.report import BEHAVIOUR, print_behaviours, sample_behaviours, show_behaviours, write_behaviours

__all__ = [
    "BEHAVIOUR",
    "Behaviours",
    "Finding",
    "film",
    "compare_lengths",
    "measure",
    "print_behaviours",
    "read_image",
    "sample_behaviours",
    "show_behaviours",
    "write_behaviours",
]
