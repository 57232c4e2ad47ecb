"""The task of moving a named object into a named box: labels, pictures, parsing, and that only the text tells."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from math import comb, factorial, perm

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from cosprobe.tasks.select import (
    CELLS,
    COLOURS,
    CORNERS,
    PALETTE,
    PHRASES,
    SHAPES,
    Scene,
    Select,
    SelectConfig,
    canonical_key,
    draw_scene,
)
from cosprobe.tasks.splits import split_of
from cosprobe.tasks.task import ParsedAnswer, Problem, Task

TASK = Select()
LIGHT = PALETTE[-1]
COVERED = {"disc": 80, "bar": 40, "dash": 40}  # of the 100 pixels of an object


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return TASK.problems("train", 1000)


@pytest.fixture(scope="module")
def many() -> list[Problem]:
    """1,500 problems to learn from, then 1,000 to test on."""
    return TASK.problems("model", 1500) + TASK.problems("test", 1000)


def played(problem: Problem, task: Select = TASK) -> np.ndarray:
    return task.video(problem) / np.float32(255)


def read(problem: Problem, video: np.ndarray, task: Select = TASK) -> ParsedAnswer:
    return task.parse(problem, video)


def identity(problem: Problem) -> int:
    return problem.layout.objects[problem.layout.named][1]


def square(centre: tuple[int, int], side: int) -> tuple[slice, slice]:
    y, x = centre
    return slice(y - side // 2, y + side // 2), slice(x - side // 2, x + side // 2)


def turned(scene: Scene, flip_rows: bool, flip_columns: bool, transpose: bool) -> Scene:
    """The same scene, seen after one of the 8 symmetries of the square."""

    def move(place: int, n: int) -> int:
        row, column = divmod(place, n)
        row = n - 1 - row if flip_rows else row
        column = n - 1 - column if flip_columns else column
        return column * n + row if transpose else row * n + column

    objects = sorted((move(cell, 3), name) for cell, name in scene.objects)
    boxes = [colour for _, colour in sorted((move(k, 2), colour) for k, colour in enumerate(scene.boxes))]
    named = [name for _, name in objects].index(scene.objects[scene.named][1])
    return Scene(tuple(boxes), tuple(objects), named, move(scene.corner, 2), scene.phrase)


def blurred(video: np.ndarray) -> np.ndarray:
    """Every pixel mixed with its neighbours by (1, 2, 1) / 4 along both sides."""
    for axis in (1, 2):
        video = (np.roll(video, 1, axis) + 2 * video + np.roll(video, -1, axis)) / 4
    return video.astype(np.float32)


def fit(features: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy of a linear classifier of the first 1,500 on the other rows."""
    return LogisticRegression(max_iter=300, C=0.1).fit(features[:1500], labels[:1500]).score(
        features[1500:], labels[1500:]
    )  # fmt: skip


# labels and words


def test_it_is_a_task(problems):
    assert isinstance(TASK, Task)
    assert (TASK.regions, TASK.candidates) == (4, 4)
    assert [t.name for t in TASK.targets[:2]] == [t.role for t in TASK.targets[:2]] == ["answer", "model_answer"]
    assert problems[0].name.startswith("select/select/train/")
    assert TASK.problems("train", 20, "select") == problems[:20]


def test_labels_agree_with_prompt_and_picture(problems):
    """An oracle that only reads: which words the prompt has, and which colours the picture has where."""
    for problem in problems[:300]:
        words, labels, picture = problem.prompt.split(), problem.labels, TASK.image(problem)
        at = next(k for k, word in enumerate(words) if word in SHAPES)
        colour, shape, box = words[at - 1], words[at], words[words.index("box") - 1]
        assert identity(problem) == 3 * COLOURS.index(colour) + SHAPES.index(shape)
        rims = [picture[y - 8, x - 8].tolist() for y, x in CORNERS]
        assert labels["corners"] == tuple(PALETTE.tolist().index(rim) for rim in rims)
        assert labels["box"] == COLOURS.index(box)
        assert problem.answer == labels["answer"] == rims.index(PALETTE[COLOURS.index(box)].tolist())
        assert (picture[CELLS[labels["object"]]] == PALETTE[COLOURS.index(colour)]).all()
        taken = [not (picture[square(cell, 10)] == LIGHT).all() for cell in CELLS]
        assert sum(taken) == problem.difficulty["objects"] == labels["objects"] + 2
        assert len({name for _, name in problem.layout.objects}) == sum(taken)
        assert TASK.solutions(problem) == (problem.answer,)
        assert TASK.plausible_answers(problem) == (0, 1, 2, 3)


