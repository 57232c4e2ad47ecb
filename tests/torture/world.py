"""A finished run of a toy model, the commands that make it, and what has to be in its folder."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

import probe
import train
from cosprobe.activations.store import ActivationStore
from cosprobe.ensembles.comparison import SIZES
from cosprobe.evaluation import Grid
from cosprobe.files import read_json
from cosprobe.probes import load_probes
from cosprobe.runs import find_result
from tests.examples.pipelines import save_wan
from tests.examples.probe_tiny import TINY
from tests.examples.processes import CONTEXT

LIMIT = 120  # seconds after which a command counts as one that does not end
MEASURED = ("weights_seconds",)  # attributes of a grid that differ between equal runs
MAINS = {"train": train.main, "probe": probe.main}


@dataclass(frozen=True)
class Ended:
    """How a command ended. code: its exit code, negative for a signal, None if it did not end in time."""

    code: int | None
    said: str

    @property
    def one_line(self) -> bool:
        """Whether it was refused in one line."""
        lines = [line for line in self.said.splitlines() if line.startswith("error: ")]
        return self.code == 2 and len(lines) == 1 and "Traceback" not in self.said

    @property
    def traceback(self) -> bool:
        """Whether it ended in an error that is not ours."""
        return "Traceback (most recent call last)" in self.said


def start(
    arguments: Sequence[str],
    log: Path,
    file_limit: int | None = None,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> BaseProcess:
    """Starts a command in a process. file_limit: bytes from which on no file grows. folder: the working directory.
    environment: further variables. before: called before the command, a function of a module."""
    given = (list(arguments), log, file_limit, folder, dict(environment or {}), before)
    process = CONTEXT.Process(target=_run, args=given)
    process.start()
    return process


def end(process: BaseProcess, log: Path, seconds: float = LIMIT) -> Ended:
    """Waits for a command, and kills it after some seconds."""
    process.join(seconds)
    late = process.is_alive()
    if late:
        process.kill()
        process.join()
    said = log.read_text(errors="replace") if log.is_file() else ""
    return Ended(None if late else process.exitcode, said)


def run(arguments: Sequence[str], log: Path, **given: Any) -> Ended:
    """Runs a command to its end."""
    return end(start(arguments, log, **given), log)


def _run(
    arguments: list[str],
    log: Path,
    file_limit: int | None,
    folder: Path | None,
    environment: dict[str, str],
    before: Callable[[], None] | None,
) -> None:
    os.environ.update(environment)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sink = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=out)  # it has no limit of the size of files
    for stream in (1, 2):
        os.dup2(sink.stdin.fileno(), stream)
    torch.set_num_threads(1)
    SIZES["quick"] = TINY
    if folder is not None:
        os.chdir(folder)
    if file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if before is not None:
        before()
    name, *settings = arguments
    sys.exit(MAINS[name](settings))


@dataclass(frozen=True)
class World:
    """A folder with a model and a finished run of it."""

    root: Path
    model: Path
    finished: Path
    only_train: bool = False
    more: tuple[str, ...] = ()

    @classmethod
    def build(cls, root: Path, only_train: bool = False, more: tuple[str, ...] = ()) -> World:
        """Makes the model, and trains, answers early and compares ensembles without any fault. only_train: trains, on
        fewer problems. more: further settings of training."""
        root.mkdir(exist_ok=True)
        world = cls(root, root / "wan", root / "whole" / "run", only_train, more)
        save_wan(world.model)
        for command in world.commands(world.finished):
            ended = run(command, root / "log")
            if ended.code != 0:
                raise RuntimeError(f"{' '.join(command)} ended with {ended.code}:\n{ended.said[-2000:]}")
        return world

    def train(self, folder: Path, *settings: str) -> list[str]:
        """The command that trains probes in a run folder."""
        return [
            "train", "probe=layers", f"pipeline.path={self.model}", "pipeline.steps=3", "pipeline.frames=5",
            "pipeline.batch=8", "task.frames=5", f"task.problems={24 if self.only_train else 64}", "probe.epochs=3",
            f"run_dir={folder}",
            "trainer.enable_progress_bar=false", *self.more, *settings,
        ]  # fmt: skip

    def commands(self, folder: Path) -> list[list[str]]:
        """The commands of a whole run."""
        quiet = [f"run={folder}", "trainer.enable_progress_bar=false"]
        early = ["use.calibration=59", "use.problems=3", "use.error_reference=truth"]
        uses = [] if self.only_train else [["use=early", *quiet, *early], ["use=ensemble", *quiet]]
        return [self.train(folder), *(["probe", *settings] for settings in uses)]

    def place(self, name: str) -> Path:
        """A run folder that does not exist, with none beside it whose activations could be read."""
        shutil.rmtree(self.root / name, ignore_errors=True)
        return self.root / name / "run"

    def copy(self, name: str, of: Path | None = None) -> Path:
        """A copy of a run folder; default: of the finished run."""
        return shutil.copytree(of or self.finished, self.place(name))


def content(folder: Path) -> dict[str, Any]:
    """What a finished run found, without what is measured in seconds. Raises InputError for a damaged file."""
    result = find_result(folder)
    bank, grid = load_probes(result), Grid.load(result).dataset
    grid = grid.assign_attrs({name: 0 for name in MEASURED if name in grid.attrs})
    grid = grid.assign_attrs(provenance=re.sub(r'"policies": \[.*', "", grid.attrs["provenance"]))
    found: dict[str, Any] = {"bank": bank.fingerprint, "policies": bank.provenance.policies, "grid": grid}
    found |= stored(folder)
    found["folds"] = [load_probes(path).fingerprint for path in sorted((result / "probes").glob("fold-*"))]
    path = result / "report" / "ensemble" / "ensemble.json"
    found["ensemble"] = read_json(path, "") if path.is_file() else None
    return found


def stored(folder: Path) -> dict[str, Any]:
    """The samples and tensors of every finished store in a run folder."""
    found = {}
    for path in sorted(folder.rglob("manifest.json")):
        store = ActivationStore.open(path.parent)
        tensors = {name: torch.nan_to_num(values) for name, values in store.read()[0].items()}
        found[str(path.parent.relative_to(folder))] = (sorted(store.names()), len(store.names()), tensors)
    return found


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """The parts of two contents that differ."""
    return [name for name in sorted({*one, *two}) if not _same(one.get(name), two.get(name))]


def _same(one: Any, two: Any) -> bool:
    if hasattr(one, "identical"):
        return two is not None and one.equals(two)
    if isinstance(one, tuple) and len(one) == 3 and isinstance(one[2], dict) and two is not None:
        return one[:2] == two[:2] and all(torch.equal(one[2][name], two[2][name]) for name in one[2])
    return one == two


def left_over(folder: Path) -> list[str]:
    """Files that no finished command leaves: halves of files, and holds."""
    return [str(path.relative_to(folder)) for path in folder.rglob(".*") if path.is_file()]


def compare(
    whole: dict[str, Any], folder: Path, counts: dict[str, int], say: Callable[[str], None], after: str
) -> None:
    """Counts a run folder whose content differs from `whole`, or in which there are halves of files, and says what."""
    wrong = [*differences(whole, content(folder)), *left_over(folder)]
    counts["lost or doubled"] += bool(wrong)
    for what in wrong:
        say(f"{after}: {what}")


def clock() -> float:
    """Seconds since some moment."""
    return time.monotonic()
