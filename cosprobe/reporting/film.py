"""The x0-hat film strip: what the model would draw if it had to stop, step by step, for a few problems.

One row per problem: the given first frame, then the last frame of the decoded x0-hat at each decoded step, with
the candidate that a forced choice reads from it boxed. Candidates go by their index in the task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from cosprobe.activations import ProbeSamples, decode_steps, watch
from cosprobe.errors import InputError
from cosprobe.models import PipelineConfig
from cosprobe.tasks import Box, Problem, Sample, Task

RIGHT, WRONG, FREE = "#009e73", "#cc3311", "#0072b2"  # green, red and blue that stay apart for every eye
STYLE = {"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8.5}
PER_ROW = 8  # images side by side; more steps than fit are thinned out


@dataclass(frozen=True)
class FilmRow:
    """One problem. title: what it shows, e.g. `right`, `wrong`, `choice`. frames: last frame of x0-hat at each
    decoded step. picks: candidate a forced choice reads at each of them. regions: box of every candidate, as
    fractions of the image. answer: the right candidate, None where several are. drawn: the candidate the finished
    video ends on, None for none."""

    title: str
    first_frame: UInt8[np.ndarray, "height width 3"]
    frames: UInt8[np.ndarray, "step height width 3"]
    picks: tuple[int, ...]
    regions: tuple[Box, ...] = ()
    answer: int | None = None
    drawn: int | None = None

    def colour(self, pick: int) -> str:
        return FREE if self.answer is None else RIGHT if pick == self.answer else WRONG


@dataclass(frozen=True)
class Film:
    """Rows that share their decoded steps (step indices)."""

    rows: tuple[FilmRow, ...]
    steps: tuple[int, ...]


def record(
    model: Any, pipeline: PipelineConfig, task: Task, drawn: Sequence[Sample], samples: ProbeSamples, spec: str
) -> Film | None:
    """Samples three test problems again and watches them: the first the model solved, the first it did not, and
    the first solved one with several right answers; fewer when there is none of a sort, None without any.

    drawn: what `samples` were collected from, in order. spec: steps to decode, as in `probe.decode`.
    """
    several = np.array([len(task.solutions(sample.problem)) > 1 for sample in drawn])
    solved = samples.scores["solved"].astype(bool)
    sorts = {"right": solved & ~several, "wrong": ~solved & ~several, "choice": solved & several}
    ends = [None] * len(drawn) if samples.choice is None else [None if c < 0 else int(c) for c in samples.choice]
    test = samples.split == "test"
    chosen = {title: int(np.flatnonzero(test & sort)[0]) for title, sort in sorts.items() if (test & sort).any()}
    if not chosen:
        return None
    steps = decode_steps(spec, pipeline.steps)
    watched = watch(model, pipeline, task, [drawn[i] for i in chosen.values()], steps)
    rows = [
        film_row(task, title, drawn[i].problem, clips, ends[i])
        for (title, i), clips in zip(chosen.items(), watched, strict=True)
    ]
    return Film(tuple(rows), steps)


def film_row(
    task: Task, title: str, problem: Problem, clips: Float[np.ndarray, "step frame height width 3"], drawn: int | None
) -> FilmRow:
    """A watched problem. clips: x0-hat decoded, in [0, 1]; drawn: where the finished video ends, None for nowhere."""
    return FilmRow(
        title,
        task.image(problem),
        (clips[:, -1] * 255).round().astype(np.uint8),
        tuple(task.readout(problem, clip).forced for clip in clips),
        problem.regions if task.candidates == task.regions else (),
        problem.answer,
        drawn,
    )


def film_strip(rows: Sequence[FilmRow], steps: Sequence[int]) -> Figure:
    """The strip as a figure 8 inches wide. Of more than seven steps, seven evenly spaced ones are shown.

    Raises ValueError for no rows, or a row whose frames or picks are not one per step.
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
                colour = row.colour(row.picks[i])
                if row.regions:
                    axes.add_patch(_box(row.regions[row.picks[i]], row.frames[i], colour))
                axes.set_xlabel(f"candidate {row.picks[i]}", color=colour, labelpad=2)
            line[0].set_xlabel(_ending(row), labelpad=2)
        panels[0, 0].set_title("first frame")
        for k, i in enumerate(shown):
            panels[0, k + 1].set_title(f"x0-hat, step {steps[i]}" if k == 0 else f"step {steps[i]}")
        _legend(figure, rows)
    return figure


def _ending(row: FilmRow) -> str:
    drawn = "drew none" if row.drawn is None else f"drew {row.drawn}"
    return drawn if row.answer is None else f"answer {row.answer}, {drawn}"


def _image(axes: Axes, image: UInt8[np.ndarray, "height width 3"]) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color="#bbbbbb", linewidth=0.6)


def _box(box: Box, image: UInt8[np.ndarray, "height width 3"], colour: str) -> Rectangle:
    """The outline of a candidate, with a white rim so that it shows on any picture."""
    height, width = image.shape[:2]
    x0, y0, x1, y1 = box[0] * width - 0.5, box[1] * height - 0.5, box[2] * width - 0.5, box[3] * height - 0.5
    rim = [withStroke(linewidth=3.5, foreground="white")]
    look = {"edgecolor": colour, "linewidth": 2, "path_effects": rim}
    return Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, **look)


def _legend(figure: Figure, rows: Sequence[FilmRow]) -> None:
    known, free = any(row.answer is not None for row in rows), any(row.answer is None for row in rows)
    entries = [
        (known, "black", "the right candidate"),
        (known, RIGHT, "forced choice, right"),
        (known, WRONG, "forced choice, wrong"),
        (free, FREE, "forced choice, several are right"),
    ]
    handles = [Line2D([], [], color=colour, linewidth=2, label=label) for show, colour, label in entries if show]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
