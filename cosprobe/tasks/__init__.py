"""Families of problems with exact labels, one module each."""

from cosprobe.tasks.hide import Hide, HideConfig
from cosprobe.tasks.line import Line, LineConfig
from cosprobe.tasks.maze import Maze, MazeConfig
from cosprobe.tasks.select import Select, SelectConfig
from cosprobe.tasks.task import SPLITS, Problem, Readout, Target, Task, split_of

FAMILIES: dict[str, type] = {"maze": MazeConfig, "hide": HideConfig, "select": SelectConfig, "line": LineConfig}

__all__ = [
    "FAMILIES",
    "SPLITS",
    "Hide",
    "HideConfig",
    "Line",
    "LineConfig",
    "Maze",
    "MazeConfig",
    "Problem",
    "Readout",
    "Select",
    "SelectConfig",
    "Target",
    "Task",
    "split_of",
]
