from __future__ import annotations

import itertools
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosprobe.activations import images
from cosprobe.activations.cost import Cost, flops
from cosprobe.config import EnsembleConfig
from cosprobe.ensembles import trajectories as module
from cosprobe.ensembles.comparison import (
    Comparison,
    Size,
    candidates,
    choose,
    compare,
    error_correlation,
    groups,
    oracle,
    price,
)
from cosprobe.ensembles.report import NAMES, figure, numbers, remarks, write_ensemble
from cosprobe.ensembles.run import run
from cosprobe.ensembles.strategies import STRATEGIES, Hyperparameters
from cosprobe.ensembles.trajectories import Candidate, Trajectories
from cosprobe.tasks.samples import fresh_problems
from tests.examples.banks import TASK
from tests.examples.figures import apart, check_words

TINY = Size(3, 2, 4, ("middle", "early", "all"), ((0,),), (3,))
COST = Cost(1.0, 5.0, (1.0, 2.0), 2.0, 4.0)
tables = st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=2, max_size=9)


@given(tables, st.integers(1, 4))
def test_the_oracle_is_what_all_subsets_of_seeds_give(rows, count):
    right = np.array(rows, float)
    expected = np.mean([right[:, list(some)].any(axis=1) for some in itertools.combinations(range(4), count)], axis=0)
    np.testing.assert_allclose(oracle(right, count), expected)


@given(tables)
def test_the_correlation_of_errors_is_that_of_all_pairs_of_seeds(rows):
    wrong = 1 - np.array(rows, float)
    pairs = np.concatenate([wrong[:, list(pair)] for pair in itertools.permutations(range(4), 2)])
    found = error_correlation(1 - wrong)
    if len(np.unique(wrong)) < 2:
        assert np.isnan(found)
    else:
        np.testing.assert_allclose(found, np.corrcoef(pairs.T)[0, 1], atol=1e-9)


def test_planted_errors_show_their_correlation(rng):
    independent = (rng.random((4000, 5)) < 0.7).astype(float)
    assert abs(error_correlation(independent)) < 0.03
    assert error_correlation(np.repeat(independent[:, :1], 5, axis=1)) == pytest.approx(1)


@pytest.mark.slow
def test_groups_split_near_the_middle():
    problems = TASK.problems("test", 40)
    found = groups(problems)
    assert found["all"].all() and found["choice"].sum() == found["one_exit"].sum() == 20
    low = next(name for name in found if name.startswith("length <="))
    assert (found[low] ^ found[low.replace("<=", ">")]).all() and 5 <= found[low].sum() <= 35


def test_prices_count_every_part():
    assert price(Candidate("vote", Hyperparameters(3)), 10, COST) == 3 * 1 + 5 + 30 * 2 + 3 * 4
    assert price(Candidate("hidden", Hyperparameters(3, layers=(1,))), 10, COST) == 3 * 1 + 5 + 12 * 2 + 4
    assert price(Candidate("single", Hyperparameters(length=12)), 10, COST) == 1 + 5 + 12 * 2 + 4


def test_runs_made_one_after_another_cost_what_was_begun():
    one = 1 + 5 + 10 * 2 + 4
    assert price(Candidate("retry", Hyperparameters(3)), 10, COST, begun=1.25) == 1.25 * one
    assert price(Candidate("probe_retry", Hyperparameters(3)), 10, COST) == 3 * one


def test_nothing_is_chosen_beyond_the_budget_and_ties_go_to_the_cheapest():
    options = [Candidate("probe_best", Hyperparameters(k, (s,))) for k in (2, 3, 4) for s in (0, 1)]
    options += [Candidate("vote", Hyperparameters(k)) for k in (2, 3)]
    right = {c: np.array([1.0, 0.0]) for c in options} | {options[5]: np.array([1.0, 1.0])}  # 4 seeds, step 1
    prices = {c: price(c, 10, COST) for c in options}
    chosen = choose(prices, right, COST, prices[options[3]])  # 3 seeds, step 1
    assert chosen["probe_best"] == options[0] and "vote" not in chosen
    generous = choose(prices, right, COST, 1000.0)
    assert generous["probe_best"] == options[5] and generous["vote"] == options[6]
    for budget in (40.0, 63.0, 64.0, 1000.0):
        single = choose({}, {}, COST, budget)["single"]
        longer = Candidate("single", Hyperparameters(length=single.params.length + 1))
        assert price(single, 10, COST) <= budget < price(longer, 10, COST)


