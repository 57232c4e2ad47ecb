"""Report of the stopping policies: printed tables, and early.json, early.md and figures in report/early/ of the run."""

from __future__ import annotations

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

from cosprobe.activations import Sampler, flops, images, seconds, watch
from cosprobe.config import EarlyConfig, decode_steps
from cosprobe.early_exit.calibrate import Calibrated, LiveRun, calibrate_policies, run_live
from cosprobe.early_exit.frontier import (
    PolicyResult,
    Prices,
    StoppingRule,
    evaluate_policy,
    outcome,
    policy_exits,
    stopping_rules,
)
from cosprobe.files import make_folder, whole_file, write_json
from cosprobe.probes import ProbeBank
from cosprobe.reporting import STYLE, WIDTH, Film, film_row, film_strip, markdown_table, new_figure, open_table
from cosprobe.runtime import rank_and_world
from cosprobe.tasks import Problem, TaskConfig, with_noise

LINES = {
    "fixed step": {"color": "#444444", "marker": "s", "markersize": 3.5, "linestyle": ":"},
    "parsed x0-hat": {"color": "#e6550d", "marker": "o", "markersize": 4, "linestyle": "--"},
    "entropy rule": {"color": "#009e73", "linestyle": "-", "linewidth": 1.3},
    "policy": {"color": "#0072b2", "linestyle": "-", "linewidth": 1.3},
}
HINDSIGHT = (
    "For fixed step, parsed x0-hat and entropy rule, the table shows the cheapest threshold that is good enough on "
    "these test problems. It was chosen on them, so it has no guarantee. The calibrated policy was fixed before."
)
LIVE = 6  # problems of each kind that are sampled again and stopped by the policy
STRIP = 7  # largest number of steps in a film strip


@dataclass(frozen=True)
class KindReport:
    """A calibrated policy and its results on fresh problems.

    film: None if there is no fresh problem to show. stops: for each row of the film, the step of the early answer and
    the answer, None for a run that was finished.
    """

    calibrated: Calibrated
    rules: list[StoppingRule]
    result: PolicyResult
    live: list[LiveRun]
    film: Film | None
    stops: list[tuple[int, str] | None]


def answer_early(
    sampler: Sampler, task: TaskConfig, bank: ProbeBank, use: EarlyConfig, seed: int, folder: Path
) -> None:
    """Calibrates stopping policies for the run in `folder`, saves them in its bank, and writes the report.

    This is `python probe.py use=early`. sampler: the loaded pipeline and the task of that run. task: settings of that
    task. With several processes, all of them sample, and the first one writes. Raises InputError as
    `calibrate_policies` does.
    """
    found, bank = calibrate_policies(sampler, task, bank, use, seed, folder)
    if rank_and_world()[0]:
        return
    prices = measure_prices(sampler, found[0].fresh.problems[0])
    write_early_report([report_on_fresh(sampler, bank, one, prices, seed) for one in found], prices, folder)


def measure_prices(sampler: Sampler, problem: Problem) -> Prices:
    """Measures the cost of the parts of a run on one problem."""
    one = (images(sampler.task, [problem]), [problem.prompt])
    model, config = sampler.model, sampler.config
    return Prices(flops(model, config, *one), seconds(model, config, *one), config.steps)


def report_on_fresh(sampler: Sampler, bank: ProbeBank, calibrated: Calibrated, prices: Prices, seed: int) -> KindReport:
    """Evaluates a policy on its fresh problems."""
    live = run_live(sampler, bank, calibrated, LIVE, seed)
    film, stops = _film(sampler, calibrated, seed)
    rules, result = stopping_rules(calibrated, prices), evaluate_policy(calibrated, prices)
    return KindReport(calibrated, rules, result, live, film, stops)


def write_early_report(
    tested: Sequence[KindReport], prices: Prices, run_dir: Path, console: Console | None = None
) -> Path:
    """Prints the tables and writes the files in run_dir/report/early, early.md last. Returns that folder."""
    folder = Path(run_dir) / "report" / "early"
    console = console or (Console() if Console().is_terminal else Console(width=max(WIDTH, Console().width)))
    make_folder(folder)
    figures = {"frontier.png": partial(frontier_figure, tested)}
    for one in tested:
        if one.film is not None:
            figures[f"film_{one.calibrated.policy.kind}.png"] = partial(strip_figure, one)
    for name, draw in figures.items():
        with whole_file(folder / name) as part:
            draw().savefig(part)
    write_json(folder / "early.json", _described(tested, prices))
    page = ["# Early answers", ""]
    for one in tested:
        kind, task = one.calibrated.policy.kind, one.calibrated.policy.task
        console.print(f"\n[bold]{task}, {kind}[/bold]")
        page += [f"## {task}, {kind}", ""]
        for rows in (_rules_table(one, prices), _live_table(one)):
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


