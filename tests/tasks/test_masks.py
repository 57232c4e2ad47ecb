"""Regions that are mask images: shares of tokens against pixel-wise means, kinds of files, and what is refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cosprobe.activations import Pooling, box_masks
from cosprobe.config import CaptureConfig
from cosprobe.errors import InputError
from cosprobe.reporting.film import film_row
from cosprobe.tasks import FolderConfig, Mask, TableConfig, with_margin
from cosprobe.tasks.regions import digest_of, place_of, read_mask, shares_of
from cosprobe.tasks.vbvr import write_problem
from tests.examples.folders import picture, write

SIZE = (48, 32)  # width and height of the images
SIDE = 96  # of the frame
TOKENS = 8  # of a side of the frame
ANSWER = "parameters.answer"
FITS = ["pad", "crop", "stretch"]


def in_frame(values: np.ndarray, fit: str) -> np.ndarray:
    """An image of SIZE as the fitted frame, every pixel repeated."""
    if fit == "stretch":
        return np.kron(values, np.ones((3, 2)))
    if fit == "crop":
        return np.kron(values, np.ones((3, 3)))[:, 24:-24]
    return np.pad(np.kron(values, np.ones((2, 2))), ((16, 16), (0, 0)))


def token_means(frame: np.ndarray, rows: int, columns: int) -> np.ndarray:
    return frame.reshape(rows, len(frame) // rows, columns, -1).mean((1, 3))


def blob(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(SIZE[::-1]) < 0.3


def box_of_pixels(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    inside = np.zeros(SIZE[::-1], dtype=bool)
    inside[y0:y1, x0:x1] = True
    return inside


def save(inside: np.ndarray, file: Path) -> Path:
    Image.fromarray(inside).save(file)
    return file


def problems(root: Path, masks=lambda number: [blob(number), blob(number + 100)], count=24, **fields) -> Path:
    for number in range(count):
        folder = write(root / f"{number:03d}", number, **fields)
        for name, inside in zip(("a.png", "b.png"), masks(number), strict=False):
            save(inside, folder / name)
    return root


def build(root: Path, **settings):
    return FolderConfig(
        **{"root": str(root), "label": ANSWER, "masks": ["a.png", "b.png"], "height": SIDE, "width": SIDE} | settings
    ).build()


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("tokens", [(8, 8), (3, 12), (1, 1), (96, 96)])
def test_shares_are_the_means_of_the_pixels_of_each_token(tmp_path, fit, tokens):
    task = build(problems(tmp_path), fit=fit)
    assert task.regions == 2
    for problem in task.all[:3]:
        number = int(problem.prompt.split()[1])
        for mask, seed in zip(problem.regions, (number, number + 100), strict=True):
            expected = token_means(in_frame(blob(seed), fit), *tokens)
            np.testing.assert_allclose(mask.shares(*tokens), expected, atol=1e-6)


@pytest.mark.parametrize("fit", FITS)
def test_a_mask_that_is_a_box_gives_the_features_of_the_box(tmp_path, fit):
    """The sides of the boxes lie between tokens."""
    boxes = {
        "pad": [(0, 4, 12, 16), (18, 10, 48, 28)],
        "crop": [(12, 4, 16, 32), (20, 0, 40, 12)],
        "stretch": [(0, 0, 6, 4), (12, 8, 48, 28)],
    }[fit]
    root = problems(tmp_path, lambda number: [box_of_pixels(*box) for box in boxes], boxes=[list(b) for b in boxes])
    masked = build(root, fit=fit).all
    boxed = build(root, fit=fit, masks=[], boxes="parameters.boxes").all
    pairs = [(a, next(b for b in boxed if b.layout.name == a.layout.name)) for a in masked[:4]]
    settings, size = CaptureConfig(pooling="region", frames=True), (3, TOKENS, TOKENS)
    tokens = torch.randn(4, 3 * TOKENS**2, 5)
    first, second = (Pooling.of(settings, each) for each in zip(*pairs, strict=True))
    assert torch.equal(first.masks(4, TOKENS, TOKENS), second.masks(4, TOKENS, TOKENS))
    assert torch.equal(first(tokens, size), second(tokens, size))
    assert first(tokens, size).shape == (4, 4, 2, 5)


def test_a_box_and_a_mask_are_regions_of_one_sample(tmp_path):
    whole = Mask(
        digest_of(np.ones((4, 4), bool)), (0.0, 0.0, 1.0, 1.0), save(np.ones((4, 4), bool), tmp_path / "a.png")
    )
    weights = box_masks([(0.0, 0.0, 0.5, 1.0), whole], 2, 2)
    assert weights.tolist() == [[1, 0, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("fit", FITS)
def test_masks_of_another_size_are_scaled(tmp_path, fit):
    larger = np.kron(blob(0), np.ones((3, 3))) > 0
    root = problems(tmp_path, lambda number: [blob(0), larger])
    for problem in build(root, fit=fit).all[:2]:
        small, large = problem.regions
        np.testing.assert_allclose(small.shares(5, 7), large.shares(5, 7), atol=1e-6)


def test_odd_sizes_may_be_rounded(tmp_path):
    for number in range(24):
        folder = write(tmp_path / f"{number:03d}", number, picture(number, (51, 33)))
        save(np.ones((16, 26), bool), folder / "a.png")
    assert build(tmp_path, masks=["a.png"]).regions == 1


def test_kinds_of_files_hold_the_same_mask(tmp_path):
    inside = blob(7)
    grey = Image.fromarray((inside * 255).astype(np.uint8))
    clear = Image.new("RGBA", SIZE, (200, 30, 30, 255))
    clear.putalpha(grey)
    opaque = Image.merge("RGBA", (grey, grey, grey, Image.new("L", SIZE, 255)))
    palette = grey.convert("P")
    kinds = [
        Image.fromarray(inside),
        grey,
        Image.merge("LA", (grey, grey)),
        clear,
        opaque,
        grey.convert("RGB"),
        palette,
    ]
    for number, kind in enumerate(kinds):
        kind.save(tmp_path / f"{number}.png")
        np.testing.assert_array_equal(read_mask(tmp_path / f"{number}.png"), inside)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.unlink(), "is missing"),
        (lambda f: f.write_bytes(f.read_bytes()[:60]), "cannot be read"),
        (lambda f: f.write_bytes(b"no image"), "cannot be read"),
        (lambda f: Image.new("L", SIZE).save(f), "no pixel is inside"),
        (lambda f: Image.new("L", SIZE, 1).save(f), "largest value 1 of 255"),
        (lambda f: save(box_of_pixels(0, 0, 3, 32), f), "cut off by task.fit=crop"),
        (lambda f: Image.new("L", SIZE[::-1], 255).save(f), "32 x 48 pixels, expected .* 48 x 32"),
        (lambda f: Image.new("RGB", SIZE, (255, 0, 0)).save(f), "has colours"),
        (lambda f: Image.new("I;16", SIZE, 65535).save(f), "mode I;16"),
        (lambda f: Image.new("1", (20000, 6000), 1).save(f), "20000 x 6000 pixels"),
        (lambda f: (f.unlink(), os.symlink(f.parents[2] / "secret.png", f)), "points outside"),
    ],
    ids=["missing", "truncated", "no image",  "empty", "labels", "cropped", "shape", "colours", "16 bits",
         "too large", "link"],
)  # fmt: skip
def test_broken_masks_are_named_and_stop_or_are_left_out(tmp_path, damage, message):
    save(blob(1), tmp_path / "secret.png")
    root = problems(tmp_path / "set")
    damage(root / "007" / "b.png")
    with pytest.raises(InputError, match=f"007/b.png.*{message}.*1 broken") as caught:
        build(root, fit="crop")
    assert "\n" not in str(caught.value)
    task = build(root, fit="crop", on_error="skip")
    assert len(task.all) == 23 and any("007/b.png" in notice for notice in task.notices)


def test_masks_are_part_of_the_name_of_a_problem(tmp_path):
    root = problems(tmp_path / "set")
    before = build(root)
    assert {p.name for p in before.all}.isdisjoint({p.name for p in build(root, masks=["a.png"]).all})
    root.rename(tmp_path / "moved")
    assert build(tmp_path / "moved").content == before.content
    changed = blob(3)
    changed[0, 0] = not changed[0, 0]
    save(changed, tmp_path / "moved" / "003" / "a.png")
    after = build(tmp_path / "moved")
    assert len({p.name for p in before.all} & {p.name for p in after.all}) == 23


def test_a_mask_that_changes_while_it_is_used_is_refused(tmp_path):
    mask = build(problems(tmp_path)).all[0].regions[0]
    save(~read_mask(mask.file), mask.file)
    with pytest.raises(InputError, match=r"a\.png.*has changed"):
        box_masks([mask], 4, 4)


def test_the_size_of_a_mask_in_memory_does_not_depend_on_its_pixels(tmp_path):
    root = problems(tmp_path, lambda number: [blob(0), np.kron(blob(0), np.ones((20, 20))) > 0])
    small, large = build(root).all[0].regions
    assert len(pickle.dumps(large)) == len(pickle.dumps(small)) < 1000


def test_columns_of_tables_name_masks(tmp_path):
    rows = ["id,prompt,image,answer,where"]
    for number in range(24):
        picture(number).save(tmp_path / f"{number}.png")
        save(blob(number), tmp_path / f"mask{number}.png")
        rows.append(f"q{number},what {number},{number}.png,{'AB'[number % 2]},mask{number}.png")
    file = tmp_path / "data.csv"
    file.write_text("\n".join(rows))
    settings = {"file": str(file), "label": "answer", "masks": ["where"], "height": SIDE, "width": SIDE}
    for problem in TableConfig(**settings).build().all:
        seed = int(problem.prompt.split()[1])
        np.testing.assert_allclose(
            problem.regions[0].shares(8, 8), token_means(in_frame(blob(seed), "pad"), 8, 8), atol=1e-6
        )
        assert "where" not in problem.layout.fields
    with pytest.raises(InputError, match=r"task\.masks='there'.*where"):
        TableConfig(**settings | {"masks": ["there"]}).build()
    save(blob(1), tmp_path.parent / "outside.png")
    for value, message in (("nowhere.png", "expected the path"), ("../outside.png", "leads out of"), ("", "expected")):
        rows[4] = f"q3,what 3,3.png,B,{value}"
        file.write_text("\n".join(rows))
        with pytest.raises(InputError, match=f"row 4: where=.*{message}"):
            TableConfig(**settings).build()


def test_a_margin_moves_masks(tmp_path):
    task = build(problems(tmp_path), fit="stretch")
    framed = with_margin(task, 2 * SIDE, 2 * SIDE)
    for problem in framed.problems("train", 3):
        number = int(problem.prompt.split()[1])
        frame = np.pad(in_frame(blob(number), "stretch"), SIDE // 2)
        np.testing.assert_allclose(problem.regions[0].shares(12, 12), token_means(frame, 12, 12), atol=1e-6)


def test_what_draws_boxes_does_not_draw_masks(tmp_path, monkeypatch):
    """Answers of problems from disk are not regions, also where there are as many of them."""
    (tmp_path / "reads_masks.py").write_text("def two(video, fields):\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    root = problems(tmp_path / "set")
    for settings in ({"masks": ["a.png", "b.png", "b.png"]}, {"masks": [], "boxes": "3x1"}):
        task = build(root, parser="reads_masks:two", **settings)
        assert task.candidates == task.regions == 3
        assert film_row(task, "right", task.all[0], np.zeros((1, 2, SIDE, SIDE, 3)), 1).regions == ()
    with pytest.raises(InputError, match="masks, expected boxes"):
        write_problem(build(root), build(root).all[0], tmp_path / "vbvr")


def test_boxes_and_masks_are_not_set_together():
    with pytest.raises(InputError, match=r"task\.boxes='1x1'.*task\.masks"):
        FolderConfig(masks=["a.png"], boxes="1x1")


@pytest.mark.parametrize("seed", range(20))
def test_shares_of_any_mask_add_up_to_its_area(seed):
    rng = np.random.default_rng(seed)
    shape, size = rng.integers(1, 200, 2), rng.integers(8, 300, 2)
    inside = rng.random(shape[::-1]) < rng.random()
    rows, columns = rng.integers(1, 30, 2)
    place = place_of(tuple(shape), tuple(size), "pad")
    shares = shares_of(inside, place, rows, columns)
    area = (place[2] - place[0]) * (place[3] - place[1])
    assert shares.min() >= 0 and shares.max() <= 1 + 1e-6
    assert shares.mean() == pytest.approx(inside.mean() * area, abs=1e-6)
