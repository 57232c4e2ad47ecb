"""What TensorBoard shows: every value is the grid's, once, under names that put the accuracies first."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from cosprobe.evaluation.checks import Checks
from cosprobe.evaluation.grid import Grid
from cosprobe.evaluation.scoring import build_grid
from cosprobe.reporting.report import write_report
from cosprobe.reporting.tensorboard import FIGURES, MOST_LAYERS, log_tensorboard
from tests.examples.films import film
from tests.examples.grids import ANSWER, CONTROL, MODEL_ANSWER, START, synthetic

pytestmark = pytest.mark.slow  # what all of them read takes seconds to make

LAYERS, STEPS = 3, 4
SETTINGS = {
    "task": "maze", "task.problems": 600, "pipeline.steps": 20, "pipeline.lora": "", "probe.penalties": [0.1, 1.0],
    "probe.frames": False, "trainer.devices": 1, "seed": 3,
}  # fmt: skip
BY_STEP = {
    "answer": "accuracy by denoising step/answer",
    "model_answer": "accuracy by denoising step/model_answer",
    "start": "other targets by denoising step/start",
    "control": "other targets by denoising step/control",
}
Runs = dict[str, EventAccumulator]


@pytest.fixture(scope="module")
def grid() -> Grid:
    evaluated = synthetic(LAYERS, STEPS, 120, targets=(ANSWER, MODEL_ANSWER, START, CONTROL))
    return build_grid(evaluated, draws=100, provenance={})


def read(folder: Path) -> Runs:
    """Accumulators by name of the TensorBoard run, with all images."""
    found = {str(path.parent.relative_to(folder)) for path in folder.rglob("events.out.tfevents.*")}
    return {name: EventAccumulator(str(folder / name), {"images": 0}).Reload() for name in found}


@pytest.fixture(scope="module")
def runs(grid, tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("tensorboard")
    for name in ("interventions/swap", "sampling", "training/median"):
        (folder / name).mkdir(parents=True)
        (folder / name / "events.out.tfevents.1.host").touch()
    report = write_report(grid, Checks({}, (), (), (), {}, None, ()), tmp_path_factory.mktemp("run"), film())
    log_tensorboard(grid, report, folder)
    assert log_tensorboard(grid, report, folder, film(), SETTINGS) == folder  # replaces the first
    return read(folder)


def curve(runs: Runs, run: str, tag: str) -> dict[int, float]:
    events = runs[run].Scalars(tag)
    values = {event.step: event.value for event in events}
    assert len(values) == len(events)  # every step once
    return values


def test_a_line_is_a_run_and_those_of_sampling_training_and_uses_stay(runs):
    layers = {f"layer {n}" for n in range(LAYERS)}
    baselines = {f"baseline {name}" for name in ("best input", "chance", "x0_latent", "x0_parsed")}
    others = {"interventions/swap", "sampling", "training/median"}
    assert set(runs) == layers | baselines | {"finished video", "report"} | others


@pytest.mark.parametrize("target", BY_STEP)
def test_lines_of_layers_are_accuracies_with_intervals_by_denoising_step(grid, runs, target):
    ends = "upper and lower ends of 95 % intervals/{}, {}"
    for layer in range(LAYERS):
        plane = grid.plane(target).sel(layer=layer)
        for tag, values in (
            (BY_STEP[target], plane.accuracy), (ends.format(target, "lower"), plane.lower),
            (ends.format(target, "upper"), plane.upper),
        ):  # fmt: skip
            found = curve(runs, f"layer {layer}", tag)
            assert found == {step: pytest.approx(float(values.sel(step=step)), rel=1e-6) for step in range(STEPS)}


def test_baselines_are_lines_among_the_layers(grid, runs):
    for target in ("answer", "model_answer"):
        plane = grid.plane(target)
        for name in ("x0_latent", "x0_parsed"):
            values = plane.baseline_accuracy.sel(baseline=name).dropna("step")
            assert 0 < values.sizes["step"] <= STEPS
            found = curve(runs, f"baseline {name}", BY_STEP[target])
            assert found == {int(s): pytest.approx(float(values.sel(step=s)), rel=1e-6) for s in values.step}
        found = curve(runs, "baseline best input", BY_STEP[target])
        lower = curve(runs, "baseline best input", f"upper and lower ends of 95 % intervals/{target}, lower")
        for step in range(STEPS):
            here = plane.sel(step=step)
            assert found[step] == pytest.approx(float(here.reference), rel=1e-6)
            source = here.baseline_lower.sel(baseline=str(here.reference_source.values))
            assert lower[step] == pytest.approx(float(source), rel=1e-6)
    for target, tag in BY_STEP.items():
        chance = float(grid.plane(target).chance)
        assert curve(runs, "baseline chance", tag) == dict.fromkeys(range(STEPS), pytest.approx(chance, rel=1e-6))
    model = grid.dataset.attrs["model_accuracy"]
    tags = runs["finished video"].Tags()["scalars"]
    assert tags[0] == BY_STEP["answer"] and not any("model_answer" in tag for tag in tags)
    assert curve(runs, "finished video", tags[0]) == dict.fromkeys(range(STEPS), pytest.approx(model, rel=1e-6))


def test_groups_are_in_order_of_interest(runs):
    """Time Series sorts groups by name, and at first shows the cards of two."""
    found = (runs[name].Tags() for name in runs if name not in ("sampling", "training/median"))
    tags = {tag for every in found for kind in ("scalars", "images") for tag in every[kind]}
    groups = sorted({tag.split("/")[0] for tag in tags} | {"speed and memory", "training accuracy by epoch"})
    assert groups == [
        "accuracy by denoising step", "map and film", "other targets by denoising step", "speed and memory", "summary",
        "training accuracy by epoch", "upper and lower ends of 95 % intervals",
    ]  # fmt: skip
    assert sum(tag.startswith(groups[0]) for tag in tags) == 3


def test_intervals_are_charts_of_custom_scalars(runs):
    text = runs["report"].Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(text)
    titles = [category.title for category in layout.category]
    assert titles == [BY_STEP["answer"], BY_STEP["model_answer"], "other targets by denoising step"]
    charts = [chart for category in layout.category for chart in category.chart]
    for chart, (target, tag) in zip(charts, BY_STEP.items(), strict=True):
        (series,) = chart.margin.series
        assert chart.title.startswith(f"{target},") and series.value == tag
        for run in ("layer 0", "baseline best input", "baseline chance"):
            assert {series.value, series.lower, series.upper} <= set(runs[run].Tags()["scalars"])
            assert set(curve(runs, run, series.lower)) == set(curve(runs, run, series.value))


def test_maps_are_images(runs):
    images = runs["report"].Tags()["images"]
    assert set(FIGURES.values()) <= set(images)
    for tag in images:
        assert all(400 < picture.width < 900 for picture in runs["report"].Images(tag)), tag


def test_the_film_is_one_moving_picture_per_denoising_step(grid, runs, tmp_path):
    tag = "map and film/x0-hat, moving (slider: denoising step)"
    pictures = runs["report"].Images(tag)
    assert [picture.step for picture in pictures] == list(film().steps)
    for picture in pictures:
        clip = Image.open(BytesIO(picture.encoded_image_string))
        assert clip.format == "GIF" and clip.n_frames == film().rows[0].clips.shape[1] and clip.info["loop"] == 0
        assert clip.size == (picture.width, picture.height)
    log_tensorboard(grid, tmp_path, tmp_path)
    assert not any("x0-hat" in name for name in read(tmp_path)["report"].Tags()["images"])


def test_settings_that_vary_and_results_are_hyperparameters(grid, runs):
    content = {}
    for tag, data in runs["report"].PluginTagToContent("hparams").items():
        content[tag] = plugin_data_pb2.HParamsPluginData.FromString(data)
    # without a summary of the experiment, TensorBoard finds out which settings differ
    assert set(content) == {"_hparams_/session_start_info", "_hparams_/session_end_info"}
    hparams = content["_hparams_/session_start_info"].session_start_info.hparams
    assert set(hparams) == {"task", "task.problems", "pipeline.steps", "probe.penalties", "probe.frames", "seed"}
    assert hparams["task"].string_value == "maze" and hparams["task.problems"].number_value == 600
    assert hparams["probe.penalties"].string_value == "[0.1, 1.0]" and hparams["probe.frames"].string_value == "False"
    results = {tag: runs["report"].Scalars(tag)[0].value for tag in runs["report"].Tags()["scalars"]}
    wanted = {"summary/finished video, accuracy": grid.dataset.attrs["model_accuracy"]}
    for target in ("answer", "model_answer"):
        best = grid.best(target)
        wanted[f"summary/{target}, accuracy of the best cell"] = best.accuracy
        wanted[f"summary/{target}, accuracy of the best input there"] = float(grid.at(target, best.cell).reference)
        wanted[f"summary/{target}, layer of the best cell"] = best.cell.layer
        wanted[f"summary/{target}, step of the best cell"] = best.cell.step
    assert results == {tag: pytest.approx(value, rel=1e-6) for tag, value in wanted.items()}


def test_of_several_positions_and_branches_lines_are_those_of_the_best_cell(tmp_path):
    positions, branches = ("all", "0"), ("cond", "uncond")
    evaluated = synthetic(2, 3, 60, positions=positions, branches=branches, targets=(ANSWER, START))
    framed = build_grid(evaluated, draws=30)
    runs = read(log_tensorboard(framed, tmp_path, tmp_path))
    for target in ("answer", "start"):
        plane = framed.plane(target)
        assert plane.accuracy.ndim == 2
        for layer in range(2):
            found = curve(runs, f"layer {layer}", BY_STEP[target])
            assert list(found.values()) == pytest.approx(plane.accuracy.sel(layer=layer).values.tolist(), rel=1e-6)


def test_of_a_deep_model_some_layers_are_shown(tmp_path):
    """Custom Scalars selects nothing at first if there are more than 40 runs."""
    deep = build_grid(synthetic(60, 2, 60, targets=(ANSWER,)), draws=30)
    runs = read(log_tensorboard(deep, tmp_path, tmp_path))
    layers = sorted(name for name in runs if name.startswith("layer"))
    assert len(runs) + len(("sampling", "training", "best", "lower", "median", "upper")) <= 40
    assert len(layers) == MOST_LAYERS
    assert layers[0] == "layer 00" and layers[-1] == "layer 59"
    assert f"layer {deep.best('answer').cell.layer:02d}" in layers


def test_a_grid_without_answers_shows_its_first_targets(tmp_path):
    plain = build_grid(synthetic(2, 2, 60, targets=(START, CONTROL)), draws=30)
    tags = read(log_tensorboard(plain, tmp_path, tmp_path))["layer 1"].Tags()["scalars"]
    assert {"accuracy by denoising step/start", "accuracy by denoising step/control"} <= set(tags)
    assert np.isnan(plain.dataset.attrs["model_accuracy"])
