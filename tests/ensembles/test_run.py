from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from cosprobe.activations import cost as costing
from cosprobe.activations import images
from cosprobe.activations.capture import capture
from cosprobe.cells import Cell
from cosprobe.ensembles.comparison import price
from cosprobe.ensembles.run import ensemble, run
from cosprobe.ensembles.strategies import (
    PROBES,
    STRATEGIES,
    Finished,
    Hyperparameters,
    Strategy,
    agreeing,
    build_strategy,
    disagreement,
    majority,
    margin,
    most_confident,
    only,
    replay,
    surest,
    windows,
)
from cosprobe.ensembles.trajectories import Candidate
from cosprobe.models.pipelines import sample
from cosprobe.tasks import HideConfig
from cosprobe.tasks.samples import noise_seed
from tests.examples.banks import TASK
from tests.examples.pipelines import CONFIG

PROBLEMS = TASK.problems("test", 2)
FREE = [name for name in STRATEGIES if Candidate(name, Hyperparameters(3, layers=(1,))).free]


@pytest.fixture(scope="module")
def records(context):
    return run(context, "vote", Hyperparameters(4), PROBLEMS, read=range(3))


@pytest.fixture(scope="module")
def whole(context):
    """Every run of both problems, finished by a plain call: [problem, seed, ...]."""
    samples = [p for p in PROBLEMS for _ in range(4)]
    seeds = [noise_seed(p, k, 0) for p in PROBLEMS for k in range(4)]
    video = sample(context.sampler.model, CONFIG, images(TASK, samples), [p.prompt for p in samples], seeds)
    return np.asarray(video).reshape(2, 4, *video.shape[1:])


def params_of(name, seeds=3, **more):
    return Hyperparameters(seeds, **({"layers": (1,)} if name in ("hidden", "probe_weighted") else {}) | more)


finished = st.builds(
    lambda answers, seed: Finished(
        torch.tensor(answers), torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(seed))
    ),
    st.lists(st.lists(st.integers(-1, 2), min_size=5, max_size=5), min_size=2, max_size=2),
    st.integers(0, 1000),
)


@pytest.mark.slow
@given(finished)
def test_the_majority_is_what_counting_gives(found):
    """Most votes, then the larger sum of scores; of its videos the clearest. None votes only where all are none."""
    for answers, scores, picked in zip(found.answers.tolist(), found.scores, majority(found).tolist(), strict=True):
        clear = margin(scores).tolist()
        votes = Counter(a for a in answers if a >= 0)
        allowed = range(5)
        if votes:
            winner = max(votes, key=lambda a: (votes[a], float(scores[:, a].sum())))
            allowed = [i for i in range(5) if answers[i] == winner]
        else:
            winner = None
        if winner is not None or all(a < 0 for a in answers):
            assert picked == max(allowed, key=lambda i: clear[i])


@given(finished)
def test_the_clearest_video_is_found_and_none_comes_last(found):
    for answers, scores, picked in zip(
        found.answers.tolist(), found.scores, most_confident(found).tolist(), strict=True
    ):
        top = scores.sort(dim=-1, descending=True).values
        assert picked == max(range(5), key=lambda i: (answers[i] >= 0, float(top[i, 0] - top[i, 1])))


@given(st.integers(0, 1000), st.integers(1, 4), st.permutations(range(4)))
def test_probes_choose_the_same_runs_in_any_order(seed, kept, order):
    proba = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    for choose in (surest, agreeing):
        one, other = choose(proba, kept), choose(proba[:, list(order)], kept)
        assert [set(row) for row in one.tolist()] == [{order[i] for i in row} for row in other.tolist()]
    for p in range(3):
        best = sorted(range(4), key=lambda k: -float(proba[p, k].max()))[:kept]
        assert surest(proba, kept)[p].tolist() == best
        answer = int(proba[p].mean(0).argmax())
        assert agreeing(proba, kept)[p].tolist() == sorted(range(4), key=lambda k: -float(proba[p, k, answer]))[:kept]


