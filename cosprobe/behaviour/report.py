"""Report of the behaviours: a page in Markdown, numbers, a figure, TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console

from cosprobe.activations import Sampler, StoredSamples, load_samples
from cosprobe.behaviour.along_steps import TRACE
from cosprobe.behaviour.continuations import Continuations, film_examples, sample_continuations
from cosprobe.behaviour.findings import Behaviours, Example, Finding, Group
from cosprobe.behaviour.measure import measure
from cosprobe.config import BehaviourConfig
from cosprobe.evaluation import Grid, evaluate
from cosprobe.evaluation.checks import weights_lines
from cosprobe.files import make_folder, whole_file, write_json
from cosprobe.models import pipeline_fingerprint
from cosprobe.probes import ProbeBank
from cosprobe.reporting import STYLE, film_strip, log_figure, markdown_table, new_figure, open_table
from cosprobe.runs import REPORT
from cosprobe.runtime import rank_and_world
from cosprobe.tasks import TaskConfig

BEHAVIOUR = "behaviour"
NUMBERS, CURVES, PAGE, PICTURE = "behaviour.json", "behaviour.nc", "behaviour.md", "behaviour.png"
EXAMPLES = "examples.png"
HEAD = ("behaviour", "kind or targets", "claim", "measured", "compared with", "difference [95 %]", "n", "verdict")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
STEP = "denoising step (0 = noisiest)"
FILLED: dict[str, Any] = {"linestyle": "-", "marker": "o", "markersize": 4.5}
OPEN: dict[str, Any] = {"linestyle": "--", "marker": "s", "markersize": 3.5, "markerfacecolor": "white"}


def show_behaviours(
    folder: Path,
    bank: ProbeBank,
    report: str = BEHAVIOUR,
    continued: Sequence[Continuations] | None = None,
) -> Behaviours:
    """Measures the behaviours of a finished result from its stored activations, writes the report and prints it.

    folder: of the result. report: name of the folder of the report. continued: see `measure`.
    """
    stored = StoredSamples.load(folder)
    samples, _, experts = load_samples(stored, bank.folds)
    evaluated, grid = evaluate(samples, experts, bank), Grid.load(folder)
    found = measure(samples, evaluated, bank, grid, weights_lines(stored, samples, bank), continued)
    print_behaviours(found, write_behaviours(found, folder, report))
    return found


def sample_behaviours(
    sampler: Sampler,
    task: TaskConfig,
    bank: ProbeBank,
    use: BehaviourConfig,
    seed: int,
    folder: Path,
) -> None:
    """Samples fresh continuations of new problems, and measures all behaviours. See `sample_continuations`.

    sampler: the loaded pipeline and the task of the run. task: settings of that task. With several processes, all of
    them sample, and the first one writes. Raises InputError when the bank was made for another model.
    """
    bank.check_model(pipeline_fingerprint(sampler.model), "the loaded pipeline")
    continued = sample_continuations(sampler, task, bank, use, seed, folder)
    if rank_and_world()[0]:
        return
    found = show_behaviours(folder, bank, use.report, continued)
    film = film_examples(sampler, found.examples or (), continued[0].steps, seed)
    if film is not None:
        with whole_file(folder / REPORT / use.report / EXAMPLES) as part:
            film_strip(film.rows, film.steps).savefig(part)


def write_behaviours(found: Behaviours, folder: Path, report: str = BEHAVIOUR) -> Path:
    """Writes numbers, curves, figure and page to `folder`/report/`report`, and the figure to TensorBoard. Returns the
    page. folder: of the result."""
    place = folder / REPORT / report
    make_folder(place)
    listed = []
    for finding in found.findings:
        numbers = {name: None if value != value else value for name, value in asdict(finding.claim).items()}  # NaN
        about = f"{finding.about}: {finding.behaviour}"
        listed.append({"about": about, "n": finding.n, "problems": finding.problems} | numbers)
    content: dict[str, Any] = {
        "claims": listed,
        "sentences": found.sentences,
        "groups": [asdict(group) for group in found.groups],
    }
    if found.examples is not None:
        content["examples"] = [
            {name: value for name, value in vars(e).items() if name != "problem"} | {"problem": e.problem.name}
            for e in found.examples
        ]
    write_json(place / NUMBERS, content)
    with whole_file(place / CURVES) as part:
        found.curves.to_netcdf(part)
    with rc_context(STYLE), whole_file(place / PICTURE) as part:
        figure(found.curves).savefig(part)
    log_figure(place / PICTURE, BEHAVIOUR, folder / "tensorboard")
    with whole_file(place / PAGE) as part:
        part.write_text("\n".join(page(found)) + "\n")
    return place / PAGE


def page(found: Behaviours) -> list[str]:
    """Lines of the page."""
    lines = ["# Behaviours along denoising steps", ""]
    for name, (first, caveat) in found.sentences.items():
        lines += [f"* **{name}**: {first} {caveat}"]
    lines += [
        "",
        "`holds`: the 95 % interval is above zero; exploration and memory need a corrected p of at most 0.05 too. "
        "`does not hold`: the interval is below zero. `described only`: there is nothing to compare with. Correlations "
        "of a kind are corrected for each other, and steps of which the clearest counts; other claims are not.",
        "",
        *markdown_table(HEAD, *(row(finding) for finding in found.findings)),
        "",
        f"![{PICTURE}]({PICTURE})",
        "",
        *group_lines(found.groups),
        *example_lines(found.examples),
        f"`{CURVES}` has the curves, `{NUMBERS}` the tables.",
    ]
    return lines


def group_lines(groups: Sequence[Group]) -> list[str]:
    """The section with numbers by difficulty; empty without groups."""
    if not groups:
        return []
    names = list(dict.fromkeys(name for group in groups for name in group.shares))
    head = ("kind", "problems", "n", *names, "x0-hat: wrong to right, right to wrong")
    rows = [
        [group.kind, group.about, str(group.n)]
        + [f"{m:.2f} [{a:.2f}, {b:.2f}]" for m, a, b in (group.shares.get(n, (np.nan,) * 3) for n in names)]
        + ["" if group.changes is None else f"{group.changes[0]}, {group.changes[1]}"]
        for group in groups
    ]
    rows = [["" if cell.startswith("nan") else cell for cell in cells] for cells in rows]
    return [
        "## By difficulty",
        "",
        "Shares of the samples of a group, with 95 % intervals. Groups overlap: each difficulty divides all samples of "
        "a kind. Intervals of groups are not corrected for each other.",
        "",
        *markdown_table(head, *rows),
        "",
    ]


def example_lines(examples: Sequence[Example] | None) -> list[str]:
    """The section with corrected answers; empty where none were looked for."""
    if examples is None:
        return []
    title = ["## Corrected answers, the most clearly wrong first", ""]
    if not examples:
        return [*title, "No x0-hat shows a wrong answer where the finished video shows a right one.", ""]
    head = ("problem", "step", "x0-hat shows", "finished video", "with fresh noise", "score wrong minus right")
    rows = [
        [e.problem.name, str(e.step), str(e.shown), str(e.answer), "none" if e.fresh < 0 else str(e.fresh),
         f"{e.margin:+.2f}"]
        for e in examples
    ]  # fmt: skip
    return [*title, *markdown_table(head, *rows), "", f"![{EXAMPLES}]({EXAMPLES})", ""]


def row(finding: Finding) -> list[str]:
    """Cells of the table of claims."""
    claim = finding.claim
    n = str(finding.n) if finding.n else ""
    texts = (claim.claim, claim.measure, claim.control, claim.estimate)
    return [finding.behaviour, finding.about, *texts, n, claim.verdict]


def print_behaviours(found: Behaviours, written: Path, console: Console | None = None) -> None:
    """Prints the claims and two sentences for each behaviour."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=max(160, console.width))
    table = open_table()
    shown = [i for i, name in enumerate(HEAD) if name != "n"]
    for i in shown:
        table.add_column(HEAD[i])
    for finding in found.findings:
        table.add_row(*(row(finding)[i] for i in shown))
    console.print(table)
    for name, (first, caveat) in found.sentences.items():
        console.print(f"{name}: {first} {caveat}", highlight=False, soft_wrap=True)
    console.print(f"\npage: {written}", highlight=False, soft_wrap=True)


