"""Results of simulations as rows, and the page that lists them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

COVERAGE = 0.94  # least share of intervals that must contain the true value; their nominal level is 0.95
LEVEL = 0.05  # largest false positive rate of a test
ERRORS = 3  # an observed share may miss its bound by this many Monte-Carlo standard errors


@dataclass(frozen=True)
class Row:
    """Result of one simulation.

    subject, setting: names of what is simulated. promised: the bound on the share, empty for a method that is listed
    for comparison only. observed, error: share of runs, with its Monte-Carlo standard error. runs: number of runs.
    width: mean width of intervals, NaN for tests. holds: whether the share meets the bound within ERRORS standard
    errors.
    """

    subject: str
    promised: str
    setting: str
    observed: float
    error: float
    runs: int
    width: float
    holds: bool


def coverage(
    subject: str,
    setting: str,
    covered: Bool[np.ndarray, " run"],
    widths: Float[np.ndarray, " run"],
    used: bool = True,
    least: float = COVERAGE,
) -> Row:
    """Row of a coverage: share of runs in which the interval contains the true value, at least 0.94 by default."""
    observed, error = _share(covered)
    promised = f"at least {least:g}" if used else ""
    holds = observed + ERRORS * error >= least
    return Row(subject, promised, setting, observed, error, len(covered), float(widths.mean()), holds)


def shares_covered(
    subject: str, setting: str, held: Float[np.ndarray, " run"], widths: Float[np.ndarray, " run"]
) -> Row:
    """Row of a coverage over several intervals per run. held: share of the intervals of each run that cover."""
    error = float((held.std(ddof=1) if len(held) > 1 else 0.0) / math.sqrt(len(held)))
    observed = float(held.mean())
    holds = observed + ERRORS * error >= COVERAGE
    return Row(subject, f"at least {COVERAGE:g}", setting, observed, error, len(held), float(widths.mean()), holds)


def alarms(subject: str, setting: str, alarm: Bool[np.ndarray, " run"], used: bool = True, most: float = LEVEL) -> Row:
    """Row of a false positive rate: share of runs with a false positive, at most 0.05 by default."""
    observed, error = _share(alarm)
    promised = f"at most {most:g}" if used else ""
    return Row(subject, promised, setting, observed, error, len(alarm), math.nan, observed - ERRORS * error <= most)


def worst(rows: Sequence[Row], setting: str) -> Row:
    """The row with the lowest coverage, with the mean width of all rows. Its setting is appended to `setting`.

    The lowest observed share is on average below the lowest true share, so this choice is strict.
    """
    lowest = min(rows, key=lambda row: row.observed)
    width = float(np.mean([row.width for row in rows]))
    named = f"{setting}; worst of {len(rows)}: {lowest.setting}"
    return Row(lowest.subject, lowest.promised, named, lowest.observed, lowest.error, lowest.runs, width, lowest.holds)


def seeds_of(problems: int, layout: str, rng: np.random.Generator) -> Int[np.ndarray, " problem"]:
    """Number of samples of each problem: `one each`, `1 to 5` (random), or `a quarter hold 5` (the others one)."""
    if layout == "one each":
        return np.ones(problems, dtype=int)
    if layout == "1 to 5":
        return rng.integers(1, 6, problems)
    return np.where(np.arange(problems) < problems // 4, 5, 1)


def luck(
    runs: int, seeds: Int[np.ndarray, " problem"], correlation: float, rng: np.random.Generator
) -> Float[np.ndarray, "run sample"]:
    """Uniform random numbers with a given correlation between the samples of a problem.

    A sample takes the number of its problem with probability sqrt(correlation), otherwise an independent number.
    """
    shared = np.repeat(rng.random((runs, len(seeds))), seeds, axis=1)
    separate = rng.random(shared.shape)
    return np.where(rng.random(shared.shape) < math.sqrt(correlation), shared, separate)


def page(rows: Sequence[Row]) -> str:
    """The page in Markdown: rows with a bound by subject, then rows for comparison."""
    promises, others = [r for r in rows if r.promised], [r for r in rows if not r.promised]
    broken = [row for row in promises if not row.holds]
    lines = [
        "# Coverage of intervals and false positive rates of tests",
        "",
        "Written by `make validity`. Data are simulated with known true values; every number in column `observed` is a "
        f"share of runs. 95 % intervals have to contain the true value in at least {COVERAGE:g} of runs. Tests at "
        f"level {LEVEL:g} may have false positives in at most {LEVEL:g} of runs. Such a bound counts as kept if the "
        f"observed share misses it by no more than {ERRORS} Monte-Carlo standard errors. "
        f"{len(promises) - len(broken)} of {len(promises)} bounds are kept.",
        "",
        "Intervals of *shares* are used for accuracies of probes and baselines, random weights, generalisation "
        "matrices, accuracy where the video is wrong, risks of early answers, and ensembles. Intervals of "
        "*differences* are used for paired differences: accuracy above x0-hat, selectivity, confounds removed, and "
        "gains. Both are also simulated with fitted probes, as are latencies, lags and depths (*intervals of a whole "
        "map*).",
        "",
    ]
    for subject in dict.fromkeys(row.subject for row in promises):
        of_subject = [row for row in promises if row.subject == subject]
        lines += [f"## {subject[0].upper()}{subject[1:]}", "", *_table(of_subject), ""]
    if others:
        lines += ["## Not used, for comparison", "", *_table(others, named=True), ""]
    return "\n".join(lines)


def _table(rows: Sequence[Row], named: bool = False) -> list[str]:
    head = ["what" if named else "promised", "setting", "observed", "runs", "mean width", "kept"]
    body = [
        [
            row.subject if named else row.promised,
            row.setting,
            f"{row.observed:.4f} ± {row.error:.4f}",
            f"{row.runs:,}",
            "" if math.isnan(row.width) else f"{row.width:.3f}",
            "yes" if row.holds else "**no**",
        ]
        for row in rows
    ]
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]


def _share(happened: Bool[np.ndarray, " run"]) -> tuple[float, float]:
    """Share and its standard error, which is above 0 even for a share of 0 or 1."""
    likely = (happened.sum() + 1) / (len(happened) + 2)
    return float(happened.mean()), math.sqrt(likely * (1 - likely) / len(happened))
