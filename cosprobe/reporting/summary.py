"""The summary of a run in Markdown and on the terminal: table of targets, remarks, checks of the best cells."""

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

from cosprobe.activations import RANDOM_WEIGHTS
from cosprobe.differences import flattened
from cosprobe.evaluation import ALPHA, GUESSES, LEAST_EFFECTIVE, LEAST_PROBLEMS, Best, Grid
from cosprobe.evaluation.checks import TRAINED, Checks
from cosprobe.tasks import ANSWER_ROLES, RELABELLED, Role

NONE = "-"
SUMMARY = "summary.json"
COLUMNS = ("target", "best cell", "accuracy [95 %]", "chance", "best input", "x0-hat shows", "evidence", "n")
WIDTH = 110  # width of printed tables if the output is not a terminal

CAPTIONS = {
    "headline.png": "Where the answer is decodable. One square per layer and denoising step. The colour is skill: "
    "(accuracy - reference) / (1 - reference). The reference is the accuracy of the best input at that step, and at "
    "least chance. (An input may be read in a richer form than a layer: the whole frame, or all latent frames.) Blank: "
    "no evidence that the probe is more accurate than chance and than every input, after correction for all squares. "
    "Grey: an input alone is right on more than 95 %, and skill is not defined. Orange dot: more accurate than x0-hat "
    "at that step, after the same correction. Star: the cell with the best validation accuracy.",
    "curves.png": "Accuracy of some layers by denoising step, with 95 % intervals by problem, compared with the best "
    "input, chance, and x0-hat.",
    "others.png": "The same maps for the other targets. Perception targets are visible in the first frame. Nuisance "
    "targets are possible confounds. For both, the reference is chance. For memory targets it is the best input, read "
    "in the same frame and region. The labels of the control target are random: its map must be blank.",
    "generalisation.png": "Test accuracy of probes on cells that they were not trained on. Rows: trained on. Columns: "
    "tested on. The numbers above a panel are its lowest and highest accuracy. If a probe is accurate on the step it "
    "was trained on only, other steps represent the target differently, or not at all.",
    "checks.png": "For the best cell of each target: accuracy with fewer training problems; accuracy by predicted "
    "probability, with and without the temperature; accuracy with permuted and fresh transformer weights, by layer at "
    "the first step; latency of every layer, and of x0-hat. Bars and bands: 95 % intervals.",
    "film.png": "The last frame of x0-hat, the model's estimate of the clean video, at the decoded steps. The "
    "coloured box marks the candidate with the highest parser score, the black box the right candidate.",
}
PATH_PICTURE = "path.png"
TOKENS_CAPTION = (
    "Skill of {} in every token by itself, drawn over the first frame of one test problem. Rows: layers. Columns: "
    "latent frames. Hatched: no evidence after correction for all cells."
)
CAPTIONS[PATH_PICTURE] = (
    "Does the solution pass through this token? A probe of each token by itself, drawn over the first frame of one "
    "test problem. Skill 0 is the accuracy of the best input of the same token, or of its usual label. Hatched: no "
    "evidence that the probe is more accurate than chance, the usual label and every input of the token, after "
    "correction for all cells. No square: the label is the same in all problems."
)
FRAMES_CAPTION = "Skill of {} in every latent frame: by layer at the step of the best cell, by step at its layer."


@dataclass(frozen=True)
class SummaryRow:
    """One target at its best cell.

    where: name of the cell. inputs, x0: test accuracy and name of the reference of skill and of the best x0-hat
    baseline at that step and position; NaN and "" if there is none. samples, problems: of test. left_out: number of
    samples without an answer in the finished video. elsewhere: number of other cells with evidence, if the best cell
    has none.
    """

    best: Best
    where: str
    chance: float
    inputs: tuple[float, str]
    x0: tuple[float, str]
    samples: int
    problems: int
    left_out: int
    elsewhere: int

    @property
    def found(self) -> bool:
        """Whether the best cell has evidence."""
        return self.best.p <= ALPHA

    def cells(self) -> tuple[str, ...]:
        """Text of every column."""
        b = self.best
        none = f"not here; in {counted(self.elsewhere, 'other cell')}" if self.elsewhere else "no evidence"
        evidence = f"p = {b.p:.3f}" if self.found else none
        accuracy = f"{b.accuracy:.2f} [{b.lower:.2f}, {b.upper:.2f}]"
        named = (self.inputs, self.x0)
        inputs, x0 = (f"{value:.2f} {name}" if name and name not in GUESSES else "-" for value, name in named)
        return (b.target, self.where, accuracy, f"{self.chance:.2f}", inputs, x0, evidence, str(self.samples))


