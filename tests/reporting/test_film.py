"""The film strip: the right pictures, boxes and words in the right positions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from cosprobe.activations import StoreSettings
from cosprobe.config import CaptureConfig, PipelineConfig
from cosprobe.reporting.film import FREE, RIGHT, WRONG, film_motion, film_strip, record_once
from tests.examples.films import film


def boxes(axes) -> list[tuple[str, tuple[float, float]]]:
    return [(to_hex(p.get_edgecolor()), p.get_xy()) for p in axes.patches if isinstance(p, Rectangle)]


def test_rows_are_problems_and_columns_steps():
    strip = film()
    figure = film_strip(strip.rows, strip.steps)
    panels = np.array(figure.axes).reshape(3, 4)
    assert [axes.get_title() for axes in panels[0]] == ["first frame", "x0-hat, step 0", "step 4", "step 8"]
    assert [axes.get_ylabel() for axes in panels[:, 0]] == ["right", "wrong", "several right"]
    for row, line in zip(strip.rows, panels, strict=True):
        np.testing.assert_array_equal(line[0].images[0].get_array(), row.first_frame)
        for i, axes in enumerate(line[1:]):
            np.testing.assert_array_equal(axes.images[0].get_array(), row.frames[i])
            assert axes.get_xlabel() == f"candidate {row.picks[i]}"


@pytest.mark.slow
def test_boxes_show_what_is_read_and_whether_it_is_right():
    strip = film()
    panels = np.array(film_strip(strip.rows, strip.steps).axes).reshape(3, 4)
    for row, line, last in zip(strip.rows, panels, (RIGHT, WRONG, FREE), strict=True):
        early = FREE if row.answer is None else WRONG
        for i, colour in enumerate((early, early, last)):
            x0, y0 = row.regions[row.picks[i]][:2]
            assert boxes(line[i + 1]) == [(colour, (x0 * 64 - 0.5, y0 * 64 - 0.5))]
        assert len(boxes(line[0])) == (row.answer is not None)
    assert panels[0, 0].get_xlabel() == f"answer {strip.rows[0].answer}, video {strip.rows[0].answer}"
    assert panels[2, 0].get_xlabel() == "video none"


def test_without_regions_the_words_remain():
    strip = film()
    figure = film_strip([replace(strip.rows[0], regions=())], strip.steps)
    assert all(boxes(axes) == [] for axes in figure.axes)
    assert figure.axes[3].get_xlabel() == f"candidate {strip.rows[0].picks[2]}"


def test_legend_speaks_of_the_rows_shown():
    strip = film()
    words = [t.get_text() for t in film_strip(strip.rows[2:], strip.steps).legends[0].get_texts()]
    assert len(words) == 1
    assert len(film_strip(strip.rows, strip.steps).legends[0].get_texts()) == 4


@pytest.mark.slow
def test_many_steps_are_thinned_from_first_to_last():
    strip = film(steps=20)
    titles = [axes.get_title() for axes in film_strip(strip.rows, strip.steps).axes[:8]]
    assert titles[1] == "x0-hat, step 0"
    assert titles[-1] == "step 76"
    assert len(film_strip(strip.rows, strip.steps).axes) == 3 * 8


@pytest.mark.slow
@pytest.mark.parametrize("steps", [3, 20])
def test_words_stay_inside_the_picture_and_apart(steps):
    strip = film(steps)
    figure = film_strip(strip.rows, strip.steps)
    figure.set_dpi(100)
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    assert width == 800
    shown = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]
    extents = [t.get_window_extent(figure.canvas.get_renderer()) for t in shown]
    for text, box in zip(shown, extents, strict=True):
        assert box.x0 >= -1, text.get_text()
        assert box.x1 <= width + 1, text.get_text()
        assert box.y0 >= -1, text.get_text()
        assert box.y1 <= height + 1, text.get_text()
    assert not any(a.overlaps(b) for i, a in enumerate(extents) for b in extents[:i])


def test_the_motion_of_a_step_shows_all_frames_of_its_clips():
    strip = film()
    shades = {index: [tuple(row.clips[index, k, 0, 0]) for k in range(2)] for row in strip.rows for index in range(3)}
    for index in range(3):
        frames = film_motion(strip, index)
        assert frames.shape[0] == 2 and frames.shape[3] == 3 and frames.dtype == np.uint8
        for k, frame in enumerate(frames):
            share = {shade: (frame == np.array(shade, np.uint8)).all(axis=2).mean() for shade in shades[index]}
            assert share[shades[index][k]] > 0.4 > 0.1 > share[shades[index][1 - k]]
    colours = [tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in (RIGHT, WRONG, FREE)]
    last = film_motion(strip, 2)[0]
    found = [np.flatnonzero((last == np.array(colour, np.uint8)).all(axis=2).any(axis=0)) for colour in colours]
    assert all(len(columns) > 10 for columns in found)
    assert found[0].max() < found[1].min() and found[1].max() < found[2].min()  # problems are side by side, in order


def test_bad_rows_are_named():
    strip = film()
    with pytest.raises(ValueError, match="'right'.*3 frames.*3 picks.*2"):
        film_strip(strip.rows, strip.steps[:2])
    with pytest.raises(ValueError, match="0 problems.*3 steps"):
        film_strip([], strip.steps)


def test_a_film_is_recorded_once_and_read_as_it_was(tmp_path, monkeypatch):
    settings, calls = StoreSettings({"index": "model"}, 0, PipelineConfig(), {"problems": 9}, CaptureConfig(), {}), []
    for made in (film(), None):
        folder = tmp_path / str(made is None)
        monkeypatch.setattr("cosprobe.reporting.film.record", lambda *given, made=made: calls.append(given) or made)
        first, again = (record_once(folder, settings, "sampler", "draw", "samples") for _ in range(2))
        assert (first is None) == (again is None) == (made is None)
        for a, b, c in zip(*(() if one is None else one.rows for one in (first, again, made)), strict=True):
            assert replace(a, first_frame=0, clips=0) == replace(b, first_frame=0, clips=0)
            assert replace(a, first_frame=0, clips=0) == replace(c, first_frame=0, clips=0)
            np.testing.assert_array_equal(b.first_frame, c.first_frame)
            np.testing.assert_array_equal(b.clips, c.clips)
    assert len(calls) == 2 and calls[0] == ("sampler", "draw", "samples", settings.probe)
