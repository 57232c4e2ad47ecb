"""Results of slow steps, kept in files and read again when nothing they depend on has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cosprobe.checked import read_tensors, write_tensors
from cosprobe.errors import InputError
from cosprobe.files import make_folder
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
    made_by = {"key": text, "code": code_fingerprint()}
    with suppress(InputError):  # missing or damaged
        tensors, about = read_tensors(path)
        if made_by.items() <= about.items():
            say(f"{name}: computed before, in {path}; re-using it")
            return {label: values.numpy() for label, values in tensors.items()}, about["notes"]
    arrays, notes = compute()
    if rank_and_world()[0] == 0:
        make_folder(folder)
        tensors = {label: torch.from_numpy(np.array(array, order="C")) for label, array in arrays.items()}
        write_tensors(path, tensors, made_by | {"notes": notes})
    return arrays, notes
