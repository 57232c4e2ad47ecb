"""Families of problems with exact labels, one module each."""

from cosprobe.tasks.maze import Maze, MazeConfig
from cosprobe.tasks.task import SPLITS, Problem, Readout, Target, Task, split_of

__all__ = ["SPLITS", "Maze", "MazeConfig", "Problem", "Readout", "Target", "Task", "split_of"]
