"""Families of problems with exact labels, one module each.

A module of this package that sets `FAMILY`, the class of its settings, is a family; no list names it.
"""

from collections.abc import Iterable
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from cosprobe.errors import InputError
from cosprobe.tasks.hide import Hide, HideConfig
from cosprobe.tasks.line import Line, LineConfig
from cosprobe.tasks.maze import Maze, MazeConfig
from cosprobe.tasks.samples import Sample, draw_samples, fresh_problems, images, noise_seed, with_noise
from cosprobe.tasks.select import Select, SelectConfig
from cosprobe.tasks.task import (
    HEADLINE,
    RELABELLED,
    SPLITS,
    Box,
    Problem,
    Readout,
    Target,
    Task,
    TaskConfig,
    readable_targets,
    split_of,
)


def find_families(modules: Iterable[ModuleType]) -> dict[str, type]:
    """Settings of every family among `modules`, by the name of the task they build, in the order of the modules.

    Raises ValueError when two families have one name.
    """
    found: dict[str, type] = {}
    for module in modules:
        settings = getattr(module, "FAMILY", None)
        if settings is None:
            continue
        name = settings().build().name
        if name in found:
            raise InputError(
                f"{module.__name__}: its task is named {name!r}, as is that of {found[name].__module__}; "
                "expected a name of its own"
            )
        found[name] = settings
    return found


FAMILIES = find_families(import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__))

__all__ = [
    "FAMILIES",
    "HEADLINE",
    "RELABELLED",
    "SPLITS",
    "Box",
    "Hide",
    "HideConfig",
    "Line",
    "LineConfig",
    "Maze",
    "MazeConfig",
    "Problem",
    "Readout",
    "Sample",
    "Select",
    "SelectConfig",
    "Target",
    "Task",
    "TaskConfig",
    "draw_samples",
    "find_families",
    "fresh_problems",
    "images",
    "noise_seed",
    "readable_targets",
    "split_of",
    "with_noise",
]
