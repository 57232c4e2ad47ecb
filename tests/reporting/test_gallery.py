"""The picture of all families: the right frames and words in the right positions."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib import rc_context
from PIL import Image

from cosprobe.reporting.gallery import FRAMES, gallery, main
from cosprobe.tasks import FAMILIES
from tests.examples.figures import apart, check_words


@pytest.fixture(scope="module")
def shown():
    tasks = [settings(image_size=128).build() for settings in FAMILIES.values()]
    return [(task, task.problems("test", 1)[0]) for task in tasks]


def test_rows_are_families_and_columns_frames_of_the_reference(shown):
    panels = np.array(gallery(shown).axes).reshape(len(shown), FRAMES)
    assert [axes.get_title() for axes in panels[0]] == ["first frame", "frame 3", "frame 6", "frame 9", "frame 12"]
    assert [axes.get_ylabel() for axes in panels[:, 0]] == list(FAMILIES)
    for (task, problem), line in zip(shown, panels, strict=True):
        pictures = np.stack([axes.images[0].get_array() for axes in line])
        np.testing.assert_array_equal(pictures, task.video(problem)[[0, 3, 6, 9, 12]])


def test_words_can_be_read_and_prompts_stand_below_their_row(shown):
    figure = gallery(shown)
    words = check_words(figure)
    assert apart(list(words.values()))
    assert [text.get_text().replace("\n", " ") for text in figure.texts] == [problem.prompt for _, problem in shown]
    for i, text in enumerate(figure.texts):
        below = figure.axes[FRAMES * i].get_window_extent().y0
        assert words[text].y1 <= below
        assert i + 1 == len(shown) or words[text].y0 >= figure.axes[FRAMES * (i + 1)].get_window_extent().y1


def test_videos_of_two_lengths_are_refused(shown):
    task = FAMILIES["hide"](frames=5).build()
    with pytest.raises(ValueError, match=r"\[5, 13\] frames"):
        gallery([*shown, (task, task.problems("test", 1)[0])])


@pytest.mark.slow
def test_it_is_drawn_from_the_command_line(tmp_path):
    with rc_context({"savefig.dpi": "figure"}):  # not that of tests/matplotlibrc
        main([str(tmp_path / "families.png")])
    with Image.open(tmp_path / "families.png") as picture:
        assert picture.size[0] == 1600
