"""Tasks: families of problems with exact labels, one module for each family.

A module of this package defines a family by setting `FAMILY` to the class of its settings. There is no registry.
"""

from collections.abc import Iterable
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from cosprobe.errors import InputError
from cosprobe.tasks.disk import DiskTask
from cosprobe.tasks.entries import DiskConfig
from cosprobe.tasks.folder import FolderConfig
from cosprobe.tasks.hide import Hide, HideConfig
from cosprobe.tasks.labels import Labels, check_lengths, encode_labels
from cosprobe.tasks.line import Line, LineConfig
from cosprobe.tasks.margin import SMALL, WithMargin, with_margin
from cosprobe.tasks.maze import Maze, MazeConfig
from cosprobe.tasks.own_images import OWN_IMAGES, OwnImages
from cosprobe.tasks.patches import has_path, in_workspace, on_path
from cosprobe.tasks.regions import Box, Mask, Region
from cosprobe.tasks.samples import Sample, draw_samples, fresh_problems, noise_seed, with_noise
from cosprobe.tasks.select import Select, SelectConfig
from cosprobe.tasks.splits import SPLITS, split_of
from cosprobe.tasks.tables import TableConfig
from cosprobe.tasks.task import (
    ANSWER_ROLES,
    RELABELLED,
    NoReference,
    ParsedAnswer,
    Problem,
    Role,
    Target,
    Task,
    TaskConfig,
    answers_are_regions,
    readable_targets,
    reference_of,
)


def find_families(modules: Iterable[ModuleType]) -> dict[str, type]:
    """The settings class of every family among `modules`, in their order, under the name of the task it builds.

    Raises InputError when two families have the same name.
    """
    found: dict[str, type] = {}
    for module in modules:
        settings = getattr(module, "FAMILY", None)
        if settings is None:
            continue
        name = settings().build().name
        if name in found:
            raise InputError(
                f"{module.__name__}: its task has the name {name!r}, as has the task of {found[name].__module__}; "
                "expected a name that no other task has"
            )
        found[name] = settings
    return found


FAMILIES = find_families(import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__))
# tasks whose problems are read from disk; they cannot draw new ones
FROM_DISK: dict[str, type] = {config.family: config for config in (FolderConfig, TableConfig)}

# settings of tasks from disk that `verified`, a hash of the problems that were read, makes needless
PLACES = ("root", "file", "on_error")
# settings of tasks from disk that change no activation: labels, and what the name of a problem depends on
LABELLING = ("label", "labels", "group", "split", "quantiles", "prompt", "image_column", "prompt_column")


def identifying(config: TaskConfig) -> dict[str, Any]:
    """The settings of a task that its problems and labels depend on. Files are known by their content."""
    return {name: value for name, value in vars(config).items() if name not in PLACES}


def shaping(config: TaskConfig) -> dict[str, Any]:
    """Those of `identifying` that are not known by the name of a problem and by `verified`."""
    return {name: value for name, value in identifying(config).items() if name not in LABELLING}


__all__ = [
    "identifying",
    "shaping",
    "FROM_DISK",
    "DiskConfig",
    "DiskTask",
    "FolderConfig",
    "TableConfig",
    "FAMILIES",
    "ANSWER_ROLES",
    "RELABELLED",
    "SPLITS",
    "Box",
    "Hide",
    "HideConfig",
    "Labels",
    "Line",
    "LineConfig",
    "Mask",
    "Maze",
    "MazeConfig",
    "NoReference",
    "Problem",
    "OWN_IMAGES",
    "OwnImages",
    "ParsedAnswer",
    "Region",
    "Role",
    "Sample",
    "Select",
    "SelectConfig",
    "Target",
    "Task",
    "TaskConfig",
    "answers_are_regions",
    "draw_samples",
    "check_lengths",
    "encode_labels",
    "find_families",
    "fresh_problems",
    "has_path",
    "in_workspace",
    "noise_seed",
    "on_path",
    "readable_targets",
    "reference_of",
    "SMALL",
    "WithMargin",
    "split_of",
    "with_margin",
    "with_noise",
]