def test_labels_stay_within_their_classes(problems):
    for target in TASK.targets:
        values = np.array([p.labels[target.name] for p in problems if target.name in p.labels])
        if target.role == "model_answer":  # the model's own answer is known only after it has drawn
            assert not values.size
            continue
        assert values.shape == ((1000, 4) if target.form == "region" else (1000,))
        assert sorted(set(values.ravel().tolist())) == list(range(target.classes))
        assert all(isinstance(p.labels[target.name], tuple if target.form == "region" else int) for p in problems[:5])


def test_prompts_vary_in_wording_and_name_every_colour_and_shape(problems):
    words = {word for p in problems for word in p.prompt.split()}
    assert words >= {*COLOURS, *SHAPES}
    assert all(word.isalpha() and word.islower() for word in words)
    assert max(len(p.prompt.split()) for p in problems) <= 30
    shares = np.bincount([p.layout.phrase for p in problems]) / len(problems)
    assert len(shares) == len(PHRASES) == len(set(PHRASES)) >= 4
    assert shares.min() > 0.1


# identity


def test_key_is_the_same_under_the_symmetries_of_the_square(problems):
    for problem in problems[:100]:
        views = [turned(problem.layout, *flips) for flips in product((False, True), repeat=3)]
        assert len({(view.boxes, view.objects, view.corner) for view in views}) == 8
        assert {canonical_key(view) for view in views} == {problem.key}
        assert canonical_key(replace(problem.layout, phrase=(problem.layout.phrase + 1) % 6)) == problem.key


def test_key_tells_different_problems_apart(problems):
    assert len({p.key for p in problems}) == len(problems)
    for problem in problems[:100]:
        scene = problem.layout
        cell, name = scene.objects[0]
        free = next(k for k in range(9) if k not in [c for c, _ in scene.objects])
        new = next(k for k in range(12) if k not in [i for _, i in scene.objects])
        others = [
            replace(scene, named=(scene.named + 1) % len(scene.objects)),
            replace(scene, corner=(scene.corner + 1) % 4),
            replace(scene, boxes=(scene.boxes[1], scene.boxes[0], *scene.boxes[2:])),
            replace(scene, objects=((cell, new), *scene.objects[1:])),
        ]
        assert problem.key not in {canonical_key(other) for other in others}
        moved = replace(scene, objects=((free, name), *scene.objects[1:]))
        assert canonical_key(moved) != problem.key  # boxes differ in colour, so no symmetry maps one onto the other


