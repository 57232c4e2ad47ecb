"""What a run found, in words: a table of targets, remarks, what the best cells survive. Markdown and terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cosprobe.activations import RANDOMISED
from cosprobe.evaluation import ALPHA, GUESSES, LEAST_EFFECTIVE, LEAST_PROBLEMS, Best, Grid
from cosprobe.evaluation.checks import TRAINED, Checks
from cosprobe.tasks import HEADLINE, RELABELLED

NONE = "-"
COLUMNS = ("target", "best cell", "accuracy [95 %]", "chance", "best input", "x0-hat shows", "evidence", "n")
WIDTH = 110  # of the printed table where the output is no terminal

CAPTIONS = {
    "headline.png": "Where the answer can be read. One square per layer and denoising step. The colour is skill: the "
    "share of the gap between the strongest input (never below chance) and perfect that a linear probe closes. "
    "Hatched: no evidence that the probe reads more than chance and more than every input, after correction for all "
    "squares. Brown: it reads less than the strongest input, which may be read in a richer form than a layer (the "
    "whole frame, or latent frames side by side). White: as much as that input, however much that is. Orange "
    "outline: the probe reads more than the picture (x0-hat) already shows at that step, after the same correction. "
    "Star: the cell with the best validation accuracy.",
    "curves.png": "Accuracy along the denoising steps, with 95 % intervals by problem, beside the strongest input, "
    "the noisy latent, the input of block 0, chance, and what x0-hat shows.",
    "others.png": "The same maps for targets that are visible in the first frame, for nuisances, and for the control "
    "target, whose labels are random: all of its squares must be hatched. Skill starts at chance here, except for "
    "memory targets, which have to beat the inputs of the frame and region that is read.",
    "generalisation.png": "Frozen probes read where they were not trained: rows name what a probe was trained on, "
    "columns what it is read on. A probe that works on its own step only reads something that other steps hold in "
    "another form or not at all.",
    "checks.png": "For the best cell of each target: accuracy by number of training problems; confidence against "
    "accuracy, with and without the temperature; what the same architecture gives with permuted and fresh weights; and "
    "when each layer becomes readable, beside the picture.",
    "film.png": "What the model would draw if it stopped: the last frame of x0-hat at the decoded steps. Boxed: the "
    "candidate that a forced choice reads from it.",
}
FRAMES_CAPTION = "Where in the video {} can be read: latent frames by layer and by step, through its best cell."


@dataclass(frozen=True)
class SummaryRow:
    """One target at its best cell. inputs, visible: test accuracy and name of the reference of skill and of the visible
    baseline at that step and place, NaN and "" where there is none."""

    best: Best
    where: str
    chance: float
    inputs: tuple[float, str]
    visible: tuple[float, str]
    samples: int
    problems: int
    left_out: int
    elsewhere: int  # cells with evidence, where the best cell has none

    @property
    def found(self) -> bool:
        return self.best.p <= ALPHA

    def cells(self) -> tuple[str, ...]:
        """Text of every column."""
        b = self.best
        none = f"none here, in {self.elsewhere} cells" if self.elsewhere else "no evidence"
        evidence = f"p = {b.p:.3f}" if self.found else none
        accuracy = f"{b.accuracy:.2f} [{b.lower:.2f}, {b.upper:.2f}]"
        named = (self.inputs, self.visible)
        inputs, visible = (f"{value:.2f} {name}" if name and name not in GUESSES else "-" for value, name in named)
        return (b.target, self.where, accuracy, f"{self.chance:.2f}", inputs, visible, evidence, str(self.samples))


def summarise(grid: Grid) -> list[SummaryRow]:
    """One row per target."""
    rows = []
    for target in shown_targets(grid):
        best = grid.best(target)
        cell = grid.at(target, best.cell)
        where = f"layer {best.cell.site}, step {best.cell.step}"
        where += f", place {best.cell.place}" if grid.dataset.sizes["place"] > 1 else ""
        where += f", {best.cell.branch}" if "branch" in grid.dataset.dims else ""
        inputs, visible = ((float(cell[name]), str(cell[f"{name}_source"].values)) for name in ("reference", "visible"))
        samples, problems, none = (int(cell[name]) for name in ("n_test", "n_test_problems", "n_none"))
        others = 0 if best.p <= ALPHA else int((grid.dataset.p_evidence.sel(target=target) <= ALPHA).sum())
        rows.append(SummaryRow(best, where, float(cell.chance), inputs, visible, samples, problems, none, others))
    return rows


def remarks(grid: Grid, checks: Checks) -> list[str]:
    """What a reader must know beside the table, a sentence each."""
    own, lower, upper = (float(grid.dataset.attrs[f"model_accuracy{end}"]) for end in ("", "_lower", "_upper"))
    lines = []
    if np.isfinite(own):
        lines.append(f"The model's own final answer is right on {own:.2f} [{lower:.2f}, {upper:.2f}] of test samples.")
        for target in grid.with_role("answer"):
            best = grid.best(target)
            if own > 0 and best.p <= ALPHA:
                where = f"layer {best.cell.site}, step {best.cell.step}"
                lines.append(f"The best probe of {target} ({where}) is right on {best.accuracy:.2f}.")
    for row in summarise(grid):
        if row.left_out:
            lines.append(f"{row.best.target}: {row.left_out} samples left out, the model settled on no answer in them.")
    lines += [f"{sentence}." for sentence in json.loads(grid.dataset.attrs["left_out"])]
    for target in shown_targets(grid):
        lines += ground(grid, target)
    for target, (done, fits) in grid.provenance.get("converged", {}).items():
        if done < fits:
            lines.append(f"{target}: {fits - done} of {fits} fits did not reach their optimum; the run named them.")
    for target in grid.with_role("control"):
        count = int((grid.dataset.p_permutation.sel(target=target) <= ALPHA).sum())
        verdict = "as it should" if count == 0 else "which should not be: distrust this grid"
        lines.append(f"{target} (random labels) is decodable in {count} cells after correction, {verdict}.")
    lines += [f"Left out of the checks: {reason}." for reason in checks.skipped]
    if checks.weights is not None:
        w = checks.weights
        lines.append(
            f"Permuted and fresh weights were asked about {w.samples} samples, training samples included: "
            f"{w.evaluations} more network evaluations, {w.seconds:.0f} s when they were sampled."
        )
    return lines


def ground(grid: Grid, target: str) -> list[str]:
    """What the numbers of one target stand on, a sentence each: the smallest skill that could have been shown, splits
    that are too small for a statement, and inputs that had to be projected."""
    data = grid.dataset.sel(target=target)
    lines = []
    for split in ("train", "validation", "test"):
        if (count := int(data[f"n_{split}_problems"])) < LEAST_PROBLEMS:
            missing = {"train": "its probes are weak", "validation": "its choices are chance, and it has no latency"}
            lines.append(
                f"{target}: {count} {split} problems, expected at least {LEAST_PROBLEMS}: "
                f"{missing.get(split, 'it has no p and no interval of a difference')}; raise task.problems."
            )
    worth, problems = float(data.n_effective), int(data.n_test_problems)
    if problems >= LEAST_PROBLEMS and worth < LEAST_EFFECTIVE:
        lines.append(
            f"{target}: its {problems} test problems are worth {worth:.1f}, because few of them hold most samples: it "
            "has no p and no interval of a difference; give all problems the same number of seeds."
        )
    if target in grid.with_role(*HEADLINE) and np.isfinite(data.smallest_skill):
        lines.append(
            f"{target}: with {problems} test problems at level {ALPHA}, the smallest skill above chance that could "
            f"have been evidence is {float(data.smallest_skill):.2f}. That is the best case: where an input already "
            "reads much, or the probe also loses some problems, more is needed."
        )
    cut = data.baseline_columns.where(data.baseline_columns > data.baseline_projected)  # a form may differ by step
    most = cut.max([axis for axis in cut.dims if axis != "baseline"])
    wide = [f"{name} ({int(most.sel(baseline=name))})" for name in most.baseline.values[np.isfinite(most.values)]]
    if wide:
        lines.append(
            f"{target}: these inputs have more columns than its {int(data.n_train)} training samples and were reduced "
            f"to as many principal axes: {', '.join(wide)}."
        )
    return lines


def shown_targets(grid: Grid) -> list[str]:
    """All but the relabelled controls, which enter through selectivity."""
    relabelled = grid.with_role(RELABELLED)
    return [target for target in grid.targets if target not in relabelled]


def summary_markdown(grid: Grid, checks: Checks, figures: tuple[str, ...] = ()) -> str:
    """The report's page: the table, remarks, every figure with how to read it, and provenance."""
    out = [
        "# Where the answer becomes decodable",
        "",
        *markdown_table(COLUMNS, *(row.cells() for row in summarise(grid))),
    ]
    out += [
        "", "Best cells are chosen on validation and read on test. Intervals count problems, not samples. `p` is "
        "corrected for all cells of a target (above 0.05: no evidence); answers and choices have to beat chance and "
        "every input. `best input` and `x0-hat shows` are baselines at the same step and place.", "",
    ]  # fmt: skip
    out += [f"* {line}" for line in remarks(grid, checks)]
    if checks.best:
        head, rows = check_table(grid, checks)
        out += ["", "## What the best cells survive", "", *markdown_table(head, *rows)]
    for name in figures:
        target = name.removeprefix("frames_").removesuffix(".png")
        caption = CAPTIONS.get(name) or FRAMES_CAPTION.format(f"`{target}`")
        out += ["", f"![{name}]({name})", "", caption]
    out += ["", "## Provenance", ""]
    out += [f"* `{key}`: {value}" for key, value in flattened(grid.provenance).items()] or ["none recorded"]
    return "\n".join(out) + "\n"


