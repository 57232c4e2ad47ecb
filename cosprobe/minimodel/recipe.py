"""Trains the model in the package: a complete `WanImageToVideoPipeline`.

Stages: autoencoder, encoding of the training clips (once), flow matching, export. A run that was killed continues at
the stage and step where it stopped. Every part is a class of diffusers or transformers with small sizes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast

import lightning as L
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from cosprobe.config import SAMPLING, AdapterConfig, MiniConfig, PipelineConfig
from cosprobe.differences import ANOTHER, check_same
from cosprobe.errors import InputError
from cosprobe.files import make_folder, read_json, stranger, writable, write_json
from cosprobe.minimodel.accuracy import CURVE, LearningCurve
from cosprobe.minimodel.autoencoding import AutoencoderTraining, Family, revive
from cosprobe.minimodel.encoding import (
    TEXT_TOKENS,
    TEXT_WIDTH,
    build_text,
    embed,
    encode_clips,
    every_prompt,
    measure_scale,
)
from cosprobe.minimodel.flow_matching import FlowMatching, LatentClips
from cosprobe.models import channels_last, load_part, model_fingerprint
from cosprobe.probes import ChecksumIO, check_state
from cosprobe.runs import check_no_results
from cosprobe.tasks import FAMILIES, FROM_DISK, Task

# what an exported model is sampled with unless the settings say otherwise
SAMPLED_WITH = {"steps": 20, "guidance": 1.0, "frames": 13, "prompt_tokens": TEXT_TOKENS, "dtype": "float32"}
MADE_FROM = "made_from.json"  # in the folder of a training
FORMAT = 2  # version of this file


class ClipSettings(Protocol):
    """Settings of training clips: tasks (repeated to weight them), lengths in frames, number of clips of each
    length."""

    families: list[str]
    lengths: list[int]
    clips: list[int]


def families(names: Sequence[str], chosen: Task) -> dict[str, Task]:
    """The tasks of these names: `chosen` with its settings, other tasks with default settings.

    Raises InputError for an unknown name, and when `chosen` is read from disk: training draws new problems, and their
    videos at several lengths.
    """
    if chosen.name in FROM_DISK:
        raise InputError(
            f"task={chosen.name}: video models and adapters are trained on problems that are drawn; expected one of "
            f"{', '.join(FAMILIES)}, or experiment=probes"
        )
    for name in names:
        if name not in FAMILIES:
            raise InputError(f"experiment.families: {name!r} is not a task; expected some of {', '.join(FAMILIES)}")
    return {name: chosen if name == chosen.name else FAMILIES[name]().build() for name in dict.fromkeys(names)}


def begin_training(folder: Path, experiment: MiniConfig | AdapterConfig, task: Task, pipeline: PipelineConfig) -> None:
    """Notes in a folder what its training is made from.

    Raises InputError when the folder has a training with other settings, results of probes, or anything else.
    """
    made = _made_from(experiment, task, pipeline)
    check_no_results(folder)
    path = folder / MADE_FROM
    if path.is_file():
        before = read_json(path, ANOTHER, format=FORMAT)
        check_same(before, made, f"run_dir: the training in {str(folder)!r} was", ANOTHER)
        return
    if stranger(folder, lambda path: False):
        raise InputError(f"run_dir={str(folder)!r}: is not empty, and has no {MADE_FROM} of a training; {ANOTHER}")
    make_folder(folder)
    write_json(path, made)


def _made_from(experiment: MiniConfig | AdapterConfig, task: Task, pipeline: PipelineConfig) -> dict[str, Any]:
    """What the weights of a training depend on: its settings, its tasks, and the models that it starts from."""
    tasks = families(experiment.families, task)
    settings = asdict(experiment)
    weightless = {"card", "solve_every"}  # what is measured, not what is trained
    made: dict[str, Any] = {
        "format": FORMAT,
        "experiment": {name: value for name, value in settings.items() if name not in weightless},
        "task": {name: asdict(cast(Any, task)) for name, task in tasks.items()},
    }
    starts = {"flow": experiment.flow.start}
    if isinstance(experiment, MiniConfig):
        starts["autoencoder"] = experiment.autoencoder.start
    else:
        made["model"] = model_fingerprint(pipeline)
    for group, start in starts.items():
        if start:
            made[f"{group} starts from model"] = model_fingerprint(PipelineConfig(path=start))
    return made


def train_mini(
    config: MiniConfig, tasks: Mapping[str, Task], folder: Path, precision: str = "bf16-mixed", every: int = 100
) -> Path:
    """Trains and exports the model. Returns the folder of the pipeline.

    Finished stages are not repeated. An unfinished stage continues from its newest checkpoint; checkpoints are written
    every `every` steps. tasks: by name, as `families` returns them. precision: as in lightning.Trainer.
    """
    make_folder(folder)
    sets = training_sets(config, tasks)
    widest = config.lengths[config.clips.index(max(config.clips))]  # the length with most problems
    known = {task.name: (task, problems) for task, problems in sets[widest]}
    practised = [known[name] for name in config.autoencoder.families or known]
    autoencoder = AutoencoderTraining(config.autoencoder, practised, config.lengths, config.seed)
    _begin(autoencoder.vae, config.autoencoder.start, "autoencoder", "vae", config.autoencoder.steps > 0)
    channels_last(autoencoder.vae)
    with _timed(folder, "autoencoder"):
        fit_to(autoencoder, folder / "autoencoder", config.autoencoder.steps, precision, every, clip=1.0)
    vae = cast(Any, channels_last(autoencoder.vae.half().float().eval()))  # as it will be stored, in half precision

    learned = {p.prompt for pairs in sets.values() for _, problems in pairs for p in problems}
    prompts = [*sorted(learned.union(every_prompt())), ""]
    tokenizer, text_encoder = build_text(prompts, config.seed)
    table = embed(prompts, tokenizer, text_encoder)
    latents = folder / "latents"
    make_folder(latents)
    clips: dict[int, LatentClips] = {}
    with _timed(folder, "encoding"):
        measure_scale(vae, sets[max(config.lengths)], max(config.lengths), latents / "scale.json")
        for length in config.lengths:
            clips[length] = encode_clips(vae, sets[length], length, latents, prompts, table)

    torch.manual_seed(config.seed)
    transformer = build_transformer(config, vae)
    _begin(transformer, config.flow.start, "flow", "transformer")
    flow = FlowMatching(transformer, clips, config.flow, config.seed)

    def pipeline_of(module: Any, step: int) -> tuple[Any, PipelineConfig]:
        ends = [sum(steps for _, steps in config.flow.stages[: i + 1]) for i in range(len(config.flow.stages))]
        longest = next(longest for (longest, _), end in zip(config.flow.stages, ends, strict=True) if step <= end)
        model = assemble(module.average.module.eval(), vae, tokenizer, text_encoder, config.flow.shift)
        model.set_progress_bar_config(disable=True)
        return model, PipelineConfig(steps=8, guidance=1.0, frames=min(longest, 13), prompt_tokens=TEXT_TOKENS)

    curve = LearningCurve(tasks, pipeline_of, folder / CURVE, config.solve_every)
    with _timed(folder, "flow matching"):
        fit_to(flow, folder / "flow", config.flow.steps, precision, every, None, [curve])
    worlds = {name: asdict(cast(Any, task)) for name, task in tasks.items()}
    recipe = {"settings": asdict(config), "tasks": worlds, "minutes": _minutes(folder), "curve": _curve(folder)}
    recipe["before"] = _before(config.flow.start)
    return export(flow.average.module, vae, tokenizer, text_encoder, config.flow.shift, recipe, folder / "pipeline")


def training_sets(config: ClipSettings, tasks: Mapping[str, Task]) -> dict[int, list[Family]]:
    """For each length the tasks with their training problems. No problem has two lengths."""
    sets: dict[int, list[Family]] = {length: [] for length in config.lengths}
    for name, task in tasks.items():
        share = config.families.count(name) / len(config.families)
        counts = [max(1, round(clips * share)) for clips in config.clips]
        problems = task.problems("model", sum(counts))
        for length, count in zip(config.lengths, counts, strict=True):
            sets[length].append((task, problems[:count]))
            problems = problems[count:]
    return sets


def _begin(model: nn.Module, start: str, group: str, part: str, revived: bool = False) -> None:
    """Loads the weights of an earlier model if `start` is given. revived: whether to apply `revive` to them.

    Raises InputError when the weights are missing, are not all of the model, or have other sizes.
    """
    if not start:
        return
    known = load_part(type(model), PipelineConfig(path=start).folder / part, f"experiment.{group}.start={start!r}")
    if revived:
        revive(known)
    try:
        model.load_state_dict(known.state_dict())
    except RuntimeError as error:
        raise InputError(
            f"experiment.{group}.start={start!r}: expected a diffusers folder with a {part} of the sizes set here"
        ) from error


def _before(start: str) -> list[dict[str, Any]]:
    """Recipes of the earlier runs whose weights this run starts from, the oldest first; empty for random weights."""
    path = PipelineConfig(path=start).folder / "recipe.json"
    if not start or not path.is_file():
        return []
    try:
        recipe = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{str(path)!r} is damaged; take the model from its source again") from error
    return [*recipe.pop("before", []), recipe]


def build_transformer(config: MiniConfig, vae: AutoencoderKLWan) -> WanTransformer3DModel:
    """Builds the transformer. Input channels: noisy latent, first-frame mask (one per frame of a chunk), encoded
    frame."""
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


def assemble(
    transformer: WanTransformer3DModel,
    vae: AutoencoderKLWan,
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: UMT5EncoderModel,
    shift: float,
) -> WanImageToVideoPipeline:
    """The pipeline of these parts. shift: time shift of the scheduler."""
    return WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        transformer=transformer,
    )


def fit_to(
    module: L.LightningModule,
    folder: Path,
    steps: int,
    precision: str,
    every: int,
    clip: float | None,
    callbacks: Sequence[L.Callback] = (),
) -> None:
    """Trains up to `steps` steps, from the newest checkpoint if there is one. clip: norm of gradient clipping."""
    if not steps:  # the weights from `start` are kept
        return
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
            *callbacks,
        ],
        log_every_n_steps=20,
        enable_model_summary=False,
        plugins=[ChecksumIO()],
    )  # fmt: skip
    if last.exists():
        if not ChecksumIO.intact(last):
            raise InputError(f"{str(last)!r} is damaged: delete it; this stage of the training begins again")
        saved = ChecksumIO().load_checkpoint(last)
        check_state(module, saved, last)
        if saved["global_step"] >= steps:
            module.load_state_dict(saved["state_dict"])
            return
    with writable(folder, among_others=True):
        trainer.fit(module, ckpt_path=last if last.exists() else None, weights_only=True)
        trainer.save_checkpoint(last)


@contextmanager
def _timed(folder: Path, stage: str) -> Iterator[None]:
    """Adds the wall time of the block to the minutes of the stage, which sum over resumed runs."""
    begin = time.monotonic()
    try:
        yield
    finally:
        minutes = _minutes(folder)
        minutes[stage] = round(minutes.get(stage, 0.0) + (time.monotonic() - begin) / 60, 2)
        write_json(folder / "minutes.json", minutes)


def _curve(folder: Path) -> list[dict[str, Any]]:
    path = folder / CURVE
    return read_json(path, "delete it")["rows"] if path.is_file() else []


def _minutes(folder: Path) -> dict[str, float]:
    path = folder / "minutes.json"
    return read_json(path, "delete it") if path.is_file() else {}


def export(
    transformer: WanTransformer3DModel,
    vae: AutoencoderKLWan,
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: UMT5EncoderModel,
    shift: float,
    recipe: dict[str, Any],
    folder: Path,
) -> Path:
    """Writes a diffusers folder with transformer and autoencoder in half precision. It loads in fp32 by default."""
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    pipeline = assemble(transformer.half(), vae.half(), tokenizer, text_encoder, shift)
    with writable(folder):
        pipeline.save_pretrained(part, safe_serialization=True)
        (part / "recipe.json").write_text(json.dumps(recipe, indent=1))
        (part / SAMPLING).write_text(json.dumps(SAMPLED_WITH, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    transformer.float(), vae.float()
    return folder
