"""Pictures of a grid: maps of skill over layers and steps, and curves over steps.

Colour always means skill: white is what the inputs of the blocks already give, dark blue is perfect. Figures are
8 inches wide, so at 100 px per inch (a README) their smallest text is 10 px high.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from cosprobe.cells import EMBED, X0, X_T
from cosprobe.errors import InputError
from cosprobe.evaluation import ALPHA, READOUT, Grid

WORST = -0.5  # skill below this is drawn as if it were this
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 8, "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.6,
}  # fmt: skip
STEP_LABEL = "denoising step (0 = noisiest)"
LAYER_LABEL = "layer (block output)"
UNDEFINED, HATCH, OUTLINE = "#c9c9c9", "#8a8a8a", "#e6550d"

QUESTIONS = {
    "answer": "which candidate is right?",
    "choice": "which one will the model pick?",
    "perception": "visible in the first frame",
    "memory": "no longer to be seen",
    "nuisance": "should not matter, might",
    "control": "random labels: must be hatched",
}
BASELINE_STYLE = {
    X_T: ("probe on x_t, the noisy latent", {"color": "#444444", "linestyle": ":"}),
    EMBED: ("probe on embed, input of block 0", {"color": "#444444", "linestyle": "--"}),
    X0: ("probe on the latent of x0-hat", {"color": OUTLINE, "linestyle": "--"}),
    READOUT: ("forced-choice readout of decoded x0-hat", {"color": OUTLINE, "linestyle": "-", "marker": "o"}),
}


def skill_colours() -> LinearSegmentedColormap:
    """Brown below zero, white at zero, then light to dark blue: lightness falls steadily on either side of zero, so
    the map survives grey printing and every common colour blindness."""
    blues = colormaps["YlGnBu"](np.linspace(0.18, 1.0, 24))
    zero = -WORST / (1 - WORST)
    stops: list[tuple[float, Any]] = [(0.0, "#a6761d"), (zero, "#ffffff")]
    stops += [(zero + (1 - zero) * (i + 1) / 24, tuple(colour)) for i, colour in enumerate(blues)]
    return LinearSegmentedColormap.from_list("skill", stops, N=300).with_extremes(bad=UNDEFINED)


def maps(grid: Grid, targets: Sequence[str], place: str | None = None, branch: str | None = None) -> Figure:
    """One layer x step map per target, two to a row: skill, where there is no evidence, where the probe reads more
    than x0-hat shows, and the best cell. Default plane: that of each target's best cell."""
    return side_by_side([("", grid, target) for target in targets], place, branch)


