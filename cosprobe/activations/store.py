"""Activations on disk: sharded safetensors, each shard complete or absent, a manifest written last.

A store belongs to one fingerprint, the settings that shaped its contents. It can be killed at any moment: a
shard is written under another name and renamed, so the next run finds whole shards and goes on from there.
Every shard carries the store's fingerprint and a checksum; one that is damaged or comes from elsewhere is
named in the error and never used.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cosprobe.errors import InputError
from cosprobe.runtime import barrier, make_folder, place, progress, say, whole_file

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ActivationStore:
    """A folder of shards. settings: everything that shaped the contents; shards: how many there will be."""

    folder: Path
    settings: dict[str, Any]
    shards: int

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def open(cls, folder: Path) -> ActivationStore:
        """A finished store. Raises ValueError when there is none or it is half-written."""
        manifest = folder / MANIFEST
        if not manifest.is_file():
            state = "half-written" if folder.is_dir() and any(folder.glob("shard-*")) else "missing"
            raise InputError(
                f"store {str(folder)!r} is {state}: expected a {MANIFEST}; run train.py again to finish it"
            )
        try:
            content = json.loads(manifest.read_text())
            return cls(folder, content["settings"], content["shards"])
        except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
            raise InputError(f"{str(manifest)!r} is damaged: expected json with settings and shards") from error

    def begin(self, size: int) -> None:
        """Makes the folder; refuses one that holds other settings, or a disk with less than `size` bytes free."""
        for name in (MANIFEST, "settings.json"):
            path = self.folder / name
            if path.is_file():
                content = json.loads(path.read_text())
                self._same(content["settings"] if name == MANIFEST else content)
        make_folder(self.folder)
        free, missing = shutil.disk_usage(self.folder).free, self.missing()
        needed = size * len(missing) // max(1, self.shards)
        if needed > free:
            raise InputError(
                f"the store needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free at {str(self.folder)!r}: "
                "choose another run_dir, fewer problems, layers or steps"
            )
        if not (self.folder / "settings.json").is_file():
            with whole_file(self.folder / "settings.json") as part:
                part.write_text(json.dumps(self.settings, indent=1, sort_keys=True))

    @property
    def complete(self) -> bool:
        return (self.folder / MANIFEST).is_file() and not self.missing()

    def missing(self) -> list[int]:
        """Shards still to be written. Raises ValueError for one that is there and can't be trusted."""
        absent = []
        for index in range(self.shards):
            if not self._path(index).is_file():
                absent.append(index)
            else:
                self._open(index)
        return absent

    def write(self, index: int, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        """Writes one shard; dtypes are kept (bf16 stays bf16). notes: what the axes mean, the same in every shard."""
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        metadata = {
            "fingerprint": self.fingerprint,
            "index": str(index),
            "checksum": _checksum(tensors),
            "notes": json.dumps(notes, sort_keys=True),
        }
        with whole_file(self._path(index)) as part:
            try:
                save_file(tensors, part, metadata)
            except SafetensorError as error:  # its own name for a full disk
                raise OSError(str(error)) from error

    def finish(self) -> None:
        """Writes the manifest. Raises ValueError while shards are missing."""
        missing = self.missing()
        if missing:
            raise InputError(f"store {str(self.folder)!r} lacks shards {missing[:5]}: expected all {self.shards}")
        content = {"fingerprint": self.fingerprint, "shards": self.shards, "settings": self.settings}
        with whole_file(self.folder / MANIFEST) as part:
            part.write_text(json.dumps(content, indent=1, sort_keys=True))
        for left in self.folder.glob(".shard-*"):  # by processes that were killed
            left.unlink()

    def read(self, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors whose name begins with `prefix`, joined along the sample axis over the shards that hold them, each
        checked against its checksum; and their notes."""
        parts: dict[str, list[Tensor]] = {}
        notes = set()
        for index in range(self.shards):
            if not self._path(index).is_file():
                raise InputError(f"shard {str(self._path(index))!r} is missing: run train.py again to collect it")
            metadata, tensors = self._open(index, prefix)
            notes.add(metadata["notes"])
            if not tensors:
                continue
            if metadata["checksum"] != _checksum(tensors):
                raise self._damaged(index, "its checksum differs")
            for name in tensors:
                if name.startswith(prefix):
                    parts.setdefault(name, []).append(tensors[name])
        if len(notes) != 1:
            raise InputError(f"store {str(self.folder)!r}: its shards disagree on what their axes mean; delete it")
        # popped one by one: the shards of one name are freed before those of the next are joined
        return {name: torch.cat(parts.pop(name)) for name in list(parts)}, json.loads(notes.pop())

    def _path(self, index: int) -> Path:
        return self.folder / f"shard-{index:05d}.safetensors"

    def _open(self, index: int, prefix: str | None = None) -> tuple[dict[str, str], dict[str, Tensor]]:
        """A shard's metadata, and its tensors when a name among them begins with `prefix`."""
        try:
            with safe_open(self._path(index), framework="pt") as file:
                metadata = file.metadata() or {}
                names = list(file.keys())
                wanted = prefix is not None and any(name.startswith(prefix) for name in names)
                tensors = {name: file.get_tensor(name) for name in names} if wanted else {}
        except (SafetensorError, OSError) as error:
            raise self._damaged(index, str(error).splitlines()[0]) from error
        if metadata.get("fingerprint") != self.fingerprint or metadata.get("index") != str(index):
            raise InputError(
                f"shard {str(self._path(index))!r} belongs to another store: expected fingerprint {self.fingerprint}, "
                f"found {metadata.get('fingerprint', 'none')}; delete it and run train.py again"
            )
        return metadata, tensors

    def _damaged(self, index: int, reason: str) -> InputError:
        return InputError(f"shard {str(self._path(index))!r} is damaged ({reason}): delete it and run train.py again")

    def _same(self, other: dict[str, Any]) -> None:
        wanted = json.loads(json.dumps(self.settings))
        for name in sorted({*wanted, *other}):
            if wanted.get(name) != other.get(name):
                raise InputError(
                    f"run_dir: {str(self.folder)!r} was made with {name}={_short(other.get(name))}, now "
                    f"{name}={_short(wanted.get(name))}; choose another run_dir or delete that folder"
                )


def fill(
    store: ActivationStore, size: int, what: str, write: Callable[[Any], tuple[dict, dict]], chunks: Sequence[Any]
) -> ActivationStore:
    """Writes the shards that are not on disk yet, one per chunk, saying first how large the whole will be.

    With several processes, chunk i belongs to process i modulo their number.
    """
    rank, world = place()
    if rank == 0:
        store.begin(size)
    barrier()
    missing = store.missing()
    name = store.folder.name
    if not missing:
        say(f"{name}: {what} are already in {store.folder}; re-using them")
    else:
        there = len(chunks) - len(missing)
        done = f"; {there} of {len(chunks)} shards are there" if there else ""
        say(f"{name}: {what}, {size / 1e6:.0f} MB in {store.folder}{done}")
        with progress() as bar:
            mine = [i for i in missing if i % world == rank]
            for index in bar.track(mine, description=f"{name}: sampling under capture"):
                store.write(index, *write(chunks[index]))
        barrier()
    if rank == 0 and not store.complete:
        store.finish()
    barrier()
    return store


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
