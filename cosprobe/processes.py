"""The processes of one command: when one of them is gone the others end, and one of them says why.

The first process starts the others, one for each further device. What started this process otherwise, such as
`torchrun`, looks after it: then nothing here is used but `tell`, which prints.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from subprocess import Popen

LOST = "error: another process of this command has ended; the same command continues"
STARTED_BY = "COSPROBE_STARTED_BY"  # variable of the environment: the first process, in those that it has started
REFUSED, SAID = 2, (2, 130, 143)  # exit codes of a process that has said why it ended
POLL = 0.5  # seconds between looks at other processes
GRACE = 5.0  # seconds that a process has to end by itself when another one is gone
PATIENCE = 2.0  # seconds that other processes leave the first one to say what they would say too

_others: list[Popen] = []  # processes that this one has started


@contextmanager
def starting() -> Iterator[None]:
    """Processes that are started in the block know that this one is the first, unless it was started like that."""
    if _first():
        yield
        return
    os.environ[STARTED_BY] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(STARTED_BY, None)


def look_after(others: Sequence[Popen]) -> None:
    """Ends this process when one of those that it has started has failed."""
    _others.extend(others)
    _end_when(lambda: any(other.poll() for other in others))


def look_after_first() -> None:
    """Ends this process when the one that has started it is gone."""
    if _first():
        _end_when(_first_is_gone)


def tell(line: str) -> None:
    """Prints a line on stderr, once for a command whose processes all fail, and not when another one said why."""
    end = time.monotonic() + PATIENCE
    while _first() and not _first_is_gone() and time.monotonic() < end:
        time.sleep(POLL / 5)  # the first process ends this one when it has printed its line
    if line == LOST and _others and _said_by_another(end):
        return
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def end_others() -> None:
    """Kills the processes that this one has started. What they have written stays."""
    for other in _others:
        other.kill()


def _said_by_another(end: float) -> bool:
    """Whether another process has said why it ended. end: the time until which they are waited for."""
    while any(other.poll() is None for other in _others) and time.monotonic() < end:
        time.sleep(POLL / 5)
    return any(other.poll() in SAID for other in _others)


def _first() -> int:
    """The process that has started this one, 0 if this one is the first."""
    number = int(os.environ.get(STARTED_BY, 0))
    return 0 if number == os.getpid() else number


def _first_is_gone() -> bool:
    return os.getppid() != _first()


def _end_when(gone: Callable[[], bool]) -> None:
    """Ends this process some seconds after another one is `gone`, in a thread: the main thread may wait for the other
    one forever, in a call that no signal interrupts."""

    def look() -> None:
        while not gone():
            time.sleep(POLL)
        time.sleep(GRACE)
        tell(LOST)
        end_others()
        os._exit(REFUSED)

    threading.Thread(target=look, name="look-after-others", daemon=True).start()
