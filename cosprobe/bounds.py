"""Checks that numbers in settings are finite and within bounds."""

from __future__ import annotations

from typing import Any

from cosprobe.errors import InputError

MANY = 10**7  # of problems, samples, clips or steps: more than any run can use
LARGEST_SEED = 2**32 - 1  # of `lightning.seed_everything`


def check_bounds(group: str, settings: Any, **bounds: tuple[float, float]) -> None:
    """Raises InputError for a field of `settings` that is not finite or outside its bounds, which are included.

    group: begins the name of the field in the message. A field is a number, None, or a list of numbers at any depth.
    """
    for name, (least, most) in bounds.items():
        value = getattr(settings, name)
        for number in _numbers(value):
            if not least <= number <= most:  # NaN and infinite numbers are not either
                raise InputError(f"{group}{name}={value}: expected {_words(least)} to {_words(most)}")


def _numbers(value: Any) -> list[float]:
    if isinstance(value, list | tuple):
        return [number for part in value for number in _numbers(part)]
    return [] if value is None else [value]


def _words(number: float) -> str:
    return f"{number:g}" if isinstance(number, float) else str(number)
