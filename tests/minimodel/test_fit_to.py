"""A training goes on from its newest checkpoint, and from no other file of that name."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from cosprobe.errors import InputError
from cosprobe.minimodel.recipe import fit_to
from cosprobe.probes import ChecksumIO
from tests.examples.shapes import unchecked


class Line(L.LightningModule):
    """A training of milliseconds. made: the steps."""

    def __init__(self, width: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.line, self.made = torch.nn.Linear(width, 1), 0

    def train_dataloader(self):
        return DataLoader([torch.ones(self.line.in_features)] * 100)

    def training_step(self, batch, index):
        self.made += 1
        return self.line(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.1)


class Foreign:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def fit(folder: Path, steps: int, module: Line | None = None) -> Line:
    module = module or Line()
    fit_to(module, folder, steps, "32-true", 1, None)
    return module


def test_it_goes_on_and_ends_where_an_unbroken_one_would(tmp_path):
    assert fit(tmp_path / "broken", 3).made == 3
    again, whole = fit(tmp_path / "broken", 8), fit(tmp_path / "whole", 8)
    assert again.made == 5 and torch.equal(again.line.weight, whole.line.weight)
    done = fit(tmp_path / "whole", 8)
    assert done.made == 0 and torch.equal(done.line.weight, whole.line.weight)


def forged(change):
    """Changes the content of a checkpoint, and gives it its checksum."""

    def forge(path: Path) -> None:
        with unchecked():
            ChecksumIO().save_checkpoint(change(ChecksumIO().load_checkpoint(path)), path)

    return forge


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:-99]),
    lambda path: path.write_bytes(bytes(range(256)) * 9),
    flip,
    lambda path: torch.save({"state_dict": {}, "global_step": 9}, path),  # as another version wrote it
    lambda path: torch.save(Foreign(path.with_name("ran")), path),
    forged(lambda saved: [1, 2]),
    forged(lambda saved: saved | {"state_dict": {"other": torch.ones(3)}}),
    forged(lambda saved: saved | {"state_dict": 3}),
    forged(lambda saved: {name: saved[name] for name in saved if name != "global_step"}),
    forged(lambda saved: saved | {"hyper": Foreign(Path("ran"))}),
], ids=["empty", "cut", "bytes", "one bit", "plain", "foreign", "a list", "other keys", "no state", "no step",
        "forged foreign"])  # fmt: skip
@pytest.mark.parametrize("steps", [3, 5], ids=["finished", "unfinished"])
def test_a_damaged_or_foreign_file_is_named_and_runs_no_code(tmp_path, monkeypatch, damage, steps):
    monkeypatch.chdir(tmp_path)
    fit(tmp_path / "fit", 3)
    path = tmp_path / "fit" / "last.ckpt"
    damage(path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=rf"^'{path}'.*delete it") as caught:
        fit(tmp_path / "fit", steps)
    assert "\n" not in str(caught.value) and path.read_bytes() == before
    assert not list(tmp_path.rglob("ran"))
    path.unlink()
    assert fit(tmp_path / "fit", steps).made == steps


def test_a_checkpoint_of_a_larger_model_is_named(tmp_path):
    fit(tmp_path, 3, Line(4))
    with pytest.raises(InputError, match=r"last\.ckpt'.*line\.weight.*delete it"):
        fit(tmp_path, 5)
