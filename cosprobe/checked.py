"""Files of tensors with a checksum of their content: neither safetensors nor torch notice changed bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cosprobe.errors import InputError
from cosprobe.files import whole_file

HEADER = 80  # bytes of a tensor in the header of a file
CHECKSUM, ABOUT = "sha256", "about"  # entries of the metadata


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Writes tensors of any shapes, and further values that JSON can hold, to a safetensors file, atomically.

    Raises InputError when the file cannot be written.
    """
    ready = {name: values.contiguous() for name, values in tensors.items()}
    text = json.dumps(about)
    metadata = {ABOUT: text, CHECKSUM: checksum(ready, text)}
    with whole_file(path, file_size(ready, metadata)) as part:
        save_file(ready, part, metadata)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote, with the names of tensors sorted. Raises InputError when it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{str(path)!r} is missing or damaged ({str(error).splitlines()[0]}): delete it") from error
    about = metadata.get(ABOUT, "")
    if metadata.get(CHECKSUM) != checksum(tensors, about):
        raise InputError(f"{str(path)!r} is damaged (its checksum differs): delete it")
    return tensors, json.loads(about)


def file_size(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """About how many bytes a safetensors file has."""
    header = sum(len(name) + HEADER for name in tensors) + sum(map(len, metadata.values()))
    return header + sum(values.nbytes for values in tensors.values())


def checksum(tensors: Mapping[str, Tensor], about: str) -> str:
    """SHA-256 of names, types, shapes and values of tensors, and of a text."""
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        values = tensors[name].cpu().contiguous()
        digest.update(f"{name}{values.dtype}{tuple(values.shape)}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
