"""Settings of the video model."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from types import NoneType
from typing import Any

from cosprobe.bounds import check_bounds
from cosprobe.errors import InputError
from cosprobe.files import MODEL_INDEX

DTYPES = ("float32", "bfloat16", "float16")
OFFLOADS = ("none", "model", "group")
SAMPLING = "sampling.json"  # in the folder of a model: the values of settings that it was made for
# settings that name the model, or say where its weights wait: what is sampled depends on the content of the model alone
NAMING = ("name", "path", "revision", "variant", "lora", "lora_2", "offload")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class PipelineConfig:
    """The model, and how it samples. Raises InputError for a value out of range.

    A number that is 0 and a name that is empty stand for the default of the model; see `models.with_defaults`.
    """

    name: str = "mini"
    "Name of these settings, for messages."
    path: str = ""
    "A diffusers folder, or a model on the Hugging Face Hub as ORG/NAME; empty or `mini`: the model in the package."
    kind: str = ""
    "Class of the pipeline in place of that in the model's folder, such as WanImageToVideoPipeline for Wan2.2-TI2V-5B."
    revision: str = ""
    "Commit, branch or tag of a model on the Hub; empty: its newest commit."
    variant: str = ""
    "Ending of the weight files, such as `fp16` for files named `NAME.fp16.safetensors`; empty: none."
    lora: str = ""
    "A file or folder of LoRA adapters; of two transformers (Wan2.2-A14B), those of the first, for high noise."
    lora_2: str = ""
    "LoRA adapters of the second transformer, for low noise (Wan2.2-A14B); empty: none."
    steps: int = 0
    "Number of sampler steps; 0: the default of the model."
    guidance: float = 0.0
    "Scale of classifier-free guidance; 1: off, 0: the default of the model. HunyuanVideo: an input of its transformer."
    guidance_2: float = 0.0
    "The same for the second transformer, for low noise (Wan2.2-A14B); 0: as `guidance`."
    true_cfg: float = 1.0
    "HunyuanVideo only: scale of classifier-free guidance, besides `guidance`; 1: off."
    frames: int = 0
    "Number of video frames; 0: the default of the model, for the model in the package that of the task."
    height: int = 0
    "Height of the video in pixels; if larger than the image, the image is in the middle of it; 0: that of the image."
    width: int = 0
    "Width of the video in pixels; see `height`."
    prompt_tokens: int = 0
    "Number of tokens that prompts are padded to; a longer prompt is an error; 0: the default of the model."
    negative_prompt: str = ""
    "Negative prompt, used when guidance is on; empty: the empty prompt."
    scheduler: str = ""
    "Class of the scheduler, such as UniPCMultistepScheduler; empty: that of the model."
    flow_shift: float = 0.0
    "Shift of the noise levels, for flow matching; 0: that of the model's scheduler."
    dtype: str = ""
    "Type of the weights: float32, bfloat16 or float16; empty: that of the files of the transformer."
    vae_dtype: str = ""
    "Type of the weights of the autoencoder; empty: as `dtype`."
    attention: str = ""
    "Attention backend of diffusers, such as native, flash or sage; empty: its default."
    offload: str = "none"
    "Saves GPU memory: none, model (parts of the pipeline wait in CPU memory) or group (blocks too, slower)."
    compile: bool = False
    "Compile the blocks of the transformer with torch.compile."
    batch: int = 16
    "Samples per pipeline call; fewer need less memory. It changes activations by rounding errors, so a store keeps it."

    def __post_init__(self) -> None:
        for name in ("dtype", "vae_dtype"):
            if getattr(self, name) not in ("", *DTYPES):
                raise InputError(f"pipeline.{name}={getattr(self, name)!r}: expected one of {', '.join(DTYPES)}")
        if self.offload not in OFFLOADS:
            raise InputError(f"pipeline.offload={self.offload!r}: expected one of {', '.join(OFFLOADS)}")
        check_bounds(
            "pipeline.", self, steps=(0, 10_000), frames=(0, 10_000), prompt_tokens=(0, 10_000), batch=(1, 10_000),
            guidance=(0, 1000), guidance_2=(0, 1000), true_cfg=(1, 1000), flow_shift=(0, 1000), height=(0, 10_000),
            width=(0, 10_000),
        )  # fmt: skip
        if 0 < self.guidance < 1:
            raise InputError(f"pipeline.guidance={self.guidance}: expected 1 (off) or more, or 0")
        for name in ("path", "lora", "lora_2"):
            setattr(self, name, os.path.expanduser(getattr(self, name)))

    @property
    def shaping(self) -> dict[str, Any]:
        """The settings that shape what is sampled, beside the content of the model."""
        return {name: value for name, value in vars(self).items() if name not in NAMING}

    def guided(self, argument: str) -> bool:
        """Whether classifier-free guidance is on, for a family whose pipelines turn it on with `argument`."""
        return {"guidance_scale": self.guidance, "true_cfg_scale": self.true_cfg}[argument] > 1

    @property
    def on_hub(self) -> bool:
        """Whether `path` names a model on the Hub: with exactly one slash, and no file or folder of this name."""
        return (
            HUB_NAME.fullmatch(self.path) is not None and not self.path.startswith(".") and not Path(self.path).exists()
        )

    @property
    def folder(self) -> Path:
        """The diffusers folder of the model. That of a model on the Hub is its copy on this machine.

        Raises InputError for a model on the Hub that was not downloaded; see `models.download`.
        """
        if self.path in ("", "mini"):  # for a folder of this name write `./mini`
            return Path(str(files("cosprobe") / "weights" / "mini"))
        if self.on_hub:
            from huggingface_hub import try_to_load_from_cache  # slow to import, and rarely needed

            found = try_to_load_from_cache(self.path, MODEL_INDEX, revision=self.revision or None)
            if not isinstance(found, str):
                raise InputError(
                    f"pipeline.path={self.path!r}: there is no such folder, and no downloaded model of this name; if "
                    "the model was moved, run the train.py command of the run with its new place"
                )
            return Path(found).parent
        return Path(self.path)

    def check_folder(self) -> None:
        """Raises InputError when the folder of the model is none of a diffusers pipeline."""
        if not self.on_hub and not (self.folder / MODEL_INDEX).is_file():
            raise InputError(
                f"pipeline.path={str(self.folder)!r}: expected a diffusers folder with a {MODEL_INDEX}; if the model "
                "was moved, run the same train.py command with its new place, which samples nothing again"
            )

    @property
    def parts(self) -> list[Path]:
        """The folders with the files of the model: its own, and those of LoRA adapters."""
        return [self.folder, *(Path(path) for path in (self.lora, self.lora_2) if path)]

    def with_own_defaults(self, frames: int) -> PipelineConfig:
        """The settings with the values in the `sampling.json` of the model, if it has one, in place of what is 0 or
        empty. frames: of a video of the task; such a model draws as many."""
        own = {} if self.on_hub else own_defaults(self.folder)
        if own:
            own["frames"] = frames
        return replace(self, **{name: value for name, value in own.items() if not getattr(self, name)})


def own_defaults(folder: Path) -> dict[str, Any]:
    """The values in the `sampling.json` in the folder of a model; empty if there is none.

    Raises InputError for a file with anything else.
    """
    path = folder / SAMPLING
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
        kinds = {entry.name: type(entry.default) for entry in fields(PipelineConfig)}
        wrong = [name for name, value in found.items() if not isinstance(value, kinds.get(name, NoneType))]
    except (ValueError, AttributeError):
        wrong = ["its content"]
    if wrong:
        raise InputError(
            f"{str(path)!r}: {wrong[0]} is no setting of a pipeline, or of another type; expected some of "
            f"{', '.join(entry.name for entry in fields(PipelineConfig))}"
        )
    return found
