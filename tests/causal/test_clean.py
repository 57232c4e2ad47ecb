"""Donors against brute force, states against a plain hook in a whole run."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosprobe.activations.sampler import Sampler
from cosprobe.causal.clean import NONE, CleanRun, choose_donors, random_states, taken_from, with_steps
from cosprobe.causal.patching import At
from cosprobe.tasks import HideConfig, MazeConfig
from cosprobe.tasks.samples import with_noise
from tests.examples.causal import CONFIG, FRAMES, hashed
from tests.examples.pipelines import wan

HASHED = hashed(MazeConfig(frames=FRAMES).build())
SAMPLES = with_noise(HASHED.problems("test", 3, "one_exit"), 0)

batches = st.lists(
    st.tuples(st.integers(0, 3), st.integers(NONE, 4), st.sets(st.integers(0, 4), min_size=1)), min_size=1, max_size=9
)


@given(batches)
def test_donors_are_those_that_all_pairs_give(rows):
    """A row: problem, answer, plausible answers of the problem (those of its first row)."""
    plausible = {}
    for name, _, some in rows:
        plausible.setdefault(name, some)
    problems = [SimpleNamespace(name=str(name)) for name, _, _ in rows]
    task = SimpleNamespace(plausible_answers=lambda problem: tuple(plausible[int(problem.name)]))
    answers = [answer for _, answer, _ in rows]
    found = choose_donors(task, problems, answers)
    for i, (name, answer, _) in enumerate(rows):
        of_problem = [j for j, row in enumerate(rows) if row[0] == name and j != i]
        allowed = of_problem or [j for j in range(len(rows)) if j != i]
        given = [j for j in allowed if answer != NONE and answers[j] != NONE]
        same = [j for j in given if answers[j] == answer]
        other = [j for j in given if answers[j] != answer and answers[j] in plausible[name]]
        for chosen, options in ((found.same[i], same), (found.other[i], other)):
            assert chosen == min(options, key=lambda j: (j - i) % len(rows), default=NONE)


def test_no_sample_gives_its_states_to_all_others():
    task = SimpleNamespace(plausible_answers=lambda problem: (0, 1))
    found = choose_donors(task, [SimpleNamespace(name=str(i)) for i in range(8)], [0, 1] * 4)
    assert sorted(found.other) == sorted(found.same) == list(range(8))


def test_donors_of_objects_are_objects_that_the_host_shows():
    task = HideConfig(frames=FRAMES).build()
    problems = task.problems("test", 24)
    answers = [task.solutions(p)[0] for p in problems]
    found = choose_donors(task, problems, answers)
    pairs = [(i, j) for i, j in enumerate(found.other) if j != NONE]
    assert pairs and all(answers[j] in task.plausible_answers(problems[i]) for i, j in pairs)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(wan(), CONFIG, HASHED)


@pytest.fixture(scope="module")
def run(sampler) -> CleanRun:
    return CleanRun(sampler, SAMPLES, (0, 2))


@pytest.mark.parametrize("step", [0, 2])
def test_states_of_a_step_are_those_of_a_plain_hook_in_a_whole_run(sampler, run, step):
    seen = {0: [], 2: []}
    hooks = [
        sampler.model.transformer.blocks[n].register_forward_hook(lambda block, args, out, n=n: seen[n].append(out))
        for n in seen
    ]
    video = np.asarray(sampler(SAMPLES))
    for hook in hooks:
        hook.remove()
    found = run.states(step)
    assert set(found) == {At(step, 0, "cond"), At(step, 2, "cond")}
    for at, state in found.items():
        assert torch.equal(state, seen[at.layer][step])
    assert np.array_equal(run.video, video)


def test_states_of_guided_runs_belong_to_their_branch(sampler):
    guided = Sampler(sampler.model, CONFIG.__class__(**vars(CONFIG) | {"guidance": 3.0}), HASHED)
    found, seen = CleanRun(guided, SAMPLES, (1,)).states(1), []
    hook = sampler.model.transformer.blocks[1].register_forward_hook(lambda block, args, out: seen.append(out))
    guided(SAMPLES)
    hook.remove()
    cond, uncond = seen[2:4]
    assert torch.equal(found[At(1, 1, "cond")], cond) and torch.equal(found[At(1, 1, "uncond")], uncond)
    assert not torch.equal(cond, uncond)


def test_evaluations_are_the_calls_of_the_transformer(sampler):
    calls = []
    hook = sampler.model.transformer.blocks[0].register_forward_hook(lambda block, args, out: calls.append(1))
    one = CleanRun(sampler, SAMPLES, (0,))
    for step in (0, 1, 1, 2, 0):  # the states of two steps are kept
        one.states(step)
    hook.remove()
    assert one.evaluations == len(calls) == 3 + 4
    one.forget_states()
    one.states(2)
    assert one.evaluations == 3 + 5


def test_taken_states_are_rows_of_others_at_the_given_step(run):
    states = run.states(1)
    found = taken_from(states, np.array([2, NONE, 0]), 2)
    assert set(found) == {At(2, 0, "cond"), At(2, 2, "cond")}
    for at, state in found.items():
        assert torch.equal(state, states[At(1, at.layer, "cond")][[2, 1, 0]])


def test_random_states_have_the_norms_of_the_tokens_and_nothing_else(run):
    states = run.states(0)
    found, other = random_states(states, 1), random_states(states, 2)
    for at, state in states.items():
        torch.testing.assert_close(found[at].norm(dim=-1), state.norm(dim=-1))
        alike = torch.cosine_similarity(found[at], state, dim=-1)
        assert abs(float(alike.mean())) < 4 / (alike.numel() * state.shape[-1]) ** 0.5
        assert not torch.equal(found[at], other[at])
    assert all(torch.equal(found[at], again) for at, again in random_states(states, 1).items())


def test_another_number_of_steps_leaves_the_rest(sampler):
    assert with_steps(sampler, 0) is sampler
    assert with_steps(sampler, 5).config.steps == 5 and sampler.config.steps == CONFIG.steps
