"""Turns entries from disk into the problems of a task: labels, groups, splits, regions."""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from cosprobe.bounds import LARGEST_SEED, MANY, check_bounds
from cosprobe.errors import InputError
from cosprobe.tasks.disk import DiskTask, Entry, Frame
from cosprobe.tasks.own_images import share_of
from cosprobe.tasks.pictures import FITS, Broken, frames_in, opened
from cosprobe.tasks.regions import Box, Mask, Region, box_of, digest_of, place_of, read_mask, shares_of
from cosprobe.tasks.task import Problem, Role, Target

ON_ERROR = ("stop", "skip")
MOST_CLASSES = 50  # a number with more values needs quantiles; a text with more is no label
NAMED = 5  # broken problems, and fields, that are printed
WHITE = "white"  # digest in place of that of an image
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev"), "validation"),
    "test": "test",
}


@dataclass
class DiskConfig:
    """Settings that folders and tables have in common. Raises InputError for a value out of range."""

    family: ClassVar[str] = ""
    problems: int = 0
    "Number of problems, over all splits; 0: all."
    seeds: int = 1
    "Number of noise seeds of each problem."
    label: str = ""
    "Field with the label, as in `parameters.answer`; empty: list the fields that could be labels, and stop."
    labels: list[str] = field(default_factory=list)
    "Several labels, in place of `label`; the first one is the answer that a parser reads."
    prompt: str = "{prompt}"
    "Prompt of every problem; `{prompt}` stands for the one on disk, an empty text drops it."
    group: str = ""
    "Field whose equal values are never in two splits; problems with the same image never are."
    split: str = ""
    "Field with the split of each problem (train, validation or test); empty: by a hash of the group."
    boxes: str = "4x4"
    "Where probes read: `1x1` (the whole image), `4x4` (boxes that cover it), or a field with boxes of each problem."
    masks: list[str] = field(default_factory=list)
    "Mask images in place of `boxes`, white inside: files in each problem's folder, or columns of the table with paths."
    quantiles: int = 0
    "Numeric labels become this many classes with equally many training problems; 0: each value is a class."
    height: int = 64
    "Height of the videos in pixels; images are fitted to it."
    width: int = 64
    "Width of the videos in pixels."
    fit: str = "pad"
    "How an image of another shape is fitted: pad (with the colour of its upper left corner), crop or stretch."
    frames: int = 13
    "Number of video frames."
    on_error: str = "stop"
    "What a broken problem does: `stop` the command, or be left out (`skip`), counted and named."
    parser: str = ""
    "Function that reads an answer from a video, as in `package.module:function`; it runs in this process."
    seed: int = 0
    "Not used: problems are read, not drawn."
    verified: str = ""
    "Hash of the problems that were read; set by the command, and compared when the problems are read again."

    def __post_init__(self) -> None:
        check_bounds(
            "task.", self, problems=(0, MANY), seeds=(1, 10_000), seed=(0, LARGEST_SEED), quantiles=(0, MOST_CLASSES),
            height=(8, 8192), width=(8, 8192), frames=(1, 10_000),
        )  # fmt: skip
        for name, value, options in (("fit", self.fit, FITS), ("on_error", self.on_error, ON_ERROR)):
            if value not in options:
                raise InputError(f"task.{name}={value!r}: expected one of {', '.join(options)}")
        if self.label and self.labels:
            raise InputError(f"task.label={self.label!r}: expected it or task.labels, not both")
        if self.quantiles == 1:
            raise InputError("task.quantiles=1: expected 0, or at least 2 classes")
        across, by, down = self.boxes.partition("x")
        if by and across.isdigit() and down.isdigit() and not (1 <= int(across) <= 64 and 1 <= int(down) <= 64):
            raise InputError(f"task.boxes={self.boxes!r}: expected 1x1 to 64x64, or a field with boxes")
        if self.masks and self.boxes != DiskConfig.boxes:
            raise InputError(f"task.boxes={self.boxes!r}: expected it or task.masks, not both")

    @property
    def asked(self) -> tuple[str, ...]:
        """The fields of all labels, the answer first."""
        return tuple(self.labels) or ((self.label,) if self.label else ())

    @property
    def frame(self) -> Frame:
        """The frames of videos."""
        return Frame(self.height, self.width, self.fit, self.frames)