def counted(number: int, what: str) -> str:
    """A number with its noun: `1 sample`, `2 samples`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def summarise(grid: Grid) -> list[SummaryRow]:
    """One row per target."""
    rows = []
    for target in shown_targets(grid):
        best = grid.best(target)
        cell = grid.at(target, best.cell)
        where = f"layer {best.cell.layer}, step {best.cell.step}"
        where += f", position {best.cell.position}" if grid.dataset.sizes["position"] > 1 else ""
        where += f", {best.cell.branch}" if "branch" in grid.dataset.dims else ""
        inputs = float(cell.reference), str(cell.reference_source.values)
        x0 = float(cell.x0_accuracy), str(cell.x0_source.values)
        samples, problems, none = (int(cell[name]) for name in ("n_test", "n_test_problems", "n_no_answer"))
        others = 0 if best.p <= ALPHA else int((grid.dataset.p_evidence.sel(target=target) <= ALPHA).sum())
        rows.append(SummaryRow(best, where, float(cell.chance), inputs, x0, samples, problems, none, others))
    return rows


def remarks(grid: Grid, checks: Checks) -> list[str]:
    """Remarks on the grid and the checks, one string each."""
    model, lower, upper = (float(grid.dataset.attrs[f"model_accuracy{end}"]) for end in ("", "_lower", "_upper"))
    lines = []
    if np.isfinite(model):
        lines.append(f"The finished video is right on {model:.2f} [{lower:.2f}, {upper:.2f}] of test samples.")
        for target in grid.with_role(Role.ANSWER):
            best = grid.best(target)
            if model > 0 and best.p <= ALPHA:
                where = f"layer {best.cell.layer}, step {best.cell.step}"
                lines.append(f"The best probe of {target} ({where}) is right on {best.accuracy:.2f}.")
    if checks.projections:
        kept, channels = checks.projections[0].kept, checks.projections[0].channels
        lines.append(
            f"Probes read {kept} combinations of the {channels} channels (probe.project={kept}). The row `projection` "
            "of the table of checks compares them with probes on all channels, in the best of the few cells where all "
            "are kept."
        )
    for row in summarise(grid):
        if row.left_out:
            lines.append(
                f"{row.best.target}: without {counted(row.left_out, 'sample')} whose finished video shows no answer."
            )
    if grid.folds:
        lines.append(
            f"Cross-fitting: each of {grid.folds} folds of problems is tested with probes that were fitted to other "
            "folds. The accuracy in the table is that of the cells which each of these fits chose on validation, so "
            "the choice does not raise it. Baselines, evidence and differences are those of the named cell, which was "
            "chosen with the labels of all problems, so its differences can be too high. There are no latencies and no "
            "calibration, and x0-hat is not parsed."
        )
        lines.append(
            "Behaviours, random weights, bits per label, confounds, reliability and generalisation are of the first "
            "fold only, which has few test problems."
        )
    lines += [f"{sentence}." for sentence in json.loads(grid.dataset.attrs["left_out"])]
    for target in shown_targets(grid):
        lines += ground(grid, target)
    for target, (done, fits) in grid.provenance.get("converged", {}).items():
        if done < fits:
            lines.append(f"{target}: {fits - done} of {fits} fits did not converge; the log of the run names them.")
    for target in grid.with_role(Role.CONTROL):
        count = int((grid.dataset.p_permutation.sel(target=target) <= ALPHA).sum())
        verdict = "as expected" if count == 0 else "expected 0: results of this grid are not reliable"
        lines.append(f"{target} (random labels) is decodable in {count} cells after correction, {verdict}.")
    lines += [f"A check is missing: {reason}." for reason in checks.skipped]
    if checks.weights is not None:
        w = checks.weights
        lines.append(
            f"Permuted and fresh weights were sampled on {w.samples} samples, training samples included. They took "
            f"{w.evaluations} more network evaluations and {w.seconds:.0f} s."
        )
    return lines


def ground(grid: Grid, target: str) -> list[str]:
    """Remarks on the data of one target: missing baselines, splits that are too small, the smallest detectable skill,
    and projected inputs."""
    data = grid.dataset.sel(target=target)
    lines = []
    if unmeasured := str(data.not_measured.values).replace(",", ", "):
        so = ", so it has no skill and no evidence" if data.reference.isnull().all() else ""
        lines.append(f"{target} is not compared with these baselines, which were not measured: {unmeasured}{so}.")
    for split in ("train", "validation", "test"):
        if (count := int(data[f"n_{split}_problems"])) < LEAST_PROBLEMS:
            missing = {
                "train": "its probes are weak",
                "validation": "too few to choose the best cell by, and it has no latency",
            }
            lines.append(
                f"{target}: {count} {split} problems, expected at least {LEAST_PROBLEMS}: "
                f"{missing.get(split, 'it has no p-values and no intervals of differences')}; raise task.problems."
            )
    worth, problems = float(data.n_effective), int(data.n_test_problems)
    if problems >= LEAST_PROBLEMS and worth < LEAST_EFFECTIVE:
        lines.append(
            f"{target}: its {problems} test problems count as {worth:.1f}, because few of them hold most samples. It "
            "has no p-values and no intervals of differences; give all problems the same number of seeds."
        )
    if target in grid.with_role(*ANSWER_ROLES) and np.isfinite(data.smallest_detectable_skill):
        lines.append(
            f"{target}: with {problems} test problems at level {ALPHA}, the smallest skill above chance that can count "
            f"as evidence is {float(data.smallest_detectable_skill):.2f}. This is the best case: more is needed where "
            "an input is accurate too, or is right on problems that the probe gets wrong."
        )
    cut = data.baseline_columns.where(data.baseline_columns > data.baseline_projected)  # forms may differ between steps
    most = cut.max([axis for axis in cut.dims if axis != "baseline"])
    known = most.baseline.values[np.isfinite(most.values)]
    wide = [f"{name} ({int(most.sel(baseline=name))} columns)" for name in known]
    if wide:
        lines.append(
            f"{target}: these inputs have more columns than training samples, and were reduced to "
            f"{int(data.n_train)} principal axes: {', '.join(wide)}."
        )
    return lines


def shown_targets(grid: Grid) -> list[str]:
    """All targets except the relabelled ones, which appear as selectivity only."""
    relabelled = grid.with_role(RELABELLED)
    return [target for target in grid.targets if target not in relabelled]


def summary_markdown(
    grid: Grid,
    checks: Checks,
    figures: tuple[str, ...] = (),
    behaviours: Mapping[str, Sequence[str]] | None = None,
    path: xr.Dataset | None = None,
) -> str:
    """The summary in Markdown: table of targets, remarks, checks, behaviours, tokens on the path, figures with
    captions, and provenance."""
    out = [
        "# Where the answer becomes decodable",
        "",
        *markdown_table(COLUMNS, *(row.cells() for row in summarise(grid))),
    ]
    chosen = "Best cells are chosen on validation; their accuracy is measured on test problems."
    if grid.folds:
        chosen = (
            "Each fit chooses a cell on its own validation fold; the column `accuracy` measures these cells on test "
            "folds. The cell that is named has the highest validation accuracy over all folds; the numbers of its row "
            "other than accuracy are its own."
        )
    out += [
        "", f"{chosen} Intervals count "
        "problems, not samples. `p` is corrected for all cells of a target (above 0.05: no evidence). For the targets "
        "`answer` and `model_answer` it tests that accuracy is above chance and above every input. `best input` and "
        "`x0-hat shows` are baselines at the same step and position.", "",
    ]  # fmt: skip
    out += [f"* {line}" for line in remarks(grid, checks)]
    if checks.best:
        head, rows = check_table(grid, checks)
        out += ["", "## Checks of the best cells", "", *markdown_table(head, *rows)]
    if behaviours:
        out += ["", "## Behaviours along denoising steps", ""]
        out += [f"* {name}: {' '.join(said)}" for name, said in behaviours.items()]
        out += ["", "The claims with intervals: [behaviour.md](behaviour/behaviour.md)."]
    if path is not None:
        out += ["", "## Which tokens know that they lie on the path", "", *path_sentences(path)]
        out += ["", "All numbers: `path.nc`."]
    for name in figures:
        kind, _, target = name.removesuffix(".png").partition("_")
        caption = CAPTIONS.get(name) or (TOKENS_CAPTION if kind == "tokens" else FRAMES_CAPTION).format(f"`{target}`")
        out += ["", f"![{name}]({name})", "", caption]
    out += ["", "## Provenance", ""]
    out += [f"* `{key}`: {value}" for key, value in flattened(grid.provenance).items()] or ["none recorded"]
    return "\n".join(out) + "\n"


def summary_data(grid: Grid, checks: Checks) -> dict[str, Any]:
    """What the summary says and the grid does not hold, for JSON: the remarks, and the rows of the table of checks,
    heading first."""
    head, rows = check_table(grid, checks) if checks.best else ([], [])
    return {"remarks": remarks(grid, checks), "checks": [head, *rows] if checks.best else []}


def path_sentences(path: xr.Dataset) -> list[str]:
    """What `evaluation.read_path` found: one line per layer and step with evidence, and the best cell."""
    tested, shown = path.accuracy.notnull(), path.p_evidence <= ALPHA
    lines = [
        f"{int(shown.sum())} of {int(tested.sum())} cells (token, layer, step) have evidence: their probe is more "
        "accurate than chance, than the usual label of the token and than every input of the same token, after "
        f"correction for all cells. n = {path.attrs['n_test']} test problems with one right answer."
    ]
    if path.p_evidence.isnull().all():
        lines.append(f"With {path.attrs['n_test_problems']} test problems there are no p-values; raise task.problems.")
        return lines
    by, of = (values.sum("position").transpose("layer", "step").values for values in (shown, tested))
    steps = path.step.values.tolist()
    rows = [
        (str(layer), *(f"{shown_here} of {tested_here} tokens" for shown_here, tested_here in zip(*both, strict=True)))
        for layer, *both in zip(path.layer.values, by, of, strict=True)
    ]
    lines += ["", *markdown_table(("layer", *(f"step {s}" for s in steps)), *rows)]
    by_frame = shown.sum(("step", "layer")).groupby("frame").sum()
    counts = zip(by_frame.frame.values, by_frame.values, strict=True)
    lines += ["", f"By latent frame: {', '.join(f'{int(count)} in frame {frame}' for frame, count in counts)}."]
    if tested.any():
        best = path.isel(path.validation_gain.fillna(-1.0).argmax(...))
        verdict = f"p = {float(best.p_evidence):.3f}" if float(best.p_evidence) <= ALPHA else "no evidence"
        lines += [
            "",
            "The cell with the largest gain over the usual label on validation is token "
            f"{best.position.values} (latent "
            f"frame {int(best.frame)}, row {int(best.row)}, column {int(best.column)}), layer {int(best.layer)}, step "
            f"{int(best.step)}: accuracy {float(best.accuracy):.2f} [{float(best.lower):.2f}, "
            f"{float(best.upper):.2f}], {best.reference_source.values} {float(best.reference):.2f}, {verdict}.",
        ]
    return lines


def markdown_table(head: Sequence[str], *rows: Sequence[str]) -> list[str]:
    """Lines of a Markdown table."""
    table = [head, ["-" * max(3, len(name)) for name in head], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]


def print_summary(grid: Grid, checks: Checks, run_dir: Path, console: Console | None = None) -> str:
    """Prints tables, remarks, and the paths of the report and of TensorBoard. Returns the text without colours."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=max(WIDTH, console.width))
    console.record = True
    table = open_table()
    for name in COLUMNS:
        side: Literal["left", "right"] = "right" if name in ("chance", "n") else "left"
        table.add_column(escape(name), justify=side, no_wrap=name.startswith("accuracy"))
    for row in summarise(grid):
        table.add_row(*map(escape, row.cells()), style="" if row.found else "dim")
    console.print(table)
    if checks.best:
        head, rows = check_table(grid, checks)
        results = open_table()
        for name in head:
            results.add_column(escape(name), no_wrap=name == head[0])  # long cells wrap, none is cut
        for cells in rows:
            results.add_row(*map(escape, cells))
        console.print(results)
    for line in remarks(grid, checks):
        console.print(line, markup=False, highlight=False)
    run_dir = Path(run_dir)
    for text in (
        f"report: {run_dir / 'report' / 'report.html'}",
        f"the same as text: {run_dir / 'report' / 'summary.md'}",
        f"TensorBoard: tensorboard --logdir {run_dir / 'tensorboard'}",
    ):
        console.print(text, markup=False, highlight=False, soft_wrap=True)  # paths are not broken
    return console.export_text()


