"""From a store to samples: sources of the whole run as cells of their own, and controls by relabelling."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cosprobe.collect import collect, draw_samples, images, settings
from cosprobe.nuisance import nuisance_rows, own_blocks
from cosprobe.pipelines import PipelineConfig, sample
from cosprobe.pooling import Pooling
from cosprobe.samples import load_samples, relabelled, with_fixed
from cosprobe.tasks import Maze, MazeConfig, Target
from cosprobe.types import EVERY_STEP, FIRST_FRAME, FIXED, NOISE, NUISANCE, PROMPT, Cell
from tests.ddp_fit import planted
from tests.tiny import wan

PROBE = SimpleNamespace(layers="1", steps="0,2", pooling="region", frames=True, decode="0", randomised=0)
TASK = MazeConfig(problems=20, frames=5)
DRAWN = draw_samples(TASK.build(), TASK, 0)


@pytest.fixture(scope="module")
def model():
    return wan()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "wan"
    wan().save_pretrained(path)
    return PipelineConfig(path=str(path), steps=3, frames=5, batch=8)


@pytest.fixture(scope="module")
def samples(model, config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "store"
    store = collect(model, config, TASK.build(), PROBE, DRAWN, settings(config, TASK, PROBE, 0), folder)
    return load_samples(store, TASK.build())[0]


def column(samples, step: int, site: str, place: str = "all") -> torch.Tensor:
    return samples.features[:, samples.cells.index(Cell(step, site, "cond", place))]


def test_every_fixed_source_has_one_cell_per_place(samples):
    fixed = [cell for cell in samples.cells if cell.step == EVERY_STEP]
    expected = {Cell(EVERY_STEP, site, "cond", place) for site in FIXED for place in ("all", "0", "1")}
    assert set(fixed) == expected
    assert len(fixed) == len(expected) == 12
    assert {cell.site for cell in samples.cells if cell.step != EVERY_STEP} == {"1", "embed", "x_t", "x0_latent"}


def test_noise_is_the_latent_of_the_first_step_in_the_same_regions(samples):
    for place in ("all", "0", "1"):
        first = column(samples, 0, "x_t", place)
        assert torch.equal(column(samples, EVERY_STEP, NOISE, place), first)
        assert not torch.equal(first, column(samples, 2, "x_t", place))
    assert column(samples, EVERY_STEP, NOISE)[..., :4].abs().min() > 0
    assert (column(samples, EVERY_STEP, NOISE)[..., 4:] == 0).all()  # four latent channels


def test_first_frame_and_prompt_are_what_the_pipeline_was_given(model, config, samples):
    drawn = DRAWN[8:16]
    problems = [s.problem for s in drawn]
    arguments = (images(TASK.build(), problems), [p.prompt for p in problems], [s.seed for s in drawn])
    seen = []

    def spy(module, args, kwargs):
        seen.append((kwargs["hidden_states"], kwargs["encoder_hidden_states"]))

    handle = model.transformer.register_forward_pre_hook(spy, with_kwargs=True)
    try:
        sample(model, config, *arguments)
    finally:
        handle.remove()
    latent, tokens = seen[0]
    boxes = [p.regions for p in problems]
    frames = Pooling("region", True, boxes)(latent[:, 4:].flatten(2).transpose(1, 2), tuple(latent.shape[2:]))
    for i, place in enumerate(("all", "0", "1")):
        found = column(samples, EVERY_STEP, FIRST_FRAME, place)[8:16]
        torch.testing.assert_close(found[..., :8], frames[:, i], atol=1e-5, rtol=1e-5)
        assert (found[..., 8:] == 0).all()
    expected = own_blocks(tokens.float().mean(1), 4, 24)
    for place in ("all", "0", "1"):
        found = column(samples, EVERY_STEP, PROMPT, place)[8:16]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert expected.abs().amax(dim=(0, 2)).min() > 0


def test_prompt_and_nuisances_have_columns_of_their_own_in_every_region(samples):
    for site in (PROMPT, NUISANCE):
        rows = column(samples, EVERY_STEP, site)
        for region in range(4):
            block = slice(6 * region, 6 * region + 6)  # 24 channels over 4 regions
            others = [c for c in range(24) if c not in range(24)[block]]
            assert (rows[:, region, others] == 0).all()
            assert rows[:, region, block].any()
            assert torch.equal(rows[:, region, block], rows[:, 0, :6])
    assert torch.equal(column(samples, EVERY_STEP, NUISANCE), nuisance_rows(samples, 24))
    assert set(samples.difficulty) == {"rooms", "length", "reachable"}


def test_nuisance_cells_need_nuisances_and_nothing_else_changes(samples):
    source = planted(60)
    noise = torch.randn(60, 1, 3, 4)
    wider = with_fixed(source, {NOISE: noise}, "cond", ["all"])
    assert wider.cells == (*source.cells, Cell(EVERY_STEP, NOISE, "cond", "all"))
    assert torch.equal(wider.features[:, :6], source.features)
    assert torch.equal(wider.features[:, 6, :, :4], noise[:, 0])
    assert (wider.features[:, 6, :, 4:] == 0).all()
    low = with_fixed(type(source)(**vars(source) | {"features": source.features.bfloat16()}), {}, "cond", ["all"])
    assert low.features.dtype == torch.bfloat16
    assert low.cells == source.cells


def test_seeds_and_labels_come_along(samples):
    drawn = DRAWN
    assert samples.replica.tolist() == [s.replica for s in drawn]
    assert samples.difficulty["rooms"].tolist() == [s.problem.difficulty["rooms"] for s in drawn]
    assert set(samples.scores) == {"x0_readout", "final", "solved"}
    early, late = np.isnan(samples.scores["x0_readout"]).all(axis=2)[:, [0, 2]].T
    assert early.tolist() == (samples.split == "train").tolist()  # decoded for validation and test only
    assert late.all()  # step 2 is not among `probe.decode`


# controls by relabelling


@pytest.fixture(scope="module")
def mazes() -> dict[str, torch.Tensor]:
    """Labels of 300 mazes, train and test."""
    task = Maze()
    problems = task.problems("train", 200) + task.problems("test", 100)
    answer = torch.tensor([p.labels.get("answer", -1) for p in problems])
    return {
        "answer": answer,
        "choice": torch.where(answer < 0, torch.arange(300) % 5 - 1, -1),
        "start": torch.tensor([p.labels["start"] for p in problems]),
    }


def test_a_relabelling_is_a_function_of_the_attribute_whatever_the_split(mazes):
    controls, found = relabelled(Maze().targets, mazes)
    assert [(t.name, t.role, t.form, t.classes) for t in controls] == [
        ("answer_relabelled", "relabelled", "candidate", 4),
        ("choice_relabelled", "relabelled", "candidate", 4),
    ]
    assert [t.kinds for t in controls] == [("one_exit",), ("choice",)]
    for name in ("answer", "choice"):
        labels = found[f"{name}_relabelled"]
        pairs = {(int(a), int(b)) for a, b in zip(mazes["start"], labels, strict=True) if b >= 0}
        assert len(pairs) == len({attribute for attribute, _ in pairs})  # one label for each attribute
        assert {label for _, label in pairs} == {0, 1, 2, 3}
        assert torch.equal(labels < 0, mazes[name] < 0)
        share = labels[labels >= 0].bincount(minlength=4) / (labels >= 0).sum()
        assert share.max() < 0.4
        assert share.min() > 0.1
        half = {key: value[200:] for key, value in mazes.items()}  # the test split alone: the same table
        assert torch.equal(relabelled(Maze().targets, half)[1][f"{name}_relabelled"], labels[200:])
    both = [{int(a): int(b) for a, b in zip(mazes["start"], y, strict=True) if b >= 0} for y in found.values()]
    assert both[0] != both[1]  # two controls, two tables


def test_samples_without_the_attribute_have_no_control(mazes):
    start = torch.where(torch.arange(300) < 10, -1, mazes["start"])
    _, found = relabelled(Maze().targets, mazes | {"start": start})
    assert (found["answer_relabelled"][:10] == -1).all()
    assert torch.equal(found["answer_relabelled"][10:] < 0, mazes["answer"][10:] < 0)


def test_without_an_attribute_or_a_headline_there_is_no_control(mazes):
    assert relabelled([t for t in Maze().targets if t.name != "start"], mazes) == ((), {})
    doors = Target("corridors", 2, "region", "perception", ("one_exit",))
    assert relabelled([Maze().targets[0], doors], mazes) == ((), {})
    assert relabelled([t for t in Maze().targets if t.role == "perception"], mazes) == ((), {})


def test_samples_of_a_store_carry_their_controls(samples):
    names = [t.name for t in samples.targets if t.role == "relabelled"]
    assert "answer_relabelled" in names
    for name in names:
        plain = samples.labels[name.removesuffix("_relabelled")]
        assert torch.equal(samples.labels[name] < 0, plain < 0)
    _, again = relabelled(samples.targets, samples.labels)
    assert torch.equal(samples.labels["answer_relabelled"], again["answer_relabelled"])