# figure


def figure(curves: xr.Dataset) -> Figure:
    """What x0-hat shows, how sure the probe is, when answers settle, and accuracy over layers."""
    sheet = new_figure(8.0, 6.6)
    grid = sheet.subplots(2, 2)
    kinds = [str(name).removeprefix("live_") for name in curves.data_vars if str(name).startswith("live_")]
    _drawn(grid[0, 0], curves, kinds)
    _live(grid[0, 1], curves, kinds)
    _settled(grid[1, 0], curves, kinds)
    _layers(grid[1, 1], curves)
    for axes in grid.ravel():
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
            axes.set_xlim(axes.dataLim.x0 - 0.4, axes.dataLim.x1 + 0.4)  # no tick after the last step
        else:
            axes.text(0.5, 0.5, "not in this run", ha="center", va="center", transform=axes.transAxes, color="#666666")
    return sheet


def _drawn(axes: Axes, curves: xr.Dataset, kinds: Sequence[str]) -> None:
    words = {"drawn": "draws several", "blended": "blends several"}
    for kind, colour in zip(kinds, cycle(COLOURS)):
        for name, style in (("drawn", FILLED), ("blended", OPEN)):
            if f"{name}_{kind}" in curves:
                one = curves[f"{name}_{kind}"]
                axes.plot(one[one.dims[0]], one, color=colour, label=f"{_plain(kind)}: {words[name]}", **style)
    axes.set(xlabel=f"{STEP}; last: finished video", ylabel="share of samples")
    axes.set_ylim(-0.01, max(0.25, axes.get_ylim()[1]))
    axes.set_title(f"x0-hat shows several candidates (traces: {TRACE:g} or more)", loc="left")


