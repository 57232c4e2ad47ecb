"""Report of a comparison of seed ensembles: printed tables, a page in Markdown, a JSON file and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from rich.console import Console
from rich.table import Table

from cosprobe.activations import Sampler
from cosprobe.config import EnsembleConfig
from cosprobe.ensembles.comparison import SIZES, Comparison, Estimate, compare, error_correlation, oracle
from cosprobe.ensembles.probe_scorer import ProbeScorer
from cosprobe.ensembles.run import RunContext
from cosprobe.ensembles.strategies import PROBES
from cosprobe.ensembles.trajectories import Candidate
from cosprobe.evaluation import Grid
from cosprobe.files import make_folder, whole_file, write_json
from cosprobe.models import pipeline_fingerprint
from cosprobe.probes import ProbeBank
from cosprobe.reporting import STYLE, markdown_table, new_figure
from cosprobe.runtime import rank_and_world
from cosprobe.tasks import TaskConfig

FOLDER = "ensemble"
REFERENCES = ("hidden", "single")  # what every strategy is compared with, at the same budget
LEAST_EXTRA = 1.0  # per cent of a run: where the axis of compute begins
TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
OURS, PAPERS, PLAIN, NONE = "#0072b2", "#d55e00", "#666666", "#b0b0b0"
MARKS = {
    "vote": "s",
    "best_of": "^",
    "retry": "P",
    "probe_best": "o",
    "prune": "D",
    "probe_vote": "v",
    "probe_retry": "X",
}
NAMES = {  # what a figure calls a strategy
    "single": "one run with more steps",
    "hidden": "average of hidden states",
    "x0": "average of x0-hats",
    "latent": "average of noisy latents",
    "vote": "most frequent answer of all videos",
    "best_of": "clearest of all videos",
    "retry": "retry until a video has an answer",
    "probe_best": "go on with the run the probe is surest of",
    "probe_weighted": "average of hidden states, weighted",
    "prune": "drop half of the runs, again and again",
    "probe_vote": "go on with the run that agrees most",
    "probe_retry": "retry until the probe supports the video",
}
WHOSE = {"method of arXiv 2603.16870": PAPERS, "uses probes": OURS, "uses no probe": PLAIN}


def ensembles(
    sampler: Sampler, task: TaskConfig, bank: ProbeBank, use: EnsembleConfig, seed: int, folder: Path
) -> None:
    """Compares seed ensembles on fresh problems, with the probes of a finished run.

    Writes report/ensemble/ and ensemble/ (trajectories) in `folder`. sampler: the loaded pipeline and the task of the
    run in `folder`. task: settings of that task. With several processes, all of them sample, and the first one writes.
    Raises InputError when the bank was made for another model.
    """
    bank.check_model(pipeline_fingerprint(sampler.model), "the loaded pipeline")
    scorer = ProbeScorer.of(bank, Grid.load(folder), sampler.task.name)
    context = RunContext(sampler, scorer)
    identity = {"store": bank.store.to_json(), "accuracy": scorer.fingerprint}
    comparison = compare(context, SIZES[use.size], task.problems, seed, folder / FOLDER, identity)
    if rank_and_world()[0] == 0:
        print_ensemble(comparison, write_ensemble(comparison, folder / "report" / FOLDER))


def write_ensemble(comparison: Comparison, folder: Path) -> Path:
    """Writes ensemble.json, ensemble.md and ensemble.png to `folder`. Returns the path of ensemble.md."""
    make_folder(folder)
    write_json(folder / "ensemble.json", numbers(comparison))
    with whole_file(folder / "ensemble.png") as part:
        figure(comparison).savefig(part)
    page = folder / "ensemble.md"
    with whole_file(page) as part:
        part.write_text("\n".join(lines(comparison)) + "\n")
    return page


def print_ensemble(comparison: Comparison, page: Path, console: Console | None = None) -> None:
    """Prints the table of each budget, the remarks, and the path of the page."""
    console = console or Console()
    for budget in comparison.chosen:
        head, *body = (row[:-1] for row in rows(comparison, budget, digits=2))  # 80 columns
        table = Table(box=None, padding=(0, 2, 0, 0), title=_caption(comparison, budget), title_justify="left")
        for name in head:
            table.add_column(name, no_wrap=True)
        for row in body:
            table.add_row(*row)
        console.print(table)
        console.print()
    for line in remarks(comparison):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"\npage: {page}", highlight=False, soft_wrap=True)


def rows(comparison: Comparison, budget: str, digits: int = 3) -> list[list[str]]:
    """Table of a budget, heading first: by strategy its candidate, cost, accuracy, and differences from REFERENCES."""
    head = ["strategy", "runs", "right", "minus hidden", "minus single"]
    chosen = comparison.chosen[budget]
    body = [["one run", "1.00", _interval(comparison.estimate(comparison.plain), digits), "", ""]]
    for candidate in chosen.values():
        gains = [comparison.gain(candidate, chosen[m]) if chosen[m] != candidate else None for m in REFERENCES]
        body.append(
            [
                str(candidate),
                f"{comparison.spent[candidate] / comparison.plain_cost:.2f}",
                _interval(comparison.estimate(comparison.test[candidate]), digits),
                *("" if gain is None else _signed(gain, digits) for gain in gains),
            ]
        )
    return [head, *body]


def remarks(comparison: Comparison) -> list[str]:
    """Sentences on strategies above that of the paper, windows of layers, and the best possible accuracy."""
    found = []
    for budget, chosen in comparison.chosen.items():
        hidden, p = chosen["hidden"], comparison.p_better(budget)
        better = [
            f"{m} ({_signed(comparison.gain(c, hidden))}, p {p[m]:.3f} corrected for all strategies, "
            f"{comparison.spent[c] / comparison.plain_cost:.2f} runs)"
            for m, c in chosen.items()
            if m != "hidden" and comparison.gain(c, hidden).clear
        ]
        found.append(
            f"At {budget} compute, these strategies are more accurate than {hidden} (compute of "
            f"{comparison.spent[hidden] / comparison.plain_cost:.2f} runs), with the interval of the difference above "
            f"zero: {', '.join(better) or 'none'}."
        )
    found.append(f"Window of layers: {'; '.join(_window_gains(comparison))}.")
    right, count = comparison.right, comparison.right.shape[1]
    some = float(((right.mean(axis=1) > 0) & (right.mean(axis=1) < 1)).mean())
    found.append(
        f"One run is right on {comparison.plain.mean():.3f} of problems; at least one of {count} runs is right on "
        f"{oracle(right, count).mean():.3f}. Some, but not all, runs are right on {some:.3f} of problems. Correlation "
        f"of errors between the runs of a problem: {error_correlation(right):.2f}."
    )
    known = {step: value for step, value in comparison.ranking.items() if np.isfinite(value)}
    if known:
        each = ", ".join(f"{value:.2f} at step {step}" for step, value in known.items())
        found.append(
            "Among pairs of a right and a wrong run of the same problem, the share in which the probe gives the right "
            f"run the higher probability (0.5: it cannot tell them apart): {each}."
        )
    return found


def lines(comparison: Comparison) -> list[str]:
    """The page in Markdown."""
    keys, steps = len(set(comparison.keys)), comparison.steps
    shown = {*comparison.curves, *(name for row in comparison.chosen.values() for name in row)}
    out = [
        f"# Seed ensembles: {comparison.task}",
        "",
        f"{len(comparison.keys)} test problems ({keys} distinct), {comparison.right.shape[1]} noise seeds each, "
        f"{steps} sampler steps. One run costs {comparison.plain_cost:.2f} GFLOP. Hyperparameters are chosen on "
        f"{len(next(iter(comparison.validation.values())))} validation problems; test problems are used once, for the "
        "numbers below. Intervals are 95 % intervals: exact binomial bounds over problems for accuracies, the adjusted "
        "interval of matched pairs for differences. Hyperparameters: K is the number of noise seeds, s the steps "
        "(indices), L the layers; `all` means that averages are written into all runs. Column `runs`: counted "
        "operations, divided by those of one whole run.",
        "",
        *(f"* {line}" for line in remarks(comparison)),
        "",
        "![accuracy against compute](ensemble.png)",
        "",
        "In the figure: " + "; ".join(f"`{name}`: {words}" for name, words in NAMES.items() if name in shown) + ".",
        "",
    ]
    for budget in comparison.chosen:
        out += [f"## {_caption(comparison, budget)}", "", *markdown_table(*rows(comparison, budget)), ""]
    out += [
        "## By kind and difficulty",
        "",
        "Accuracy; in brackets the difference from `hidden` at the same budget.",
        "",
    ]
    for budget, chosen in comparison.chosen.items():
        table = [["problems", "n", "one run", *chosen]]
        for group, mask in comparison.groups.items():
            cells = [
                f"{comparison.test[c][mask].mean():.2f}"
                + ("" if m == "hidden" else f" ({comparison.gain(c, chosen['hidden'], group).mean:+.2f})")
                for m, c in chosen.items()
            ]
            table.append([group, str(int(mask.sum())), f"{comparison.plain[mask].mean():.2f}", *cells])
        out += [f"### {_caption(comparison, budget)}", "", *markdown_table(*table), ""]
    out += ["## The paper's window", "", *markdown_table(*_windows(comparison)), ""]
    sweep = [["strategy", "runs", "right on validation"]]
    order = sorted(comparison.validation, key=lambda c: -float(comparison.validation[c].mean()))
    for c in order[:40]:
        sweep.append(
            [str(c), f"{comparison.cost[c] / comparison.plain_cost:.2f}", f"{comparison.validation[c].mean():.3f}"]
        )
    return [*out, f"## The sweep on validation (best {len(sweep) - 1} of {len(order)})", "", *markdown_table(*sweep)]


def numbers(comparison: Comparison) -> dict[str, Any]:
    """All numbers of the comparison, for JSON."""

    def entry(candidate: Candidate, chosen: dict[str, Candidate]) -> dict[str, Any]:
        found: dict[str, Any] = {"strategy": str(candidate), "gflop": comparison.spent[candidate]}
        for group in comparison.groups:
            found[group] = {"right": vars(comparison.estimate(comparison.test[candidate], group))}
            for m in REFERENCES:
                if chosen[m] != candidate:  # no difference of a strategy from itself
                    found[group][f"minus_{m}"] = vars(comparison.gain(candidate, chosen[m], group))
        return found

    count = comparison.right.shape[1]
    return {
        "task": comparison.task,
        "steps": comparison.steps,
        "test_problems": len(comparison.keys),
        "one_run": {"gflop": comparison.plain_cost, "right": vars(comparison.estimate(comparison.plain))},
        "budgets_gflop": comparison.budgets,
        "p_better_than_hidden": {budget: comparison.p_better(budget) for budget in comparison.chosen},
        "chosen": {b: {m: entry(c, row) for m, c in row.items()} for b, row in comparison.chosen.items()},
        "windows": {w: vars(comparison.estimate(comparison.test[c])) for w, c in comparison.windows.items()},
        "oracle": {k: float(oracle(comparison.right, k).mean()) for k in range(1, count + 1)},
        "error_correlation": _finite(error_correlation(comparison.right)),
        "ranking": {step: _finite(value) for step, value in comparison.ranking.items()},
        "tables": {_caption(comparison, budget): rows(comparison, budget) for budget in comparison.chosen},
        "remarks": remarks(comparison),
        "validation": {
            str(c): {"gflop": comparison.cost[c], "right": float(v.mean())} for c, v in comparison.validation.items()
        },
    }


def figure(comparison: Comparison) -> Figure:
    """Accuracy against compute by seeds, the window of layers, and the comparison at both budgets."""
    with rc_context(STYLE):
        sheet = new_figure(8.0, 8.4)
        upper, lower = sheet.subfigures(2, height_ratios=(1.15, 1))
        left, right = upper.subplots(1, 2, width_ratios=(1.6, 1))
        _curves(left, comparison)
        upper.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        windows = {
            f"{name} ({c.params.layers[0]} to {c.params.layers[-1]})": (c, PAPERS)
            for name, c in comparison.windows.items()
        }
        _forest(right, windows, comparison, "which layers are averaged")
        panels = lower.subplots(1, len(comparison.chosen), sharey=True, sharex=True)
        names = [name for name in NAMES if any(name in row for row in comparison.chosen.values())]
        for axes, budget in zip(panels, comparison.chosen, strict=True):
            row = comparison.chosen[budget]
            entries = {NAMES[name]: (row.get(name), _colour(name)) for name in names}
            worth = comparison.budgets[budget] / comparison.plain_cost
            _forest(axes, entries, comparison, f"at {budget} compute ({worth:.2f} runs)")
        handles: list[Artist] = [Line2D([], [], color=c, marker="o", label=name) for name, c in WHOSE.items()]
        band = Patch(color=NONE, alpha=0.25, linewidth=0, label="one run, no ensemble (95 % interval)")
        sheet.legend(handles=[*handles, band], loc="outside lower center", ncols=4, frameon=False)
        return sheet


def _curves(axes: Axes, comparison: Comparison) -> None:
    """Accuracy against compute of strategies that choose among runs, with default hyperparameters and 2, 3, ...
    seeds."""
    plain = comparison.estimate(comparison.plain)
    axes.axhspan(plain.lower, plain.upper, color=NONE, alpha=0.25, linewidth=0)
    axes.axhline(plain.mean, color=PLAIN, linewidth=0.8)
    for name, row in comparison.curves.items():
        found = [comparison.estimate(comparison.test[c]) for c in row]
        # without intervals, which would overlap
        style = {"color": _colour(name), "marker": MARKS[name], "markersize": 4, "linewidth": 1.2, "alpha": 0.8}
        axes.plot([_extra(comparison, c) for c in row], [e.mean for e in found], label=NAMES[name], **style)
    longer = [c for row in comparison.chosen.values() for m, c in row.items() if m == "single"]
    points = [(_extra(comparison, c), _of(comparison, c).mean) for c in longer]
    axes.plot(*zip(*points, strict=True), color=PLAIN, marker=".", linestyle=":", label=NAMES["single"])
    paper = comparison.windows.get("middle")
    if paper is not None:
        e = _of(comparison, paper)
        axes.errorbar(
            [_extra(comparison, paper)], [e.mean], ([e.mean - e.lower], [e.upper - e.mean]),
            color=PAPERS, marker="*", markersize=9, elinewidth=0.8, label=NAMES["hidden"],
        )  # fmt: skip
    ends = [x for line in axes.lines if len(x := np.atleast_1d(line.get_xdata())) and line.get_label()[0] != "_"]
    low, high = min(map(np.min, ends)), max(map(np.max, ends))
    axes.set_xscale("log")
    axes.set_xlim(low / 1.3, high * 1.3)
    axes.set_xticks([t for t in TICKS if low / 1.3 <= t <= high * 1.3])
    axes.xaxis.set_major_formatter(lambda t, _: f"≤ {t:g}" if t == LEAST_EXTRA else f"{t:g}")
    axes.minorticks_off()
    axes.set(xlabel="compute beyond one run (% of a run)", ylabel="share of right answers")
    axes.set_title(f"2 to {comparison.right.shape[1]} seeds; grey: one run", loc="left")


def _forest(
    axes: Axes, entries: Mapping[str, tuple[Candidate | None, str]], comparison: Comparison, title: str
) -> None:
    """One row per entry: mean and interval, if it has a candidate. The grey band is one run without an ensemble."""
    plain = comparison.estimate(comparison.plain)
    axes.axvspan(plain.lower, plain.upper, color=NONE, alpha=0.25, linewidth=0)
    axes.axvline(plain.mean, color=PLAIN, linewidth=0.8)
    for position, (candidate, colour) in enumerate(entries.values()):
        if candidate is None:
            axes.annotate("costs more", (0.02, position), xycoords=("axes fraction", "data"), va="center", fontsize=8,
                          color=PLAIN)  # fmt: skip
            continue
        e = _of(comparison, candidate)
        axes.plot([e.lower, e.upper], [position, position], color=colour, linewidth=1.5)
        axes.plot(e.mean, position, color=colour, marker="o", markersize=5)
    axes.set_yticks(range(len(entries)), list(entries))
    axes.set_ylim(len(entries) - 0.5, -0.5)
    axes.set_xlabel("share of right answers")
    axes.set_title(title, loc="left")


def _windows(comparison: Comparison) -> list[list[str]]:
    body = [["window", "layers", "right", "minus one run"]]
    for name, c in comparison.windows.items():
        gain = comparison.gain(c)
        span = f"{c.params.layers[0]}-{c.params.layers[-1]}"
        body.append([name, span, _interval(_of(comparison, c)), _signed(gain)])
    return body


def _window_gains(comparison: Comparison) -> list[str]:
    """Accuracy of the middle window minus that of every other window (as in the paper), and minus that of one run."""
    middle = comparison.windows.get("middle")
    if middle is None:
        return ["the middle window was not among the candidates"]
    others = {name: c for name, c in comparison.windows.items() if name != "middle"}
    gains = [f"middle minus {name} {_signed(comparison.gain(middle, c))}" for name, c in others.items()]
    return [*gains, f"middle minus one run {_signed(comparison.gain(middle))}"]


def _extra(comparison: Comparison, candidate: Candidate) -> float:
    """Compute beyond that of one run, in per cent of a run, and at least LEAST_EXTRA."""
    return max(100 * (comparison.spent[candidate] / comparison.plain_cost - 1), LEAST_EXTRA)


def _of(comparison: Comparison, candidate: Candidate) -> Estimate:
    return comparison.estimate(comparison.test[candidate])


def _caption(comparison: Comparison, budget: str) -> str:
    return f"At {budget} compute, {comparison.budgets[budget] / comparison.plain_cost:.2f} times one run"


def _colour(name: str) -> str:
    return OURS if name in PROBES else PAPERS if name == "hidden" else PLAIN


def _interval(e: Estimate, digits: int = 3) -> str:
    return f"{e.mean:.{digits}f} [{e.lower:.{digits}f}, {e.upper:.{digits}f}]"


def _signed(e: Estimate, digits: int = 3) -> str:
    return f"{e.mean:+.{digits}f} [{e.lower:+.{digits}f}, {e.upper:+.{digits}f}]"


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
