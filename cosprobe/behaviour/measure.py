"""The behaviours of arXiv 2603.16870, section 4, as numbers with an interval and a null, from what a run holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import xarray as xr

from cosprobe.activations import ProbeSamples
from cosprobe.behaviour.along_steps import NOT_ABOVE, answer_curves, by_difficulty, commitment, corrections, exploration
from cosprobe.behaviour.answers import answers
from cosprobe.behaviour.continuations import Continuations, corrected, sampled_corrections
from cosprobe.behaviour.findings import (
    AXES,
    COMMITMENT,
    CORRECTION,
    DESCRIBED,
    EXPLORATION,
    MEMORY,
    ORDER,
    PERCEPTION,
    ROLES,
    Behaviours,
    Finding,
    nothing,
)
from cosprobe.behaviour.over_layers import axes, energy, layer_curves, layer_lines, perception, roles
from cosprobe.evaluation import ALPHA, FAILS, HOLDS, UNCLEAR, UNTESTED, Claim, Evaluated, Grid
from cosprobe.evaluation.checks import WeightsLine
from cosprobe.probes import ProbeBank
from cosprobe.tasks import Role

MOST = 4  # estimates in a sentence
CAVEAT = {
    EXPLORATION: "x0-hat early in a run is the mean of possible videos, so two drawn candidates may be that mean.",
    COMMITMENT: "Each step has a probe of its own, and x0-hat is known at decoded steps only.",
    CORRECTION: "The comparison is the opposite change; fresh noise may correct as many answers.",
    MEMORY: "A fact may also reach the frame through other frames, which attention sees at every layer.",
    PERCEPTION: "The image enters at layer 0, so an untrained model may show the same order; where permuted weights "
    "give both onsets, the claim has to exceed them. An onset is relative to the maximum of its own target.",
    ROLES: "A target that all layers show equally has its centre in the middle. Where accuracy lies is not where "
    "anything is computed.",
    AXES: "Frames of one latent are denoised together, so a gain along frames is no sequence in time.",
}
SAMPLED_CAVEAT = "Both go on from the same x0-hat, so what x0-hat has fixed already is corrected by neither."


def measure(
    samples: ProbeSamples,
    evaluated: Evaluated,
    bank: ProbeBank,
    grid: Grid,
    untrained: Sequence[WeightsLine] = (),
    continued: Sequence[Continuations] | None = None,
) -> Behaviours:
    """Measures every behaviour on the test samples of a run. Choices of cells and scales are made on validation.

    samples: of all splits. evaluated, grid: what was made of them with the probes of `bank`. Nothing is sampled.
    untrained: accuracy with other weights. continued: runs of new problems and their fresh continuations, if sampled.
    A behaviour that the run cannot show gets a finding without numbers that says why.
    """
    read = answers(samples, bank, grid)
    layers = layer_lines(evaluated, grid)
    findings: list[Finding] = [each for one in continued or () for each in sampled_corrections(one)]
    curves: dict[str, xr.DataArray] = {}
    for one in read:
        findings += exploration(one) + commitment(one) + corrections(one)
        curves |= answer_curves(one)
    findings += memory(grid) + perception(layers, untrained) + roles(layers) + axes(evaluated, grid)
    store = bank.provenance.store
    projected = store is not None and store.probe.project  # then no channel is one of the transformer
    curves |= layer_curves(layers) | ({} if projected else energy(samples))
    findings.sort(key=lambda finding: ORDER.index(finding.behaviour))
    said = {name: sentences(name, [f for f in findings if f.behaviour == name]) for name in ORDER}
    if continued:
        said[CORRECTION] = said[CORRECTION][0], SAMPLED_CAVEAT
    return Behaviours(
        tuple(findings),
        said,
        xr.Dataset(curves, attrs={"task": grid.provenance.get("task", "")}),
        tuple(group for one in read for group in by_difficulty(one)),
        None if continued is None else tuple(corrected(continued)),
    )


def memory(grid: Grid) -> list[Finding]:
    """Facts that the frame and region they are read from does not show, against inputs of the same frame and
    region."""
    targets = grid.with_role(Role.MEMORY)
    stated = "Hidden states hold facts that the frame which is read does not show"
    if not targets:
        return [nothing(MEMORY, stated, "the task has no target of role memory; task=hide has")]
    found = []
    for name in targets:
        best = grid.best(name)
        at = grid.at(name, best.cell)
        reference, source = float(at.reference), str(at.reference_source.values)
        where = [f"layer {best.cell.layer}", f"step {best.cell.step}"]
        where += [f"frame {best.cell.position}"] if grid.dataset.sizes["position"] > 1 else []
        p = best.p
        measure = f"best cell ({', '.join(where)}): accuracy {best.accuracy:.2f}, {source} {reference:.2f}, p {p:.3f}"
        outcome = UNTESTED if np.isnan(p) else HOLDS if p <= ALPHA and best.lower > reference else UNCLEAR
        measure += NOT_ABOVE if outcome == UNCLEAR and p <= ALPHA else ""
        claim = Claim(
            f"{stated}: {name}", measure, source, best.accuracy - reference, best.lower - reference,
            best.upper - reference, outcome,
        )  # fmt: skip
        sizes = grid.dataset.sel(target=name)
        found.append(Finding(MEMORY, name, claim, int(sizes.n_test), int(sizes.n_test_problems)))
    return found


def sentences(behaviour: str, found: Sequence[Finding]) -> tuple[str, str]:
    """What was found for the main claim, and the strongest caveat."""
    tested = [f for f in found if f.claim.verdict not in (UNTESTED, DESCRIBED)]
    if not tested:
        first = next((f for f in found if f.claim.verdict == DESCRIBED), found[0])
        return f"Nothing could be tested: {first.claim.measure}.", CAVEAT[behaviour]
    main = [f for f in tested if f.claim.claim == tested[0].claim.claim]
    parts = [f"{f.claim.verdict} for {f.about} ({_said(f)}, n = {f.n})" for f in main[:MOST]]
    parts += [f"{len(main) - MOST} more in the table"] if len(main) > MOST else []
    count = sum(f.claim.verdict == HOLDS for f in tested)
    others = (
        f" {count} of {len(tested)} tested claims {'holds' if count == 1 else 'hold'}."
        if len(tested) > len(main)
        else ""
    )
    lead = [f for f in found if f.claim.verdict == DESCRIBED and f.claim.claim == found[0].claim.claim]
    described = "".join(f"{f.claim.claim}, {f.about}: {f.claim.measure}. " for f in lead)
    return f"{described}{main[0].claim.claim}: {'; '.join(parts)}.{others}", CAVEAT[behaviour]


def _said(one: Finding) -> str:
    """The estimate in words: a distance in layers or steps with its direction, other estimates as they are."""
    claim = one.claim
    if not claim.unit:
        return claim.estimate
    turned = claim
    if claim.value < 0:
        decided = HOLDS if claim.verdict == FAILS else claim.verdict
        turned = replace(claim, value=-claim.value, lower=-claim.upper, upper=-claim.lower, verdict=decided)
    distance, answer = turned.estimate.replace("+", ""), one.about.partition(",")[0]
    if one.behaviour == PERCEPTION:
        return f"{claim.control} is decodable {distance} {'before' if turned is claim else 'after'} {answer}"
    return f"{answer} lies {distance} {'deeper' if turned is claim else 'shallower'} than {claim.control}"
