"""Settings of the video model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from cosprobe.bounds import check_bounds
from cosprobe.errors import InputError
from cosprobe.files import MODEL_INDEX

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class PipelineConfig:
    """The model, and how it samples. Raises InputError for a value out of range."""

    name: str = "mini"
    "Name of these settings."
    path: str = ""
    "A diffusers folder; empty or `mini`: the model in the package."
    lora: str = ""
    "A file or folder of LoRA adapters for diffusers' `load_lora_weights`; empty: none."
    steps: int = 20
    "Number of sampler steps."
    guidance: float = 1.0
    "Scale of guidance; 1: off. Classifier-free guidance, or an input of the model (HunyuanVideo)."
    guidance_2: float = 0.0
    "Scale of guidance of the expert for low noise (Wan2.2-A14B); 0: that of the other one."
    true_cfg: float = 1.0
    "Scale of classifier-free guidance for models with a guidance input (HunyuanVideo); 1: off."
    frames: int = 13
    "Number of video frames, 4k + 1 for Wan."
    prompt_tokens: int = 32
    "Number of tokens that prompts are padded to."
    negative_prompt: str = ""
    "Prompt of the unconditional branch, used with guidance."
    dtype: str = "float32"
    "Type of the weights: float32, bfloat16 or float16."
    batch: int = 16
    "Samples per pipeline call. It changes activations by rounding errors, so a store keeps it."

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"pipeline.dtype={self.dtype!r}: expected one of {', '.join(DTYPES)}")
        check_bounds(
            "pipeline.", self, steps=(1, 10_000), frames=(1, 10_000), prompt_tokens=(1, 10_000), batch=(1, 10_000),
            guidance=(1, 1000), guidance_2=(0, 1000), true_cfg=(1, 1000),
        )  # fmt: skip
        self.path, self.lora = (os.path.expanduser(path) for path in (self.path, self.lora))

    def guided(self, argument: str) -> bool:
        """Whether classifier-free guidance is on, for a family whose pipelines turn it on with `argument`."""
        return {"guidance_scale": self.guidance, "true_cfg_scale": self.true_cfg}[argument] > 1

    @property
    def folder(self) -> Path:
        """The diffusers folder of the model."""
        if self.path in ("", "mini"):  # for a folder of this name write `./mini`
            return Path(str(files("cosprobe") / "weights" / "mini"))
        return Path(self.path)

    def check_folder(self) -> None:
        """Raises InputError when the folder of the model is none of a diffusers pipeline."""
        if not (self.folder / MODEL_INDEX).is_file():
            raise InputError(
                f"pipeline.path={str(self.folder)!r}: expected a diffusers folder with a {MODEL_INDEX}; if the model "
                "was moved, run the same train.py command with its new place, which samples nothing again"
            )

    @property
    def parts(self) -> list[Path]:
        """The folders with the files of the model: its own, and that of the LoRA adapters."""
        return [self.folder, *([Path(self.lora)] if self.lora else [])]
