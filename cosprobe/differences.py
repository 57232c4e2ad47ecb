"""Compares what something was made from with the settings of now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cosprobe.errors import InputError

ANOTHER = "choose another run_dir or delete that folder"  # advice
LONGEST = 60  # letters of a value in a message


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as a flat dict with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def differences(made: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The settings that differ, sorted by their dotted names: the name, and both values as text.

    Values are compared as they are written in JSON, so a tuple equals a list.
    """
    old, new = (flattened(json.loads(json.dumps(tree))) for tree in (made, now))
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return [(name, shown(old.get(name)), shown(new.get(name))) for name in names]


def first_difference(made: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """The first of the `differences`; None if all agree."""
    return next(iter(differences(made, now)), None)


def check_same(made: Mapping[str, Any], now: Mapping[str, Any], where: str, advice: str) -> None:
    """Raises InputError, with the first setting that differs and both values, unless all agree.

    Others of its group that differ are named without values: `model.vae` beside `model.transformer`.
    where: begins the message, such as `run_dir: 'runs/maze' was`. advice: ends it.
    """
    if found := differences(made, now):
        name, before, after = found[0]
        group = name.rpartition(".")[0]
        others = [other for other, _, _ in found[1:] if group and other.startswith(f"{group}.")]
        too = f" ({', '.join(others)} {'differ' if len(others) > 1 else 'differs'} too)" if others else ""
        raise InputError(f"{where} made with {name}={before}, now {name}={after}{too}; {advice}")


def shown(value: Any) -> str:
    """A value as text for a message."""
    text = json.dumps(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