def test_disagreement_is_the_share_outside_the_largest_group():
    answers = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 2], [-1, -1, -1, 3], [0, 1, 2, 3]])
    assert disagreement(answers).tolist() == [0.0, 0.5, 0.25, 0.75]


def test_strategies_say_how_many_steps_they_run():
    def steps(name, k, total=20, **more):
        return build_strategy(name, params_of(name, k, **more), total).evaluations(total)

    assert steps("single", 3) == 60 and steps("single", 3, length=22) == 22
    assert steps("vote", 3) == steps("best_of", 3) == steps("hidden", 3, back="all") == 60
    assert steps("hidden", 3) == steps("x0", 3) == steps("latent", 3) == steps("probe_best", 3) == 22
    assert steps("probe_vote", 8, steps=(2,)) == 3 * 8 + 17
    assert steps("prune", 8) == 8 + 4 + 2 + 17 and steps("prune", 3, steps=(0, 2)) == 3 + 2 + 2 + 17
    assert build_strategy("vote", Hyperparameters(5), 20).finished == 5
    assert build_strategy("prune", Hyperparameters(5), 20).finished == 1


@pytest.mark.parametrize("depth", [1, 2, 3, 8, 30, 40])
def test_windows_are_inside_the_model(depth):
    parts = windows(depth)
    assert all(part and part[0] >= 0 and part[-1] < depth for part in parts.values())
    assert parts["all"] == tuple(range(depth))
    if depth == 40:
        assert parts["middle"] == tuple(range(20, 30)) and parts["early"] == tuple(range(10))


def test_probes_read_what_capture_pools(context, records):
    layers = {0: 0, 1: 2, 2: 2}  # best on validation, by the table above
    for i, problem in enumerate(PROBLEMS):
        seeds = [noise_seed(problem, k, 0) for k in range(4)]
        pooling = context.scorer.pooling([problem] * 4)
        with capture(context.sampler.model, "all", pooling) as cache:
            video = sample(context.sampler.model, CONFIG, images(TASK, [problem] * 4), [problem.prompt] * 4, seeds)
        features, name = cache.features(), {"one_exit": "answer", "choice": "model_answer"}[problem.kind]
        for step, layer in layers.items():
            cell = Cell(step, layer, "cond", "all")
            proba = context.scorer.bank.probabilities(features[:, step, layer, 0, 0][:, None], name, [cell])[0]
            torch.testing.assert_close(records.proba[step][i], proba, atol=1e-4, rtol=0)
        read = [TASK.parse(problem, clip) for clip in video]
        assert records.finished.answers[i].tolist() == [-1 if r.answer is None else r.answer for r in read]
    assert records.proba[0].amax(-1).std() > 0.01  # the runs can be told apart


@pytest.mark.parametrize(("name", "seeds"), [*((name, 3) for name in FREE), ("prune", 4)])
def test_a_replay_returns_what_a_run_returns(context, records, whole, name, seeds):
    outcome = run(context, name, params_of(name, seeds), PROBLEMS)
    part = Finished(records.finished.answers[:, :seeds], records.finished.scores[:, :seeds])
    proba = {step: value[:, :seeds] for step, value in records.proba.items()}
    answers, which, begun = replay(build_strategy(name, params_of(name, seeds), CONFIG.steps), part, proba)
    assert answers.tolist() == outcome.answers.tolist() and which.tolist() == outcome.run.tolist()
    assert begun.tolist() == outcome.begun.tolist()
    np.testing.assert_allclose(outcome.video, whole[np.arange(2), which.numpy()], atol=1e-4)


