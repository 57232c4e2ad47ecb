"""Errors that `train.py` and `probe.py` print in one line, without a traceback."""

from __future__ import annotations


class InputError(ValueError):
    """A setting, an argument, a file or the machine does not meet a requirement.

    The message names the value, what was expected and what to do.
    """


class Terminated(KeyboardInterrupt):
    """The process got SIGTERM. Handled like ctrl-C, with exit code 143."""
