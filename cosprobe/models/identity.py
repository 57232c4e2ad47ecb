"""Identifies a model by the content of everything that is loaded: weights, configurations, tokenizer, scheduler.

A fingerprint has a hash for each part, so that two of them tell which parts differ.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
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

INDEX_PART, ADAPTERS_PART = "index", "adapters"  # parts of a model that are no folders of it
NEVER_READ = (".bin", ".ckpt", ".gguf", ".h5", ".md", ".msgpack", ".onnx", ".pt", ".pth")  # suffixes of files
VOLATILE = ("_name_or_path", "_diffusers_version", "transformers_version")  # entries of configurations
WHOLE = 2 * 10**9  # bytes of weights up to which all are looked at to notice that they were changed in memory
SKETCH = 4096  # values of a tensor that are looked at in larger models
THREADS = 4
LARGE = 5 * 10**9  # bytes of files that take seconds to read


Fingerprint = dict[str, str]  # hashes, by the name of the part


@dataclass(frozen=True)
class _Loaded:
    """The files that a pipeline was loaded from, and a sketch of its parts right after that."""

    files: Fingerprint
    sketch: Fingerprint


_loaded: WeakKeyDictionary[DiffusionPipeline, _Loaded] = WeakKeyDictionary()


def model_fingerprint(config: PipelineConfig) -> Fingerprint:
    """The `fingerprint` of the model and the adapters that the settings name.

    Raises InputError when the model is no diffusers folder, or when there are no such adapters.
    """
    config.check_folder()
    for setting in ("lora", "lora_2"):
        path = getattr(config, setting)
        if path and not any(file.suffix == ".safetensors" for _, file in _files(Path(path))):
            missing = "" if Path(path).exists() else "no such file or folder; "
            raise InputError(
                f"pipeline.{setting}={path!r}: {missing}expected adapters of this model, a safetensors file or a "
                "folder with one"
            )
    size = sum(file.stat().st_size for part in config.parts for _, file in _files(part))
    if size > LARGE:
        say(f"model: reading all of its files, {size_text(size)}, to know it by its content")
    return fingerprint(*config.parts)


def fingerprint(*paths: Path) -> Fingerprint:
    """Hashes of the content of a model's files: of a diffusers folder, and of adapters (a file or a folder).

    The parts are the folders in the diffusers folder (`transformer`, `vae`, `scheduler`, ...), its `index`, and
    `adapters`. Files that no loader reads are left out, such as a README. Links are followed. The location does not
    matter. Raises InputError for a path that does not exist or has no such files.
    """
    digests: dict[str, Any] = {}
    for path in paths:
        files = dict(sorted(_files(path)))
        if not files:
            raise InputError(f"{str(path)!r}: expected a diffusers folder or adapters, found no files of a model")
        with ThreadPoolExecutor(THREADS) as pool:
            contents = pool.map(_content, files.values())
        whole = (path / MODEL_INDEX).is_file()
        for name, content in zip(files, contents, strict=True):
            part = (INDEX_PART if name == MODEL_INDEX else Path(name).parts[0]) if whole else ADAPTERS_PART
            digests.setdefault(part, hashlib.sha256()).update(f"{name}:{content}\n".encode())
    return {part: digest.hexdigest()[:16] for part, digest in sorted(digests.items())}


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


def remember(pipeline: DiffusionPipeline, files: Fingerprint) -> None:
    """Notes that a pipeline was just loaded. files: the fingerprint of the files it was loaded from."""
    _loaded[pipeline] = _Loaded(files, _sketch(pipeline))


def pipeline_fingerprint(pipeline: DiffusionPipeline) -> Fingerprint:
    """Hashes that identify the model of a pipeline in memory.

    For a pipeline from `load_pipeline`, and for one without adapters that has the name of a diffusers folder, it is the
    `fingerprint` of the files. Parts that were changed after `load_pipeline`, and all parts of any other pipeline, have
    a hash of the weights and configuration in memory.
    """
    known = _loaded.get(pipeline)
    if known is not None:
        now = _sketch(pipeline)
        changed = {name for name in {*known.sketch, *now} if known.sketch.get(name) != now.get(name)}
        kept = {name: value for name, value in known.files.items() if name not in changed}
        return dict(sorted((kept | _of_memory(pipeline, changed)).items()))
    folder = Path(str(getattr(pipeline, "name_or_path", "") or ""))
    adapted = any(hasattr(part, "peft_config") for part in pipeline.components.values())
    if (folder / MODEL_INDEX).is_file() and not adapted:
        return fingerprint(folder)
    return _of_memory(pipeline, pipeline.components)


def _sketch(pipeline: DiffusionPipeline) -> Fingerprint:
    """Hashes that change when weights, configurations, modules or hooks of a part are changed in memory."""
    models = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    size = sum(value.numel() * value.element_size() for part in models.values() for value in part.parameters())
    found = _of_memory(pipeline, pipeline.components, SKETCH if size > WHOLE else None)
    for name, part in models.items():
        hooks = [
            (inside, *map(_count, (module._forward_hooks, module._forward_pre_hooks)), "forward" in vars(module))
            for inside, module in part.named_modules()
        ]
        found[name] += hashlib.sha256(repr(hooks).encode()).hexdigest()
    return found


def _count(hooks: Mapping[int, Any]) -> int:
    """Number of hooks, without those that transformers registers itself when a model first runs."""
    return sum(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks.values())


def _of_memory(pipeline: DiffusionPipeline, parts: Collection[str], most: int | None = None) -> Fingerprint:
    """Hashes of some parts of a pipeline. most: number of values that are looked at in each tensor; default: all."""
    found = {}
    for name, part in sorted(pipeline.components.items()):
        if name not in parts or part is None:
            continue
        about = part if isinstance(part, nn.Module) else getattr(part, "shift", "")  # a scheduler's is no configuration
        digest = hashlib.sha256(f"{name} {type(part).__name__} {_described(part)} {about}\n".encode())
        for key, value in sorted(part.state_dict().items()) if isinstance(part, nn.Module) else ():
            if isinstance(value, Tensor):
                digest.update(f"{key} {tuple(value.shape)} {value.dtype}\n".encode())
                flat = value.detach().flatten()
                chosen = flat if most is None else flat[:: max(1, len(flat) // most)]
                digest.update(chosen.cpu().contiguous().view(torch.uint8).numpy().data)
        found[name] = digest.hexdigest()[:16]
    return found


def _described(part: Any) -> str:
    """The configuration of a part, or the vocabulary of a tokenizer."""
    config = getattr(part, "config", None)
    if config is not None:
        content = dict(config if isinstance(config, dict) else config.to_dict())
    else:
        content = part.get_vocab() if hasattr(part, "get_vocab") else {}
    return json.dumps({k: v for k, v in content.items() if k not in VOLATILE}, sort_keys=True, default=str)