@pytest.mark.parametrize("name", ["retry", "probe_retry"])
def test_another_run_is_made_only_while_the_last_one_is_not_accepted(name):
    """Against the loop in words, on random videos and readings."""
    draw = torch.Generator().manual_seed(3)
    answers = torch.randint(-1, 4, (200, 3), generator=draw)
    proba = (2 * torch.randn(200, 3, 4, generator=draw)).softmax(-1)
    found = replay(
        build_strategy(name, Hyperparameters(3, (1,)), 20), Finished(answers, torch.zeros(200, 3, 4)), {1: proba}
    )
    made = Counter()
    for drawn, read, answer, which, begun in zip(answers, proba, *found, strict=True):
        for count in range(1, 4):
            belief = [0.0 if a < 0 else 1.0 if name == "retry" else 4 * float(read[:count, a].mean()) for a in drawn]
            if belief[count - 1] >= 1:
                break
        expected = count - 1 if belief[count - 1] >= 1 else max(range(3), key=lambda i: (belief[i], -i))
        assert (int(which), int(answer), int(begun)) == (expected, int(drawn[expected]), count)
        made[count, belief[count - 1] >= 1] += 1
    assert min(made[c, True] for c in (1, 2, 3)) > 3 and made[3, False] > 0  # every way to end


def test_only_problems_that_ask_for_another_run_get_one(context, records, whole, monkeypatch):
    """By a rule on probe readings that the first problem meets with its second seed, the other one never."""
    sure = records.proba[0].amax(dim=-1)
    bar = [float(sure[0, 1]), float(sure.max()) + 1]
    keys = {float(sure[p, k]): bar[p] for p in range(2) for k in range(4)}

    def rule(finished, proba):
        read = proba[0].nan_to_num().amax(-1).tolist()  # NaN: of runs that were not made
        near = [[min(keys, key=lambda known: abs(known - value)) for value in row] for row in read]
        return torch.tensor([[float(value >= keys[value]) for value in row] for row in near])

    strategy = Strategy(3, only, acceptance=rule, acceptance_steps=(0,))
    monkeypatch.setitem(STRATEGIES, "probe_retry", lambda params, steps: strategy)
    outcome = run(context, "probe_retry", Hyperparameters(3), PROBLEMS)
    first = 1 if float(sure[0, 0]) >= bar[0] else 2
    assert outcome.begun.tolist() == [first, 3] and outcome.run.tolist() == [first - 1, 0]
    assert outcome.disagreement.isnan().tolist() == [first == 1, False]
    np.testing.assert_allclose(outcome.video, whole[[0, 1], outcome.run.numpy()], atol=1e-4)
    part = Finished(records.finished.answers[:, :3], records.finished.scores[:, :3])
    answers, which, begun = replay(strategy, part, {0: records.proba[0][:, :3]})
    assert (answers.tolist(), which.tolist(), begun.tolist()) == (
        outcome.answers.tolist(), outcome.run.tolist(), outcome.begun.tolist()
    )  # fmt: skip


def test_what_changes_its_runs_cannot_be_replayed(records):
    with pytest.raises(ValueError, match="strategy"):
        replay(build_strategy("hidden", params_of("hidden"), 3), records.finished, records.proba)


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_price_is_what_is_counted(context, name):
    """Counted operations of a whole call equal the sum of its parts: what is dropped is not computed. Where probes
    read, pooling and probes come on top, which the price leaves out."""
    candidate, problem = Candidate(name, params_of(name, 4)), PROBLEMS[:1]
    parts = costing.flops(context.sampler.model, CONFIG, images(TASK, problem), [problem[0].prompt])
    with FlopCounterMode(display=False, custom_mapping=costing._ATTENTION) as counter:
        begun = float(run(context, name, candidate.params, problem).begun[0])
    counted, known = counter.get_total_flops(), price(candidate, CONFIG.steps, parts, begun)
    assert known < counted < 1.005 * known if name in PROBES else counted == known


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name not in ("single", "retry", "probe_retry")])
def test_the_order_of_seeds_changes_nothing(context, name):
    """Of all seeds, or of those beside the first where the first one's run goes on."""
    first = name in ("hidden", "x0", "latent", "probe_weighted")
    orders = ([0, 1, 2], [0, 2, 1]) if first else ([0, 1, 2], [2, 0, 1])
    one, other = (run(context, name, params_of(name), PROBLEMS, which=order) for order in orders)
    assert one.answers.tolist() == other.answers.tolist()
    assert [orders[0][i] for i in one.run] == [orders[1][i] for i in other.run]
    np.testing.assert_allclose(one.video, other.video, atol=1e-4)


