"""The error that a person can mend: told in one line by the commands, without a traceback."""

from __future__ import annotations


class InputError(ValueError):
    """A setting, a file or a machine does not fit. The message names the value, what was expected and what to do."""