@dataclass(frozen=True)
class Checked:
    """An entry whose image was decoded once.

    labels: one value per asked field. group: value of the field `group`, empty without one. split: empty without such a
    field. regions: boxes in fractions of the frame of the video, or masks. digest: of the pixels of the image. size:
    its width and height. mode: how its pixels are stored, as Pillow names it.
    """

    entry: Entry
    labels: tuple[Any, ...]
    group: str
    split: str
    regions: tuple[Region, ...]
    digest: str
    size: tuple[int, int]
    mode: str


def build_task(config: DiskConfig, found: Iterable[Entry | Broken], place: str) -> DiskTask:
    """The task of these entries.

    place: the setting that names where they are, for messages.
    Sets `config.verified`. Raises Broken for the first problem that cannot be used, unless they are skipped. Raises
    InputError without a label (it lists the fields that could be one), for a label with one class, and when
    `config.verified` is the hash of other problems.
    """
    entries: dict[str, Entry] = {}
    broken: list[Broken] = []
    for one in found:
        if isinstance(one, Broken):
            broken.append(one)
        elif one.name in entries:
            broken.append(Broken(f"{one.where}: the id {one.name!r} is there twice"))
        else:
            entries[one.name] = one
    if not entries and not broken:
        raise InputError(f"{place}: no problems found; expected folders or rows with a prompt and an image")
    if not config.asked:
        raise InputError(f"task.label='': expected one of the fields of {place}: {offered([*entries.values()])}")
    known = {name for entry in entries.values() for name in entry.fields}
    if entries and (unknown := [name for name in config.asked if name not in known]):
        raise InputError(f"task.label={unknown[0]!r}: no problem has it; fields: {offered([*entries.values()])}")
    with ThreadPoolExecutor() as pool:  # decoding does not hold the lock of the interpreter
        checked = list(pool.map(lambda entry: _checked(entry, config), entries.values()))
    good = [one for one in checked if isinstance(one, Checked)]
    broken += [one for one in checked if isinstance(one, Broken)]
    types = [_usual_type([one.labels[i] for one in good]) for i in range(len(config.asked))]
    wrong = [_of_another_type(one, config.asked, types) for one in good]
    broken += [error for error in wrong if error is not None]
    good = [one for one, error in zip(good, wrong, strict=True) if error is None]
    notices = _told(broken, config.on_error)
    notices += _about_images(good, config)
    task = _assembled(config, good, notices, place)
    if config.verified and config.verified != task.content:
        raise InputError(
            f"{place}: other problems, labels or splits than the run was made with (hash {task.content}, expected "
            f"{config.verified}); restore them, or run train.py again in a new run_dir"
        )
    config.verified = task.content
    return task


def offered(entries: Sequence[Entry]) -> str:
    """The fields that could be labels, each with its number of classes and an example."""
    names = dict.fromkeys(name for entry in entries for name in entry.fields)
    listed = []
    for name in names:
        values = [entry.fields[name] for entry in entries if _scalar(entry.fields.get(name))]
        classes = len(set(map(str, values)))
        numbers = all(isinstance(value, int | float) for value in values)
        if len(values) > len(entries) / 2 and classes > 1 and (classes <= MOST_CLASSES or numbers):
            listed.append(f"{name} ({classes} classes, such as {values[0]!r})")
    return ", ".join(listed) or "none that could be a label"


def _scalar(value: Any) -> bool:
    return isinstance(value, str | int | float | bool) and value == value and value != ""