@pytest.mark.slow
def test_a_problem_is_answered(context):
    for name in ("prune", "hidden", "vote"):
        found = ensemble(context.sampler.model, PROBLEMS[0], name, 3, probes=context.scorer, task=TASK, config=CONFIG)
        same = run(context, name, params_of(name, layers=(1,)), PROBLEMS[:1])
        assert found.video.shape == (5, 64, 64, 3) and found.run == int(same.run[0])
        assert found.answer == TASK.parse(PROBLEMS[0], found.video).answer
        assert np.isnan(found.disagreement) if name == "hidden" else 0 <= found.disagreement < 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.answer = 3
    assert found.evaluations == 9
    retried = ensemble(
        context.sampler.model, PROBLEMS[0], "probe_retry", 3, probes=context.scorer, task=TASK, config=CONFIG
    )
    assert retried.evaluations == 3 * int(run(context, "probe_retry", params_of("probe_retry"), PROBLEMS[:1]).begun[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": 1}, r"seeds=1\b.*\b2\b.*strategy='single'"),
        ({"strategy": "bestof"}, "strategy='bestof'.*" + ", ".join(STRATEGIES)),
        ({"strategy": "hidden", "layers": ()}, "strategy='hidden'.*layers"),
        ({"strategy": "hidden", "layers": (2, 3)}, r"layers=\[2, 3\].*layer 3\b.*\b0 to 2\b"),
        ({"strategy": "hidden", "layers": (0, -1)}, r"layers=\[0, -1\].*layer -1\b.*\b0 to 2\b"),
        ({"strategy": "probe_weighted", "layers": (7,)}, r"step 0, layer 7\b.*\[0, 1, 2\].*\[0, 1, 2\]"),
        ({"steps": (3,)}, r"steps=\[3\].*\b0 to 2\b"),
        ({"steps": ()}, r"steps=\[\]"),
        ({"back": "some"}, "back='some'.*first, all"),
        ({"probes": None}, "strategy='prune'.*probes.*vote, best_of, hidden"),
        ({"problem": HideConfig(frames=5).build().problems("test", 1)[0], "task": HideConfig(frames=5).build()},
         "problem 'hide/hide/test/.*'.*task 'maze'.*choice.*one_exit"),
        ({"problem": replace(PROBLEMS[0], task="images"), "task": None, "probes": None}, "task='images'.*hide"),
        ({"config": replace(CONFIG, steps=9)}, r"pipeline\.steps=9\b.*\b3\b"),
        ({"config": replace(CONFIG, guidance=2.0)}, r"pipeline\.guidance=2\.0\b.*\b1\.0\b"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(context, arguments, message):
    given = {"problem": PROBLEMS[0], "probes": context.scorer, "task": TASK, "config": CONFIG, "seeds": 3} | arguments
    with pytest.raises(ValueError, match=message) as caught:
        ensemble(context.sampler.model, **given)
    assert "\n" not in str(caught.value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in context.sampler.model.transformer.modules())


@pytest.mark.parametrize("name", [*PROBES, "hidden"])
def test_activations_that_are_not_finite_are_named(context, name):
    hook = context.sampler.model.transformer.blocks[0].register_forward_hook(lambda block, args, out: out * torch.nan)
    try:
        with pytest.raises(ValueError, match=r"layer \d\b.*NaN.*step 0\b"):
            run(context, name, params_of(name), PROBLEMS)
    finally:
        hook.remove()
