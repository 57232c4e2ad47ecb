"""Whole experiments: a planted cause is found where it is, and the command ends with its files on a toy run."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import yaml

from cosprobe.activations.sampler import Sampler
from cosprobe.causal import interventions
from cosprobe.causal.clean import NONE
from cosprobe.causal.edits import Edit
from cosprobe.causal.effects import summarised
from cosprobe.causal.experiments import Condition, Needed, Swap
from cosprobe.causal.interventions import PAIRINGS, intervene, whole_problems
from cosprobe.causal.run import Intervention, cka_distance, sample_conditions
from cosprobe.config import CaptureConfig, InterveneConfig
from cosprobe.errors import InputError
from cosprobe.tasks import HideConfig, LineConfig, MazeConfig
from cosprobe.tasks.samples import with_noise
from tests.examples.causal import CONFIG, FRAMES, STEPS, Brightness, Finished, finished, hashed, planted
from tests.examples.pipelines import wan

ROWS = [(1, 1, 0, 2, 0, 2), (0, 3, 1, 3, 1, 0)]  # codes of the samples of two batches; all have both donors
PLANE, COLUMN = (Swap((0, 1), layers, STEPS, 2, True) for layers in ((0, 1), (1,)))


# a planted cause


@pytest.fixture(scope="module")
def bright() -> Sampler:
    return Sampler(wan(), CONFIG, Brightness(frames=FRAMES))


@pytest.fixture(scope="module")
def batches(bright):
    samples = with_noise(bright.task.problems("test", 12, "one_exit"), 0)
    return [samples[:6], samples[6:]]


class Coded(Intervention):
    """Tells the planted pipeline the codes of the batch that runs."""

    def __init__(self, plant, codes, *args):
        super().__init__(*args)
        self.plant, self.codes = plant, codes

    def predict_step(self, batch, index):
        self.plant.codes = self.codes[batch.content.samples[0].name]
        return super().predict_step(batch, index)


def coded(bright, batches, plant, experiment, layers):
    codes = {samples[0].name: row for samples, row in zip(batches, ROWS, strict=False)}
    return Coded(plant, codes, bright, experiment, layers)


@pytest.fixture(scope="module")
def swapped(bright, batches, tmp_path_factory):
    """The plane of a pipeline whose answer is in the output of block 1 at step 1, and the number of evaluations."""
    calls, folder = [], tmp_path_factory.mktemp("plane")
    hook = bright.model.transformer.blocks[0].register_forward_hook(lambda block, args, out: calls.append(1))
    with planted(bright.model, 1, 1) as plant:
        found = sample_conditions(coded(bright, batches[:1], plant, PLANE, (0, 1)), batches[:1], folder, {})
    hook.remove()
    return found, len(calls)


def test_a_swap_flips_the_answer_at_the_cell_that_holds_it_and_nowhere_else(swapped, bright, batches):
    outcomes, calls = swapped
    assert outcomes.clean[:, 0].tolist() == [*ROWS[0]] and outcomes.evaluations == calls
    table = summarised(outcomes, PAIRINGS["swap"], [bright.task.solutions(s.problem) for s in batches[0]])
    assert table.attrs["n"] == 6
    for name, step, layer, label, none in zip(
        *(table[n].values for n in ("name", "step", "layer", "label", "none")), strict=True
    ):
        here = (step, layer) == (1, 1)
        assert label == float(here and name == "swap"), (name, step, layer)
        broken = ("random state", "wrong step", "two regions", "wrong regions", "last frame")  # not one code everywhere
        assert none == float(here and name in broken), (name, step, layer)
    for control in ("same answer", "random state", "wrong step"):
        rows = table.isel(comparison=(table.control.values == control) & (table.compared.values == "swap"))
        cells = zip(rows.at_step.values, rows.at_layer.values, strict=True)
        assert dict(zip(cells, rows.effect.values, strict=True)) == {(0, 0): 0, (0, 1): 0, (1, 0): 0, (1, 1): 1}


def test_a_stopped_experiment_continues_to_the_same_bits(bright, batches, swapped, tmp_path, monkeypatch):
    """Two batches, stopped in the second one. The first is that of the plane, of which it has block 1."""
    conditions, calls, original = PLANE.conditions(), [], Coded.predict_step

    def stops(self, batch, index):
        calls.append(batch.rows[""][0])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, batch, index)

    monkeypatch.setattr(Coded, "predict_step", stops)
    with planted(bright.model, 1, 1) as plant:

        def sampled():
            return sample_conditions(coded(bright, batches, plant, COLUMN, (1,)), batches, tmp_path, {})

        with pytest.raises(KeyboardInterrupt):
            sampled()
        found = sampled()
        assert calls[4:] == calls[3:4]  # two batches with two groups each; three shards were there
        assert sampled().evaluations == found.evaluations and len(calls) == 5
    assert found.conditions == [c for c in conditions if c.layer == 1]
    at = [i for i, c in enumerate(conditions) if c.layer == 1]
    for name in ("labels", "clean", "answers", "change"):
        np.testing.assert_array_equal(getattr(found, name)[:6], getattr(swapped[0], name)[:, at])
    assert found.evaluations == 3 + 7 * 3 + 2 + 7 * 2 + 2  # clean, and for each step conditions and donor states
    for start, codes in zip((0, 6), ROWS, strict=True):  # labels are answers of donors of the same batch
        assert found.clean[start : start + 6, 0].tolist() == [*codes]
        for i, label in enumerate(found.labels[start : start + 6]):
            shifted = [codes[(i + shift) % 6] for shift in range(1, 6)]
            assert set(label) == {next(code for code in shifted if code != codes[i])}
    hit = [(c.name, c.step) == ("swap", 1) for c in found.conditions]
    np.testing.assert_array_equal(found.answers[:, hit], found.labels[:, hit])


class Relengthened:
    """Noise of amount 0, which changes nothing, in runs of three and of two steps."""

    def conditions(self):
        nothing = Edit("noise", steps=(1,), amount=0.0)
        return [Condition("fresh", (nothing,), 1), Condition("fresh", (nothing,), 1, steps=2)]

    def needed(self, run, condition):
        return Needed()

    def labels(self, run):
        return run.answers


def test_every_condition_is_compared_with_the_clean_run_of_as_many_steps(tmp_path):
    sampler = Sampler(wan(), CONFIG, hashed(MazeConfig(frames=FRAMES).build()))
    samples = with_noise(sampler.task.problems("test", 6, "one_exit"), 0)
    found = sample_conditions(Intervention(sampler, Relengthened(), ()), [samples], tmp_path, {})
    assert (found.answers == found.clean).all() and (found.labels == found.clean).all()
    assert (found.clean[:, 0] != found.clean[:, 1]).any()
    assert found.complete.tolist() == (found.clean != NONE).all(axis=1).tolist()
    assert (found.change == 0).all()
    assert found.evaluations == (3 - 1) + (2 - 1) + 3 + 2


def test_cka_is_that_of_the_definition():
    one, other = torch.randn(2, 7, 3), torch.randn(2, 7, 3)
    for found, x, y in zip(cka_distance(one, other), one.numpy(), other.numpy(), strict=True):
        x, y = x - x.mean(axis=0), y - y.mean(axis=0)
        k, m = x @ x.T, y @ y.T
        assert float(found) == pytest.approx(1 - (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()), abs=1e-6)
    turned = one @ torch.linalg.qr(torch.randn(3, 3))[0] * 5 + 1
    assert cka_distance(one, turned) == pytest.approx([0, 0], abs=1e-6)
    assert cka_distance(one, torch.ones(2, 7, 3)).isnan().all()


# the command


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Finished:
    return finished(tmp_path_factory.mktemp("run"))


def use(edit: str, **settings) -> InterveneConfig:
    layers = "" if edit == "noise" else "1"
    return InterveneConfig(**{"edit": edit, "problems": 6, "steps": "1", "layers": layers} | settings)


def table_of(run: Finished, settings: InterveneConfig) -> xr.Dataset:
    return xr.load_dataset(run.folder / "report" / settings.report / "causal.nc")


def start(run: Finished, settings: InterveneConfig, **changes) -> None:
    sampler = replace(run.sampler, **changes)
    intervene(sampler, run.task, run.bank, settings, 0, run.folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "edit", ["noise", "swap", "erase", *(pytest.param(n, marks=pytest.mark.docs) for n in ("steer", "ablate"))]
)
def test_every_edit_ends_with_its_files_and_a_second_call_samples_nothing(run, edit, capsys, monkeypatch):
    start(run, use(edit, doses=[0.5, 1.0]))
    said, place = capsys.readouterr(), run.folder / "report" / f"causal-{edit}-6problems"
    page = (place / f"{edit}.md").read_text()
    assert f"page: {place / f'{edit}.md'}" in said.out
    assert (place / f"{edit}.png").stat().st_size > 5000 and (place / "agreement.png").exists() == (edit == "swap")
    table, listed = xr.load_dataset(place / "causal.nc"), yaml.safe_load((place / "edits.yaml").read_text())
    assert [one["condition"] for one in listed] == table.name.values.tolist()
    assert {Edit(**fields).kind for one in listed for fields in one["edits"]} == {edit}
    assert set(table.control.values) == {p.control for p in PAIRINGS[edit]}
    assert table.attrs["n"] + table.attrs["left_out"] == 6
    assert table.attrs["evaluations"] < table.attrs["naive_evaluations"]
    assert re.search(rf"\b{table.attrs['n']} samples.*fewer than 20.*use\.problems", said.err + said.out)
    assert "| claim |" in page and f"![{edit}]({edit}.png)" in page

    monkeypatch.setattr(Intervention, "predict_step", None)
    kept = []
    monkeypatch.setattr(interventions, "report", lambda *args: kept.append(args[4]))
    start(run, use(edit, doses=[0.5, 1.0]))
    (again,) = kept
    assert float((again.answers[again.complete] == NONE).mean()) == pytest.approx(float(table.none.mean()))


@pytest.mark.slow
def test_outcomes_of_another_target_are_not_taken_for_those_of_the_answer(run, monkeypatch):
    """Its conditions have the same names and cells."""
    calls, original = [], Intervention.predict_step

    def counted(self, batch, index):
        calls.append(batch.content.conditions[0].name)
        return original(self, batch, index)

    monkeypatch.setattr(Intervention, "predict_step", counted)
    monkeypatch.setattr(interventions, "report", lambda *args: None)
    start(run, use("erase", problems=2, target="start"))
    first = len(calls)
    start(run, use("erase", problems=2, target="length"))
    assert first and len(calls) == 2 * first


def without_parser() -> Any:
    task = hashed(MazeConfig(frames=FRAMES).build())
    object.__setattr__(task, "candidates", 0)
    return task


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"kind": "two"}, {}, r"use\.kind='two'.*one_exit, choice"),
        ({"steps": "7"}, {}, r"use\.steps='7'.*0 to 2"),
        ({"layers": "3"}, {}, r"use\.layers='3'.*0 to 2"),
        ({"edit": "steer", "target": "nothing"}, {}, r"use\.target='nothing'.*\banswer\b"),
        ({"edit": "steer", "target": "corridors"}, {}, r"use\.target='corridors'.*\banswer\b"),
        ({"edit": "erase", "target": "nothing"}, {}, r"use\.target='nothing'.*\banswer\b.*\bcorridors\b"),
        ({}, {"config": replace(CONFIG, batch=1)}, r"pipeline\.batch=1\b.*\b2\b"),
        ({}, {"task": without_parser()}, r"'maze'.*has no parser"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line_before_anything_is_sampled(run, settings, changes, message, monkeypatch):
    monkeypatch.setattr(interventions, "sample_conditions", None)
    with pytest.raises(InputError, match=message) as caught:
        start(run, use(**{"edit": "swap"} | settings), **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.docs
def test_probes_at_one_step_are_read_there(tmp_path):
    """Noise is followed at all steps, answers of probes at one; what is steered has probes."""
    one = finished(tmp_path, capture=CaptureConfig(steps="1", layers="0,2", decode="last", random_weights=0))
    for edit in ("noise", "steer", "erase"):
        start(one, use(edit, steps="", layers=""))
    table = table_of(one, use("noise"))
    assert np.isfinite(table.probe[table.steps == 0, 1]).all() and np.isnan(table.probe[:, [0, 2]]).all()
    assert np.isfinite(table.cka[table.steps == 0]).all() and np.isnan(table.cka[table.steps > 0]).all()
    for edit in ("steer", "erase"):
        table = table_of(one, use(edit))
        assert set(table.step.values) <= {1, NONE} and set(table.layer.values) <= {0, 2, NONE}
    with pytest.raises(InputError, match=r"no probes were trained there.*steps \[1\].*layers \[0, 2\]"):
        start(one, use("erase", steps="0"))


@pytest.mark.slow
@pytest.mark.docs
@pytest.mark.parametrize(
    ("task", "settings"),
    [(HideConfig(frames=FRAMES, problems=60), {"problems": 12}),
     (LineConfig(frames=FRAMES, problems=40), {"problems": 4, "seeds": 6, "kind": "several"})],
    ids=["hide", "line"],
)  # fmt: skip
def test_answers_may_be_objects_or_many_regions(task, settings, tmp_path):
    found = finished(tmp_path, task)
    for edit in ("noise", "swap", "steer", "erase", "ablate"):
        start(found, use(edit, **settings))
        table = table_of(found, use(edit, **settings))
        assert table.attrs["n"] and np.isfinite(table.change).all()
        assert ("wrong regions" in table.name.values) == (edit == "swap" and isinstance(task, LineConfig))


@pytest.mark.slow
@pytest.mark.docs
def test_probes_of_single_frames_are_no_directions_for_all(tmp_path):
    found = finished(tmp_path, capture=CaptureConfig(pooling="frame", decode="last", random_weights=0))
    for edit in ("steer", "erase"):
        with pytest.raises(InputError, match=rf"probe\.pooling='frame'.*{edit}.*region or clip"):
            start(found, use(edit))


def test_problems_stay_together_and_no_batch_is_too_small():
    samples = list(range(26))
    assert [len(b) for b in whole_problems(samples, 1, 8)] == [8, 8, 10]  # 2 would have hardly a donor
    assert [len(b) for b in whole_problems(samples[:24], 3, 8)] == [6, 6, 6, 6]
    assert [len(b) for b in whole_problems(samples[:24], 12, 8)] == [12, 12]
    assert [len(b) for b in whole_problems(samples[:3], 1, 8)] == [3]
    for size, seeds in ((8, 1), (8, 3), (2, 1)):
        assert sum(whole_problems(samples[:24], seeds, size), []) == samples[:24]