def _live(axes: Axes, curves: xr.Dataset, kinds: Sequence[str]) -> None:
    for kind, colour in zip(kinds, cycle(COLOURS)):
        one = curves[f"live_{kind}"]
        axes.plot(one[one.dims[0]], one, color=colour, label=_plain(kind), **FILLED)
    axes.set(xlabel=STEP, ylabel="number of candidates, exp(entropy)")
    axes.set_ylim(0.9, max(2.1, axes.get_ylim()[1]))
    axes.axhline(1, color="#888888", linewidth=0.8)
    axes.set_title("candidates that the probe hesitates between", loc="left")


def _settled(axes: Axes, curves: xr.Dataset, kinds: Sequence[str]) -> None:
    for kind, colour in zip(kinds, cycle(COLOURS)):
        for name, style in (("x0-hat", FILLED), ("the probe", OPEN)):
            if f"settled_{name}_{kind}" in curves:
                one = curves[f"settled_{name}_{kind}"]
                axes.plot(one[one.dims[0]], one, color=colour, label=f"{_plain(kind)}: {name}", **style)
    axes.set(xlabel=f"{STEP}; last: finished video", ylabel="share of samples", ylim=(-0.03, 1.03))
    axes.set_title("the answer no longer changes", loc="left")


def _layers(axes: Axes, curves: xr.Dataset) -> None:
    lines = [str(name) for name in curves.data_vars if str(name).startswith("skill_")]
    for name, colour in zip(lines, cycle(COLOURS)):
        one = curves[name].isel(skill_step=0)
        style = FILLED if "answer" in str(one.attrs["role"]) else OPEN
        axes.plot(curves.skill_layer, one, color=colour, label=name.removeprefix("skill_"), **style)
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set(xlabel="layer (block output)", ylabel="skill (0: chance, 1: always right)")
    axes.set_ylim(min(-0.05, axes.dataLim.y0 - 0.05), 1.05)
    if lines and np.size(curves.skill_step):
        axes.set_title(f"decodable at step {int(curves.skill_step[0])}, by layer", loc="left")


def _plain(kind: str) -> str:
    return kind.replace("_", "-")
