"""Maps over tokens draw what the dataset holds, where it is in the picture."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from matplotlib.collections import QuadMesh

from cosprobe.reporting.summary import path_sentences
from cosprobe.reporting.token_maps import path_tokens, token_maps
from tests.examples.figures import check_words

STEPS, LAYERS, FRAMES, ROWS, COLUMNS = (0, 10), (1, 3), 2, 2, 3
PICTURE = np.arange(16 * 24 * 3, dtype=np.uint8).reshape(16, 24, 3)


@pytest.fixture(scope="module")
def path() -> xr.Dataset:
    """Evidence at one token alone; the last token of a frame has no probe."""
    places = [(f, r, c) for f in range(FRAMES) for r in range(ROWS) for c in range(COLUMNS)]
    shape = len(STEPS), len(LAYERS), len(places)
    accuracy = np.random.default_rng(0).uniform(0.5, 0.8, shape)
    accuracy[..., [i for i, place in enumerate(places) if place[1:] == (1, 2)]] = np.nan
    accuracy[1, 0, places.index((1, 0, 2))] = 0.95
    p = np.where(np.isnan(accuracy), np.nan, np.where(accuracy > 0.9, 0.001, 0.7))
    reference = np.where(np.isnan(accuracy), np.nan, 0.6)
    axes = ("step", "layer", "position")
    numbers = {
        "accuracy": accuracy, "validation_gain": accuracy, "lower": accuracy - 0.1, "upper": accuracy + 0.04,
        "reference": reference, "skill": (accuracy - 0.6) / 0.4, "p_evidence": p,
        "reference_source": np.full(shape, "x_t"),
    }  # fmt: skip
    names = [f"f{f}r{r}c{c}" for f, r, c in places]
    along = {axis: ("position", [place[i] for place in places]) for i, axis in enumerate(("frame", "row", "column"))}
    return xr.Dataset(
        {name: (axes, value) for name, value in numbers.items()},
        {"step": list(STEPS), "layer": list(LAYERS), "position": names} | along,
        {"n_test": 90, "n_test_problems": 90},
    )


def test_every_map_is_in_its_place(path):
    figure = token_maps(path, "title", "chance", PICTURE)
    panels = iter([axes for axes in figure.axes if axes.get_images()])
    for layer in reversed(LAYERS):
        for step in STEPS:
            for frame in range(FRAMES):
                mesh = next(one for one in next(panels).collections if isinstance(one, QuadMesh))
                here = path.skill.where(path.p_evidence <= 0.05).sel(step=step, layer=layer)
                here = here.isel(position=path.frame.values == frame)
                shown = mesh.get_array().reshape(ROWS, COLUMNS).filled(np.nan)
                np.testing.assert_allclose(shown, here.values.reshape(ROWS, COLUMNS))
    assert next(panels, None) is None


def test_what_has_no_evidence_or_no_probe_shows_the_picture(path):
    figure = path_tokens(path, PICTURE)
    meshes = [one for axes in figure.axes if axes.get_images() for one in axes.collections if isinstance(one, QuadMesh)]
    coloured = sum(int((~np.ma.getmaskarray(mesh.get_array())).sum()) for mesh in meshes)
    assert coloured == int((path.p_evidence <= 0.05).sum()) == 1
    texts = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert any("no evidence" in text for text in texts) and any("no square" in text for text in texts)
    check_words(figure)


def test_a_map_needs_no_picture(path):
    assert not any(axes.get_images() for axes in token_maps(path, "title", "chance").axes)


def test_sentences_count_evidence_and_name_the_best_cell(path):
    text = "\n".join(path_sentences(path))
    assert "1 of 40 cells" in text and "| 1 | 0 of 10 tokens | 1 of 10 tokens |" in text
    assert "By latent frame: 0 in frame 0, 1 in frame 1." in text
    assert "latent frame 1, row 0, column 2" in text and "0.95 [0.85, 0.99], x_t 0.60, p = 0.001" in text
    few = path.assign(p_evidence=path.p_evidence * np.nan)
    assert "there are no p-values" in path_sentences(few)[1]
