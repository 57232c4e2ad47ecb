"""Films of x0-hat: files that can be read again, what probes read at every step, images of one's own."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from cosprobe.activations import watch
from cosprobe.behaviour.films import FilmedRun, contact_sheet, film, filmed, own_run, pictures, read_image, write_film
from cosprobe.config import FilmConfig
from cosprobe.ensembles import ProbeScorer
from cosprobe.errors import InputError
from cosprobe.evaluation import Grid
from cosprobe.tasks import with_noise
from cosprobe.video_files import read_video
from tests.examples.causal import finished

SEED = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("run"))


def invented(steps=3, frames=2, proba=True) -> FilmedRun:
    clips = np.zeros((steps, frames, 16, 16, 3), np.uint8)
    clips[:, :, :, :, 0] = (np.arange(steps * frames) * 40).reshape(steps, frames, 1, 1)
    read = np.array([[0.1, 0.9], [np.nan, np.nan], [0.7, 0.3]]) if proba else None
    return FilmedRun("one", "draw", tuple(range(0, 2 * steps, 2)), clips, read, (1,))


@pytest.mark.parametrize("proba", [True, False])
def test_files_hold_every_frame_and_every_step(tmp_path, proba):
    video, gif, sheet, numbers = write_film(invented(proba=proba), tmp_path)
    assert len(read_video(video)) == 3 * 2 and sheet.stat().st_size > 1000
    with Image.open(gif) as moving:
        assert moving.n_frames == 3
    saved = json.loads(numbers.read_text())
    assert saved["steps"] == [0, 2, 4] and saved["right"] == [1]
    assert saved["probabilities"] == ([[0.1, 0.9], [None, None], [0.7, 0.3]] if proba else None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.gif", "one.json", "one.mp4", "one.png"]


def test_pictures_follow_steps_then_frames():
    shown = list(pictures(invented()))
    assert len(shown) == 6 and all(picture.shape == shown[0].shape for picture in shown)
    red = [picture[150, 100].tolist() for picture in shown]
    assert [colour[0] for colour in red] == [0, 40, 80, 120, 160, 200] and all(c[1:] == [0, 0] for c in red)
    assert shown[0].shape[0] % 2 == shown[0].shape[1] % 2 == 0  # MP4 needs it


@pytest.mark.parametrize("proba", [True, False])
@pytest.mark.parametrize("length", [1, 2])
def test_the_reference_moves_beside_x0_hat(tmp_path, proba, length):
    """Frame by frame; one that is a last frame alone stands still."""
    reference = np.zeros((length, 16, 16, 3), np.uint8)
    reference[..., 2] = (50 + np.arange(length) * 100).reshape(-1, 1, 1)
    run = replace(invented(proba=proba), reference=reference)
    shown = list(pictures(run))
    narrow = next(pictures(replace(run, reference=None)))
    assert shown[0].shape[1] > narrow.shape[1] and shown[0].shape[1] % 2 == 0
    blue = [picture[..., 2][~picture[..., :2].any(-1)].max() for picture in shown]  # the brightest pure blue
    assert blue == [50 + 100 * min(i % 2, length - 1) for i in range(6)]
    panels = contact_sheet(run).axes
    assert [panel.get_title(loc="left") for panel in panels][-1] == "reference" and len(panels) == 4
    np.testing.assert_array_equal(panels[-1].images[0].get_array(), reference[-1])
    assert replace(run, right=(0, 3)).reference_title == "right answer, 1 of 2"
    assert len(read_video(write_film(run, tmp_path)[0])) == 6


def test_the_sheet_names_what_the_probe_reads():
    panels = contact_sheet(invented()).axes
    titles = [panel.get_title(loc="left") for panel in panels]
    assert titles == ["step 0: 1 (0.90)", "step 2", "step 4: 0 (0.70)"]
    colours = [panel._left_title.get_color() for panel in panels]
    assert colours[0] != colours[1] == colours[2] == "black"


@pytest.mark.slow
def test_clips_are_those_of_x0_hat_and_probabilities_those_of_the_cells(run):
    sampler, bank, folder = run.sampler, run.bank, run.folder
    scorer = ProbeScorer.of(bank, Grid.load(folder), sampler.task.name)
    problems = sampler.task.problems("test", 2, sampler.task.kinds[0])
    found = list(filmed(sampler, problems, scorer, (0, 2), SEED))
    expected = watch(sampler, with_noise(problems, SEED), (0, 2))
    for one, clips, problem in zip(found, expected, problems, strict=True):
        np.testing.assert_array_equal(one.clips, (np.clip(clips, 0, 1) * 255).round().astype(np.uint8))
        np.testing.assert_array_equal(one.reference, sampler.task.video(problem))
        assert one.right == sampler.task.solutions(problem) and one.name.endswith(str(problem.index))
        np.testing.assert_allclose(one.proba.sum(axis=1), 1, atol=1e-5)


@pytest.mark.slow
def test_an_image_of_ones_own_is_filmed_without_answers(run, tmp_path):
    sampler = run.sampler
    problem = sampler.task.problems("test", 1)[0]
    Image.fromarray(sampler.task.image(problem)).resize((200, 200)).save(tmp_path / "mine.png")
    use = FilmConfig(image=str(tmp_path / "mine.png"), prompt=problem.prompt)
    one = own_run(sampler, use, (0, 1), SEED)
    assert one.name == "mine" and one.proba is None and one.right == () and len(one.clips) == 2
    assert one.clips.shape[2:] == (*sampler.task.image(problem).shape,)


@pytest.mark.slow
def test_bad_input_is_one_line(run, tmp_path):
    given = (run.sampler, run.task, run.bank)
    for use, said in (
        (FilmConfig(kind="nothing"), r"use\.kind='nothing'.*one_exit"),
        (FilmConfig(steps="7"), r"use\.steps='7'.*0 to 2"),
        (FilmConfig(image=str(tmp_path / "none.png"), prompt="x"), r"use\.image='.*none\.png'.*image"),
    ):
        with pytest.raises(InputError, match=said):
            film(*given, use, SEED, run.folder)
    assert not (run.folder / "report" / "film").exists()


def test_images_that_do_not_fit_are_named(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "wide.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(InputError, match=r"wide\.png.*30 x 20.*32:32"):
        read_image(tmp_path / "wide.png", 32, 32)
    with pytest.raises(InputError, match=r"text\.png"):
        read_image(tmp_path / "text.png", 32, 32)
    assert read_image(tmp_path / "wide.png", 40, 60).shape == (40, 60, 3)


@pytest.mark.parametrize(("given", "missing"), [("image", "prompt"), ("prompt", "image")])
def test_an_image_needs_a_prompt(given, missing):
    with pytest.raises(InputError, match=re.escape(f"use.{given}='x'") + rf".*use\.{missing}"):
        FilmConfig(**{given: "x"})
