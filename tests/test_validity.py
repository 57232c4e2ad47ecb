"""A small part of `python -m validity`: what is used keeps its promises there, and what is simpler does not."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from cosprobe.evaluation import Clearest
from validity import (
    __main__,
    between_runs,
    centres,
    claims,
    cross_fitting,
    differences,
    effects,
    ensembles,
    guessing,
    inputs,
    lengths,
    onsets,
    shares,
    stopping,
)
from validity.rows import Row, alarms, coverage, luck, page, worst


def of(rows: list[Row], promised: bool) -> list[Row]:
    return [row for row in rows if bool(row.promised) == promised]


def kept(rows: list[Row]) -> bool:
    return all(row.holds for row in of(rows, True))


@pytest.mark.slow
@pytest.mark.parametrize("module", [shares, differences])
def test_intervals_cover_and_simpler_ones_do_not(module, monkeypatch):
    monkeypatch.setattr(shares, "PROBLEMS", (12, 60))
    rows = module.simulate(2000, 1)
    assert kept(rows) and len(of(rows, True)) == 2 * len(shares.LAYOUTS)
    assert max(row.observed for row in of(rows, False)) < 0.93
    assert all(0 < row.width < 1.5 and row.runs == 2000 for row in rows)


@pytest.mark.slow
def test_cross_fitted_maps_cover_and_rarely_show_what_is_not_there():
    rows = cross_fitting.simulate(6, 1, (cross_fitting.World(24, 2),))
    assert kept(rows) and [row.promised for row in rows] == ["at least 0.94", "at least 0.94", "at most 0.05"]
    assert all(row.observed > 0.8 and 0.2 < row.width < 0.6 for row in rows[:2])
    planted = cross_fitting.World(48, 2, 4.0)
    assert cross_fitting._run(planted, np.random.default_rng(0))["evident"][0] == cross_fitting.LAYERS


@pytest.mark.slow
def test_centres_over_layers_and_rank_correlations_are_covered():
    rows = centres.simulate(200, 1, (90,))
    assert kept(rows) and len(rows) == len(centres.CURVES) + len(centres.CORRELATIONS)
    assert all(row.observed > 0.9 and row.width < 4 for row in rows)


@pytest.mark.slow
def test_differences_between_runs_are_covered_and_rarely_found_where_there_are_none():
    rows = between_runs.simulate(500, 1, (30,))
    assert kept(rows) and len(rows) == 2
    assert rows[0].observed > 0.94 and 0.2 < rows[0].width < 0.6


@pytest.mark.slow
def test_claims_about_the_clearest_of_several_are_seldom_false(monkeypatch):
    rows = claims.simulate(100, 1, (32,))
    assert kept(rows) and len(rows) == 2 * len(claims.WORLDS) + 3
    monkeypatch.setattr(claims, "clearest", largest)
    shares = [row.observed for row in claims.simulate(100, 1, (32,)) if "bounds" in row.subject]
    assert min(shares) < 0.93  # the rows can tell


def largest(difference: np.ndarray, keys: np.ndarray) -> Clearest:
    """The largest difference with the bound of a single one."""
    at = int(difference.mean(axis=1).argmax())
    mean, error = difference[at].mean(), difference[at].std() / math.sqrt(difference.shape[1])
    return Clearest(at, mean, mean - 1.64 * error, mean + 1.64 * error, 0.0)


@pytest.mark.slow
def test_differences_of_lags_are_covered():
    rows = onsets.simulate_differences(40, 1, (38,))
    assert kept(rows) and len(rows) == len(onsets.DIFFERENCES) + 1
    assert all(row.observed > 0.85 and 1 < row.width < 20 for row in rows if "differences" in row.subject)


@pytest.mark.slow
def test_grids_that_know_nothing_rarely_show_a_cell(monkeypatch):
    monkeypatch.setattr(guessing, "SETTINGS", guessing.SETTINGS[3:6])
    rows = guessing.simulate(150, 1)
    assert kept(rows) and max(row.observed for row in rows) > 0
    monkeypatch.setattr(guessing, "LEVEL", 0.5)
    assert not any(row.holds for row in guessing.simulate(60, 1))  # the rows can tell


@pytest.mark.slow
def test_picking_the_strongest_input_makes_false_maps_and_asking_all_inputs_does_not(monkeypatch):
    monkeypatch.setattr(inputs, "WORLDS", inputs.WORLDS[1:2])
    found, picked = inputs.simulate(60, 1, (180,))
    assert found.holds and found.observed <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 60)
    assert picked.observed >= 0.2 and not picked.holds


def test_every_cell_better_than_its_inputs_is_called():
    """The rule is no wall: cells that are right on 95 of 100 where inputs are on 50."""
    rng = np.random.default_rng(0)
    read, cells = inputs._right(inputs.World("", 0.5, (0.0,) * 6), 90, rng)
    better = np.maximum(cells, rng.random(cells.shape) < 0.9)
    pairs = (better[:, :, None] - read[:, None]).reshape(-1, 6, 90)
    assert (inputs.weakest_pair(pairs, np.arange(90), 199, 0).p <= 0.05).mean() > 0.9


def test_onsets_are_compared_with_the_curve_they_come_from(monkeypatch):
    crossing = [float(np.interp(0.5, (onsets.curve(5.3, c) - 0.25) / (c - 0.25), onsets.STEPS)) for c in (0.5, 0.9)]
    assert crossing == pytest.approx([5.3, 5.3], abs=0.05)
    rows = onsets.simulate(20, 1, (60,))
    assert len(rows) == 6 and all(row.observed > 0.6 for row in rows)
    assert all(row.width > 0.5 for row in rows)
    monkeypatch.setattr(onsets, "_right", lambda curves, problems, rng: np.repeat(curves[:, :, None], problems, axis=2))
    assert all(
        row.width < 1e-9 for row in onsets.simulate(2, 1, (60,))
    )  # without noise there is nothing to be unsure of


@pytest.mark.slow
def test_early_answers_keep_the_promise_and_their_intervals(monkeypatch):
    monkeypatch.setattr(stopping, "HONESTY", (1.0,))
    monkeypatch.setattr(stopping, "MANY", 20_000)
    assert kept(stopping.simulate(100, 1))
    monkeypatch.setattr(stopping, "fixed_sequence", lambda p, delta, start: np.full(len(p), p.shape[1] - 1))
    rows = stopping.simulate(20, 1)  # stopping at once instead: the risk is exceeded, its interval still covers
    assert [row.observed for row in rows if "asked for" in row.subject] == [1.0, 1.0]
    assert all(row.holds for row in rows if "fresh" in row.subject)


def test_ensembles_keep_their_promises(monkeypatch):
    monkeypatch.setattr(ensembles, "PROBLEMS", (60,))
    rows = ensembles.simulate(150, 1)
    assert kept(rows) and len(rows) == 6
    monkeypatch.setattr(ensembles, "share_interval", lambda one, keys: (one.mean(1) - 0.01, one.mean(1) + 0.01))
    assert not ensembles.simulate(150, 1)[0].holds


def test_effects_are_bounded_and_so_is_their_correlation_with_skill(monkeypatch):
    monkeypatch.setattr(effects, "PROBLEMS", (24,))
    monkeypatch.setattr(effects, "CELLS", (9,))
    rows = effects.simulate(150, 1)
    assert kept(rows) and len(rows) == 6 + len(effects.WORLDS)
    assert all(0 < row.width < 2 for row in rows)
    monkeypatch.setattr(effects, "upper_bounds", lambda wins, keys: wins.mean(axis=1) + 0.05)
    monkeypatch.setattr(effects, "rank_correlation", lambda *_: (0.0, -0.1, 0.1))
    assert [row.holds for row in effects.simulate(150, 1)].count(False) > 5  # the rows can tell


def test_code_lengths_are_covered(monkeypatch):
    monkeypatch.setattr(lengths, "PROBLEMS", (60,))
    rows = lengths.simulate(1500, 1)
    assert kept(rows)
    assert not next(row for row in of(rows, False) if "larger" in row.setting).holds


def test_samples_of_a_problem_agree_as_often_as_asked():
    drawn = luck(4000, np.array([2, 1, 2]), 0.3, np.random.default_rng(0)) < 0.4
    assert drawn.mean() == pytest.approx(0.4, abs=0.01)
    together = np.corrcoef(drawn.T)
    assert together[0, 1] == pytest.approx(0.3, abs=0.04) and together[3, 4] == pytest.approx(0.3, abs=0.04)
    assert abs(together[1, 2]) < 0.04 and abs(together[0, 3]) < 0.04


def test_a_row_misses_its_promise_by_more_than_three_errors():
    none, few = np.zeros(1000, dtype=bool), np.arange(1000) < 71
    assert alarms("a", "b", none).holds and alarms("a", "b", few).holds
    assert not alarms("a", "b", np.arange(1000) < 90).holds
    assert coverage("a", "b", ~few, np.ones(1000)).holds
    assert not coverage("a", "b", np.arange(1000) < 900, np.ones(1000)).holds
    assert alarms("a", "b", none).error > 0


def test_the_page_lists_every_row_and_counts_what_is_kept():
    hits, widths = np.arange(400) < 390, np.full(400, 0.25)
    bad = coverage("shares", "n 12", np.arange(400) < 200, widths)
    rows = [
        coverage("shares", "n 60", hits, widths),
        bad,
        alarms("maps", "null", ~hits),
        alarms("old", "x", hits, False),
    ]
    text = page(rows)
    assert re.search(r"\b2 of 3\b", text) and "## Shares" in text and "## Maps" in text
    assert "| at least 0.94 | n 60 | 0.9750 ± 0.0082 | 400 | 0.250 | yes |" in text
    assert "| at least 0.94 | n 12 | 0.5000 ± 0.0250 | 400 | 0.250 | **no** |" in text
    assert text.index("## Not used") < text.index("| old | x |")
    lowest = worst(rows[:2], "both")
    assert lowest.setting == "both; worst of 2: n 12" and not lowest.holds


def test_the_command_writes_the_page_and_says_how_far_it_is(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        __main__, "SIMULATIONS", {"lengths": (lambda runs, seed: [alarms("a", "b", np.zeros(9) > 0)], 9)}
    )
    assert __main__.main([str(tmp_path / "page.md")]) == 0
    assert re.search(r"lengths.*\b1 rows.*\b9 runs.*\b0\b", capsys.readouterr().out)
    assert re.search(r"\b1 of 1\b", (tmp_path / "page.md").read_text())
    assert __main__.main([]) == 2
    assert re.search(r"\b0 arguments\b.*\bpage\b", capsys.readouterr().err)
