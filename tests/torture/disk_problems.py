"""Generated bad folders and tables of problems: refused in one line that names the file, or read right.

A problem that is read has the label and the prompt that it was written with. What was left out is counted.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cosprobe.activations import box_masks
from cosprobe.errors import InputError
from cosprobe.tasks import FolderConfig, Mask, Problem, Region, TableConfig, Target, Task, draw_samples
from tests.examples.folders import picture, write
from tests.torture.world import World

TOTAL = 30  # problems of a folder or table
WIDE = 48  # pixels
JSON = ('{"parameters": {"answer": 1}', "", "[]", "null", "\x00\x01", '{"parameters": 3}', "NaN", '{"a": 1e999}', "{}")
LABELS = (None, [], {"a": 1}, float("nan"), float("inf"), True, "0", 1e300, "x" * 100_000, "é", 1.5, -1)
CELLS = ("", "../outside.png", "/etc/hostname", "nowhere.png", "a,b", '"', "\x00", "é.png", "x" * 5000, "image.png\n")


def give(world: World, count: int, rng: np.random.Generator, say: Callable[[str], None]) -> dict[str, int]:
    """Makes `count` bad folders and tables and reads them. Returns the numbers of those and of faults."""
    return _give((_folder, _folder, _table), world, count, rng, say)


def give_masks(world: World, count: int, rng: np.random.Generator, say: Callable[[str], None]) -> dict[str, int]:
    """The same for folders with masks, some of which change after they were read."""
    return _give((_masked,), world, count, rng, say)


def _give(
    makes: Sequence[Callable[[Path, np.random.Generator, str], tuple[str, Callable[[], Task]]]],
    world: World,
    count: int,
    rng: np.random.Generator,
    say: Callable[[str], None],
) -> dict[str, int]:
    counts = {"inputs": 0, "refused": 0, "accepted": 0, "tracebacks": 0, "silent": 0, "outside": 0}
    for number in range(count):
        root = world.root / "problems"
        shutil.rmtree(root, ignore_errors=True)
        (world.root / "outside.png").write_bytes(b"secret")
        what, build = makes[number % len(makes)](root, rng, "skip" if rng.random() < 0.5 else "stop")
        counts["inputs"] += 1
        try:
            task = build()
            samples = draw_samples(task, FolderConfig(problems=0), 0)
            for sample in samples:
                task.image(sample.problem)
            if samples and rng.random() < 0.3:  # a file changes while a run goes on
                _changed_later(samples[0].problem, rng)
            wrong = [s.problem.name for s in samples if not _right(s.problem, task.targets[0])]
            counts["accepted"] += 1
            counts["silent"] += bool(wrong)
            if wrong:
                say(f"{what}: {wrong[:2]} have other labels than they were written with")
        except InputError as error:
            counts["refused"] += 1
            if "secret" in str(error) or len(str(error)) > 3000:
                counts["outside"] += 1
                say(f"{what}: {str(error)[:300]}")
        except Exception as error:
            counts["tracebacks"] += 1
            say(f"{what}: {type(error).__name__}: {str(error)[:300]}")
    return counts


def _right(problem: Problem, target: Target) -> bool:
    """Whether the label and the masks of a problem are those of its number, which its prompt names."""
    words = problem.prompt.split()
    if len(words) != 2 or not words[1].isdigit() or "answer" not in problem.labels:
        return False
    wanted = int(words[1]) % 3
    named = target.names[problem.labels["answer"]] in (str(wanted), f"{wanted}.0")
    return named and all(_seen(region, int(words[1])) for region in problem.regions if isinstance(region, Mask))


def _seen(mask: Region, number: int) -> bool:
    """Whether a mask is the column of pixels of a number. The columns of the image are its tokens."""
    weights = box_masks([mask], 1, WIDE)[0]
    return weights.argmax() == number and weights.count_nonzero() == 1


def _changed_later(problem: Problem, rng: np.random.Generator) -> None:
    for mask in problem.regions:
        if isinstance(mask, Mask):
            BAD_MASKS[int(rng.integers(len(BAD_MASKS)))](mask.file.parent, rng)


def _masked(root: Path, rng: np.random.Generator, on_error: str) -> tuple[str, Callable[[], Task]]:
    """A folder with a mask for each problem, a few of which are bad."""
    for number in range(TOTAL):
        write(root / f"{number:03d}", number)
        _column(number).save(root / f"{number:03d}" / "mask.png")
    ways = _spoiled(root, rng, BAD_MASKS)
    size = {"fit": "stretch", "height": 64, "width": 96}
    config = FolderConfig(
        root=str(root), label="parameters.answer", masks=["mask.png"], on_error=on_error, problems=0, **size
    )
    return f"folder with {ways} ({on_error})", config.build


def _column(number: int) -> Image.Image:
    inside = np.zeros((32, WIDE), dtype=bool)
    inside[:, number] = True
    return Image.fromarray(inside)


def _mask_truncated(folder: Path, rng: np.random.Generator) -> None:
    path = folder / "mask.png"
    path.write_bytes(path.read_bytes()[: int(rng.integers(0, 60))])


def _mask_of_other_bytes(folder: Path, rng: np.random.Generator) -> None:
    path = folder / "mask.png"
    data = bytearray(path.read_bytes())
    for at in rng.integers(0, len(data), size=5):
        data[at] ^= int(rng.integers(1, 256))
    path.write_bytes(data)


def _no_mask(folder: Path, rng: np.random.Generator) -> None:
    (folder / "mask.png").unlink()


def _nothing_inside(folder: Path, rng: np.random.Generator) -> None:
    Image.new(str(rng.choice(["L", "1", "RGB"])), (WIDE, 32)).save(folder / "mask.png")


def _a_photograph(folder: Path, rng: np.random.Generator) -> None:
    picture(int(rng.integers(1000))).save(folder / "mask.png")


def _mask_of_another_size(folder: Path, rng: np.random.Generator) -> None:
    side = int(rng.integers(10, 200))  # a square: masks of the shape of the image are scaled to it
    Image.new("L", (side, side), 255).save(folder / "mask.png")


def _mask_linked(folder: Path, rng: np.random.Generator) -> None:
    (folder / "mask.png").unlink()
    (folder / "mask.png").symlink_to(folder.parent.parent / "outside.png")


def _mask_is_a_folder(folder: Path, rng: np.random.Generator) -> None:
    (folder / "mask.png").unlink()
    (folder / "mask.png").mkdir()


BAD_MASKS = (
    *(_mask_truncated, _mask_of_other_bytes, _no_mask, _nothing_inside, _a_photograph, _mask_of_another_size),
    *(_mask_linked, _mask_is_a_folder),
)


def _folder(root: Path, rng: np.random.Generator, on_error: str) -> tuple[str, Callable[[], Task]]:
    """A folder in which a few problems are bad, in ways drawn at random."""
    for number in range(TOTAL):
        write(root / f"{number:03d}", number)
    ways = _spoiled(root, rng, BAD)
    config = FolderConfig(root=str(root), label="parameters.answer", on_error=on_error, problems=0)
    return f"folder with {ways} ({on_error})", config.build


def _spoiled(root: Path, rng: np.random.Generator, ways: Sequence[Callable[[Path, np.random.Generator], None]]) -> str:
    """Spoils one to five problems, each in a way drawn at random. Returns the names of the ways."""
    names = []
    for number in rng.choice(TOTAL, size=int(rng.integers(1, 6)), replace=False):
        way = ways[int(rng.integers(len(ways)))]
        names.append(way.__name__)
        way(root / f"{number:03d}", rng)
    return ", ".join(names)


def _truncated(folder: Path, rng: np.random.Generator) -> None:
    path = folder / "first_frame.png"
    path.write_bytes(path.read_bytes()[: int(rng.integers(0, 60))])


def _other_bytes(folder: Path, rng: np.random.Generator) -> None:
    path = folder / "first_frame.png"
    data = bytearray(path.read_bytes())
    for at in rng.integers(0, len(data), size=20):
        data[at] ^= int(rng.integers(1, 256))
    path.write_bytes(data)


def _no_file(folder: Path, rng: np.random.Generator) -> None:
    (folder / str(rng.choice(["first_frame.png", "prompt.txt", "metadata.json"]))).unlink()


def _other_json(folder: Path, rng: np.random.Generator) -> None:
    (folder / "metadata.json").write_text(JSON[int(rng.integers(len(JSON)))])


def _other_label(folder: Path, rng: np.random.Generator) -> None:
    label = LABELS[int(rng.integers(len(LABELS)))]
    (folder / "metadata.json").write_text(json.dumps({"parameters": {"answer": label}}))
    (folder / "prompt.txt").write_text("problem changed")  # it has no number, so that any reading of it is noticed


def _linked(folder: Path, rng: np.random.Generator) -> None:
    name = str(rng.choice(["first_frame.png", "prompt.txt", "metadata.json"]))
    (folder / name).unlink()
    (folder / name).symlink_to(folder.parent.parent / "outside.png")


def _a_folder_in_place(folder: Path, rng: np.random.Generator) -> None:
    name = str(rng.choice(["first_frame.png", "prompt.txt", "metadata.json"]))
    (folder / name).unlink()
    (folder / name).mkdir()


def _nested(folder: Path, rng: np.random.Generator) -> None:
    times = int(rng.choice([500, 990, 100_000]))
    deep = "[" * times + "]" * times if rng.random() < 0.5 else '{"a": ' * times + "1" + "}" * times
    (folder / "metadata.json").write_text('{"parameters": ' + deep + "}")


def _not_text(folder: Path, rng: np.random.Generator) -> None:
    (folder / "prompt.txt").write_bytes(b"\xff\xfe\x00\xd8")


def _empty(folder: Path, rng: np.random.Generator) -> None:
    for path in folder.iterdir():
        path.unlink()


def _odd_image(folder: Path, rng: np.random.Generator) -> None:
    mode = str(rng.choice(["L", "P", "RGBA", "I;16", "1", "CMYK", "LA", "F"]))
    image = picture(int(folder.name)).convert("L").convert(mode)
    image.save(folder / "first_frame.png", "TIFF" if mode in ("CMYK", "F") else "PNG")


def _one_pixel(folder: Path, rng: np.random.Generator) -> None:
    Image.new("RGB", (1, int(rng.integers(1, 2000)))).save(folder / "first_frame.png")


BAD = (
    *(_truncated, _other_bytes, _no_file, _other_json, _other_label, _linked, _a_folder_in_place, _nested, _not_text),
    *(_empty, _odd_image, _one_pixel),
)


def _table(root: Path, rng: np.random.Generator, on_error: str) -> tuple[str, Callable[[], Task]]:
    """A table in which a few cells, or the file itself, are bad."""
    root.mkdir()
    rows: list[dict[str, object]] = []
    for number in range(TOTAL):
        picture(number).save(root / f"{number}.png")
        rows.append({"image": f"{number}.png", "prompt": f"problem {number}", "answer": number % 3})
    for number in rng.choice(TOTAL, size=int(rng.integers(1, 4)), replace=False):
        column = str(rng.choice(["image", "answer"]))
        cells = CELLS if column == "image" else [one for one in LABELS if one != "0"]  # in a CSV, that is a label
        rows[number] |= {column: cells[int(rng.integers(len(cells)))], "prompt": "problem changed"}
    kind = str(rng.choice(["csv", "json", "json lines", "torn", "no column", "binary"]))
    path = root / ("table.csv" if kind in ("csv", "torn", "no column", "binary") else "table.json")
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            names = ["image", "prompt"] if kind == "no column" else ["image", "prompt", "answer"]
            table = csv.DictWriter(file, names, extrasaction="ignore")
            table.writeheader()
            table.writerows(rows)
        if kind == "torn":
            path.write_text(path.read_text()[: int(rng.integers(0, 400))])
        if kind == "binary":
            path.write_bytes(b"\x00\xff" * 100 + path.read_bytes())
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    config = TableConfig(file=str(path), label="answer", on_error=on_error, problems=0)
    return f"table, {kind} ({on_error})", config.build
