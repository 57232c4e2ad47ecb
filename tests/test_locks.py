"""A folder is held by one command at a time, and a kill ends the hold."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from cosprobe.command import command
from cosprobe.config import TrainRun
from cosprobe.errors import InputError
from cosprobe.locks import PARTS, RANK, held
from cosprobe.runs import delete_run

ROOT = Path(__file__).resolve().parent.parent
HOLD = """
import sys, time
from pathlib import Path
from cosprobe.locks import held
with held(Path(sys.argv[1]), "run_dir"):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal: a shell may have started the tests in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def other(tmp_path):
    """Another process that holds `tmp_path / "run"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_is_there_while_it_is_held_and_nothing_stays_behind(tmp_path):
    with held(tmp_path / "a" / "run", "run_dir"):
        assert (tmp_path / "a" / "run").is_dir()
    assert not (tmp_path / "a" / "run").exists()
    with held(tmp_path / "run", "run_dir"):
        (tmp_path / "run" / "result").mkdir()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["result"]
    with pytest.raises(ZeroDivisionError), held(tmp_path / "failed", "run_dir"):
        1 / 0  # noqa: B018
    assert not (tmp_path / "failed").exists()


def test_the_second_of_two_is_refused_with_the_process_that_holds_the_folder(other, tmp_path):
    with (
        pytest.raises(InputError, match=rf"^run_dir='.*/run': process {other.pid} on .*since 20\d\d-"),
        held(tmp_path / "run", "run_dir"),
    ):
        pass
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(InputError, match=rf"use\.delete=.*process {other.pid}\b"):
        delete_run(tmp_path, "run")
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_a_kill_ends_the_hold(other, tmp_path):
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    with held(tmp_path / "run", "run_dir"):
        pass
    assert list((tmp_path / "run").iterdir()) == []


def test_halves_of_files_of_killed_commands_are_deleted_where_no_other_command_works(other, tmp_path):
    folder = tmp_path / "outer"
    (folder / "a").mkdir(parents=True)
    kept = [folder / "a" / name for name in (".notes.2024.txt", ".hidden", "x.part-12.json", ".tmp")]
    halves = [folder / "a" / ".bank.part-123.json", folder / ".grid.part-9.nc", folder / "a" / ".tmpAb3xY9"]
    for path in (*kept, *halves):
        path.write_text("")
    elsewhere = tmp_path / "run" / ".bank.part-123.json"
    elsewhere.write_text("")
    with held(folder, "run_dir"), held(tmp_path, "run_dir"):
        pass
    assert all(path.exists() for path in kept) and not any(path.exists() for path in halves) and elsewhere.exists()


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "1", "LOCAL_RANK": "0"}, False),  # torchrun, first process of the second machine
        ({"RANK": "0", "LOCAL_RANK": "0", "SLURM_PROCID": "1"}, True),  # torchrun numbers machines in its own order
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "1"}, False),
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),  # started by Lightning in a shell of SLURM
        ({"NODE_RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"NODE_RANK": "1"}, False),
        ({"NODE_RANK": "0", "LOCAL_RANK": "1"}, False),
    ],
    ids=str,
)
def test_of_several_processes_of_a_command_the_first_holds(other, tmp_path, monkeypatch, variables, first):
    for name in (RANK, *PARTS):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) if first else nullcontext(), held(tmp_path / "run", "run_dir"):
        pass


@pytest.mark.parametrize(("number", "code", "said"), [(signal.SIGTERM, 143, " by SIGTERM"), (signal.SIGINT, 130, "")])
def test_a_signal_ends_a_command_with_a_message_and_its_code(interruptible, tmp_path, capsys, number, code, said):
    def body(run):
        with held(tmp_path / "run", "run_dir"):
            os.kill(os.getpid(), number)
            raise AssertionError("not stopped")

    before = signal.getsignal(signal.SIGTERM)
    assert command(TrainRun, body, "", []) == code
    assert re.fullmatch(rf"stopped{said}; the same command continues.*", capsys.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "run").exists() and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_during_a_finaliser_is_not_lost(interruptible, capsys, number, code):
    class Ending:
        def __del__(self):
            os.kill(os.getpid(), number)
            time.sleep(0.01)  # the handler runs here, and Python drops what it raises

    def body(run):
        Ending()
        for _ in range(100):
            time.sleep(0.01)
        raise AssertionError("not stopped")

    assert command(TrainRun, body, "", []) == code
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped")


def test_an_error_of_the_operating_system_names_the_file(tmp_path, capsys):
    assert command(TrainRun, lambda run: (tmp_path / "none" / "x").write_text(""), "", []) == 2
    assert re.fullmatch(r"error: '.*/none/x': No such file or directory", capsys.readouterr().err.splitlines()[-1])
    assert command(TrainRun, lambda run: (tmp_path / ("x" * 300)).read_text(), "", []) == 2
    assert re.fullmatch(r"error: '.*x': File name too long", capsys.readouterr().err.splitlines()[-1])


def test_a_full_disk_does_not_keep_a_folder_from_being_held(tmp_path, monkeypatch):
    """How much space is needed is known later."""

    @contextmanager
    def full(path):
        raise InputError(f"{path}: cannot be written")
        yield

    monkeypatch.setattr("cosprobe.locks.whole_file", full)
    refused = pytest.raises(InputError, match="another process is using it")
    with held(tmp_path / "run", "run_dir"), refused, held(tmp_path / "run", "run_dir"):
        pass
    assert not (tmp_path / "run").exists()