@pytest.mark.slow
def test_more_than_20000_problems_are_different():
    """Boxes of four colours leave no scene like its own mirror image, so the count is exact: cells x identities x
    object named x box named x places of the boxes, of which every 8 are one problem."""
    exact = {n: comb(9, n) * perm(12, n) * n * 4 * factorial(4) // 8 for n in range(2, 6)}
    assert (exact[2], sum(exact.values())) == (114_048, 794_458_368)
    rng = np.random.default_rng(0)
    keys = {canonical_key(draw_scene(int(rng.integers(2, 6)), rng)) for _ in range(5_000)}
    print(f"\n{sum(exact.values()):,} different problems in all, {len(keys):,} in 5,000 draws")  # noqa: T201
    assert len(keys) > 4_970  # of 20,000 problems 576 would be drawn again, or more if not all alike


def test_numbers_of_objects_are_kept_to():
    assert {p.difficulty["objects"] for p in Select(objects=(3, 4)).problems("validation", 50)} == {3, 4}


# pictures


@pytest.mark.parametrize("frames", [5, 9, 13, 17])
def test_reference_video_moves_one_object_evenly_and_rests(frames):
    task = Select(frames=frames)
    for problem in task.problems("test", 30):
        video, image = task.video(problem), task.image(problem)
        assert video.shape == (frames, 64, 64, 3)
        assert np.array_equal(video[0], image)
        assert np.array_equal(video[-1], video[-2])
        assert all((a != b).any() for a, b in pairwise(video[: frames - 2]))
        assert not ((video != image).any((0, 3)) & ~task.workspace(problem)).any()
        cell = square(CELLS[problem.labels["object"]], 10)
        assert (video[-1][cell] == LIGHT).all()
        room = video[-1][square(CORNERS[problem.answer], 12)]
        assert np.array_equal(room[1:-1, 1:-1], image[cell])  # in the middle of the room
        gone = image.copy()
        gone[cell] = LIGHT
        gone[square(CORNERS[problem.answer], 12)] = room
        assert np.array_equal(video[-1], gone)  # and all else as it was


def test_move_distance_and_pace_agree_with_the_video(problems):
    """Measured on a board without the other objects, where what is drawn on the open board must be what moves."""
    for problem in problems[:100]:
        start, end = CELLS[problem.labels["object"]], CORNERS[problem.answer]
        distance = abs(end[0] - start[0]) + abs(end[1] - start[1])
        assert problem.difficulty["distance"] == distance
        alone = replace(problem.layout, objects=(problem.layout.objects[problem.layout.named],), named=0)
        video = TASK.video(replace(problem, layout=alone))
        empty = video[0].copy()
        empty[square(start, 10)] = LIGHT
        moving = (video != LIGHT).any(-1) & (empty == LIGHT).all(-1)
        # its first row and column; the last steps lead over the rim of a box, where its colour may be the box's
        places = np.stack([moving.any(2).argmax(1), moving.any(1).argmax(1)], axis=1)
        steps = np.diff(places[:7], axis=0)
        assert np.abs(np.abs(steps).sum(1) - distance / 10).max() <= 2  # whole pixels on either side of the turn
        assert problem.labels["move"] == [(-1, 0), (1, 0), (0, -1), (0, 1)].index(tuple(np.sign(steps[0])))
        longer = abs(end[1] - start[1]) >= abs(end[0] - start[0])
        assert bool(steps[0, 1]) == longer


@pytest.mark.slow
def test_workspace_and_picture_do_not_tell_what_is_named(problems):
    for problem in problems[:40]:
        for k, corner in product(range(len(problem.layout.objects)), range(4)):
            other = TASK.swapped(problem, object=k, box=corner)
            assert np.array_equal(TASK.workspace(other), TASK.workspace(problem))
            assert np.array_equal(TASK.image(other), TASK.image(problem))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "frames"), [(80, 17), (128, 13), (240, 9), (480, 5)])
def test_any_size_shows_the_same_problem(size, frames, rng):
    task = Select(image_size=size, frames=frames)
    small = TASK.problems("test", 6)
    assert task.problems("test", 6) == small
    for problem in small:
        video = played(problem, task)
        assert video.shape == (frames, size, size, 3)
        seen = read(problem, video + rng.normal(0, 0.08, video.shape).astype(np.float32), task)
        assert seen.answer == seen.forced == problem.answer
        named = problem.layout.objects[problem.layout.named][1]
        assert seen.path > (0.7 if SHAPES[named % 3] == "bar" else 0.75)  # thin: the same noise is more of a bar
        assert read(problem, np.repeat(video[:1], frames, 0), task).answer is None
        assert not ((video != video[0]).any((0, 3)) & ~task.workspace(problem)).any()


@pytest.mark.slow
def test_shapes_are_bold_and_differ(problems):
    pictures = {}
    for problem in problems:
        for cell, name in problem.layout.objects:
            pictures[name] = TASK.image(problem)[square(CELLS[cell], 10)]
    assert len(pictures) == 12
    for (a, one), (b, two) in product(pictures.items(), repeat=2):
        assert (one != LIGHT).any(-1).sum() == COVERED[SHAPES[a % 3]]
        if a % 3 != b % 3:
            assert (one != two).any(-1).sum() >= 37
        elif a != b:
            assert (one != two).any(-1).sum() == COVERED[SHAPES[a % 3]]


# parsing


