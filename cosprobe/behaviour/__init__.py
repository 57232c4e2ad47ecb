"""Behaviours along denoising steps, as numbers: exploration, commitment, corrections, memory, roles of layers."""

from cosprobe.behaviour.films import film, read_image
from cosprobe.behaviour.findings import Behaviours, Finding
from cosprobe.behaviour.measure import measure
from cosprobe.behaviour.report import BEHAVIOUR, print_behaviours, show_behaviours, write_behaviours

__all__ = [
    "BEHAVIOUR",
    "Behaviours",
    "Finding",
    "film",
    "measure",
    "print_behaviours",
    "read_image",
    "show_behaviours",
    "write_behaviours",
]
