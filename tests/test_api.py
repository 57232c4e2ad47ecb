"""From one's own images and labels to a map. Oracles: planted signals, scikit-learn on the same rows, `train.py`."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from cosprobe import api
from cosprobe.activations import Sampler, StoreSettings, load_samples
from cosprobe.api import collect, evaluate, fit_probes, open_activations, plot_map
from cosprobe.config import CaptureConfig, PipelineConfig, ProbeConfig, TrainerConfig
from cosprobe.early_exit import Policy, attach
from cosprobe.errors import InputError
from cosprobe.evaluation import build_grid, read_inputs
from cosprobe.evaluation import evaluate as evaluate_probes
from cosprobe.models import load_pipeline, pipeline_fingerprint, sample
from cosprobe.probes import fit, load_probes
from cosprobe.tasks import OwnImages, SelectConfig, draw_samples, noise_seed
from cosprobe.tasks.own_images import OWN_IMAGES
from tests.examples.pipelines import PROMPT, save_wan, wan
from tests.examples.stores import collected

CONFIG = PipelineConfig(steps=2, guidance=1.0, frames=5, prompt_tokens=32, batch=16)
COLOURS = {"red": (230, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 230)}
COUNT = 60


def pictures() -> tuple[list[np.ndarray], list[str], list[int]]:
    """Noisy images of one colour; its name; and a label that has nothing to do with it."""
    rng = np.random.default_rng(3)
    names = [list(COLOURS)[i % 3] for i in range(COUNT)]
    pixels = [np.clip(np.array(COLOURS[n]) + rng.normal(scale=25, size=(32, 32, 3)), 0, 255) for n in names]
    return [p.astype(np.uint8) for p in pixels], names, rng.integers(0, 2, COUNT).tolist()


IMAGES, NAMES, COINS = pictures()
PROMPTS = [PROMPT] * COUNT


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "wan"
    save_wan(folder)
    return load_pipeline(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("activations")


PROBLEMS = [
    {"image": image, "prompt": prompt, "colour": name, "coin": coin}
    for image, prompt, name, coin in zip(IMAGES, PROMPTS, NAMES, COINS, strict=True)
]
ONLY = {"images": None, "prompts": (), "labels": None}


def own(pipeline, folder, **changes):
    given = {"images": IMAGES, "prompts": PROMPTS, "labels": {"colour": NAMES, "coin": COINS}, "config": CONFIG,
             "roles": {"colour": "perception", "coin": "nuisance"}, "folder": folder}  # fmt: skip
    return collect(pipeline, **(given | changes))


@pytest.fixture(scope="module")
def data(pipeline, place):
    return own(pipeline, place)


@pytest.fixture(scope="module")
def bank(data):
    return fit_probes(data, kind="newton")


@pytest.fixture(scope="module")
def grid(bank, data):
    return evaluate(bank, data)


def test_labels_stay_with_their_images(data):
    assert sorted(data.order) == list(range(COUNT)) and data.order.tolist() != list(range(COUNT))
    target = data.samples.target("colour")
    assert target.names == ("blue", "green", "red")
    found = [target.names[i] for i in data.samples.labels["colour"].tolist()]
    assert found == [NAMES[i] for i in data.order]
    assert data.samples.labels["coin"].tolist() == [COINS[i] for i in data.order]
    array = data.to_xarray()
    assert [array.label_colour.attrs["classes"][i] for i in array.label_colour.values] == found
    assert array.image.values.tolist() == data.order.tolist()
    said = repr(data)
    assert "60 samples of 60 images" in said and "colour (perception), 3 classes: blue, green, red" in said
    assert str(data.stored.store.folder) in data._repr_html_()


@pytest.fixture(scope="module")
def seen(place):
    """The same images, larger, through the model in the package, which passes on what it sees."""
    large = [image.repeat(2, axis=0).repeat(2, axis=1) for image in IMAGES]
    return own(load_pipeline(), place, images=large, layers="2,6")


@pytest.mark.slow
def test_probes_find_what_is_there_and_nothing_else(seen):
    grid = evaluate(fit_probes(seen), seen)
    assert grid.best("colour").accuracy > 0.9 and grid.best("colour").p <= 0.05
    assert (grid.dataset.p_evidence.sel(target="coin") > 0.05).all()
    assert np.isnan(grid.dataset.attrs["model_accuracy"]) and np.isnan(grid.dataset.agreement).all()
    table = grid.to_dataframe()
    assert len(table) == 2 * 2 * 2 and {"accuracy", "baseline uniform"} <= set(table)


@pytest.mark.slow
def test_an_answer_that_the_image_shows_is_no_evidence(seen):
    """Every input is measured, and is as right as the probe: without inputs this would look like a finding."""
    answer = seen.with_label("hue", NAMES)
    grid = evaluate(fit_probes(answer), answer)
    here = grid.dataset.sel(target="hue")
    assert float(here.accuracy.max()) > 0.9 and not (here.p_evidence <= 0.05).any()
    assert str(here.not_measured.values) == "" and (here.baseline_accuracy.sel(baseline="first_frame") > 0.9).all()
    assert "hue_relabelled" in grid.targets  # its control, from the perception label


def test_problems_are_images_prompts_and_labels(pipeline, place, data):
    again = own(pipeline, place, problems=PROBLEMS, **ONLY)
    assert again.stored.store.folder == data.stored.store.folder
    for name in ("colour", "coin"):
        assert torch.equal(again.samples.labels[name], data.samples.labels[name])
    assert again.samples.target("coin").role == "nuisance" and again.order.tolist() == data.order.tolist()


def test_the_same_call_uses_what_is_there_with_other_labels(pipeline, place, data, monkeypatch):
    @functools.wraps(type(pipeline).__call__)
    def no_sampling(self, **arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(type(pipeline), "__call__", no_sampling)
    again = own(pipeline, place, labels=COINS, roles="answer")
    assert torch.equal(again.samples.features[:], data.samples.features[:])
    assert [t.name for t in again.samples.targets] == ["label"]
    assert again.stored.store.folder == data.stored.store.folder
    fewer = own(pipeline, place, layers="1,2", steps="1")  # a part of what is there
    np.testing.assert_array_equal(fewer.to_xarray(), data.to_xarray().sel(layer=[1, 2], step=[1]))
    with pytest.raises(ZeroDivisionError):
        own(pipeline, place, seeds=2)


def test_with_more_images_only_these_are_sampled(pipeline, tmp_path, data, monkeypatch):
    few = {"images": IMAGES[:40], "prompts": PROMPTS[:40], "labels": None, "roles": "answer"}
    first = own(pipeline, tmp_path, **few)
    sampled = []
    original = type(pipeline).__call__

    @functools.wraps(original)
    def counting(self, **arguments):
        sampled.extend(arguments["prompt"])
        return original(self, **arguments)

    monkeypatch.setattr(type(pipeline), "__call__", counting)
    second = own(pipeline, tmp_path)
    assert len(sampled) == 20 and len(second) == 60
    for i, image in enumerate(first.order.tolist()):
        at = second.order.tolist().index(image)
        assert torch.equal(first.samples.features[i], second.samples.features[at])
    opened = open_activations(second.stored.store.folder)
    assert torch.equal(opened.samples.features[:], second.samples.features[:])


def test_a_folder_of_several_sets_of_images_is_not_guessed_at(pipeline, tmp_path):
    for part in (slice(0, 30), slice(30, 60)):
        given = {"images": IMAGES[part], "prompts": PROMPTS[part], "labels": None, "roles": "answer"}
        folder = own(pipeline, tmp_path, layers="0", steps="0", **given).stored.store.folder
    with pytest.raises(InputError, match="several sets of samples"):
        open_activations(folder)
    with pytest.raises(InputError, match=rf"folder=.*expected one of .*{folder.parent.name}"):
        open_activations(tmp_path)


def test_images_of_any_kind_are_the_same_images(pipeline, place, data):
    tensors = torch.from_numpy(np.stack(IMAGES)).permute(0, 3, 1, 2).float() / 255
    assert own(pipeline, place, images=tensors).stored.table.names == data.stored.table.names


def test_scikit_learn_on_the_rows_gives_the_same_accuracy(data, bank, grid):
    for i, cell in list(enumerate(bank.cells))[::2]:
        X, y, groups = data.to_sklearn("colour", step=cell.step, layer=cell.layer)
        assert len(set(groups)) == len(X) == len(y)
        mean, std = X.mean(0).reshape(16, -1).mean(0), X.reshape(len(X) * 16, -1).std(0)
        x, test = ((rows.reshape(len(rows), 16, -1) - mean) / std for rows in
                   (X, data.to_sklearn("colour", step=cell.step, layer=cell.layer, split="test").X))  # fmt: skip
        penalty = float(bank.penalties["colour"][i])
        model = LogisticRegression(C=1 / (len(X) * penalty), max_iter=5000, tol=1e-8).fit(x.reshape(len(x), -1), y)
        truth = data.to_sklearn("colour", step=cell.step, layer=cell.layer, split="test").y
        score = model.score(test.reshape(len(test), -1), truth)
        assert float(grid.at("colour", cell).accuracy) == pytest.approx(score, abs=1e-9)


def test_one_more_label_is_its_own_fit(data, grid):
    alone = data.with_label("second", NAMES, "perception")
    both = evaluate(fit_probes(alone, kind="newton"), alone).dataset
    for name in ("accuracy", "lower", "p_evidence", "skill"):
        first, second = (both[name].sel(target=t).values for t in ("colour", "second"))
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(first, grid.dataset[name].sel(target="colour").values)


@pytest.mark.slow
def test_own_labels_equal_to_those_of_the_task_give_the_grid_of_train(pipeline, tmp_path):
    task_config = SelectConfig(problems=40, frames=5)
    task, probe = task_config.build(), ProbeConfig(layers="1", kind="newton", random_weights=0)
    config, trainer = replace(CONFIG, path=pipeline.name_or_path), TrainerConfig(enable_progress_bar=False)
    drawn = draw_samples(task, task_config, 0)
    settings = StoreSettings.of(config, task_config, probe, 0)
    stored = collected(Sampler(pipeline, config, task, trainer), drawn, settings, tmp_path)
    samples, inputs, experts = load_samples(stored)
    bank = fit(samples, probe, trainer, tmp_path, 0)
    readings = read_inputs(samples, inputs, probe.kind, probe.penalties, 0)
    expected = build_grid(evaluate_probes(samples, experts, bank, readings)).dataset

    data = open_activations(tmp_path)
    assert [t.name for t in data.samples.targets] == [t.name for t in samples.targets]
    mine = data.with_label("mine", [s.problem.labels["box"] for s in drawn], "perception")
    found = evaluate(fit_probes(mine, kind="newton"), mine).dataset
    names = expected.target.values.tolist()
    for name in ("accuracy", "skill", "p_evidence", "reference"):
        np.testing.assert_array_equal(found[name].sel(target=names), expected[name])
        np.testing.assert_array_equal(found[name].sel(target="mine"), expected[name].sel(target="box"))


@pytest.mark.slow
def test_few_images_are_cross_fitted(pipeline, place):
    few = {"images": IMAGES[:9], "prompts": PROMPTS[:9], "labels": {"colour": NAMES[:9]}, "roles": "perception"}
    with pytest.raises(InputError, match=r"of 9 are in the split.*folds=5"):
        own(pipeline, place, **few)
    with pytest.raises(InputError, match="folds=10: 9 "):
        own(pipeline, place, folds=10, **few)
    with pytest.raises(InputError, match="folds=2: .*3 to 50"):
        own(pipeline, place, folds=2, **few)
    data = own(pipeline, place, folds=3, **few)
    bank = fit_probes(data, kind="ridge")
    grid = evaluate(bank, data)
    assert bank.folds == grid.folds == 3 and int(grid.dataset.n_test.sel(target="colour")) == 9
    whole = own(pipeline, place, labels={"colour": NAMES}, roles="perception")
    with pytest.raises(InputError, match="3 folds.* 0;"):
        evaluate(bank, whole)


def test_probes_are_saved_and_read(bank, data, grid, tmp_path):
    bank.save(tmp_path / "probes")
    again = load_probes(tmp_path / "probes")
    assert again.target("colour").names == ("blue", "green", "red") and again.store == bank.store
    np.testing.assert_array_equal(evaluate(again, data).dataset.accuracy, grid.dataset.accuracy)


def test_a_reader_reads_the_probes_of_own_labels(bank, data, pipeline):
    """With a policy of one's own; `probe.py use=early` calibrates those of tasks."""
    task, cells = OwnImages(np.stack(IMAGES), PROMPTS, CONFIG.frames, api.BOXES), (bank.cells[0], bank.cells[-1])
    problems = list(task.all[:2])
    policy = Policy("colour", OWN_IMAGES, OWN_IMAGES, "truth", cells, float("inf"), 0.05, 0.95, 0, 0, 0, 1.0)
    seeds = [noise_seed(problem, 0, 0) for problem in problems]
    with attach(bank, pipeline, problems, policy) as reader:
        sample(pipeline, CONFIG, IMAGES[:2], PROMPTS[:2], seeds)
    rows = [data.order.tolist().index(i) for i in (0, 1)]
    proba = bank.probabilities(data.samples.features[rows], "colour")
    expected = [tuple(proba[bank.cells.index(cell)].argmax(-1).tolist()) for cell in cells]
    assert [reading.prediction for reading in reader.readings] == expected