def open_table() -> Table:
    """An empty table for the terminal, with a line below its heading only."""
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, header_style="bold")


def check_table(grid: Grid, checks: Checks) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table of checks: one column per target of `checks.best`, `-` for a missing check."""
    columns = {name: _column(grid, checks, name) for name in checks.best}
    head = [f"{name}: layer {cell.layer}, step {cell.step}" for name, cell in checks.best.items()]
    rows = [[row, *(column[row] for column in columns.values())] for row in next(iter(columns.values()))]
    return ["check of the best cell", *head], rows


def _column(grid: Grid, checks: Checks, name: str) -> dict[str, str]:
    cell = grid.at(name, checks.best[name])
    probe_first, shown_first = bool(cell.latency_censored), bool(cell.x0_latency_censored)
    return {
        "above every input": _above(cell, cell.reference, cell.reference_source, cell.p_inputs),
        "above what x0-hat shows": _above(cell, cell.x0_accuracy, cell.x0_source, cell.p_x0),
        "selectivity": _interval(cell, "selectivity", "+.2f"),
        "latency, steps": _interval(cell, "latency", ".1f", "at or before " if probe_first else ""),
        "latency of x0-hat, steps": _interval(cell, "x0_latency", ".1f", "at or before " if shown_first else ""),
        "lag of x0-hat, steps": _lag(cell, probe_first, shown_first),
        "depth at this step, layers": _interval(cell, "depth", ".1f"),
        "agrees with the finished video": _number(cell.agreement),
        "right where the video is wrong": _correct_when_model_wrong(cell),
        "calibration error": _trust(cell),
        "Brier score": _number(cell.brier),
        "bits per label": _bits(grid.dataset, name),
        "confounds removed": _residual(grid.dataset, name),
        "random weights": _weights(checks, name),
        **({"projection": _projection(checks, name)} if checks.projections else {}),
    }


def _number(value: xr.DataArray, form: str = ".2f") -> str:
    return format(float(value), form) if np.isfinite(value) else NONE


def _interval(cell: xr.Dataset, name: str, form: str = ".2f", before: str = "") -> str:
    if not np.isfinite(cell[name]):
        return NONE
    value, *ends = (_number(cell[f"{name}{end}"], form) for end in ("", "_lower", "_upper"))
    # a latency at the first step in every draw has an interval of width 0, which is not printed
    bounded = NONE not in ends and float(cell[f"{name}_lower"]) < float(cell[f"{name}_upper"])
    return f"{before}{value} [{', '.join(ends)}]" if bounded else f"{before}{value}"


def _lag(cell: xr.Dataset, probe_first: bool, shown_first: bool) -> str:
    """The lag in words. If both latencies are at the first step, the sign of the lag is unknown."""
    if probe_first and shown_first:
        return "unknown: both from the first step on"
    return _interval(cell, "lag", "+.1f", "at least " if probe_first else "at most " if shown_first else "")


def _above(cell: xr.Dataset, level: xr.DataArray, source: xr.DataArray, p: xr.DataArray) -> str:
    """Accuracy minus that of a baseline, with p or `no evidence`."""
    if not np.isfinite(p):
        return NONE
    evidence = f"p = {float(p):.3f}" if float(p) <= ALPHA else "no evidence"
    named = "chance" if source.values in GUESSES else source.values
    return f"{float(cell.accuracy - level):+.2f} over {named}, {evidence}"


def _correct_when_model_wrong(cell: xr.Dataset) -> str:
    name, wrong = "correct_when_model_wrong", int(cell.n_model_wrong)
    if not np.isfinite(cell[name]):
        return NONE
    return f"{round(float(cell[name]) * wrong)} of {wrong} wrong videos, {_interval(cell, name)}"


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
    return f"{first:.2f} ({', '.join([*others, f'uniform code {float(here.bits_uniform):.2f}'])})"


def _residual(data: xr.Dataset, name: str) -> str:
    if "residual_before" not in data or not np.isfinite(data.residual_before.sel(target=name)):
        return NONE
    here = data.sel(target=name)
    change = f"[{float(here.residual_lower):+.2f}, {float(here.residual_upper):+.2f}]"
    alone = float(here.difficulty_alone)
    return f"{float(here.residual_before):.2f} to {float(here.residual_after):.2f} {change}; alone {alone:.2f}"


def _projection(checks: Checks, name: str) -> str:
    """Accuracy with all channels and with the projected ones, at a cell where both are known."""
    for one in checks.projections:
        if one.target == name:
            change = one.difference
            return (
                f"{one.kept} minus {one.channels} channels: {change.value:+.2f} [{change.lower:+.2f}, "
                f"{change.upper:+.2f}] ({one.projected.value:.2f} and {one.whole.value:.2f}), layer {one.cell.layer}, "
                f"step {one.cell.step}"
            )
    return NONE


def _weights(checks: Checks, name: str) -> str:
    """Accuracy with each kind of weights at the first step, at the layer with the best validation accuracy."""
    table = checks.weights
    if table is None or name not in table.targets:
        return NONE
    first = min(cell.step for cell in table.cells)
    at = [i for i, cell in enumerate(table.cells) if cell.step == first]
    t = table.targets.index(name)
    best = table.validation[t][:, at].argmax(axis=1)
    values = (f"{how} {table.accuracy[t, w, at[best[w]]]:.2f}" for w, how in enumerate((TRAINED, *RANDOM_WEIGHTS)))
    return f"{', '.join(values)} at step {first}"
