"""Every number against a plain loop, intervals against scipy.stats; claims on outcomes that are planted."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from scipy import stats

from cosprobe.causal.clean import NONE
from cosprobe.causal.edits import Edit
from cosprobe.causal.effects import (
    Agreement,
    Pairing,
    agreement,
    compared,
    rank_correlation,
    save_table,
    summarised,
    upper_bounds,
)
from cosprobe.causal.experiments import CONTROL, PROBE, Condition, Noise, Swap
from cosprobe.causal.interventions import PAIRINGS, upper_without_wins
from cosprobe.causal.report import SWAPS, agreement_figure, agreement_lines, claims, condition_rows, figure
from cosprobe.causal.run import Outcomes
from cosprobe.errors import InputError
from cosprobe.evaluation import (
    FAILS,
    HOLDS,
    UNCLEAR,
    UNTESTED,
    Grid,
    difference_interval,
    max_t_bootstrap,
    mean_interval,
    share_interval,
    verdict,
)
from tests.examples.figures import apart, check_words

STEPS, PROBLEMS = 4, 20
EDIT = (Edit("noise", steps=(1,)),)


def outcomes_of(conditions, seed=0, samples=PROBLEMS, follow=True, **changes) -> Outcomes:
    """Random outcomes: two samples of most problems, other clean answers in runs of other numbers of steps."""
    rng, width = np.random.default_rng(seed), len(conditions)
    clean = {length: rng.integers(NONE, 4, samples) for length in dict.fromkeys(c.steps for c in conditions)}
    labels = {length: np.where(rng.random(samples) < 0.1, NONE, rng.integers(4, size=samples)) for length in clean}
    shape = (samples, width, STEPS)
    found = Outcomes(
        list(conditions), np.array([f"p{i // 2}" for i in range(samples)]),
        np.stack([labels[c.steps] for c in conditions], axis=1), np.stack([clean[c.steps] for c in conditions], axis=1),
        rng.integers(NONE, 4, (samples, width)), rng.random((samples, width)), 33.0,
        rng.random(shape) if follow else np.full(shape, np.nan), rng.random(shape),
        rng.integers(4, size=shape).astype(float), rng.integers(4, size=(samples, STEPS)),
    )  # fmt: skip
    return replace(found, **changes)


SMALL = (
    Condition("fresh", EDIT, 1), Condition("equal damage", EDIT, 1), Condition("fresh", EDIT, 2),
    Condition("fresh", EDIT, 1, steps=9), Condition("equal damage", EDIT, 1, steps=9),
)  # fmt: skip
PAIRS = (Pairing("fresh", "equal damage", "unchanged", -1), Pairing("fresh", "equal damage"), Pairing("fresh", "none"))


@pytest.fixture(scope="module")
def one() -> Outcomes:
    return outcomes_of(SMALL)


@pytest.fixture(scope="module")
def solutions() -> list[tuple[int, ...]]:
    return [(i % 4, 3) for i in range(PROBLEMS)]


@pytest.fixture(scope="module")
def table(one, solutions) -> xr.Dataset:
    return summarised(one, PAIRS, solutions)


def kept_rows(found: Outcomes) -> list[int]:
    return [i for i in range(len(found.keys)) if all(label != NONE for label in found.labels[i])]


def test_shares_are_those_of_a_plain_loop(one, table, solutions):
    rows = kept_rows(one)
    assert table.attrs["n"] == len(rows) < PROBLEMS and table.attrs["left_out"] == PROBLEMS - len(rows)
    assert table.attrs["problems"] == len({one.keys[i] for i in rows})
    assert table.attrs["clean_right"] == np.mean([one.clean[i, 0] in solutions[i] for i in rows])
    assert table.attrs["evaluations"] == 33.0
    for j in range(len(SMALL)):
        answers = [one.answers[i, j] for i in rows]
        loops = {
            "label": [a == one.labels[i, j] for a, i in zip(answers, rows, strict=True)],
            "unchanged": [a == one.clean[i, j] for a, i in zip(answers, rows, strict=True)],
            "none": [a == NONE for a in answers],
            "right": [a in solutions[i] for a, i in zip(answers, rows, strict=True)],
        }
        for name, values in loops.items():
            assert float(table[name][j]) == pytest.approx(np.mean(values)), name
            lower, upper = share_interval(np.array([values], float), one.keys[rows])
            assert [float(table[f"{name}_{end}"][j]) for end in ("lower", "upper")] == pytest.approx(
                [lower[0], upper[0]]
            )
        assert float(table.change[j]) == pytest.approx(np.mean([one.change[i, j] for i in rows]))


def test_answers_are_compared_with_the_clean_run_of_as_many_steps(one, solutions):
    """Samples that repeat the clean run of their number of steps keep every answer, whatever other runs show."""
    kept = replace(one, answers=one.clean)
    assert (one.clean[:, 0] != one.clean[:, 3]).any()
    assert (summarised(kept, PAIRS, solutions).unchanged == 1).all()


def test_curves_are_means_over_samples_at_every_step(one, table, solutions):
    rows = kept_rows(one)
    for j, step in np.ndindex(len(SMALL), STEPS):
        same = [one.probe[i, j, step] == one.clean_probe[i, step] for i in rows]
        expected = {"distance": one.distance[rows, j, step], "cka": one.cka[rows, j, step], "probe": same}
        expected["probe_right"] = [one.probe[i, j, step] in solutions[i] for i in rows]
        for name, values in expected.items():
            assert float(table[name][j, step]) == pytest.approx(np.mean(values))
            lower, upper = mean_interval(np.array([values], float), one.keys[rows])
            assert float(table[f"{name}_lower"][j, step]) == pytest.approx(lower[0])
            assert float(table[f"{name}_upper"][j, step]) == pytest.approx(upper[0])


def test_steps_without_probes_have_no_share_of_equal_readings(one, solutions):
    clean, probe = one.clean_probe.copy(), one.probe.copy()
    clean[:, 2], probe[:, :, 2] = NONE, NONE
    found = summarised(replace(one, clean_probe=clean, probe=probe), PAIRS, solutions)
    assert np.isnan(found.probe[:, 2]).all() and np.isfinite(found.probe[:, [0, 1, 3]]).all()


def test_what_is_not_there_is_no_number(one, solutions):
    change = one.change.copy()
    change[0, 1] = np.nan
    found = summarised(replace(one, change=change, distance=np.full_like(one.distance, np.nan)), PAIRS, solutions)
    assert np.isfinite(found.change.values).tolist() == [True, kept_rows(one)[0] != 0, True, True, True]
    assert "distance" not in found and "probe" not in found


def test_no_sample_with_a_label_is_refused(one, solutions):
    with pytest.raises(InputError, match=r"no sample.*use\.problems"):
        summarised(replace(one, labels=np.full_like(one.labels, NONE)), PAIRS, solutions)


def test_effects_are_paired_by_cell(one, table):
    rows = kept_rows(one)
    value = (one.answers == one.clean)[rows].astype(float), (one.answers == one.labels)[rows].astype(float)
    assert table.compared.values.tolist() == ["fresh"] * 4 and table.control.values.tolist() == ["equal damage"] * 4
    keys = one.keys[rows]
    for number, (kind, sign) in enumerate(((0, -1), (1, 1))):  # pairings, in order; two cells each: steps 0 and 9
        differences = np.stack([sign * (value[kind][:, a] - value[kind][:, b]) for a, b in ((0, 1), (3, 4))])
        part = table.isel(comparison=slice(2 * number, 2 * number + 2))
        np.testing.assert_allclose(part.effect, differences.mean(axis=1))
        np.testing.assert_allclose([part.effect_lower, part.effect_upper], difference_interval(differences, keys))
        np.testing.assert_allclose(part.p, max_t_bootstrap(differences, keys).p)
        np.testing.assert_allclose(part.upper_bound, upper_bounds(differences, keys))
        assert part.at_step.values.tolist() == [1, 1]


def test_several_draws_count_with_their_mean_and_probes_with_the_dose_of_the_controls():
    conditions = [Condition(PROBE, EDIT, 1, 0, dose=d) for d in (0.5, 1.0, 2.0)]
    conditions += [Condition("random direction", EDIT, 1, 0, dose=1.0, draw=i) for i in range(3)]
    values = {"label": np.random.default_rng(0).integers(0, 2, (15, 6)).astype(float)}
    found = compared(conditions, values, np.arange(15), PAIRINGS["steer"])
    expected = values["label"][:, 1] - values["label"][:, 3:].mean(axis=1)
    assert found.effect.values.tolist() == pytest.approx([expected.mean()])
    assert found.at_dose.values.tolist() == [1.0]


def test_tables_are_read_back_as_they_were(table, tmp_path):
    back = xr.load_dataset(save_table(table, tmp_path / "new" / "causal.nc"))
    xr.testing.assert_equal(back, table)
    assert dict(back.attrs) == pytest.approx(table.attrs)


@given(st.integers(1, 8), st.integers(2, 40), st.data())
def test_upper_bounds_are_exact_binomial_ones(cells, count, data):
    wins = np.array(data.draw(st.lists(st.integers(0, count), min_size=cells, max_size=cells)))
    difference = (np.arange(count) < wins[:, None]).astype(float) - (
        np.arange(count)[::-1] < (count - wins[:, None]) // 2
    )
    expected = [
        stats.binomtest(int(won), count, alternative="less").proportion_ci(1 - 0.05 / cells, "exact").high
        for won in np.maximum(difference, 0).sum(axis=1)
    ]
    np.testing.assert_allclose(upper_bounds(difference, np.arange(count)), expected, atol=1e-7)
    if cells == 1 and not (difference > 0).any():
        assert upper_without_wins(count) == pytest.approx(expected[0])


values = st.lists(st.integers(-2, 2), min_size=6, max_size=6)


@given(values, values)
def test_the_rank_correlation_is_that_of_scipy_also_with_ties(fixed, means):
    difference = np.repeat(np.array(means, float)[:, None] / 2, 12, axis=1)
    found = rank_correlation(np.array(fixed, float), difference, np.arange(12), draws=20)
    if len(set(fixed)) < 2 or len(set(means)) < 2:
        assert np.isnan(found).all()
    else:
        assert found[0] == pytest.approx(stats.spearmanr(fixed, means).statistic)
        assert -1 <= found[1] <= found[0] + 1e-9 and found[0] - 1e-9 <= found[2] <= 1


def test_two_cells_have_no_rank_correlation():
    assert np.isnan(rank_correlation(np.array([0.1, 0.2]), np.ones((2, 12)), np.arange(12))).all()


# claims


@pytest.mark.parametrize(
    ("lower", "upper", "expected"),
    [(0.1, 0.3, HOLDS), (-0.3, -0.1, FAILS), (-0.1, 0.1, UNCLEAR), (0.0, 0.1, UNCLEAR), (-0.1, 0.0, UNCLEAR),
     (math.nan, 0.1, UNTESTED), (-math.inf, math.inf, UNTESTED)],
)  # fmt: skip
def test_a_verdict_needs_an_interval_on_one_side_of_zero(lower, upper, expected):
    assert verdict(lower, upper) == expected


def planted_swap(step: int, layer: int) -> Outcomes:
    """The donor's answer follows at one cell, and nowhere else."""
    conditions = Swap((0, 1), (0, 1, 2), 3, 2, True).conditions()
    found = outcomes_of(conditions, follow=False)
    label = np.arange(PROBLEMS) % 3
    clean = np.repeat(label[:, None] + 1, len(conditions), axis=1)
    at = [c.name in ("swap", "two regions") and (c.step, c.layer) == (step, layer) for c in conditions]
    labels = np.repeat(label[:, None], len(conditions), axis=1)
    return replace(found, labels=labels, clean=clean, answers=np.where(at, labels, clean))


