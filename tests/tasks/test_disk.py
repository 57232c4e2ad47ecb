"""Problems from folders and tables: what is read, and what is refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosprobe.errors import InputError
from cosprobe.tasks import FolderConfig, TableConfig, Task, draw_samples, fresh_problems
from cosprobe.tasks.entries import encoded
from cosprobe.tasks.pictures import fitted
from cosprobe.tasks.regions import box_of
from tests.examples.folders import picture, write

ANSWER = "parameters.answer"


@pytest.fixture
def root(tmp_path):
    """60 problems in two nested folders with the same names, of both kinds of metadata files."""
    for number in range(60):
        note = "metadata.json" if number < 30 else "question_metadata.json"
        write(tmp_path / "set" / f"part{number // 30}" / "task" / f"{number % 30:05d}", number, note=note)
    return tmp_path / "set"


def build(root, **settings):
    return FolderConfig(root=str(root), **({"label": ANSWER} | settings)).build()


def test_every_folder_is_a_problem_with_its_label(root):
    task = build(root)
    assert isinstance(task, Task) and task.candidates == 0 and task.regions == 16
    assert len(task.all) == 60 == len({p.name for p in task.all})
    assert [t.names for t in task.targets] == [("0", "1", "2")]
    for problem in task.all:
        number = int(problem.prompt.split()[1])
        assert problem.labels == {"answer": number % 3}
        assert np.array_equal(task.image(problem), np.asarray(fitted(picture(number), (64, 64), "pad")))
    samples = draw_samples(task, FolderConfig(root=str(root), label=ANSWER, seeds=2), 0)
    assert len(samples) == 120 and {s.problem.split for s in samples} == {"train", "validation", "test"}
    with pytest.raises(InputError, match=r"has 0 problems.*task\.problems"):
        fresh_problems(task, "test", 0, 4, task.kinds)


def test_without_a_label_the_fields_are_listed(root):
    with pytest.raises(InputError, match=r"parameters\.answer \(3 classes, such as 0\).*parameters\.size \(60 classes"):
        build(root, label="")
    with pytest.raises(InputError, match=r"task\.label='parameters\.colour'.*parameters\.answer"):
        build(root, label="parameters.colour")


def test_a_moved_folder_holds_the_same_problems_and_a_changed_one_is_refused(root, tmp_path):
    config = FolderConfig(root=str(root), label=ANSWER)
    before = config.build()
    root.rename(tmp_path / "moved")
    config.root = str(tmp_path / "moved")
    assert config.build().content == before.content == config.verified
    note = next((tmp_path / "moved").rglob("metadata.json"))
    content = json.loads(note.read_text())
    content["parameters"]["answer"] = (content["parameters"]["answer"] + 1) % 3
    note.write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"hash .*{before.content}"):
        config.build()


def test_problems_with_one_image_or_group_are_in_one_split(tmp_path):
    for number in range(120):
        write(
            tmp_path / f"{number:03d}",
            number,
            picture(number // 2 if number < 40 else number),
            colour=f"c{number // 4}",
        )
    alone, grouped = build(tmp_path), build(tmp_path, group="parameters.colour")
    keys = {p.layout.name: p.key for p in alone.all}
    assert len(set(keys.values())) == 100
    assert all(keys[f"{n:03d}"] == keys[f"{n + 1:03d}"] for n in range(0, 40, 2))
    keys = {p.layout.name: p.key for p in grouped.all}
    assert len(set(keys.values())) == 30
    assert all(len({p.split for p in grouped.all if p.key == key}) == 1 for key in keys.values())


def test_a_split_on_disk_that_parts_equal_images_is_refused(tmp_path):
    for number in range(30):
        write(tmp_path / f"{number:03d}", number, picture(number // 2), part=("train", "test", "val")[number % 3])
    with pytest.raises(InputError, match="with the same image or group in"):
        build(tmp_path, split="parameters.part")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "first_frame.png").write_bytes((f / "first_frame.png").read_bytes()[:900]), "cannot be read"),
        (lambda f: (f / "first_frame.png").write_bytes(b"no image"), "cannot be read"),
        (lambda f: (f / "first_frame.png").unlink(), "has no first_frame.png"),
        (lambda f: (f / "prompt.txt").unlink(), "has no prompt.txt"),
        (lambda f: (f / "prompt.txt").write_bytes(b"\xff\xfe\xfa"), "cannot be read"),
        (lambda f: (f / "metadata.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "metadata.json").write_text("[1]"), "expected a JSON object"),
        (lambda f: (f / "metadata.json").write_text("[" * 100_000), "cannot be read"),
        (lambda f: (f / "metadata.json").write_text('{"a": ' * 970 + "1" + "}" * 970), "metadata.json"),
        (lambda f: (f / "metadata.json").write_text('{"parameters": {}}'), "parameters.answer=None"),
        (lambda f: (f / "metadata.json").write_text('{"parameters": {"answer": "two"}}'), "is a text, the other"),
        (lambda f: (f / "metadata.json").write_text('{"parameters": {"answer": [1]}}'), "expected a text or a number"),
        (lambda f: [path.unlink() for path in f.iterdir()], "is empty"),
        (lambda f: Image.new("1", (20000, 6000)).save(f / "first_frame.png"), "20000 x 6000 pixels"),
        (lambda f: Image.new("I;16", (8, 8)).save(f / "first_frame.png"), "mode I;16"),
    ],
    ids=["truncated", "no image", "missing", "no prompt", "not utf-8", "no json", "a list", "deep lists",
         "deep objects", "no label", "a text", "a list as label", "empty", "too large", "16 bits"],
)  # fmt: skip
def test_broken_problems_are_named_and_stop_or_are_left_out(root, damage, message):
    folder = root / "part0" / "task" / "00007"
    damage(folder)
    with pytest.raises(InputError) as caught:
        build(root)
    said = str(caught.value)
    assert message in said and "00007" in said and "1 broken" in said and "\n" not in said
    task = build(root, on_error="skip")
    assert len(task.all) == 59 and any(message in notice and "00007" in notice for notice in task.notices)


def test_a_link_out_of_the_folder_is_refused(root, tmp_path):
    picture(1).save(tmp_path / "secret.png")
    file = root / "part0" / "task" / "00003" / "first_frame.png"
    file.unlink()
    os.symlink(tmp_path / "secret.png", file)
    with pytest.raises(InputError, match="00003/first_frame.png.*points outside"):
        build(root)


def test_images_of_other_kinds_are_converted_and_counted(root):
    Image.new("RGBA", (32, 32), (10, 20, 30, 0)).save(root / "part0" / "task" / "00001" / "first_frame.png")
    Image.new("L", (32, 32), 77).save(root / "part0" / "task" / "00002" / "first_frame.png")
    task = build(root)
    assert any("2 images are converted to RGB (from L, RGBA)" in notice for notice in task.notices)
    seen = {p.layout.name: task.image(p) for p in task.all}
    assert (seen["part0/task/00001"] == 255).all() and (seen["part0/task/00002"] == 77).all()
    assert any("60 images of 48 x 32" in notice or "58 images" in notice for notice in task.notices)


def test_labels_are_classes_quantiles_or_several(root):
    size = build(root, label="parameters.size", quantiles=4)
    train = [p.layout.fields["parameters.size"] for p in size.all if p.split == "train"]
    edges = np.quantile(train, [0.25, 0.5, 0.75])
    for problem in size.all:
        assert problem.labels["size"] == np.searchsorted(edges, problem.layout.fields["parameters.size"], side="right")
    with pytest.raises(InputError, match=r"60 classes.*task\.quantiles"):
        build(root, label="parameters.size")
    several = build(root, label="", labels=[ANSWER, "parameters.size"], quantiles=2)
    assert [target.name for target in several.targets] == ["answer", "size"]
    with pytest.raises(InputError, match="not both"):
        build(root, labels=[ANSWER])


def test_classes_that_occur_once_are_left_out_and_counted(root):
    write(root / "rare", 999, answer=9)
    task = build(root)
    assert len(task.all) == 60 and any("1 problems are left out" in n and "9" in n for n in task.notices)
    assert any("3 classes of 60 problems: 0 20, 1 20, 2 20" in notice for notice in task.notices)


def test_names_of_quantiles_say_their_ends():
    names, index = encoded("x", [0.0, 1.0, 2.0, 3.0], ["train"] * 4, 2)
    assert names == ["below 1.5", "1.5 and more"] and index.tolist() == [0, 0, 1, 1]
    with pytest.raises(InputError, match="expected numbers"):
        encoded("x", ["a", "b"], ["train"] * 2, 2)


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("size", [(48, 32), (32, 80)])
def test_boxes_move_with_the_image(fit, size):
    """A planted white box is white where its box is after fitting, and nothing else is."""
    pixels = np.zeros((*size[::-1], 3), dtype=np.uint8)
    x0, y0, x1, y1 = (12, 14, 20, 24) if size[1] == 32 else (9, 36, 20, 52)
    pixels[y0:y1, x0:x1] = 255
    box = box_of((x0 / size[0], y0 / size[1], x1 / size[0], y1 / size[1]), size, (640, 640), fit)
    image = np.asarray(fitted(Image.fromarray(pixels), (640, 640), fit))[..., 0] > 127
    inside = np.zeros_like(image)
    a, b, c, d = (round(end * 640) for end in box)
    inside[b:d, a:c] = True
    assert (image != inside).sum() < 0.1 * inside.sum() and inside.sum() > 1000


def test_a_box_that_is_cut_off_is_refused(tmp_path):
    for number in range(20):
        write(tmp_path / str(number), number, picture(number, (32, 96)), boxes=[[0, 0, 10, 10]])
    assert build(tmp_path, boxes="parameters.boxes").regions == 1
    with pytest.raises(InputError, match="cut off by task.fit=crop"):
        build(tmp_path, boxes="parameters.boxes", fit="crop")


def test_boxes_of_each_problem(root):
    for number in range(60):
        folder = root / f"part{number // 30}" / "task" / f"{number % 30:05d}"
        for path in folder.glob("*metadata.json"):
            path.unlink()
        write(folder, number, boxes=[[0, 0, 24, 32], [0.5, 0.0, 1.0, 1.0]])
    task = build(root, boxes="parameters.boxes", fit="stretch")
    assert {p.regions for p in task.all} == {((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))}
    with pytest.raises(InputError, match=r"parameters\.answer=\d, expected a list of boxes"):
        build(root, boxes=ANSWER)


def test_prompts_are_replaced_or_dropped(root):
    assert {p.prompt for p in build(root, prompt="go").all} == {"go"}
    assert {p.prompt for p in build(root, prompt="").all} == {""}
    assert "Look: problem 3" in {p.prompt for p in build(root, prompt="Look: {prompt}").all}


def test_a_parser_of_the_user_reads_answers(root, tmp_path, monkeypatch):
    (tmp_path / "reads.py").write_text("def bright(video, fields):\n    return 2 if video.mean() > 0.5 else None\n"
                                       "def wrong(video, fields):\n    return 'x'\nnumber = 3\n")  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    task = build(root, parser="reads:bright")
    assert task.candidates == 3 and task.targets[-1].name == "model_answer"
    problem = task.all[0]
    assert task.parse(problem, np.ones((2, 64, 64, 3))).answer == 2
    assert task.parse(problem, np.zeros((2, 64, 64, 3))).answer is None
    assert task.solutions(problem) == (problem.answer,)
    assert {p.name for p in task.all}.isdisjoint({p.name for p in build(root).all})
    with pytest.raises(InputError, match="returned 'x'; expected one of 0, 1, 2"):
        build(root, parser="reads:wrong").parse(problem, np.ones((2, 64, 64, 3)))
    for path in ("reads:number", "reads:none", "nowhere:f", "reads", "builtins:len"):
        with pytest.raises(InputError, match=r"task\.parser"):
            build(root, parser=path)


def table(folder: Path, rows: list[dict], kind: str = "csv") -> Path:
    import pandas as pd

    path = folder / f"data.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows))
    else:
        pd.DataFrame(rows).to_csv(path, index=False)
    return path


def rows_of(folder: Path, count: int = 40) -> list[dict]:
    for number in range(count):
        picture(number).save(folder / f"{number}.png")
    return [{"id": f"q{n}", "question": f"what {n}", "image": f"{n}.png", "answer": "ABC"[n % 3],
             "part": ("train", "val", "test")[n % 3]} for n in range(count)]  # fmt: skip


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_rows_of_tables_are_problems(tmp_path, kind):
    path = table(tmp_path, rows_of(tmp_path), kind)
    task = TableConfig(file=str(path), label="answer").build()
    assert len(task.all) == 40 and task.targets[0].names == ("A", "B", "C")
    assert all(p.labels["answer"] == int(p.prompt.split()[1]) % 3 for p in task.all)
    with pytest.raises(InputError, match="answer='A', expected train, validation or test"):
        TableConfig(file=str(path), label="answer", split="answer").build()
    by_column = TableConfig(file=str(path), label="answer", split="part")
    assert {p.split for p in by_column.build().all} == {"train", "validation", "test"}
    no_images = [{name: value for name, value in row.items() if name != "image"} for row in rows_of(tmp_path)]
    words = TableConfig(file=str(table(tmp_path, no_images)), label="answer").build()
    assert (words.image(words.all[0]) == 255).all()


def test_tables_that_cannot_be_read_are_refused(tmp_path):
    rows = rows_of(tmp_path)
    rows[3]["image"] = "../outside.png"
    picture(1).save(tmp_path.parent / "outside.png")
    rows[5]["image"], rows[7]["id"], rows[9]["question"] = "nowhere.png", "q6", None
    path = table(tmp_path, rows, "json")
    with pytest.raises(InputError, match="leads out of"):
        TableConfig(file=str(path), label="answer").build()
    task = TableConfig(file=str(path), label="answer", on_error="skip").build()
    assert len(task.all) == 36 and any("4 broken problems" in n and "'q6' is there twice" in n for n in task.notices)
    for name, content, message in (
        ("a.json", "[1]", "list of objects"), ("b.json", "{", "cannot be read"), ("c.txt", "x", "ends in"),
        ("d.csv", "", "cannot be read"), ("e.csv", "a,b\n1,2\n", "no column with prompts"),
        ("f.json", "[" * 100_000, "cannot be read"),
        ("g.csv", f"image,prompt,answer\n{'x' * 400},a,1\n", "expected the path"),
    ):  # fmt: skip
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=message):
            TableConfig(file=str(tmp_path / name), label="answer").build()
    for config, message in ((TableConfig(label="answer"), "task.file=''"), (TableConfig(file="no.csv"), "is no file")):
        with pytest.raises(InputError, match=message):
            config.build()
    with pytest.raises(InputError, match=r"image_column.*expected one of"):
        TableConfig(file=str(path), label="answer", image_column="photo").build()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fit": "zoom"}, "pad, crop, stretch"), ({"on_error": "log"}, "stop, skip"), ({"quantiles": 1}, "at least 2"),
        ({"boxes": "0x4"}, "1x1 to 64x64"), ({"height": 4}, "height=4"), ({"root": ""}, "task.root=''"),
        ({"root": "nowhere"}, "is no folder"),
    ],
)  # fmt: skip
def test_settings_are_checked(settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        build(**{"root": tmp_path} | settings)
