"""The command: files that can be read again, claims from enough problems, own images, errors."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from cosprobe.checked import read_tensors
from cosprobe.config import TokensConfig
from cosprobe.errors import InputError
from cosprobe.evaluation import HOLDS
from cosprobe.tasks import fresh_problems, on_path
from cosprobe.tokens.report import contrast, page, token_figure
from cosprobe.tokens.run import _spaced, token_runs, tokens
from tests.examples.causal import finished
from tests.examples.figures import check_words

SEED = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def measured(run):
    return token_runs(run.sampler, run.task, TokensConfig(problems=2), SEED)


@pytest.mark.slow
def test_files_hold_every_value_with_its_place(run):
    tokens(run.sampler, run.task, run.bank, TokensConfig(layers="0,2", steps="0"), SEED, run.folder)
    place = run.folder / "report" / "tokens"
    (path,) = place.glob("*.safetensors")
    arrays, about = read_tensors(path)
    assert about["layers"] == ["embed", "0", "2"] and about["steps"] == [0, 2]  # the last step is always there
    for name, axes in about["axes"].items():
        assert arrays[name].ndim == len(axes) and name in about["meaning"]
    assert about["axes"]["energy"] == ["layer", "step", "frame", "row", "column"]
    np.testing.assert_allclose(arrays["cosine"][:, -1], 1, atol=1e-5)
    text = (place / "tokens.md").read_text()
    for name in ("energy", "temporal_energy", "channel_variance", "cosine", "components"):
        picture = f"{path.stem}_{name}.png"
        assert (place / picture).stat().st_size > 1000 and picture in text
    assert "Not tested: 12 problems" in text and json.loads((place / "tokens.json").read_text())["path"] is None
    assert list((run.folder / "tensorboard" / "tokens").glob("events*"))


@pytest.mark.slow
def test_runs_differ_and_know_their_path(run, measured):
    first, second = measured
    assert first.name != second.name and not np.allclose(first.measures.energy, second.measures.energy)
    task = run.sampler.task
    problem = fresh_problems(task, "test", run.task.problems, 2, task.kinds[:1])[0]
    assert first.name.endswith(f"_{problem.index}")
    np.testing.assert_array_equal(first.path, on_path(task, problem, *first.path.shape))
    assert first.contrast.shape == (first.measures.sizes["step"], first.measures.sizes["layer"])


@pytest.mark.slow
def test_the_path_is_tested_from_twelve_problems_on(measured):
    rng = np.random.default_rng(0)
    names = measured[0].measures.layer.values.tolist()
    runs = []
    for i in range(14):
        values = 0.05 * rng.standard_normal(measured[0].contrast.shape)
        values[0, 2:] += 0.7  # the layers after the first, at the first step
        runs.append(replace(measured[0], name=str(i), contrast=values))
    assert contrast(runs[:11]) is None
    found = contrast(runs)
    np.testing.assert_allclose(found.ratio, np.exp(np.mean([r.contrast for r in runs], axis=0)))
    assert found.claim.verdict == HOLDS and found.n == 14 and names[0] == "embed"
    assert (found.p[0, 2:] <= 0.05).all() and (found.p[:, 0] > 0.05).all()
    assert (found.lower <= found.ratio).all() and (found.ratio <= found.upper).all()
    assert any("2.0" in line and "*" in line for line in page(runs, ["x.png"] * 5, [], found))


@pytest.mark.slow
@pytest.mark.parametrize("quantity", ["energy", "components"])
def test_a_figure_has_a_picture_for_every_layer_and_step(measured, quantity):
    figure = token_figure(measured[0], quantity)
    size = measured[0].measures.sizes
    pictures = [axes for axes in figure.axes if axes.get_images()]
    assert len(pictures) == size["layer"] * size["step"]
    assert all(len(axes.get_images()) == 2 for axes in pictures)
    if quantity == "energy":
        shown = measured[0].measures.sel(layer="embed").energy.values[0, -1]
        np.testing.assert_array_equal(pictures[-size["step"]].get_images()[1].get_array(), shown)
    check_words(figure)


@pytest.mark.slow
def test_an_image_of_ones_own_has_no_path(run, tmp_path):
    problem = run.sampler.task.problems("test", 1)[0]
    Image.fromarray(run.sampler.task.image(problem)).save(tmp_path / "mine.png")
    use = TokensConfig(image=str(tmp_path / "mine.png"), prompt=problem.prompt, layers="1")
    (one,) = token_runs(run.sampler, run.task, use, SEED)
    assert one.name == "mine" and one.path is None and one.contrast is None
    assert one.measures.layer.values.tolist() == ["embed", "1"]


@pytest.mark.slow
def test_bad_input_is_one_line(run, tmp_path):
    for use, said in (
        (TokensConfig(kind="nothing"), r"use\.kind='nothing'.*one_exit"),
        (TokensConfig(steps="7"), r"use\.steps='7'.*0 to 2"),
        (TokensConfig(layers="9"), r"use\.layers='9'.*0 to 2"),
    ):
        with pytest.raises(InputError, match=said):
            tokens(run.sampler, run.task, run.bank, use, SEED, tmp_path)
    assert not list(tmp_path.iterdir())


def test_spaced_indices_have_both_ends():
    assert _spaced(8, 5) == (0, 2, 4, 5, 7) and _spaced(3, 5) == (0, 1, 2) and _spaced(1, 5) == (0,)
