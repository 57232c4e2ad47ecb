"""Report of other numbers of frames and steps: a page in Markdown, numbers, a figure, TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from cosprobe.activations import Sampler
from cosprobe.behaviour.lengths import Lengths, Setting, claims, sample_lengths
from cosprobe.config import LengthsConfig
from cosprobe.evaluation import LEAST_PROBLEMS, Claim, difference_interval, share_interval
from cosprobe.files import make_folder, whole_file, write_json
from cosprobe.models import pipeline_fingerprint
from cosprobe.probes import ProbeBank
from cosprobe.reporting import STYLE, log_figure, markdown_table, new_figure, open_table
from cosprobe.runs import REPORT
from cosprobe.runtime import rank_and_world
from cosprobe.tasks import TaskConfig

NUMBERS, PAGE, PICTURE = "lengths.json", "lengths.md", "lengths.png"
HEAD = ("setting", "right [95 %]", "no answer", "minus own [95 %]", "answer of own [95 %]", "evaluations", "cost")
CLAIMS = ("claim", "measured", "compared with", "difference [95 %]", "verdict")
COLOUR, OWN = "#0072b2", "#d55e00"


def compare_lengths(
    sampler: Sampler, task: TaskConfig, bank: ProbeBank, use: LengthsConfig, seed: int, folder: Path
) -> None:
    """Samples new problems with other numbers of frames and steps, and writes the report.

    sampler: the loaded pipeline and the task of the run. task: settings of that task. folder: of the result. With
    several processes, all of them sample, and the first one writes.
    Raises InputError when the bank was made for another model, and as `sample_lengths` does.
    """
    bank.check_model(pipeline_fingerprint(sampler.model), "the loaded pipeline")
    found = sample_lengths(sampler, task, bank, use, seed, folder)
    if rank_and_world()[0] == 0:
        print_lengths(found, write_lengths(found, folder / REPORT / use.report, folder / "tensorboard"))


def write_lengths(found: Lengths, place: Path, tensorboard: Path) -> Path:
    """Writes lengths.json, lengths.png and lengths.md to `place`, and the figure to TensorBoard. Returns the page."""
    make_folder(place)
    write_json(place / NUMBERS, numbers(found))
    with rc_context(STYLE), whole_file(place / PICTURE) as part:
        figure(found).savefig(part)
    log_figure(place / PICTURE, "lengths", tensorboard)
    with whole_file(place / PAGE) as part:
        part.write_text("\n".join(page(found)) + "\n")
    return place / PAGE


def numbers(found: Lengths) -> dict[str, Any]:
    """All numbers, for JSON. Claims stand as in other reports."""
    count = len(found.problems)
    rows = [
        {
            "setting": str(s),
            "frames": s.frames,
            "steps": s.steps,
            "another_noise_seed": s.again,
            "gflop": found.gflop[s],
        }
        | {"cost": found.cost(s), "evaluations": s.steps, "no_answer": float((found.answers[s] < 0).mean())}
        | {name: list(ends) for name, ends in _estimates(found, s).items()}
        for s in found.settings
    ]
    stated = [{n: None if v != v else v for n, v in asdict(claim).items()} for claim in claims(found)]  # NaN
    about = {"about": f"{found.kind}: lengths", "task": found.task, "n": count, "trial": count < LEAST_PROBLEMS}
    trained = None if found.clips is None else {str(frames): clips for frames, clips in found.clips.items()}
    answers = {str(s): found.answers[s].tolist() for s in found.settings}
    names = [problem.name for problem in found.problems]
    return about | {"claims": stated, "settings": rows, "clips": trained, "problems": names, "answers": answers}


def page(found: Lengths) -> list[str]:
    """Lines of the page."""
    return [
        f"# Numbers of frames and steps: {found.task}, kind {found.kind}",
        "",
        *about(found),
        "",
        *markdown_table(CLAIMS, *map(claim_row, claims(found))),
        "",
        f"![{PICTURE}]({PICTURE})",
        "",
        *markdown_table(HEAD, *(row(found, setting) for setting in found.settings)),
        "",
        "`minus own`: share right minus that of the run's own setting, problem by problem. `answer of own`: share of "
        "videos that show the answer of the run's own setting, or none where that shows none. `evaluations`: of the "
        "network, for one video. `cost`: counted operations with decoding, as a multiple of the run's own. Intervals "
        "of the table are not corrected for each other; claims are corrected for the settings that they compare.",
        "",
        f"`{NUMBERS}` has the table, the claims and every answer.",
    ]


def about(found: Lengths) -> list[str]:
    """What was sampled, and what the model was trained on."""
    lines = [
        f"{len(found.problems)} new problems at the run's own setting ({found.own}), with other numbers of frames, and "
        "with other numbers of steps. The noise of a seed is the same for any number of steps. With another number of "
        "frames it is another draw, so compare with the row of another noise seed.",
        "",
    ]
    if found.clips is None:
        return [
            *lines,
            "The numbers of frames that the model was trained on are not known here. A number that it was not trained "
            "on is out of distribution: then the comparison is about training, not about frames as a workspace.",
        ]
    clips = ", ".join(f"{count} of {frames} frames" for frames, count in found.clips.items())
    foreign = sorted({s.frames for s in found.settings} - set(found.clips))
    outside = f" It was not trained on {', '.join(map(str, foreign))} frames." if foreign else ""
    return [
        *lines,
        f"Clips in the last training of the model: {clips}.{outside} A number of frames with few clips may be less "
        "accurate for this reason alone. The model was not distilled: it was trained for no number of steps.",
    ]


def claim_row(claim: Claim) -> list[str]:
    """Cells of the table of claims."""
    return [claim.claim, claim.measure, claim.control, claim.estimate, claim.verdict]


def row(found: Lengths, setting: Setting) -> list[str]:
    """Cells of the table of settings."""
    ends = {name: _text(*values, signed=name == "minus_own") for name, values in _estimates(found, setting).items()}
    none = f"{(found.answers[setting] < 0).mean():.2f}"
    compared = ["", ""] if setting == found.own else [ends["minus_own"], ends["same"]]
    return [str(setting), ends["right"], none, *compared, str(setting.steps), f"{found.cost(setting):.2f}"]


def print_lengths(found: Lengths, written: Path, console: Console | None = None) -> None:
    """Prints both tables and the path of the page."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=max(160, console.width))
    for head, rows in (
        (HEAD, [row(found, setting) for setting in found.settings]),
        (CLAIMS, [claim_row(claim) for claim in claims(found)]),
    ):
        table = open_table()
        for name in head:
            table.add_column(name)
        for cells in rows:
            table.add_row(*cells)
        console.print(table)
    for line in filter(None, about(found)):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"\npage: {written}", highlight=False, soft_wrap=True)


