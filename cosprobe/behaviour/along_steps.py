"""Exploration, commitment and self-correction: how answers change along the denoising steps."""

from __future__ import annotations

import numpy as np
import xarray as xr
from jaxtyping import Float, Int, Shaped

from cosprobe.behaviour.answers import Answers, settled, several_drawn
from cosprobe.behaviour.findings import COMMITMENT, CORRECTION, EXPLORATION, Finding, finding, untested
from cosprobe.evaluation import (
    ALPHA,
    HOLDS,
    LEAST_PROBLEMS,
    UNCLEAR,
    UNTESTED,
    Claim,
    difference_interval,
    effective_problems,
    max_t_bootstrap,
    share_interval,
    verdict,
)

DRAWN = 0.5  # a candidate is drawn from half of the way between absent and drawn on
TRACE = 0.2  # and there is a trace of it from a fifth on
BETTER = "change from wrong to right more often than from right to wrong"


def exploration(one: Answers) -> list[Finding]:
    """Whether x0-hat shows several candidates before the video shows one.

    Counted apart: x0-hat draws several (each at least DRAWN), or blends several (each at least TRACE, at most one of
    them drawn). The null is the finished video, in which the same counts are errors of the parser or of the model.
    Of several decoded steps the clearest counts; its bounds and p hold for all of them together.
    """
    if one.drawn is None:
        why = "no x0-hat was decoded, or the task has no parser"
        return [untested(EXPLORATION, one, "x0-hat draws several candidates, the finished video one", why)]
    drawn = several_drawn(one.drawn, DRAWN)
    blended = several_drawn(one.drawn, TRACE) & ~drawn
    found = []
    for stated, values in (
        ("x0-hat draws several candidates, the finished video one", drawn),
        ("x0-hat blends several candidates, the finished video does not", blended),
    ):
        found.append(_against_end(EXPLORATION, one, stated, values.astype(float)))
    live = live_candidates(one.proba)
    first, last, many = live[:, 0].mean(), live[:, -1].mean(), (live[:, 0] >= 1.5).mean()
    measure = (
        f"effective number of candidates of the probe: {first:.2f} at step {one.steps[0]}, {last:.2f} at step "
        f"{one.steps[-1]}; at first above 1.5 in {many:.2f} of the samples. Described only: probes of two steps are "
        "unequally sure by chance"
    )
    found.append(untested(EXPLORATION, one, "The probe is sure of one candidate later than at the first step", measure))
    return found


def commitment(one: Answers) -> list[Finding]:
    """The step from which the answer never changes: of x0-hat (the candidate that is drawn most) and of the probe.

    A probe that errs at a late step makes its own commitment late. What x0-hat shows is known at decoded steps only,
    so its commitment is at that step or at any after the decoded step before. The relation to each difficulty is
    Spearman's correlation, with the interval of Bonett and Wright (2000), "Sample size requirements for estimating
    Pearson, Kendall and Spearman correlations".
    """
    found = []
    for name, picks, steps in _picks(one):
        if picks.shape[1] < 2:
            continue
        first = settled(picks)
        begun = (first == 0).astype(float)
        lower, upper = (float(end[0]) for end in share_interval(begun[None], one.keys))
        late = ", ".join(f"{(first <= row).mean():.2f} from step {step}" for row, step in enumerate(steps[:4]))
        measure = f"share of samples whose answer in {name} never changes: {late}"
        claim = Claim(
            f"The answer of {name} is fixed from the first step on in more than half of the samples",
            measure, "half", float(begun.mean()) - 0.5, lower - 0.5, upper - 0.5, verdict(lower - 0.5, upper - 0.5),
        )  # fmt: skip
        found.append(finding(COMMITMENT, one, claim))
        for cause, values in one.difficulty.items():
            r, low, high = rank_correlation(values, first, one.keys)
            if np.isfinite(r):
                measure = f"Spearman's correlation of the step of commitment and {cause}"
                claim = Claim(
                    f"{name}: greater {cause}, later commitment", measure, "0", r, low, high, verdict(low, high)
                )
                found.append(finding(COMMITMENT, one, claim))
    return found


def corrections(one: Answers) -> list[Finding]:
    """How often an answer changes from wrong to right, minus how often from right to wrong.

    A correction of x0-hat counts only if it had drawn one candidate, the wrong one. Without a sampled null, changes in
    both directions are the comparison: a model that changes its answers at random gains nothing.
    """
    if one.right is None:
        why = "several answers are right, so a change is neither right nor wrong"
        return [
            untested(CORRECTION, one, "Answers change from wrong to right more often than from right to wrong", why)
        ]
    found = []
    for name, picks, steps in _picks(one):
        if picks.shape[1] < 2:
            continue
        start, end = picks[:, 0] == one.right, picks[:, -1] == one.right
        if name == "x0-hat" and one.drawn is not None:  # only what was clearly drawn
            clear = (one.drawn[:, 0] >= DRAWN).sum(axis=-1) == 1
        else:
            clear = np.ones(len(one), bool)
        gained, lost = clear & ~start & end, clear & start & ~end
        other = clear & ~start & ~end & (picks[:, 0] != picks[:, -1])
        difference = gained.astype(float) - lost
        lower, upper = (float(bound[0]) for bound in difference_interval(difference[None], one.keys))
        measure = (
            f"{name}, step {steps[0]} to {_place(steps, -1, name)}: {gained.sum()} from wrong to right, {lost.sum()} "
            f"from right to wrong, {other.sum()} from wrong to another wrong one, of {len(one)}"
        )
        claim = Claim(
            f"{name}: answers {BETTER}",
            measure, "right to wrong", float(difference.mean()), lower, upper, verdict(lower, upper),
        )  # fmt: skip
        found.append(finding(CORRECTION, one, claim))
    return found


