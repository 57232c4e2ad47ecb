"""Reference videos and last frames beside problems from disk."""

from __future__ import annotations

import os

import av
import numpy as np
import pytest
from PIL import Image

from cosprobe.errors import InputError
from cosprobe.tasks import FolderConfig, NoReference, has_path, on_path, reference_of, with_margin
from cosprobe.video_files import read_frames, write_video
from tests.examples.folders import picture, write

FRAMES = 5
FIRST, LAST = (200, 40, 40), (30, 60, 210)  # colours of the first and the last frame


def ramp(count: int, size=(48, 32)) -> np.ndarray:
    """A video of even frames whose colour goes from FIRST to LAST."""
    colours = np.linspace(FIRST, LAST, count).round().astype(np.uint8)
    return np.broadcast_to(colours[:, None, None], (count, *size[::-1], 3)).copy()


def problems(root, videos=lambda number: ramp(FRAMES), finals=True, count=24):
    for number in range(count):
        folder = write(root / f"{number:03d}", number, Image.new("RGB", (48, 32), (number, 255, 0)))
        if (video := videos(number)) is not None:
            write_video(folder / "ground_truth.mp4", video)
        if finals:
            picture(number + 500).save(folder / "final_frame.png")
    return root


def build(root, **settings):
    given = {"root": str(root), "label": "parameters.answer", "frames": FRAMES, "height": 64, "width": 96}
    return FolderConfig(**given | settings).build()


def by_number(task) -> dict:
    return {int(problem.prompt.split()[1]): problem for problem in task.all}


def test_frames_are_chosen_evenly_from_the_first_to_the_last(tmp_path):
    lengths = {0: 1, 1: 2, 2: FRAMES, 3: 9, 4: 50}
    root = problems(tmp_path, lambda number: ramp(lengths.get(number, FRAMES)))
    found = by_number(task := build(root))
    for number, length in lengths.items():
        video = task.video(found[number])
        assert video.shape == (FRAMES, 64, 96, 3) and video.dtype == np.uint8
        chosen = np.linspace(0, length - 1, FRAMES).round().astype(int)
        expected = ramp(length)[chosen][:, 0, 0].astype(int)
        assert np.abs(video[:, 32, 48].astype(int) - expected).max() <= 6  # the file is lossy
    assert np.array_equal(reference_of(task, found[4]), task.video(found[4]))


def save_with_a_pixel_of_its_own(image: np.ndarray, number: int, root) -> None:
    """Problems with equal images would be in one split."""
    image = image.copy()
    image[-1, -1] = number
    Image.fromarray(image).save(root / f"{number:03d}" / "first_frame.png")


def test_frames_are_fitted_as_the_image_is(tmp_path):
    """A white box moves with the image, and the padding has the colour of that of the image."""
    film = np.zeros((FRAMES, 32, 48, 3), dtype=np.uint8)
    film[:, 8:24, 12:36] = 255
    root = problems(tmp_path, lambda number: film)
    for number in range(24):
        save_with_a_pixel_of_its_own(film[0], number, root)
    for fit in ("pad", "crop", "stretch"):
        task = build(root, fit=fit, height=64, width=64)
        image, video = (each(task.all[0]).astype(int) for each in (task.image, task.video))
        assert np.abs(video - image).mean() < 4
    for number in range(24):
        save_with_a_pixel_of_its_own(np.full((32, 48, 3), (0, 255, 0), dtype=np.uint8), number, root)
    video = (task := build(root, height=64, width=64)).video(task.all[0])
    assert (video[:, 0] == (0, 255, 0)).all() and (video[:, 32, 0] < 40).all()


def test_the_last_frame_stands_alone_where_there_is_no_video(tmp_path):
    found = by_number(task := build(problems(tmp_path, lambda number: None)))
    expected = np.asarray(picture(503).resize((96, 64)))
    np.testing.assert_array_equal(task.video(found[3]), expected[None])
    wide = with_margin(task, 128, 128)
    assert wide.video(wide.problems("train", 1)[0]).shape == (1, 128, 128, 3)


def test_a_problem_without_either_has_no_reference(tmp_path):
    task = build(problems(tmp_path, lambda number: None, finals=False))
    assert reference_of(task, task.all[0]) is None
    with pytest.raises(NoReference, match=f"{task.all[0].layout.name}.*no reference video"):
        task.video(task.all[0])


def faststart(file):
    """Moves the index of an MP4 file to its beginning, as for files on web pages."""
    moved = file.with_suffix(".part")
    with av.open(str(file)) as source, av.open(str(moved), "w", format="mp4", options={"movflags": "faststart"}) as end:
        stream = end.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                end.mux(packet)
    moved.rename(file)
    assert len(list(read_frames(file))) == FRAMES


def cut(file):
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * 0.8)])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: cut(f), "ground_truth.mp4.*breaks off|ground_truth.mp4.*cannot be read"),
        (lambda f: (faststart(f), cut(f)), "ground_truth.mp4.*breaks off"),
        (lambda f: f.write_bytes(b""), "ground_truth.mp4.*cannot be read"),
        (lambda f: f.write_bytes(b"no video"), "ground_truth.mp4.*cannot be read"),
        (lambda f: (f.unlink(), os.symlink(f.parents[2] / "secret.mp4", f)), "ground_truth.mp4.*points outside"),
        (lambda f: (f.unlink(), (f.parent / "final_frame.png").write_bytes(b"x")), "final_frame.png.*cannot be read"),
    ],
    ids=["truncated", "truncated, index first", "empty", "no video", "link", "last frame"],
)  # fmt: skip
def test_broken_references_are_named_before_anything_is_sampled(tmp_path, damage, message):
    write_video(tmp_path / "secret.mp4", ramp(FRAMES))
    root = problems(tmp_path / "set")
    damage(root / "007" / "ground_truth.mp4")
    with pytest.raises(InputError, match=rf"007/({message}).*1 broken") as caught:
        build(root)
    assert "\n" not in str(caught.value)
    task = build(root, on_error="skip")
    assert len(task.all) == 23 and any("007/" in notice for notice in task.notices)


def test_a_video_that_is_damaged_later_is_named_when_it_is_used(tmp_path):
    task = build(problems(tmp_path))
    file = task.all[0].layout.video
    file.write_bytes(b"")
    with pytest.raises(InputError, match=r"ground_truth\.mp4.*cannot be read"):
        task.video(task.all[0])


def test_references_do_not_change_the_names_of_problems(tmp_path):
    before = build(problems(tmp_path / "one"))
    after = build(problems(tmp_path / "two", lambda number: None, finals=False))
    assert before.content == after.content


def test_no_path_is_read_from_lossy_videos(tmp_path, monkeypatch):
    (tmp_path / "reads_references.py").write_text("def two(video, fields):\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    task = build(problems(tmp_path / "set"), parser="reads_references:two")
    for problem in (task.all[0], with_margin(task, 128, 128).problems("train", 1)[0]):
        assert len(task.solutions(problem)) == 1 and not has_path(task, problem)
        with pytest.raises(InputError, match="lossy"):
            on_path(task, problem, 8, 8)
