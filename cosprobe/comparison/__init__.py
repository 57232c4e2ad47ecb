"""Differences between finished runs on the same task, by cell, with paired intervals where runs share test problems."""

from cosprobe.comparison.differences import Compared, RunResult, compare, of_target
from cosprobe.comparison.report import compare_runs

__all__ = ["Compared", "RunResult", "compare", "compare_runs", "of_target"]