def _checked(entry: Entry, config: DiskConfig) -> Checked | Broken:
    """Reads fields, image and masks of an entry, whole, so that a truncated file is found before anything is sampled.

    Of a reference video only the first frame is decoded: one that breaks off later is found when it is used.
    """
    try:
        fields = (*config.asked, *filter(None, (config.group, config.split)))
        values = {name: entry.fields.get(name) for name in fields}
        for name, value in values.items():
            if not _scalar(value):
                raise Broken(f"{entry.where}: {name}={value!r}, expected a text or a number")
        split = str(values[config.split]).lower() if config.split else ""
        if split and split not in SPLIT_NAMES:
            raise Broken(f"{entry.where}: {config.split}={values[config.split]!r}, expected train, validation or test")
        digest, size, mode = WHITE, (config.width, config.height), "RGB"
        if entry.image is not None:
            whole = opened(entry.image, entry.where)
            digest, size = hashlib.sha256(f"{whole.size}".encode() + whole.tobytes()).hexdigest(), whole.size
            with Image.open(entry.image) as picture:
                mode = picture.mode
        if entry.video is not None:
            next(frames_in(entry.video))
        elif entry.final is not None:
            opened(entry.final, repr(str(entry.final)))
        labels = tuple(values[name] for name in config.asked)
        group = str(values[config.group]) if config.group else ""
        regions = tuple(_mask(config, file, size) for file in entry.masks) or _boxes(config, entry, size)
        return Checked(entry, labels, group, SPLIT_NAMES.get(split, ""), regions, digest, size, mode)
    except Broken as error:
        return error


def _type(value: Any) -> str:
    return "text" if isinstance(value, str) else "truth value" if isinstance(value, bool) else "number"


def _usual_type(values: Sequence[Any]) -> str:
    return Counter(map(_type, values)).most_common(1)[0][0] if values else ""


def _of_another_type(one: Checked, asked: Sequence[str], types: Sequence[str]) -> Broken | None:
    for name, value, usual in zip(asked, one.labels, types, strict=True):
        if _type(value) != usual:
            return Broken(f"{one.entry.where}: {name}={value!r} is a {_type(value)}, the other problems have a {usual}")
    return None


def _told(broken: Sequence[Broken], on_error: str) -> list[str]:
    """A sentence about broken problems. Raises the first of them if they are not skipped."""
    if not broken:
        return []
    if on_error == "stop":
        raise Broken(f"{broken[0]} ({len(broken)} broken; task.on_error=skip leaves them out)")
    more = f"; and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
    return [f"{len(broken)} broken problems are left out: {'; '.join(map(str, broken[:NAMED]))}{more}"]


def _about_images(good: Sequence[Checked], config: DiskConfig) -> list[str]:
    """Sentences about images that are changed."""
    sizes = Counter(one.size for one in good if one.digest != WHITE)
    other = {size: n for size, n in sizes.items() if size != (config.width, config.height)}
    said = []
    if other:
        largest = max(other, key=lambda size: other[size])
        kinds = f" and {len(other) - 1} other sizes" if len(other) > 1 else ""
        shape = any(w * config.height != h * config.width for w, h in other)
        how = f"; those of another shape: task.fit={config.fit}" if shape else ""
        said.append(
            f"{sum(other.values())} images of {largest[0]} x {largest[1]} pixels{kinds} become {config.width} x "
            f"{config.height}{how}"
        )
    if modes := Counter(one.mode for one in good if one.mode != "RGB"):
        said.append(f"{sum(modes.values())} images are converted to RGB (from {', '.join(sorted(modes))})")
    return said


