"""The film strip: the decoded x0-hat at several steps, for a few problems.

One row per problem: the given first frame, then the last frame of the decoded x0-hat at each decoded step. A box marks
the candidate with the highest parser score. Candidates are named by their index in the
task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from cosprobe.activations import ProbeSamples, Sampler, StoreSettings, watch
from cosprobe.cache import Saved, cached
from cosprobe.config import CaptureConfig
from cosprobe.errors import InputError
from cosprobe.tasks import Box, Mask, Problem, Sample, Task, answers_are_regions

RIGHT, WRONG, FREE = "#009e73", "#cc3311", "#0072b2"  # green, red and blue, safe for colour blindness
STYLE = {"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8.5}
PER_ROW = 8  # images per row; if there are more steps, some are left out


@dataclass(frozen=True)
class FilmRow:
    """One problem.

    title: such as `right`, `wrong`, `several right`.
    first_frame: the given image.
    clips: x0-hat at each decoded step.
    picks: the candidate with the highest parser score at each decoded step.
    regions: box of every candidate, as fractions of the image; empty where candidates are not boxes.
    answer: the right candidate, None if several are right.
    model_answer: what the finished video shows, None for no answer.
    """

    title: str
    first_frame: UInt8[np.ndarray, "height width 3"]
    clips: UInt8[np.ndarray, "step frame height width 3"]
    picks: tuple[int, ...]
    regions: tuple[Box, ...] = ()
    answer: int | None = None
    model_answer: int | None = None

    @property
    def frames(self) -> UInt8[np.ndarray, "step height width 3"]:
        """Last frame of x0-hat at each decoded step."""
        return self.clips[:, -1]

    def colour(self, pick: int) -> str:
        """Colour of a candidate: right, wrong, or blue if several candidates are right."""
        return FREE if self.answer is None else RIGHT if pick == self.answer else WRONG


@dataclass(frozen=True)
class Film:
    """Rows with the same decoded steps (step indices)."""

    rows: tuple[FilmRow, ...]
    steps: tuple[int, ...]


FILMED = 3  # most problems of a film


def record(
    sampler: Sampler, draw: Callable[[], Sequence[Sample]], samples: ProbeSamples, probe: CaptureConfig
) -> Film | None:
    """Samples up to three test problems again and decodes x0-hat on the way.

    These are the first problem that the model solved, the first that it did not solve, and the first solved one with
    several right answers. Problems that do not exist are left out. Returns None if there are none at all.
    draw: returns the samples that `samples` were collected from, in order. probe: defines the decoded steps.
    """
    if "solved" not in samples.scores:
        return None
    task, drawn = sampler.task, draw()
    several = np.array([len(task.solutions(sample.problem)) > 1 for sample in drawn])
    solved = samples.scores["solved"].astype(bool)
    sorts = {"right": solved & ~several, "wrong": ~solved & ~several, "several right": solved & several}
    given = samples.model_answer
    ends = [None] * len(drawn) if given is None else [None if answer < 0 else int(answer) for answer in given]
    test = samples.split == "test"
    chosen = {title: int(np.flatnonzero(test & sort)[0]) for title, sort in sorts.items() if (test & sort).any()}
    if not chosen:
        return None
    steps = probe.steps_decoded(sampler.config.steps)
    watched = watch(sampler, [drawn[i] for i in chosen.values()], steps)
    rows = [
        film_row(task, title, drawn[i].problem, clips, ends[i])
        for (title, i), clips in zip(chosen.items(), watched, strict=True)
    ]
    return Film(tuple(rows), steps)


def record_once(
    folder: Path, settings: StoreSettings, sampler: Sampler, draw: Callable[[], Sequence[Sample]], samples: ProbeSamples
) -> Film | None:
    """What `record` returns, kept in a file in `folder` for later calls. settings: of the activations."""
    arrays, notes = cached(
        folder, "film", settings.to_json(), lambda: _packed(record(sampler, draw, samples, settings.probe))
    )
    rows = [
        FilmRow(
            first_frame=arrays[f"{i}.first_frame"],
            clips=arrays[f"{i}.clips"],
            picks=tuple(row.pop("picks")),
            regions=tuple((a, b, c, d) for a, b, c, d in row.pop("regions")),
            **row,
        )
        for i, row in enumerate(notes["rows"])
    ]
    return Film(tuple(rows), tuple(notes["steps"])) if rows else None


def _packed(film: Film | None) -> Saved:
    """The pictures of a film as arrays, and the rest."""
    rows = () if film is None else film.rows
    arrays = {f"{i}.{name}": getattr(row, name) for i, row in enumerate(rows) for name in ("first_frame", "clips")}
    names = ("title", "picks", "regions", "answer", "model_answer")
    steps = [] if film is None else list(film.steps)
    return arrays, {"rows": [{name: getattr(row, name) for name in names} for row in rows], "steps": steps}


def film_row(
    task: Task,
    title: str,
    problem: Problem,
    clips: Float[np.ndarray, "step frame height width 3"],
    model_answer: int | None,
) -> FilmRow:
    """Row of one problem. clips: decoded x0-hat in [0, 1]. model_answer: what the finished video shows, None for
    none."""
    boxes = tuple(region for region in problem.regions if not isinstance(region, Mask))
    return FilmRow(
        title,
        task.image(problem),
        (clips * 255).round().astype(np.uint8),
        tuple(task.parse(problem, clip).forced for clip in clips),
        boxes if answers_are_regions(task) and len(boxes) == task.regions else (),
        problem.answer,
        model_answer,
    )


def film_strip(rows: Sequence[FilmRow], steps: Sequence[int]) -> Figure:
    """The film strip as a figure 8 inches wide. If there are more than seven steps, seven evenly spaced ones are shown.

    Raises InputError for no rows or no steps, and for a row whose frames or picks are not one per step.
    """
    if not rows or not steps:
        raise InputError(f"film strip of {len(rows)} problems and {len(steps)} steps: expected at least one of each")
    for row in rows:
        if not len(row.frames) == len(row.picks) == len(steps):
            raise InputError(
                f"film row {row.title!r}: {len(row.frames)} frames and {len(row.picks)} picks, "
                f"expected one per decoded step, {len(steps)}"
            )
    shown = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), PER_ROW - 1)).round().astype(int))
    height, width = rows[0].first_frame.shape[:2]
    side = 7.3 / (len(shown) + 1)
    with rc_context(STYLE):
        figure = Figure(figsize=(8, len(rows) * (side * height / width + 0.28) + 0.75), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.01, hspace=0.01)
        panels = figure.subplots(len(rows), len(shown) + 1, squeeze=False)
        for line, row in zip(panels, rows, strict=True):
            _image(line[0], row.first_frame)
            line[0].set_ylabel(row.title, fontweight="bold", fontsize=10)
            if row.answer is not None and row.regions:
                line[0].add_patch(_box(row.regions[row.answer], row.first_frame, "black"))
            for axes, i in zip(line[1:], shown, strict=True):
                _image(axes, row.frames[i])
                _mark_pick(axes, row, i)
            line[0].set_xlabel(_ending(row), labelpad=2)
        panels[0, 0].set_title("first frame")
        for k, i in enumerate(shown):
            panels[0, k + 1].set_title(f"x0-hat, step {steps[i]}" if k == 0 else f"step {steps[i]}")
        _legend(figure, rows)
    return figure


def film_motion(film: Film, index: int) -> UInt8[np.ndarray, "frame height width 3"]:
    """The clips of x0-hat of all problems at one decoded step, side by side, as frames of a video.

    index: of the step in `film.steps`.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(2.4 * len(film.rows), 2.9), dpi=100)
        FigureCanvasAgg(figure)
        figure.subplots_adjust(0.01, 0.09, 0.99, 0.83, wspace=0.04)
        figure.suptitle(f"x0-hat, step {film.steps[index]}", fontsize=10)
        panels = figure.subplots(1, len(film.rows), squeeze=False)[0]
        for axes, row in zip(panels, film.rows, strict=True):
            _image(axes, row.clips[index, 0])
            axes.set_title(row.title)
            _mark_pick(axes, row, index)
        moving = [artist for axes in panels for artist in (*axes.images, *axes.patches, *axes.spines.values())]
        for artist in moving:
            artist.set_animated(True)  # left out of `draw`: the text is drawn once
        figure.canvas.draw()
        still, frames = figure.canvas.copy_from_bbox(figure.bbox), []
        for number in range(film.rows[0].clips.shape[1]):
            figure.canvas.restore_region(still)
            for axes, row in zip(panels, film.rows, strict=True):
                axes.images[0].set_data(row.clips[index, number])
            for artist in moving:
                figure.draw_artist(artist)
            frames.append(np.array(figure.canvas.buffer_rgba())[..., :3])
    return np.stack(frames)


