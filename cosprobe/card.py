"""The model card: how well a pipeline solves unseen problems, measured on decoded pixels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from cosprobe.autoencoding import to_model_range
from cosprobe.collect import images, noise_seed
from cosprobe.metrics import cluster_bootstrap
from cosprobe.pipelines import PipelineConfig, load_pipeline, sample
from cosprobe.tasks import Problem, Task

LENGTHS = ((1, 4), (5, 6), (7, 8), (9, 64))  # rooms walked


@dataclass(frozen=True)
class Measured:
    """problems: unseen ones, of every kind by turns. right: the video ends on a candidate that counts as right.
    none: it ends on none. path: agreement of what was drawn with a right solution."""

    problems: list[Problem]
    right: np.ndarray
    none: np.ndarray
    path: np.ndarray
    reconstructed: int
    misread: int

    def rate(self, keep: np.ndarray) -> str:
        """`0.91 [0.88, 0.94] of 512`."""
        right = self.right[keep].astype(float)
        if not len(right):
            return "-"
        keys = np.array([p.key for p in self.problems])[keep]
        lower, upper = cluster_bootstrap(right[None], keys, 1000, 0)
        return f"{right.mean():.3f} [{lower[0]:.3f}, {upper[0]:.3f}] of {len(right)}"


@torch.no_grad()
def measure(model: Any, pipeline: PipelineConfig, task: Task, count: int, reconstructions: int, seed: int) -> Measured:
    """Samples `count` test problems of each kind, and reconstructs `reconstructions` reference videos.

    The test split shares no problem with what the model was trained on, whatever its symmetry.
    """
    problems = [p for kind in task.kinds for p in task.problems("test", count, kind)]
    right, none, path = [], [], []
    for batch in track(_batches(problems, pipeline.batch), "sampling unseen problems"):
        seeds = [noise_seed(p, 0, seed) for p in batch]
        video = sample(model, pipeline, images(task, batch), [p.prompt for p in batch], seeds)
        for problem, clip in zip(batch, video, strict=True):
            read = task.readout(problem, clip)
            right.append(read.answer in task.solutions(problem))
            none.append(read.answer is None)
            path.append(read.path)
    misread = 0
    references = task.problems("test", reconstructions)
    for batch in track(_batches(references, pipeline.batch), "reconstructing references"):
        clips = np.stack([task.video(p) for p in batch])
        again = model.vae.decode(model.vae.encode(to_model_range(clips)).latent_dist.mode()).sample
        shown = ((again.permute(0, 2, 3, 4, 1) + 1) / 2).numpy()
        for problem, clip, reference in zip(batch, shown, clips, strict=True):
            misread += task.readout(problem, clip).answer != task.readout(problem, reference / 255).answer
    return Measured(problems, np.array(right), np.array(none), np.array(path), len(references), misread)


def describe(folder: Path, pipeline: PipelineConfig, task: Task, seed: int) -> Path:
    """Measures the model in `folder` on 512 unseen problems of each kind and 2,000 references, and writes its card."""
    pipeline = replace(pipeline, path=str(folder))
    return write_card(folder, measure(load_pipeline(pipeline), pipeline, task, 512, 2000, seed), pipeline)


def _batches(problems: Sequence[Problem], size: int) -> list[Sequence[Problem]]:
    return [problems[i : i + size] for i in range(0, len(problems), size)]


def write_card(folder: Path, measured: Measured, pipeline: PipelineConfig) -> Path:
    """Writes README.md into the pipeline folder, with the recipe that `train_mini` left there."""
    recipe = json.loads((folder / "recipe.json").read_text())
    kinds = np.array([p.kind for p in measured.problems])
    rooms = np.array([p.difficulty["rooms"] for p in measured.problems])
    length = np.array([p.difficulty["length"] for p in measured.problems])
    names = list(dict.fromkeys(kinds))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6

    def row(title: str, keep: np.ndarray) -> str:
        cells = [measured.rate(keep & (kinds == kind)) for kind in names]
        return f"| {title} | " + " | ".join(cells) + " |"

    everything = np.ones(len(kinds), dtype=bool)
    lines = [
        "# The mini model",
        "",
        "A complete `WanImageToVideoPipeline`, small enough for a laptop, that solves mazes by drawing the way out.",
        f"`WanImageToVideoPipeline.from_pretrained(folder)` loads it; {size:.1f} MB. Sample it with "
        f"{pipeline.steps} steps, guidance {pipeline.guidance:g}, {pipeline.frames} frames of 64 x 64 pixels and "
        f"`max_sequence_length={pipeline.prompt_tokens}`.",
        "",
        "## Accuracy",
        "",
        "Test problems, none of which (in any rotation or reflection) the model was trained on; answers are read from",
        "decoded pixels; 95 % cluster-bootstrap intervals by problem. A choice problem is right when the trail ends on",
        "any reachable exit.",
        "",
        "| problems | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
        row("all", everything),
        *(row(f"{n} x {n} rooms", rooms == n) for n in sorted(set(rooms))),
        *(
            row(f"{low} to {high} rooms walked" if high < 64 else f"{low} or more", (length >= low) & (length <= high))
            for low, high in LENGTHS
        ),
        "",
        f"Videos that end on no exit, or on several: {measured.none.mean():.3f}. Agreement of all that is drawn",
        f"with a right path (intersection over union, mean): {measured.path.mean():.3f}. Autoencoder: "
        f"{measured.misread} of {measured.reconstructed} reconstructed references are read differently.",
        "",
        "## Recipe",
        "",
        "`python train.py experiment=mini`, with the settings of `recipe.json`. Minutes: "
        + ", ".join(f"{stage} {spent:.0f}" for stage, spent in recipe["minutes"].items())
        + ".",
        "",
        "```json",
        json.dumps({name: recipe[name] for name in ("settings", "task")}, indent=1),
        "```",
        "",
        "Limits: it knows one prompt, one kind of picture, and mazes of the sizes above. It is made for studying how",
        "video diffusion transformers compute answers, not for making videos.",
        "",
    ]
    path = folder / "README.md"
    path.write_text("\n".join(lines))
    return path
