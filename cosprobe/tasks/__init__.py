"""Families of problems with exact labels, one module each."""

from cosprobe.tasks.maze import Maze
from cosprobe.tasks.task import SPLITS, Problem, Readout, Target, Task, split_of

__all__ = ["SPLITS", "Maze", "Problem", "Readout", "Target", "Task", "split_of"]
