"""Activation stores: safetensors shards on disk, with a manifest that is written last.

A store has a fingerprint, a hash of the settings that determine its content. Shards are written atomically, so a run
can be killed at any time, and the next run continues from the complete shards. Every shard has the fingerprint of the
store and a checksum. A shard that is damaged or belongs to another store raises an error with its name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cosprobe.errors import InputError
from cosprobe.files import make_folder, whole_file

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ActivationStore:
    """A folder of shards. settings: all settings that determine the content. shards: number of shards when complete."""

    folder: Path
    settings: dict[str, Any]
    shards: int

    @property
    def fingerprint(self) -> str:
        """A hash of the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        there = [self._path(i) for i in range(self.shards) if self.has(i)]
        size = sum(path.stat().st_size for path in there)
        return f"ActivationStore({str(self.folder)!r}, {len(there)} of {self.shards} shards, {size / 1e6:.0f} MB)"

    def _repr_html_(self) -> str:
        """A table of the content and the settings, for notebooks."""
        rows = {"store": repr(self)} | {name: _short(value) for name, value in flattened(self.settings).items()}
        lines = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
        return f"<table>{''.join(lines)}</table>"

    @classmethod
    def open(cls, folder: Path | str) -> ActivationStore:
        """Opens a complete store. Raises InputError when it is missing, half-written or damaged."""
        folder = Path(folder)
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
            raise InputError(
                f"{str(manifest)!r} is damaged: expected JSON with settings and shards; delete it, run train.py again"
            ) from error

    def begin(self, size: int) -> None:
        """Creates the folder. size: bytes of the complete store.

        Raises InputError when the folder has a store with other settings, or when the disk is too small for the shards
        that are missing.
        """
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
        """Whether the manifest and all shards exist."""
        return (self.folder / MANIFEST).is_file() and not self.missing()

    def has(self, index: int) -> bool:
        """Whether a shard is on disk."""
        return self._path(index).is_file()

    def lacking(self) -> bool:
        """Whether any shard is not on disk yet. Unlike `missing`, this opens no file."""
        return not all(map(self.has, range(self.shards)))

    def missing(self) -> list[int]:
        """Indices of the missing shards. Raises InputError for a shard that is damaged or belongs to another store."""
        absent = []
        for index in range(self.shards):
            if not self._path(index).is_file():
                absent.append(index)
            else:
                self._open(index)
        return absent

    def write(self, index: int, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        """Writes one shard without changing dtypes. notes: names along the axes, equal for all shards."""
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
            except SafetensorError as error:  # safetensors raises this for a full disk
                raise OSError(str(error)) from error

    def finish(self) -> None:
        """Writes the manifest. Raises InputError when shards are missing."""
        missing = self.missing()
        if missing:
            raise InputError(
                f"store {str(self.folder)!r} lacks shards {missing[:5]}: expected all {self.shards}; run train.py again"
            )
        content = {"fingerprint": self.fingerprint, "shards": self.shards, "settings": self.settings}
        with whole_file(self.folder / MANIFEST) as part:
            part.write_text(json.dumps(content, indent=1, sort_keys=True))
        for left in self.folder.glob(".shard-*"):  # temporary files of processes that were killed
            left.unlink()

    def read(self, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Reads the tensors whose names begin with `prefix`, concatenated over shards (axis sample), and the notes.

        Raises InputError for a shard that is missing, damaged or of another store.
        """
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
            raise InputError(f"store {str(self.folder)!r}: its shards differ in axes; delete it and run train.py again")
        # `pop` frees the parts of one tensor before those of the next are concatenated
        return {name: torch.cat(parts.pop(name)) for name in list(parts)}, json.loads(notes.pop())

    def _path(self, index: int) -> Path:
        return self.folder / f"shard-{index:05d}.safetensors"

    def _open(self, index: int, prefix: str | None = None) -> tuple[dict[str, str], dict[str, Tensor]]:
        """The metadata of a shard, and all its tensors if the name of one begins with `prefix` (None: no tensors)."""
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
                f"shard {str(self._path(index))!r} belongs to another store or index: expected fingerprint "
                f"{self.fingerprint}, index {index}; found {metadata.get('fingerprint', 'none')}, index "
                f"{metadata.get('index', 'none')}; delete it and run train.py again"
            )
        return metadata, tensors

    def _damaged(self, index: int, reason: str) -> InputError:
        return InputError(f"shard {str(self._path(index))!r} is damaged ({reason}): delete it and run train.py again")

    def _same(self, other: dict[str, Any]) -> None:
        """Raises InputError, with the first setting that differs, unless `other` equals the settings of the store."""
        wanted, other = flattened(json.loads(json.dumps(self.settings))), flattened(other)
        for name in sorted({*wanted, *other}):
            if wanted.get(name) != other.get(name):
                raise InputError(
                    f"run_dir: {str(self.folder)!r} was made with {name}={_short(other.get(name))}, now "
                    f"{name}={_short(wanted.get(name))}; choose another run_dir or delete that folder"
                )


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as a flat dict with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


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
