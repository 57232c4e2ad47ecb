"""`python probe.py use=film`: x0-hat at every step as a video, with what the probe reads beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from cosprobe.activations import Pooling, Sampler, capture, images
from cosprobe.cells import X0, parse_selection
from cosprobe.config import FilmConfig
from cosprobe.ensembles import ProbeScorer
from cosprobe.errors import InputError
from cosprobe.evaluation import Grid
from cosprobe.files import make_folder, whole_file, write_json
from cosprobe.models import pipeline_fingerprint, sample
from cosprobe.probes import ProbeBank
from cosprobe.reporting import STYLE, new_figure
from cosprobe.runs import REPORT
from cosprobe.runtime import rank_and_world, say
from cosprobe.tasks import ANSWER_ROLES, Problem, TaskConfig, fresh_problems, noise_seed, reference_of, with_noise
from cosprobe.video_files import write_video

RATE = 12  # frames per second of the MP4
PAUSE = 300  # milliseconds per step of the GIF
COLUMNS = 5  # of the contact sheet
MOST_PIXELS = 20_000_000  # of an image, before it is decoded
READ, RIGHT = "#0072b2", "#009e73"


@dataclass(frozen=True, eq=False)
class FilmedRun:
    """x0-hat of one sample along the steps.

    steps: step indices. clips: decoded x0-hat. proba: probabilities of the candidates by the probe with the best
    validation accuracy at each step, NaN at steps without probes; None without a probe. right: right answers.
    reference: the reference video, None without one.
    """

    name: str
    prompt: str
    steps: tuple[int, ...]
    clips: UInt8[np.ndarray, "step frame height width 3"]
    proba: Float[np.ndarray, "step candidate"] | None
    right: tuple[int, ...]
    reference: UInt8[np.ndarray, "time height width 3"] | None = None

    @property
    def reference_title(self) -> str:
        """What the reference is: with several right answers, it shows one of them."""
        return "reference" if len(self.right) < 2 else f"right answer, 1 of {len(self.right)}"


def film(sampler: Sampler, task: TaskConfig, bank: ProbeBank, use: FilmConfig, seed: int, folder: Path) -> None:
    """Samples new problems, or one image of the user's, and writes an MP4, a GIF and a contact sheet of each.

    sampler: the loaded pipeline and the task of the run. task: settings of that task. The files are in report/film of
    `folder`, the folder of the result. With several processes, only the first one does anything.
    Raises InputError for another model, for steps or kinds that the run does not have, and for an image that cannot be
    read or has another aspect ratio.
    """
    if rank_and_world()[0]:
        return
    bank.check_model(pipeline_fingerprint(sampler.model), "the loaded pipeline")
    steps = parse_selection(use.steps, sampler.config.steps, "use.steps")
    if use.image:
        runs = iter([own_run(sampler, use, steps, seed)])
    else:
        kind = use.kind or sampler.task.kinds[0]
        if kind not in sampler.task.kinds:
            raise InputError(f"use.kind={kind!r}: expected one of {', '.join(sampler.task.kinds)}")
        problems = fresh_problems(sampler.task, "test", task.problems, use.problems, [kind])
        known = any(t.role in ANSWER_ROLES and kind in t.kinds for t in bank.targets)
        scorer = ProbeScorer.of(bank, Grid.load(folder), sampler.task.name) if known else None
        runs = filmed(sampler, problems, scorer, steps, seed)
    place = folder / REPORT / use.report
    make_folder(place)
    for run in runs:
        for path in write_film(run, place):
            say(f"{path}")


@torch.no_grad()
def filmed(
    sampler: Sampler, problems: Sequence[Problem], scorer: ProbeScorer | None, steps: Sequence[int], seed: int
) -> Iterator[FilmedRun]:
    """Samples problems under capture, batch by batch. scorer: probes that are read at the steps that they have."""
    cells = {}
    if scorer is not None:
        trained = {cell.step for table in scorer.accuracy.values() for cell in table}
        cells = {step: {name: scorer.cell(name, step) for name in scorer.accuracy} for step in steps if step in trained}
    layers = sorted({str(cell.layer) for here in cells.values() for cell in here.values()})
    for batch in sampler.batches(with_noise(problems, seed)):
        shown = [one.problem for one in batch]
        references = [reference_of(sampler.task, problem) for problem in shown]
        pooling = scorer.pooling(shown) if scorer is not None else Pooling("clip")
        with capture(sampler.model, [X0, *layers], pooling, clean=steps) as cache:
            sampler(batch, output_type="latent")
        clips = np.stack([sampler.decode(cache.clean[step]) for step in steps], axis=1)
        proba = np.full((len(shown), len(steps), sampler.task.candidates), np.nan)
        for i, step in enumerate(steps):
            if scorer is not None and step in cells:
                proba[:, i] = scorer.read(cells[step], shown, cache.at).numpy()
        for problem, clip, each, reference in zip(shown, clips, proba, references, strict=True):
            read = each if scorer is not None else None
            name = f"{problem.kind}_{problem.index}"
            right = sampler.task.solutions(problem)
            yield FilmedRun(name, problem.prompt, tuple(steps), _bytes(clip), read, right, reference)


@torch.no_grad()
def own_run(sampler: Sampler, use: FilmConfig, steps: Sequence[int], seed: int) -> FilmedRun:
    """Samples one image of the user's. There is no answer, and no probe is read: its regions are those of the task."""
    path = Path(use.image).expanduser()
    problem = sampler.task.problems("test", 1)[0]
    height, width = images(sampler.task, [problem]).shape[2:]
    image = read_image(path, height, width)
    given = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    with capture(sampler.model, [X0], Pooling("clip"), "last", clean=steps) as cache:
        sample(sampler.model, sampler.config, given, [use.prompt], [noise_seed(problem, 0, seed)], output_type="latent")
    clips = np.stack([sampler.decode(cache.clean[step])[0] for step in steps])
    return FilmedRun(path.stem, use.prompt, tuple(steps), _bytes(clips), None, ())


