from __future__ import annotations

import pytest
import torch

from cosprobe.checked import read_tensors, write_tensors
from cosprobe.errors import InputError

TENSORS = {"b": torch.tensor([1.5, 2.5]), "a": torch.arange(3), "c": torch.tensor(True), "none": torch.empty(0, 4)}
ABOUT = {"names": ["x", None], "count": 2}


def test_tensors_are_read_as_they_were_written(tmp_path):
    write_tensors(tmp_path / "one.safetensors", TENSORS, ABOUT)
    tensors, about = read_tensors(tmp_path / "one.safetensors")
    assert list(tensors) == sorted(TENSORS) and about == ABOUT
    for name, values in TENSORS.items():
        assert torch.equal(tensors[name], values) and tensors[name].dtype == values.dtype


def test_every_flipped_byte_is_found(tmp_path):
    """In the header, in the values, and in what stands beside them."""
    path = tmp_path / "one.safetensors"
    write_tensors(path, TENSORS, ABOUT)
    whole = path.read_bytes()
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 2]) + whole[at + 1 :])
        try:
            tensors, about = read_tensors(path)
        except InputError:
            continue
        assert about == ABOUT and all(torch.equal(tensors[name], values) for name, values in TENSORS.items())


def test_missing_and_cut_files_are_named(tmp_path):
    path = tmp_path / "one.safetensors"
    with pytest.raises(InputError, match="one.safetensors.*missing"):
        read_tensors(path)
    write_tensors(path, TENSORS, ABOUT)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match="one.safetensors.*damaged"):
        read_tensors(path)