def claims_of(found: Outcomes):
    table = summarised(found, PAIRINGS["swap"], [(0,)] * PROBLEMS)
    table.attrs |= {"edit": "swap", "depth": 4}
    return claims(table, found)


def test_a_planted_swap_is_found_where_it_is():
    middle, other = claims_of(planted_swap(0, 1)), claims_of(planted_swap(1, 2))  # layer 1 is the second of 4
    for stated, holds in ((middle, (HOLDS, HOLDS)), (other, (UNCLEAR, HOLDS))):
        assert len(stated) == 5  # the middle layer against three controls, some cell, regions
        for c in stated:
            assert c.verdict == holds[not c.claim.startswith("The state")], c
            assert c.value == (1.0 if c.verdict == HOLDS else 0.0) and c.lower < c.value < c.upper or c.upper == 1.0
    (some,) = (c for c in other if c.claim.startswith("Some"))
    assert "step 1, layer 2, clearest of 6 cells" in some.measure and some.measure.count("minus") == 3


def test_claims_without_regions_or_step_0_cannot_be_tested():
    conditions = Swap((1,), (0,), 3, 2, False).conditions()
    stated = claims_of(outcomes_of(conditions, follow=False))
    assert [c.control for c in stated if c.verdict == UNTESTED] == [
        "same answer", "random state", "wrong step", "wrong regions"
    ]  # fmt: skip