def read_image(path: Path, height: int, width: int) -> UInt8[np.ndarray, "height width 3"]:
    """Reads an image and scales it to this size. Raises InputError as `film` does."""
    named = f"use.image={str(path)!r}"
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise InputError(f"{named}: {picture.width} x {picture.height} pixels, expected at most {MOST_PIXELS}")
            if abs(picture.width * height - picture.height * width) > 0.02 * picture.height * width:
                raise InputError(
                    f"{named}: {picture.width} x {picture.height} pixels, expected the aspect ratio of the run, "
                    f"{width}:{height}; crop it"
                )
            return np.array(picture.convert("RGB").resize((width, height)))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{named}: cannot be read as an image; expected a PNG or JPEG file") from error


def write_film(run: FilmedRun, folder: Path) -> list[Path]:
    """Writes NAME.mp4 (all frames of every step), NAME.gif (last frames), NAME.png (contact sheet) and NAME.json (what
    the probe reads), and returns their paths."""
    paths = [folder / f"{run.name}{suffix}" for suffix in (".mp4", ".gif", ".png", ".json")]
    with whole_file(paths[0]) as part:
        write_video(part, np.stack(list(pictures(run))), RATE)
    last = [Image.fromarray(picture) for picture in pictures(run, [-1])]
    with whole_file(paths[1]) as part:
        last[0].save(part, format="gif", save_all=True, append_images=last[1:], duration=PAUSE, loop=0)
    with rc_context(STYLE), whole_file(paths[2]) as part:
        contact_sheet(run).savefig(part, format="png")
    proba = None if run.proba is None else [[None if p != p else p for p in row] for row in run.proba.tolist()]
    write_json(
        paths[3], {"prompt": run.prompt, "steps": list(run.steps), "probabilities": proba, "right": list(run.right)}
    )
    return paths


def pictures(run: FilmedRun, frames: Sequence[int] | None = None) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """Pictures of a film: x0-hat on the left, then the reference and the probabilities as bars, where there are any.

    frames: of every step; default all.
    """
    with rc_context(STYLE):
        wide = (2.8, *((2.4,) if run.reference is not None else ()), *((2.0,) if run.proba is not None else ()))
        figure = Figure(figsize=(round(sum(wide), 1), 3.0), dpi=100)
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(wide), squeeze=False)[0]
        figure.subplots_adjust(0.02, 0.14, 0.98, 0.88, wspace=0.25)
        image = panels[0].imshow(run.clips[0, 0], interpolation="nearest")
        panels[0].set(xticks=[], yticks=[])
        if run.reference is not None:
            beside = panels[1].imshow(run.reference[0], interpolation="nearest")
            panels[1].set(xticks=[], yticks=[])
            panels[1].set_title(run.reference_title, loc="left")
        if run.proba is not None:
            count = run.proba.shape[1]
            bars = panels[-1].bar(
                range(count), np.zeros(count), color=[RIGHT if k in run.right else READ for k in range(count)]
            )
            panels[-1].set(ylim=(0, 1), xticks=range(count), xlabel="candidate (green: right)")
        for i, step in enumerate(run.steps):
            panels[0].set_title(f"x0-hat, step {step}", loc="left")
            if run.proba is not None:
                known = np.isfinite(run.proba[i]).all()
                panels[-1].set_title("probability by the probe" if known else "no probe at this step", loc="left")
                for bar, value in zip(bars, np.nan_to_num(run.proba[i]), strict=True):
                    bar.set_height(value)
            for frame in range(run.clips.shape[1]) if frames is None else frames:
                image.set_data(run.clips[i, frame])
                if run.reference is not None:
                    beside.set_data(run.reference[min(frame, len(run.reference) - 1)])
                figure.canvas.draw()
                yield np.array(figure.canvas.buffer_rgba())[..., :3]


def contact_sheet(run: FilmedRun) -> Figure:
    """The last frame of x0-hat at every step, with the candidate that the probe reads and its probability.

    The last panel is the last frame of the reference, where there is one.
    """
    shown = len(run.steps) + (run.reference is not None)
    columns = min(COLUMNS, shown)
    rows = -(-shown // columns)
    height, width = run.clips.shape[2:4]
    side = 7.6 / columns
    sheet = new_figure(7.6, rows * (side * height / width + 0.35) + 0.3)
    panels = sheet.subplots(rows, columns, squeeze=False).ravel()
    for i, axes in enumerate(panels):
        axes.set_axis_off()
        if run.reference is not None and i == len(run.steps):
            axes.imshow(run.reference[-1], interpolation="nearest")
            axes.set_title(run.reference_title, loc="left")
        if i >= len(run.steps):
            continue
        axes.imshow(run.clips[i, -1], interpolation="nearest")
        title = f"step {run.steps[i]}"
        if run.proba is not None and np.isfinite(run.proba[i]).all():
            pick = int(run.proba[i].argmax())
            title += f": {pick} ({run.proba[i, pick]:.2f})"
            axes.set_title(title, loc="left", color=RIGHT if pick in run.right else "black")
        else:
            axes.set_title(title, loc="left")
    read = "" if run.proba is None else "; candidate of the probe (its probability), green: right"
    sheet.suptitle(f"{run.name}: last frame of x0-hat{read}", x=0.01, ha="left", fontsize=9)
    return sheet


def _bytes(clips: Float[np.ndarray, "step frame height width 3"]) -> UInt8[np.ndarray, "step frame height width 3"]:
    return (np.clip(clips, 0, 1) * 255).round().astype(np.uint8)
