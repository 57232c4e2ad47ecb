"""Images of one's own: splits by content, copies together, and one line for what does not fit together."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from cosprobe.errors import InputError
from cosprobe.tasks import OwnImages, Task, reference_of, with_noise
from cosprobe.tasks.samples import SHARES

IMAGES = np.random.default_rng(0).integers(0, 256, size=(40, 16, 16, 3), dtype=np.uint8)
PROMPTS = [f"picture {i}" for i in range(40)]


def own(images=IMAGES, prompts=PROMPTS, **more) -> OwnImages:
    return OwnImages(images, prompts, 5, **more)


def test_it_is_a_task_without_a_parser():
    task = own()
    assert isinstance(task, Task) and task.candidates == 0 and task.targets == ()
    problem = task.all[3]
    assert np.array_equal(task.image(problem), IMAGES[3]) and problem.prompt == "picture 3"
    assert problem.regions == ((0, 0, 1, 1),) and task.regions == 1
    assert reference_of(task, problem) is None
    for call in (task.workspace, task.plausible_answers):
        with pytest.raises(InputError, match="no parser"):
            call(problem)
    assert task.solutions(problem) == ()
    with pytest.raises(InputError, match="no parser"):
        task.parse(problem, IMAGES[None] / 255)


def test_every_image_is_in_one_split_and_more_images_move_none():
    task, few = own(), own(IMAGES[:30], PROMPTS[:30])
    splits = {split: task.problems(split, 100) for split in SHARES}
    assert sorted(p.layout for split in splits.values() for p in split) == list(range(40))
    assert [p.name for p in few.all] == [p.name for p in task.all[:30]]
    assert [p.name for p in own(IMAGES[::-1], PROMPTS[::-1]).all] == [p.name for p in task.all[::-1]]
    assert len({p.name for p in task.all}) == 40 == len({s.seed for s in with_noise(task.all, 0)})


def test_splits_take_their_share():
    many = np.random.default_rng(1).integers(0, 256, size=(3000, 2, 2, 3), dtype=np.uint8)
    found = Counter(p.split for p in own(many, ["x"] * 3000).all)
    assert all(abs(found[split] / 3000 - share) < 0.03 for split, share in SHARES.items())


def test_copies_are_in_one_split_and_have_names_of_their_own():
    task = own(np.concatenate([IMAGES, IMAGES]), PROMPTS * 2)
    by_key = defaultdict(set)
    for problem in task.all:
        by_key[problem.key].add(problem.split)
    assert len(by_key) == 40 and all(len(splits) == 1 for splits in by_key.values())
    assert len({p.name for p in task.all}) == 80


def test_a_group_is_in_one_split():
    task = own(groups=[i // 2 for i in range(40)])
    for first, second in zip(task.all[::2], task.all[1::2], strict=True):
        assert (first.split, first.key) == (second.split, second.key)
    assert {p.split for p in task.all} == set(SHARES)


def test_names_depend_on_what_was_sampled():
    names = {p.name.rpartition("/")[2] for p in own().all}
    for other in (own(255 - IMAGES), own(prompts=[p + "!" for p in PROMPTS]), own(boxes=[(0, 0, 0.5, 1)])):
        assert not names & {p.name.rpartition("/")[2] for p in other.all}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": PROMPTS[:3]}, r"^prompts: 3 entries for 40 images; expected one for each image"),
        ({"prompts": "go"}, r"^prompts='go': expected a list"),
        ({"groups": [1, 2]}, r"^groups: 2 entries for 40 images"),
        ({"groups": [1] * 40}, r"^images: 0 of 40 are in the split .*expected at least 2; add images"),
        ({"images": IMAGES[:4], "prompts": PROMPTS[:4]}, r"^images: [01] of 4 are in the split"),
        ({"boxes": []}, r"^boxes: none"),
        ({"boxes": [(0, 0, 16, 16)]}, r"^boxes: \(0, 0, 16, 16\), expected x0, y0, x1, y1 in fractions"),
        ({"boxes": [(0.5, 0, 0.5, 1)]}, r"^boxes: .* expected x0, y0, x1, y1"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        own(**changes)
    assert "\n" not in str(caught.value)
