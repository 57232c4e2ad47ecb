"""Behaviours that were planted are found, and nothing is found in noise."""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib import rc_context
from scipy import stats

from cosprobe.activations import ProbeSamples
from cosprobe.activations.collection import NOT_DECODED
from cosprobe.behaviour import measure, write_behaviours
from cosprobe.behaviour.along_steps import (
    answer_curves,
    by_difficulty,
    commitment,
    corrections,
    exploration,
    live_candidates,
    rank_correlation,
)
from cosprobe.behaviour.answers import NONE, Answers, answers, settled, several_drawn
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
    Finding,
)
from cosprobe.behaviour.measure import sentences
from cosprobe.behaviour.over_layers import centre_difference, effective_rank, explained, layer_lines, perception
from cosprobe.behaviour.report import figure, page
from cosprobe.cells import Cell
from cosprobe.config import ProbeConfig, TrainerConfig
from cosprobe.evaluation import FAILS, HOLDS, UNCLEAR, UNTESTED, Claim, build_grid, evaluate, share_interval
from cosprobe.evaluation.checks import WeightsLine
from cosprobe.probes import fit
from cosprobe.reporting import STYLE
from cosprobe.tasks import Target
from tests.examples.figures import apart, check_words

REGIONS, CHANNELS, STEPS, LAYERS = 4, 8, 3, 5
ANSWER = Target("answer", REGIONS, "candidate", "answer", ("one",))
COLOUR = Target("colour", REGIONS, "candidate", "perception", ("one",))
SPLITS = {"train": 120, "validation": 60, "test": 80}
DEPTH = 3  # the layer from which on the answer is planted at the first step; later it is everywhere
CELLS = tuple(Cell(step, layer, "cond", "all") for step in range(STEPS) for layer in range(LAYERS))


def planted(seed: int = 0, strength: float = 4.0) -> ProbeSamples:
    """The colour is in every cell. The answer is in layers from DEPTH on at step 0, and everywhere at later steps. At
    step 0, x0-hat draws two candidates in a third of the samples; finished videos draw the answer."""
    rng = np.random.default_rng(seed)
    count = sum(SPLITS.values())
    answer, colour = rng.integers(0, REGIONS, (2, count))
    x = rng.normal(size=(count, len(CELLS), REGIONS, CHANNELS))
    rows = np.arange(count)
    for i, cell in enumerate(CELLS):
        x[rows, i, colour, 0] += strength
        if cell.step > 0 or cell.layer >= DEPTH:
            x[rows, i, answer, 1] += strength
    final = rng.normal(-1, 0.05, (count, REGIONS))
    final[rows, answer] += 2
    scores = np.repeat(final[:, None], STEPS, axis=1) + rng.normal(0, 0.02, (count, STEPS, REGIONS))
    scores[:, 1] = np.nan  # not decoded
    both = rows[rows % 3 == 0]
    scores[both, 0, (answer[both] + 1) % REGIONS] += 1.8
    shown = np.repeat(answer[:, None], STEPS, axis=1)
    shown[both, 0], shown[:, 1] = NONE, NOT_DECODED
    return ProbeSamples(
        features=torch.from_numpy(x).float(),
        cells=CELLS,
        targets=(ANSWER, COLOUR),
        labels={"answer": torch.from_numpy(answer), "colour": torch.from_numpy(colour)},
        split=np.repeat(list(SPLITS), list(SPLITS.values())),
        keys=np.array([f"problem {i}" for i in range(count)]),
        kinds=np.full(count, "one"),
        scores={"x0_scores": scores, "x0_answer": shown, "final": final},
        model_answer=answer,
        replica=np.zeros(count, int),
        difficulty={"length": rng.integers(0, 3, count)},
    )


