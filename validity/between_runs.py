"""Differences between two runs: coverage on different problems, and false positives of the two-sided test of a map."""

from __future__ import annotations

import numpy as np

from cosprobe.cells import Cell
from cosprobe.comparison.differences import ProblemShares, RunResult, TargetResult, compare
from cosprobe.evaluation import independent_difference_interval, share_interval
from cosprobe.tasks import Role, Target
from validity.rows import Row, alarms, coverage, worst

SUBJECT = "differences between runs"
SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)
PROBLEMS = (12, 30, 90, 300)  # of each run
CELLS = (4, 8)  # steps, layers of the map of the test
SPREAD = 0.5  # of what the cells of a problem have in common


def simulate(runs: int, seed: int, problems: tuple[int, ...] = PROBLEMS) -> list[Row]:
    """One row per number of problems: the lowest coverage over pairs of shares; and the share of maps of two equally
    good runs on shared problems in which a cell is said to differ."""
    rng = np.random.default_rng(seed)
    found = [worst(_apart(runs, count, rng), f"{count} problems of each run, not shared") for count in problems]
    return found + [_alarms(max(runs // 10, 100), count, rng) for count in problems]


def _apart(runs: int, problems: int, rng: np.random.Generator) -> list[Row]:
    keys, found = np.arange(problems), []
    for p in SHARES:
        for q in SHARES:
            one, two = ((rng.random((runs, problems)) < share).astype(float) for share in (p, q))
            ends = ((rows.mean(axis=1), *share_interval(rows, keys)) for rows in (one, two))
            lower, upper = independent_difference_interval(*ends)
            found.append(coverage(SUBJECT, f"{p:g} and {q:g}", (lower <= q - p) & (q - p <= upper), upper - lower))
    return found


def _alarms(runs: int, problems: int, rng: np.random.Generator) -> Row:
    """Cells of a run have a part in common, and so have both runs on the same problem."""
    cells = tuple(Cell(step, layer, "cond", "all") for step in range(CELLS[0]) for layer in range(CELLS[1]))
    keys = np.array([f"p{i:04d}" for i in range(problems)])
    alarm = np.zeros(runs, dtype=bool)
    for run in range(runs):
        hard = rng.random(problems)
        drawn = [
            np.where(rng.random((len(cells), problems)) < SPREAD, own, rng.random((len(cells), problems)))
            for own in (np.where(rng.random(problems) < SPREAD, hard, rng.random(problems)) for _ in range(2))
        ]
        one, two = (_result(name, (d < 0.6).astype(float), keys, cells) for name, d in zip("ab", drawn, strict=True))
        better, worse, _ = compare(one, two, seed=run).count("answer")
        alarm[run] = better + worse > 0
    return alarms("differences between runs: cells of a map", f"{problems} shared problems, {len(cells)} cells", alarm)


def _result(name: str, right: np.ndarray, keys: np.ndarray, cells: tuple[Cell, ...]) -> RunResult:
    target = Target("answer", 4, "candidate", Role.ANSWER, ("one",))
    of_target = TargetResult(target, ProblemShares.of(right, keys), right.mean(axis=1))
    return RunResult(name, CELLS[1], CELLS[0], cells, {"answer": of_target}, None)
