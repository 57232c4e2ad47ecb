"""The recipe of the model that ships in the package: a complete `WanImageToVideoPipeline`, trained here.

Stages, each resumed where a kill left it: autoencoder, encoding of the training clips (once), flow matching,
export. Every part is a stock diffusers or transformers class; only the sizes are small.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from einops import rearrange, repeat
from jaxtyping import Float
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from cosprobe.autoencoding import AutoencoderConfig, AutoencoderTraining, to_model_range
from cosprobe.flowmatching import FlowConfig, FlowMatching, LatentClips
from cosprobe.tasks import Problem, Task

TEXT_TOKENS = 32  # every prompt is padded to this many tokens, in training and in sampling
TEXT_WIDTH = 64
BATCH = 16  # clips encoded at a time


@dataclass
class MiniConfig:
    """Everything that shapes the weights. clips: size of the training set; choice_share: how much of it is
    choice problems, each drawn once with a random reachable exit; choice_repeats: how often each of them is seen
    while a one-exit problem is seen once."""

    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    clips: int = 20_480
    choice_share: float = 0.35
    choice_repeats: int = 2
    layers: int = 8
    heads: int = 4
    head_dim: int = 32
    ffn: int = 384
    seed: int = 0


def train_mini(config: MiniConfig, task: Task, folder: Path, precision: str = "bf16-mixed", every: int = 100) -> Path:
    """Trains and exports the model; returns the pipeline's folder. Finished stages are not repeated, and a stage
    goes on from its newest checkpoint, written `every` so many steps."""
    folder.mkdir(parents=True, exist_ok=True)
    autoencoder = AutoencoderTraining(config.autoencoder, task, task.problems("model", 8000), config.seed)
    with _timed(folder, "autoencoder"):
        _fit(autoencoder, folder / "autoencoder", config.autoencoder.steps, precision, every, clip=1.0)
    vae = autoencoder.vae.half().float().eval()  # stored in half precision: train on what will ship

    tokenizer, text_encoder = build_text([_prompt(task), ""], config.seed)
    with _timed(folder, "encoding"):
        encoded = encode_clips(config, task, vae, folder / "latents")
    prompt, empty = embed([_prompt(task), ""], tokenizer, text_encoder)
    repeats = torch.ones(config.clips, dtype=torch.int64)
    repeats[config.clips - round(config.clips * config.choice_share) :] = config.choice_repeats
    clips = LatentClips(**encoded, prompt=prompt.expand(config.clips, -1, -1), empty=empty, repeats=repeats)

    torch.manual_seed(config.seed)
    flow = FlowMatching(build_transformer(config, vae), clips, config.flow, config.seed)
    with _timed(folder, "flow matching"):
        _fit(flow, folder / "flow", config.flow.steps, precision, every, clip=None)
    recipe = {"settings": asdict(config), "task": asdict(cast(Any, task)), "minutes": _minutes(folder)}
    return export(flow.average.module, vae, tokenizer, text_encoder, config.flow.shift, recipe, folder / "pipeline")


def build_transformer(config: MiniConfig, vae: AutoencoderKLWan) -> WanTransformer3DModel:
    """Input: noisy latent, first-frame mask (one channel per frame of a chunk), encoded first frame."""
    z = vae.config.z_dim
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        in_channels=2 * z + vae.config.scale_factor_temporal,
        out_channels=z,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=config.ffn,
        num_layers=config.layers,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )


def build_text(prompts: list[str], seed: int) -> tuple[PreTrainedTokenizerFast, UMT5EncoderModel]:
    """A word-level tokenizer over the words of `prompts` and a small UMT5 encoder with fixed random weights:
    enough to tell prompts apart, and the flow-matching model learns to read it."""
    words = sorted({word for prompt in prompts for word in prompt.lower().split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = Lowercase(), Whitespace()
    core.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TEXT_TOKENS
    )
    torch.manual_seed(seed)
    size = UMT5Config(
        vocab_size=len(vocabulary), d_model=TEXT_WIDTH, d_kv=16, d_ff=128, num_layers=1, num_heads=4, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    return tokenizer, UMT5EncoderModel(size).eval().requires_grad_(False)


def assemble(
    transformer: WanTransformer3DModel,
    vae: AutoencoderKLWan,
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: UMT5EncoderModel,
    shift: float,
) -> WanImageToVideoPipeline:
    return WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        transformer=transformer,
    )


@torch.no_grad()
def embed(prompts: list[str], tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel) -> Tensor:
    """[prompt, token, width], as the Wan pipelines embed: padding tokens are zero vectors."""
    text = tokenizer(prompts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
    hidden = encoder(text.input_ids, text.attention_mask).last_hidden_state
    return hidden * text.attention_mask[..., None]


def encode_condition(
    vae: AutoencoderKLWan, images: Float[Tensor, "clip 3 height width"], frames: int
) -> Float[Tensor, "clip condition latent_frame latent_height latent_width"]:
    """The Wan image condition: a mask that marks the given frame, and the image followed by grey frames,
    encoded and normalised. Equal to what the pipeline's `prepare_latents` makes of one image (tested)."""
    grey = images.new_zeros(len(images), 3, frames - 1, *images.shape[2:])
    latent = normalise(vae, vae.encode(torch.cat([images[:, :, None], grey], dim=2)).latent_dist.mode())
    mask = latent.new_zeros(len(images), vae.config.scale_factor_temporal, *latent.shape[2:])
    mask[:, :, 0] = 1
    return torch.cat([mask, latent], dim=1)