def figure(found: Lengths) -> Figure:
    """Share of right answers over numbers of frames and over numbers of steps."""
    sheet = new_figure(8.0, 3.8)
    panels = sheet.subplots(1, 2, sharey=True)
    for axes, axis in zip(panels, ("frames", "steps"), strict=True):
        _line(axes, found, axis)
    panels[0].set_ylabel("share of videos with a right answer")
    sheet.suptitle(
        f"{found.task}, {found.kind}: {len(found.problems)} problems, the same at every setting, with 95 % intervals\n"
        "diamond: the run's own setting (open: another noise seed)",
        x=0.01, ha="left", fontsize=9,
    )  # fmt: skip
    return sheet


def _line(axes: Axes, found: Lengths, axis: str) -> None:
    settings = found.along(axis)
    places = np.arange(len(settings))
    points = [*zip(places, settings, strict=True), (places[settings.index(found.own)] + 0.15, found.settings[1])]
    for place, setting in points:
        mean, lower, upper = _estimates(found, setting)["right"]
        own = (setting.frames, setting.steps) == (found.own.frames, found.own.steps)
        axes.errorbar(
            [place], [mean], ([mean - lower], [upper - mean]), color=OWN if own else COLOUR, capsize=3, elinewidth=1.2,
            marker="D" if own else "o", markersize=6, markerfacecolor="white" if setting.again else None,
        )  # fmt: skip
    axes.plot(places, [found.right[s].mean() for s in settings], color=COLOUR, linewidth=1, zorder=0)
    clips = found.clips if axis == "frames" else None
    labels = [f"{getattr(s, axis)}\ncost {found.cost(s):.2f}" for s in settings]
    if clips is not None:
        labels = [f"{label}\n{clips.get(s.frames, 0):,} clips" for label, s in zip(labels, settings, strict=True)]
    axes.set_xticks(places, labels)
    axes.set_xlim(-0.5, len(settings) - 0.5)
    other = "steps" if axis == "frames" else "frames"
    trained = "; clips: in training" if clips is not None else ""
    axes.set_xlabel(f"number of {axis} (cost: the run's own is 1{trained})")
    axes.set_title(f"other numbers of {axis}, {getattr(found.own, other)} {other}", loc="left")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)


def _estimates(found: Lengths, setting: Setting) -> dict[str, tuple[float, float, float]]:
    """Share right, difference from the run's own setting, and share with the same answer, each with its interval."""
    keys, right, same = found.keys, found.right[setting].astype(float), found.same(setting)
    minus = found.difference(setting, found.own)
    bounds = share_interval(np.stack([right, same]), keys)
    difference = difference_interval(minus[None], keys)
    ends: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]] = (
        (right, bounds[0][0], bounds[1][0]),
        (minus, difference[0][0], difference[1][0]),
        (same, bounds[0][1], bounds[1][1]),
    )
    return {
        name: (float(values.mean()), float(lower), float(upper))
        for name, (values, lower, upper) in zip(("right", "minus_own", "same"), ends, strict=True)
    }


def _text(mean: float, lower: float, upper: float, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{mean:{sign}.2f} [{lower:{sign}.2f}, {upper:{sign}.2f}]"
