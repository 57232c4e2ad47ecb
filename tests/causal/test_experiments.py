"""Which conditions every experiment has, and what they need."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from cosprobe.causal.clean import NONE, CleanRun, Donors
from cosprobe.causal.directions import probe_directions, random_directions
from cosprobe.causal.experiments import (
    CONTROL,
    PROBE,
    Ablate,
    Condition,
    Erase,
    Noise,
    Steer,
    Swap,
    best_cells,
)
from cosprobe.causal.patching import At
from cosprobe.cells import Cell
from cosprobe.probes import ProbeBank
from cosprobe.tasks import Target
from cosprobe.tasks.samples import with_noise
from tests.examples.banks import TASK

SAMPLES = with_noise(TASK.problems("test", 4, "one_exit"), 0)
CELLS = (Cell(1, 0, "cond", "all"), Cell(3, 2, "cond", "all"))
CHANNELS, TOKENS = 6, 8


def named(conditions: list[Condition]) -> dict[str, list[Condition]]:
    return {name: [c for c in conditions if c.name == name] for name in dict.fromkeys(c.name for c in conditions)}


class Run(CleanRun):
    """A clean run of four samples with random states; the answers are given."""

    def __init__(self):
        super().__init__(None, SAMPLES, ())

    answers = torch.tensor([2, 0, NONE, 1])
    donors = Donors(np.array([1, 3, NONE, 0]), np.array([3, 0, NONE, NONE]))

    def states(self, step: int) -> dict[At, torch.Tensor]:
        draw = torch.Generator().manual_seed(step)
        return {At(step, n, "cond"): torch.randn(4, TOKENS, CHANNELS, generator=draw) for n in range(3)}

    def token_norms(self, at: At) -> torch.Tensor:
        return self.states(at.step)[at].norm(dim=-1).mean(dim=1)

    def states_of_all_steps(self) -> dict[At, torch.Tensor]:
        return {at: state for step in range(5) for at, state in self.states(step).items()}

    def boxes(self, first):
        return [[p.regions[i] for i in (*row, *(j for j in range(4) if j not in row))]
                for p, row in zip(self.problems, first, strict=True)]  # fmt: skip


# noise


@pytest.fixture(scope="module")
def noise() -> Noise:
    return Noise((0, 4, 9), 10, range(1, 3), 50.0, 5, (7, 20))


def test_noise_hits_the_steps_and_the_frames(noise):
    found = named(noise.conditions())
    steps = {n: [c.step for c in cs if c.frame == NONE] for n, cs in found.items()}
    assert steps == {"fresh": [0, 4, 9], "equal damage": [0, 4, 9], "renoised": [4, 9], "5 evaluations left": [2, 15]}
    assert all([c.frame for c in cs if c.frame != NONE] == [1, 2] for cs in found.values())
    for c in noise.conditions():
        (edit,) = c.edits
        assert edit.kind == "noise" and edit.frames == (() if c.frame == NONE else (c.frame,))
        assert edit.how == {"equal damage": "damage", "renoised": "renoised"}.get(c.name, "fresh")
        if c.frame == NONE:
            assert edit.steps == (c.step,) and c.first == c.step
        else:
            assert edit.steps[0] == (1 if c.name == "renoised" else 0)


def test_equal_damage_is_as_much_for_a_step_as_for_a_frame(noise):
    for c in named(noise.conditions())["equal damage"]:
        assert c.edits[0].amount * len(c.edits[0].steps) == pytest.approx(50.0)


def test_as_many_evaluations_follow_the_last_hit_in_every_run(noise):
    found = named(noise.conditions())["5 evaluations left"]
    assert [c.steps for c in found] == [7, 20, 0, 0]
    assert {(c.steps or 10) - max(c.edits[0].steps) for c in found} == {5}


def test_a_run_of_one_step_is_only_hit_there():
    found = named(Noise((0,), 1, range(2), 4.0, 1, ()).conditions())
    assert set(found) == {"fresh", "equal damage", "1 evaluations left"}
    assert all(c.edits[0].steps == (0,) for cs in found.values() for c in cs)


def test_the_label_of_noise_is_the_clean_answer(noise):
    assert noise.labels(Run()).tolist() == Run.answers.tolist()


# swap


@pytest.fixture(scope="module")
def swap() -> Swap:
    return Swap((0, 3), (0, 2), 4, 2, True)


def test_every_cell_of_the_plane_has_every_control(swap):
    found = named(swap.conditions())
    assert set(found) == {
        "swap", "same answer", "random state", "wrong step", "two regions", "wrong regions", "last frame"
    }  # fmt: skip
    for conditions in found.values():
        assert [(c.step, c.layer) for c in conditions] == [(0, 0), (0, 2), (3, 0), (3, 2)]
        assert all(c.edits[0].steps == (c.step,) and c.edits[0].layers == (c.layer,) for c in conditions)
    assert {c.edits[0].regions for c in found["two regions"]} == {(0, 1)}
    assert {c.edits[0].regions for c in found["wrong regions"]} == {(2, 3)}
    assert {c.edits[0].frames for c in found["last frame"]} == {(1,)}


def test_without_answers_in_regions_or_other_steps_there_are_fewer_controls():
    found = named(Swap((0,), (1,), 1, 2, False).conditions())
    assert set(found) == {"swap", "same answer", "random state", "last frame"}


def test_samples_without_both_donors_are_left_out(swap):
    assert swap.labels(Run()).tolist() == [0, 1, NONE, NONE]


@pytest.mark.parametrize("name", ["swap", "same answer", "wrong step", "last frame", "two regions", "wrong regions"])
def test_a_swap_is_given_the_states_of_its_donors(swap, name):
    condition = next(c for c in swap.conditions() if c.name == name and (c.step, c.layer) == (3, 2))
    needed = swap.needed(Run(), condition)
    states = needed.sources[condition.edits[0].source][At(3, 2, "cond")]
    rows = [3, 0, 2, 3] if name == "same answer" else [1, 3, 2, 0]  # without a donor their own
    step = 1 if name == "wrong step" else 3
    assert torch.equal(states, Run().states(step)[At(step, 2, "cond")][rows])
    if name.endswith("regions"):
        for problem, boxes, host, donor in zip(Run().problems, needed.boxes, (2, 0), (0, 1), strict=False):
            assert boxes[:2] == [problem.regions[host], problem.regions[donor]]
            assert sorted(boxes) == sorted(problem.regions)


def test_a_random_state_is_only_of_its_layer_and_of_the_norms_of_the_donor(swap):
    condition = next(c for c in swap.conditions() if c.name == "random state" and (c.step, c.layer) == (0, 2))
    ((at, state),) = swap.needed(Run(), condition).sources["random state"].items()
    donor = Run().states(0)[At(0, 2, "cond")][[1, 3, 2, 0]]
    assert at == At(0, 2, "cond") and not torch.allclose(state, donor)
    torch.testing.assert_close(state.norm(dim=-1), donor.norm(dim=-1))


# steer


def toy_bank(*targets: Target) -> ProbeBank:
    draw = torch.Generator().manual_seed(2)
    tables = {t.name: torch.randn(2, CHANNELS, 1, generator=draw) for t in targets}
    return ProbeBank(CELLS, targets, 4, torch.zeros(2, CHANNELS), torch.ones(2, CHANNELS), tables,
                     {t.name: torch.zeros(2, 1) for t in targets}, {})  # fmt: skip


@pytest.fixture(scope="module")
def steer() -> Steer:
    bank = toy_bank(Target("answer", 4, "candidate", "answer", ("one_exit",)),
                    Target("control", 4, "candidate", "control", ("one_exit",)))  # fmt: skip
    return Steer(bank, "answer", CELLS, (0.5, 1.0, 2.0), 1.0, 3, "control", TASK)


def test_the_probe_has_every_dose_and_its_controls_one(steer):
    found = steer.conditions()
    assert Counter((c.name, c.dose, c.draw) for c in found) == dict.fromkeys(
        [(PROBE, d, NONE) for d in (0.5, 1.0, 2.0)] + [(CONTROL, 1.0, NONE)]
        + [("random direction", 1.0, i) for i in range(3)], 2
    )  # fmt: skip
    assert all(c.edits[0].amount == c.dose and (c.step, c.layer) in ((1, 0), (3, 2)) for c in found)
    without = Steer(steer.bank, "answer", CELLS, (1.0,), 1.0, 3, "", TASK)
    assert CONTROL not in named(without.conditions())


def test_answers_are_steered_towards_plausible_ones_that_the_clean_run_does_not_show(steer):
    labels = steer.labels(Run()).tolist()
    assert labels[2] == NONE
    for label, answer, sample in zip(labels, Run.answers.tolist(), SAMPLES, strict=True):
        assert label == NONE or (label != answer and label in TASK.plausible_answers(sample.problem))
    half = Run()
    half.samples, half.answers = SAMPLES[2:], torch.tensor([3, 1])
    assert steer.labels(half).tolist()[1] == labels[3]  # whatever else is in the batch


def test_a_dose_of_1_is_as_long_as_a_token_where_the_direction_is_longest(steer):
    run, at = Run(), CELLS[1]
    labels = steer.labels(run).clamp_min(0)
    probe = probe_directions(steer.bank, "answer", at, labels)
    size = run.states(3)[At(3, 2, "cond")].norm(dim=-1).mean(dim=1)
    lengths = []
    for c in steer.conditions():
        if (c.step, c.layer) == (3, 2):
            needed = steer.needed(run, c)
            found = needed.sources[c.edits[0].source]
            lengths.append(found.flatten(1).norm(dim=1))
            if c.name == PROBE:
                torch.testing.assert_close(found.norm(dim=2).amax(dim=1), size)
                alike = torch.cosine_similarity(found.flatten(1), probe.flatten(1))
                torch.testing.assert_close(alike, torch.ones(4))
                assert found.norm(dim=2).argmax(dim=1).tolist() == labels.tolist()  # the region of the label
            elif c.name == CONTROL:
                other = probe_directions(steer.bank, "control", at, labels)
                torch.testing.assert_close(found / lengths[-1][:, None, None], other)
            else:
                other = random_directions(probe, c.draw)
                torch.testing.assert_close(found / lengths[-1][:, None, None], other)
            assert needed.boxes == [p.regions for p in run.problems]
    for length in lengths:
        torch.testing.assert_close(length, lengths[0])


# erase


def test_the_concept_is_erased_at_cells_and_everywhere_with_controls():
    plane = tuple(Cell(s, n, "cond", "all") for s in (0, 2) for n in (0, 1))
    found = named(Erase(None, "answer", "control", plane, plane[1:3]).conditions())
    assert set(found) == {"erased", "control erased", "random directions erased"}
    for name, conditions in found.items():
        assert [(c.step, c.layer) for c in conditions] == [(0, 1), (2, 0), (NONE, NONE)]
        edits = [c.edits[0] for c in conditions]
        assert [(e.steps, e.layers) for e in edits] == [((0,), (1,)), ((2,), (0,)), ((0, 2), (0, 1))]
        assert all(e.source == name for e in edits)
    assert "control erased" not in named(Erase(None, "answer", "", plane, plane[:1]).conditions())


# ablate


def test_blocks_are_ablated_at_a_step_and_at_all_steps():
    found = named(Ablate((0, 2), (1, 3), 4, 3, True).conditions())
    assert set(found) == {
        "zero", "mean", "resample", "zero, last frame", "zero, region of the answer", "zero, another region"
    }  # fmt: skip
    for name, conditions in found.items():
        assert [(c.layer, c.step) for c in conditions] == [(1, NONE), (1, 0), (1, 2), (3, NONE), (3, 0), (3, 2)]
        for c in conditions:
            edit = c.edits[0]
            assert edit.how == name.split(",")[0] and edit.layers == (c.layer,)
            assert edit.steps == ((0, 1, 2, 3) if c.step == NONE else (c.step,))
    assert {c.edits[0].frames for c in found["zero, last frame"]} == {(2,)}
    assert {c.edits[0].regions for c in found["zero, region of the answer"]} == {(0,)}
    assert {c.edits[0].regions for c in found["zero, another region"]} == {(1,)}
    assert "zero, another region" not in named(Ablate((0,), (1,), 4, 3, False).conditions())


def test_the_region_of_the_answer_comes_first():
    ablate = Ablate((0,), (1,), 4, 3, True)
    in_region = next(c for c in ablate.conditions() if c.edits[0].regions)
    boxes = ablate.needed(Run(), in_region).boxes
    for problem, row, answer in zip(Run().problems, boxes, Run.answers.tolist(), strict=True):
        assert row[0] == problem.regions[max(answer, 0)] and sorted(row) == sorted(problem.regions)


def test_answers_that_are_no_regions_need_none():
    objects = Run()
    objects.answers = torch.tensor([11, 7, NONE, 4])
    for experiment in (Ablate((0,), (1,), 4, 3, False), Swap((0,), (1,), 4, 2, False)):
        assert all(not experiment.needed(objects, c).boxes for c in experiment.conditions())


def test_the_best_cell_of_a_step_is_the_lowest_of_the_most_accurate():
    accuracy = {Cell(s, n, "cond", "all"): value for s, n, value in
                ((2, 0, 0.5), (2, 1, 0.7), (2, 3, 0.7), (0, 1, 0.2), (0, 0, 0.1))}  # fmt: skip
    assert [(c.step, c.layer) for c in best_cells(accuracy)] == [(0, 1), (2, 1)]


def test_a_layer_is_swapped_at_all_steps_with_the_states_of_each_step():
    run, swap = Run(), Swap((0,), (1, 2), 5, 2, False, whole=True)
    every = [c for c in swap.conditions() if c.step == NONE]
    assert [(c.name, c.layer) for c in every] == [
        (name, layer) for layer in (1, 2) for name in ("swap", "same answer", "random state")
    ]
    for c in every:
        assert c.first == 0 and c.edits[0].steps == () and c.edits[0].layers == (c.layer,)
        source = swap.needed(run, c).sources[c.edits[0].source]
        assert source.keys() == {At(step, c.layer, "cond") for step in range(5)}
        for at, state in source.items():
            own = run.states(at.step)[at]
            rows = {"swap": [1, 3, 2, 0], "same answer": [3, 0, 2, 3]}.get(c.name)
            if rows:  # a sample without a donor keeps its own state
                torch.testing.assert_close(state, own[rows], rtol=0, atol=0)
            else:
                torch.testing.assert_close(state.norm(dim=-1), own[[1, 3, 2, 0]].norm(dim=-1))


def test_directions_are_added_at_all_steps_each_that_of_its_own_probe(steer):
    through = CELLS
    whole, run = replace(steer, cells=(), through=through), Run()
    for c in whole.conditions():
        needed = whole.needed(run, c)
        assert c.step == NONE and [(e.steps, e.layers) for e in c.edits] == [((t.step,), (t.layer,)) for t in through]
        for edit, cell in zip(c.edits, through, strict=True):
            alone = replace(steer, cells=(cell,), through=())
            same = next(o for o in alone.conditions() if (o.name, o.dose, o.draw) == (c.name, c.dose, c.draw))
            expected = alone.needed(run, same).sources[same.edits[0].source]
            torch.testing.assert_close(needed.sources[edit.source], expected, rtol=0, atol=0)
