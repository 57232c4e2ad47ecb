"""A small part of `make support`: what has to hold for every family of video pipelines."""

from __future__ import annotations

import pytest

from tests.conformity.checks import CHECKS, Case

# the ways in which families differ most: guidance, layout, image condition, scheduler, experts
FEW = {
    "wan22_t2v": True,  # two experts, two named calls
    "ltx_i2v": True,  # packed, doubled, one frame less in the scheduler
    "cogvideox15_i2v": True,  # frames before channels, padding, DPM
    "hunyuan_i2v_replace": False,  # guidance is an input, calls have no names
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "guided"), FEW.items())
def test_a_family_conforms(name, guided):
    case = Case(name, guided)
    for check in CHECKS.values():
        check(case)
