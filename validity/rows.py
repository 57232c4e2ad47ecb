"""What a simulation observed of one promise, and the page that lists it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

COVERAGE = 0.94  # the least share of intervals that must hold the truth; they are built for 0.95
LEVEL = 0.05  # the largest share of runs without any effect in which a test may find one
ERRORS = 3  # Monte-Carlo standard errors by which an observed share may miss what is promised


@dataclass(frozen=True)
class Row:
    """One promise in one setting.

    promised: empty for a method that is not used and stands beside for comparison. observed: share of runs, with its
    Monte-Carlo standard error. width: mean width of intervals, NaN for tests. holds: whether the observed share is
    within three errors of the promise.
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
    """How often intervals held the truth; at least 0.94 is promised."""
    observed, error = _share(covered)
    promised = f"at least {least:g}" if used else ""
    holds = observed + ERRORS * error >= least
    return Row(subject, promised, setting, observed, error, len(covered), float(widths.mean()), holds)


def shares_covered(
    subject: str, setting: str, held: Float[np.ndarray, " run"], widths: Float[np.ndarray, " run"]
) -> Row:
    """Of several intervals in each run, the share that held the truth; at least 0.94 is promised."""
    error = float((held.std(ddof=1) if len(held) > 1 else 0.0) / math.sqrt(len(held)))
    observed = float(held.mean())
    holds = observed + ERRORS * error >= COVERAGE
    return Row(subject, f"at least {COVERAGE:g}", setting, observed, error, len(held), float(widths.mean()), holds)


def alarms(subject: str, setting: str, alarm: Bool[np.ndarray, " run"], used: bool = True, most: float = LEVEL) -> Row:
    """How often something was found where there is nothing; at most 0.05 is promised."""
    observed, error = _share(alarm)
    promised = f"at most {most:g}" if used else ""
    return Row(subject, promised, setting, observed, error, len(alarm), math.nan, observed - ERRORS * error <= most)


def worst(rows: Sequence[Row], setting: str) -> Row:
    """The row of least coverage, named after `setting` and its own, with the mean width of all of them.

    The lowest of several observed shares lies below the lowest true one: the choice errs on the strict side.
    """
    lowest = min(rows, key=lambda row: row.observed)
    width = float(np.mean([row.width for row in rows]))
    place = f"{setting}; worst of {len(rows)}: {lowest.setting}"
    return Row(lowest.subject, lowest.promised, place, lowest.observed, lowest.error, lowest.runs, width, lowest.holds)


def seeds_of(problems: int, layout: str, rng: np.random.Generator) -> Int[np.ndarray, " problem"]:
    """Samples of each problem: `one each`, `1 to 5`, or `a quarter hold 5` where the others have one."""
    if layout == "one each":
        return np.ones(problems, dtype=int)
    if layout == "1 to 5":
        return rng.integers(1, 6, problems)
    return np.where(np.arange(problems) < problems // 4, 5, 1)


def luck(
    runs: int, seeds: Int[np.ndarray, " problem"], correlation: float, rng: np.random.Generator
) -> Float[np.ndarray, "run sample"]:
    """Uniform numbers whose outcomes agree within a problem: each sample takes its problem's number with probability
    root of `correlation`, else one of its own, so that any two samples of a problem are correlated by just that."""
    shared = np.repeat(rng.random((runs, len(seeds))), seeds, axis=1)
    own = rng.random(shared.shape)
    return np.where(rng.random(shared.shape) < math.sqrt(correlation), shared, own)


def page(rows: Sequence[Row]) -> str:
    """Markdown: promises by subject, then what stands beside for comparison."""
    promises, others = [r for r in rows if r.promised], [r for r in rows if not r.promised]
    broken = [row for row in promises if not row.holds]
    lines = [
        "# Do intervals and tests keep what they promise?",
        "",
        "Written by `make validity`: data are simulated with a known truth, and every number below is a share of runs. "
        f"Intervals are built for 0.95 and must hold the truth in at least {COVERAGE:g} of runs; tests at level "
        f"{LEVEL:g} may find something where there is nothing in at most {LEVEL:g}. A promise counts as kept when the "
        f"observed share misses it by no more than {ERRORS} Monte-Carlo standard errors. "
        f"{len(promises) - len(broken)} of {len(promises)} are kept.",
        "",
        "Every share that is printed (accuracies of probes and baselines, random weights, generalisation matrices, "
        "what the probe knew of wrong videos, risks of early answers, ensembles) has the interval of *shares*. Every "
        "paired difference (excess over x0-hat, selectivity, nuisances removed, gains) has that of *differences*. Both "
        "are checked on really fitted probes too, as are latencies, lags and depths (*intervals of a whole map*).",
        "",
    ]
    for subject in dict.fromkeys(row.subject for row in promises):
        mine = [row for row in promises if row.subject == subject]
        lines += [f"## {subject[0].upper()}{subject[1:]}", "", *_table(mine), ""]
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
    """Share and its standard error, which is above 0 even if it always happened."""
    likely = (happened.sum() + 1) / (len(happened) + 2)
    return float(happened.mean()), math.sqrt(likely * (1 - likely) / len(happened))