def remarks(one: KindReport) -> list[str]:
    """Sentences on the guarantee of the policy, its risk and savings on fresh problems, and its accuracy."""
    policy, result = one.calibrated.policy, one.result
    answers_all = policy.error_reference == "model_answer"
    error = "differs from the answer of the finished video" if answers_all else "is wrong"
    share = "of all problems" if answers_all else "of the early answers"
    risk = f"at most {policy.risk:g} {share} (confidence {policy.confidence:g})"
    if not policy.stops:
        return [
            f"No threshold is shown to have errors on {risk}: p = {policy.p:.3f} on {policy.problems} calibration "
            "problems. Every run is finished. Allow more risk or calibrate on more problems."
        ]
    lines = [
        f"An error is an early answer that {error}.",
        f"Guarantee: errors are {risk}. A run stops at the first exit point with a confidence of at least "
        f"{policy.threshold:.4f} (calibration: {policy.errors} errors in {policy.answered} early answers, "
        f"{policy.problems} problems, p = {policy.p:.3f}).",
        f"On fresh problems: {result.errors} errors, risk {result.risk:.3f} [{result.interval[0]:.3f}, "
        f"{result.interval[1]:.3f}]; {result.answered} of {result.samples} runs stopped early.",
        f"Mean compute: {result.compute:.3f} of a finished, decoded run; {result.evaluations:.2f} network evaluations; "
        f"{result.seconds:.3f} s per problem instead of {result.finished_seconds:.3f}.",
    ]
    gains = (("The policy", result.gain), ("Stopping at the first exit point", result.first_exit_gain))
    for name, (mean, lower, upper) in gains:
        verdict = (
            "right more often than"
            if lower > 0
            else "right less often than"
            if upper < 0
            else "not shown to differ from"
        )
        lines.append(
            f"{name} is {verdict} the finished video, which is right on {result.finished_accuracy:.3f}: "
            f"{mean:+.3f} [{lower:+.3f}, {upper:+.3f}]."
        )
    same = sum(live.same for live in one.live)
    lines.append(
        f"Sampled again and stopped by the policy: {same} of {len(one.live)} runs stopped at the exit point computed "
        "from the trajectories, with the same answer."
    )
    return lines


def frontier_figure(tested: Sequence[KindReport]) -> Figure:
    """Agreement with the finished run (accuracy for the reference `truth`) against compute, one panel per kind."""
    with rc_context(STYLE):
        figure = new_figure(4.8 if len(tested) == 1 else 8.0, 3.9)
        for axes, one in zip(figure.subplots(1, len(tested), squeeze=False).ravel(), tested, strict=True):
            policy, result = one.calibrated.policy, one.result
            truth = policy.error_reference == "truth"
            for rule in one.rules:
                order = np.argsort(rule.compute, kind="stable")
                values = (rule.accuracy if truth else rule.agreement)[order]
                axes.plot(rule.compute[order], values, label=rule.name, **LINES[rule.name])
            if policy.stops:
                fresh = one.calibrated.fresh
                at = float(outcome(fresh, policy_exits(fresh, policy)).correct.mean()) if truth else 1 - result.risk
                spread = None if truth else [[result.interval[1] - result.risk], [result.risk - result.interval[0]]]
                axes.errorbar(result.compute, at, yerr=spread, color="#0072b2", capsize=3, linestyle="", zorder=5)
                star = {"marker": "*", "markersize": 12, "color": "#0072b2", "markeredgecolor": "white"}
                axes.plot(result.compute, at, linestyle="", zorder=6, label="calibrated policy", **star)
            if truth:
                axes.axhline(result.finished_accuracy, color="#cc79a7", linestyle="-.", label="finished video")
            else:
                axes.axhline(
                    1 - policy.risk, color="#999999", linewidth=0.8, label=f"1 - risk asked for ({policy.risk:g})"
                )
            axes.set_title(
                f"{policy.task}, {policy.kind.replace('_', '-')}: {result.samples} fresh problems", loc="left"
            )
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


def strip_figure(one: KindReport) -> Figure:
    """A film strip of x0-hat in which a frame marks the step of the early answer."""
    assert one.film is not None
    figure = film_strip(one.film.rows, one.film.steps)
    for row, stop in enumerate(one.stops):
        if stop is not None:
            axes = figure.axes[row * (len(one.film.steps) + 1) + 1 + one.film.steps.index(stop[0])]
            axes.set_xlabel(f"{axes.get_xlabel()}\n{stop[1]}", fontweight="bold", fontsize=8, labelpad=2)
            for spine in axes.spines.values():
                spine.set(color="black", linewidth=2.5)
    return figure


