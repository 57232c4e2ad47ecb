"""Figures of the checks: generalisation matrices, and four panels for the best cell of every target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from cosprobe.cells import EMBED, X0
from cosprobe.evaluation import LEAST_PROBLEMS, Grid
from cosprobe.evaluation.checks import WEIGHTS, Checks, Matrix
from cosprobe.reporting.figures import GUESS, INPUT, PROBE, SHOWN, STYLE, bold, new_figure, skill_colours, ticks

WRITTEN = 20  # numbers are written into matrices of at most so many squares
ANSWERS = "share of right answers"
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {  # label and style of a learning curve
    "best": ("probe", {"color": PROBE, "marker": "o", "linewidth": 1.8}),
    EMBED: ("input of block 0", {"color": INPUT, "marker": "s", "linestyle": "--", "linewidth": 1.2}),
    X0: ("latent of x0-hat", {"color": SHOWN, "marker": "o", "markerfacecolor": "white", "linestyle": "--"}),
}
WEIGHT_STYLE: dict[str, dict[str, Any]] = {
    "trained": {"color": PROBE, "marker": "o"},
    "permuted": {"color": SHOWN, "marker": "^"},
    "fresh": {"color": GUESS, "marker": "s"},
}


def generalisation(grid: Grid, found: Sequence[Matrix]) -> Figure:
    """One row of heat maps per target, one for each of its matrices.

    Rows of a heat map: trained on. Columns: tested on. Colour: test accuracy, from light for chance to dark for 1.
    Layer and step are those of the best cell, except on the axis that varies.
    """
    by_target = {name: [m for m in found if m.target == name] for name in dict.fromkeys(m.target for m in found)}
    with rc_context(STYLE):
        figure = new_figure(8.0, 2.55 * len(by_target))
        parts = figure.subfigures(len(by_target), squeeze=False).ravel()
        for part, (name, row) in zip(parts, by_target.items(), strict=True):
            chance = float(grid.plane(name).chance)
            cell = grid.best(name).cell
            at = f"layer {cell.layer}, step {cell.step} where not an axis"
            about = f"trained on rows, tested on columns; {at} (above: lowest to highest)"
            part.suptitle(f"$\\bf{{{bold(name)}}}$: {about}", x=0.01, ha="left", fontsize=9)
            panels = part.subplots(1, len(row), squeeze=False).ravel()
            for axes, matrix in zip(panels, row, strict=True):
                _matrix(axes, matrix, chance)
            bar = part.colorbar(ScalarMappable(Normalize(chance, 1), skill_colours()), ax=list(panels), extend="min",
                                aspect=16, pad=0.015, fraction=0.04)  # fmt: skip
            bar.set_ticks([chance, 1], labels=[f"{chance:.2f}\n(chance)", "1"])
            bar.set_label(ANSWERS, labelpad=-16)
            bar.outline.set_linewidth(0.5)
    return figure


def _matrix(axes: Axes, matrix: Matrix, chance: float) -> None:
    axes.pcolormesh(matrix.accuracy, cmap=skill_colours(), vmin=chance, vmax=1)
    axes.invert_yaxis()
    for axis, names in ((axes.xaxis, matrix.test), (axes.yaxis, matrix.train)):
        positions = range(len(names)) if len(names) <= 8 else ticks(np.arange(len(names)), 5)
        axis.set_ticks([i + 0.5 for i in positions], [names[i] for i in positions])
    axes.tick_params(length=2)
    if matrix.accuracy.size <= WRITTEN:
        for (row, column), value in np.ndenumerate(matrix.accuracy):
            ink = "white" if (value - chance) / (1 - chance) > 0.5 else "black"
            axes.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
    low, high = matrix.accuracy.min(), matrix.accuracy.max()
    axes.set_title(f"{low:.2f} to {high:.2f}", loc="left")
    axes.set(xlabel=f"tested on {matrix.axis}", ylabel=f"trained on {matrix.axis}")


def check_panels(grid: Grid, checks: Checks) -> Figure:
    """One row of panels per target: learning curve, reliability, random weights, latency by layer."""
    with rc_context(STYLE):
        heights = [*[2.35] * len(checks.best), 0.75]  # one legend per column, below all rows
        figure = new_figure(8.0, sum(heights))
        parts = figure.subfigures(len(heights), squeeze=False, height_ratios=heights).ravel()
        rows = []
        for part, (name, cell) in zip(parts[:-1], checks.best.items(), strict=True):
            title = f"$\\bf{{{bold(name)}}}$, best cell: layer {cell.layer}, step {cell.step}"
            title += f", first of {grid.folds} folds" if grid.folds else ""
            part.suptitle(title, x=0.01, ha="left", fontsize=9)
            row = part.subplots(1, 4)
            _learning(row[0], checks, name)
            _reliability(row[1], checks, name)
            _weights(row[2], checks, name)
            _latency(row[3], grid, checks, name)
            for axes in row:
                axes.grid(color="#e6e6e6", linewidth=0.6)
                axes.set_axisbelow(True)
            rows.append(row)
        for i, column in enumerate(np.array(rows).T):
            handles, labels = max((axes.get_legend_handles_labels() for axes in column), key=lambda pair: len(pair[1]))
            if labels:
                parts[-1].legend(handles, labels, bbox_to_anchor=((i + 0.55) / 4, 1), loc="upper center", frameon=False)
    return figure


def _learning(axes: Axes, checks: Checks, name: str) -> None:
    found = [length for length in checks.lengths if length.target == name]
    axes.set_title("fewer problems", loc="left")
    axes.set(xlabel="training problems", ylabel=ANSWERS, ylim=(0, 1.04))
    if not found:
        _absent(axes)
        return
    curve = found[0].accuracy
    axes.fill_between(found[0].sizes, curve.lower[0], curve.upper[0], color=PROBE, alpha=0.15, linewidth=0)
    for source, values in zip(found[0].names, curve.value, strict=True):
        label, style = SOURCES[source]
        axes.plot(found[0].sizes, values, label=label, markersize=4, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(found[0].sizes, [str(size) for size in found[0].sizes])
    axes.minorticks_off()


def _reliability(axes: Axes, checks: Checks, name: str) -> None:
    axes.set_title("its probabilities", loc="left")
    axes.set(xlabel="probability it gives", ylabel=ANSWERS, xlim=(0, 1.04), ylim=(0, 1.04))
    axes.plot([0, 1], [0, 1], color=GUESS, linewidth=1, linestyle=":", label="equal")
    styles: tuple[tuple[str, dict[str, Any]], ...] = (
        ("with temperature", {"color": PROBE, "marker": "o"}),
        ("without", {"color": SHOWN, "marker": "s", "markerfacecolor": "white", "linestyle": "--"}),
    )
    for curve, (label, style) in zip(checks.reliability[name], styles, strict=True):
        axes.plot(curve.confidence, curve.accuracy, label=label, linewidth=1.4, markersize=4, **style)


def _weights(axes: Axes, checks: Checks, name: str) -> None:
    table = checks.weights
    axes.set(xlabel="layer", ylabel=ANSWERS, ylim=(0, 1.04))
    axes.set_title("random weights", loc="left")
    if table is None or name not in table.targets:
        _absent(axes)
        return
    first = min(cell.step for cell in table.cells)
    axes.set_xlabel(f"layer (at step {first})")
    at = [i for i, cell in enumerate(table.cells) if cell.step == first and cell.position == table.cells[0].position]
    layers, t = np.array([table.cells[i].layer for i in at]), table.targets.index(name)
    _by_layer(axes, layers)
    for w, how in enumerate(WEIGHTS):
        value = table.accuracy[t, w, at]
        spread = [value - table.lower[t, w, at], table.upper[t, w, at] - value]
        beside = 0.2 * (w - 1)  # of a layer, so that intervals do not cover each other
        axes.errorbar(layers + beside, value, spread, label=f"{how} weights", markersize=3, linewidth=1.2,
                      elinewidth=0.7, **WEIGHT_STYLE[how])  # fmt: skip


def _latency(axes: Axes, grid: Grid, checks: Checks, name: str) -> None:
    plane = grid.plane(name)
    axes.set_title("latency by layer", loc="left")
    axes.set(xlabel="layer", ylabel="latency (step)")
    known = np.isfinite(plane.latency.values)
    if not known.any():
        few = int(plane.n_validation_problems) < LEAST_PROBLEMS or int(plane.n_test_problems) < LEAST_PROBLEMS
        reason = "too few problems" if few else "no evidence\non validation"
        _absent(axes, "not measured\nwith folds" if grid.folds else reason)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    layers, value = plane.layer.values[known], plane.latency.values[known]
    spread = np.abs(np.stack([plane.latency_lower.values[known], plane.latency_upper.values[known]]) - value)
    style = {"color": PROBE, "fmt": "o-", "markersize": 3.5, "linewidth": 1.5, "capsize": 2}
    axes.errorbar(layers, value, yerr=spread, label="probe", **style)
    if np.isfinite(plane.x0_latency):
        axes.axhline(float(plane.x0_latency), color=SHOWN, linewidth=1.5, linestyle="--", label="x0-hat")
    axes.set_ylim(-0.04 * float(plane.step.values[-1]), float(plane.step.values[-1]) + 0.5)
    _by_layer(axes, plane.layer.values)


def _by_layer(axes: Axes, layers: np.ndarray) -> None:
    """Sets the axis of a panel by layer: it spans all layers, with integer ticks."""
    axes.set_xticks(ticks(layers, 5))
    axes.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)


def _absent(axes: Axes, reason: str = "too few samples") -> None:
    axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", va="center", color="#666666")
