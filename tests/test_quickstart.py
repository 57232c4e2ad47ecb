"""The notebook runs from top to bottom, and what it shows is what it gives."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from nbclient import NotebookClient

from tests.examples import processes

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def shown(notebook) -> list[set[str]]:
    """Of every code cell, the kinds of what it shows."""
    kinds = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            texts = {"text/plain" for out in cell.outputs if out.output_type == "stream" and out.name == "stdout"}
            kinds.append(texts.union(*(set(out.get("data", ())) for out in cell.outputs)))
    return kinds


class ZMQInteractiveShell(InteractiveShell):
    """A shell without a kernel, under the name by which libraries know that of a notebook."""


def run_cells(rank: int, folder: str) -> None:
    """Runs the cells on fewer images, and writes the kinds of what each shows: in a process of its own, as a shell
    stays."""
    os.chdir(folder)
    shell = ZMQInteractiveShell.instance()
    shell.history_manager.enabled = False
    kinds = []
    for cell in nbformat.read(NOTEBOOK, 4).cells:
        if cell.cell_type == "code":
            with shell.display_trap, capture_output() as shown:
                shell.run_cell(cell.source.replace('"test", 64', '"test", 40')).raise_error()
            texts = ["text/plain"] if shown.stdout.strip() else []
            kinds.append(texts + [kind for output in shown.outputs for kind in output._repr_mimebundle_()[0]])
    Path("kinds.json").write_text(json.dumps(kinds))


@pytest.mark.slow
def test_every_cell_runs_on_fewer_images_and_shows_what_it_did(tmp_path):
    assert 'problems("test", 64)' in NOTEBOOK.read_text().replace("\\", "")
    assert processes.run(run_cells, str(tmp_path)) == [0]
    found = [set(kinds) for kinds in json.loads((tmp_path / "kinds.json").read_text())]
    assert found == shown(nbformat.read(NOTEBOOK, 4)) and any("image/png" in kinds for kinds in found)


@pytest.mark.slow
@pytest.mark.docs
def test_every_cell_runs_and_shows_what_it_did(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    kept, notebook = nbformat.read(NOTEBOOK, 4), nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert shown(notebook) == shown(kept)
    assert any("image/png" in kinds for kinds in shown(notebook))


def test_the_notebook_is_small_and_was_run():
    assert NOTEBOOK.stat().st_size < 300_000
    kept = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(kept)
    counts = [cell.execution_count for cell in kept.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not any(path in str(cell) for cell in kept.cells for path in (str(ROOT), tempfile.gettempdir()))