def _mark_pick(axes: Axes, row: FilmRow, index: int) -> None:
    """Names the candidate with the highest score at a decoded step, and outlines it."""
    pick = row.picks[index]
    if row.regions:
        axes.add_patch(_box(row.regions[pick], row.frames[index], row.colour(pick)))
    axes.set_xlabel(f"candidate {pick}", color=row.colour(pick), labelpad=2)


def _ending(row: FilmRow) -> str:
    video = "video none" if row.model_answer is None else f"video {row.model_answer}"
    return video if row.answer is None else f"answer {row.answer}, {video}"


def _image(axes: Axes, image: UInt8[np.ndarray, "height width 3"]) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color="#bbbbbb", linewidth=0.6)


def _box(box: Box, image: UInt8[np.ndarray, "height width 3"], colour: str) -> Rectangle:
    """The outline of a candidate, with a white rim that makes it visible on any background."""
    height, width = image.shape[:2]
    x0, y0, x1, y1 = box[0] * width - 0.5, box[1] * height - 0.5, box[2] * width - 0.5, box[3] * height - 0.5
    rim = [withStroke(linewidth=3.5, foreground="white")]
    style = {"edgecolor": colour, "linewidth": 2, "path_effects": rim}
    return Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, **style)


def _legend(figure: Figure, rows: Sequence[FilmRow]) -> None:
    known, free = any(row.answer is not None for row in rows), any(row.answer is None for row in rows)
    entries = [
        (known, "black", "right candidate"),
        (known, RIGHT, "highest score: right"),
        (known, WRONG, "highest score: wrong"),
        (free, FREE, "highest score: several are right"),
    ]
    handles = [Line2D([], [], color=colour, linewidth=2, label=label) for show, colour, label in entries if show]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
