"""Tensors of a store that are read from the disk when they are indexed."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cosprobe.errors import InputError

NOTES = "notes"  # entry of the metadata of a shard


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor [sample, column, ...] in the shards of a store. It is read when it is indexed, as datasets of h5py are.

    `tensor[rows, columns]` reads what is asked for and returns a `torch.Tensor`; `tensor[:]` reads everything. Rows and
    columns are slices, whole numbers, lists, or arrays of indices or of truth values; two arrays mean all pairs of
    them, and have to be written as `rows[:, None], columns`, as for a `torch.Tensor`. Of a tensor with four or more
    axes only the columns asked for are read, of others all of a shard. Every column that is read is compared with its
    checksum.

    files: the shards. places: shard and row in it of each sample. chosen: the columns, among those in the shards.
    whole: shape in the shards without the axis of samples.
    Raises InputError, with the name of the shard, when a shard cannot be read or is damaged.
    """

    name: str
    files: tuple[Path, ...]
    places: Int[np.ndarray, "sample 2"]
    chosen: Int[np.ndarray, " column"]
    whole: tuple[int, ...]
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """The shape that `tensor[:]` has."""
        return torch.Size((len(self.places), *((len(self.chosen), *self.whole[1:]) if self.whole else ())))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of `tensor[:]`."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self.places)

    def __repr__(self) -> str:
        return f"StoredTensor({self.name!r}, shape={list(self.shape)}, dtype={self.dtype}, {len(self.files)} shards)"

    def rows(self, keep: Int[np.ndarray, " kept"]) -> StoredTensor:
        """The samples at these indices. Nothing is read."""
        return replace(self, places=self.places[keep])

    def columns(self, keep: slice | Int[np.ndarray, " kept"]) -> StoredTensor:
        """All samples, with some of the columns. Nothing is read."""
        return replace(self, chosen=self.chosen[keep])

    def __getitem__(self, key: Any) -> Tensor:
        asked = key if isinstance(key, tuple) else (key,)
        if len(asked) > min(2, self.ndim):
            raise IndexError(f"{self!r}: {len(asked)} indices, expected one for samples and at most one for columns")
        rows, columns = (_plain(one) for one in (*asked, *[slice(None)] * (2 - len(asked))))
        if np.ndim(rows) and np.ndim(columns):
            if np.ndim(rows) != 2:
                raise IndexError(f"{self!r}: expected rows[:, None] beside an array of columns")
            rows = rows[:, 0]
        at = np.arange(len(self.places))[rows]
        if not self.whole:
            return self._read(np.atleast_1d(at), np.zeros(1, int))[:, 0].reshape(at.shape)
        which = self.chosen[columns]
        found = self._read(np.atleast_1d(at), np.atleast_1d(which))
        found = found if which.ndim else found[:, 0]
        return found if at.ndim else found[0]

    def digest(self) -> str:
        """A hash of the content, computed from the checksums; little is read."""
        digest = hashlib.sha256(f"{self.name}{self.dtype}{self.whole}".encode())
        digest.update(self.places.tobytes() + self.chosen.tobytes())
        for number in np.unique(self.places[:, 0]):
            digest.update(_checksums(self.files[number], self.name).encode())
        return digest.hexdigest()

    def _read(self, rows: Int[np.ndarray, " row"], columns: Int[np.ndarray, " column"]) -> Tensor:
        """All pairs of rows and columns, the latter as numbered in the shards."""
        wanted, back = np.unique(columns, return_inverse=True)
        found = torch.empty((len(rows), len(columns), *self.whole[1:]), dtype=self.dtype)
        if not found.numel():
            return found
        order = np.argsort(self.places[rows, 0], kind="stable")
        numbers, starts = np.unique(self.places[rows[order], 0], return_index=True)
        for number, to in zip(numbers, np.split(order, starts[1:]), strict=True):
            values = _columns(self.files[number], self.name, wanted)
            at = torch.from_numpy(self.places[rows[to], 1])
            found[torch.from_numpy(to)] = values[at[:, None], torch.from_numpy(back)]
        return found


def checksums(name: str, values: Shaped[Tensor, "sample *axes"], notes: str) -> str:
    """The checksum of every column of a tensor with four or more axes, else of the tensor, with spaces between them."""
    blocks = values.unbind(1) if values.ndim > 3 else (values,)
    shape = tuple(values.shape)
    return " ".join(_checksum(name, block, shape, number, notes) for number, block in enumerate(blocks))


def damaged(path: Path, reason: str) -> InputError:
    """The error for a shard that cannot be used."""
    return InputError(f"shard {str(path)!r} is damaged ({reason}): delete it and run train.py again")


def _checksum(name: str, block: Tensor, shape: tuple[int, ...], number: int, notes: str) -> str:
    """SHA-256, cut to 64 bits, of the values of a block and of all that tells what they are."""
    values = block.cpu().contiguous()
    digest = hashlib.sha256(f"{notes}{name}{values.dtype}{shape}{number}".encode())
    digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _columns(path: Path, name: str, wanted: Int[np.ndarray, " column"]) -> Tensor:
    """The columns `wanted`, which are sorted, of all samples of a shard; of a tensor with one axis, a column of it."""
    found = list[Tensor]()
    try:
        with safe_open(path, framework="pt") as content:
            notes, text = _about(content, name)
            expected, stored = text.split(" "), content.get_slice(name)
            shape = tuple(stored.get_shape())
            if len(shape) < 4:
                values = content.get_tensor(name)
                if _checksum(name, values, shape, 0, notes) != expected[0]:
                    raise damaged(path, "its checksum differs")
                return (values if len(shape) > 1 else values[:, None])[:, torch.from_numpy(wanted)]
            if len(expected) != shape[1]:
                raise damaged(path, "its checksums are not those of its columns")
            for run in np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1):
                part = stored[:, int(run[0]) : int(run[-1]) + 1]
                for number, block in zip(run.tolist(), part.unbind(1), strict=True):
                    if _checksum(name, block, shape, number, notes) != expected[number]:
                        raise damaged(path, "its checksum differs")
                found.append(part)
            return torch.cat(found, dim=1)  # a copy: the file is closed after this
    except (SafetensorError, OSError) as error:
        raise damaged(path, str(error).splitlines()[0]) from error


def _about(content: Any, name: str) -> tuple[str, str]:
    """The notes of an open shard, and the checksums of one of its tensors."""
    metadata = content.metadata() or {}
    return metadata.get(NOTES, ""), metadata.get(f"checksum {name}", "")


def _checksums(path: Path, name: str) -> str:
    """The checksums of a tensor of a shard, as they are stored."""
    try:
        with safe_open(path, framework="pt") as content:
            return _about(content, name)[1]
    except (SafetensorError, OSError) as error:
        raise damaged(path, str(error).splitlines()[0]) from error


def _plain(index: Any) -> Any:
    """An index for numpy: tensors and lists become arrays."""
    if isinstance(index, Tensor):
        return index.cpu().numpy()
    if isinstance(index, list | tuple):
        return np.asarray(index, dtype=None if index else int)
    return index
