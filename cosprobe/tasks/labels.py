"""Labels of the user's own: class names or whole numbers, turned into the numbers of classes that probes learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from cosprobe.errors import InputError

Labels = Sequence[str] | Sequence[int] | np.ndarray


def encode_labels(
    name: str, values: Labels, count: int, each: str
) -> tuple[tuple[str, ...], Int[np.ndarray, " entry"]]:
    """The names of the classes, sorted, and the index of the class of every entry.

    name: of the label. values: class names, whole numbers or truth values. Numbers are sorted as numbers. count: how
    many entries are expected. each: what an entry belongs to, for errors.
    Raises InputError for another number of entries, missing values, fractions, and fewer than two classes.
    """
    if isinstance(values, str):
        raise InputError(f"labels {name!r}: {values!r}, expected a list with one class for each {each}")
    entries: list[Any] = values.tolist() if hasattr(values, "tolist") else list(values)  # numpy, torch, pandas
    if len(entries) != count:
        raise InputError(f"labels {name!r}: {len(entries)} entries, expected {count}, one for each {each}")
    for i, entry in enumerate(entries):
        if entry is None or entry != entry:
            raise InputError(
                f"labels {name!r}: {entry} at index {i}, expected a class for each {each}; leave out that {each}"
            )
        if not isinstance(entry, str | int) and not (isinstance(entry, float) and entry.is_integer()):
            raise InputError(f"labels {name!r}: {entry!r} at index {i}, expected class names or whole numbers")
    texts = {isinstance(entry, str) for entry in entries}
    if len(texts) > 1:
        raise InputError(f"labels {name!r}: both texts and numbers, expected one or the other")
    classes = sorted({entry if isinstance(entry, str | bool) else int(entry) for entry in entries})
    if len(classes) < 2:
        only = f"one class only, {classes[0]!r}" if classes else "no entries"
        raise InputError(f"labels {name!r}: {only}; expected at least 2 classes")
    at = {entry: i for i, entry in enumerate(classes)}
    return tuple(map(str, classes)), np.array([at[entry] for entry in entries])


def check_lengths(images: int, **given: Sequence[object] | str) -> None:
    """Raises InputError for an argument that does not have one entry for every image. images: number of images."""
    for name, values in given.items():
        if isinstance(values, str):
            raise InputError(f"{name}={values!r}: expected a list with one entry for each of {images} images")
        if len(values) != images:
            raise InputError(f"{name}: {len(values)} entries for {images} images; expected one for each image")
