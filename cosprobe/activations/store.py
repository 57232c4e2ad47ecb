"""Activation stores: safetensors shards on disk, each with the names of its samples, and a manifest.

A store has a fingerprint, a hash of the settings that shape its activations. How many samples it holds is not among
them: a store grows, and several runs can read the same one. Shards are written atomically, so a run can be killed at
any time, and the next run continues from the complete shards. The manifest lists the shards of finished runs. Every
shard has the fingerprint of the store and a checksum. A shard that is damaged or belongs to another store raises an
error with its name.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cosprobe.activations.stored_tensor import NOTES, StoredTensor, checksums, damaged
from cosprobe.checked import file_size
from cosprobe.differences import ANOTHER, check_same, flattened, shown
from cosprobe.errors import InputError
from cosprobe.files import HALF, make_folder, read_json, size_text, stranger, whole_file, write_json
from cosprobe.runs import STORE_FILE

MANIFEST, SETTINGS = "manifest.json", STORE_FILE
LAYOUT = 4  # version of the files of a store
OWN = re.compile(r"(shard|samples)-.*\.safetensors")  # names of the other files of a store
RESERVE = 10_000_000  # bytes for probes, figures and tables of a result
ADVICE = "delete the store, or choose another run_dir"

Rows = Mapping[str, Sequence[str]]  # names of the samples of a shard, by group of tensors; see `ActivationStore`


@dataclass(frozen=True)
class ActivationStore:
    """A folder of shards.

    A shard holds tensors whose first axis is the sample, and the names of its samples. A group is a set of tensors of a
    shard that have the same samples: those whose names begin with the name of the group, or with that of no other
    (group ``""``). So a shard may hold further tensors of a part of its samples.

    settings: all settings that shape the content. captured: what is kept of every sample (layers, steps, ...), which
    does not change the values of the rest; runs that need no more than that can read this store.
    """

    folder: Path
    settings: dict[str, Any]
    captured: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """A hash of the settings."""
        return _digest(self.settings)

    def __repr__(self) -> str:
        listed = self._listed()
        samples = len(dict.fromkeys(name for rows in listed.values() for name in rows[""]))
        return (
            f"ActivationStore({str(self.folder)!r}, {samples} samples in {len(listed)} shards, "
            f"{self.size() / 1e6:.0f} MB)"
        )

    def _repr_html_(self) -> str:
        """A table of the content and the settings, for notebooks."""
        rows = {"store": repr(self)} | {name: shown(value) for name, value in flattened(self.settings).items()}
        lines = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
        return f"<table>{''.join(lines)}</table>"

    @classmethod
    def open(cls, folder: Path | str) -> ActivationStore:
        """Opens the store of a finished run. Raises InputError when it is missing, half-written or damaged."""
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            state = "half-written" if folder.is_dir() and any(folder.glob("shard-*")) else "missing"
            raise InputError(
                f"store {str(folder)!r} is {state}: expected a {MANIFEST}; run train.py again to finish it"
            )
        found = cls.begun(folder)
        assert found is not None  # there is a manifest
        found._listed()
        return found

    @classmethod
    def begun(cls, folder: Path) -> ActivationStore | None:
        """The store in a folder, complete or not; None if there is none. Raises InputError when it is damaged or of
        another version."""
        files = [folder / name for name in (SETTINGS, MANIFEST) if (folder / name).is_file()]
        if not files:
            return None
        content = read_json(files[0], ADVICE, layout=LAYOUT)
        if files[0].name != SETTINGS:
            raise InputError(f"{str(folder / SETTINGS)!r} is missing: {ADVICE}")
        return cls(folder, content["settings"], content["captured"])

    def begin(self, size: int) -> None:
        """Creates the folder. size: bytes that will be written.

        Raises InputError when the folder has a store with other settings or anything else, or when the disk is too
        small.
        """
        begun = self.begun(self.folder)
        if begun is not None:
            self.check_settings(begun.settings)
        elif found := stranger(self.folder, lambda path: OWN.fullmatch(path.name) is not None):
            raise InputError(f"{str(self.folder)!r}: holds {found!r}, which is not of a store; choose another folder")
        make_folder(self.folder)
        free = shutil.disk_usage(self.folder).free
        if size + RESERVE > free:
            raise InputError(
                f"the store needs {size_text(size + RESERVE)}, {size_text(free)} are free at {str(self.folder)!r}: "
                "choose another run_dir, fewer problems, layers or steps"
            )
        if begun is None:
            content = {"layout": LAYOUT, "settings": self.settings, "captured": self.captured}
            write_json(self.folder / SETTINGS, content)

    def check_settings(self, other: Mapping[str, Any]) -> None:
        """Raises InputError, with the first setting that differs, unless `other` equals the settings of the store."""
        check_same(other, self.settings, f"run_dir: {str(self.folder)!r} was", ANOTHER)

    def path(self, rows: Rows) -> Path:
        """The file of a shard. It is named by its samples."""
        return self.folder / f"shard-{_digest({group: list(names) for group, names in rows.items()})}.safetensors"

    def names(self, group: str = "") -> list[str]:
        """The samples of finished runs that have tensors of a group, in the order in which they were asked for."""
        return list(dict.fromkeys(name for rows in self._listed().values() for name in rows.get(group, ())))

    def missing(self, names: Sequence[str], group: str = "") -> list[str]:
        """The samples without tensors of a group on disk.

        Raises InputError for a shard that is damaged or belongs to another store.
        """
        there = {name for rows in self._shards().values() for name in rows.get(group, ())}
        return [name for name in names if name not in there]

    def complete(self, names: Iterable[str]) -> bool:
        """Whether the manifest lists these samples. Unlike `missing`, this opens no shard."""
        return set(names) <= set(self.names())

    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.folder.glob("*") if path.is_file())

    def write(self, rows: Rows, tensors: Mapping[str, Tensor], notes: dict[str, Any]) -> None:
        """Writes one shard without changing dtypes. notes: names along the axes, equal for all shards."""
        ready = {name: value.contiguous() for name, value in tensors.items()}
        metadata = {
            "fingerprint": self.fingerprint,
            "rows": json.dumps({group: list(names) for group, names in rows.items()}),
            NOTES: json.dumps(notes, sort_keys=True),
        }
        metadata |= {f"checksum {name}": checksums(name, values, metadata[NOTES]) for name, values in ready.items()}
        path = self.path(rows)
        with whole_file(path, file_size(ready, metadata)) as part:
            save_file(ready, part, metadata)

    def finish(self, names: Sequence[str]) -> None:
        """Lists the shards of these samples in the manifest. Raises InputError when samples are missing."""
        if absent := self.missing(names):
            raise InputError(
                f"store {str(self.folder)!r} lacks {absent[:3]}: expected all {len(names)} samples; run train.py again"
            )
        order = {name: i for i, name in enumerate(names)}
        found, listed = self._shards(), self._listed()
        new = sorted(set(found) - set(listed), key=lambda file: min(order.get(n, len(order)) for n in found[file][""]))
        shards = {file: found[file] for file in (*(file for file in listed if file in found), *new)}
        write_json(self.folder / MANIFEST, {"layout": LAYOUT, "fingerprint": self.fingerprint, "shards": shards})
        for left in self.folder.iterdir():  # of processes that were killed
            if HALF.fullmatch(left.name):
                left.unlink()

    def tensors(
        self, group: str = "", names: Sequence[str] | None = None
    ) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
        """The tensors of a group, with one row for each of the samples `names`, in that order; and the notes.

        They are read when they are indexed. names: default all samples that have the group. Without samples there are
        no tensors and no notes. Raises InputError for a shard that is missing, damaged or of another store.
        """
        names = self.names(group) if names is None else list(names)
        shards, listed = self._shards(), self._listed()
        places: dict[str, tuple[str, int]] = {}
        for file in (*(file for file in listed if file in shards), *sorted(set(shards) - set(listed))):
            for row, name in enumerate(shards[file].get(group, ())):
                places.setdefault(name, (file, row))
        if absent := [name for name in names if name not in places]:
            raise InputError(
                f"store {str(self.folder)!r}: the shard of sample {absent[0]!r} is missing; run train.py again to "
                "collect it"
            )
        if not names:
            return {}, {}
        files = {file: number for number, file in enumerate(dict.fromkeys(places[name][0] for name in names))}
        found = [self._described(file, group, shards[file]) for file in files]
        if any(one != found[0] for one in found):
            raise InputError(f"store {str(self.folder)!r}: its shards differ in axes; delete it and run train.py again")
        notes, shapes = found[0]
        paths = tuple(self.folder / file for file in files)
        at = np.array([(files[places[name][0]], places[name][1]) for name in names])
        tensors = {
            name: StoredTensor(name, paths, at, np.arange(shape[0] if shape else 1), shape, dtype)
            for name, (shape, dtype) in shapes.items()
        }
        try:
            return tensors, json.loads(notes)
        except ValueError as error:
            raise damaged(paths[0], "its notes cannot be read") from error

    def read(self, group: str = "", names: Sequence[str] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `tensors` returns, read into memory."""
        tensors, notes = self.tensors(group, names)
        return {name: stored[:] for name, stored in tensors.items()}, notes

    def _listed(self) -> dict[str, dict[str, list[str]]]:
        """The samples of every shard in the manifest, by name of the file; empty without a manifest."""
        path = self.folder / MANIFEST
        if not path.is_file():
            return {}
        content = read_json(path, ADVICE, layout=LAYOUT)
        if content["fingerprint"] != self.fingerprint:
            raise InputError(f"{str(path)!r} is of a store with other settings than {SETTINGS} beside it: {ADVICE}")
        return content["shards"]

    def _shards(self) -> dict[str, dict[str, list[str]]]:
        """The samples of every shard on disk, by name of the file."""
        return {path.name: self._head(path.name)[1] for path in sorted(self.folder.glob("shard-*.safetensors"))}

    def _head(self, file: str) -> tuple[dict[str, str], dict[str, list[str]]]:
        """The metadata of a shard, and its samples."""
        try:
            with safe_open(self.folder / file, framework="pt") as content:
                metadata = content.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise damaged(self.folder / file, str(error).splitlines()[0]) from error
        try:
            rows = dict(json.loads(metadata.get("rows", "{}")))
        except (ValueError, TypeError) as error:
            raise damaged(self.folder / file, "its list of samples cannot be read") from error
        if metadata.get("fingerprint") != self.fingerprint or self.path(rows).name != file:
            raise InputError(
                f"shard {str(self.folder / file)!r} belongs to another store or to other samples: expected fingerprint "
                f"{self.fingerprint}, found {metadata.get('fingerprint', 'none')}; delete it and run train.py again"
            )
        return metadata, rows

    def _described(self, file: str, group: str, rows: Rows) -> tuple[str, dict[str, tuple[tuple[int, ...], Any]]]:
        """The notes of a shard; and shape, without the samples, and dtype of its tensors of a group."""
        try:
            with safe_open(self.folder / file, framework="pt") as content:
                notes = (content.metadata() or {}).get(NOTES, "")
                names = [name for name in list(content.keys()) if _group(name, rows) == group]
                slices = {name: content.get_slice(name) for name in names}
                shapes = {name: (tuple(one.get_shape()[1:]), one[:0].dtype) for name, one in slices.items()}
        except (SafetensorError, OSError) as error:
            raise damaged(self.folder / file, str(error).splitlines()[0]) from error
        return notes, shapes


def _group(name: str, rows: Rows) -> str:
    """The group of a tensor."""
    return max((group for group in rows if name.startswith(group)), key=len)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
