"""A figure with one problem of every task and its reference video.

`python -m cosprobe.reporting.gallery FILE`
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cosprobe.errors import InputError
from cosprobe.files import whole_file
from cosprobe.tasks import FAMILIES, Problem, Task

FRAMES = 5  # frames per video, evenly spaced from the first to the last
WIDTH, SIDE, GAP, LEFT, LINE = 8.0, 1.42, 0.06, 0.58, 0.17  # inches: figure, picture, between, margin, line of text


def gallery(shown: Sequence[tuple[Task, Problem]]) -> Figure:
    """One row per problem: frames of its reference video, with the name of its task at the left and its prompt below.

    The figure is 8 inches wide. Only the first row has the numbers of the frames. Raises InputError for videos of
    unequal lengths.
    """
    lengths = {task.frames for task, _ in shown}
    if len(lengths) != 1:
        raise InputError(f"videos of {sorted(lengths)} frames: expected problems whose videos have the same length")
    prompts = [wrap(problem.prompt, 108) for _, problem in shown]
    lines = max(map(len, prompts))
    row, top = SIDE + 0.16 + LINE * lines, 0.26
    height = top + row * len(shown)
    figure = Figure(figsize=(WIDTH, height), dpi=200)
    FigureCanvasAgg(figure)
    frames = [round(i * (min(lengths) - 1) / (FRAMES - 1)) for i in range(FRAMES)]
    for i, ((task, problem), prompt) in enumerate(zip(shown, prompts, strict=True)):
        video, y = task.video(problem), height - top - row * i - SIDE
        for k, frame in enumerate(frames):
            x = LEFT + k * (SIDE + GAP)
            axes = figure.add_axes((x / WIDTH, y / height, SIDE / WIDTH, SIDE / height), xticks=[], yticks=[])
            axes.imshow(video[frame], interpolation="nearest")
            axes.spines[:].set(color="#bbbbbb", linewidth=0.6)
            if i == 0:
                axes.set_title("first frame" if k == 0 else f"frame {frame}", fontsize=9, pad=4)
            if k == 0:
                axes.set_ylabel(task.name, fontsize=11, fontweight="bold", labelpad=6)
        text = "\n".join(prompt)
        figure.text(LEFT / WIDTH, (y - 0.05) / height, text, fontsize=9, va="top", style="italic", color="#222222")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: writes the figure to a file."""
    parser = ArgumentParser("python -m cosprobe.reporting.gallery", description=__doc__)
    parser.add_argument("file", help="file to write, such as docs/figures/families.png")
    tasks = [settings(image_size=128).build() for settings in FAMILIES.values()]
    figure = gallery([(task, task.problems("test", 1)[0]) for task in tasks])
    with whole_file(Path(parser.parse_args(argv).file)) as part:
        figure.savefig(part)


if __name__ == "__main__":
    main()