def test_probes_of_other_classes_or_cells_are_refused(bank, data, pipeline, place):
    with pytest.raises(InputError, match=r"^label 'colour': the probes were fitted to other classes"):
        evaluate(bank, own(pipeline, place, labels={"colour": COINS, "coin": COINS}, roles="nuisance"))
    with pytest.raises(InputError, match=r"^target='coin': expected one of colour"):
        evaluate(bank, own(pipeline, place, labels={"colour": NAMES}, roles="perception"))
    with pytest.raises(InputError, match=r"^these probes have \d+ cells, and the activations \d+ others"):
        evaluate(bank.select(bank.cells[:2]), data)


def test_activations_of_another_model_are_refused(bank, data):
    """Probes read the numbers of another model without an error, and what they say means nothing."""
    stored = data.stored
    model = stored.settings.model | {"transformer": "beef", "adapters": "feed"}
    settings = stored.store.settings | {"model": model}
    other = replace(data, stored=replace(stored, store=replace(stored.store, settings=settings)))
    named = rf"^this bank.*another model.*{stored.store.folder}.*adapters \(null .*feed.*transformer \(.*beef"
    with pytest.raises(InputError, match=named) as caught:
        evaluate(bank, other)
    assert stored.settings.model["transformer"] in str(caught.value) and "vae" not in str(caught.value)