def through(samples: ProbeSamples, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bank = fit(samples, ProbeConfig(kind="ridge", penalties=[0.1]), TrainerConfig(precision="32-true"), folder, 0)
    evaluated = evaluate(samples, ("transformer",) * STEPS, bank, {})
    return evaluated, bank, build_grid(evaluated, 500, 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    samples = planted()
    return samples, *through(samples, tmp_path_factory.mktemp("fit"))


@pytest.fixture(scope="module")
def found(made):
    return measure(*made)


def of(found, behaviour):
    return [finding for finding in found.findings if finding.behaviour == behaviour]


def some(count=60, rows=4, seed=0) -> Answers:
    """Answers without any pattern, of problems with two samples each."""
    rng = np.random.default_rng(seed)
    proba = rng.dirichlet(np.ones(REGIONS), (count, rows))
    return Answers(
        "one", "answer", tuple(Cell(s, 0, "cond", "all") for s in range(rows)), proba, tuple(range(rows - 1)),
        rng.random((count, rows, REGIONS)) * 0.4, rng.integers(NONE, REGIONS, (count, rows)), rows - 1,
        rng.integers(0, REGIONS, count), np.arange(count) // 2,
        {"length": rng.integers(0, 4, count)},
    )  # fmt: skip


# planted


def test_two_candidates_in_a_third_of_the_samples_are_counted(found):
    drawn, blended, sure = of(found, EXPLORATION)
    assert sure.claim.verdict == DESCRIBED and "effective number" in sure.claim.measure
    assert drawn.claim.verdict == HOLDS and drawn.claim.value == pytest.approx(1 / 3, abs=0.02)
    assert drawn.claim.lower < drawn.claim.value < drawn.claim.upper and drawn.n == drawn.problems == SPLITS["test"]
    assert blended.claim.verdict == UNCLEAR and blended.claim.value == pytest.approx(0, abs=0.02)
    assert "0.3" in drawn.claim.measure and "0.00 in the finished video" in drawn.claim.measure


def test_layers_are_ordered_as_planted(found):
    over_layers, over_steps = of(found, PERCEPTION)
    assert over_layers.claim.verdict == HOLDS and over_layers.claim.value == pytest.approx(DEPTH - 0.5, abs=0.3)
    assert over_steps.claim.verdict == UNTESTED  # both are there at the first step
    deeper, earlier = of(found, ROLES)
    assert deeper.claim.verdict == HOLDS and deeper.claim.value == pytest.approx(3.5 - 2, abs=0.3)
    assert earlier.claim.verdict == HOLDS and earlier.claim.value == pytest.approx(3.5 - 2, abs=0.3)


def test_what_the_run_cannot_show_says_why(found):
    assert [f.claim.verdict for f in (*of(found, MEMORY), *of(found, AXES))] == [UNTESTED, UNTESTED]
    assert "task=hide" in of(found, MEMORY)[0].claim.measure and "probe=frames" in of(found, AXES)[0].claim.measure
    assert tuple(found.sentences) == ORDER and all(len(said) == 2 for said in found.sentences.values())


def test_the_scale_of_what_is_drawn_is_that_of_finished_videos(made):
    samples, _, bank, grid = made
    (one,) = answers(samples, bank, grid)
    assert one.decoded == (0,)  # the last step is the finished video
    assert one.drawn.shape == (SPLITS["test"], 2, REGIONS)
    picked = one.drawn[np.arange(len(one)), -1, one.right]
    assert np.median(picked) == pytest.approx(1, abs=0.05) and np.median(one.drawn[:, -1]) == pytest.approx(0, abs=0.05)
    assert [cell.step for cell in one.cells] == list(range(STEPS)) == list(one.steps)


def test_scores_that_do_not_tell_drawn_candidates_apart_are_not_used(made):
    samples, _, bank, grid = made
    rng = np.random.default_rng(5)
    scores = samples.scores | {"final": rng.uniform(0.4, 0.6, samples.scores["final"].shape)}
    (one,) = answers(replace(samples, scores=scores), bank, grid)
    assert one.drawn is None and one.shown.shape == (SPLITS["test"], 2)
    assert [f.claim.verdict for f in exploration(one)] == [UNTESTED]


def test_cells_are_chosen_on_validation(made):
    samples, _, bank, grid = made
    for cell in answers(samples, bank, grid)[0].cells:
        plane = grid.plane("answer").validation_accuracy.sel(step=cell.step)
        assert float(plane.sel(layer=cell.layer)) == float(plane.max())
        assert cell.layer == int(plane.layer[plane.values == plane.values.max()].min())  # the lowest of equals


def test_test_samples_alone_are_measured(made, found):
    """Other labels and scores of train change the probes, but not what a given bank and grid say."""
    samples, evaluated, bank, grid = made
    scores = {name: values.copy() for name, values in samples.scores.items()}
    scores["x0_scores"][samples.split == "train"] = 5.0
    again = measure(replace(samples, scores=scores), evaluated, bank, grid)
    assert again.findings == found.findings


def test_a_gain_along_frames_is_told_from_one_along_steps(tmp_path):
    """The answer is in the second frame only, at every step."""
    rng = np.random.default_rng(3)
    samples = planted()
    cells = tuple(Cell(step, 0, "cond", str(frame)) for step in range(STEPS) for frame in range(2))
    x = rng.normal(size=(len(samples), len(cells), REGIONS, CHANNELS))
    answer = samples.labels["answer"].numpy()
    for i, cell in enumerate(cells):
        x[np.arange(len(samples)), i, answer, 1] += 4.0 * (cell.position == "1")
    samples = replace(samples, features=torch.from_numpy(x).float(), cells=cells)
    (finding,) = of(measure(samples, *through(samples, tmp_path)), AXES)
    assert finding.claim.verdict == FAILS and finding.claim.value == pytest.approx(-0.75, abs=0.1)
    assert "steps explain 0.0" in finding.claim.measure and finding.n == SPLITS["test"]


# by difficulty


def test_groups_are_those_of_a_plain_loop():
    rng = np.random.default_rng(4)
    one = replace(some(count=90), keys=np.arange(90))
    one = replace(one, difficulty={"rooms": rng.integers(4, 6, 90), "length": rng.integers(1, 9, 90)})
    found = by_difficulty(one)
    median = int(np.median(one.difficulty["length"]))
    assert [group.about for group in found] == [
        "rooms 4",
        "rooms 5",
        f"length up to {median}",
        f"length above {median}",
    ]
    rooms, length = one.difficulty["rooms"], one.difficulty["length"]
    tests = [
        lambda i: rooms[i] == 4, lambda i: rooms[i] == 5, lambda i: length[i] <= median, lambda i: length[i] > median
    ]  # fmt: skip
    for group, belongs in zip(found, tests, strict=True):
        rows = [i for i in range(90) if belongs(i)]
        assert group.n == len(rows) and group.kind == "one"
        several = [sum(one.drawn[i, 0] >= 0.5) >= 2 for i in rows]
        same = [all(pick == one.shown[i, -1] for pick in one.shown[i]) for i in rows]
        probe = [len(set(one.proba[i].argmax(-1).tolist())) == 1 for i in rows]
        for (name, (mean, lower, upper)), values in zip(group.shares.items(), (several, same, probe), strict=True):
            ends = share_interval(np.array([values], float), np.array(rows))
            assert (mean, lower, upper) == pytest.approx((np.mean(values), ends[0][0], ends[1][0])), name
        names = [
            tuple("right" if a == one.right[i] else "none" if a == NONE else "wrong" for a in one.shown[i, [0, -1]])
            for i in rows
        ]
        assert group.changes == (names.count(("wrong", "right")), names.count(("right", "wrong")))


def test_the_largest_value_alone_is_a_group_above_the_others():
    one = replace(some(count=60), keys=np.arange(60))
    values = np.array([1] * 5 + [2] * 5 + [3] * 5 + [4] * 45)
    assert [(g.about, g.n) for g in by_difficulty(replace(one, difficulty={"length": values}))] == [
        ("length up to 3", 15),
        ("length above 3", 45),
    ]
    bare = replace(one, drawn=None, shown=None, decoded=(), right=None, difficulty={"length": values})
    assert [len(g.shares) for g in by_difficulty(bare)] == [1, 1] and by_difficulty(bare)[0].changes is None


# random weights


def null(rows: int, onset: dict[str, float], seed: int = 0, evident: bool = True) -> WeightsLine:
    """A line of accuracy 0.95 from a layer on, by weights, and of a guess before."""
    rng = np.random.default_rng(seed)
    correct = {
        weights: (rng.random((LAYERS, rows)) < np.where(np.arange(LAYERS) >= first, 0.95, 0.25)[:, None]).astype(float)
        for weights, first in onset.items()
    }
    name = "answer" if seed == 0 else "colour"
    return WeightsLine(
        name, "all", tuple(range(LAYERS)), correct, 0.25, {"trained": True, "permuted": evident}, np.arange(rows),
        np.arange(rows),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "colour", "verdict", "said"),
    [
        ({"trained": DEPTH, "permuted": 0}, {"trained": 0, "permuted": 2}, HOLDS, "trained minus permuted +"),
        ({"trained": DEPTH, "permuted": DEPTH}, {"trained": 0, "permuted": 0}, UNCLEAR, "trained minus permuted "),
        ({"trained": DEPTH, "permuted": 0}, {"trained": 0, "permuted": 0}, HOLDS, "order is not known"),
    ],
)
def test_what_permuted_weights_show_as_well_is_no_perception_before_action(made, answer, colour, verdict, said):
    _, evaluated, _, grid = made
    lines = layer_lines(evaluated, grid)
    claim = perception(lines, [null(60, answer), null(60, colour, 1)])[0].claim
    assert claim.verdict == verdict and said in claim.measure and "permuted weights (n = 60)" in claim.measure
    assert perception(lines)[0].claim.verdict == HOLDS and "not run" in perception(lines)[0].claim.measure


def test_without_an_onset_there_is_no_null(made):
    _, evaluated, _, grid = made
    flat = {"trained": DEPTH, "permuted": LAYERS}
    lines = [null(60, flat, evident=False), null(60, {"trained": 0, "permuted": 0}, 1)]
    claim = perception(layer_lines(evaluated, grid), lines)[0].claim
    assert claim.verdict == HOLDS and "answer not decodable" in claim.measure and "no null" in claim.measure


# nothing planted


def test_nothing_is_found_in_noise(tmp_path):
    samples = planted(strength=0.0)
    rng = np.random.default_rng(1)
    noise = rng.normal(size=samples.scores["x0_scores"].shape)
    noise[:, 1] = np.nan
    final = noise[:, -1]
    samples = replace(samples, scores=samples.scores | {"x0_scores": noise, "final": final})
    claims = [f.claim for f in measure(samples, *through(samples, tmp_path)).findings]
    assert [c.claim for c in claims if c.verdict == HOLDS] == []
    assert sum(c.verdict == UNTESTED for c in claims) >= 4


def test_random_answers_gain_nothing():
    held = sum(f.claim.verdict in (HOLDS, FAILS) for seed in range(20) for f in corrections(some(seed=seed)))
    assert held <= 4  # of 40, at a level of 0.05


def test_random_flicker_is_no_exploration():
    held = sum(f.claim.verdict == HOLDS for seed in range(20) for f in exploration(some(seed=seed)))
    assert held <= 3  # of 40


# numbers


def test_an_answer_is_settled_where_it_never_changes_again(rng):
    picks = rng.integers(0, 3, (50, 6))
    for row, first in zip(picks, settled(picks), strict=True):
        assert (row[first:] == row[-1]).all() and (first == 0 or row[first - 1] != row[-1])


def test_settled_answers_are_counted_by_step():
    one = some()
    described = [f.claim for f in commitment(one) if f.claim.verdict == DESCRIBED]
    for claim, picks in zip(described, (one.shown, one.proba.argmax(-1)), strict=True):
        assert f"{(settled(picks) == 0).mean():.2f} from step 0" in claim.measure
    start, end = (one.shown[:, [0, -1]] == NONE).mean(axis=0)
    none = f"none counts as an answer of its own: {start:.2f} of the samples show none at step 0, {end:.2f} in the fini"
    assert end > 0 and none in described[0].measure and "none" not in described[1].measure


def test_at_most_four_steps_are_named_and_none_at_the_end_is_settled():
    """Samples whose last answer is none count as settled from where x0-hat shows none."""
    shown = np.full((60, 8), NONE)
    shown[:30, :3] = 1
    one = replace(some(), drawn=None, shown=shown, decoded=tuple(range(0, 14, 2)))
    claim = commitment(one)[0].claim
    assert "the end: 0.50 from step 0, 0.50 from step 4, 1.00 from step 8, 1.00 from step 12; none" in claim.measure
    assert claim.measure.endswith("0.50 of the samples show none at step 0, 1.00 in the finished video")


def test_changes_are_those_of_a_plain_loop():
    one = some(count=80)
    for finding, picks in zip(corrections(one), (one.shown, one.proba.argmax(-1)), strict=True):
        counts = Counter()
        for row, right in zip(picks, one.right, strict=True):
            names = ["none" if pick == NONE else "right" if pick == right else "wrong" for pick in (row[0], row[-1])]
            if row[0] != row[-1]:
                counts[" to ".join(names)] += 1
        for name in ("wrong to right", "right to wrong", "wrong to wrong"):
            assert f"{counts[name]} from {name}" in finding.claim.measure
        if (picks == NONE).any():
            assert f"{counts['right to none']} from right to none" in finding.claim.measure
        expected = (counts["wrong to right"] - counts["right to wrong"]) / 80
        assert finding.claim.value == pytest.approx(expected) and finding.n == 80


def test_a_handful_of_changes_is_too_few():
    one = some()
    still = np.repeat(one.right[:, None], 4, axis=1)
    still[:5, 0] = (one.right[:5] + 1) % REGIONS
    five = corrections(replace(one, shown=still))[0].claim
    still[:6, 0] = (one.right[:6] + 1) % REGIONS
    six = corrections(replace(one, shown=still))[0].claim
    assert five.verdict == UNTESTED and "too few" in five.measure and six.verdict != UNTESTED


def test_a_blend_has_to_show_at_every_threshold():
    one = some()
    drawn = np.zeros_like(one.drawn)
    drawn[:40, 0] = [0.9, 0.25, 0, 0]
    blend = exploration(replace(one, drawn=drawn))[1].claim
    assert blend.verdict == UNCLEAR and "; no evidence with traces from 0.3: +0.00 [" in blend.measure
    drawn[:40, 0] = [0.9, 0.4, 0, 0]
    blend = exploration(replace(one, drawn=drawn))[1].claim
    assert blend.verdict == HOLDS and blend.measure.endswith("; also from 0.1, 0.3 on")
    drawn[:40, 0] = [0.9, 0.15, 0, 0]
    assert exploration(replace(one, drawn=drawn))[1].claim.verdict == UNCLEAR


def test_the_table_and_the_figure_count_blends_from_the_same_threshold():
    one = some()
    drawn = np.zeros_like(one.drawn)
    drawn[:40, 0], drawn[:20, 0] = [0.9, 0.15, 0, 0], [0.9, 0.25, 0, 0]
    one = replace(one, drawn=drawn)
    blend, curve = exploration(one)[1].claim, answer_curves(one)["blended_one"]
    assert float(curve[0]) == pytest.approx(1 / 3) == blend.value
    assert (
        f"share of samples: {float(curve[0]):.2f} at step 0" in blend.measure and "traces from 0.2 on" in blend.measure
    )


def test_a_p_below_the_level_without_a_verdict_is_explained():
    """Where few samples gain, the test may be sure while the interval, the wider one, is not."""
    one, said = some(), {}
    for many in range(1, 20):
        drawn = np.zeros_like(one.drawn)
        drawn[:many, 0] = [0.9, 0.9, 0, 0]
        claim = exploration(replace(one, drawn=drawn))[0].claim
        p = float(claim.measure.partition(", p ")[2][:5])
        explained_why = "but the lower end of the interval is not above 0" in claim.measure
        assert explained_why == (p <= 0.05 and claim.verdict == UNCLEAR)
        assert not explained_why or claim.lower <= 0
        said[explained_why] = many
    assert set(said) == {True, False}


def test_live_candidates_are_counted():
    even, sure = np.full((1, 1, 4), 0.25), np.array([[[1.0, 0, 0, 0]]])
    assert live_candidates(even) == pytest.approx(4) and live_candidates(sure) == pytest.approx(1)
    assert live_candidates(np.array([[[0.5, 0.5, 0, 0]]])) == pytest.approx(2)


def test_several_are_two_or_more():
    drawn = np.array([[[0.6, 0.6, 0.0], [0.6, 0.4, 0.4], [0.6, 0.6, 0.6]]])
    assert several_drawn(drawn, 0.5).tolist() == [[True, False, True]]


def test_the_rank_correlation_is_that_of_scipy(rng):
    one, other = rng.integers(0, 5, (2, 80))
    r, lower, upper = rank_correlation(one, other, np.arange(80))
    assert r == pytest.approx(stats.spearmanr(one, other).statistic) and lower < r < upper
    assert math.isnan(rank_correlation(one, np.ones(80, int), np.arange(80))[0])
    together = rank_correlation(one, other, np.arange(80), count=10)
    assert together[1] < lower < upper < together[2]
    wide = rank_correlation(one, other, np.arange(80) // 4)  # 20 problems
    assert wide[0] == r and wide[2] - wide[1] > 1.8 * (upper - lower)


def test_shares_of_steps_and_frames_are_those_of_the_means(rng):
    steps, frames = rng.normal(size=4), rng.normal(size=3)
    assert explained(steps[:, None] + 0 * frames) == pytest.approx((1, 0), abs=1e-12)
    total = steps.var() + frames.var()
    assert explained(steps[:, None] + frames) == pytest.approx((steps.var() / total, frames.var() / total))


def test_the_centre_is_that_of_the_exact_curve_and_luck_below_chance_does_not_move_it(rng):
    layers, keys = range(6), np.arange(4000)
    curve = np.array([0.25, 0.25, 0.25, 0.5, 0.8, 0.8])
    right = (rng.random((2, 6, 4000)) < np.stack([curve, np.full(6, 0.7)])[:, :, None]).astype(float)
    centres, lower, upper = centre_difference(right[0], right[1], (0.25, 0.25), layers, keys)
    truth = (np.arange(6) * (curve - 0.25)).sum() / (curve - 0.25).sum()
    assert centres == pytest.approx([truth, 2.5], abs=0.1) and lower < truth - 2.5 < upper < lower + 0.5
    blind = np.zeros_like(right[0])
    assert math.isnan(centre_difference(blind, right[1], (0.25, 0.25), layers, keys)[1])


def test_effective_rank_leaves_the_largest_channel_out():
    torch.manual_seed(0)
    states = torch.randn(4000, 9, dtype=torch.float64)
    states[:, 0] = 1000 * states[:, 0]
    assert effective_rank(states) == pytest.approx(8, abs=0.1)
    assert effective_rank(states[:, [0, 1]].clone()) == pytest.approx(1, abs=1e-6)


def test_few_problems_get_no_verdict():
    one = some(count=16)  # 8 problems
    for finding in (*exploration(one), *corrections(one), *commitment(one)):
        assert finding.claim.verdict in (UNTESTED, DESCRIBED) and finding.problems == 8


def test_a_task_without_a_parser_keeps_what_probes_show():
    bare = replace(some(), drawn=None, shown=None, decoded=(), right=None)
    assert [f.claim.verdict for f in exploration(bare)] == [UNTESTED]
    assert [f.claim.verdict for f in corrections(bare)] == [UNTESTED]
    assert {f.behaviour for f in commitment(bare)} == {COMMITMENT} and CORRECTION in ORDER


# the report


def test_sentences_say_how_many_layers_lie_between_and_count_claims_in_plain_english():
    def said(behaviour, *ends, outcome, control="colour"):
        claim = Claim("Stated", "", control, *ends, outcome, "layers")
        counted = [Finding(behaviour, "answer", Claim("Another", "", "", 0.1, 0.0, 0.2, UNCLEAR), 80, 80)] * 2
        return sentences(behaviour, [Finding(behaviour, "answer, colour", claim, 80, 80), *counted])[0]

    assert said(PERCEPTION, 3.99, 3.64, 4.29, outcome=HOLDS) == (
        "Stated: holds for answer, colour (colour is decodable 3.99 [3.64, 4.29] layers before answer, n = 80). "
        "1 of 3 tested claims holds."
    )
    late = said(PERCEPTION, -4.12, -4.31, -0.004, outcome=FAILS)
    assert "(colour is decodable 4.12 [0.004, 4.31] layers after answer" in late
    assert late.endswith("0 of 3 tested claims hold.")
    unclear = said(PERCEPTION, -0.1, -0.19, 0.02, outcome=UNCLEAR)
    assert "0.10 [-0.02, 0.19] layers after answer" in unclear
    assert "answer lies 0.60 [0.54, 0.66] layers deeper than colour" in said(ROLES, 0.6, 0.54, 0.66, outcome=HOLDS)
    last = said(ROLES, -0.6, -0.66, -0.54, outcome=FAILS, control="at the last step")
    assert "answer lies 0.60 [0.54, 0.66] layers shallower than at the last step" in last


def test_page_numbers_and_figure_are_written(found, tmp_path):
    written = write_behaviours(found, tmp_path)
    assert written == tmp_path / "report" / "behaviour" / "behaviour.md"
    numbers = (written.parent / "behaviour.json").read_text()
    assert len(json.loads(numbers)["claims"]) == len(found.findings) and "NaN" not in numbers
    text = written.read_text()
    for finding in found.findings:
        assert finding.claim.claim in text
        if np.isfinite(finding.claim.value):
            assert f"{finding.claim.value:+.2f} [" in text
    with xr.open_dataset(written.parent / "behaviour.nc") as curves:
        assert float(curves.drawn_one.values[0]) == pytest.approx(1 / 3, abs=0.02)
        assert curves.skill_answer.dims == ("skill_step", "skill_layer")
        assert all(v.attrs["description"] for v in curves.values())
    assert (written.parent / "behaviour.png").stat().st_size > 1000
    assert any((tmp_path / "tensorboard" / "behaviour").iterdir())
    assert "\n".join(page(found)) + "\n" == text


def test_panels_that_the_run_has_not_say_so():
    panels = figure(xr.Dataset({})).axes
    assert [panel.texts[0].get_text() for panel in panels] == ["not in this run"] * 4


@pytest.mark.slow
def test_the_figure_is_legible_and_no_legend_covers_data(found):
    with rc_context(STYLE):
        drawn = figure(found.curves)
    words = check_words(drawn)
    renderer = drawn.canvas.get_renderer()
    for axes in drawn.axes:
        assert axes.get_xlabel() and axes.get_ylabel() and axes.get_title("left")
        legend = axes.get_legend()
        assert legend is None or legend.get_window_extent(renderer).y1 < axes.get_window_extent(renderer).y0
    assert apart([box for text, box in words.items() if text.get_text() in {a.get_title("left") for a in drawn.axes}])
    layers = drawn.axes[-1]
    least = min(np.min(line.get_ydata()) for line in layers.lines)
    assert layers.get_ylim()[0] == pytest.approx(min(-0.05, least - 0.05))  # no room that nothing is shown in