# numbers


def live_candidates(proba: Float[np.ndarray, "sample step candidate"]) -> Float[np.ndarray, "sample step"]:
    """Effective number of candidates: exp of the entropy of the probabilities."""
    safe = np.clip(proba.astype(np.float64), 1e-12, 1.0)
    return np.exp(-(safe * np.log(safe)).sum(axis=-1))


def rank_correlation(
    one: Int[np.ndarray, " sample"], other: Int[np.ndarray, " sample"], keys: Shaped[np.ndarray, " sample"]
) -> tuple[float, float, float]:
    """Spearman's correlation with its 95 % interval (Bonett and Wright 2000), at the effective number of problems.
    NaN where one side does not vary, or with few problems."""
    count = effective_problems(keys)
    if len(np.unique(keys)) < LEAST_PROBLEMS or np.ptp(one) == 0 or np.ptp(other) == 0:
        return (np.nan,) * 3
    a, b = (_ranks(values) - (len(values) + 1) / 2 for values in (one, other))
    r = float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))
    spread = 1.96 * np.sqrt((1 + r**2 / 2) / max(count - 3, 1.0))
    middle = np.arctanh(np.clip(r, -0.999999, 0.999999))
    return r, float(np.tanh(middle - spread)), float(np.tanh(middle + spread))


def _ranks(values: Int[np.ndarray, " sample"]) -> Float[np.ndarray, " sample"]:
    """Ranks from 1; equal values share the mean of their ranks. (scipy.stats is slow to import.)"""
    _, at, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[at]


def _picks(one: Answers) -> list[tuple[str, Int[np.ndarray, "sample row"], tuple[int, ...]]]:
    """Picked candidate along the rows, of x0-hat (the last row is the finished video) and of the probe."""
    found = []
    if one.drawn is not None:
        found.append(("x0-hat", one.drawn.argmax(axis=-1), one.decoded))
    return [*found, ("the probe", one.proba.argmax(axis=-1), one.steps)]


def _place(steps: tuple[int, ...], row: int, name: str) -> str:
    return "the finished video" if name == "x0-hat" else f"step {steps[row]}"


def _against_end(behaviour: str, one: Answers, claim: str, values: Float[np.ndarray, "sample row"]) -> Finding:
    """The clearest decoded step against the finished video."""
    difference = (values[:, :-1] - values[:, -1:]).T
    above = max_t_bootstrap(difference, one.keys)
    at = int(np.lexsort([-difference.mean(axis=1), above.p])[0])
    low, high = (float(end[at]) for end in difference_interval(difference, one.keys))
    low = min(low, float(max(above.lower[at], -1.0)))
    mean, p = float(difference[at].mean()), float(above.p[at])
    shares = ", ".join(f"step {step} {values[:, row].mean():.2f}" for row, step in enumerate(one.decoded[:5]))
    several = f", clearest of {len(one.decoded)} steps" if len(one.decoded) > 1 else ""
    chosen = f"step {one.decoded[at]}{several}, p {p:.3f}"
    measure = f"share of samples: {shares}, finished video {values[:, -1].mean():.2f}; {chosen}"
    outcome = UNTESTED if np.isnan(p) else HOLDS if p <= ALPHA and low > 0 else UNCLEAR
    return finding(behaviour, one, Claim(claim, measure, "finished video", mean, low, high, outcome))


# curves


def answer_curves(one: Answers) -> dict[str, xr.DataArray]:
    """By kind: what x0-hat shows at decoded steps (and the finished video), and what the probe reads."""
    found: dict[str, xr.DataArray] = {}
    live = live_candidates(one.proba).mean(axis=0)
    about = {"description": "effective number of candidates of the probe"}
    found[f"live_{one.kind}"] = xr.DataArray(live, {f"step_{one.kind}": list(one.steps)}, attrs=about)
    for name, picks, steps in _picks(one):
        first = settled(picks)
        rows = [*steps, max(one.steps) + 1] if name == "x0-hat" else list(steps)
        found[f"settled_{name}_{one.kind}"] = xr.DataArray(
            [(first <= row).mean() for row in range(picks.shape[1])], {f"settled_{name}_step_{one.kind}": rows},
            attrs={"description": f"share of samples whose answer in {name} does not change from this step on"},
        )  # fmt: skip
    if one.drawn is not None:
        axis = {f"decoded_{one.kind}": [*one.decoded, max(one.steps) + 1]}
        drawn = several_drawn(one.drawn, DRAWN)
        for name, values in (("drawn", drawn), ("blended", several_drawn(one.drawn, TRACE) & ~drawn)):
            found[f"{name}_{one.kind}"] = xr.DataArray(
                values.mean(axis=0), axis, attrs={"description": f"share of samples with several candidates {name}"}
            )
    return found
