"""Results of slow steps, kept in files and read again when nothing they depend on has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as array_bytes
from safetensors.numpy import save_file

from cosprobe.files import make_folder, whole_file
from cosprobe.runs import code_fingerprint
from cosprobe.runtime import rank_and_world, say

Saved = tuple[dict[str, np.ndarray], dict[str, Any]]  # arrays by name, and further values that JSON can hold


def cached(folder: Path, name: str, key: Mapping[str, Any], compute: Callable[[], Saved]) -> Saved:
    """What `compute` returns, from a file in `folder` if an earlier call with the same key and code has written it.

    name: begins the name of the file. key: everything that the result depends on, as values that JSON can hold. A file
    that is damaged or was written by other code is replaced. With several processes, all compute and the first writes.
    """
    text = json.dumps(key, sort_keys=True)
    path = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.safetensors"
    code = code_fingerprint()
    found = _read(path, text, code)
    if found is not None:
        say(f"{name}: computed before, in {path}; re-using it")
        return found
    arrays, notes = compute()
    if rank_and_world()[0] == 0:
        make_folder(folder)
        ready = {label: np.ascontiguousarray(array) for label, array in arrays.items()}
        checksum = hashlib.sha256(array_bytes(ready)).hexdigest()
        with whole_file(path) as part:
            save_file(ready, part, {"key": text, "code": code, "notes": json.dumps(notes), "checksum": checksum})
    return arrays, notes


def _read(path: Path, key: str, code: str) -> Saved | None:
    """The content of a file, None unless it is complete and has this key and code."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "np") as file:
            about = file.metadata() or {}
            if (about.get("key"), about.get("code")) != (key, code):
                return None
            arrays = {name: file.get_tensor(name) for name in list(file.keys())}
        return (arrays, json.loads(about["notes"])) if _intact(arrays, about["checksum"]) else None
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _intact(arrays: dict[str, np.ndarray], checksum: str) -> bool:
    return hashlib.sha256(array_bytes(arrays)).hexdigest() == checksum
