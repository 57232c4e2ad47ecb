"""Identifies a model by the content of everything that is loaded: weights, configurations, tokenizer, scheduler."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from cosprobe.config import PipelineConfig
from cosprobe.errors import InputError
from cosprobe.files import MODEL_INDEX, size_text
from cosprobe.runtime import say

NEVER_READ = (".bin", ".ckpt", ".gguf", ".h5", ".md", ".msgpack", ".onnx", ".pt", ".pth")  # suffixes of files
VOLATILE = ("_name_or_path", "_diffusers_version", "transformers_version")  # entries of configurations
WHOLE = 2 * 10**9  # bytes of weights up to which all are looked at to notice that they were changed in memory
SKETCH = 4096  # values of a tensor that are looked at in larger models
THREADS = 4
LARGE = 5 * 10**9  # bytes of files that take seconds to read


@dataclass(frozen=True)
class _Loaded:
    """The files that a pipeline was loaded from, and a sketch of its weights right after that."""

    fingerprint: str
    sketch: str


_loaded: WeakKeyDictionary[DiffusionPipeline, _Loaded] = WeakKeyDictionary()


def model_fingerprint(config: PipelineConfig) -> str:
    """The `fingerprint` of the model and the adapters that the settings name.

    Raises InputError when the model is no diffusers folder, or when there are no such adapters.
    """
    if not (config.folder / MODEL_INDEX).is_file():
        raise InputError(
            f"pipeline.path={str(config.folder)!r}: expected a diffusers folder with a {MODEL_INDEX}; if the model was "
            "moved, run the same train.py command with its new place, which samples nothing again"
        )
    if config.lora and not any(path.suffix == ".safetensors" for _, path in _files(Path(config.lora))):
        raise InputError(
            f"pipeline.lora={config.lora!r}: expected adapters of this model, a safetensors file or a folder with one"
        )
    size = sum(file.stat().st_size for part in config.parts for _, file in _files(part))
    if size > LARGE:
        say(f"model: reading all of its files, {size_text(size)}, to know it by its content")
    return fingerprint(*config.parts)


def fingerprint(*paths: Path) -> str:
    """A hash of the content of a model's files: a diffusers folder, and adapters (a file or a folder).

    Of a diffusers folder, the files that no loader reads are left out, such as a README. Links are followed. The
    location does not matter. Raises InputError for a path that does not exist or has no such files.
    """
    digest = hashlib.sha256()
    for path in paths:
        files = dict(sorted(_files(path)))
        if not files:
            raise InputError(f"{str(path)!r}: expected a diffusers folder or adapters, found no files of a model")
        with ThreadPoolExecutor(THREADS) as pool:
            contents = pool.map(_content, files.values())
        for name, content in zip(files, contents, strict=True):
            digest.update(f"{name}:{content}\n".encode())
        digest.update(b"\n")
    return digest.hexdigest()[:16]


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """Names and paths of the files that are read from a diffusers folder or for adapters."""
    if path.is_file():
        yield path.name, path
        return
    for folder, inside, names in os.walk(path, followlinks=True):
        inside[:] = [name for name in inside if not name.startswith(".")]
        if len(Path(folder).relative_to(path).parts) > 4:
            raise InputError(f"{folder!r}: too deep for a diffusers folder; expected no link to a folder above")
        top = Path(folder) == path and (path / MODEL_INDEX).is_file()  # beside the folders of the parts
        for name in names:
            if not name.startswith(".") and not name.endswith(NEVER_READ) and (name == MODEL_INDEX or not top):
                yield str((Path(folder) / name).relative_to(path)), Path(folder) / name


def _content(path: Path) -> str:
    about = path.stat()
    return _hashed(path.resolve(), about.st_size, about.st_mtime_ns, about.st_ino)


@cache
def _hashed(path: Path, *version: int) -> str:
    """The hash of a file, computed once in a process for each version of the file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remember(pipeline: DiffusionPipeline, files: str) -> None:
    """Notes that a pipeline was just loaded. files: the fingerprint of the files it was loaded from."""
    _loaded[pipeline] = _Loaded(files, _sketch(pipeline))


def pipeline_fingerprint(pipeline: DiffusionPipeline) -> str:
    """A hash that identifies the model of a pipeline in memory.

    For a pipeline from `load_pipeline` whose weights are still the same, and for one without adapters that has the
    name of a diffusers folder, it is the `fingerprint` of the files. For any other pipeline it is a hash of all weights
    and configurations in memory.
    """
    known = _loaded.get(pipeline)
    if known is not None:
        same = known.sketch == _sketch(pipeline)
        return known.fingerprint if same else _of_memory(pipeline)
    folder = Path(str(getattr(pipeline, "name_or_path", "") or ""))
    adapted = any(hasattr(part, "peft_config") for part in pipeline.components.values())
    if (folder / MODEL_INDEX).is_file() and not adapted:
        return fingerprint(folder)
    return _of_memory(pipeline)


def _sketch(pipeline: DiffusionPipeline) -> str:
    """A hash that changes when weights, configurations, modules or hooks of a pipeline are changed in memory."""
    models = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    size = sum(value.numel() * value.element_size() for part in models for value in part.parameters())
    hooks = [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module))
        for part in models
        for name, module in part.named_modules()
    ]
    return _of_memory(pipeline, SKETCH if size > WHOLE else None) + hashlib.sha256(repr(hooks).encode()).hexdigest()


def _of_memory(pipeline: DiffusionPipeline, most: int | None = None) -> str:
    """A hash of the parts of a pipeline. most: number of values that are looked at in each tensor; default: all."""
    digest = hashlib.sha256()
    for name, part in sorted(pipeline.components.items()):
        about = part if isinstance(part, nn.Module) else getattr(part, "shift", "")  # a scheduler's is no configuration
        digest.update(f"{name} {type(part).__name__} {_described(part)} {about}\n".encode())
        for key, value in sorted(part.state_dict().items()) if isinstance(part, nn.Module) else ():
            if isinstance(value, Tensor):
                digest.update(f"{key} {tuple(value.shape)} {value.dtype}\n".encode())
                flat = value.detach().flatten()
                chosen = flat if most is None else flat[:: max(1, len(flat) // most)]
                digest.update(chosen.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _described(part: Any) -> str:
    """The configuration of a part, or the vocabulary of a tokenizer."""
    config = getattr(part, "config", None)
    if config is not None:
        content = dict(config if isinstance(config, dict) else config.to_dict())
    else:
        content = part.get_vocab() if hasattr(part, "get_vocab") else {}
    return json.dumps({k: v for k, v in content.items() if k not in VOLATILE}, sort_keys=True, default=str)
