"""The model card: accuracy of a pipeline on unseen problems, with answers parsed from decoded videos."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from cosprobe.activations import Sampler
from cosprobe.config import AdapterConfig, MiniConfig, PipelineConfig
from cosprobe.evaluation import share_interval
from cosprobe.files import whole_file
from cosprobe.minimodel.accuracy import Solved, solve
from cosprobe.minimodel.autoencoding import to_model_range, video_of
from cosprobe.minimodel.lora_training import train_adapter
from cosprobe.minimodel.recipe import families, train_mini
from cosprobe.models import load_pipeline
from cosprobe.tasks import Problem, Select, Task

BINS = 5  # largest number of rows for one difficulty


@dataclass(frozen=True)
class Measured:
    """Results of a model, by task.

    solved: at `pipeline.frames` frames. elsewhere: at other lengths, by (task, frames).
    misread: number of reference videos whose parsed answer changes by the autoencoder, and number of videos.
    reworded: the same images with another object or box named in the prompt, for the task `select`.
    """

    solved: dict[str, Solved]
    elsewhere: dict[tuple[str, int], Solved]
    misread: dict[str, tuple[int, int]]
    reworded: dict[str, dict[str, Solved]]


def train_and_describe(
    experiment: MiniConfig | AdapterConfig, task: Task, pipeline: PipelineConfig, folder: Path, seed: int
) -> Path:
    """Trains the mini model (`MiniConfig`) or adapters of `pipeline` (`AdapterConfig`). Returns the path of its
    card. Call `begin_training` first."""
    tasks = families(experiment.families, task)
    if isinstance(experiment, MiniConfig):
        return describe(train_mini(experiment, tasks, folder), pipeline, tasks, seed)
    adapter = train_adapter(load_pipeline(pipeline), experiment, tasks, folder)
    return compare(adapter, pipeline, tasks, experiment, seed)


def describe(folder: Path, pipeline: PipelineConfig, tasks: Mapping[str, Task], seed: int) -> Path:
    """Measures the model in `folder` on unseen problems of every task and kind, and writes its card.

    Videos have `pipeline.frames` frames, or the longest trained length if the model was not trained on that length.
    """
    settings = json.loads((folder / "recipe.json").read_text())["settings"]
    lengths, counts = settings["lengths"], settings["card"]
    frames = pipeline.frames if pipeline.frames in lengths else max(lengths)
    pipeline = replace(pipeline, path=str(folder), frames=frames)
    return write_card(folder, measure(load_pipeline(pipeline), pipeline, tasks, lengths, counts, seed), pipeline)


def measure(
    model: Any,
    pipeline: PipelineConfig,
    tasks: Mapping[str, Task],
    lengths: Sequence[int],
    counts: Sequence[int],
    seed: int,
) -> Measured:
    """Measures a model on test problems. No rotation or reflection of them is among the training problems.

    lengths: numbers of frames that the model was trained on. counts: for each kind, the number of problems at
    `pipeline.frames`, of problems at each other length, and of reconstructed reference videos.
    """
    solved, elsewhere, misread, reworded = {}, {}, {}, {}
    for name, task in tasks.items():
        problems = [p for kind in task.kinds for p in task.problems("test", counts[0], kind)]
        few = [p for kind in task.kinds for p in task.problems("test", max(1, counts[1]), kind)]
        sampler = Sampler(model, pipeline, task)
        solved[name] = solve(sampler, problems, seed, progress=True)
        for length in lengths:
            if length != pipeline.frames and counts[1]:
                elsewhere[name, length] = solve(replace(sampler, config=replace(pipeline, frames=length)), few, seed)
        if isinstance(task, Select):
            reworded[name] = {w: solve(sampler, new, seed) for w, new in rewordings(task, problems)}
        references = counts[2] * len(task.kinds)
        misread[name] = (count_misread(model, pipeline, task, references), references)
    return Measured(solved, elsewhere, misread, reworded)


def rewordings(task: Select, problems: Sequence[Problem]) -> list[tuple[str, list[Problem]]]:
    """The problems with changed prompts: half name the next object of the image, half the next box."""
    objects = [task.swapped(p, object=(p.layout.named + 1) % len(p.layout.objects)) for p in problems[::2]]
    boxes = [task.swapped(p, box=(p.layout.corner + 1) % task.candidates) for p in problems[1::2]]
    return [("object", objects), ("box", boxes)]


@torch.no_grad()
def count_misread(model: Any, pipeline: PipelineConfig, task: Task, count: int) -> int:
    """Number of reference videos, of `count`, whose parsed answer changes after encoding and decoding."""
    misread, problems = 0, task.problems("test", count)
    batches = [problems[i : i + pipeline.batch] for i in range(0, count, pipeline.batch)]
    for batch in track(batches, f"{task.name}: {count} references reconstructed"):
        clips = np.stack([video_of(task, p, pipeline.frames) for p in batch])
        again = model.vae.decode(model.vae.encode(to_model_range(clips)).latent_dist.mode()).sample
        shown = ((again.permute(0, 2, 3, 4, 1) + 1) / 2).numpy()
        for problem, clip, reference in zip(batch, shown, clips, strict=True):
            misread += task.parse(problem, clip).answer != task.parse(problem, reference / 255).answer
    return misread


def rate(solved: Solved, keep: Any = slice(None)) -> str:
    """Accuracy with its 95 % interval by problem, such as `0.910 [0.880, 0.940] of 512`; `-` for no problems."""
    right = solved.right[keep].astype(float)
    if not len(right):
        return "-"
    keys = np.array([p.key for p in solved.problems])[keep]
    lower, upper = share_interval(right[None], keys)
    return f"{right.mean():.3f} [{lower[0]:.3f}, {upper[0]:.3f}] of {len(right)}"


def difficulties(solved: Solved) -> list[tuple[str, np.ndarray]]:
    """Rows of a table by difficulty: name of each row and mask of its problems. At most BINS ranges per difficulty."""
    rows = []
    for measure in solved.problems[0].difficulty:
        values = np.array([p.difficulty[measure] for p in solved.problems])
        found = np.unique(values)
        if len(found) > BINS:
            found = np.unique(np.quantile(values, np.linspace(0, 1, BINS + 1)[:-1], method="nearest"))
        for low, beyond in zip(found, [*found[1:], np.inf], strict=True):
            inside = values[(values >= low) & (values < beyond)]
            span = f"{low}" if inside.min() == inside.max() else f"{inside.min()} to {inside.max()}"
            rows.append((f"{measure} {span}", (values >= low) & (values < beyond)))
    return rows


def table(name: str, measured: Measured) -> list[str]:
    """Section of the card on one task, in Markdown."""
    solved = measured.solved[name]
    kinds = np.array([p.kind for p in solved.problems])
    names = list(dict.fromkeys(kinds))
    wrong, made = measured.misread[name]
    other_words = measured.reworded.get(name, {})

    def row(title: str, of: Solved, keep: np.ndarray) -> str:
        kind = np.array([p.kind for p in of.problems])
        return f"| {title} | " + " | ".join(rate(of, keep & (kind == one)) for one in names) + " |"

    return [
        f"### {name}",
        "",
        f"| problems | {' | '.join(names)} |",
        "|---|" + "---|" * len(names),
        row("all", solved, np.ones(len(kinds), dtype=bool)),
        *(row(title, solved, keep) for title, keep in difficulties(solved)),
        *(
            row(f"{length} frames", other, np.ones(len(other.problems), dtype=bool))
            for (family, length), other in measured.elsewhere.items()
            if family == name
        ),
        "",
        f"Videos that end on no answer, or on several: {solved.none.mean():.3f}. Agreement with a right solution "
        f"(mean): {solved.path.mean():.3f}. Autoencoder: {wrong} of {made} reconstructed references read differently.",
        *(f"Right when another {what} of the same picture is named: {rate(of)}." for what, of in other_words.items()),
        "",
    ]


def speed(recipe: dict[str, Any]) -> list[str]:
    """Table of the training times of all runs, each of which started from the weights of the one before.

    A last line gives the number of clips, counted over all runs, until 90 % of the validation problems of a kind were
    solved.
    """
    lines = [
        "| run | autoencoder, min | encoding, min | flow matching, min | thousand clips | frames | s for 1,000 clips |",
        "|---|---|---|---|---|---|---|",
    ]
    learned, tested, reached = 0.0, 0, dict[str, str]()
    for number, run in enumerate([*recipe.get("before", []), recipe], start=1):
        flow, minutes = run["settings"]["flow"], run["minutes"]
        for row in run["curve"]:
            tested = row["of"]
            if row["right"] >= 0.9 * tested:
                clips = f"{learned + row['step'] * flow['batch'] / 1000:.0f}"
                reached.setdefault(f"{row['family']} {row['kind']}", f"{clips} ({row['frames']} frames)")
        cells = [f"{minutes[stage]:.0f}" if minutes.get(stage) else "-" for stage in ("autoencoder", "encoding")]
        if spent := minutes.get("flow matching"):
            clips = sum(count for _, count in flow["stages"]) * flow["batch"] / 1000
            longest = ", ".join(str(length) for length, _ in flow["stages"])
            cells += [f"{spent:.0f}", f"{clips:.0f}", longest, f"{spent * 60 / clips:.1f}"]
            learned += clips
        else:
            cells += ["-"] * 4
        lines.append(f"| {number} | {' | '.join(cells)} |")
    if reached:
        kinds = ", ".join(f"{kind} {clips}" for kind, clips in reached.items())
        lines += ["", f"Clips, in thousands, until 90 % of {tested} problems were solved at 8 steps: {kinds}."]
    return lines


def write_card(folder: Path, measured: Measured, pipeline: PipelineConfig) -> Path:
    """Writes README.md into the pipeline folder, with the recipe that `train_mini` saved there."""
    recipe = json.loads((folder / "recipe.json").read_text())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    lines = [
        "# The mini model",
        "",
        f"A complete `WanImageToVideoPipeline`, small enough for a laptop. Tasks: {', '.join(measured.solved)}.",
        f"`WanImageToVideoPipeline.from_pretrained(folder)` loads it ({size:.1f} MB). Sample it with "
        f"{pipeline.steps} steps, guidance {pipeline.guidance:g}, {pipeline.frames} frames of 64 x 64 pixels and "
        f"`max_sequence_length={pipeline.prompt_tokens}`.",
        "",
        "## Accuracy",
        "",
        "Accuracy on test problems, with 95 % intervals by problem. No rotation or reflection of a test problem is",
        "among the training problems. Answers are parsed from decoded videos. If several are right, each counts.",
        "",
        *(line for name in measured.solved for line in table(name, measured)),
        "## Recipe",
        "",
        "`python train.py experiment=mini`, with the settings of `recipe.json`. Column `frames`: the longest clips of",
        "each stage.",
        "",
        *speed(recipe),
        "",
        "```json",
        json.dumps({name: recipe[name] for name in ("settings", "tasks")}, indent=1),
        "```",
        "",
        "Limits: the model was trained on the prompts and images of these tasks only. It is meant for research on how",
        "video diffusion transformers compute answers, not for generating videos.",
        "",
    ]
    path = folder / "README.md"
    with whole_file(path) as part:
        part.write_text("\n".join(lines))
    return path


def compare(
    adapter: Path, pipeline: PipelineConfig, tasks: Mapping[str, Task], config: AdapterConfig, seed: int
) -> Path:
    """Measures accuracy on the same unseen problems with and without the adapter, and writes its README.md.

    config: settings of the adapter. Videos have the longest trained length; `card` is the number of problems per kind.
    """
    pipeline = replace(pipeline, frames=max(config.lengths))
    models = [load_pipeline(pipeline), load_pipeline(replace(pipeline, lora=str(adapter)))]
    rows = ["| problems | base | adapted | only adapted right | only base right |", "|---|---|---|---|---|"]
    for name, task in tasks.items():
        for kind in task.kinds:
            problems = task.problems("test", config.card, kind)
            base, adapted = (solve(Sampler(model, pipeline, task), problems, seed, progress=True) for model in models)
            changed = [(adapted.right & ~base.right).sum(), (base.right & ~adapted.right).sum()]
            rates = [rate(solved) for solved in (base, adapted)]
            rows.append(f"| {name}, {kind} | {' | '.join([*rates, *map(str, changed)])} |")
    path = adapter / "README.md"
    with whole_file(path) as part:
        part.write_text("\n".join([f"# Adapter of {pipeline.folder.name}", "", *rows, ""]))
    return path
