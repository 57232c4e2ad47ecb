"""The hiding task: labels, pictures, parsing, and that nothing gives the answer away."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice, permutations, product
from math import comb, perm

import numpy as np
import pytest

from cosprobe.tasks import hide
from cosprobe.tasks.hide import DOWN, LANES, NONE, PAINT, REST, STRAIGHT, UP, WAYS, Hide, HideConfig, Scene
from cosprobe.tasks.task import Problem

TASK = Hide()
LENGTHS = (5, 9, 13, 17)


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return TASK.problems("train", 1500)


def played(task: Hide, problem: Problem) -> np.ndarray:
    return task.video(problem) / np.float32(255)


def blurred(video: np.ndarray) -> np.ndarray:
    """Every pixel becomes the mean of the 3 x 3 pixels around it."""
    padded = np.pad(video, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = video.shape[1:3]
    return sum(padded[:, y : y + height, x : x + width] for y, x in product(range(3), repeat=2)) / 9


def upside_down(scene: Scene) -> Scene:
    return Scene(scene.objects[::-1], DOWN - scene.shift, LANES - 1 - scene.marked, scene.wall)


def of_objects(pictures: np.ndarray) -> np.ndarray:
    """Pixels that have the colour of some object."""
    return (pictures[..., None, :] == PAINT).all(-1).any(-1)


# labels


def test_labels_follow_from_the_scene(problems):
    way = {UP: -1, STRAIGHT: 0, DOWN: 1}
    for problem in problems[:300]:
        scene, labels = problem.layout, problem.labels
        after = [NONE] * LANES
        for lane, identity in enumerate(scene.objects):
            if identity != NONE:
                after[(lane + way[scene.shift]) % LANES] = identity
        assert labels["inside"] == tuple(after)
        assert problem.answer == labels["answer"] == after[scene.marked] != NONE
        assert scene.objects[labels["origin"]] == problem.answer
        assert (labels["first"], labels["shift"], labels["marked"]) == (scene.objects, scene.shift, scene.marked)
        present = [identity for identity in scene.objects if identity != NONE]
        assert len(set(present)) == len(present) == problem.difficulty["objects"] == labels["objects"] + 2
        assert TASK.plausible_answers(problem) == tuple(sorted(present))
        assert TASK.solutions(problem) == (problem.answer,)
        assert problem.difficulty["hidden"] == len(TASK.hidden_frames(problem))


def test_labels_stay_within_their_classes_and_fill_them(problems):
    assert [t.name for t in TASK.targets[:2]] == [t.role for t in TASK.targets[:2]] == ["answer", "model_answer"]
    for target in TASK.targets:
        if target.role == "model_answer":  # the model's own answer is known only after it has drawn
            assert all(target.name not in p.labels for p in problems)
            continue
        values = np.array([p.labels[target.name] for p in problems])
        assert values.shape == ((len(problems), TASK.regions) if target.form == "region" else (len(problems),))
        assert set(values.ravel()) == set(range(target.classes))


@pytest.mark.parametrize("target", ["answer", "origin", "marked", "shift", "control"])
def test_labels_are_balanced(problems, target):
    classes = next(t.classes for t in TASK.targets if t.name == target)
    shares = np.bincount([p.labels[target] for p in problems], minlength=classes) / len(problems)
    assert np.abs(shares - 1 / classes).max() < 4 * np.sqrt((1 - 1 / classes) / classes / len(problems))


def test_prompts_say_the_direction_in_words(problems):
    phrasings = {UP: set(), STRAIGHT: set(), DOWN: set()}
    for problem in problems:
        said = problem.prompt.split()
        assert len(said) <= 30
        assert problem.prompt == " ".join(said) and all(word.isalpha() and word.islower() for word in said)
        assert [any(way in problem.prompt for way in ways) for ways in WAYS].index(True) == problem.layout.shift
        assert sum(way in problem.prompt for ways in WAYS for way in ways) == 1
        phrasings[problem.layout.shift].add(problem.prompt)
    assert min(map(len, phrasings.values())) >= 40 and len(hide.PROMPTS) >= 4


# identity


def test_key_is_the_same_upside_down_and_for_nothing_else(problems):
    for problem in problems[:100]:
        scene = problem.layout
        assert upside_down(upside_down(scene)) == scene != upside_down(scene)
        assert upside_down(scene).key == scene.key == problem.key
        objects = scene.objects[1:] + scene.objects[:1]
        changed = [replace(scene, shift=s, marked=m, wall=w) for s, m, w in product(range(3), range(4), (2, 3, 4))]
        others = [s for s in (*changed, replace(scene, objects=objects)) if s not in (scene, upside_down(scene))]
        assert scene.key not in {other.key for other in others}


@pytest.mark.slow
def test_there_are_enough_problems():
    """No scene is its own mirror image, since all objects differ: half of all scenes are distinct problems."""

    def scenes(objects: int) -> int:  # lanes taken x identities x object asked for x direction x wall
        return comb(LANES, objects) * perm(NONE, objects) * objects * 3 * 3

    placed = [
        tuple(dict(zip(lanes, who, strict=True)).get(lane, NONE) for lane in range(LANES))
        for lanes in permutations(range(LANES), 2)
        for who in permutations(range(NONE), 2)
        if lanes[0] < lanes[1]
    ]
    every = [Scene(o, s, m, w) for o, s, m, w in product(placed, range(3), range(LANES), (2, 3, 4))]
    pairs = {scene.key for scene in every if scene.inside[scene.marked] != NONE}
    assert len(pairs) == scenes(2) // 2 == 7_128
    total = sum(map(scenes, (2, 3, 4))) // 2
    drawn = len({p.key for p in islice(TASK._draw("model"), 5_000)})
    print(f"distinct problems: {total:,} in all, {drawn:,} among 5,000 drawn")  # noqa: T201
    assert total == 292_248
    assert drawn > 4_700  # 4,424 if there were 20,000, or fewer if not all alike


def test_difficulty_is_kept_to():
    for problem in Hide(objects=(3,), walls=(2, 2, 4)).problems("validation", 30):
        assert problem.difficulty["objects"] == 3
        assert problem.layout.wall in (2, 4)


# pictures


@pytest.mark.slow
@pytest.mark.parametrize("frames", LENGTHS)
def test_reference_moves_evenly_and_rests(problems, frames):
    task = Hide(frames=frames)
    for problem in problems[:40]:
        video = task.video(problem)
        assert video.shape == (frames, 64, 64, 3)
        assert np.array_equal(video[0], task.image(problem))
        assert (video[-REST - 1 :] == video[-1]).all()
        seen = of_objects(video).any(1)  # frame, column: the objects abreast
        first, last = seen.argmax(1), 63 - seen[:, ::-1].argmax(1)
        x0, _ = problem.layout.span
        when = np.flatnonzero(seen.any(1))
        lefts = np.where(first < x0, first, last - 11)[when]  # of objects half behind the wall one edge is seen
        assert (lefts[0], lefts[-1]) == (0, 48)
        wait = 2 if frames == 13 else 0
        path = np.clip((when - wait) * 48 / (frames - 3 - wait), 0, 48)
        assert np.abs(lefts - path).max() <= 0.5


@pytest.mark.slow
@pytest.mark.parametrize("frames", LENGTHS)
def test_hidden_frames_are_those_in_which_nothing_is_seen(problems, frames):
    task = Hide(frames=frames)
    for problem in problems[:60]:
        seen = of_objects(task.video(problem)).any((1, 2))
        assert task.hidden_frames(problem) == tuple(np.flatnonzero(~seen))
        assert task.hidden_frames(problem)
        if problem.layout.wall == hide.WIDEST and frames > 9:  # frames 5 to 8 are latent frame 2
            assert set(task.hidden_frames(problem)) >= {5, 6, 7, 8}


def test_regions_never_show_an_object_and_the_wall_is_blank_after_the_first_frame(problems):
    for problem in problems[:60]:
        video = TASK.video(problem)
        assert len(problem.regions) == TASK.regions
        for x0, y0, x1, y1 in problem.regions:
            box = video[:, int(64 * y0) : int(64 * y1), int(64 * x0) : int(64 * x1)]
            assert (y1 - y0, x1 - x0) == (1 / LANES, problem.layout.wall / 8)
            assert not of_objects(box).any()
            assert (box[1:] == box[-1, 0, 0]).all()
        x0, x1 = problem.layout.span
        assert (video[0, :, x0:x1] != video[1, :, x0:x1]).any()


def test_the_direction_cannot_be_seen_between_the_first_frame_and_the_exit(problems):
    for problem in problems[:40]:
        ways = [TASK.video(replace(problem, layout=replace(problem.layout, shift=s))) for s in (UP, STRAIGHT, DOWN)]
        until = max(TASK.hidden_frames(problem)) + 1
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert not np.array_equal(ways[one][0], ways[other][0])
            assert np.array_equal(ways[one][1:until], ways[other][1:until])
            assert not np.array_equal(ways[one][-1], ways[other][-1])


def test_changes_stay_in_the_workspace_which_does_not_tell_the_answer(problems):
    for problem in problems[:60]:
        video, mask = TASK.video(problem), TASK.workspace(problem)
        assert not ((video != video[0]).any((0, -1)) & ~mask).any()
        other = replace(problem, layout=replace(problem.layout, marked=(problem.layout.marked + 1) % 4))
        assert np.array_equal(TASK.workspace(other), mask)
        assert not mask.all()


def test_the_picture_of_the_mirrored_problem_is_the_mirrored_picture(problems):
    for problem in problems[:40]:
        mirrored = replace(problem, layout=upside_down(problem.layout))
        assert np.array_equal(TASK.video(mirrored), TASK.video(problem)[:, ::-1])


@pytest.mark.slow
@pytest.mark.parametrize("size", [80, 128, 480])
def test_any_resolution_shows_the_same_problem(size):
    large = Hide(image_size=size)
    for small_one, large_one in zip(TASK.problems("test", 3), large.problems("test", 3), strict=True):
        assert small_one == large_one and small_one.layout == large_one.layout
        video = large.video(large_one)
        assert video.shape == (13, size, size, 3)
        assert large.parse(large_one, video / np.float32(255)).answer == small_one.answer
        assert large.hidden_frames(large_one) == tuple(np.flatnonzero(~of_objects(video).any((1, 2))))
        if size == 128:  # but for the slopes of the arrow, which are finer
            assert np.array_equal(video[1:], TASK.video(small_one)[1:].repeat(2, axis=1).repeat(2, axis=2))


# parsing


@pytest.mark.slow
@pytest.mark.parametrize("frames", LENGTHS)
def test_parsing_survives_noise_and_blur(problems, frames, rng):
    task = Hide(frames=frames)
    for problem in problems[:40]:
        video = played(task, problem)
        noisy = video + rng.normal(0, 0.08, video.shape).astype(np.float32)
        for damaged in (noisy, blurred(video), blurred(noisy)):
            read = task.parse(problem, damaged)
            assert read.answer == read.forced == problem.answer
            assert read.path == 1.0


def test_parsing_survives_objects_a_pixel_off(problems):
    for problem in problems[:100]:
        video = played(TASK, problem)
        exits = video[:, :, 48:60].copy()
        for axis, shift in product((1, 2), (-1, 1)):
            video[:, :, 48:60] = np.roll(exits, shift, axis)
            read = TASK.parse(problem, video)
            assert read.answer == read.forced == problem.answer


def test_a_grey_video_reads_as_none_and_still_has_scores(problems, rng):
    for value in (0.0, 0.5, 1.0, rng.uniform(size=(3, 64, 64, 3))):
        read = TASK.parse(problems[0], np.full((3, 64, 64, 3), value, dtype=np.float32))
        assert read.answer is None
        assert read.forced in TASK.plausible_answers(problems[0])
        assert np.isfinite(read.scores).all()


def test_a_faint_video_keeps_the_order_of_the_scores(problems):
    for problem in problems[:100]:
        video = played(TASK, problem)
        read = TASK.parse(problem, 0.25 * video + 0.75 * video[:1])
        assert (read.answer, read.forced) == (None, problem.answer)
        grey = TASK.parse(problem, 0.25 * video + 0.75 * 0.5)
        assert grey.answer in (None, problem.answer)


@pytest.mark.slow
def test_videos_of_a_wrong_answer_read_that_answer(problems):
    read_wrong = 0
    for problem in problems[:300]:
        for shift in range(3):
            drawn = replace(problem.layout, shift=shift)
            read = TASK.parse(problem, played(TASK, replace(problem, layout=drawn)))
            came_out = drawn.inside[drawn.marked]
            assert read.answer == (None if came_out == NONE else came_out)
            assert (read.path == 1.0) == (drawn.inside == problem.layout.inside)
            read_wrong += read.answer not in (None, problem.answer)
    assert read_wrong > 200


def test_what_cannot_be_reads_as_none(problems):
    for problem in problems[:60]:
        scene, lane = problem.layout, problem.layout.marked
        absent = next(i for i in range(NONE) if i not in scene.objects)
        swapped = tuple(absent if i == problem.answer else i for i in scene.objects)
        new = TASK.parse(problem, played(TASK, replace(problem, layout=replace(scene, objects=swapped))))
        assert new.answer is None and new.forced != absent
        video = played(TASK, problem)
        twice, torn = video.copy(), video.copy()
        other = (lane + 1) % LANES
        twice[:, 16 * other : 16 * other + 16, 48:60] = video[:, 16 * lane : 16 * lane + 16, 48:60]
        assert TASK.parse(problem, twice).answer is None  # the same object at two exits
        colour = 0 if problem.answer // 3 == 2 else 2  # blue beside all others, red beside blue
        torn[:, 16 * lane + 2 : 16 * lane + 14, 54:60] = PAINT[colour] / 255
        assert TASK.parse(problem, torn).answer is None  # halves of two objects
        left = video.copy()
        left[-REST:, :, :12] = video[0, :, :12]
        read = TASK.parse(problem, left)  # all objects came out, and stayed at the start as well
        assert (read.answer, read.path) == (problem.answer, 0.5)


# nothing but the arrow or the prompt gives the answer away


def test_every_object_is_as_likely_whatever_the_marked_lane(problems):
    """Only three of four lanes can lead to an exit: the bar rules one lane out, the arrow decides between the rest."""
    steps = Counter((p.labels["marked"] - p.labels["origin"]) % LANES for p in problems)
    assert set(steps) == {3, 0, 1}
    assert min(steps.values()) / len(problems) > 1 / 3 - 4 * np.sqrt(2 / 9 / len(problems))


# bad requests


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 70}, r"task\.image_size=70.*\b16\b.*\b64\b"),
        ({"image_size": 48}, r"task\.image_size=48.*\b16\b.*\b64\b"),
        ({"frames": 12}, r"task\.frames=12.*4k \+ 1.*\b5\b"),
        ({"frames": 1}, r"task\.frames=1.*4k \+ 1.*\b5\b"),
        ({"objects": []}, r"task\.objects=\[\].*\b2 to 4\b"),
        ({"objects": [1, 2]}, r"task\.objects=\[1, 2\].*\b2 to 4\b"),
        ({"walls": [5]}, r"task\.walls=\[5\].*\b2 to 4\b"),
        ({"problems": 0}, r"task\.problems=0.*\b1\b"),
        ({"seeds": 0}, r"task\.seeds=0.*\b1\b"),
        ({"seed": -1}, r"task\.seed=-1.*\b0\b"),
    ],
)
def test_a_world_that_cannot_be_built_is_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        HideConfig(**settings)


def test_settings_build_the_task_they_describe():
    assert HideConfig().build() == Hide()
    assert HideConfig(objects=[4], walls=[2], image_size=128, frames=5, seed=3).build() == Hide(
        image_size=128, frames=5, objects=(4,), walls=(2,), seed=3
    )