def side_by_side(shown: Sequence[tuple[str, Grid, str]], place: str | None = None, branch: str | None = None) -> Figure:
    """The maps of several grids, as in `maps`. shown: name to print before the title, grid and target of each."""
    columns, rows = (1 if len(shown) == 1 else 2), -(-len(shown) // 2)
    with rc_context(STYLE):
        figure = new_figure(4.8 if columns == 1 else 8.0, 0.85 + 2.75 * rows)
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        notes = set()
        for axes, (name, grid, target) in zip(panels, shown, strict=False):
            plane, best = grid.plane(target, place, branch), grid.best(target)
            notes |= _map(axes, plane.transpose("layer", "step", ...), "layer", "step")
            inside = str(plane.place.values) == best.cell.place and str(plane.branch.values) == best.cell.branch
            if inside and best.p <= ALPHA:
                notes |= _mark(axes, _rank(plane, "step", best.cell.step), _rank(plane, "layer", int(best.cell.site)))
            _experts(axes, plane)
            axes.set_title((f"{name}: " if name else "") + _title(grid, target, plane), loc="left", linespacing=1.35)
            axes.set(xlabel=STEP_LABEL, ylabel=LAYER_LABEL)
        for axes in panels[len(shown) :]:
            axes.set_visible(False)
        _colorbar(figure, panels)
        _map_legend(figure, notes, columns)
    return figure


def headline(grid: Grid) -> Figure:
    """The two maps of the README: `answer`, where layers do the work, and `choice`, where steps do."""
    return maps(grid, grid.with_role("answer", "choice") or grid.targets[:2])


def frame_maps(grid: Grid, target: str) -> Figure:
    """Where in the video: skill by layer and place at the best cell's step, and by place and step at its layer.

    Raises ValueError when the grid has one place only.
    """
    if grid.dataset.sizes["place"] < 2:
        only = str(grid.dataset.place.values[0])
        raise InputError(f"the grid has one place, {only!r}: expected several; use probe=frames")
    best = grid.best(target)
    data = grid.dataset.sel(target=target)
    data = data.sel(branch=best.cell.branch) if "branch" in data.dims else data
    place = _rank(data, "place", best.cell.place)
    with rc_context(STYLE):
        figure = new_figure(8.0, 3.8)
        panels = figure.subplots(1, 2)
        at_step, at_layer = data.sel(step=best.cell.step), data.sel(layer=int(best.cell.site))
        notes = _map(panels[0], at_step.transpose("layer", "place", ...), "layer", "place")
        notes |= _map(panels[1], at_layer.transpose("place", "step", ...), "place", "step")
        if best.p <= ALPHA:
            notes |= _mark(panels[0], place, _rank(data, "layer", int(best.cell.site)))
            notes |= _mark(panels[1], _rank(data, "step", best.cell.step), place)
        where = "latent frame (all = mean over frames)" if "all" in data.place.values else "place"
        panels[0].set(xlabel=where, ylabel=LAYER_LABEL)
        panels[1].set(xlabel=STEP_LABEL, ylabel=where)
        panels[0].set_title(f"$\\bf{{{bold(target)}}}$, at step {best.cell.step}", loc="left")
        panels[1].set_title(f"$\\bf{{{bold(target)}}}$, at layer {best.cell.site}", loc="left")
        _colorbar(figure, panels)
        _map_legend(figure, notes, 2)
    return figure


def curves(grid: Grid, targets: Sequence[str], layers: Sequence[int] | None = None) -> Figure:
    """Accuracy over steps: some layers with their 95 % intervals, and every baseline. Default layers: the best of
    each target and up to four spread over the depth."""
    layers = default_layers(grid, targets) if layers is None else sorted(layers)
    depth = max(1, int(grid.dataset.layer.values.max()))
    with rc_context(STYLE):
        figure = new_figure(4.8 if len(targets) == 1 else 8.0, 4.3)
        panels = figure.subplots(1, len(targets), sharey=True, squeeze=False).ravel()
        for axes, target in zip(panels, targets, strict=True):
            plane = grid.plane(target).transpose("step", ...)
            for layer in layers:
                line = plane.sel(layer=layer)
                colour = colormaps["viridis_r"](0.12 + 0.88 * layer / depth)
                axes.plot(plane.step, line.accuracy, color=colour, linewidth=1.6, label=f"probe on layer {layer}")
                axes.fill_between(plane.step, line.lower, line.upper, color=colour, alpha=0.15, linewidth=0)
            for name, (label, style) in BASELINE_STYLE.items():
                values = plane.baseline_accuracy.sel(baseline=name)
                known = np.isfinite(values.values)  # x0-hat is decoded at few steps: join them
                if known.any():
                    axes.plot(plane.step[known], values[known], linewidth=1.3, markersize=3.5, label=label, **style)
            best_input = {"color": "#e6ab02", "linewidth": 1.3, "label": "strongest input, where skill is 0"}
            axes.plot(plane.step, plane.reference, **best_input)
            axes.axhline(float(plane.chance), color="#9a9a9a", linewidth=1.3, label="chance")
            own = grid.dataset.attrs["model_accuracy"]
            if target in grid.with_role("answer") and np.isfinite(own):
                axes.axhline(own, color="#cc79a7", linewidth=1.3, linestyle="-.", label="the model's own final answer")
            axes.set_title(_title(grid, target, plane), loc="left", linespacing=1.35)
            axes.set(xlabel=STEP_LABEL, ylim=(0, 1.02))
            axes.set_xticks(ticks(plane.step.values))
            axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
            axes.set_axisbelow(True)
        panels[0].set_ylabel("test accuracy (band: 95 % interval)")
        entries = [entry for axes in panels for entry in zip(*axes.get_legend_handles_labels(), strict=True)]
        found = {label: handle for handle, label in entries}
        _legend(figure, list(found.values()), list(found), 1 if len(targets) == 1 else 3)
    return figure


def default_layers(grid: Grid, targets: Sequence[str]) -> list[int]:
    """Up to four layers spread over the depth, and the best layer of each target."""
    every = grid.dataset.layer.values
    spread = every[np.linspace(0, len(every) - 1, min(4, len(every))).round().astype(int)]
    return sorted({*map(int, spread), *(int(grid.best(target).cell.site) for target in targets)})


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: nothing is kept alive, no display is needed
    return figure


def bold(text: str) -> str:
    return text.replace("_", r"\_").replace(" ", r"\ ")


def _title(grid: Grid, target: str, plane: xr.Dataset) -> str:
    """Two lines: what is decoded; from how many test samples of what, and how well."""
    kinds, best = str(plane.kinds.values), grid.best(target)
    every = {kind for names in grid.dataset.kinds.values for kind in names.split(",")}
    everything = len(every) > 1 and set(kinds.split(",")) == every
    named = " and ".join(kind.replace("_", "-") for kind in kinds.split(","))
    whose = "all problems" if everything else f"kind {named}"
    where = f", place {plane.place.values}" if grid.dataset.sizes["place"] > 1 else ""
    where += f", {plane.branch.values}" if "branch" in grid.dataset.dims else ""
    question = QUESTIONS.get(str(plane.role.values), "")
    result = f"best accuracy {best.accuracy:.2f}" if best.p <= ALPHA else "no evidence"
    return f"$\\bf{{{bold(target)}}}$: {question}\n{whose}, n = {int(plane.n_test)}, {result}{where}"


def _map(axes: Axes, data: xr.Dataset, rows: str, columns: str) -> set[str]:
    """Draws skill with its marks; returns which marks occur."""
    skill, p, p_excess = (data[name].values for name in ("skill", "p_evidence", "p_excess"))
    axes.pcolormesh(np.ma.masked_invalid(skill), cmap=skill_colours(), vmin=WORST, vmax=1, edgecolors="none")
    blind, ahead, undefined = ~(p <= ALPHA), (p_excess <= ALPHA) & (p <= ALPHA), np.isnan(skill)
    notes = {name for name, mask in (("blind", blind), ("ahead", ahead), ("undefined", undefined)) if mask.any()}
    if blind.any():
        hatched = axes.pcolor(np.ma.masked_where(~blind, np.zeros(skill.shape)), hatch="/////", linewidth=0)
        hatched.set(facecolor="none", edgecolor=HATCH)
    axes.add_collection(LineCollection(_border(ahead), colors=OUTLINE, linewidths=1.8, capstyle="round"))
    for axis, name in ((axes.xaxis, columns), (axes.yaxis, rows)):
        names = data[name].values
        shown = range(len(names)) if names.dtype.kind in "UO" else [list(names).index(t) for t in ticks(names)]
        axis.set_ticks([i + 0.5 for i in shown], [str(names[i]) for i in shown])
    axes.tick_params(length=2)
    return notes


def _border(mask: Bool[np.ndarray, "row column"]) -> list[list[tuple[int, int]]]:
    """Segments between cells inside and outside of a mask, cells being unit squares from the origin."""
    inside = np.pad(mask, 1)
    below, left = inside[1:, 1:-1] != inside[:-1, 1:-1], inside[1:-1, 1:] != inside[1:-1, :-1]
    flat = [[(int(x), int(y)), (int(x) + 1, int(y))] for y, x in np.argwhere(below)]
    return flat + [[(int(x), int(y)), (int(x), int(y) + 1)] for y, x in np.argwhere(left)]


def _rank(data: xr.Dataset, axis: str, value: int | str) -> int:
    """Where a value stands on an axis."""
    return data[axis].values.tolist().index(value)


def _mark(axes: Axes, column: int, row: int) -> set[str]:
    """The best cell."""
    axes.plot(column + 0.5, row + 0.5, "*", color="white", markersize=11, markeredgecolor="black", markeredgewidth=0.9)
    return {"best"}


def _experts(axes: Axes, plane: xr.Dataset) -> None:
    """A line where another expert takes over, with both names."""
    names = plane.expert.values
    for i in np.flatnonzero(names[1:] != names[:-1]) + 1:
        axes.axvline(i, color="black", linewidth=1, linestyle="--")
        for name, side, shift in ((names[i - 1], "right", -3), (names[i], "left", 3)):
            axes.annotate(
                str(name), (i, 0.98), (shift, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
                ha=side, va="top", fontsize=8, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
            )  # fmt: skip


def ticks(values: np.ndarray, most: int = 8) -> list[int]:
    """At most `most` of the values, evenly spaced from the first."""
    stride = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if -(-len(values) // s) <= most or s == 1000)
    return [int(value) for value in values[::stride]]


def _colorbar(figure: Figure, panels: np.ndarray) -> None:
    colours = ScalarMappable(Normalize(WORST, 1), skill_colours())
    bar = figure.colorbar(colours, ax=list(panels), extend="min", aspect=28, pad=0.015, fraction=0.05)
    bar.set_ticks([-0.5, 0, 0.25, 0.5, 0.75, 1], labels=["−0.5", "0", "0.25", "0.5", "0.75", "1"])
    bar.set_label("skill: 0 = no more than chance or\nthe inputs tell, 1 = always right", fontsize=8)
    bar.outline.set_linewidth(0.5)


def _map_legend(figure: Figure, notes: set[str], columns: int) -> None:
    handles = {
        "best": (Line2D([], [], marker="*", color="white", markeredgecolor="black", markersize=10, linestyle=""),
                 "best cell (chosen on validation)"),
        "ahead": (Line2D([], [], color=OUTLINE, linewidth=1.8), "outlined: probe reads more than x0-hat shows"),
        "blind": (Patch(facecolor="white", edgecolor=HATCH, hatch="/////"), "no evidence above chance and inputs"),
        "undefined": (Patch(facecolor=UNDEFINED), "undefined: the inputs alone exceed 0.95"),
    }  # fmt: skip
    shown = [handles[name] for name in handles if name in notes]
    _legend(figure, [h for h, _ in shown], [label for _, label in shown], columns)


def _legend(figure: Figure, handles: list, labels: list[str], columns: int) -> None:
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=1.8)