ERASED = ("erased", "control erased", "random directions erased")


def erase_claims(hit: dict[tuple[int, str], int], names=ERASED):
    """Claims where as many of 20 videos lose their answer by a condition at a layer as `hit` says, none elsewhere."""
    conditions = [Condition(name, EDIT, 0, layer) for layer in (1, 3) for name in names]
    kept = np.repeat((np.arange(PROBLEMS) % 3)[:, None], len(conditions), axis=1)
    lost = np.stack([np.arange(PROBLEMS) < hit.get((c.layer, c.name), 0) for c in conditions], axis=1)
    found = outcomes_of(conditions, follow=False)
    found = replace(
        found, keys=np.arange(PROBLEMS).astype(str), labels=kept, clean=kept, answers=np.where(lost, NONE, kept)
    )
    table = summarised(found, PAIRINGS["erase"], [(0,)] * PROBLEMS)
    table.attrs["edit"] = "erase"
    return claims(table, found)


@pytest.mark.parametrize(
    ("hit", "expected", "value", "layer"),
    [
        ({(1, "erased"): 18}, HOLDS, 0.9, 1),
        ({(1, "erased"): 18, (1, "control erased"): 4, (1, "random directions erased"): 2}, HOLDS, 0.7, 1),
        ({(1, "erased"): 18, (1, "random directions erased"): 18}, UNCLEAR, 0.0, 1),  # random does as much damage
        ({(1, "erased"): 18, (1, "control erased"): 18}, UNCLEAR, 0.0, 1),
        # layer 1 beats the control only, layer 3 random directions only: no cell beats both
        ({(n, name): 18 for n in (1, 3) for name in ("erased", ERASED[3 - (n + 1) // 2])}, UNCLEAR, 0.0, 1),
        # layer 1 is clearer against one control, layer 3 beats both
        ({(1, "erased"): 20, (1, "random directions erased"): 20, (3, "erased"): 15}, HOLDS, 0.75, 3),
    ],
)
def test_erasing_has_to_change_more_than_both_controls_in_the_same_cell(hit, expected, value, layer):
    (stated,) = erase_claims(hit)
    assert stated.verdict == expected and stated.value == pytest.approx(value)
    assert (stated.lower > 0) == (expected == HOLDS)
    assert stated.control == "each of: random directions erased, control erased"
    each = {name: hit.get((layer, "erased"), 0) - hit.get((layer, name), 0) for name in ERASED[1:]}
    for name, more in each.items():  # both estimates, of the same cell
        assert f"minus {name}: {more / PROBLEMS:+.2f} [" in stated.measure
    assert f"layer {layer}, clearest of 2 cells" in stated.measure


def test_without_a_control_target_erasing_is_compared_with_random_directions():
    (stated,) = erase_claims({(1, "erased"): 18}, ("erased", "random directions erased"))
    assert stated.control == "random directions erased" and stated.verdict == HOLDS
    (stated,) = erase_claims({(1, "erased"): 18}, ("erased",))
    assert stated.verdict == UNTESTED and not stated.estimate


def test_noise_that_hurts_early_and_fades_is_said_to():
    """Hits at early steps change answers and stay visible, hits of frames do neither."""
    conditions = Noise((0, 1, 2, 3), STEPS, range(2), 1.0, 2, (4, 8)).conditions()
    found = outcomes_of(conditions)
    labels = np.repeat((np.arange(PROBLEMS) % 4)[:, None], len(conditions), axis=1)
    early = np.array([c.frame == NONE and c.step / (c.steps or STEPS) < 0.6 for c in conditions])
    cka = np.zeros_like(found.cka)
    for i, c in enumerate(conditions):
        if c.frame == NONE and not c.steps:
            cka[:, i, max(c.step, 0) :] = {0: 0.6, 1: 0.8, 2: 0.9, 3: 0.1}[c.step]
    cka += 1e-3 * np.random.default_rng(0).random(cka.shape)
    found = replace(found, labels=labels, clean=labels, answers=np.where(early, 5, labels), cka=cka)
    table = summarised(found, PAIRINGS["noise"], [(0,)] * PROBLEMS)
    table.attrs["edit"] = "noise"
    stated = {(c.claim.split()[0], c.control): c for c in claims(table, found)}
    assert stated["Noise", "fresh"].verdict == HOLDS and stated["Noise", "fresh"].value == pytest.approx(0.75)
    assert stated["Early", "fresh"].verdict == HOLDS and stated["Early", "fresh"].value == pytest.approx(0.5, abs=0.01)
    assert stated["Sensitivity", "fresh"].value == pytest.approx(0.25, abs=0.01)  # (0.8 + 0.9) / 2 - 0.6
    assert stated["Sensitivity", "fresh"].verdict == HOLDS
    last = stated["An", "2 evaluations left"]
    assert last.value == 1.0 and last.verdict == HOLDS and re_numbers(last.measure) == ["0.75", "0.50"]


def re_numbers(text: str) -> list[str]:
    return [word for word in text.split() if word.replace(".", "").isdigit()]


def test_random_directions_are_one_row_of_the_page():
    conditions = [Condition(PROBE, EDIT, 1, 0, dose=d) for d in (0.5, 1.0)]
    conditions += [Condition("random direction", EDIT, s, 0, dose=1.0, draw=i) for s in (1, 2) for i in range(3)]
    table = summarised(outcomes_of(conditions, follow=False), PAIRINGS["steer"], [(0,)] * PROBLEMS)
    table.attrs["edit"] = "steer"
    _, *rows = condition_rows(table)
    assert [row[0] for row in rows] == [PROBE, PROBE, *["random direction, mean of 3"] * 2]
    assert [row[1] for row in rows] == ["step 1, layer 0"] * 3 + ["step 2, layer 0"]
    assert [row[2] for row in rows] == ["0.5", "1", "1", "1"]
    assert (
        rows[3][3] == f"{float(table.label[5:].mean()):.2f}"
        and rows[3][4] == f"{float(table.unchanged[5:].mean()):.2f}"
    )


# decodable and used


def grid_of(skill: np.ndarray, p: np.ndarray) -> Grid:
    """A grid of one target with steps 0 and 1 and layers 0 to 2; a chance of 0.25."""
    plane = ("target", "step", "layer")
    data = {"accuracy": 0.25 + skill, "chance": np.full((2, 3), 0.25), "p_evidence": p, "lower": skill, "upper": skill}
    data["validation_accuracy"] = data["accuracy"]
    return Grid(xr.Dataset(
        {name: (plane, value[None]) for name, value in data.items()},
        coords={"target": ["answer"], "step": [0, 1], "layer": [0, 1, 2], "branch": "cond", "position": "all"},
    ))  # fmt: skip


def test_cells_are_sorted_by_decodable_and_used():
    """Used at (1, 2), where no probe has evidence; decodable at (0, 0) and (1, 1), where no swap acts."""
    skill = np.array([[0.5, 0.0, 0.1], [0.2, 0.6, 0.05]])
    p = np.array([[0.01, 0.5, 0.9], [np.nan, 0.04, 0.3]])
    conditions = Swap((0, 1), (0, 1, 2), 3, 2, False).conditions()
    big = 200
    found = outcomes_of(conditions, follow=False, samples=big)
    labels = np.zeros((big, len(conditions)), int)
    hit = [c.name == "swap" and (c.step, c.layer) == (1, 2) for c in conditions]
    found = replace(found, labels=labels, clean=labels + 1, answers=np.where(hit, labels, 1))
    found.answers[0, 0] = 0  # one win elsewhere
    said = agreement(found, grid_of(skill, p), "answer", 0.1)
    assert said.cells == [(s, n) for s in (0, 1) for n in range(3)]
    assert said.not_used == [(0, 0), (1, 1)] and said.not_decodable == [(1, 2)]
    np.testing.assert_allclose(said.skill, skill.ravel())
    assert said.effect.tolist() == [0.005, 0, 0, 0, 0, 1]
    assert said.correlation[0] == pytest.approx(stats.spearmanr(skill.ravel(), said.effect).statistic)
    strict = agreement(found, grid_of(skill, p), "answer", 0.01)
    assert strict.not_used == []
    assert agreement(outcomes_of(SMALL), grid_of(skill, p), "answer", 0.1) is None
    text = "\n".join(agreement_lines(said))
    assert "step 0 layer 0, step 1 layer 1" in text and "step 1 layer 2" in text
    undefined = replace(said, correlation=(np.nan,) * 3)
    assert isinstance(undefined, Agreement) and "not defined" in agreement_lines(undefined)[0]


def test_panels_of_a_swap_show_the_same_cells_and_leave_none_out():
    conditions = Swap((0, 2), (1, 3), 4, 2, True, whole=True).conditions()
    table = summarised(outcomes_of(conditions, follow=False), PAIRINGS["swap"], [(0,)] * PROBLEMS)
    table.attrs["edit"] = "swap"
    panels = [axes for axes in figure(table).axes if axes.images]
    last = panels[-1].get_xticklabels()
    assert [label.get_text() for label in last] == ["0", "2", "all"] and panels[
        -1
    ].get_xlabel() == "step that is changed"
    named = {SWAPS[name]: name for name in dict.fromkeys(table.name.values.tolist())}
    assert [axes.get_title(loc="left") for axes in panels] == list(named)
    for axes in panels:
        assert axes.images[0].get_array().shape == (2, 3) and axes.get_xlim() == (-0.5, 2.5)
        written = [text.get_text() for text in axes.texts]
        assert len(written) == int((table.name.values == named[axes.get_title(loc="left")]).sum())


def drawn(edit: str, conditions) -> Figure:
    table = summarised(outcomes_of(conditions, follow=edit == "noise"), PAIRINGS[edit], [(0,)] * PROBLEMS)
    table.attrs |= {"edit": edit, "total_steps": STEPS}
    return figure(table)


@pytest.mark.slow
@pytest.mark.parametrize("edit", ["noise", "swap", "steer", "erase", "ablate"])
def test_figures_are_legible_and_all_steps_come_last(edit):
    steps, layers = (0, 2), (1, 3)
    cells = [(s, n) for n in layers for s in (*steps, NONE)]  # in another order than they are shown in
    conditions = {
        "noise": lambda: Noise(steps, STEPS, range(2), 1.0, 2, (4, 8)).conditions(),
        "swap": lambda: Swap(steps, layers, 4, 2, True, whole=True).conditions(),
        "steer": lambda: [
            *(Condition(PROBE, EDIT, s, 1, dose=d) for s in (*steps, NONE) for d in (0.5, 1.0)),
            *(Condition("random direction", EDIT, s, 1, dose=1.0, draw=i) for s in (*steps, NONE) for i in range(2)),
            *(Condition(CONTROL, EDIT, s, 1, dose=1.0) for s in (*steps, NONE)),
        ],
        "erase": lambda: [Condition(name, EDIT, s, n) for s, n in cells for name in ("erased", "control erased")],
        "ablate": lambda: [Condition(name, EDIT, s, n) for s, n in cells for name in ("zero", "mean", "resample")],
    }[edit]()
    shown = drawn(edit, conditions)
    words = check_words(shown)
    assert apart([box for text, box in words.items() if text.get_text() in {a.get_title("left") for a in shown.axes}])
    assert not any(axes.get_legend() for axes in shown.axes)  # none over the data
    if edit in ("erase", "ablate"):
        assert [tick.get_text() for tick in shown.axes[0].get_yticklabels()] == [
            *(f"step {s}, layer {n}" for s in steps for n in layers), "all steps, layer 1", "all steps, layer 3",
        ]  # fmt: skip
    if edit == "steer":
        assert [axes.get_title("left").split(",")[0] for axes in shown.axes] == ["step 0", "step 2", "all steps"]


def test_controls_of_steering_are_not_hidden_behind_the_probe():
    """Shares are all zero, so that every mark would lie on the same point."""
    conditions = [Condition(PROBE, EDIT, 0, 1, dose=d) for d in (0.5, 1.0)]
    conditions += [Condition("random direction", EDIT, 0, 1, dose=1.0, draw=i) for i in range(2)]
    conditions += [Condition(CONTROL, EDIT, 0, 1, dose=1.0)]
    (axes,) = drawn("steer", conditions).axes
    lines = {str(line.get_label()).partition(" (")[0]: line for line in axes.lines}
    random, control = lines["random directions"], lines["probe of random labels"]
    assert set(random.get_xdata()) == {0.88} and set(control.get_xdata()) == {1.12}
    assert all(line.get_visible() and line.get_zorder() > 3 for line in (random, control))


def test_cells_with_the_same_values_share_one_number_in_the_figure_of_agreement():
    cells = [(s, n) for s in (0, 1) for n in (1, 3)]
    effect = np.array([0.1, 0.4, 0.2, 0.2])
    skill, ends = np.array([0.0, 0.5, 0.6, 0.6]), (effect - 0.1, effect + 0.1)
    found = Agreement(cells, skill, effect, *ends, (0.5, 0.1, 0.8), [], [], 0.1)
    shown = agreement_figure(found)
    check_words(shown)
    assert sorted(text.get_text() for text in shown.axes[0].texts) == ["1", "1, 3", "3"]
    (legend,) = shown.legends
    assert [text.get_text() for text in legend.get_texts()] == ["margin, 0.1", "step 0", "step 1"]


def test_only_outliers_are_named_and_no_names_overlap(rng):
    cells = [(s, n) for s in range(3) for n in range(20)]
    skill, effect = 0.5 + 0.01 * rng.normal(size=60), 0.01 * rng.normal(size=60)
    skill[[7, 30]], effect[[7, 30]] = [0.0, 0.9], [0.5, 0.8]
    shown = agreement_figure(
        Agreement(cells, skill, effect, effect - 0.05, effect + 0.05, (0.5, 0.1, 0.8), [], [], 0.1)
    )
    check_words(shown)
    texts = shown.axes[0].texts
    assert {"7", "10"} <= {text.get_text() for text in texts} and len(texts) <= 6
    assert apart([text.get_window_extent() for text in texts])
