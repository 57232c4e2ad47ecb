"""The clearest of several differences, with bounds for all of them."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

from cosprobe.evaluation import (
    FAILS,
    HOLDS,
    UNCLEAR,
    UNTESTED,
    Claim,
    clearest,
    clearest_either_way,
    difference_interval,
)
from cosprobe.evaluation.significance import max_t_bootstrap

COUNT = 40
KEYS = np.arange(COUNT)


def drawn(*gains: float, seed: int = 0) -> np.ndarray:
    """Rows of wins, ties and losses with these means."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.choice([1.0, 0.0, -1.0], COUNT, p=[0.3 + g / 2, 0.4, 0.3 - g / 2]) for g in gains])


def test_the_clearest_row_has_the_bounds_of_all_rows():
    rows = drawn(0.0, 0.5, 0.2)
    found, tested = clearest(rows, KEYS), max_t_bootstrap(rows, KEYS)
    assert found.at == 1 and found.value == rows[1].mean() and found.p == tested.p.min() == tested.p[1]
    lower, upper = (float(end[1]) for end in difference_interval(rows, KEYS))
    assert found.lower == min(lower, tested.lower[1]) and found.upper == upper and found.above
    alone = clearest(rows[1:2], KEYS)
    assert alone.lower >= found.lower and alone.p <= found.p


def test_rows_without_differences_are_not_above():
    found = clearest(np.zeros((3, COUNT)), KEYS)
    assert (found.at, found.value, found.p, found.above) == (0, 0, 1, False) and found.lower < 0 < found.upper
    assert clearest_either_way(np.zeros((3, COUNT)), KEYS)[1] == UNCLEAR


@pytest.mark.parametrize(
    ("gains", "verdict", "at"),
    [((0.0, 0.55), HOLDS, 1), ((-0.55, 0.0), FAILS, 0), ((-0.55, 0.55), HOLDS, 1), ((0.0, 0.02), UNCLEAR, None)],
)
def test_a_claim_fails_where_the_opposite_is_clear(gains, verdict, at):
    rows = drawn(*gains)
    found, outcome = clearest_either_way(rows, KEYS)
    assert outcome == verdict and at in (None, found.at)
    assert found.lower < found.value < found.upper and found.value == rows[found.at].mean()
    assert (found.upper < 0) == (verdict == FAILS) and (found.lower > 0) == (verdict == HOLDS)


def test_few_problems_give_no_verdict():
    rows = np.ones((1, 24))
    assert clearest_either_way(rows, np.arange(24) // 2)[1] == HOLDS
    assert clearest_either_way(rows, np.arange(24) // 3)[1] == UNTESTED


@pytest.mark.parametrize(
    ("ends", "outcome", "shown"),
    [
        ((0.004, 0.59), HOLDS, "+0.29 [+0.004, +0.59]"),
        ((0.00041, 0.59), HOLDS, "+0.29 [+0.0004, +0.59]"),
        ((0.006, 0.59), HOLDS, "+0.29 [+0.01, +0.59]"),
        ((0.004, 0.59), UNCLEAR, "+0.29 [+0.00, +0.59]"),
        ((-0.06, -0.003), FAILS, "+0.29 [-0.06, -0.003]"),
        ((-0.06, -0.003), UNCLEAR, "+0.29 [-0.06, -0.00]"),
    ],
)
def test_the_end_that_decides_is_not_shown_as_zero(ends, outcome, shown):
    assert Claim("", "", "", 0.29, *ends, outcome).estimate == shown


def test_claims_are_read_with_and_without_a_unit():
    of_layers = Claim("a", "b", "c", 4.0, 3.5, 4.5, HOLDS, "layers")
    assert Claim.of(asdict(of_layers)) == of_layers and of_layers.estimate == "+4.00 [+3.50, +4.50] layers"
    saved = {name: value for name, value in asdict(of_layers).items() if name != "unit"}
    assert Claim.of(saved) == replace(of_layers, unit="")
    with pytest.raises(KeyError, match="verdict"):
        Claim.of({name: value for name, value in saved.items() if name != "verdict"})