def normalise(vae: AutoencoderKLWan, latent: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return (latent - mean) / std


@torch.no_grad()
def encode_clips(config: MiniConfig, task: Task, vae: AutoencoderKLWan, folder: Path) -> dict[str, Tensor]:
    """Encodes the training set once, in shards; also measures the latents' mean and deviation per channel."""
    folder.mkdir(parents=True, exist_ok=True)
    choice = round(config.clips * config.choice_share)
    one_exit, many = task.kinds
    problems = task.problems("model", config.clips - choice, one_exit) + task.problems("model", choice, many)
    scale = folder / "scale.json"
    if not scale.exists():
        sample = np.random.default_rng(config.seed).permutation(len(problems))[:512]
        batches = [sample[i : i + BATCH] for i in range(0, len(sample), BATCH)]
        latents = [_latent(vae, task, [problems[i] for i in part]) for part in batches]
        pixels = torch.cat(latents)
        values = {
            "latents_mean": pixels.mean(dim=(0, 2, 3, 4)).tolist(),
            "latents_std": pixels.std(dim=(0, 2, 3, 4)).tolist(),
        }
        scale.write_text(json.dumps(values))
    vae.register_to_config(**json.loads(scale.read_text()))

    shards = []
    for begin in range(0, len(problems), 1024):
        shard = folder / f"{begin:06d}.safetensors"
        if not shard.exists():
            parts: dict[str, list[Tensor]] = {"latent": [], "condition": [], "active": []}
            for first in range(begin, min(begin + 1024, len(problems)), BATCH):
                batch = problems[first : min(first + BATCH, begin + 1024)]
                latent = normalise(vae, _latent(vae, task, batch))
                images = to_model_range(np.stack([task.image(p)[None] for p in batch]))[:, :, 0]
                parts["latent"].append(latent.half())
                parts["condition"].append(encode_condition(vae, images, task.frames).half())
                parts["active"].append(_active_tokens(task, batch, latent.shape[2:]))
            save_file({k: torch.cat(v) for k, v in parts.items()}, shard.with_suffix(".part"))
            shard.with_suffix(".part").rename(shard)
        shards.append(load_file(shard))
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


def _latent(vae: AutoencoderKLWan, task: Task, problems: list[Problem]) -> Tensor:
    return vae.encode(to_model_range(np.stack([task.video(p) for p in problems]))).latent_dist.mode()


def _active_tokens(task: Task, problems: list[Problem], shape: torch.Size) -> Tensor:
    """Latent cells that hold a pixel a video may change: [clip, frame, height, width], 0 or 1."""
    frames, height, width = shape
    pixels = np.stack([task.workspace(p) for p in problems])
    cells = rearrange(pixels, "b (h y) (w x) -> b h w (y x)", h=height, w=width).any(-1)
    return repeat(torch.from_numpy(cells.astype(np.uint8)), "b h w -> b f h w", f=frames).contiguous()


def _prompt(task: Task) -> str:
    return task.problems("model", 1)[0].prompt


def _fit(module: L.LightningModule, folder: Path, steps: int, precision: str, every: int, clip: float | None) -> None:
    """Runs to `steps`, from the newest checkpoint when there is one."""
    last = folder / "last.ckpt"
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="auto",
        devices=1,
        precision=precision,
        gradient_clip_val=clip,
        logger=TensorBoardLogger(folder, name=None, version="tensorboard"),
        callbacks=[
            ModelCheckpoint(
                folder, save_last=True, save_top_k=0, every_n_train_steps=every, enable_version_counter=False
            ),
            RichProgressBar(),
        ],
        log_every_n_steps=20,
        enable_model_summary=False,
    )  # fmt: skip
    if last.exists():
        saved = torch.load(last, weights_only=True, map_location="cpu")
        if saved["global_step"] >= steps:
            module.load_state_dict(saved["state_dict"])
            return
    trainer.fit(module, ckpt_path=last if last.exists() else None, weights_only=True)
    trainer.save_checkpoint(last)


@contextmanager
def _timed(folder: Path, stage: str) -> Iterator[None]:
    """Adds the wall time spent inside to the stage's minutes, over all the runs it took."""
    begin = time.monotonic()
    try:
        yield
    finally:
        minutes = _minutes(folder)
        minutes[stage] = round(minutes.get(stage, 0.0) + (time.monotonic() - begin) / 60, 2)
        (folder / "minutes.json").write_text(json.dumps(minutes))


def _minutes(folder: Path) -> dict[str, float]:
    path = folder / "minutes.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def export(
    transformer: WanTransformer3DModel,
    vae: AutoencoderKLWan,
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: UMT5EncoderModel,
    shift: float,
    recipe: dict[str, Any],
    folder: Path,
) -> Path:
    """Writes a diffusers folder, the two large parts in half precision; loads back in fp32 by default."""
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    pipeline = assemble(transformer.half(), vae.half(), tokenizer, text_encoder, shift)
    pipeline.save_pretrained(part, safe_serialization=True)
    (part / "recipe.json").write_text(json.dumps(recipe, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    transformer.float(), vae.float()
    return folder