def test_every_strategy_is_tried(context):
    found = candidates(context, TINY)
    assert {c.name for c in found} == set(STRATEGIES) - {"single"} and len(found) == len(set(found))
    for c in found:
        assert price(c, context.sampler.config.steps, COST) > 0 and str(c)
    assert len({str(c) for c in found}) == len(found)


@pytest.fixture(scope="module")
def compared(context, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ensemble")
    return compare(context, TINY, 20, 0, folder, {}), folder


@pytest.mark.slow
def test_a_second_comparison_runs_nothing_and_says_the_same(compared, context, monkeypatch):
    first, folder = compared
    monkeypatch.setattr(module, "run", None)
    again = compare(context, TINY, 20, 0, folder, {})
    assert again.chosen == first.chosen
    assert json.dumps(numbers(again)) == json.dumps(numbers(first))


@pytest.mark.slow
def test_numbers_on_disk_are_those_of_runs(compared, context):
    """Any candidate, free or not, run by hand on the same problems gives the same answers."""
    found, _ = compared
    problems = fresh_problems(TASK, "test", 20, 4, TASK.kinds)
    assert found.keys.tolist() == [p.key for p in problems]
    budgets = found.chosen["the paper's"], found.chosen["three runs'"]
    for c in (budgets[0]["hidden"], budgets[0]["probe_best"], budgets[1]["retry"], budgets[1]["probe_retry"]):
        right, begun = [], []
        for start in range(3 if c.free else 1):
            seeds = [(start + i) % 3 for i in range(c.params.seeds)]
            outcome = run(context, c.name, c.params, problems, which=seeds)
            right.append([int(a) in TASK.solutions(p) for a, p in zip(outcome.answers, problems, strict=True)])
            begun.append(outcome.begun.float())
        np.testing.assert_allclose(found.test[c], np.mean(right, axis=0), atol=1e-6)
        parts = flops(context.sampler.model, context.sampler.config, images(TASK, problems[:1]), [problems[0].prompt])
        spent = price(c, context.sampler.config.steps, parts, float(torch.stack(begun).mean()))
        assert found.spent[c] * 1e9 == pytest.approx(spent, rel=1e-6)
    assert found.right.shape == (4, 3)


def test_every_budget_is_kept(compared):
    found, _ = compared
    for budget, row in found.chosen.items():
        assert {"single", "hidden", "probe_best"} <= set(row)
        assert all(found.cost.get(c, found.spent[c]) <= found.budgets[budget] * (1 + 1e-6) for c in row.values())
    assert set(found.chosen["three runs'"]) == set(STRATEGIES)


@pytest.mark.slow
def test_a_stopped_comparison_keeps_finished_batches(context, tmp_path, monkeypatch):
    problems = {"test": TASK.problems("test", 4)}
    trajectories = Trajectories(context, problems, 3, 0, tmp_path, {})
    monkeypatch.setattr(context.sampler.config, "batch", 3)  # one problem at a time
    calls, original = [], module.run

    def stops(*arguments, **more):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **more)

    monkeypatch.setattr(module, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        trajectories.whole_runs("test")
    assert len(list(tmp_path.rglob("shard-*.safetensors"))) == 2
    pool = trajectories.whole_runs("test")
    assert len(calls) == 5 and pool["answers"].shape == (4, 3) and pool["proba"].shape == (4, 3, 3, 4)


@pytest.mark.slow
def test_the_page_the_numbers_and_the_figure_are_written(compared, tmp_path):
    found, _ = compared
    page = write_ensemble(found, tmp_path / "ensemble")
    text, saved = page.read_text(), json.loads((tmp_path / "ensemble" / "ensemble.json").read_text())
    assert (
        "## At the paper's compute" in text and "## At three runs' compute" in text and "## The paper's window" in text
    )
    assert (tmp_path / "ensemble" / "ensemble.png").stat().st_size > 10_000
    hidden = saved["chosen"]["the paper's"]["hidden"]
    assert hidden["gflop"] == found.spent[found.chosen["the paper's"]["hidden"]]
    assert set(hidden["all"]) == {"right", "minus_single"}  # minus itself measures nothing
    assert set(saved["windows"]) == {"early", "middle", "all"}


def planted(better):
    """Forty problems: hidden is right on half of them, probe_best on `better` more."""
    one = {m: Candidate(m, Hyperparameters(3, (0,), (1,) if m == "hidden" else ())) for m in ("hidden", "probe_best")}
    one["single"] = Candidate("single", Hyperparameters(length=22))
    base = (np.arange(40) % 2).astype(float)
    ours = base.copy()
    ours[: 2 * better : 2] = 1
    test = {one["single"]: base, one["hidden"]: base, one["probe_best"]: ours}
    return Comparison(
        task="maze",
        steps=20,
        keys=np.array([f"{i:02d}" for i in range(40)]),
        cost=dict.fromkeys(test, 2.0),
        spent=dict.fromkeys(test, 2.0),
        validation=test,
        test=test,
        budgets={"the paper's": 2.0, "three runs'": 5.0},
        chosen={"the paper's": one, "three runs'": one},
        windows={"middle": one["hidden"]},
        curves={},
        groups={"all": np.ones(40, bool)},
        plain_cost=1.8,
        right=np.repeat(base[:, None], 3, axis=1),
        ranking={0: 0.75},
    )


def test_remarks_name_what_is_clearly_better_and_nothing_else():
    first = remarks(planted(10))[0]
    assert "probe_best (+0.250 [+0.0" in first and "single" not in first
    assert (
        planted(10).p_better("the paper's")["probe_best"] < 0.01 < 0.05 < planted(1).p_better("the paper's")["single"]
    )
    first, *others = remarks(planted(1))
    assert "hidden" in first and "probe_best" not in first and "single" not in first
    assert any(re.search(r"orrelation of errors.* 1\.00\b", line) for line in others)
    assert any("0.75 at step 0" in line and "pairs" in line for line in others)


def test_figure_names_strategies_in_words_and_says_what_is_left_out():
    found = planted(3)
    paper = dict(found.chosen["the paper's"])
    del paper["probe_best"]
    found.chosen["the paper's"] = paper
    drawn = figure(found)
    words = check_words(drawn)
    _, windows, left, right = drawn.axes
    names = [NAMES[name] for name in ("single", "hidden", "probe_best")]
    assert [tick.get_text() for tick in left.get_yticklabels()] == names
    assert [text.get_text() for text in left.texts] == ["costs more"] and len(right.texts) == 0
    assert [tick.get_text() for tick in windows.get_yticklabels()] == ["middle (1 to 1)"]
    dots = [line.get_xydata()[0].tolist() for line in right.lines if line.get_marker() == "o"]
    expected = [found.test[c].mean() for c in found.chosen["three runs'"].values()]
    order = [names.index(NAMES[c.name]) for c in found.chosen["three runs'"].values()]
    assert sorted(dots, key=lambda xy: xy[1]) == [[expected[order.index(i)], i] for i in range(3)]
    assert not any(axes.get_legend() for axes in drawn.axes)  # none over the data
    titles = {axes.get_title("left") for axes in drawn.axes}
    assert apart([box for text, box in words.items() if text.get_text() in titles])


def test_every_strategy_has_a_name_and_the_axis_of_compute_holds_a_strategy_that_costs_nothing_more():
    assert set(NAMES) == set(STRATEGIES)
    found = planted(3)
    retry = Candidate("retry", Hyperparameters(3))
    found.curves["retry"] = [retry]
    found.test[retry], found.spent[retry] = found.plain, found.plain_cost
    axes = figure(found).axes[0]
    (line,) = [line for line in axes.lines if line.get_label() == NAMES["retry"]]
    assert line.get_xdata().tolist() == [1.0] and axes.get_xlim()[0] < 1
    figure_of = axes.figure.canvas
    figure_of.draw()
    assert "≤ 1" in [tick.get_text() for tick in axes.get_xticklabels()]


def test_a_size_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="use.size='huge'.*quick, full"):
        EnsembleConfig("huge")
