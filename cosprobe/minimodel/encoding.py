"""Encodes clips and prompts for training once. Training reads the latents from disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from einops import rearrange, repeat
from jaxtyping import Float
from rich.progress import track
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from cosprobe.checked import read_tensors, write_tensors
from cosprobe.files import read_json, write_json
from cosprobe.minimodel.autoencoding import IDLE, Family, to_model_range, video_of
from cosprobe.minimodel.flow_matching import LatentClips
from cosprobe.tasks import FAMILIES, Problem, Task

TEXT_TOKENS = 32  # every prompt is padded to this many tokens, in training and in sampling
TEXT_WIDTH = 64
NEIGHBOURS = (-1, 1, -2, 2)  # each head of the text encoder attends to the word at this offset
SHARP = 8.0  # attention bias of that word: its weight is e^8 times that of any other word
BATCH = 16  # clips encoded at a time
SHARD = 1024  # clips per file
WORDS_FROM = 500  # number of problems per task whose prompts define the vocabulary


def build_text(prompts: Sequence[str], seed: int) -> tuple[PreTrainedTokenizerFast, UMT5EncoderModel]:
    """Builds a word-level tokenizer over the words of `prompts`, and a small UMT5 encoder with fixed random weights.

    The attention biases of the encoder are not random: each head attends to one neighbour of a word (`NEIGHBOURS`).
    With random biases, heads would attend to all words about equally, and "green box, blue cross" would have nearly the
    same encoding as "blue box, green cross".
    """
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
        vocab_size=len(vocabulary), d_model=TEXT_WIDTH, d_kv=16, d_ff=128, num_layers=1, num_heads=len(NEIGHBOURS),
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    encoder = UMT5EncoderModel(size).eval().requires_grad_(False)
    attention = encoder.encoder.block[0].layer[0].SelfAttention
    for head, offset in enumerate(NEIGHBOURS):  # first half of the buckets: words before, second half: words after
        bucket = abs(offset) + (size.relative_attention_num_buckets // 2 if offset > 0 else 0)
        attention.relative_attention_bias.weight[bucket, head] = SHARP
    return tokenizer, encoder


def every_prompt() -> list[str]:
    """Prompts of all tasks, also of those the model is not trained on, so that they can be learned later."""
    return sorted({p.prompt for family in FAMILIES.values() for p in family().build().problems("model", WORDS_FROM)})


@torch.no_grad()
def embed(prompts: Sequence[str], tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel) -> Tensor:
    """Embeddings [prompt, token, width] as in the Wan pipelines: padding tokens are zero vectors."""
    text = tokenizer(list(prompts), padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
    hidden = encoder(text.input_ids, text.attention_mask).last_hidden_state
    return hidden * text.attention_mask[..., None]


def encode_condition(
    vae: AutoencoderKLWan, images: Float[Tensor, "clip 3 height width"], frames: int
) -> Float[Tensor, "clip condition latent_frame latent_height latent_width"]:
    """The image condition of Wan: a mask that marks the given frame, and the encoded, normalised image with grey
    frames.

    Equal to the result of the pipeline's `prepare_latents` for one image (tested).
    """
    grey = images.new_zeros(len(images), 3, frames - 1, *images.shape[2:])
    latent = normalise(vae, vae.encode(torch.cat([images[:, :, None], grey], dim=2)).latent_dist.mode())
    mask = latent.new_zeros(len(images), vae.config.scale_factor_temporal, *latent.shape[2:])
    mask[:, :, 0] = 1
    return torch.cat([mask, latent], dim=1)


def normalise(vae: AutoencoderKLWan, latent: Tensor) -> Tensor:
    """Latents standardised by the mean and deviation in the config of the autoencoder."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return (latent - mean) / std


def measure_scale(vae: AutoencoderKLWan, families: Sequence[Family], length: int, path: Path) -> None:
    """Measures the mean and standard deviation of each latent channel over 128 clips of every task.

    The values are saved at `path` and registered in the config of the autoencoder. Deviations are clamped to at least
    `IDLE` times the largest one. Otherwise, an unused channel would have the same weight in flow matching as the
    others.
    """
    if not path.exists():
        latents = torch.cat([
            _latent(vae, task, problems[first : first + BATCH], length)
            for task, problems in families for first in range(0, min(128, len(problems)), BATCH)
        ])  # fmt: skip
        deviations = latents.std(dim=(0, 2, 3, 4))
        values = {
            "latents_mean": latents.mean(dim=(0, 2, 3, 4)).tolist(),
            "latents_std": deviations.clamp(min=IDLE * float(deviations.max())).tolist(),
        }
        write_json(path, values)
    vae.register_to_config(**read_json(path, "delete it"))


@torch.no_grad()
def encode_clips(
    vae: AutoencoderKLWan, families: Sequence[Family], length: int, folder: Path, prompts: list[str], table: Tensor
) -> LatentClips:
    """Encodes clips of one length from every task in shards. Shards that are on disk are not encoded again.

    prompts: the texts of `table` [prompt, token, width]; the last one is the empty prompt.
    """
    number = {text: i for i, text in enumerate(prompts)}
    parts: dict[str, list[Tensor]] = {"latent": [], "condition": [], "active": []}
    for task, problems in families:
        shards = range(0, len(problems), SHARD)
        for begin in track(shards, f"encoding {task.name}, {length} frames", disable=len(shards) < 2):
            shard = folder / f"{task.name}-{length:02d}-{begin:06d}.safetensors"
            if not shard.exists():
                write_tensors(shard, _shard(vae, task, problems[begin : begin + SHARD], length), {})
            for name, value in read_tensors(shard)[0].items():
                parts[name].append(value)
    text = torch.tensor([number[p.prompt] for _, problems in families for p in problems])
    return LatentClips(**{name: torch.cat(values) for name, values in parts.items()}, text=text, prompts=table)


def _shard(vae: AutoencoderKLWan, task: Task, problems: Sequence[Problem], length: int) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {"latent": [], "condition": [], "active": []}
    for batch in _batches(problems):
        latent = normalise(vae, _latent(vae, task, batch, length))
        images = to_model_range(np.stack([task.image(p)[None] for p in batch]))[:, :, 0]
        parts["latent"].append(latent.half())
        parts["condition"].append(encode_condition(vae, images, length).half())
        parts["active"].append(_active_tokens(task, batch, latent.shape[2:]))
    return {name: torch.cat(values).contiguous() for name, values in parts.items()}


def _batches(problems: Sequence[Problem]) -> Iterator[Sequence[Problem]]:
    return (problems[first : first + BATCH] for first in range(0, len(problems), BATCH))


@torch.no_grad()
def _latent(vae: AutoencoderKLWan, task: Task, problems: Sequence[Problem], length: int) -> Tensor:
    return vae.encode(to_model_range(np.stack([video_of(task, p, length) for p in problems]))).latent_dist.mode()


def _active_tokens(task: Task, problems: Sequence[Problem], shape: torch.Size) -> Tensor:
    """Mask of latent positions with a pixel that may change in the video: [clip, frame, height, width], 0 or 1."""
    frames, height, width = shape
    pixels = np.stack([task.workspace(p) for p in problems])
    cells = rearrange(pixels, "b (h y) (w x) -> b h w (y x)", h=height, w=width).any(-1)
    return repeat(torch.from_numpy(cells.astype(np.uint8)), "b h w -> b f h w", f=frames).contiguous()
