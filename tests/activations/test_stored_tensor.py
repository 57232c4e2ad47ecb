from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from xarray.core.indexing import LazilyIndexedArray

from cosprobe.activations import stored_tensor
from cosprobe.activations.labelled import LabelledFeatures
from cosprobe.activations.store import ActivationStore

SIZES = (3, 1, 4)  # samples of each shard
NAMES = [f"problem {i}" for i in range(sum(SIZES))]
VALUES = {
    "cells": torch.randn(8, 6, 2, 3, generator=torch.Generator().manual_seed(0)),
    "half": torch.randn(8, 6, 2, 3, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "scores": torch.randn(8, 5, 4, generator=torch.Generator().manual_seed(2)),
    "answer": torch.arange(8),
}
INDEX = st.one_of(
    st.slices(6),
    st.integers(-6, 5),
    st.lists(st.integers(-6, 5), max_size=7).map(lambda at: np.array(at, dtype=int)),
    st.lists(st.booleans(), min_size=6, max_size=6).map(np.array),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    store = ActivationStore(tmp_path_factory.mktemp("store"), {"seed": 0})
    store.begin(1000)
    start = 0
    for size in SIZES:
        part = slice(start, start + size)
        store.write({"": NAMES[part]}, {name: values[part] for name, values in VALUES.items()}, {"steps": [0]})
        start += size
    store.finish(NAMES)
    return store.folder


@pytest.fixture(scope="module")
def tensors(folder):
    return ActivationStore.open(folder).tensors()[0]


@pytest.fixture
def copied(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copied")
    return ActivationStore.open(tmp_path / "copied")


def flip(store, name, column):
    """Changes a value of a column of a tensor in the first shard."""
    path = store.path({"": NAMES[: SIZES[0]]})
    with safe_open(path, framework="pt") as content:
        value = content.get_slice(name)[:, column : column + 1].contiguous()
    data, wanted = path.read_bytes(), value[0].contiguous().view(torch.uint8).numpy().tobytes()
    assert data.count(wanted) == 1
    path.write_bytes(data.replace(wanted, bytes([wanted[0] ^ 1]) + wanted[1:]))


@pytest.mark.parametrize("name", VALUES)
def test_it_describes_what_is_stored(tensors, name):
    stored, values = tensors[name], VALUES[name]
    assert (stored.shape, stored.ndim, stored.dtype, len(stored)) == (values.shape, values.ndim, values.dtype, 8)
    assert stored.nbytes == values.nbytes and f"'{name}'" in repr(stored) and str(list(values.shape)) in repr(stored)
    assert torch.equal(stored[:], values)


@given(columns=INDEX, rows=st.lists(st.integers(-8, 7), max_size=9).map(lambda at: np.array(at, dtype=int)))
def test_it_is_indexed_as_a_tensor_is(tensors, columns, rows):
    for name in ("cells", "half"):
        stored, values = tensors[name], VALUES[name]
        whole = torch.from_numpy(values.float().numpy()[:, columns].copy())  # numpy takes steps below 0
        assert torch.equal(stored[:, columns].float(), whole)
        pairs = (rows[:, None] if np.ndim(columns) else rows), columns
        assert torch.equal(stored[pairs].float(), whole[rows])
        assert torch.equal(stored[rows], values[rows])


@given(keep=st.lists(st.integers(0, 7), max_size=9), some=st.lists(st.integers(0, 5), max_size=7), part=st.slices(6))
def test_parts_of_parts_are_read_only_when_they_are_indexed(tensors, keep, some, part):
    rows, columns = np.array(keep, dtype=int), np.array(some, dtype=int)
    for name in ("cells", "half"):
        found = tensors[name].rows(rows).columns(columns)
        assert found.shape == (len(rows), len(columns), 2, 3)
        assert torch.equal(found[:], VALUES[name][rows][:, columns])
    of_part = tensors["cells"].columns(part)
    assert torch.equal(of_part[:], torch.from_numpy(VALUES["cells"].numpy()[:, part].copy()))
    assert torch.equal(tensors["scores"].rows(rows)[:], VALUES["scores"][rows])
    assert torch.equal(tensors["answer"].rows(rows)[:], VALUES["answer"][rows])


def test_tensors_lists_and_truth_values_are_indices_too(tensors):
    stored, values = tensors["cells"], VALUES["cells"]
    assert torch.equal(stored[torch.tensor([5, 0])], values[[5, 0]])
    assert torch.equal(stored[:, [4, 1]], values[:, [4, 1]]) and stored[:, []].shape == (8, 0, 2, 3)
    assert torch.equal(stored[values[:, 0, 0, 0] > 0, 3], values[values[:, 0, 0, 0] > 0, 3])
    assert torch.equal(stored[2, 1], values[2, 1]) and torch.equal(tensors["answer"][3], torch.tensor(3))


@pytest.mark.parametrize("key", [(slice(None), 0, 0), ([0, 1], [1, 2]), (8,), (slice(None), 6)])
def test_other_indices_are_refused(tensors, key):
    with pytest.raises(IndexError):
        tensors["cells"][key]


def test_a_changed_value_is_found_when_its_column_is_read(copied):
    flip(copied, "cells", 2)
    stored = copied.tensors()[0]
    assert torch.equal(stored["cells"][:, [0, 1, 3, 4, 5]], VALUES["cells"][:, [0, 1, 3, 4, 5]])
    assert torch.equal(stored["cells"][3:], VALUES["cells"][3:])  # in the other shards
    name = copied.path({"": NAMES[: SIZES[0]]}).name
    for read in (lambda: stored["cells"][:, 1:3], lambda: stored["cells"][2:3], copied.read):
        with pytest.raises(ValueError, match=rf"{name}.*checksum"):
            read()
    assert torch.equal(stored["half"][:], VALUES["half"])


def test_a_changed_value_of_a_small_tensor_is_found_in_any_column(copied):
    flip(copied, "scores", 2)
    with pytest.raises(ValueError, match="checksum"):
        copied.tensors()[0]["scores"][:, 0]


def test_a_shard_that_is_deleted_later_is_named(copied):
    stored, path = copied.tensors()[0]["cells"], copied.path({"": NAMES[: SIZES[0]]})
    path.unlink()
    with pytest.raises(ValueError, match=path.name):
        stored[0]
    assert torch.equal(stored[5], VALUES["cells"][5])


def test_the_digest_is_that_of_what_would_be_read(tensors, copied):
    cells = tensors["cells"]
    same = copied.tensors()[0]["cells"]
    assert cells.digest() == same.digest()  # in another folder
    others = [
        tensors["half"],
        cells.rows(np.arange(7)),
        cells.columns(slice(0, 5)),
        cells.rows(np.array([1, 0, *range(2, 8)])),
    ]
    assert len({cells.digest(), *(other.digest() for other in others)}) == 5
    changed = dict(VALUES, cells=VALUES["cells"] + 1)
    copied.write({"": NAMES[:3]}, {name: values[:3] for name, values in changed.items()}, {"steps": [0]})
    assert copied.tensors()[0]["cells"].digest() != cells.digest()


LABELS = ("sample", "step", "layer", "branch", "position", "region", "channel")


def outer(size):
    """What xarray takes for an axis: a slice, a number, or numbers in any order, some of them twice. Of an array of any
    store, it does not take an empty slice with a negative step."""
    slices = st.slices(size).filter(lambda one: (one.step or 1) > 0 or range(*one.indices(size)))
    return st.one_of(slices, st.integers(-size, size - 1), st.lists(st.integers(0, size - 1), max_size=size + 1))


@given(key=st.tuples(*map(outer, (8, 2, 3, 1, 1, 2, 3))), name=st.sampled_from(["cells", "half"]))
def test_a_part_of_the_labelled_array_is_that_of_the_tensor(tensors, key, name):
    features = LabelledFeatures(tensors[name], (2, 3, 1, 1))
    array = xr.Variable(LABELS, LazilyIndexedArray(features))
    whole = xr.Variable(LABELS, VALUES[name].float().unflatten(1, (2, 3, 1, 1)).numpy())
    part = array[key]
    assert part.dims == whole[key].dims and part.dtype == np.float32
    np.testing.assert_array_equal(part.values, whole[key].values)


def test_a_labelled_array_reads_the_cells_that_are_selected(tensors, monkeypatch):
    array, read = xr.Variable(LABELS, LazilyIndexedArray(LabelledFeatures(tensors["cells"], (2, 3, 1, 1)))), []
    original = stored_tensor._columns

    def noted(path, name, wanted):
        read.append((path.name, wanted.tolist()))
        return original(path, name, wanted)

    monkeypatch.setattr(stored_tensor, "_columns", noted)
    part = array[:4, 1, [0, 2]]
    assert "values with dtype" in repr(part) and not read
    assert part.values.shape == (4, 2, 1, 1, 2, 3)
    assert [wanted for _, wanted in read] == [[3, 5], [3, 5]]  # in the two shards with the first four samples
