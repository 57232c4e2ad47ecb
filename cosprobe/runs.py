"""Run folders: which folder holds what.

A run folder holds the results of one model on one set of problems. Each result is a folder of its own, named by the
settings of its probes: `logistic`, `ridge`, `logistic-penalties-0.1`. A result holds `config.yaml`, `probes`, `report`,
`tensorboard`, and what `probe.py` adds to it. Activations are in the folder `store` of the run folder, and serve other
runs as well. Runs of `train.py experiment=...` that train a model have no results; their `config.yaml` is in the run
folder itself.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from cosprobe.config import CaptureConfig, ProbeConfig, TrainerConfig
from cosprobe.differences import ANOTHER
from cosprobe.errors import InputError
from cosprobe.files import read_json, write_json
from cosprobe.locks import held

RUN_FILE = "config.yaml"
STORE, STORE_FILE = "store", "settings.json"  # the folder of the activations in a run folder, and a file in it
POINTER = "activations.json"  # in the folder of a result: the store, and what is read of it
REPORT = "report"  # folder of figures and tables in that of a result
FINISHED = "finished.json"  # in the folder of a report, written last
WIDTH = 120  # width of the printed table if the output is not a terminal


def result_name(probe: ProbeConfig, trainer: TrainerConfig) -> str:
    """The name of a result: the kind of its probes, and the settings of the fit that differ from the defaults."""
    captured, plain = {entry.name for entry in fields(CaptureConfig)}, ProbeConfig()
    values: dict[str, Any] = {
        entry.name: getattr(probe, entry.name)
        for entry in fields(ProbeConfig)
        if entry.name not in (*captured, "kind", "memory")  # memory does not change what is fitted
        and getattr(probe, entry.name) != getattr(plain, entry.name)
    }
    if trainer.precision != TrainerConfig().precision:
        values["precision"] = trainer.precision
    parts = [f"{name}-{'-'.join(map(str, v)) if isinstance(v, list) else v}" for name, v in values.items()]
    return "-".join([probe.kind, *parts])


def results(run_dir: Path | str) -> list[Path]:
    """The folders of all results in a run folder."""
    return sorted(path.parent for path in Path(run_dir).glob(f"*/{RUN_FILE}"))


def find_result(folder: Path | str) -> Path:
    """The folder of a result: `folder` itself, or the only result in the run folder `folder`.

    Returns `folder` when there is none. Raises InputError, with their names, when there are several.
    """
    folder = Path(folder)
    found = [] if (folder / RUN_FILE).is_file() else results(folder)
    if len(found) > 1:
        raise InputError(f"run={str(folder)!r} has {len(found)} results: expected one of {', '.join(map(str, found))}")
    return found[0] if found else folder


def check_no_results(folder: Path) -> None:
    """Raises InputError for a folder with results of probes, in which no model is trained."""
    if found := results(folder):
        raise InputError(f"run_dir={str(folder)!r}: has results of probes, such as {found[0].name}; {ANOTHER}")


@dataclass(frozen=True)
class RunFolder:
    """What is in a run folder.

    results: names of its results, of which `unfinished` have not run to their end. reads: for each result with
    activations, the store that it reads. size: bytes of all files, activations included; stored: bytes of activations.
    """

    folder: Path
    results: tuple[str, ...]
    unfinished: tuple[str, ...]
    reads: dict[str, Path]
    size: int
    stored: int


def list_runs(root: Path | str) -> list[RunFolder]:
    """The run folders in `root`. Raises InputError when there is no such folder."""
    root = Path(root)
    if results(root) and (root / STORE).is_dir():
        raise InputError(f"run={str(root)!r}: is a run folder; expected a folder of run folders, {str(root.parent)!r}")
    if not root.is_dir():
        raise InputError(f"run={str(root)!r}: is no folder; expected a folder of run folders, such as run=runs")
    found = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        of_run = results(folder)
        if of_run or (folder / STORE / STORE_FILE).is_file() or (folder / RUN_FILE).is_file():
            found.append(
                RunFolder(
                    folder,
                    tuple(path.name for path in of_run),
                    tuple(path.name for path in of_run if not (path / REPORT / FINISHED).is_file()),
                    {path.name: store for path in of_run if (store := _store_of(path)) is not None},
                    _size(folder),
                    _size(folder / STORE),
                )
            )
    return found


def delete_run(root: Path | str, name: str) -> int:
    """Deletes a run folder in `root`, one of its results, or its activations, and returns the bytes that became free.

    name: the folder, with or without `root` before it. Raises InputError for any other folder, and for activations
    that results outside of the folder read.
    """
    root = Path(root)
    runs = list_runs(root)
    path = next((p for p in (Path(name), root / name) if p.is_dir() and root.resolve() in p.resolve().parents), None)
    places = {part.resolve() for run in runs for part in (run.folder, run.folder / STORE, *results(run.folder))}
    if path is None or path.resolve() not in places:
        known = ", ".join(run.folder.name for run in runs) or "none"
        raise InputError(f"use.delete={name!r}: expected a run folder in {str(root)!r}, or a folder in one: {known}")
    whole = path.resolve()
    readers = [
        str(run.folder / result)
        for run in runs
        for result, store in run.reads.items()
        if whole in (store, *store.parents) and whole not in (run.folder / result).resolve().parents
    ]
    if readers:
        raise InputError(f"use.delete={name!r}: its activations are read by {', '.join(readers)}; delete these first")
    size = _size(path)
    with ExitStack() as holds:
        for part in (path, *results(path)):
            holds.enter_context(held(part, "use.delete"))
        shutil.rmtree(path)
    return size


def print_runs(runs: Sequence[RunFolder], console: Console | None = None) -> None:
    """Prints a table of run folders: results, size, and which activations they read."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, header_style="bold")
    for name in ("run", "results", "MB", "of it activations", "reads the activations of"):
        table.add_column(name, justify="right" if name in ("MB", "of it activations") else "left", overflow="fold")
    for run in runs:
        names = [f"{name} (unfinished)" if name in run.unfinished else name for name in run.results]
        stores = sorted(set(run.reads.values()))
        read = [store.parent.name if store.parent.parent == run.folder.parent.resolve() else store for store in stores]
        sizes = (f"{size / 1e6:.0f}" for size in (run.size, run.stored))
        table.add_row(run.folder.name, ", ".join(names) or "none", *sizes, ", ".join(map(str, read)) or "none")
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=max(WIDTH, console.width))
    console.print(table)