def _assembled(config: DiskConfig, good: Sequence[Checked], notices: list[str], place: str) -> DiskTask:
    keys = _groups(good)
    splits = [one.split or share_of(key) for one, key in zip(good, keys, strict=True)]
    _check_groups(good, keys, splits)
    labels, targets, copies = [], [], Counter[str]()
    # another parser may read other answers, so its source code is part of the name of a problem
    parser, source = imported(config.parser) if config.parser else (None, "")
    keep = np.ones(len(good), dtype=bool)
    for i, name in enumerate(config.asked):
        values = [one.labels[i] for one in good]
        classes, index = encoded(name, values, splits, config.quantiles)
        labels.append(index)
        once = np.bincount(index, minlength=len(classes)) == 1
        if once.any():
            keep &= ~once[index]
            rare = ", ".join(str(classes[c]) for c in np.flatnonzero(once)[:NAMED])
            notices.append(f"{name}: {int(once.sum())} problems are left out, whose class occurs once ({rare})")
        targets.append((name, classes))
    apart = _short([name for name, _ in targets])
    found: list[Target] = []
    for i, (name, _) in enumerate(targets):
        used = sorted(set(labels[i][keep].tolist()))
        if len(used) < 2:
            raise InputError(f"task.label={name!r}: one class in {int(keep.sum())} problems; expected at least 2")
        labels[i] = np.searchsorted(used, labels[i])
        names = tuple(str(targets[i][1][c]) for c in used)
        counts = np.bincount(labels[i][keep], minlength=len(used))
        told = ", ".join(f"{one} {count}" for one, count in list(zip(names, counts, strict=True))[:20])
        notices.append(f"{name}: {len(used)} classes of {int(keep.sum())} problems: {told}")
        found.append(Target(apart[i], len(used), "problem", Role.ANSWER, (config.family,), names))
    each: list[dict[str, int | tuple[int, ...]]] = [
        {t.name: int(row[at]) for t, row in zip(found, labels, strict=True)} for at in range(len(good))
    ]
    problems = tuple(
        _problem(config, *one, source, copies)
        for one, kept in zip(zip(good, keys, splits, each, strict=True), keep, strict=True)
        if kept
    )
    if len({len(problem.regions) for problem in problems}) > 1:
        raise InputError(
            f"task.boxes={config.boxes!r}: problems have different numbers of boxes, expected the same number"
        )
    if config.parser:
        found.append(replace(found[0], name="model_answer", role=Role.MODEL_ANSWER))
    return DiskTask(config.family, tuple(found), problems, config.frame, tuple(notices), parser)


