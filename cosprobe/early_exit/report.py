"""What a person gets from calibrated stopping: tables, early.json, early.md and figures in report/early/ of the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape

from cosprobe.activations import Cost, decode_steps, flops, seconds, watch
from cosprobe.early_exit.calibrate import EarlyConfig, Live, Stopping, run_live, stop_early
from cosprobe.early_exit.frontier import Realised, Way, outcome, policy_looks, realised, ways
from cosprobe.models import PipelineConfig, load_pipeline
from cosprobe.probes import ProbeBank
from cosprobe.reporting import STYLE, WIDTH, Film, film_row, film_strip, markdown_table, new_figure, open_table
from cosprobe.runtime import make_folder, whole_file
from cosprobe.tasks import Task, TaskConfig, images, with_noise

LOOKS = {
    "fixed step": {"color": "#444444", "marker": "s", "markersize": 3.5, "linestyle": ":"},
    "readout of x0-hat": {"color": "#e6550d", "marker": "o", "markersize": 4, "linestyle": "--"},
    "entropy rule": {"color": "#009e73", "linestyle": "-", "linewidth": 1.3},
    "policy": {"color": "#0072b2", "linestyle": "-", "linewidth": 1.3},
}
HINDSIGHT = (
    "Fixed step, readout and entropy rule stand at the cheapest setting that was good enough on these very problems, "
    "found in hindsight and without a promise; the calibrated policy was fixed before."
)
LIVE = 6  # problems of each kind that are run again, free to stop themselves
STRIP = 7  # steps a film strip has room for


@dataclass(frozen=True)
class Saved:
    """One kind of problems, judged. film: None without a fresh problem to show; stops: per row of it the step that
    answered and what was said, None for a run that was finished."""

    stopping: Stopping
    ways: list[Way]
    realised: Realised
    live: list[Live]
    film: Film | None
    stops: list[tuple[int, str] | None]


def answer_early(
    pipeline: PipelineConfig, task: TaskConfig, bank: ProbeBank, use: EarlyConfig, seed: int, folder: Path
) -> None:
    """`python probe.py use=early`: calibrates on the run in `folder`, leaves the policies in its bank, and reports.

    pipeline, task: settings of that run. Raises ValueError as `stop_early` does.
    """
    model = load_pipeline(pipeline)
    found, bank = stop_early(pipeline, task, bank, use, seed, folder, model)
    saved, cost, clock = judge(model, pipeline, task.build(), bank, found, seed)
    write_savings(saved, cost, clock, pipeline.steps, folder)


def judge(
    model: Any, pipeline: PipelineConfig, task: Task, bank: ProbeBank, found: Sequence[Stopping], seed: int
) -> tuple[list[Saved], Cost, Cost]:
    """Every kind on its fresh problems, with the costs in operations and in seconds that this is measured by."""
    first = found[0].fresh.problems[0]
    one = (images(task, [first]), [first.prompt])
    cost, clock = flops(model, pipeline, *one), seconds(model, pipeline, *one)
    saved = []
    for stopping in found:
        live = run_live(model, pipeline, task, bank, stopping, LIVE, seed)
        film, stops = _film(model, pipeline, task, stopping, seed)
        done = realised(stopping, cost, clock, pipeline.steps)
        saved.append(Saved(stopping, ways(stopping, cost, clock, pipeline.steps), done, live, film, stops))
    return saved, cost, clock


def write_savings(
    saved: Sequence[Saved], cost: Cost, clock: Cost, total: int, run_dir: Path, console: Console | None = None
) -> Path:
    """Prints the tables and writes run_dir/report/early, early.md last. total: steps of a finished run."""
    folder = Path(run_dir) / "report" / "early"
    console = console or (Console() if Console().is_terminal else Console(width=max(WIDTH, Console().width)))
    make_folder(folder)
    figures = {"frontier.png": partial(frontier_figure, saved)}
    for one in saved:
        if one.film is not None:
            figures[f"film_{one.stopping.policy.kind}.png"] = partial(strip_figure, one)
    for name, draw in figures.items():
        with whole_file(folder / name) as part:
            draw().savefig(part)
    described = json.dumps(_described(saved, cost, clock, total), indent=1)
    with whole_file(folder / "early.json") as part:
        part.write_text(described)
    page = ["# Early answers", ""]
    for one in saved:
        kind, task = one.stopping.policy.kind, one.stopping.policy.task
        console.print(f"\n[bold]{task}, {kind}[/bold]")
        page += [f"## {task}, {kind}", ""]
        for rows in (_ways_table(one, cost, total), _live_table(one)):
            table = open_table()
            for name in rows[0]:
                table.add_column(name)
            for row in rows[1:]:
                table.add_row(*map(escape, row))
            console.print(table)
            page += [*markdown_table(*rows), ""]
        for line in (HINDSIGHT, *remarks(one)):
            console.print(f"* {escape(line)}", highlight=False, soft_wrap=True)
            page.append(f"* {line}")
        page.append("")
    page += [f"![{name}]({name})\n" for name in figures]
    with whole_file(folder / "early.md") as part:
        part.write_text("\n".join(page))
    console.print(f"\nreport: {folder / 'early.md'}", highlight=False, soft_wrap=True)
    return folder


def remarks(one: Saved) -> list[str]:
    """The promise and whether fresh problems keep it, what it saves, and whether stopping early is even better."""
    policy, done = one.stopping.policy, one.realised
    error = "is not what the finished video ends on" if policy.against == "choice" else "is wrong, among those given"
    sure = f"{policy.risk:g} at confidence {policy.confidence:g}"
    if not policy.stops:
        return [
            f"No threshold keeps the share of early answers that {error.split(',')[0]} below {sure} "
            f"(p = {policy.p:.3f} on {policy.problems} calibration problems): every run is finished. "
            "Allow more risk or calibrate on more problems."
        ]
    lines = [
        f"Promise: an early answer {error} with a risk of at most {sure}. It stops at the first look that is "
        f"{policy.threshold:.4f} sure (calibration: {policy.errors} errors in {policy.answered} early answers to "
        f"{policy.problems} problems, p = {policy.p:.3f}).",
        f"Kept on fresh problems: {done.errors} errors, risk {done.risk:.3f} [{done.interval[0]:.3f}, "
        f"{done.interval[1]:.3f}]; {done.answered} of {done.samples} runs stopped early.",
        f"Mean compute {done.compute:.3f} of a finished, decoded run; {done.evaluations:.2f} network evaluations; "
        f"{done.seconds:.3f} s per problem instead of {done.finished_seconds:.3f}.",
    ]
    for name, (mean, lower, upper) in (("the policy", done.gain), ("stopping at the first look", done.first_gain)):
        verdict = "more often" if lower > 0 else "less often" if upper < 0 else "neither more nor less often"
        lines.append(
            f"Right by {name} {verdict} than by the finished video ({done.finished_accuracy:.3f}): "
            f"{mean:+.3f} [{lower:+.3f}, {upper:+.3f}]."
        )
    same = sum(live.same for live in one.live)
    lines.append(
        f"{same} of {len(one.live)} runs that stopped themselves did so where the records say, and said the same."
    )
    return lines


def frontier_figure(saved: Sequence[Saved]) -> Figure:
    """Agreement with the finished run (or accuracy, where the promise is about the truth) over compute, per kind."""
    with rc_context(STYLE):
        figure = new_figure(4.8 if len(saved) == 1 else 8.0, 3.9)
        for axes, one in zip(figure.subplots(1, len(saved), squeeze=False).ravel(), saved, strict=True):
            policy, done = one.stopping.policy, one.realised
            truth = policy.against == "truth"
            for way in one.ways:
                order = np.argsort(way.compute, kind="stable")
                values = (way.accuracy if truth else way.agreement)[order]
                axes.plot(way.compute[order], values, label=way.name, **LOOKS[way.name])
            if policy.stops:
                _, right = outcome(one.stopping.fresh, policy_looks(one.stopping.fresh, policy))
                at = float(right.mean()) if truth else 1 - done.risk
                spread = None if truth else [[done.interval[1] - done.risk], [done.risk - done.interval[0]]]
                axes.errorbar(done.compute, at, yerr=spread, color="#0072b2", capsize=3, linestyle="", zorder=5)
                star = {"marker": "*", "markersize": 12, "color": "#0072b2", "markeredgecolor": "white"}
                axes.plot(done.compute, at, linestyle="", zorder=6, label="calibrated policy", **star)
            if truth:
                axes.axhline(done.finished_accuracy, color="#cc79a7", linestyle="-.", label="finished video")
            else:
                axes.axhline(
                    1 - policy.risk, color="#999999", linewidth=0.8, label=f"1 - risk asked for ({policy.risk:g})"
                )
            axes.set_title(f"{policy.task}, {policy.kind.replace('_', '-')}: {done.samples} fresh problems", loc="left")
            axes.set(
                xlabel="mean compute, share of a finished run with decoding",
                ylabel="right" if truth else "agrees with the finished run",
                xlim=(0, 1.02),
            )
            axes.grid(color="#e6e6e6", linewidth=0.6)
            axes.set_axisbelow(True)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def strip_figure(one: Saved) -> Figure:
    """What the picture showed when the probe answered: the film strip, with the step that answered framed."""
    assert one.film is not None
    figure = film_strip(one.film.rows, one.film.steps)
    for row, stop in enumerate(one.stops):
        if stop is not None:
            axes = figure.axes[row * (len(one.film.steps) + 1) + 1 + one.film.steps.index(stop[0])]
            axes.set_xlabel(f"{axes.get_xlabel()}\n{stop[1]}", fontweight="bold", fontsize=8, labelpad=2)
            for spine in axes.spines.values():
                spine.set(color="black", linewidth=2.5)
    return figure


def _film(
    model: Any, pipeline: PipelineConfig, task: Task, stopping: Stopping, seed: int
) -> tuple[Film | None, list[tuple[int, str] | None]]:
    """The first fresh problem that was answered early as the video ends, the first answered otherwise, the first that
    was finished; those that exist."""
    records, policy = stopping.fresh, stopping.policy
    looks = policy_looks(records, policy)
    early, (agreed, _) = looks < len(policy.cells), outcome(records, looks)
    sorts = {"as drawn": early & agreed, "otherwise": early & ~agreed, "finished": ~early}
    chosen = {title: int(np.flatnonzero(sort)[0]) for title, sort in sorts.items() if sort.any()}
    stops: list[tuple[int, str] | None] = []
    for i in chosen.values():
        answered = None if looks[i] == len(policy.cells) else policy.cells[looks[i]].step
        said = f"probe: {records.said[i, min(looks[i], len(policy.cells) - 1)]}"
        stops.append(None if answered is None else (answered, said))
    first = {stop[0] for stop in stops if stop is not None}
    usual = [s for s in decode_steps("auto", pipeline.steps) if s not in first]
    steps = tuple(sorted({*first, *usual[: STRIP - len(first)]}))
    drawn = with_noise([records.problems[i] for i in chosen.values()], seed)
    if not drawn:
        return None, []
    watched = zip(chosen.items(), watch(model, pipeline, task, drawn, steps), strict=True)
    rows = [
        film_row(task, title, records.problems[i], clips, None if records.drawn[i] < 0 else int(records.drawn[i]))
        for (title, i), clips in watched
    ]
    return Film(tuple(rows), steps), stops


def _ways_table(one: Saved, cost: Cost, total: int) -> list[list[str]]:
    """Heading and rows. Ways without a promise are shown at their cheapest setting that agrees often enough, chosen in
    hindsight on these very problems."""
    policy, done = one.stopping.policy, one.realised
    whole, truth = cost.run(total), policy.against == "truth"
    wanted = done.finished_accuracy if truth else 1 - policy.risk
    rows = [["way", "setting", "compute", "GFLOP", "evaluations", "seconds", "agrees", "right"]]
    rows.append(["finished video", f"{total} steps", "1.000", f"{whole / 1e9:.2f}", f"{total}",
                 f"{done.finished_seconds:.3f}", "1.000",
                 f"{done.finished_accuracy:.3f}"])  # fmt: skip
    for way in one.ways[:3]:
        able = np.flatnonzero((way.accuracy if truth else way.agreement) >= wanted)
        if not len(able):
            rows.append([way.name, "never good enough", *["-"] * 6])
            continue
        i = able[np.argmin(way.compute[able])]
        rows.append([way.name, way.settings[i], f"{way.compute[i]:.3f}", f"{way.compute[i] * whole / 1e9:.2f}",
                     f"{way.evaluations[i]:.2f}", f"{way.seconds[i]:.3f}", f"{way.agreement[i]:.3f}",
                     f"{way.accuracy[i]:.3f}"])  # fmt: skip
    agreed, right = outcome(one.stopping.fresh, policy_looks(one.stopping.fresh, policy))
    rows.append(["calibrated policy", f"{policy.threshold:.4f} sure" if policy.stops else "never stops",
                 f"{done.compute:.3f}", f"{done.compute * whole / 1e9:.2f}", f"{done.evaluations:.2f}",
                 f"{done.seconds:.3f}", f"{agreed.mean():.3f}", f"{right.mean():.3f}"])  # fmt: skip
    return rows


def _live_table(one: Saved) -> list[list[str]]:
    rows = [["problem", "read at", "probe says", "sure", "video ends on", "right", "seconds"]]
    for live in one.live:
        end = "none" if live.drawn < 0 else str(live.drawn)
        said = live.answer
        where = "finished" if said is None else f"step {said.step}, layer {said.layer}"
        rows.append([
            f"{live.problem.kind} {live.problem.index}", where, "-" if said is None else str(said.prediction),
            "-" if said is None else f"{said.confidence:.2f}", end, " or ".join(map(str, live.right)),
            f"{live.seconds:.2f}",
        ])  # fmt: skip
    return rows


def _described(saved: Sequence[Saved], cost: Cost, clock: Cost, total: int) -> dict[str, Any]:
    """Everything the tables and figures show, as JSON can hold it."""
    kinds = {
        one.stopping.policy.kind: {
            "policy": one.stopping.policy.described(),
            "first_look_errors_on_validation": one.stopping.first_errors,
            "realised": asdict(one.realised),
            "ways": {
                way.name: {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(way).items()}
                for way in one.ways
            },
            "live": [
                {"problem": live.problem.name, "answer": live.answer, "drawn": live.drawn, "right": live.right,
                 "seconds": live.seconds, "same": live.same}
                for live in one.live
            ],
        }
        for one in saved
    }  # fmt: skip
    return {"steps": total, "flops": asdict(cost), "seconds": asdict(clock), "kinds": kinds}
