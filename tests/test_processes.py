"""The processes of one command end together, with one line in all. Here they start without torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cosprobe.processes import LOST, STARTED_BY, tell

ROOT = Path(__file__).resolve().parent.parent
COMMAND = """
import os, subprocess, sys, time
from cosprobe import processes
from cosprobe.command import command
from cosprobe.config import TrainRun
from cosprobe.errors import InputError
processes.POLL, processes.GRACE, processes.PATIENCE = 0.05, 0.5, 2.0
first = processes.STARTED_BY not in os.environ

def body(run):
    if first:
        with processes.starting():
            other = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[1:]])
        processes.look_after([other])
        print(other.pid, flush=True)
    else:
        processes.look_after_first()
    if sys.argv[2] in ("all fail", "first fails" if first else "other fails"):
        time.sleep(1.5 if first else 0.5)
        raise InputError("task.problems=0: no")
    if sys.argv[2] == "other ends well" and not first:
        return
    time.sleep(2 if sys.argv[2] == "other ends well" else 60)

sys.exit(command(TrainRun, body, "", []))
"""


def start(how: str, log: Path) -> tuple[subprocess.Popen, int]:
    """The first process of a command, and the number of the other one that it has started."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with log.open("w") as errors:
        first = subprocess.Popen(
            [sys.executable, "-c", COMMAND, COMMAND, how], stdout=subprocess.PIPE, stderr=errors, text=True,
            env=environment,
        )  # fmt: skip
    return first, int(first.stdout.readline())


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether a process ends within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("killed", ["other", pytest.param("first", marks=pytest.mark.docs)])
def test_when_one_is_killed_the_other_says_so_and_ends(tmp_path, killed):
    first, other = start("wait", tmp_path / "log")
    time.sleep(1.5)  # the other one has begun
    os.kill(first.pid if killed == "first" else other, signal.SIGKILL)
    assert first.wait(10) == (-signal.SIGKILL if killed == "first" else 2) and gone(other)
    assert (tmp_path / "log").read_text() == f"{LOST}\n"


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize(
    "how", ["other fails", *(pytest.param(how, marks=pytest.mark.docs) for how in ("all fail", "first fails"))]
)
def test_an_error_is_told_once(tmp_path, how):
    first, other = start(how, tmp_path / "log")
    assert first.wait(10) == 2 and gone(other)
    assert (tmp_path / "log").read_text() == "error: task.problems=0: no\n"


@pytest.mark.slow
@pytest.mark.ddp
def test_a_process_that_has_ended_well_is_no_reason_to_end(tmp_path):
    first, other = start("other ends well", tmp_path / "log")
    assert first.wait(10) == 0 and gone(other) and not (tmp_path / "log").read_text()


def test_a_process_that_something_else_has_started_tells_at_once(monkeypatch, capsys):
    monkeypatch.delenv(STARTED_BY, raising=False)
    begin = time.monotonic()
    tell("error: no")
    assert capsys.readouterr().err == "error: no\n" and time.monotonic() - begin < 0.5