def _groups(good: Sequence[Checked]) -> list[str]:
    """The group of every problem: equal for equal images, and for equal values of the field `group`."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    first = []
    for one in good:
        known = [] if one.digest == WHITE else [f"image {one.digest}"]
        known += [f"group {one.group}"] if one.group else []
        known = known or [f"prompt {one.entry.prompt}"]
        first.append(known[0])
        low, high = sorted((root(known[0]), root(known[-1])))
        parent[high] = low
    return [hashlib.sha256(root(name).encode()).hexdigest() for name in first]


def _check_groups(good: Sequence[Checked], keys: Sequence[str], splits: Sequence[str]) -> None:
    """Raises InputError for a group with problems in two splits."""
    known: dict[str, tuple[str, str]] = {}
    for one, key, split in zip(good, keys, splits, strict=True):
        other, where = known.setdefault(key, (split, one.entry.where))
        if other != split:
            raise InputError(
                f"{one.entry.where}: is in the split {split}, and {where} with the same image or group in {other}; "
                "expected one split for both"
            )


def encoded(name: str, values: Sequence[Any], splits: Sequence[str], quantiles: int) -> tuple[list[Any], np.ndarray]:
    """The classes of a label, sorted, and the index of the class of every problem.

    quantiles: numbers are cut at the quantiles of the training problems. Raises InputError for quantiles of texts, and
    for more than 50 classes.
    """
    if quantiles:
        if _type(values[0]) != "number":
            raise InputError(f"task.quantiles={quantiles}: {name} is a {_type(values[0])}, expected numbers")
        numbers = np.array(values, dtype=float)
        train = numbers[np.array(splits) == "train"]
        edges = np.unique(np.quantile(train, np.arange(1, quantiles) / quantiles)) if len(train) else np.empty(0)
        lower = ["", *(f"{edge:g}" for edge in edges)]
        names = [f"{low or 'below'}{' to ' if low and high else ' ' if high else ' and more'}{high}"
                 for low, high in zip(lower, [*(f"{edge:g}" for edge in edges), ""], strict=True)]  # fmt: skip
        return names, np.searchsorted(edges, numbers, side="right")
    classes = sorted(set(values))
    if len(classes) > MOST_CLASSES:
        numeric = "; set task.quantiles" if _type(values[0]) == "number" else ""
        raise InputError(f"task.label={name!r}: {len(classes)} classes, expected at most {MOST_CLASSES}{numeric}")
    at = {value: i for i, value in enumerate(classes)}
    return classes, np.array([at[value] for value in values])


def _short(paths: Sequence[str]) -> list[str]:
    """The last part of each path, or all of it where two end alike."""
    last = [path.rpartition(".")[2] for path in paths]
    return [path.replace(".", "_") if last.count(name) > 1 else name for path, name in zip(paths, last, strict=True)]


def _problem(
    config: DiskConfig,
    one: Checked,
    key: str,
    split: str,
    labels: dict[str, int | tuple[int, ...]],
    parser: str,
    copies: Counter[str],
) -> Problem:
    """A problem that is known by its image, prompt, regions, split, and the source code of the parser.

    copies: counts problems that agree in these.
    """
    prompt = config.prompt.replace("{prompt}", one.entry.prompt)
    content = f"{one.digest}{prompt}{one.regions}{split}{parser}"
    copies[content] += 1
    index = int(hashlib.sha256(f"{content}{copies[content]}".encode()).hexdigest()[:12], 16)
    answer = next(value for value in labels.values() if isinstance(value, int))
    return Problem(
        *(config.family, config.family, split, index, key, prompt, answer, labels, {}, one.regions, one.entry),
        origin=one.entry.name,
    )


def _boxes(config: DiskConfig, entry: Entry, size: tuple[int, int]) -> tuple[Box, ...]:
    """The regions of a problem, in fractions of the frame of the video. size: width and height of the image."""
    across, by, down = config.boxes.partition("x")
    if by and across.isdigit() and down.isdigit():
        w, h = int(across), int(down)
        return tuple((c / w, r / h, (c + 1) / w, (r + 1) / h) for r in range(h) for c in range(w))
    value = entry.fields.get(config.boxes)
    if not isinstance(value, list) or not value:
        raise Broken(f"{entry.where}: {config.boxes}={value!r}, expected a list of boxes")
    found = []
    for box in value:
        ends = [float(end) for end in box] if isinstance(box, list) and len(box) == 4 else []
        if ends and max(ends) > 1:  # pixels of the image
            ends = [end / size[i % 2] for i, end in enumerate(ends)]
        if not ends or not (0 <= ends[0] < ends[2] <= 1 and 0 <= ends[1] < ends[3] <= 1):
            raise Broken(f"{entry.where}: {config.boxes}={box!r}, expected x0, y0, x1, y1 inside the image")
        x0, y0, x1, y1 = box_of((ends[0], ends[1], ends[2], ends[3]), size, (config.width, config.height), config.fit)
        if x0 >= x1 or y0 >= y1:
            raise Broken(f"{entry.where}: {config.boxes}={box!r} is cut off by task.fit=crop")
        found.append((x0, y0, x1, y1))
    return tuple(found)


def _mask(config: DiskConfig, file: Path, size: tuple[int, int]) -> Mask:
    """The mask in a file. size: width and height of the image that it is a mask of.

    Raises Broken as `read_mask` does, for a mask of another shape than the image, and for one that is cut off.
    """
    inside = read_mask(file)
    height, width = inside.shape
    if abs(width - size[0] * height / size[1]) >= 1 and abs(height - size[1] * width / size[0]) >= 1:
        shape = f"{size[0]} x {size[1]}"
        raise Broken(f"{str(file)!r}: a mask of {width} x {height} pixels, expected the shape of its image, {shape}")
    place = place_of(size, (config.width, config.height), config.fit)
    if not shares_of(inside, place, 1, 1).any():
        raise Broken(f"{str(file)!r}: what is inside the mask is cut off by task.fit=crop")
    return Mask(digest_of(inside), place, file)


def imported(path: str) -> tuple[Callable[..., Any], str]:
    """The Python function `package.module:function`, and its source code. Raises InputError when there is none."""
    try:
        function = resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"task.parser={path!r}: {error}; expected package.module:function that Python can import"
        ) from error
    if not inspect.isfunction(function):
        raise InputError(f"task.parser={path!r}: is a {type(function).__name__}, expected a function")
    try:
        return function, inspect.getsource(function)
    except OSError as error:
        raise InputError(f"task.parser={path!r}: {error}; expected a function in a Python file") from error
