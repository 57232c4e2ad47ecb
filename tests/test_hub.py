"""Probes and grids leave for the Hub and come back as they were; what does not belong together is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

from cosprobe import hub
from cosprobe.errors import InputError
from cosprobe.evaluation import Grid
from cosprobe.hub import FILES, export, from_pretrained, push_to_hub
from cosprobe.probes import load_probes
from tests.examples.causal import finished


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    made = finished(tmp_path_factory.mktemp("run"))
    made.bank.save(made.folder / "probes")
    grid = Grid.load(made.folder)
    named = grid.dataset.assign_attrs(provenance=json.dumps({"bank": made.bank.fingerprint}))
    Grid(named).save(made.folder / "report" / "grid.nc")
    return made.folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    return export(run, tmp_path_factory.mktemp("exported"))


class Remote:
    """Stands for the Hub: repositories are folders."""

    def __init__(self, root: Path):
        self.root, self.private = root, {}

    def api(self, token=None):
        return self

    def create_repo(self, name, private, exist_ok):
        if "/" not in name:
            raise HFValidationError(f"Repo id must be in the form owner/name: {name!r}")
        self.private[name] = private
        return f"https://hub/{name}"

    def upload_folder(self, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, self.root / repo_id)

    def snapshot(self, name, revision, token, allow_patterns):
        if not (self.root / name).is_dir():
            raise OfflineModeIsEnabled("offline mode is enabled")
        found = {str(path.relative_to(self.root / name)) for path in (self.root / name).rglob("*") if path.is_file()}
        assert found <= set(allow_patterns)  # nothing else was uploaded
        return str(self.root / name)


@pytest.fixture
def remote(tmp_path, monkeypatch):
    made = Remote(tmp_path / "hub")
    monkeypatch.setattr(hub, "HfApi", made.api)
    monkeypatch.setattr(hub, "snapshot_download", made.snapshot)
    return made


def same(found, run):
    bank, grid = found
    own = load_probes(run)
    assert bank.fingerprint == own.fingerprint and bank.cells == own.cells and bank.targets == own.targets
    for name, weights in own.weights.items():
        torch.testing.assert_close(bank.weights[name], weights, rtol=0, atol=0)
    np.testing.assert_array_equal(grid.dataset.accuracy.values, Grid.load(run).dataset.accuracy.values)


def test_a_folder_comes_back_as_it_was(run, exported):
    same(from_pretrained(exported), run)
    assert sorted(str(p.relative_to(exported)) for p in exported.rglob("*") if p.is_file()) == sorted(FILES)


def test_what_is_pushed_comes_back_as_it_was(run, remote):
    assert push_to_hub(run, "me/probes") == "https://hub/me/probes"
    assert remote.private == {"me/probes": True}
    same(from_pretrained("me/probes"), run)


def test_the_card_shows_the_map_the_best_cells_and_how_to_load_them(run, exported):
    text, grid = (exported / "README.md").read_text(), Grid.load(run)
    best = grid.best("answer")
    assert text.startswith("---\nlibrary_name: cosprobe\n") and "![Map of skill](map.png)" in text
    assert f"| `answer` | step {best.cell.step}, layer {best.cell.layer} | {best.accuracy:.2f} [" in text
    assert "from_pretrained(" in text and str(run) not in text
    assert str(run) not in (exported / "probes" / "bank.json").read_text()  # no path of this machine


def test_names_that_lead_nowhere_are_one_line(run, remote):
    with pytest.raises(InputError, match=r"name='me/nothing'.*OWNER/NAME.*offline"):
        from_pretrained("me/nothing")
    with pytest.raises(InputError, match=r"name='nothing'.*owner/name"):
        push_to_hub(run, "nothing")
    assert not remote.root.exists()


def test_damaged_and_foreign_files_are_refused(exported, tmp_path):
    for name in FILES[:3]:
        copy = shutil.copytree(exported, tmp_path / name.replace("/", "-"))
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(InputError, match="damaged"):
            from_pretrained(copy)
    other = shutil.copytree(exported, tmp_path / "other")
    foreign = Grid.load(other).dataset.assign_attrs(provenance=json.dumps({"bank": "0" * 16}))
    Grid(foreign).save(other / "report" / "grid.nc")
    with pytest.raises(InputError, match="other probes"):
        from_pretrained(other)
    (other / "probes" / "bank.json").unlink()
    with pytest.raises(InputError, match=r"bank\.json is missing"):
        from_pretrained(other)
