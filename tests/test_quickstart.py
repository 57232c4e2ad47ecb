"""The notebook runs from top to bottom, and what it shows is what it gives."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

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


@pytest.mark.slow
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