@pytest.mark.slow
def test_parsing_stands_noise_and_blur(problems, rng):
    for problem in problems[:40]:
        video = played(problem)
        still = np.repeat(video[:1], TASK.frames, 0)
        noise = rng.normal(0, 0.08, video.shape).astype(np.float32)
        for change in (lambda v, n: v + n, lambda v, n: blurred(v), lambda v, n: np.clip(blurred(v) + n, 0, 1)):
            seen = read(problem, change(video, noise))
            assert seen.answer == seen.forced == problem.answer
            assert seen.path > 0.7
            assert read(problem, change(still, noise)).answer is None
            assert read(problem, change(still, noise)).path < 0.1


@pytest.mark.slow
def test_videos_of_wrong_answers_read_as_those(problems):
    for problem in problems[:50]:
        for corner in {0, 1, 2, 3} - {problem.answer}:
            wrong = TASK.swapped(problem, box=corner)
            seen = read(problem, played(wrong))
            assert seen.answer == seen.forced == corner == wrong.answer
            assert seen.path < 0.7


@pytest.mark.slow
def test_another_object_in_a_box_reads_as_none(problems, rng):
    for problem in problems[:40]:
        for k in set(range(len(problem.layout.objects))) - {problem.layout.named}:
            other = played(TASK.swapped(problem, object=k))
            assert read(problem, other).answer is None
            assert read(problem, blurred(other + rng.normal(0, 0.08, other.shape))).answer is None
            both = played(problem)
            away = CORNERS[(problem.answer + 1) % 4]
            both[-1][square(away, 10)] = both[0][square(CELLS[problem.layout.objects[k][0]], 10)]
            assert read(problem, both).answer is None


@pytest.mark.slow
def test_two_copies_read_as_none(problems, rng):
    """In two boxes, in a box and still at home, in a box and on the way."""
    for problem in problems[:40]:
        video = played(problem)
        home = square(CELLS[problem.labels["object"]], 10)
        taken = [CELLS[cell] for cell, _ in problem.layout.objects]
        free = next(cell for cell in CELLS if cell not in taken)
        for place in (CORNERS[(problem.answer + 2) % 4], CELLS[problem.labels["object"]], free, (8, 32)):
            twice = video[-1:].copy()
            twice[0][square(place, 10)] = video[0][home]
            assert read(problem, twice).answer is None
            assert read(problem, twice + rng.normal(0, 0.08, twice.shape).astype(np.float32)).answer is None
            assert read(problem, blurred(twice)).answer is None


@pytest.mark.slow
def test_a_video_that_stops_on_the_way_reads_as_none(problems):
    for problem in problems[:40]:
        for last in (1, 4, 6, 8):
            assert read(problem, played(problem)[: last + 1]).answer is None


@pytest.mark.slow
def test_an_object_a_little_off_is_still_in_its_box(problems):
    for problem in problems[:50]:
        y, x = CORNERS[problem.answer]
        for dy, dx in product((-1, 0, 1), repeat=2):
            frame = played(problem)[-1:]
            room = frame[0][square((y, x), 12)].copy()
            frame[0][square((y, x), 12)] = np.roll(room, (dy, dx), (0, 1))
            seen = read(problem, frame)
            assert seen.answer == seen.forced == problem.answer


@pytest.mark.slow
def test_a_faint_video_keeps_the_order_of_the_scores(problems):
    for problem in problems[:100]:
        seen = read(problem, 0.15 * blurred(played(problem)) + np.float32(0.85 * 0.5))
        assert seen.answer is None
        assert seen.forced == problem.answer


# the text decides


def test_swapped_names_another_object_or_box_of_the_same_picture(problems):
    for problem in problems[:60]:
        scene = problem.layout
        assert TASK.swapped(problem) == problem
        corner = (problem.answer + 1) % 4
        other = TASK.swapped(problem, box=corner)
        changed = [(a, b) for a, b in zip(problem.prompt.split(), other.prompt.split(), strict=True) if a != b]
        assert changed == [(COLOURS[scene.boxes[problem.answer]], COLOURS[scene.boxes[corner]])]
        assert (other.answer, other.labels["box"]) == (corner, scene.boxes[corner])
        assert (other.name, other.labels["object"]) == (problem.name, problem.labels["object"])
        assert other.key == canonical_key(other.layout) != problem.key
        k = (scene.named + 1) % len(scene.objects)
        other = TASK.swapped(problem, object=k)
        assert (other.answer, other.labels["object"]) == (problem.answer, scene.objects[k][0])
        assert other.prompt != problem.prompt
        assert TASK.swapped(other, object=scene.named) == problem


