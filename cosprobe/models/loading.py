"""The one place that loads a pipeline. What is loaded is complete, fits its configuration and holds finite numbers."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from diffusers.utils import logging as diffusers_logging
from peft import get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from cosprobe.config import PipelineConfig
from cosprobe.errors import InputError
from cosprobe.files import MODEL_INDEX
from cosprobe.models.architectures import architecture
from cosprobe.models.cpu_layout import arrange
from cosprobe.models.identity import model_fingerprint, remember
from cosprobe.models.pipelines import experts

Part = TypeVar("Part", bound=nn.Module)
REPORTS = ("LOAD REPORT", "Some weights of")  # in reports of transformers and diffusers
NAMED = 3  # names of tensors in a message


def load_pipeline(config: PipelineConfig | Path | str | None = None, device: str = "cpu") -> DiffusionPipeline:
    """Loads a local diffusers folder, frozen and in eval mode. Nothing is downloaded; only safetensors are read.

    config: settings or a folder; default: the model in the package.
    Raises InputError when the folder is missing or is not a complete pipeline, when a tensor of a model is missing, is
    not one of the model, has another shape than its configuration says or is not finite, and when adapters do not fit.
    """
    config = config if isinstance(config, PipelineConfig) else PipelineConfig(path=str(config or ""))
    folder, dtype = config.folder, getattr(torch, config.dtype)
    files = model_fingerprint(config)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    with _loading_errors(f"pipeline.path={str(folder)!r}: not a complete diffusers pipeline"):
        parts = dict(_load_models(folder, dtype))
        pipeline = DiffusionPipeline.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, **parts
        )
    architecture(pipeline).prepare(pipeline)
    if config.lora:
        _load_adapters(pipeline, config.lora)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            check_weights(part, f"pipeline.path={str(folder)!r}: {name}")
    pipeline.set_progress_bar_config(disable=True)
    if device == "cpu":
        arrange(pipeline.vae, *experts(pipeline).values())
    pipeline = freeze(pipeline.to(device))
    remember(pipeline, files)
    return pipeline


def freeze(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Sets all modules of a pipeline to eval mode, without gradients."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    return pipeline


def check_weights(module: nn.Module, where: str) -> None:
    """Raises InputError for a parameter or buffer with NaN or infinite values. where: begins the message."""
    for name, values in (*module.named_parameters(), *module.named_buffers()):
        if values.is_floating_point() and not values.isfinite().all():
            raise InputError(f"{where}: {name} has NaN or infinite values; download or train the weights again")


def _load_models(folder: Path, dtype: torch.dtype) -> Iterator[tuple[str, nn.Module]]:
    """The models among the parts of a pipeline, each loaded with a report of what did not fit."""
    for name, entry in json.loads((folder / MODEL_INDEX).read_text()).items():
        if not isinstance(entry, list) or len(entry) != 2 or None in entry:
            continue
        if not (folder / name).is_dir():
            raise InputError(f"pipeline.path={str(folder)!r}: not a complete diffusers pipeline ({name}/ is missing)")
        kind = simple_get_class_obj(*entry)
        if isinstance(kind, type) and issubclass(kind, SchedulerMixin):
            about = json.loads((folder / name / SCHEDULER_CONFIG_NAME).read_text())
            if "_class_name" not in about:
                raise InputError(
                    f"pipeline.path={str(folder)!r}: {name}/{SCHEDULER_CONFIG_NAME} is none of a scheduler"
                )
        if isinstance(kind, type) and issubclass(kind, ModelMixin | PreTrainedModel):
            yield name, _load_model(kind, folder / name, dtype, f"pipeline.path={str(folder)!r}: {name}")


def load_part(kind: type[Part], folder: Path, setting: str) -> Part:
    """Loads one model of a diffusers folder in float32. kind: its class. folder: its own. setting: begins a message.

    Raises InputError as `load_pipeline` does.
    """
    with _loading_errors(f"{setting}: {str(folder)!r} is no folder of a {kind.__name__}"):
        part = _load_model(kind, folder, torch.float32, f"{setting}: {folder.name}")
    check_weights(part, f"{setting}: {folder.name}")
    return part


def _load_model(kind: type[Part], folder: Path, dtype: torch.dtype, where: str) -> Part:
    given: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    if issubclass(kind, PreTrainedModel):
        given["ignore_mismatched_sizes"] = True  # they are in the report, instead of an error without names
    with _without_reports():
        part, report = cast(Any, kind).from_pretrained(folder, dtype=dtype, **given)
    _check_report(report, where)
    return part


@contextmanager
def _without_reports() -> Iterator[None]:
    """Keeps transformers and diffusers from printing what did not fit, in the block: `_check_report` tells it."""

    def other(record: logging.LogRecord) -> bool:
        return not any(words in record.getMessage() for words in REPORTS)

    loggers = [logging.getLogger(f"{library}.modeling_utils") for library in ("transformers", "diffusers.models")]
    for logger in loggers:
        logger.addFilter(other)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(other)


def _check_report(report: dict[str, Any], where: str) -> None:
    """Raises InputError unless every tensor of the files, and no other, has become one of the model."""
    wrong = {
        "missing_keys": "are not in its files",
        "unexpected_keys": "are in its files but not in the model of its configuration",
        "mismatched_keys": "have other shapes in its files than its configuration says",
        "error_msgs": "",
    }
    for kind, meaning in wrong.items():
        names = (entry[0] if isinstance(entry, tuple) else entry for entry in report.get(kind) or ())  # with two shapes
        if found := sorted(map(str, names)):
            raise InputError(f"{where}: {_some(found)} {meaning}; download or save the model again")


def _load_adapters(pipeline: DiffusionPipeline, path: str) -> None:
    """Loads LoRA adapters. Raises InputError unless every tensor of the file fits a layer of the transformer."""
    given: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    with _loading_errors(f"pipeline.lora={path!r}: expected adapters of this model"):
        wanted = pipeline.lora_state_dict(path, **given)
        pipeline.load_lora_weights(path, **given)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    there = {
        f"{name}.{key}"
        for name, part in pipeline.components.items()
        if getattr(part, "peft_config", None)
        for key in get_peft_model_state_dict(part, adapter_name=next(iter(part.peft_config)))
    }
    lost = sorted(key for key in wanted if not key.endswith(".alpha") and key not in there)
    if lost or not there:
        raise InputError(
            f"pipeline.lora={path!r}: {_some(lost or sorted(wanted))} fit no layer of {type(pipeline).__name__}; "
            "expected adapters of this model"
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more tensors" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


@contextmanager
def _loading_errors(message: str) -> Iterator[None]:
    """Raises InputError, with the reason in brackets, in place of the errors of diffusers and transformers."""
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what they raise for damaged files is of many classes
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]
        raise InputError(f"{message} ({reason})") from error