def test_several_seeds_of_an_image_share_label_and_split(pipeline, tmp_path):
    data = own(pipeline, tmp_path, images=IMAGES[:30], prompts=PROMPTS[:30], labels=NAMES[:30], roles="perception",
               layers="1", seeds=2)  # fmt: skip
    assert len(data) == 60 and data.order[::2].tolist() == data.order[1::2].tolist()
    assert data.samples.keys[::2].tolist() == data.samples.keys[1::2].tolist()
    assert not torch.equal(data.samples.features[0], data.samples.features[1])


def test_boxes_are_regions(pipeline, tmp_path):
    halves = [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
    data = own(pipeline, tmp_path, layers="1", steps="0", boxes=halves)
    assert data.to_xarray().sizes["region"] == 2


def test_a_map_is_a_picture(grid):
    figure = plot_map(grid, "colour")
    assert figure._repr_png_().startswith(b"\x89PNG") and len(figure.axes) == 2
    assert plot_map(grid)._repr_png_()
    with pytest.raises(InputError, match="target='hue': expected one of colour, coin"):
        plot_map(grid, "hue")


def test_a_pipeline_without_a_folder_is_known_by_its_weights(pipeline):
    here, same = wan(), wan()
    assert pipeline_fingerprint(here) == pipeline_fingerprint(same)
    with torch.no_grad():
        same.transformer.blocks[1].ffn.net[2].weight[0, 0] += 1
    assert pipeline_fingerprint(here) != pipeline_fingerprint(same)
    loaded = pipeline_fingerprint(pipeline)
    assert (
        loaded
        == StoreSettings.of(replace(CONFIG, path=pipeline.name_or_path), SelectConfig(), CaptureConfig(), 0).model
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"colour": NAMES[:9]}}, r"labels 'colour': 9 entries, expected 60, one for each image"),
        ({"labels": {"colour": ["red"] * 60}}, r"labels 'colour': one class only, 'red'"),
        ({"labels": {"colour": [float("nan"), *COINS[1:]]}}, r"labels 'colour': nan at index 0"),
        ({"roles": "shape"}, r"role='shape': expected one of answer, model_answer"),
        ({"roles": {"shape": "answer"}}, r"roles: 'shape' is not a label; expected one of colour, coin"),
        ({"prompts": PROMPTS[:9]}, r"prompts: 9 entries for 60 images"),
        ({"prompts": PROMPT}, r"prompts='draw.*expected a list"),
        ({"images": [*IMAGES[:59], IMAGES[59][:16]]}, r"images\[59\]: 16 x 32 pixels"),
        ({"images": np.stack(IMAGES).astype(float)}, r"images: values from \d+ to 2\d\d, expected floats from 0 to 1"),
        ({"images": [i[:, :20] for i in IMAGES]}, r"images: 32 x 20 pixels, expected multiples of 16"),
        (
            {"images": IMAGES[:3], "prompts": PROMPTS[:3], "labels": None, "roles": "answer"},
            r"images: [01] of 3 are in",
        ),
        ({"layers": "9"}, r"probe\.layers='9': expected indices from 0 to 2"),
        ({"seeds": 0}, r"seeds=0: expected at least 1"),
        ({"groups": [1, 2]}, r"groups: 2 entries for 60 images"),
        ({"problems": [{"image": IMAGES[0], "prompt": PROMPT}]}, r"problems: given with images"),
        ({"images": None}, r"images: none; expected"),
        (ONLY | {"problems": [{"image": IMAGES[0], "hue": 1}]}, r"problems\[0\]: has no 'prompt'"),
        (ONLY | {"problems": [PROBLEMS[0], PROBLEMS[1] | {"hue": 1}]}, r"problems\[1\]: 'hue' is in some"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_sampled(pipeline, tmp_path, changes, message):
    given = {"roles": "perception"} | changes
    with pytest.raises(InputError, match=rf"^{message}") as caught:
        own(pipeline, tmp_path / "none", **given)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("shard-*"))


