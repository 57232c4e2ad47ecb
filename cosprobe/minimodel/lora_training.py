"""LoRA adapters for a frozen video transformer, trained with the same flow matching as the mini model.

Low-rank updates of linear layers (Hu et al., arXiv 2106.09685), implemented by `peft`. The files can be loaded with
`load_lora_weights` of diffusers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict

from cosprobe.config import AdapterConfig
from cosprobe.errors import InputError
from cosprobe.files import make_folder, writable
from cosprobe.minimodel.encoding import embed, encode_clips
from cosprobe.minimodel.flow_matching import FlowMatching
from cosprobe.minimodel.recipe import fit_to, training_sets
from cosprobe.tasks import Task


def train_adapter(
    model: Any, config: AdapterConfig, tasks: Mapping[str, Task], folder: Path, precision: str = "bf16-mixed"
) -> Path:
    """Trains adapters of `model`, a loaded Wan image-to-video pipeline. Returns the folder of the adapter.

    Can be resumed like the training of the mini model. Raises InputError for a pipeline whose image condition differs
    from that of Wan, or when no layer has one of the names in `config.layers`.
    """
    transformer, vae = model.transformer, model.vae
    condition = transformer.config.in_channels - transformer.config.out_channels
    expected = vae.config.get("z_dim", 0) + vae.config.get("scale_factor_temporal", 0)
    if condition != expected or not expected or transformer.config.get("image_dim"):
        raise InputError(
            f"{type(model).__name__}: expected an image-to-video pipeline whose transformer gets the encoded first "
            "frame as its only image condition, such as Wan 2.2 I2V or the model in the package"
        )
    sets = training_sets(config, tasks)
    prompts = [*sorted({p.prompt for pairs in sets.values() for _, problems in pairs for p in problems}), ""]
    table = embed(prompts, model.tokenizer, model.text_encoder)
    latents = folder / "latents"
    make_folder(latents)
    clips = {n: encode_clips(vae, sets[n], n, latents, prompts, table) for n in config.lengths}

    torch.manual_seed(config.seed)
    transformer.requires_grad_(False)
    try:
        transformer.add_adapter(LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=list(config.layers)))
    except ValueError as error:
        raise InputError(
            f"experiment.layers={config.layers}: no layer of the transformer has one of these names"
        ) from error
    flow = FlowMatching(transformer, clips, config.flow, config.seed)
    fit_to(flow, folder / "flow", config.flow.steps, precision, 100, None)

    part, done = folder / "adapter.part", folder / "adapter"
    shutil.rmtree(part, ignore_errors=True)
    layers = get_peft_model_state_dict(flow.average.module)
    with writable(done):
        type(model).save_lora_weights(part, transformer_lora_layers=layers)
        (part / "recipe.json").write_text(json.dumps({"settings": asdict(config)}, indent=1))
        shutil.rmtree(done, ignore_errors=True)
        part.rename(done)
    return done
