"""A margin moves the image and its regions, and changes no answer."""

from __future__ import annotations

import numpy as np
import pytest

from cosprobe.errors import InputError
from cosprobe.tasks import FAMILIES, Task
from cosprobe.tasks.margin import with_margin

HEIGHT, WIDTH = 96, 160


@pytest.mark.parametrize("name", FAMILIES)
def test_the_image_is_in_the_middle_and_regions_follow_it(name):
    plain = FAMILIES[name]().build()
    framed = with_margin(plain, HEIGHT, WIDTH)
    assert isinstance(framed, Task)
    for before, after in zip(plain.problems("train", 4), framed.problems("train", 4), strict=True):
        image, larger = plain.image(before), framed.image(after)
        assert larger.shape == (HEIGHT, WIDTH, 3)
        np.testing.assert_array_equal(larger[16:80, 48:112], image)
        assert (larger[:16] == image[0, 0]).all() and (larger[:, 112:] == image[0, 0]).all()
        for small, large in zip(before.regions, after.regions, strict=True):
            x, y = np.array(small[::2]) * 64 + 48, np.array(small[1::2]) * 64 + 16
            np.testing.assert_allclose(large, (x[0] / WIDTH, y[0] / HEIGHT, x[1] / WIDTH, y[1] / HEIGHT))
        assert (after.name, after.labels, after.key) == (before.name, before.labels, before.key)
        video = framed.video(after) / np.float32(255)
        assert framed.parse(after, video).answer in plain.solutions(before) == framed.solutions(after)
        assert framed.workspace(after).sum() == plain.workspace(before).sum()


def test_no_margin_is_the_task_itself_and_a_small_frame_is_refused():
    task = FAMILIES["maze"]().build()
    assert with_margin(task, 0, 0) is task
    assert with_margin(task, 0, 96).image(task.problems("train", 1)[0]).shape == (64, 96, 3)
    with pytest.raises(InputError, match=r"pipeline\.height=32.*64 x 64"):
        with_margin(task, 32, 64).problems("train", 1)
