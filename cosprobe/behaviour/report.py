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

from cosprobe.activations import StoredSamples, load_samples
from cosprobe.behaviour.findings import Behaviours, Finding
from cosprobe.behaviour.measure import measure
from cosprobe.evaluation import Grid, evaluate
from cosprobe.files import make_folder, whole_file, write_json
from cosprobe.probes import ProbeBank
from cosprobe.reporting import STYLE, log_figure, markdown_table, new_figure, open_table
from cosprobe.runs import REPORT

BEHAVIOUR = "behaviour"
NUMBERS, CURVES, PAGE, PICTURE = "behaviour.json", "behaviour.nc", "behaviour.md", "behaviour.png"
HEAD = ("behaviour", "kind or targets", "claim", "measured", "compared with", "difference [95 %]", "n", "verdict")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
STEP = "denoising step (0 = noisiest)"
FILLED: dict[str, Any] = {"linestyle": "-", "marker": "o", "markersize": 4.5}
OPEN: dict[str, Any] = {"linestyle": "--", "marker": "s", "markersize": 3.5, "markerfacecolor": "white"}


def show_behaviours(folder: Path, bank: ProbeBank) -> None:
    """Measures the behaviours of a finished result from its stored activations, writes the report and prints it.

    folder: of the result.
    """
    samples, _, experts = load_samples(StoredSamples.load(folder))
    found = measure(samples, evaluate(samples, experts, bank), bank, Grid.load(folder))
    print_behaviours(found, write_behaviours(found, folder))


def write_behaviours(found: Behaviours, folder: Path) -> Path:
    """Writes numbers, curves, figure and page to `folder`/report/behaviour, and the figure to TensorBoard. Returns the
    page. folder: of the result."""
    place = folder / REPORT / BEHAVIOUR
    make_folder(place)
    listed = []
    for finding in found.findings:
        numbers = {name: None if value != value else value for name, value in asdict(finding.claim).items()}  # NaN
        about = f"{finding.about}: {finding.behaviour}"
        listed.append({"about": about, "n": finding.n, "problems": finding.problems} | numbers)
    write_json(place / NUMBERS, {"claims": listed, "sentences": found.sentences})
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
        f"`{CURVES}` has the curves, `{NUMBERS}` the table.",
    ]
    return lines


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
    axes.set_title("x0-hat shows several candidates at once", loc="left")


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