@pytest.mark.parametrize(
    "held", ["model_index.json", "notes.txt", "transformer/config.json", "logistic/probes/bank.json"]
)
def test_a_folder_of_something_else_is_refused_and_stays_as_it_is(pipeline, tmp_path, held):
    path = tmp_path / "wan" / held
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(InputError, match=rf"^folder='.*/wan': holds '{held.split('/')[0]}'") as caught:
        own(pipeline, tmp_path / "wan")
    assert "\n" not in str(caught.value)
    assert [file for file in (tmp_path / "wan").rglob("*") if file.is_file()] == [path]


def test_hidden_files_and_run_folders_beside_the_activations_are_no_obstacle(pipeline, place, data):
    (place / ".DS_Store").write_text("")
    (place / "maze-layers" / "store").mkdir(parents=True)
    try:
        assert own(pipeline, place).stored.store.folder == data.stored.store.folder
    finally:
        (place / ".DS_Store").unlink()
        (place / "maze-layers" / "store").rmdir()
        (place / "maze-layers").rmdir()


def test_without_labels_there_is_nothing_to_fit(pipeline, place):
    bare = own(pipeline, place, labels=None, roles="answer")
    with pytest.raises(InputError, match=r"^labels: none; .*with_label"):
        fit_probes(bare)
    assert bare.stored.table.targets == () and api.BOXES[0] == (0, 0, 0.25, 0.25)