def _film(sampler: Sampler, calibrated: Calibrated, seed: int) -> tuple[Film | None, list[tuple[int, str] | None]]:
    """Film of up to three fresh problems, and their early answers.

    They are the first problem whose early answer equals that of the video, the first whose early answer differs, and
    the first that was finished.
    """
    fresh, policy = calibrated.fresh, calibrated.policy
    exits, last = policy_exits(fresh, policy), len(policy.cells) - 1
    early, agrees = exits <= last, outcome(fresh, exits).agrees
    sorts = {"as the video": early & agrees, "otherwise": early & ~agrees, "finished": ~early}
    chosen = {title: int(np.flatnonzero(sort)[0]) for title, sort in sorts.items() if sort.any()}
    if not chosen:
        return None, []
    stops: list[tuple[int, str] | None] = [
        (policy.cells[exits[i]].step, f"probe: {fresh.predictions[i, exits[i]]}") if early[i] else None
        for i in chosen.values()
    ]
    answered = {stop[0] for stop in stops if stop is not None}
    usual = [s for s in decode_steps("auto", sampler.config.steps) if s not in answered]
    steps = tuple(sorted({*answered, *usual[: STRIP - len(answered)]}))
    watched = watch(sampler, with_noise([fresh.problems[i] for i in chosen.values()], seed), steps)
    ends = {i: None if fresh.model_answer[i] < 0 else int(fresh.model_answer[i]) for i in chosen.values()}
    rows = [
        film_row(sampler.task, title, fresh.problems[i], clips, ends[i])
        for (title, i), clips in zip(chosen.items(), watched, strict=True)
    ]
    return Film(tuple(rows), steps), stops


def _rules_table(one: KindReport, prices: Prices) -> list[list[str]]:
    """Heading and rows of the table of stopping rules.

    Rules without a guarantee are shown at the cheapest threshold that is good enough, chosen on these problems.
    """
    policy, result, fresh = one.calibrated.policy, one.result, one.calibrated.fresh
    whole, truth = prices.flops.run(prices.steps), policy.error_reference == "truth"
    wanted = result.finished_accuracy if truth else 1 - policy.risk

    def row(name: str, threshold: str, compute: float, *numbers: float) -> list[str]:
        evaluations, seconds, agreement, accuracy = numbers
        return [name, threshold, f"{compute:.3f}", f"{compute * whole / 1e9:.2f}", f"{evaluations:.2f}",
                f"{seconds:.3f}", f"{agreement:.3f}", f"{accuracy:.3f}"]  # fmt: skip

    rows = [
        ["rule", "threshold", "compute", "GFLOP", "evaluations", "seconds", "agrees", "right"],
        row("finished video", f"{prices.steps} steps", 1.0, float(prices.steps), result.finished_seconds, 1.0,
            result.finished_accuracy),
    ]  # fmt: skip
    for rule in one.rules[:3]:
        able = np.flatnonzero((rule.accuracy if truth else rule.agreement) >= wanted)
        if not len(able):
            rows.append([rule.name, "never good enough", *["-"] * 6])
            continue
        i = able[np.argmin(rule.compute[able])]
        numbers = (values[i] for values in (rule.evaluations, rule.seconds, rule.agreement, rule.accuracy))
        rows.append(row(rule.name, rule.thresholds[i], rule.compute[i], *numbers))
    ends = outcome(fresh, policy_exits(fresh, policy))
    threshold = f"confidence {policy.threshold:.4f}" if policy.stops else "never stops"
    rows.append(row("calibrated policy", threshold, result.compute, result.evaluations, result.seconds,
                    float(ends.agrees.mean()), float(ends.correct.mean())))  # fmt: skip
    return rows


def _live_table(one: KindReport) -> list[list[str]]:
    """Heading and rows of the table of runs that the policy stops."""
    rows = [["problem", "stopped at", "answer", "confidence", "video ends on", "right", "seconds"]]
    for live in one.live:
        end, early = "none" if live.model_answer < 0 else str(live.model_answer), live.answer
        at = "finished" if early is None else f"step {early.step}, layer {early.layer}"
        answer, confidence = ("-", "-") if early is None else (str(early.prediction), f"{early.confidence:.2f}")
        right = " or ".join(map(str, live.solutions))
        rows.append([live.problem.title, at, answer, confidence, end, right, f"{live.seconds:.2f}"])
    return rows


def _described(tested: Sequence[KindReport], prices: Prices) -> dict[str, Any]:
    """The numbers of the tables and figures, for JSON."""
    kinds = {
        one.calibrated.policy.kind: {
            "policy": one.calibrated.policy.described(),
            "first_exit_errors_on_validation": one.calibrated.first_errors,
            "tables": {"stopping rules": _rules_table(one, prices), "runs that the policy stopped": _live_table(one)},
            "remarks": [HINDSIGHT, *remarks(one)],
            "result": asdict(one.result),
            "rules": {
                rule.name: {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(rule).items()}
                for rule in one.rules
            },
            "live": [
                {"problem": live.problem.name, "answer": live.answer, "model_answer": live.model_answer,
                 "solutions": live.solutions, "seconds": live.seconds, "same": live.same}
                for live in one.live
            ],
        }
        for one in tested
    }  # fmt: skip
    return {"steps": prices.steps, "flops": asdict(prices.flops), "seconds": asdict(prices.seconds), "kinds": kinds}
