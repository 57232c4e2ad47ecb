"""Figures of the checks: generalisation matrices, and four panels for the best cell of every target."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cosprobe.evaluation import LEAST_PROBLEMS, Grid
from cosprobe.evaluation.checks import WEIGHTS, Checks, Matrix
from cosprobe.reporting.figures import OUTLINE, STYLE, bold, new_figure, ticks

COLOURS = {"trained": "#225ea8", "permuted": "#e6550d", "fresh": "#9a9a9a"}
ACROSS = 4  # matrices per row
LINE = {"linewidth": 1.5, "markersize": 3.5, "marker": "o"}


def generalisation(found: Sequence[Matrix]) -> Figure:
    """One heat map per matrix. Rows: trained on. Columns: tested on. Colour: test accuracy, white for 0, dark for 1."""
    rows = -(-len(found) // ACROSS)
    columns = min(ACROSS, len(found))
    with rc_context(STYLE):
        figure = new_figure(8.0, 0.5 + 2.3 * rows)
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes, matrix in zip(panels.ravel(), found, strict=False):
            image = axes.pcolormesh(matrix.accuracy, cmap="Blues", vmin=0, vmax=1)
            axes.invert_yaxis()
            _names(axes, matrix)
            if matrix.accuracy.size <= 20:
                _write(axes, matrix.accuracy)
            axes.set_title(f"$\\bf{{{bold(matrix.target)}}}$", loc="left")
            axes.set(xlabel=f"tested on {matrix.axis}", ylabel=f"trained on {matrix.axis}")
        for axes in panels.ravel()[len(found) :]:
            axes.set_visible(False)
        bar = figure.colorbar(image, ax=panels, aspect=30, pad=0.015, fraction=0.04)
        bar.set_label("test accuracy")
        bar.outline.set_linewidth(0.5)
    return figure


def _names(axes: Axes, matrix: Matrix) -> None:
    for axis, names in ((axes.xaxis, matrix.test), (axes.yaxis, matrix.train)):
        positions = range(len(names)) if len(names) <= 8 else ticks(np.arange(len(names)), 5)
        axis.set_ticks([i + 0.5 for i in positions], [names[i] for i in positions])
    axes.tick_params(length=2)


def _write(axes: Axes, values: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(values):
        ink = "white" if value > 0.6 else "black"
        axes.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)


def check_panels(grid: Grid, checks: Checks) -> Figure:
    """One row of panels per target: learning curve, reliability, random weights, latency by layer."""
    with rc_context(STYLE):
        figure = new_figure(8.0, 0.4 + 2.3 * len(checks.best))
        panels = figure.subplots(len(checks.best), 4, squeeze=False)
        for row, name in zip(panels, checks.best, strict=True):
            _learning(row[0], checks, name)
            _reliability(row[1], checks, name)
            _weights(row[2], checks, name)
            _latency(row[3], grid, checks, name)
            row[0].set_title(
                f"$\\bf{{{bold(name)}}}$, layer {checks.best[name].layer}, step {checks.best[name].step}", loc="left"
            )
            for axes in row:
                axes.grid(color="#e6e6e6", linewidth=0.6)
                axes.set_axisbelow(True)
    return figure


def _learning(axes: Axes, checks: Checks, name: str) -> None:
    found = [length for length in checks.lengths if length.target == name]
    axes.set(xlabel="training problems", ylabel="test accuracy", ylim=(0, 1.02))
    if not found:
        _absent(axes)
        return
    for i, source in enumerate(found[0].names):
        label = "best cell" if i == 0 else source
        curve = found[0].accuracy
        line = axes.plot(
            found[0].sizes, curve.value[i], label=label, color=("#225ea8", "#9a9a9a", OUTLINE)[i % 3], **LINE
        )[0]
        if i == 0:
            axes.fill_between(
                found[0].sizes, curve.lower[i], curve.upper[i], color=line.get_color(), alpha=0.15, linewidth=0
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(found[0].sizes, [str(size) for size in found[0].sizes])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=7.5, handlelength=1.2)


def _reliability(axes: Axes, checks: Checks, name: str) -> None:
    axes.plot([0, 1], [0, 1], color="#9a9a9a", linewidth=1)
    axes.set(xlabel="predicted probability", ylabel="share right", xlim=(0, 1.02), ylim=(0, 1.02))
    for curve, label, colour in zip(
        checks.reliability[name], ("calibrated", "raw"), ("#225ea8", "#9a9a9a"), strict=True
    ):
        axes.plot(curve.confidence, curve.accuracy, label=label, color=colour, **LINE)
    axes.legend(frameon=False, fontsize=7.5, handlelength=1.2)


def _weights(axes: Axes, checks: Checks, name: str) -> None:
    table = checks.weights
    axes.set(xlabel="layer", ylabel="test accuracy", ylim=(0, 1.6), yticks=np.linspace(0, 1, 6))  # room for the legend
    if table is None or name not in table.targets:
        _absent(axes)
        return
    first = min(cell.step for cell in table.cells)
    at = [i for i, cell in enumerate(table.cells) if cell.step == first and cell.position == table.cells[0].position]
    layers, t = [table.cells[i].layer for i in at], table.targets.index(name)
    _by_layer(axes, np.array(layers))
    for w, how in enumerate(WEIGHTS):
        axes.plot(layers, table.accuracy[t, w, at], label=how, color=COLOURS[how], **LINE)
        axes.fill_between(
            layers, table.lower[t, w, at], table.upper[t, w, at], color=COLOURS[how], alpha=0.15, linewidth=0
        )
    axes.legend(
        loc="upper left",
        frameon=False,
        fontsize=7.5,
        handlelength=1.2,
        title=f"step {first}, {table.samples} samples",
        title_fontsize=7.5,
    )


def _latency(axes: Axes, grid: Grid, checks: Checks, name: str) -> None:
    plane = grid.plane(name)
    axes.set(xlabel="layer", ylabel="latency, steps")
    known = np.isfinite(plane.latency.values)
    if not known.any():
        few = int(plane.n_validation_problems) < LEAST_PROBLEMS or int(plane.n_test_problems) < LEAST_PROBLEMS
        _absent(axes, "too few problems" if few else "no evidence\non validation")
        axes.set_xticks([])
        axes.set_yticks([])
        return
    layers, value = plane.layer.values[known], plane.latency.values[known]
    spread = np.abs(np.stack([plane.latency_lower.values[known], plane.latency_upper.values[known]]) - value)
    axes.errorbar(layers, value, yerr=spread, color="#225ea8", fmt="o-", markersize=3.5, linewidth=1.5, capsize=2)
    if np.isfinite(plane.x0_latency):
        axes.axhline(float(plane.x0_latency), color=OUTLINE, linewidth=1.5, label="x0-hat")
        axes.legend(frameon=False, fontsize=7.5, handlelength=1.2)
    axes.set_ylim(bottom=-0.3)
    _by_layer(axes, plane.layer.values)


def _by_layer(axes: Axes, layers: np.ndarray) -> None:
    """Sets the axis of a panel by layer: it spans all layers, with integer ticks."""
    axes.set_xticks(ticks(layers, 5))
    axes.set_xlim(layers[0] - 0.3, layers[-1] + 0.3)


def _absent(axes: Axes, reason: str = "too few samples") -> None:
    axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", va="center", color="#8a8a8a")
