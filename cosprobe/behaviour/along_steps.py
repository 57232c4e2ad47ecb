"""Exploration, commitment and self-correction: how answers change along the denoising steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int, Shaped
from scipy.special import ndtri

from cosprobe.behaviour.answers import DRAWN, NONE, Answers, settled, several_drawn
from cosprobe.behaviour.findings import (
    COMMITMENT,
    CORRECTION,
    DESCRIBED,
    EXPLORATION,
    LEAST_CHANGES,
    Finding,
    Group,
    finding,
    without_numbers,
)
from cosprobe.evaluation import (
    ALPHA,
    HOLDS,
    LEAST_PROBLEMS,
    UNCLEAR,
    UNTESTED,
    Claim,
    average_ranks,
    clearest,
    difference_interval,
    effective_problems,
    share_interval,
    verdict,
)

MOST_STEPS = 4  # in a sentence
MOST_VALUES = 3  # of a difficulty, each of which is a group of its own
TRACE = 0.2  # there is a trace of a candidate from here on
TRACES = (0.1, TRACE, 0.3)  # a claim on blends has to hold for all of these
NOT_ABOVE = "; p is at most 0.05, but the lower end of the interval is not above 0"


def exploration(one: Answers) -> list[Finding]:
    """Whether x0-hat shows several candidates before the video shows one.

    Counted apart: x0-hat draws several (each at least DRAWN), or blends several (at least two leave a trace, at most
    one of them is drawn). The null is the finished video, in which the same counts are errors of the parser or of the
    model. Of several decoded steps the clearest counts; p and the lower bound hold for all of them together.
    """
    claims = "x0-hat draws several candidates, the finished video does not", "x0-hat blends several candidates"
    if one.drawn is None:
        why = "x0-hat was not decoded, or its scores do not tell candidates that are drawn from others"
        return [without_numbers(EXPLORATION, one.kind, claims[0], why, one.keys)]
    drawn = several_drawn(one.drawn, DRAWN)
    found = [_against_end(one, claims[0], drawn)]
    found.append(_blends(one, f"{claims[1]}, the finished video does not", one.drawn, drawn))
    live = live_candidates(one.proba)
    first, last, many = live[:, 0].mean(), live[:, -1].mean(), (live[:, 0] >= 1.5).mean()
    measure = (
        f"effective number of candidates: {first:.2f} at step {one.steps[0]} ({many:.2f} of the samples above 1.5), "
        f"{last:.2f} at step {one.steps[-1]}; probes of two steps are unequally sure by chance"
    )
    found.append(without_numbers(EXPLORATION, one.kind, "How sure the probe is", measure, one.keys, DESCRIBED))
    return found


def commitment(one: Answers) -> list[Finding]:
    """The step from which the answer is that of the end: of what x0-hat shows (the parsed answer, or none), and of the
    probe. And whether it comes later on problems of greater difficulty.

    A probe that errs at a late step makes its own commitment late, and each step has a probe of its own. What x0-hat
    shows is known at decoded steps only. The relation to each difficulty is Spearman's correlation, at a level that
    holds for all correlations of the kind together (Bonferroni).
    Source of its interval: Bonett and Wright (2000), "Sample size requirements for estimating Pearson, Kendall and
    Spearman correlations".
    """
    found = []
    picked = [(name, picks, steps) for name, picks, steps in _picks(one) if picks.shape[1] > 1]
    for name, picks, steps in picked:
        first = settled(picks)
        before = picks.shape[1] - 1  # at the end, every answer is that of the end
        some = np.unique(np.linspace(0, before - 1, MOST_STEPS).round().astype(int))
        shares = ", ".join(f"{(first <= row).mean():.2f} from step {steps[row]}" for row in some)
        nothing = ""
        if (picks == NONE).any():
            start, end = (picks[:, [0, -1]] == NONE).mean(axis=0)
            nothing = (
                f"; none counts as an answer of its own: {start:.2f} of the samples show none at step {steps[0]}, "
                f"{end:.2f} in the finished video"
            )
        measure = f"share of samples with the answer of the end: {shares}{nothing}"
        found.append(without_numbers(COMMITMENT, one.kind, f"When {name} commits", measure, one.keys, DESCRIBED))
        for cause, values in one.difficulty.items():
            r, lower, upper = rank_correlation(values, first, one.keys, len(picked) * len(one.difficulty))
            if np.isfinite(r):
                claim = Claim(
                    f"{name} commits later on problems of a higher difficulty ({cause})",
                    "Spearman's correlation", "0", r, lower, upper, verdict(lower, upper),
                )  # fmt: skip
                found.append(finding(COMMITMENT, one.kind, claim, one.keys))
    return found


def corrections(one: Answers) -> list[Finding]:
    """How often an answer changes from wrong to right, minus how often from right to wrong.

    Changes from or to no answer are counted apart. Without a sampled null, changes in the other direction are the
    comparison: a model that changes its answers at random gains nothing.
    """
    stated = "answers change from wrong to right more often than from right to wrong"
    if one.right is None:
        why = "the right answers of problems with several are not stored"
        return [without_numbers(CORRECTION, one.kind, f"x0-hat: {stated}", why, one.keys)]
    found = []
    for name, picks, steps in _picks(one):
        if picks.shape[1] < 2:
            continue
        start, end = picks[:, 0], picks[:, -1]
        right, wrong = (start == one.right, end == one.right), (start != one.right, end != one.right)
        none = start == NONE, end == NONE
        gained, lost = wrong[0] & ~none[0] & right[1], right[0] & wrong[1] & ~none[1]
        other = wrong[0] & wrong[1] & ~none[0] & ~none[1] & (start != end)
        changes = {"wrong to right": gained, "right to wrong": lost, "wrong to wrong": other}
        if none[0].any() or none[1].any():
            changes |= {"right to none": right[0] & none[1], "none to right": none[0] & right[1]}
        counts = ", ".join(f"{int(change.sum())} from {which}" for which, change in changes.items())
        last = "the finished video" if name == "x0-hat" else f"step {steps[-1]}"
        difference = gained.astype(float) - lost
        lower, upper = (float(bound[0]) for bound in difference_interval(difference[None], one.keys))
        few = gained.sum() + lost.sum() < LEAST_CHANGES
        claim = Claim(
            f"{name}: {stated}",
            f"step {steps[0]} to {last}, {len(one)} samples: {counts}{'; too few to tell' if few else ''}",
            "right to wrong", float(difference.mean()), lower, upper, UNTESTED if few else verdict(lower, upper),
        )  # fmt: skip
        found.append(finding(CORRECTION, one.kind, claim, one.keys))
    return found


# by difficulty


def by_difficulty(one: Answers) -> list[Group]:
    """Exploration, commitment and corrections from the first decoded step, and the probe at its first step, by value of
    each difficulty; with more than MOST_VALUES values: up to the median, and above."""
    found = []
    for name, values in one.difficulty.items():
        for about, mask in _groups(values):
            found.append(_group(one, f"{name} {about}", mask))
    return found


def _groups(values: Int[np.ndarray, " sample"]) -> list[tuple[str, Bool[np.ndarray, " sample"]]]:
    """Names and masks of the groups of a difficulty."""
    known = np.unique(values)
    if len(known) <= MOST_VALUES:
        return [(str(value), values == value) for value in known]
    middle = int(np.median(values))
    middle = middle if middle < known[-1] else int(known[-2])  # so that there is something above
    return [(f"up to {middle}", values <= middle), (f"above {middle}", values > middle)]


def _group(one: Answers, about: str, mask: Bool[np.ndarray, " sample"]) -> Group:
    rows: dict[str, Bool[np.ndarray, " sample"]] = {}
    if one.drawn is not None:
        rows[f"x0-hat draws several, step {one.decoded[0]}"] = several_drawn(one.drawn, DRAWN)[:, 0]
    for name, picks, steps in _picks(one):
        if picks.shape[1] > 1:
            rows[f"{name}: answer of the end from step {steps[0]}"] = settled(picks) == 0
    shares = {}
    if rows:
        values = np.stack(list(rows.values()))[:, mask].astype(float)
        ends = zip(values.mean(axis=1), *share_interval(values, one.keys[mask]), strict=True)
        shares = {name: (float(m), float(a), float(b)) for name, (m, a, b) in zip(rows, ends, strict=True)}
    changes = None
    if one.right is not None and one.shown is not None and one.shown.shape[1] > 1:
        start, end = one.shown[mask][:, 0], one.shown[mask][:, -1]
        right = start == one.right[mask], end == one.right[mask]
        wrong = ~right[0] & (start != NONE), ~right[1] & (end != NONE)
        changes = int((wrong[0] & right[1]).sum()), int((right[0] & wrong[1]).sum())
    return Group(one.kind, about, int(mask.sum()), shares, changes)


# numbers


def live_candidates(proba: Float[np.ndarray, "sample step candidate"]) -> Float[np.ndarray, "sample step"]:
    """Effective number of candidates: exp of the entropy of the probabilities."""
    safe = np.clip(proba.astype(np.float64), 1e-12, 1.0)
    return np.exp(-(safe * np.log(safe)).sum(axis=-1))


def rank_correlation(
    one: Int[np.ndarray, " sample"],
    other: Int[np.ndarray, " sample"],
    keys: Shaped[np.ndarray, " sample"],
    count: int = 1,
) -> tuple[float, float, float]:
    """Spearman's correlation with its 95 % interval (Bonett and Wright 2000), at the effective number of problems.
    NaN where one side does not vary, or with few problems. count: number of correlations that it holds for together."""
    problems = effective_problems(keys)
    if len(np.unique(keys)) < LEAST_PROBLEMS or np.ptp(one) == 0 or np.ptp(other) == 0:
        return (np.nan,) * 3
    a, b = (average_ranks(np.asarray(v, float)[:, None])[:, 0] - (len(v) + 1) / 2 for v in (one, other))
    r = float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))
    spread = float(ndtri(1 - 0.025 / count)) * np.sqrt((1 + r**2 / 2) / max(problems - 3, 1.0))
    middle = np.arctanh(np.clip(r, -0.999999, 0.999999))
    return r, float(np.tanh(middle - spread)), float(np.tanh(middle + spread))


def _picks(one: Answers) -> list[tuple[str, Int[np.ndarray, "sample row"], tuple[int, ...]]]:
    """Answers along the rows: what x0-hat shows (the last row is the finished video), and what the probe reads."""
    found = [] if one.shown is None else [("x0-hat", one.shown, one.decoded)]
    return [*found, ("the probe", one.proba.argmax(axis=-1), one.steps)]


def _blends(
    one: Answers, claim: str, scale: Float[np.ndarray, "sample row candidate"], drawn: Bool[np.ndarray, "sample row"]
) -> Finding:
    """Blends against the finished video, with traces from TRACE on. It holds only if it does with all TRACES.

    scale: `Answers.drawn`. drawn: whether several are drawn."""
    tried = {trace: _against_end(one, claim, several_drawn(scale, trace) & ~drawn, trace) for trace in TRACES}
    main, others = tried[TRACE], {trace: tried[trace].claim for trace in TRACES if trace != TRACE}
    held = [f"{trace:g}" for trace, other in others.items() if other.verdict == HOLDS]
    lost = [f"{trace:g}: {other.estimate}" for trace, other in others.items() if other.verdict != HOLDS]
    if main.claim.verdict != HOLDS:
        return main
    if not lost:
        return replace(main, claim=replace(main.claim, measure=f"{main.claim.measure}; also from {', '.join(held)} on"))
    why = f"; no evidence with traces from {', from '.join(lost)}"
    return replace(main, claim=replace(main.claim, measure=main.claim.measure + why, verdict=UNCLEAR))


def _against_end(
    one: Answers, claim: str, shown: Bool[np.ndarray, "sample row"], trace: float | None = None
) -> Finding:
    """The clearest decoded step against the finished video. trace: the threshold that was used, for the text."""
    values = shown.astype(float)
    difference = (values[:, :-1] - values[:, -1:]).T
    found = clearest(difference, one.keys)
    each = zip(values.mean(axis=0), one.decoded, strict=False)  # the last row is the finished video
    shares = ", ".join(f"{share:.2f} at step {step}" for share, step in each)
    several = f", clearest of {len(one.decoded)} steps" if len(one.decoded) > 1 else ""
    traced = "" if trace is None else f", traces from {trace:g} on"
    why = NOT_ABOVE if found.p <= ALPHA and not found.above else ""
    chosen = f"step {one.decoded[found.at]}{several}{traced}, p {found.p:.3f}{why}"
    measure = f"share of samples: {shares}, {values[:, -1].mean():.2f} in the finished video; {chosen}"
    outcome = HOLDS if found.above else UNCLEAR
    stated = Claim(claim, measure, "finished video", found.value, found.lower, found.upper, outcome)
    return finding(EXPLORATION, one.kind, stated, one.keys)


# curves


def answer_curves(one: Answers) -> dict[str, xr.DataArray]:
    """By kind: what x0-hat shows at decoded steps (and the finished video), and what the probe reads."""
    found: dict[str, xr.DataArray] = {}
    live = live_candidates(one.proba).mean(axis=0)
    about = {"description": "effective number of candidates of the probe"}
    found[f"live_{one.kind}"] = xr.DataArray(live, {f"step_{one.kind}": list(one.steps)}, attrs=about)
    for name, picks, steps in _picks(one):
        first = settled(picks)
        rows = [*steps, one.total] if name == "x0-hat" else list(steps)
        found[f"settled_{name}_{one.kind}"] = xr.DataArray(
            [(first <= row).mean() for row in range(picks.shape[1])], {f"settled_{name}_step_{one.kind}": rows},
            attrs={"description": f"share of samples whose answer in {name} is that of the end from this step on"},
        )  # fmt: skip
    if one.drawn is not None:
        axis = {f"decoded_{one.kind}": [*one.decoded, one.total]}
        drawn = several_drawn(one.drawn, DRAWN)
        for name, values in (("drawn", drawn), ("blended", several_drawn(one.drawn, TRACE) & ~drawn)):
            found[f"{name}_{one.kind}"] = xr.DataArray(
                values.mean(axis=0), axis, attrs={"description": f"share of samples with several candidates {name}"}
            )
    return found
