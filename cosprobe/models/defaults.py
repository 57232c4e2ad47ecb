"""What a model is sampled with unless the settings say otherwise: the defaults of its pipeline, or of its folder."""

from __future__ import annotations

import inspect
import json
import math
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open

from cosprobe.config import PipelineConfig, own_defaults
from cosprobe.errors import InputError
from cosprobe.files import MODEL_INDEX
from cosprobe.models.architectures import adapter, refusal

ARGUMENTS = {  # settings, and the arguments of a pipeline call that they become
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "frames": "num_frames",
    "prompt_tokens": "max_sequence_length",
}
STORED = {"F32": "float32", "F64": "float32", "BF16": "bfloat16", "F16": "float16"}  # types in safetensors files
TRANSFORMERS = ("transformer", "transformer_2")


@dataclass(frozen=True)
class _Model:
    """What the files of a model say about its sampling. kind: class of the pipeline. transformer: its configuration."""

    kind: type
    transformer: Mapping[str, Any]
    own: Mapping[str, Any]
    dtype: str


def with_defaults(config: PipelineConfig, pipeline: DiffusionPipeline | None = None) -> PipelineConfig:
    """The settings with the defaults of the model in place of what is 0 or empty.

    They are those in `sampling.json` in the folder of the model, else those of the arguments of the pipeline call. The
    type of the weights is that of the transformer. pipeline: the model, if it is loaded; default: read from its files.
    Raises InputError for a folder that is none of a pipeline, and for a class that is no video pipeline of diffusers.
    """
    if all(getattr(config, name) for name in (*ARGUMENTS, "dtype")):
        return config
    model = _read(config) if pipeline is None else _described(pipeline, config)
    taken, missing = inspect.signature(model.kind.__call__).parameters, dict[str, Any]()
    for name, argument in ARGUMENTS.items():
        value = taken[argument].default if argument in taken else 0
        missing[name] = model.own.get(name, value)
    family = adapter(model.kind.__name__)
    if family is not None:
        missing["prompt_tokens"] = family.needed_tokens(model.transformer) or missing["prompt_tokens"]
        missing["frames"] = missing["frames"] or family.default_frames(model.transformer)
    missing["dtype"] = model.own.get("dtype", model.dtype)
    changes: dict[str, Any] = {name: getattr(config, name) or value or 0 for name, value in missing.items()}
    return replace(config, **changes)


def taken_defaults(before: PipelineConfig, after: PipelineConfig) -> str:
    """What `with_defaults` has filled in, as text; empty if it was nothing."""
    names = [name for name in (*ARGUMENTS, "dtype") if getattr(before, name) != getattr(after, name)]
    return ", ".join(f"{name}={getattr(after, name)}" for name in names)


def pipeline_class(config: PipelineConfig) -> type[DiffusionPipeline]:
    """The class of the pipeline that the settings name, or that of its folder.

    Nothing else than diffusers is imported. Raises InputError unless it is a supported pipeline of diffusers.
    """
    where, name = f"pipeline.kind={config.kind!r}", config.kind
    if not name:
        where = f"pipeline.path={str(config.folder)!r}: the class in its {MODEL_INDEX}"
        name = str(_json(config.folder, MODEL_INDEX).get("_class_name"))
    kind = getattr(diffusers, name, None) if name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)):
        raise InputError(f"{where}: {name!r} is no pipeline of diffusers; expected a video pipeline")
    if adapter(name) is None:
        raise InputError(f"{where}: {name} {refusal(name)}; see docs/support.md")
    return kind


def _read(config: PipelineConfig) -> _Model:
    """What the files of a model say."""
    config.check_folder()
    folder = config.folder
    kind = pipeline_class(config)
    part = next((folder / name for name in TRANSFORMERS if (folder / name / "config.json").is_file()), None)
    if part is None:
        raise InputError(f"pipeline.path={str(folder)!r}: has no transformer; expected a folder with transformer/")
    return _Model(kind, _json(folder, f"{part.name}/config.json"), own_defaults(folder), _stored_type(part))


def _described(pipeline: DiffusionPipeline, config: PipelineConfig) -> _Model:
    """The same of a pipeline in memory. config: names its folder if the pipeline does not."""
    transformer = next(part for name in TRANSFORMERS if (part := getattr(pipeline, name, None)) is not None)
    folder = Path(str(getattr(pipeline, "name_or_path", "") or config.path))
    own = own_defaults(folder) if (folder / MODEL_INDEX).is_file() else {}
    return _Model(type(pipeline), transformer.config, own, str(transformer.dtype).removeprefix("torch."))


def _json(folder: Path, name: str) -> dict[str, Any]:
    """The content of a configuration file of a model."""
    where = f"pipeline.path={str(folder)!r}: {name}"
    try:
        content = json.loads((folder / name).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{where} is no JSON file ({str(error)[:80]}); download or save the model again") from error
    if not isinstance(content, dict):
        raise InputError(f"{where} holds no settings; download or save the model again")
    return content


def _stored_type(folder: Path) -> str:
    """The type of most weights in the safetensors files of a model, as `pipeline.dtype` names it."""
    counts: Counter[str] = Counter()
    for path in sorted(folder.glob("*.safetensors"))[:1]:
        with suppress(SafetensorError), safe_open(path, "pt") as file:  # the loader says what is wrong with it
            for name in file.keys():  # noqa: SIM118
                values = file.get_slice(name)
                counts[values.get_dtype()] += math.prod(values.get_shape())
    most = counts.most_common(1)
    return STORED.get(most[0][0], "bfloat16") if most else "float32"
