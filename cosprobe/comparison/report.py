"""Report of a comparison: a page in Markdown, numbers, figures, TensorBoard."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console

from cosprobe.activations import StoredSamples, load_samples
from cosprobe.comparison.differences import Compared, RunResult, compare
from cosprobe.comparison.page import (
    HEAD,
    PAGE,
    Settings,
    caveat,
    cells_of,
    how,
    plane,
    said,
    write_comparison_page,
)
from cosprobe.config import TrainRun
from cosprobe.differences import differences
from cosprobe.errors import InputError
from cosprobe.evaluation import ALPHA, Grid, evaluate
from cosprobe.files import make_folder, whole_file, write_json
from cosprobe.probes import ProbeBank, load_probes
from cosprobe.reporting import STYLE, log_figure, markdown_table, new_figure, open_table
from cosprobe.runs import REPORT, mark_finished
from cosprobe.tasks import ANSWER_ROLES, Role

COMPARE = "compare"
NUMBERS, SUMMARY = "compare.json", "compare.md"
ROWS = 3  # targets in a figure
LONGEST = 80  # letters of the name of the folder
DIVERGING = LinearSegmentedColormap.from_list("difference", ["#a6761d", "#ffffff", "#08306b"])  # as on the page
PLACES = ("run_dir", "store")  # settings that say where a result is


Finished = tuple[Path, TrainRun]  # the folder of a result, and its settings


def compare_runs(runs: Sequence[Finished], seed: int = 0, made_by: str = "") -> Path:
    """Compares each run with the first one, writes the report into the first one's result, and returns its folder.

    runs: the folder and the settings of each result. made_by: the command.
    Predictions are made from stored activations; nothing is sampled. Raises InputError for runs on different tasks.
    """
    (first, trained), *_ = runs
    kinds = [type(settings.task).__name__.removesuffix("Config").lower() for _, settings in runs]
    for (folder, _), kind in zip(runs, kinds, strict=True):
        if kind != kinds[0]:
            raise InputError(
                f"runs: {str(folder)!r} is on the task {kind}, {str(first)!r} on {kinds[0]}; expected runs on one task"
            )
    named = names([folder for folder, _ in runs])
    banks = [load_probes(folder) for folder, _ in runs]
    base, *others = [
        _result(folder, settings, bank, name) for (folder, settings), bank, name in zip(runs, banks, named, strict=True)
    ]
    found = [compare(base, other, seed) for other in others]
    changed = [
        [each for each in differences(asdict(trained), asdict(settings)) if each[0] not in PLACES]
        for _, settings in runs[1:]
    ]
    place = write_comparison(found, changed, [folder for folder, _ in runs], made_by)
    mark_finished(place, banks[0].fingerprint, made_by=made_by)
    print_comparison(found, place / PAGE)
    return place


def _result(folder: Path, trained: TrainRun, bank: ProbeBank, name: str) -> RunResult:
    """Predicts the test samples of a run with its probes."""
    bank.check_result(trained, Grid.load(folder).provenance["bank"], folder)
    stored = StoredSamples.load(folder)
    samples, _, experts = load_samples(stored, bank.folds)
    total = stored.store.settings["pipeline"]["steps"]
    return RunResult.of(name, evaluate(samples, experts, bank), stored.store.captured["depth"], total)


def names(folders: Sequence[Path]) -> list[str]:
    """A short name for each result: the last part of its path that differs from those of the others, or two parts."""
    short = [folder.resolve().parent.name for folder in folders]
    count = Counter(short)
    return [
        name if count[name] == 1 else f"{name} {folder.resolve().name}"
        for name, folder in zip(short, folders, strict=True)
    ]


def folder_name(others: Sequence[str]) -> str:
    """The folder of a report: `compare-` and the names of the runs that the first one was compared with."""
    name = "-".join([COMPARE, *(other.replace(" ", "-") for other in others)])
    return name if len(name) <= LONGEST else f"{COMPARE}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def write_comparison(
    found: Sequence[Compared], changed: Sequence[Settings], runs: Sequence[Path], made_by: str
) -> Path:
    """Writes numbers, figures, summary and page into a folder of the report of the base run, and returns that folder.

    changed: for each of `found`, the settings that differ, with both values. runs: folders of the results, the base run
    first. made_by: the command.
    """
    folder = runs[0]
    place = folder / REPORT / folder_name([one.other for one in found])
    make_folder(place)
    listed = []
    for one, settings in zip(found, changed, strict=True):
        name = one.other.replace(" ", "-")
        with whole_file(place / f"{name}.nc") as part:
            one.cells.to_netcdf(part)
        with rc_context(STYLE), whole_file(place / f"{name}.png") as part:
            figure(one).savefig(part)
        log_figure(place / f"{name}.png", f"{COMPARE} {one.other}", folder / "tensorboard")
        listed.append({
            "base": one.base, "other": one.other, "paired": one.paired, "said": said(one),
            "rows": [asdict(row) for row in one.rows], "settings": [list(each) for each in settings],
        })  # fmt: skip
    write_json(place / NUMBERS, {"compared": listed})
    with whole_file(place / SUMMARY) as part:
        part.write_text("\n".join(summary(found, changed)) + "\n")
    write_comparison_page(found, changed, runs, place, made_by)
    return place


def summary(found: Sequence[Compared], changed: Sequence[Settings]) -> list[str]:
    """The comparison in Markdown, as lines."""
    lines = [f"# Comparison with {found[0].base}", "", caveat(found[0]), ""]
    for one, settings in zip(found, changed, strict=True):
        name = one.other.replace(" ", "-")
        lines += [f"## {one.other}", "", *(f"* {line}" for line in said(one)), "", how(one), ""]
        lines += [*markdown_table(HEAD, *(cells_of(row) for row in one.rows)), ""]
        lines += ["Settings that differ:", ""] if settings else ["All settings agree.", ""]
        if settings:
            lines += [*markdown_table(("setting", one.base, one.other), *settings), ""]
        lines += [
            f"![{name}.png]({name}.png)",
            "",
            f"Accuracy on test problems: {one.base} (left), {one.other} (middle), and the difference (right). A dot "
            f"marks a cell with a difference after correction for all cells. `{name}.nc` has the numbers.",
            "",
        ]
    return lines


def print_comparison(found: Sequence[Compared], written: Path, console: Console | None = None) -> None:
    """Prints a table and the sentences of every comparison."""
    console = console or Console()
    for one in found:
        table = open_table()
        for name in (HEAD[0], one.base, one.other, *HEAD[3:]):
            table.add_column(name, overflow="fold")
        for row in one.rows:
            table.add_row(*cells_of(row))
        console.print(table)
        for line in said(one):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"\npage: {written}", highlight=False, markup=False, soft_wrap=True)


# figure


def shown_targets(one: Compared) -> list[str]:
    """The targets of a figure: answers and memory first, at most ROWS."""
    roles = [*ANSWER_ROLES, Role.MEMORY, Role.PERCEPTION, Role.NUISANCE, Role.CONTROL]
    order = {str(role): i for i, role in enumerate(roles)}
    listed = one.cells.target.values.tolist()
    return sorted(listed, key=lambda name: order[str(one.cells.role.sel(target=name).values)])[:ROWS]


def figure(one: Compared) -> Figure:
    """Three maps per target: accuracy of both runs, and the difference."""
    targets = shown_targets(one)
    sheet = new_figure(8.0, 0.7 + 2.2 * len(targets))
    panels = sheet.subplots(len(targets), 3, squeeze=False)
    whole = Normalize(0, 1)
    largest = max(0.1, float(np.nanmax(np.abs(one.cells.difference.sel(target=targets)))))
    apart = Normalize(-largest, largest)
    for row, target in zip(panels, targets, strict=True):
        shown = plane(one, target)
        for axes, name, colours, scale in zip(
            row, ("base", "other", "difference"), ("Blues", "Blues", DIVERGING), (whole, whole, apart), strict=True
        ):
            axes.pcolormesh(np.ma.masked_invalid(shown[name].values), cmap=colours, norm=scale)
            _axis(axes, shown, "other_" if name == "other" else "", target == targets[-1])
        row[0].set_ylabel(f"{target}: layer (block output)")
        clear = np.argwhere(shown.p.values <= ALPHA)
        row[2].plot(clear[:, 1] + 0.5, clear[:, 0] + 0.5, "o", color="black", markeredgecolor="white", markersize=4)
    panels[0, 0].set_title(f"accuracy of {one.base}", loc="left")
    panels[0, 1].set_title(f"accuracy of {one.other}", loc="left")
    panels[0, 2].set_title("difference", loc="left")
    for axes, name in zip(panels[-1], (one.base, one.other, one.base), strict=True):
        axes.set_xlabel(f"denoising step of {name}")
    sheet.colorbar(ScalarMappable(whole, "Blues"), ax=panels[:, :2], label="test accuracy", pad=0.01, aspect=25)
    bar = sheet.colorbar(ScalarMappable(apart, DIVERGING), ax=panels[:, 2], pad=0.02, aspect=25)
    bar.set_label(f"{one.other} minus {one.base}")
    dot = Line2D([], [], marker="o", color="black", markeredgecolor="white", markersize=5, linestyle="none")
    said = f"the runs differ (p ≤ {ALPHA} after correction for all cells)"
    sheet.legend([dot], [said], loc="outside lower right", frameon=False)
    return sheet


def _axis(axes: Axes, plane: xr.Dataset, of: str, steps: bool) -> None:
    """Ticks at steps and layers. of: `other_` for those of the other run. steps: whether steps are named."""
    for axis, known in ((axes.xaxis, plane[f"{of}step"].values), (axes.yaxis, plane[f"{of}layer"].values)):
        shown = range(0, len(known), max(1, -(-len(known) // 8)))
        axis.set_ticks([i + 0.5 for i in shown], [str(known[i]) for i in shown])
    axes.tick_params(length=2, labelbottom=steps)
