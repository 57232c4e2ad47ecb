"""The one place that loads a pipeline. What is loaded is complete, fits its configuration and holds finite numbers."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from cosprobe.config import PipelineConfig
from cosprobe.errors import InputError
from cosprobe.files import MODEL_INDEX
from cosprobe.models.architectures import adapter, architecture
from cosprobe.models.cpu_layout import arrange
from cosprobe.models.defaults import TRANSFORMERS, pipeline_class, with_defaults
from cosprobe.models.identity import model_fingerprint, remember
from cosprobe.models.pipelines import block_list, experts
from cosprobe.models.schedulers import SCHEDULERS, matches_flow
from cosprobe.runtime import say

Part = TypeVar("Part", bound=nn.Module)
REPORTS = ("LOAD REPORT", "Some weights of", "connect to the Hub", "kept in float32")  # in reports of LIBRARIES
LOGGERS = ("transformers.modeling_utils", "diffusers.models.modeling_utils", "diffusers.pipelines.pipeline_utils")
LIBRARIES = ("diffusers", "transformers")  # of the parts of a pipeline
DESCRIBING = ["*.json", "*.txt", "*.model"]  # files of a model on the Hub without its weights
NAMED = 3  # names of tensors in a message


def download(config: PipelineConfig, weights: bool = True) -> None:
    """Downloads a model on the Hub that is not on this machine. Does nothing for a model in a folder.

    weights: whether weights are downloaded too, or only the files that describe the model and its tokenizer.
    Raises InputError when there is no such model, or when the Hub cannot be reached.
    """
    if not config.on_hub:
        return
    try:
        with _without_reports():
            revision, variant = config.revision or None, config.variant or None
            where = (
                DiffusionPipeline.download(config.path, revision=revision, variant=variant, use_safetensors=True)
                if weights
                else snapshot_download(config.path, revision=revision, allow_patterns=DESCRIBING)
            )
    except Exception as error:  # errors of the network are of many classes
        raise InputError(
            f"pipeline.path={config.path!r}: there is no such folder, and it is no model on the Hub that was "
            "downloaded or can be reached; check the name, or download it where there is a network and give its folder"
        ) from error
    say(f"model: {config.path} at commit {Path(where).name}")


def load_pipeline(config: PipelineConfig | Path | str | None = None, device: str = "cpu") -> DiffusionPipeline:
    """Loads a diffusers pipeline, frozen and in eval mode. Only safetensors are read.

    config: settings or a folder; default: the model in the package. A model on the Hub is downloaded.
    Raises InputError when the folder is missing or is not a complete pipeline, when a tensor of a model is missing, is
    not one of the model, has another shape than its configuration says or is not finite, when adapters do not fit, and
    for settings that this model or machine does not support.
    """
    config = config if isinstance(config, PipelineConfig) else PipelineConfig(path=str(config or ""))
    download(config)
    config = with_defaults(config)
    folder, files = config.folder, model_fingerprint(config)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    with _loading_errors(f"pipeline.path={str(folder)!r}: not a complete diffusers pipeline"):
        parts = dict(_load_models(folder, config))
        _check_kind(config, parts)
        pipeline = pipeline_class(config).from_pretrained(folder, local_files_only=True, use_safetensors=True, **parts)
    family = architecture(pipeline)
    family.prepare(pipeline)
    _load_both_adapters(pipeline, config)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            check_weights(part, f"pipeline.path={str(folder)!r}: {name}")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = with_scheduler(pipeline.scheduler, config)
    if device == "cpu":
        arrange(pipeline.vae, *experts(pipeline).values())
    freeze(pipeline)
    _speed_up(pipeline, config)
    _place(pipeline, config.offload, device)
    remember(pipeline, files)
    return pipeline


def _check_kind(config: PipelineConfig, parts: Mapping[str, nn.Module]) -> None:
    """Raises InputError when the class of the pipeline that the settings name is for other transformers."""
    name = pipeline_class(config).__name__
    family = adapter(name)
    for part in TRANSFORMERS:
        kind = type(parts[part]).__name__ if part in parts else ""
        if kind and family is not None and kind not in family.transformers:
            raise InputError(
                f"pipeline.kind={config.kind!r}: this folder has a {kind}, expected a "
                f"{' or '.join(family.transformers)}; leave pipeline.kind out, or name a class for this transformer"
            )


def load_scheduler(saved: Mapping[str, Any]) -> SchedulerMixin:
    """The scheduler of a configuration file. Raises InputError for a class that is not known."""
    name = str(saved.get("_class_name"))
    if name not in SCHEDULERS:
        raise InputError(f"scheduler {name} is not known: expected one of {', '.join(SCHEDULERS)}")
    return getattr(diffusers, name).from_config(dict(saved))


def with_scheduler(scheduler: SchedulerMixin, config: PipelineConfig) -> SchedulerMixin:
    """The scheduler that the settings name, with the configuration of the model's own one, and with their shift.

    Raises InputError for a class that is not known, that has no shift, or that is for another kind of model.
    """
    if not config.scheduler and not config.flow_shift:
        return scheduler
    name = config.scheduler or type(scheduler).__name__
    if name not in SCHEDULERS:
        raise InputError(f"pipeline.scheduler={name!r}: expected one of {', '.join(SCHEDULERS)}")
    kind = getattr(diffusers, name)
    flow = matches_flow(scheduler)
    taken, changes = inspect.signature(kind.__init__).parameters, dict[str, Any]()
    if flow and "use_flow_sigmas" in taken:
        changes |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        changes["flow_shift"] = scheduler.config.get("flow_shift", scheduler.config.get("shift"))
    if config.flow_shift:
        shift = next((argument for argument in ("flow_shift", "shift") if argument in taken), None)
        if shift is None:
            raise InputError(f"pipeline.flow_shift={config.flow_shift}: {name} has none; set it to 0")
        changes[shift] = config.flow_shift
    found = kind.from_config(scheduler.config, **changes)
    if matches_flow(found) != flow:
        is_for, model = ("diffusion", "flow matching") if flow else ("flow matching", "diffusion")
        raise InputError(f"pipeline.scheduler={name!r}: is for models of {is_for}, and this one is of {model}")
    return found


def _speed_up(pipeline: DiffusionPipeline, config: PipelineConfig) -> None:
    """Sets the attention backend, and compiles what blocks compute. Hooks on blocks run outside of compiled code."""
    for model in experts(pipeline).values():
        if config.attention:
            with _loading_errors(f"pipeline.attention={config.attention!r}: cannot be used here"):
                model.set_attention_backend(config.attention)
        if config.compile:
            for block in block_list(pipeline, model):
                block.forward = torch.compile(block.forward)


def _place(pipeline: DiffusionPipeline, offload: str, device: str) -> None:
    """Moves a pipeline to a device, or leaves it on the CPU with hooks that move parts while they run."""
    if offload != "none" and torch.device(device).type == "cpu":
        raise InputError(f"pipeline.offload={offload}: there is no GPU in use to take parts from; set it to none")
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "group":
        names = {name for name in TRANSFORMERS if getattr(pipeline, name, None) is not None}
        for name in names:
            getattr(pipeline, name).enable_group_offload(
                torch.device(device), torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
            )
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module) and name not in names:
                part.to(device)
    else:
        pipeline.to(device)


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


def outline(config: PipelineConfig) -> DiffusionPipeline:
    """The pipeline without its weights, from configuration files alone: its models are on the meta device.

    A tokenizer whose files are not there is None, and so is every other part. Raises InputError for a folder whose
    configuration files are incomplete.
    """
    folder, parts = config.folder, dict[str, Any]()
    with _loading_errors(f"pipeline.path={str(folder)!r}: its configuration files are incomplete"):
        for name, kind in _parts(folder):
            parts[name], dtype = None, (config.vae_dtype if name == "vae" else "") or config.dtype
            if issubclass(kind, SchedulerMixin):
                parts[name] = cast(Any, kind).from_pretrained(folder / name, local_files_only=True)
            elif issubclass(kind, ModelMixin | PreTrainedModel):
                with torch.device("meta"), _without_reports():
                    parts[name] = _of_configuration(kind, folder / name).to(getattr(torch, dtype))
            elif issubclass(kind, PreTrainedTokenizerBase):
                with suppress(OSError, ValueError):
                    parts[name] = cast(Any, kind).from_pretrained(folder / name, local_files_only=True)
        _check_kind(config, parts)
        pipeline = pipeline_class(config)(**parts)
    pipeline.scheduler = with_scheduler(pipeline.scheduler, config)
    return pipeline


def _of_configuration(kind: Any, folder: Path) -> nn.Module:
    """A model with new weights, of the shapes in its configuration file."""
    if issubclass(kind, PreTrainedModel):
        return kind(kind.config_class.from_pretrained(folder, local_files_only=True))
    return kind.from_config(kind.load_config(folder, local_files_only=True))


def _load_models(folder: Path, config: PipelineConfig) -> Iterator[tuple[str, nn.Module]]:
    """The models among the parts of a pipeline, each loaded with a report of what did not fit."""
    of_vae = config.vae_dtype or config.dtype
    for name, kind in _parts(folder):
        if issubclass(kind, ModelMixin | PreTrainedModel):
            dtype = getattr(torch, of_vae if name == "vae" else config.dtype)
            where = f"pipeline.path={str(folder)!r}: {name}"
            yield name, _load_model(kind, folder / name, dtype, where, config.variant or None)


def _parts(folder: Path) -> Iterator[tuple[str, type]]:
    """The parts of a pipeline and their classes. Raises InputError for a part without a folder, and for a class that is
    of another library than those of LIBRARIES or, of a scheduler, not in its configuration."""
    for name, entry in json.loads((folder / MODEL_INDEX).read_text()).items():
        if not isinstance(entry, list) or len(entry) != 2 or None in entry:
            continue
        if not (folder / name).is_dir():
            raise InputError(f"pipeline.path={str(folder)!r}: not a complete diffusers pipeline ({name}/ is missing)")
        if entry[0] not in LIBRARIES and not hasattr(diffusers.pipelines, entry[0]):
            raise InputError(
                f"pipeline.path={str(folder)!r}: {name} is of the library {entry[0]!r}; expected one of "
                f"{', '.join(LIBRARIES)}: nothing else is imported"
            )
        kind = simple_get_class_obj(*entry)
        if isinstance(kind, type) and issubclass(kind, SchedulerMixin):
            about = json.loads((folder / name / SCHEDULER_CONFIG_NAME).read_text())
            if "_class_name" not in about:
                raise InputError(
                    f"pipeline.path={str(folder)!r}: {name}/{SCHEDULER_CONFIG_NAME} is none of a scheduler"
                )
        if isinstance(kind, type):
            yield name, kind


def load_part(kind: type[Part], folder: Path, setting: str) -> Part:
    """Loads one model of a diffusers folder in float32. kind: its class. folder: its own. setting: begins a message.

    Raises InputError as `load_pipeline` does.
    """
    with _loading_errors(f"{setting}: {str(folder)!r} is no folder of a {kind.__name__}"):
        part = _load_model(kind, folder, torch.float32, f"{setting}: {folder.name}")
    check_weights(part, f"{setting}: {folder.name}")
    return part


def _load_model(kind: type[Part], folder: Path, dtype: torch.dtype, where: str, variant: str | None = None) -> Part:
    given: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    if variant and any(folder.glob(f"*.{variant}*.safetensors")):  # not every part has it
        given["variant"] = variant
    if issubclass(kind, PreTrainedModel):
        given["ignore_mismatched_sizes"] = True  # they are in the report, instead of an error without names
    with _without_reports():
        part, report = cast(Any, kind).from_pretrained(folder, dtype=dtype, **given)
    _check_report(report, where)
    return part


@contextmanager
def _without_reports() -> Iterator[None]:
    """Keeps transformers and diffusers from printing, in the block, what the error of this package tells."""

    def other(record: logging.LogRecord) -> bool:
        return not any(words in record.getMessage() for words in REPORTS)

    loggers = [logging.getLogger(name) for name in LOGGERS]
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


def _load_both_adapters(pipeline: DiffusionPipeline, config: PipelineConfig) -> None:
    """Loads the LoRA adapters that the settings name, those of each expert into its own transformer."""
    names = [name for name in TRANSFORMERS if getattr(pipeline, name, None) is not None]
    paths = {"transformer": config.lora, "transformer_2": config.lora_2}
    if config.lora_2 and "transformer_2" not in names:
        raise InputError(f"pipeline.lora_2={config.lora_2!r}: this model has one transformer; set pipeline.lora alone")
    if config.lora and len(names) == 2 and not config.lora_2:
        raise InputError(
            "pipeline.lora_2: this model has two transformers, and pipeline.lora is for the one for high noise; give "
            "the adapters for low noise too"
        )
    for name in names:
        if paths[name]:
            _load_adapters(pipeline, name, paths[name])


def _load_adapters(pipeline: DiffusionPipeline, name: str, path: str) -> None:
    """Loads LoRA adapters into the transformer `name`. Raises InputError unless every tensor of the file fits a layer
    of it."""
    setting = "pipeline.lora_2" if name == "transformer_2" else "pipeline.lora"
    with _loading_errors(f"{setting}={path!r}: expected adapters of this model"):
        given = _adapter_tensors(Path(path), setting)
        wanted = pipeline.lora_state_dict(dict(given))
        wanted = wanted[0] if isinstance(wanted, tuple) else wanted
        more = {"load_into_transformer_2": True} if name == "transformer_2" else {}
        pipeline.load_lora_weights(dict(given), adapter_name=name, **more)
    part = getattr(pipeline, name)
    adapted = name in getattr(part, "peft_config", {})
    there = get_peft_model_state_dict(part, adapter_name=name) if adapted else {}
    lost = [key for key in wanted if not key.endswith(".alpha") and key.removeprefix("transformer.") not in there]
    if lost or not there:
        raise InputError(
            f"{setting}={path!r}: {_some(sorted(lost or wanted))} fit no layer of the {name} of "
            f"{type(pipeline).__name__}; expected adapters of this model"
        )


def _adapter_tensors(path: Path, setting: str) -> dict[str, Tensor]:
    """The tensors of a file of adapters, or of the only such file in a folder, with names that diffusers knows.

    DiffSynth names them `blocks.N.LAYER.lora_A.default.weight`.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(files) != 1:
        raise InputError(
            f"{setting}={str(path)!r}: has {len(files)} safetensors files; expected the path of one of them"
        )
    tensors = load_file(files[0])
    if not any(name.startswith("blocks.") for name in tensors):
        return tensors
    return {f"diffusion_model.{name.replace('.default.', '.')}": value for name, value in tensors.items()}


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