@pytest.mark.parametrize("swap", [{"object": 5}, {"object": -1}, {"box": 4}, {"box": -1}])
def test_what_is_not_there_cannot_be_named(problems, swap):
    (name, value), *_ = swap.items()
    with pytest.raises(ValueError, match=rf"{name}={value}\b.*\b0 to \d"):
        TASK.swapped(problems[0], **swap)


def test_answers_are_balanced_and_regions_tell_nothing(problems, many):
    assert len({p.regions for p in many}) == 1
    assert [np.array(box) * 64 for box in problems[0].regions][1].tolist() == [48, 0, 64, 16]
    answers = np.array([p.answer for p in many])
    assert np.abs(np.bincount(answers) / len(many) - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / len(many))
    boxes = np.array([p.regions for p in many]).reshape(len(many), -1)
    assert abs(fit(boxes, answers) - 0.25) < 0.05


@pytest.mark.slow
def test_neither_picture_nor_prompt_alone_gives_the_answer_away(many):
    """A guesser that knows what the picture leaves possible is right in 1 of 4; linear classifiers of pixels, of
    words, and of both side by side do no better."""
    pixels = np.stack([TASK.image(p) for p in many]).reshape(len(many), 16, 4, 16, 4, 3)
    pixels = pixels.mean((2, 4), dtype=np.float32) / 255 - 0.5
    pixels = pixels.reshape(len(many), -1)
    spoken = sorted({word for p in many for word in p.prompt.split()})
    words = np.array([[2.0 * (f" {word} " in f" {p.prompt} ") for word in spoken] for p in many], dtype=np.float32)
    answers = np.array([p.answer for p in many])
    guesser = np.mean([1 / len(TASK.plausible_answers(p)) for p in many[1500:]])
    scores = {
        name: fit(seen, answers)
        for name, seen in {"pixels": pixels, "words": words, "both": np.hstack([pixels, words])}.items()
    }
    print(f"\nguesser {guesser:.3f}", *(f"{name} {score:.3f}" for name, score in scores.items()))  # noqa: T201
    assert all(abs(score - guesser) < 0.1 for score in scores.values())


# bad requests


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 70}, r"task\.image_size=70.*\b16\b.*\b64\b"),
        ({"image_size": 48}, r"task\.image_size=48.*\b16\b.*\b64\b"),
        ({"frames": 4}, r"task\.frames=4.*4k \+ 1.*\b5\b"),
        ({"frames": 1}, r"task\.frames=1.*4k \+ 1.*\b5\b"),
        ({"frames": 12}, r"task\.frames=12.*4k \+ 1.*\b5\b"),
        ({"objects": [1, 3]}, r"task\.objects=\[1, 3\].*fewest.*most.*\b2 to 5\b"),
        ({"objects": [4, 3]}, r"task\.objects=\[4, 3\].*fewest.*most.*\b2 to 5\b"),
        ({"objects": [2, 6]}, r"task\.objects=\[2, 6\].*fewest.*most.*\b2 to 5\b"),
        ({"objects": [3]}, r"task\.objects=\[3\].*fewest.*most.*\b2 to 5\b"),
        ({"problems": 0}, r"task\.problems=0.*\b1\b"),
        ({"seeds": 0}, r"task\.seeds=0.*\b1\b"),
        ({"seed": -1}, r"task\.seed=-1.*\b0\b"),
    ],
)
def test_a_world_that_cannot_be_built_is_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        SelectConfig(**settings)


def test_settings_build_the_task_they_describe():
    assert SelectConfig().build() == Select()
    assert SelectConfig(objects=[3, 4], image_size=128, frames=5, seed=3).build() == Select(
        image_size=128, frames=5, objects=(3, 4), seed=3
    )
    assert split_of(TASK.problems("test", 1)[0].key) == "test"