def _store_of(result: Path) -> Path | None:
    """The store that a result reads; None when its file is missing or damaged."""
    try:
        return (result / read_json(result / POINTER, "")["store"]).resolve()
    except InputError:
        return None


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def mark_finished(report: Path, bank: str, printed: str = "", made_by: str = "") -> None:
    """Notes that a report is complete: that of a result, or one of `probe.py`.

    bank: fingerprint of the probes. printed: what the command printed at its end. made_by: the command.
    """
    files = sorted(path.name for path in report.iterdir() if path.is_file() and path.name != FINISHED)
    about = {"probes": bank, "code": code_fingerprint(), "files": files, "printed": printed, "command": made_by}
    write_json(report / FINISHED, about)


def finished(report: Path, bank: str) -> str | None:
    """What was printed when a report was completed with these probes, by this version of the code; None otherwise.

    A report of which a file is missing does not count.
    """
    try:
        mark = read_json(report / FINISHED, "")
    except InputError:
        return None
    same = (mark["probes"], mark["code"]) == (bank, code_fingerprint())
    return mark["printed"] if same and all((report / name).is_file() for name in mark["files"]) else None


def outdated_reports(folder: Path, bank: str) -> list[Path]:
    """The reports of `probe.py` in a result that were made with other probes than `bank`, a fingerprint."""
    found = []
    for mark in sorted((folder / REPORT).glob(f"*/{FINISHED}")):
        with suppress(InputError):
            if read_json(mark, "")["probes"] != bank:
                found.append(mark.parent)
    return found


def code_fingerprint() -> str:
    """A hash of the source files of the package."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