def markdown_table(head: Sequence[str], *rows: Sequence[str]) -> list[str]:
    table = [head, ["-" * max(3, len(name)) for name in head], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]


def print_summary(grid: Grid, checks: Checks, run_dir: Path, console: Console | None = None) -> None:
    """The tables, the remarks, and where to look next."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=max(WIDTH, console.width))
    table = open_table()
    for name in COLUMNS:
        side: Literal["left", "right"] = "right" if name in ("chance", "n") else "left"
        table.add_column(escape(name), justify=side, no_wrap=name.startswith("accuracy"))
    for row in summarise(grid):
        table.add_row(*map(escape, row.cells()), style="" if row.found else "dim")
    console.print(table)
    if checks.best:
        head, rows = check_table(grid, checks)
        survived = open_table()
        for name in head:
            survived.add_column(escape(name), no_wrap=name == head[0])  # long cells go on in a second line, none is cut
        for cells in rows:
            survived.add_row(*map(escape, cells))
        console.print(survived)
    for line in remarks(grid, checks):
        console.print(line, markup=False, highlight=False)
    run_dir = Path(run_dir)
    for name, path in (("report", run_dir / "report" / "summary.md"), ("TensorBoard", run_dir / "tensorboard")):
        text = f"{name}: {'tensorboard --logdir ' if name == 'TensorBoard' else ''}{path}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)  # a path is never cut in two


def open_table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, header_style="bold")


def check_table(grid: Grid, checks: Checks) -> tuple[list[str], list[list[str]]]:
    """Head and rows; a column per target of `checks.best`, `-` where a check could not be made."""
    columns = {name: _column(grid, checks, name) for name in checks.best}
    head = [f"{name}: layer {cell.site}, step {cell.step}" for name, cell in checks.best.items()]
    rows = [[row, *(column[row] for column in columns.values())] for row in next(iter(columns.values()))]
    return ["check of the best cell", *head], rows


def _column(grid: Grid, checks: Checks, name: str) -> dict[str, str]:
    cell = grid.at(name, checks.best[name])
    probe_first, shown_first = bool(cell.latency_at_most), bool(cell.visible_latency_at_most)
    return {
        "above every input": _above(cell, "reference", "p_inputs"),
        "above what x0-hat shows": _above(cell, "visible", "p_excess"),
        "selectivity": _interval(cell, "selectivity", "+.2f"),
        "latency, steps": _interval(cell, "latency", ".1f", "at or before " if probe_first else ""),
        "latency of x0-hat, steps": _interval(cell, "visible_latency", ".1f", "at or before " if shown_first else ""),
        "lag of x0-hat, steps": _lag(cell, probe_first, shown_first),
        "depth at this step, layers": _interval(cell, "depth", ".1f"),
        "says what the video will": _number(cell.agreement),
        "right where the video is wrong": _knew(cell),
        "calibration error": _trust(cell),
        "Brier score": _number(cell.brier),
        "bits per label": _bits(grid.dataset, name),
        "nuisances removed": _residual(grid.dataset, name),
        "random weights": _weights(checks, name),
    }


def _number(value: xr.DataArray, form: str = ".2f") -> str:
    return format(float(value), form) if np.isfinite(value) else NONE


def _interval(cell: xr.Dataset, name: str, form: str = ".2f", before: str = "") -> str:
    if not np.isfinite(cell[name]):
        return NONE
    value, *ends = (_number(cell[f"{name}{end}"], form) for end in ("", "_lower", "_upper"))
    # an onset at the first step in every draw has no interval: "at or before" says all that is known
    bounded = NONE not in ends and float(cell[f"{name}_lower"]) < float(cell[f"{name}_upper"])
    return f"{before}{value} [{', '.join(ends)}]" if bounded else f"{before}{value}"


def _lag(cell: xr.Dataset, probe_first: bool, shown_first: bool) -> str:
    """Both may be there at the first step already: then nothing is known of which was earlier."""
    if probe_first and shown_first:
        return "unknown: both from the first step on"
    return _interval(cell, "lag", "+.1f", "at least " if probe_first else "at most " if shown_first else "")


def _above(cell: xr.Dataset, other: str, p: str) -> str:
    if not np.isfinite(cell[p]):
        return NONE
    source = str(cell[f"{other}_source"].values)
    evidence = f"p = {float(cell[p]):.3f}" if float(cell[p]) <= ALPHA else "no evidence"
    return f"{float(cell.accuracy - cell[other]):+.2f} over {source}, {evidence}"


def _knew(cell: xr.Dataset) -> str:
    if not np.isfinite(cell.knew):
        return NONE
    wrong = int(cell.n_wrong)
    return f"{round(float(cell.knew) * wrong)} of {wrong} wrong videos, {_interval(cell, 'knew')}"


def _trust(cell: xr.Dataset) -> str:
    if not np.isfinite(cell.ece):
        return NONE
    error, raw, heat, rows = float(cell.ece), float(cell.ece_raw), float(cell.temperature), int(cell.n_test)
    return f"{error:.3f} at T = {heat:.2f} ({raw:.3f} at 1), n = {rows}"


def _bits(data: xr.Dataset, name: str) -> str:
    if "bits" not in data or not np.isfinite(data.bits.sel(target=name)).any():
        return NONE
    here = data.sel(target=name)
    known = [(str(source), float(here.bits.sel(source=source))) for source in here.source.values]
    first = next(value for source, value in known if source == "best")
    others = [f"{source} {value:.2f}" for source, value in known if source != "best" and np.isfinite(value)]
    return f"{first:.2f} ({', '.join([*others, f'no probe {float(here.bits_uniform):.2f}'])})"


def _residual(data: xr.Dataset, name: str) -> str:
    if "residual_before" not in data or not np.isfinite(data.residual_before.sel(target=name)):
        return NONE
    here = data.sel(target=name)
    change = f"[{float(here.residual_lower):+.2f}, {float(here.residual_upper):+.2f}]"
    alone = float(here.nuisance_alone)
    return f"{float(here.residual_before):.2f} to {float(here.residual_after):.2f} {change}; alone {alone:.2f}"


def _weights(checks: Checks, name: str) -> str:
    """Best layer of each on validation, at the first of the few steps."""
    table = checks.weights
    if table is None or name not in table.targets:
        return NONE
    first = min(cell.step for cell in table.cells)
    at = [i for i, cell in enumerate(table.cells) if cell.step == first]
    t = table.targets.index(name)
    best = table.validation[t][:, at].argmax(axis=1)
    values = (f"{how} {table.accuracy[t, w, at[best[w]]]:.2f}" for w, how in enumerate((TRAINED, *RANDOMISED)))
    return f"{', '.join(values)} at step {first}"


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
