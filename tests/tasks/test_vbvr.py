"""Problems as folders: what is written is read back, what other generators write is read, nothing leaves the root."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from cosprobe.tasks.hide import Hide
from cosprobe.tasks.maze import Maze
from cosprobe.tasks.vbvr import read_problem, write_problem

FILES = {"first_frame.png", "final_frame.png", "ground_truth.mp4", "prompt.txt", "metadata.json"}


@pytest.fixture
def written(tmp_path) -> Path:
    task = Hide()
    return write_problem(task, task.problems("test", 1)[0], tmp_path / "data")


def foreign(folder: Path, note: str = "metadata.json", **parameters: object) -> Path:
    """A problem as the generators of VBVR write it with videos off."""
    folder.mkdir()
    for name, level in (("first_frame.png", 10), ("final_frame.png", 200)):
        Image.fromarray(np.full((8, 8, 3), level, dtype=np.uint8)).save(folder / name)
    (folder / "prompt.txt").write_text("Push the first domino.")
    about = {"task_id": "dominoes_00000003", "generator": "dominoes", "timestamp": "2026-11-22T08:48:46.387996"}
    (folder / note).write_text(json.dumps(about | {"parameters": parameters}))
    return folder


@pytest.mark.parametrize("task", [Hide(), Maze(), Hide(image_size=80, frames=5)], ids=["hide", "maze", "80 px"])
def test_what_is_written_is_read_back(task, tmp_path):
    for problem in task.problems("test", 4):
        folder = write_problem(task, problem, tmp_path)
        assert folder.parent == tmp_path / task.name
        assert {path.name for path in folder.iterdir()} == FILES
        back, video = read_problem(folder), task.video(problem)
        assert np.array_equal(back.first, task.image(problem))
        assert np.array_equal(back.final, video[-1])
        assert (back.prompt, back.answer, back.name) == (problem.prompt, problem.answer, folder.name)
        labels = back.metadata["parameters"]["labels"]
        assert {k: tuple(v) if isinstance(v, list) else v for k, v in labels.items()} == problem.labels
        assert back.metadata["parameters"]["solutions"] == list(task.solutions(problem))
        assert back.metadata["param_hash"] == problem.key
        assert back.video.shape == video.shape
        assert np.abs(back.video.astype(int) - video).mean() < 4  # lossy
        read = task.parse(problem, back.video / np.float32(255))
        assert read.answer in task.solutions(problem)
        assert read.path == 1.0


def test_the_video_plays_at_sixteen_frames_a_second_as_in_vbvr(written):
    with av.open(str(written / "ground_truth.mp4")) as film:
        stream = film.streams.video[0]
        assert (stream.average_rate, stream.codec_context.name, stream.codec_context.pix_fmt) == (
            16,
            "mpeg4",
            "yuv420p",
        )


def test_problems_have_folders_of_their_own_and_writing_again_changes_nothing(tmp_path):
    task = Maze()
    several = [*task.problems("train", 6), *task.problems("test", 6)]
    places = [write_problem(task, problem, tmp_path) for problem in several]
    assert len(set(places)) == 12
    before = {path: path.read_bytes() for path in places[0].iterdir() if path.suffix != ".mp4"}
    assert write_problem(task, several[0], tmp_path) == places[0]
    assert {path: path.read_bytes() for path in before} == before
    assert {path.name for path in places[0].iterdir()} == FILES


def test_metadata_comes_last_so_a_folder_with_metadata_is_complete(tmp_path, monkeypatch):
    task = Hide()
    problem = task.problems("test", 1)[0]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cosprobe.tasks.vbvr.write_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_problem(task, problem, tmp_path)
    (folder,) = (tmp_path / "hide").iterdir()
    assert not (folder / "metadata.json").exists()
    with pytest.raises(ValueError, match=r"metadata\.json"):
        read_problem(folder)
    monkeypatch.undo()
    assert write_problem(task, problem, tmp_path) == folder
    assert read_problem(folder).answer == problem.answer


@pytest.mark.parametrize("note", ["metadata.json", "question_metadata.json"])
def test_what_other_generators_write_is_read(tmp_path, note):
    back = read_problem(foreign(tmp_path / "dominoes_00000003", note, answer=7, gap_after=6))
    assert (back.name, back.answer, back.prompt, back.video) == ("dominoes_00000003", 7, "Push the first domino.", None)
    assert (back.first.mean(), back.final.mean()) == (10, 200)
    assert back.metadata["parameters"]["gap_after"] == 6


def test_an_export_without_labels_has_no_answer(tmp_path):
    assert read_problem(foreign(tmp_path / "a")).answer is None


@pytest.mark.parametrize(
    ("field", "name"),
    [("task", ".."), *product(("task", "kind", "split"), ("../../elsewhere/x", "/tmp/x", "a/../../../x", "a/b"))],
)
def test_a_name_that_leaves_the_root_is_refused(tmp_path, field, name):
    task, root = Hide(), tmp_path / "deep" / "root"
    problem = replace(task.problems("test", 1)[0], **{field: name})
    with pytest.raises(ValueError, match=re.escape(name)):
        write_problem(task, problem, root)
    assert not list(tmp_path.rglob("*.png"))


def test_a_link_that_leaves_the_root_is_refused_when_writing(tmp_path):
    task, root, outside = Hide(), tmp_path / "root", tmp_path / "outside"
    problem = task.problems("test", 1)[0]
    root.mkdir()
    outside.mkdir()
    (root / "hide").symlink_to(outside)
    with pytest.raises(ValueError, match=f"{root}/hide.*{root}'"):
        write_problem(task, problem, root)
    (root / "hide").unlink()
    folder = write_problem(task, problem, root)
    kept = outside / "kept.txt"
    kept.write_text("mine")
    for name in ("prompt.txt", f".prompt.part-{os.getpid()}.txt"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(kept)
        with pytest.raises(ValueError, match=f"{folder}/{re.escape(name)}.*{folder}'"):
            write_problem(task, problem, root)
        (folder / name).unlink(missing_ok=True)
    assert kept.read_text() == "mine"
    assert list(outside.iterdir()) == [kept]


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_link_that_leaves_the_folder_is_refused_when_reading(written, tmp_path, name):
    (written / name).rename(tmp_path / name)
    (written / name).symlink_to(tmp_path / name)
    with pytest.raises(ValueError, match=f"{written}/{re.escape(name)}.*{written}'"):
        read_problem(written)


@pytest.mark.parametrize("name", sorted(FILES - {"ground_truth.mp4"}))
def test_a_file_that_is_missing_is_named(written, name):
    (written / name).unlink()
    with pytest.raises(ValueError, match=f"{written}.*{re.escape(name)}"):
        read_problem(written)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_that_is_damaged_is_named(written, name):
    (written / name).write_bytes(b"\xff\xfe not what it was")
    with pytest.raises(ValueError, match=rf"{written}/{re.escape(name)}.*\(.+\)"):
        read_problem(written)


@pytest.mark.parametrize("name", ["first_frame.png", "final_frame.png", "ground_truth.mp4"])
def test_half_a_file_is_damaged(written, name):
    content = (written / name).read_bytes()
    (written / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{written}/{re.escape(name)}.*\(.+\)"):
        read_problem(written)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"metadata\.json.*`parameters`"),
        ('{"parameters": 3}', r"metadata\.json.*`parameters`"),
        ('{"parameters": {"answer": "red"}}', r"metadata\.json.*parameters\.answer='red'.*whole number or null"),
        ('{"parameters": {"answer": true}}', r"metadata\.json.*parameters\.answer=True.*whole number or null"),
    ],
)
def test_metadata_that_makes_no_sense(written, content, message):
    (written / "metadata.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_problem(written)


def test_pictures_of_different_sizes_are_refused(tmp_path):
    folder = foreign(tmp_path / "a", answer=1)
    Image.fromarray(np.zeros((16, 8, 3), dtype=np.uint8)).save(folder / "final_frame.png")
    with pytest.raises(ValueError, match=f"{folder}.*size"):
        read_problem(folder)


def test_a_place_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path / "none")):
        read_problem(tmp_path / "none")
