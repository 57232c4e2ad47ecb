"""From a store to samples: inputs beside them, targets that cannot be fitted, and controls by relabelling."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from cosprobe.activations import images
from cosprobe.activations.collection import StoredSamples, StoreSettings
from cosprobe.activations.dataset import difficulty_columns, load_samples, relabelled
from cosprobe.activations.pooling import Pooling
from cosprobe.activations.sampler import Sampler
from cosprobe.activations.store import ActivationStore
from cosprobe.activations.stored_tensor import StoredTensor
from cosprobe.cells import DIFFICULTY, FIRST_FRAME, INPUTS, NOISE, PROMPT, SPLIT_ORDER, X0, Cell
from cosprobe.config import CaptureConfig, PipelineConfig
from cosprobe.errors import InputError
from cosprobe.models.pipelines import sample
from cosprobe.tasks import Maze, MazeConfig, Target
from cosprobe.tasks.samples import draw_samples
from tests.examples.pipelines import save_wan, wan
from tests.examples.runs import world
from tests.examples.stores import collected

PROBE = CaptureConfig(layers="1", steps="0,2", pooling="region", frames=True, decode="0", random_weights=0)
TASK = MazeConfig(problems=20, frames=5)
DRAWN = draw_samples(TASK.build(), TASK, 0)


@pytest.fixture(scope="module")
def model():
    return wan()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "wan"
    save_wan(path)
    return PipelineConfig(path=str(path), steps=3, frames=5, batch=8)


@pytest.fixture(scope="module")
def store(model, config, tmp_path_factory):
    settings = StoreSettings.of(config, TASK, PROBE, 0)
    return collected(Sampler(model, config, TASK.build()), DRAWN, settings, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def samples(store):
    return load_samples(store)[0]


@pytest.fixture(scope="module")
def inputs(store):
    return load_samples(store)[1]


@dataclass(frozen=True, eq=False)
class Changed(StoredTensor):
    """A stored tensor with values that a function makes of those in the store."""

    change: Callable[[torch.Tensor], torch.Tensor]

    def __getitem__(self, key) -> torch.Tensor:
        return self.change(super().__getitem__(slice(None)))[key]


@dataclass(frozen=True)
class Altered(ActivationStore):
    """A store of other tensors: those named are replaced by what a function makes of them."""

    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)

    def tensors(self, *arguments, **named) -> tuple[dict[str, StoredTensor], dict]:
        found, notes = super().tensors(*arguments, **named)
        changed = {name: Changed(**vars(found[name]), change=change) for name, change in self.changes.items()}
        return found | changed, notes


def altered(stored: StoredSamples, **changes) -> StoredSamples:
    """The same samples with other tensors in the store or in the table; None: without them."""
    columns = dict(stored.table.columns)
    for name in [name for name in changes if name in columns]:
        change = changes.pop(name)
        columns[name] = columns[name] if change is None else change(columns[name])
        if change is None:
            columns.pop(name)
    store = Altered(stored.store.folder, stored.store.settings, stored.store.captured, changes)
    return StoredSamples(store, replace(stored.table, columns=columns), stored.probe)


def test_probes_are_fitted_to_layers_and_inputs_stand_beside_them(samples, inputs):
    expected = {Cell(step, 1, "cond", position) for step in (0, 2) for position in ("all", "0", "1")}
    assert set(samples.cells) == expected and len(samples.cells) == 6
    assert set(inputs) == {*INPUTS, X0}
    for name, source in inputs.items():
        changes = name in ("embed", "x_t", "x0_latent")
        static = name in (PROMPT, DIFFICULTY)
        assert source.whole.shape[:3] == (20, 2 if changes else 1, 1 if static else 2)
        if static:
            assert source.region is None and source.whole.shape[3] == 1
        else:
            assert source.region.shape[:4] == (*source.whole.shape[:3], 4) and source.whole.shape[3] == 16


def test_noise_is_the_latent_of_the_first_step_in_the_same_regions(inputs):
    noise, latent = inputs[NOISE], inputs["x_t"]
    for part in ("whole", "region"):
        assert torch.equal(getattr(noise, part)[:, 0], getattr(latent, part)[:, 0])
        assert not torch.equal(getattr(noise, part)[:, 0], getattr(latent, part)[:, 1])
    assert noise.region.shape[-1] == 4  # latent channels, not padded to the width of a block
    assert noise.region[:].std() > 0.1


def test_first_frame_and_prompt_are_what_the_pipeline_was_given(model, config, inputs):
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
    boxes, size = [p.regions for p in problems], tuple(latent.shape[2:])
    by_token = latent[:, 4:].flatten(2).transpose(1, 2)
    for part, pooling in (("region", Pooling("region", boxes=boxes)), ("whole", Pooling("grid"))):
        expected = pooling.by_frame(by_token, size)
        torch.testing.assert_close(getattr(inputs[FIRST_FRAME], part)[8:16, 0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(inputs[PROMPT].whole[8:16].flatten(1), tokens.float().mean(1), atol=1e-5, rtol=1e-5)


def test_the_difficulty_is_an_input_where_there_is_any(samples, inputs, store):
    assert torch.equal(inputs[DIFFICULTY].whole[:, 0, 0, 0], difficulty_columns(samples))
    assert set(samples.difficulty) == {"rooms", "length", "reachable"}
    none = altered(store, **{f"difficulty.{name}": None for name in samples.difficulty})
    bare, others, _ = load_samples(none)
    assert set(others) == set(inputs) - {DIFFICULTY}
    assert torch.equal(bare.features[:], samples.features[:]) and bare.cells == samples.cells


# targets that cannot be fitted


def reasons(samples) -> dict[str, str]:
    """Per target that is left out, what is said of it."""
    names = [target.name for target in TASK.build().targets]
    return {next(name for name in names if repr(name) in line): line for line in samples.left_out}


def test_a_target_that_a_split_lacks_is_left_out_and_named(store):
    split = torch.from_numpy(load_samples(store)[0].split == "validation")
    without = altered(
        store, **{"label.answer": lambda y: y.masked_fill(split, -1), "label.corridors": lambda y: y * 0 - 1}
    )
    found, _, _ = load_samples(without)
    said = reasons(found)
    lacking = {name: [split for split in SPLIT_ORDER if split in line] for name, line in said.items()}
    assert lacking["answer"] == ["validation"]
    assert lacking["corridors"] == ["train", "validation", "test"]
    names = {target.name for target in found.targets}
    assert not names & {"answer", "answer_relabelled", "corridors"}
    assert {"start", "length", "control"} <= names and not {"start", "length", "control"} & set(said)


def test_a_store_whose_settings_name_other_layers_than_its_shards_is_refused(store):
    other = replace(store.store, captured=store.store.captured | {"layers": "2"})
    with pytest.raises(InputError, match="damaged.*layers"):
        load_samples(replace(store, store=other, probe=replace(store.probe, layers="2")))


def test_a_target_whose_classes_are_never_trained_is_left_out(store, samples):
    each = torch.arange(20)
    test = torch.from_numpy(samples.split == "test")
    found, _, _ = load_samples(altered(store, **{"label.start": lambda y: torch.where(test, 8, each % 4)}))
    assert re.search(r"no class of test\b", reasons(found)["start"])
    with pytest.raises(InputError, match="label 'each'|target 'each': no class of validation"):
        samples.with_label("each", list(range(20)))


def test_a_target_of_one_class_is_left_out_and_a_model_answer_says_whose_it_is(store):
    train = torch.from_numpy(load_samples(store)[0].split == "train")
    same = altered(
        store,
        model_answer=lambda y: torch.where(train, 2, torch.arange(len(y)) % 4),
        **{"label.length": lambda y: torch.where(train & (y >= 0), 1, y)},
    )
    found, _, _ = load_samples(same)
    said = reasons(found)
    assert re.search(r"the model\b.*\b1 class\b.*\b2\b", said["model_answer"])
    assert re.search(r"\b1 class\b.*\b2\b", said["length"]) and "the model" not in said["length"]
    assert not {target.name for target in found.targets} & {"model_answer", "model_answer_relabelled", "length"}
    two = altered(store, model_answer=lambda y: torch.arange(len(y)) // 2 % 4)
    found, _, _ = load_samples(two)
    assert "model_answer" not in reasons(found)
    assert "model_answer" in {target.name for target in found.targets}


def test_a_store_in_which_the_model_answers_nothing_has_all_other_targets(store):
    found, _, _ = load_samples(altered(store, model_answer=lambda y: y * 0 - 1))
    assert list(reasons(found)) == ["model_answer"]
    assert [t.name for t in found.targets if t.role != "relabelled"] == [
        t.name for t in TASK.build().targets if t.name != "model_answer"
    ]


def test_seeds_and_labels_come_along(samples):
    drawn = DRAWN
    assert samples.replica.tolist() == [s.replica for s in drawn]
    assert samples.difficulty["rooms"].tolist() == [s.problem.difficulty["rooms"] for s in drawn]
    assert set(samples.scores) == {"x0_scores", "x0_answer", "final", "solved"}
    early, late = np.isnan(samples.scores["x0_scores"]).all(axis=2)[:, [0, 2]].T
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
        "model_answer": torch.where(answer < 0, torch.arange(300) % 5 - 1, -1),
        "start": torch.tensor([p.labels["start"] for p in problems]),
    }


def test_a_relabelling_is_a_function_of_the_attribute_whatever_the_split(mazes):
    controls, found = relabelled(Maze().targets, mazes)
    assert [(t.name, t.role, t.form, t.classes) for t in controls] == [
        ("answer_relabelled", "relabelled", "candidate", 4),
        ("model_answer_relabelled", "relabelled", "candidate", 4),
    ]
    assert [t.kinds for t in controls] == [("one_exit",), ("choice",)]
    for name in ("answer", "model_answer"):
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


# one more label, and features for other libraries


@pytest.fixture(scope="module")
def planted():
    return world()[0]


def test_one_more_label_is_a_target_with_names(planted):
    colours = np.array(["red", "green", "blue"])[np.arange(len(planted)) % 3]
    found = planted.with_label("colour", colours, "perception")
    target = found.target("colour")
    assert (target.form, target.classes, target.role) == ("problem", 3, "perception")
    assert target.names == ("blue", "green", "red") and target.kinds == ("one_exit", "choice")
    assert np.array(target.names)[found.labels["colour"]].tolist() == colours.tolist()
    assert [t.name for t in found.targets] == [*(t.name for t in planted.targets[:5]), "colour", *(
        t.name for t in planted.targets[5:])]  # fmt: skip
    for name, label in planted.labels.items():
        assert torch.equal(found.labels[name], label)
    assert "colour" not in planted.labels


def test_an_answer_of_ones_own_gets_its_control(planted):
    found = planted.with_label("side", np.arange(len(planted)) % 2)
    control = found.target("side_relabelled")
    assert control.role == "relabelled" and control.classes == 2
    pairs = zip(found.labels["start"].tolist(), found.labels["side_relabelled"].tolist(), strict=True)
    assert len(set(pairs)) == 6  # a function of what is visible


@pytest.mark.parametrize(
    ("name", "values", "role", "message"),
    [
        ("start", [0, 1], "answer", r"label 'start': these samples have it already"),
        ("side", [0, 1] * 200, "colour", r"role='colour': expected one of answer, model_answer"),
        ("side", [0] * 2, "answer", r"labels 'side': 2 entries, expected 400, one for each sample"),
        ("side", [0] * 192 + [1] * 208, "answer", r"target 'side': it has 1 class in the training samples"),
    ],
)
def test_labels_that_do_not_fit_are_refused(planted, name, values, role, message):
    with pytest.raises(InputError, match=message):
        planted.with_label(name, values, role)


def test_the_labelled_array_has_every_feature_under_its_name(planted):
    found = planted.to_xarray()
    assert found.dims == ("sample", "step", "layer", "branch", "position", "region", "channel")
    for i, cell in enumerate(planted.cells):
        here = found.sel(step=cell.step, layer=cell.layer, branch=cell.branch, position=cell.position)
        np.testing.assert_array_equal(here, planted.features[:, i])
    assert found.split.values.tolist() == planted.split.tolist() and found.key.values.tolist() == planted.keys.tolist()
    assert found.label_answer.values.tolist() == planted.labels["answer"].tolist()
    half = replace(planted, features=planted.features.bfloat16()).to_xarray()  # numpy has no bfloat16
    assert half.dtype == np.float32
    with pytest.raises(InputError, match="8 cells: expected every step with every layer"):
        planted.at(slice(0, 8)).to_xarray()


def test_scikit_learn_finds_what_was_planted(planted):
    """Steps 0 to 2: the answer is there from layer 1 on, better from step to step; layer 0 has nothing."""
    accuracy = {}
    for layer in (0, 2):
        X, y, groups = planted.to_sklearn("answer", step=2, layer=layer)
        assert X.shape == (96, 4 * 16) and y.shape == groups.shape == (96,)  # half of 192 samples are of this kind
        model = LogisticRegression(C=0.1, max_iter=500).fit(X, y)
        accuracy[layer] = model.score(*planted.to_sklearn("answer", step=2, layer=layer, split="test")[:2])
    assert accuracy[2] > 0.45 > 0.4 > accuracy[0]
    rows = planted.to_sklearn("start", step=0, layer=1, split="validation")
    part = planted.subset("validation")
    np.testing.assert_array_equal(rows.X, part.features[:, 1].flatten(1))
    np.testing.assert_array_equal(rows.y, part.labels["start"])
    np.testing.assert_array_equal(rows.groups, part.keys)


def test_region_labels_are_a_row_for_each_region(samples):
    rows = samples.to_sklearn("corridors", step=2, layer=1, position="1", split="test")
    part, cell = samples.subset("test"), samples.cells.index(Cell(2, 1, "cond", "1"))
    np.testing.assert_array_equal(rows.X, part.features[:, cell].flatten(0, 1))
    np.testing.assert_array_equal(rows.y, part.labels["corridors"].flatten())
    assert rows.groups.tolist() == [key for key in part.keys for _ in range(4)]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"step": 5}, r"step=5: expected one of 0, 2"),
        ({"layer": 3}, r"layer=3: expected one of 1"),
        ({"position": None}, r"position: there are all, 0, 1; expected one of them"),
        ({"position": "7"}, r"position='7': expected one of all, 0, 1"),
        ({"split": "model"}, r"split='model'"),
        ({"target": "colour"}, r"target='colour': expected one of answer"),
    ],
)
def test_cells_that_are_not_there_are_refused(samples, cell, message):
    with pytest.raises(InputError, match=message):
        samples.to_sklearn(**{"target": "start", "step": 0, "layer": 1, "position": "all"} | cell)
