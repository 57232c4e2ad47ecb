"""Corrections against a sampled null: counts are those of a plain loop, and fresh runs are those of the edited
pipeline."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from cosprobe.activations import Pooling, capture
from cosprobe.behaviour.answers import NONE
from cosprobe.behaviour.continuations import (
    Continuations,
    FreshContinuation,
    continued_steps,
    corrected,
    sample_continuations,
    sampled_corrections,
)
from cosprobe.behaviour.findings import DESCRIBED
from cosprobe.behaviour.report import example_lines, sample_behaviours
from cosprobe.causal import Edit, patch
from cosprobe.cells import X0
from cosprobe.config import BehaviourConfig
from cosprobe.errors import InputError
from cosprobe.evaluation import FAILS, HOLDS, UNCLEAR, UNTESTED
from cosprobe.tasks import Maze, Problem, fresh_problems, with_noise
from tests.examples.causal import finished

COUNT, CANDIDATES, SEED = 80, 4, 3


@cache
def problems() -> tuple[Problem, ...]:
    return tuple(Maze().problems("test", COUNT, "one_exit"))


def some(seed: int = 0, steps: tuple[int, ...] = (0, 2)) -> Continuations:
    """Answers without any pattern; in every problem, one or two candidates are right."""
    rng = np.random.default_rng(seed)
    solutions = np.zeros((COUNT, CANDIDATES + 1), dtype=bool)
    for row in solutions:
        row[rng.permutation(CANDIDATES)[: rng.integers(1, 3)]] = True
    shown, fresh = rng.integers(NONE, CANDIDATES, (2, COUNT, len(steps)))
    scores = rng.random((COUNT, len(steps), CANDIDATES))
    return Continuations(
        "one_exit", steps, problems(), shown, scores, rng.integers(NONE, CANDIDATES, COUNT), fresh, solutions
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("run"))


# counts


def test_changes_are_those_of_a_plain_loop():
    one = some()
    counts = Counter()
    for i, right in enumerate(one.solutions):
        good = {k for k in range(CANDIDATES) if right[k]}
        for j in range(len(one.steps)):
            begun = "none" if one.shown[i, j] == NONE else "right" if int(one.shown[i, j]) in good else "wrong"
            counts[j, begun] += 1
            for name, end in (("own", one.clean[i]), ("fresh", one.fresh[i, j])):
                counts[j, begun, name] += (int(end) in good) != (begun == "right")
    for begun, at in (("wrong", 0), ("none", 1), ("right", 2)):
        claim, sign = sampled_corrections(one)[at].claim, -1 if begun == "right" else 1
        for j, step in enumerate(one.steps):
            assert f"step {step}: {counts[j, begun]} {begun}, of these {counts[j, begun, 'own']} " in claim.measure
            assert f"with fresh noise {counts[j, begun, 'fresh']}" in claim.measure
        gains = [sign * (counts[j, begun, "own"] - counts[j, begun, "fresh"]) / COUNT for j in range(len(one.steps))]
        assert any(claim.value == pytest.approx(gain) for gain in gains)
        assert claim.lower < claim.value < claim.upper


def test_random_ends_correct_no_more_than_fresh_ones():
    held = sum(f.claim.verdict in (HOLDS, FAILS) for seed in range(20) for f in sampled_corrections(some(seed)))
    assert held <= 6  # of 60, at a level of 0.05


@pytest.mark.parametrize(("better", "verdict"), [("clean", HOLDS), ("fresh", FAILS), ("both", UNTESTED)])
def test_planted_corrections_are_told_from_those_of_fresh_noise(better, verdict):
    """Every x0-hat of the first step is wrong; a third of the runs end right, by themselves or in both ways."""
    one = some()
    right, wrong = one.solutions.argmax(axis=1), (~one.solutions[:, :-1]).argmax(axis=1)
    third = np.arange(COUNT) % 3 == 0
    ends = {name: np.where(third & (better in (name, "both")), right, wrong) for name in ("clean", "fresh")}
    fresh = np.repeat(ends["fresh"][:, None], 2, axis=1)
    one = replace(one, shown=np.repeat(wrong[:, None], 2, axis=1), clean=ends["clean"], fresh=fresh)
    claims = [f.claim for f in sampled_corrections(one)]
    assert claims[0].verdict == verdict and abs(claims[0].value) == pytest.approx(27 / 80 if better != "both" else 0)
    assert claims[1].verdict == claims[2].verdict == UNTESTED and "too few differ" in claims[1].measure
    same = 1.0 if better == "both" else 53 / 80
    assert claims[3].verdict == DESCRIBED and f"{same:.2f} [" in claims[3].measure.split(" from step 0")[0]


def test_five_samples_that_differ_are_too_few():
    one = some(steps=(0,))
    right, wrong = one.solutions.argmax(axis=1), (~one.solutions[:, :-1]).argmax(axis=1)
    for count, verdict in ((5, UNTESTED), (9, HOLDS)):
        clean = np.where(np.arange(COUNT) < count, right, wrong)
        found = replace(one, shown=wrong[:, None], fresh=wrong[:, None], clean=clean)
        assert sampled_corrections(found)[0].claim.verdict == verdict
    six = replace(found, clean=np.where(np.arange(COUNT) < 6, right, wrong))
    assert sampled_corrections(six)[0].claim.verdict in (HOLDS, UNCLEAR)


def test_examples_are_ranked_by_how_wrong_they_were():
    one = some()
    found = corrected([one])
    expected = {}
    for i, problem in enumerate(one.problems):
        good = {k for k in range(CANDIDATES) if one.solutions[i, k]}
        if int(one.clean[i]) not in good:
            continue
        for j, step in enumerate(one.steps):
            if one.shown[i, j] != NONE and int(one.shown[i, j]) not in good:
                bad = max(one.scores[i, j, k] for k in range(CANDIDATES) if k not in good)
                margin = bad - max(one.scores[i, j, k] for k in good)
                if margin > expected.get(problem.name, (-np.inf, 0))[0]:
                    expected[problem.name] = margin, step
    assert {e.problem.name: (pytest.approx(e.margin), e.step) for e in found} == expected and len(expected) > 10
    assert [e.margin for e in found] == sorted((e.margin for e in found), reverse=True)
    table = "\n".join(example_lines(found))
    assert all(e.problem.name in table for e in found) and "examples.png" in table
    assert example_lines(None) == [] and "No x0-hat" in "\n".join(example_lines(()))


# sampled


def test_fresh_runs_are_those_of_the_edited_pipeline(run, tmp_path):
    use = BehaviourConfig(problems=8, steps="0,1")
    found = sample_continuations(run.sampler, run.task, run.bank, use, SEED, tmp_path)
    assert [(one.kind, len(one.problems), one.steps) for one in found] == [
        ("one_exit", 4, (0, 1)),
        ("choice", 4, (0, 1)),
    ]
    for one in found:
        of_kind = [
            p for p in fresh_problems(run.sampler.task, "test", run.task.problems, 8, run.sampler.task.kinds)
            if p.kind == one.kind
        ]  # fmt: skip
        samples = with_noise(of_kind, SEED)
        assert [p.name for p in one.problems] == [p.name for p in of_kind]
        with capture(run.sampler.model, [X0], Pooling("clip"), "last", clean=(0, 1)) as cache:
            video = run.sampler(samples)
        assert one.clean.tolist() == run.sampler.parse(of_kind, video).answers.tolist()
        for j, step in enumerate(one.steps):
            read = run.sampler.parse(of_kind, run.sampler.decode(cache.clean[step]))
            assert one.shown[:, j].tolist() == read.answers.tolist()
            assert np.array_equal(one.scores[:, j], read.scores.double().numpy())
            seeds = [sample.seed for sample in samples]
            with patch(run.sampler.model, [Edit("noise", "renoised", (step + 1,))], seeds=seeds):
                other = run.sampler(samples)
            assert not np.array_equal(other, video)
            assert one.fresh[:, j].tolist() == run.sampler.parse(of_kind, other).answers.tolist()
        for row, problem in zip(one.solutions, of_kind, strict=True):
            assert tuple(np.flatnonzero(row)) == tuple(sorted(run.sampler.task.solutions(problem)))


def test_nothing_is_sampled_twice(run, tmp_path, monkeypatch):
    use = BehaviourConfig(problems=4, steps="1")
    first = sample_continuations(run.sampler, run.task, run.bank, use, SEED, tmp_path)
    monkeypatch.setattr(FreshContinuation, "predict_step", None)
    again = sample_continuations(run.sampler, run.task, run.bank, use, SEED, tmp_path)
    assert [one.fresh.tolist() for one in again] == [one.fresh.tolist() for one in first]


def test_steps_are_early_decoded_ones_that_others_follow():
    assert continued_steps("", (0, 2, 5, 10, 19), 20) == (0, 2, 5)
    assert continued_steps("", (2,), 3) == (0,) and continued_steps("3,1", (), 5) == (1, 3)
    for given, total, said in (("2", 3, "step 2 is the last"), ("7", 5, "use.steps"), ("", 1, "one step")):
        with pytest.raises(InputError, match=said):
            continued_steps(given, (0,), total)
    with pytest.raises(InputError, match=r"use\.steps='0'.*use\.problems"):
        BehaviourConfig(steps="0")
    assert BehaviourConfig().report == "behaviour" and BehaviourConfig(problems=8).report == "behaviour-8problems"


def test_the_report_has_the_null_and_examples(run, capsys):
    sample_behaviours(run.sampler, run.task, run.bank, BehaviourConfig(problems=24, steps="0"), SEED, run.folder)
    place = run.folder / "report" / "behaviour-24problems"
    content = json.loads((place / "behaviour.json").read_text())
    stated = [claim["claim"] for claim in content["claims"]]
    assert sum("a fresh continuation" in claim for claim in stated) == 6  # three of each kind
    assert "fresh noise" in capsys.readouterr().out
    assert len(content["examples"]) > 0 and (place / "examples.png").stat().st_size > 1000
    assert {group["kind"] for group in content["groups"]} == {"one_exit", "choice"}
    page = (place / "behaviour.md").read_text()
    assert content["examples"][0]["problem"] in page and "## By difficulty" in page
