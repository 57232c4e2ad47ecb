"""Figures of a grid: maps of skill over layers and steps, and curves over steps.

Cells with evidence have the colour of their skill, from light for a cell as accurate as the best input to dark blue for
one that is always right. Cells without evidence are blank. Figures are 8 inches wide, so their smallest text is 10 px
high at 100 px per inch (as in a README).
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from cosprobe.cells import X0
from cosprobe.errors import InputError
from cosprobe.evaluation import ALPHA, CEILING, GUESSES, MUST_BEAT, X0_PARSED, Grid
from cosprobe.tasks import ANSWER_ROLES, OWN_IMAGES, Role

STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 8, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
STEP_LABEL = "denoising step (0 = noisiest)"
LAYER_LABEL = "layer (block output)"
UNDEFINED, FRAME = "#c9c9c9", "#8a8a8a"
PROBE, SHOWN, INPUT, GUESS = "#0072b2", "#d55e00", "#333333", "#9a9a9a"  # the probe, x0-hat, the best input, chance
LABELLED = 0.25  # blank columns are labelled from this share of a map on

QUESTIONS = {
    Role.ANSWER: "which candidate is right?",
    Role.MODEL_ANSWER: "what will the video show?",
    Role.PERCEPTION: "visible in the first frame",
    Role.MEMORY: "not visible where it is read",
    Role.NUISANCE: "a possible confound",
    Role.CONTROL: "random labels",
}
BASELINE_STYLE = {
    X0: ("x0-hat: probe of its latent", {"color": SHOWN, "linestyle": "--"}),
    X0_PARSED: ("x0-hat: answer parsed from its video",
                {"color": SHOWN, "linestyle": "", "marker": "o", "markerfacecolor": "white"}),
}  # fmt: skip


class MapFigure(Figure):
    """A figure that a notebook shows when it is the last value of a cell."""

    def _repr_png_(self) -> bytes:
        picture = BytesIO()
        self.savefig(picture, format="png", dpi=100)
        return picture.getvalue()


def skill_colours() -> LinearSegmentedColormap:
    """Colour map of skill, from 0 (light, but not white) to 1 (dark blue).

    Lightness decreases, so maps are readable in grey and with common colour blindness.
    """
    return LinearSegmentedColormap.from_list("skill", colormaps["YlGnBu"](np.linspace(0.18, 1.0, 24)), N=300)


def maps(grid: Grid, targets: Sequence[str], position: str | None = None, branch: str | None = None) -> MapFigure:
    """One map of layers and steps per target, two per row.

    A map shows the skill of cells with evidence, cells above x0-hat, and the best cell. Default position and branch:
    those of the best cell of each target.
    """
    return side_by_side([("", grid, target) for target in targets], position, branch)


def side_by_side(
    shown: Sequence[tuple[str, Grid, str]], position: str | None = None, branch: str | None = None
) -> MapFigure:
    """The maps of several grids, as in `maps`. shown: for each map its name (printed in the title), grid and target."""
    columns, rows = (1 if len(shown) == 1 else 2), -(-len(shown) // 2)
    with rc_context(STYLE):
        figure = new_figure(4.8 if columns == 1 else 8.0, 0.85 + 2.75 * rows)
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        notes = set()
        for axes, (name, grid, target) in zip(panels, shown, strict=False):
            plane, best = grid.plane(target, position, branch), grid.best(target)
            notes |= _map(axes, plane.transpose("layer", "step", ...), "layer", "step")
            inside = str(plane.position.values) == best.cell.position and str(plane.branch.values) == best.cell.branch
            if inside and best.p <= ALPHA:
                notes |= _mark(axes, _rank(plane, "step", best.cell.step), _rank(plane, "layer", best.cell.layer))
            _experts(axes, plane)
            _say_why(axes, plane)
            axes.set_title((f"{name}: " if name else "") + _title(grid, target, plane), loc="left", linespacing=1.35)
            axes.set(xlabel=STEP_LABEL, ylabel=LAYER_LABEL)
        _colorbar(figure, panels, [(grid, target) for _, grid, target in shown])
        free = panels[len(shown)] if len(shown) < len(panels) else None
        _map_legend(figure, notes, columns, [(grid, target) for _, grid, target in shown], free)
    return figure


def headline(grid: Grid) -> MapFigure:
    """The maps of the targets of role `answer` and `model_answer`."""
    return maps(grid, grid.with_role(*ANSWER_ROLES) or grid.targets[:2])


def frame_maps(grid: Grid, target: str) -> Figure:
    """Two maps over positions: skill by layer and position at the step of the best cell, and by position and step at
    its layer.

    Raises InputError when the grid has one position only.
    """
    if grid.dataset.sizes["position"] < 2:
        only = str(grid.dataset.position.values[0])
        raise InputError(f"the grid has one position, {only!r}: expected several; use probe=frames")
    best = grid.best(target)
    data = grid.dataset.sel(target=target)
    data = data.sel(branch=best.cell.branch) if "branch" in data.dims else data
    position = _rank(data, "position", best.cell.position)
    with rc_context(STYLE):
        figure = new_figure(8.0, 3.8)
        panels = figure.subplots(1, 2)
        at_step, at_layer = data.sel(step=best.cell.step), data.sel(layer=best.cell.layer)
        notes = _map(panels[0], at_step.transpose("layer", "position", ...), "layer", "position")
        notes |= _map(panels[1], at_layer.transpose("position", "step", ...), "position", "step")
        if best.p <= ALPHA:
            notes |= _mark(panels[0], position, _rank(data, "layer", best.cell.layer))
            notes |= _mark(panels[1], _rank(data, "step", best.cell.step), position)
        where = "latent frame (all = mean over frames)" if "all" in data.position.values else "position"
        panels[0].set(xlabel=where, ylabel=LAYER_LABEL)
        panels[1].set(xlabel=STEP_LABEL, ylabel=where)
        panels[0].set_title(f"$\\bf{{{bold(target)}}}$, at step {best.cell.step}", loc="left")
        panels[1].set_title(f"$\\bf{{{bold(target)}}}$, at layer {best.cell.layer}", loc="left")
        _colorbar(figure, panels, [(grid, target)])
        _map_legend(figure, notes, 2, [(grid, target)], None)
    return figure


def curves(grid: Grid, targets: Sequence[str], layers: Sequence[int] | None = None) -> Figure:
    """Accuracy over steps with 95 % intervals, beside the baselines: one row per target, one panel per layer.

    Default layers: four that are spread over the depth, the best layer of each target among them.
    """
    layers = default_layers(grid, targets) if layers is None else sorted(layers)
    with rc_context(STYLE):
        figure = new_figure(8.0, 0.75 + 2.2 * len(targets))
        found: dict[str, Any] = {}
        for part, target in zip(figure.subfigures(len(targets), squeeze=False).ravel(), targets, strict=True):
            plane = grid.plane(target).transpose("step", ...)
            part.suptitle(_title(grid, target, plane), x=0.01, ha="left", fontsize=9, linespacing=1.35)
            panels = part.subplots(1, len(layers), sharey=True, squeeze=False).ravel()
            for axes, layer in zip(panels, layers, strict=True):
                _curve(axes, grid, target, layer)
                found |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
                best = grid.best(target)
                here = " (best cell)" if layer == best.cell.layer and best.p <= ALPHA else ""
                axes.set_title(f"layer {layer}{here}", loc="left")
                axes.set(ylim=(0, 1.03), xlabel="step (0 = noisiest)")
                axes.set_xticks(ticks(plane.step.values, 5))
                axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
                axes.set_axisbelow(True)
            panels[0].set_ylabel("accuracy\n(share of test samples)")
        _legend(figure, list(found.values()), list(found), 3)
    return figure


def _curve(axes: Axes, grid: Grid, target: str, layer: int) -> None:
    """Accuracy over steps of a layer, of the baselines and of the finished video."""
    plane = grid.plane(target).transpose("step", ...)
    line = plane.sel(layer=layer)
    axes.axhline(float(plane.chance), color=GUESS, linewidth=1.2, linestyle=":", label="chance")
    model = grid.dataset.attrs["model_accuracy"]
    if target in grid.with_role(Role.ANSWER) and np.isfinite(model):
        axes.axhline(model, color="#cc79a7", linewidth=1.2, linestyle="-.", label="finished video")
    input_style = {"color": INPUT, "linewidth": 1.2, "linestyle": (0, (4, 1.5))}
    axes.plot(plane.step, plane.reference, label="best input (skill 0)", **input_style)
    axes.fill_between(plane.step, line.lower, line.upper, color=PROBE, alpha=0.2, linewidth=0)
    axes.plot(plane.step, line.accuracy, color=PROBE, linewidth=1.8, label="probe of the layer (band: 95 % interval)")
    for name, (label, style) in BASELINE_STYLE.items():
        values = plane.baseline_accuracy.sel(baseline=name)
        known = np.isfinite(values.values)  # x0-hat is decoded at few steps
        if known.any():
            axes.plot(plane.step[known], values[known], linewidth=1.2, markersize=4, label=label, **style)


def default_layers(grid: Grid, targets: Sequence[str], most: int = 4) -> list[int]:
    """At most `most` layers spread over the depth, but no fewer than the best layers of the targets, which take the
    places of their neighbours."""
    every = grid.dataset.layer.values
    best = sorted({grid.best(target).cell.layer for target in targets})
    chosen = set(every[np.linspace(0, len(every) - 1, min(most, len(every))).round().astype(int)].tolist())
    for layer in best:
        if layer not in chosen:
            free = sorted(chosen - set(best))
            chosen -= {min(free, key=lambda other: abs(other - layer))} if free else set()
            chosen.add(layer)
    return sorted(map(int, chosen))


def new_figure(width: float, height: float) -> MapFigure:
    """An empty figure of this size in inches, outside pyplot."""
    figure = MapFigure(figsize=(width, height), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot, which keeps figures alive and may need a display
    return figure


def bold(text: str) -> str:
    """Escapes a text for use in \\bf{} of mathtext."""
    return text.replace("_", r"\_").replace(" ", r"\ ")


def _title(grid: Grid, target: str, plane: xr.Dataset) -> str:
    """Title in two lines: target and its question; kind and number of test samples, and best accuracy.

    A target that is compared with chance alone says so, and one without baselines names those that are missing.
    """
    kinds, best = str(plane.kinds.values), grid.best(target)
    every = {kind for names in grid.dataset.kinds.values for kind in names.split(",")}
    everything = len(every) > 1 and set(kinds.split(",")) == every
    named = " and ".join(kind.replace("_", "-") for kind in kinds.split(","))
    whose = "own images" if kinds == OWN_IMAGES else "all problems" if everything else f"kind {named}"
    where = f", position {plane.position.values}" if grid.dataset.sizes["position"] > 1 else ""
    where += f", {plane.branch.values}" if "branch" in grid.dataset.dims else ""
    role = Role(str(plane.role.values))
    question = QUESTIONS.get(role, "")
    if role is Role.ANSWER and str(plane.form.values) != "candidate":
        question = "which answer is right?"
    question += "" if role in MUST_BEAT else " (vs chance)"
    result = f"best accuracy {best.accuracy:.2f}" if best.p <= ALPHA else "no evidence"
    if plane.reference.isnull().all():
        result = "no skill without these\nbaselines: " + str(plane.not_measured.values).replace(",", ", ")
    return f"$\\bf{{{bold(target)}}}$: {question}\n{whose}, n = {int(plane.n_test)}, {result}{where}"


def _map(axes: Axes, data: xr.Dataset, rows: str, columns: str) -> set[str]:
    """Draws a map of skill. Returns the names of the marks that occur."""
    skill, p, p_x0 = (data[name].values for name in ("skill", "p_evidence", "p_x0"))
    evidence = p <= ALPHA
    no_room = (data.reference > CEILING).broadcast_like(data.skill).transpose(rows, columns).values
    blank, above_x0 = ~evidence & ~no_room, (p_x0 <= ALPHA) & evidence
    axes.pcolormesh(np.ma.masked_where(~evidence, np.ma.masked_invalid(skill)), cmap=skill_colours(), vmin=0, vmax=1)
    if no_room.any():
        axes.pcolormesh(np.ma.masked_where(~no_room, np.zeros(skill.shape)), cmap=ListedColormap([UNDEFINED]))
    if above_x0.any():
        y, x = np.nonzero(above_x0)
        size = 72 * 0.35 * min(2.9 / skill.shape[1], 1.9 / skill.shape[0])  # a third of a cell, roughly
        dot = {"color": SHOWN, "markersize": min(max(size, 1.5), 4.0), "markeredgecolor": "white", "zorder": 4}
        axes.plot(x + 0.5, y + 0.5, linestyle="", marker="o", markeredgewidth=0.4, **dot)
    for axis, name in ((axes.xaxis, columns), (axes.yaxis, rows)):
        names = data[name].values
        shown = range(len(names)) if names.dtype.kind in "UO" else [list(names).index(t) for t in ticks(names)]
        axis.set_ticks([i + 0.5 for i in shown], [str(names[i]) for i in shown])
    axes.set(xlim=(0, skill.shape[1]), ylim=(0, skill.shape[0]))
    axes.tick_params(length=2)
    axes.spines[:].set(visible=True, color=FRAME, linewidth=0.6)
    masks = {"blank": blank, "above_x0": above_x0, "no_room": no_room}
    return {name for name, mask in masks.items() if mask.any()}


def _say_why(axes: Axes, plane: xr.Dataset) -> None:
    """Writes into blank parts of a map of layers and steps: the number of cells with evidence if there is none, and how
    often an input alone is right at the last steps if they are blank."""
    evidence = (plane.p_evidence <= ALPHA).transpose("step", "layer").values
    text = {"ha": "center", "va": "center", "fontsize": 8, "color": "#444444"}
    if not evidence.any():
        size = evidence.size
        axes.text(0.5, 0.5, f"0 of {size} cells with evidence", transform=axes.transAxes, **text)
        return
    start, steps = int(np.flatnonzero(evidence.any(axis=1))[-1]) + 1, len(evidence)
    grey = np.flatnonzero(plane.reference.values > CEILING)
    if len(grey) >= LABELLED * steps and grey[0] >= start:
        start = int(grey[0])  # the words stand in the grey part alone
    if steps - start < LABELLED * steps or set(plane.reference_source.values[start:].tolist()) & {"", *GUESSES}:
        return
    low, high = (round(100 * float(end)) for end in (plane.reference[start:].min(), plane.reference[start:].max()))
    share = f"{low} %" if low == high else f"{low} to {high} %"
    axes.text((start + steps) / 2, evidence.shape[1] / 2, f"an input alone\nis right on\n{share}", **text)


def border(mask: Bool[np.ndarray, "row column"]) -> list[list[tuple[int, int]]]:
    """Line segments along the border of a mask, whose cells are unit squares."""
    inside = np.pad(mask, 1)
    below, left = inside[1:, 1:-1] != inside[:-1, 1:-1], inside[1:-1, 1:] != inside[1:-1, :-1]
    flat = [[(int(x), int(y)), (int(x) + 1, int(y))] for y, x in np.argwhere(below)]
    return flat + [[(int(x), int(y)), (int(x), int(y) + 1)] for y, x in np.argwhere(left)]


def _rank(data: xr.Dataset, axis: str, value: int | str) -> int:
    """Index of a value on an axis."""
    return data[axis].values.tolist().index(value)


def _mark(axes: Axes, column: int, row: int) -> set[str]:
    """Marks the best cell with a star, below the dot of a cell above x0-hat."""
    star = {"color": "white", "markersize": 12, "markeredgecolor": "black", "markeredgewidth": 0.9, "zorder": 3}
    axes.plot(column + 0.5, row + 0.5, "*", clip_on=False, **star)
    return {"best"}


def _experts(axes: Axes, plane: xr.Dataset) -> None:
    """Draws a line between steps of two experts, with the names of both."""
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


def _roles(shown: Sequence[tuple[Grid, str]]) -> set[Role]:
    return {Role(str(grid.dataset.role.sel(target=target).values)) for grid, target in shown}


def _colorbar(figure: Figure, panels: np.ndarray, shown: Sequence[tuple[Grid, str]]) -> None:
    """The scale of skill. shown: grids and targets; what 0 means depends on what their targets have to beat."""
    beaten = "the best input\nor chance" if _roles(shown) & set(MUST_BEAT) else "chance"
    colours, rows = ScalarMappable(Normalize(0, 1), skill_colours()), -(-len(shown) // 2)
    place = {"shrink": min(1.0, 2 / rows), "anchor": (0.0, 1.0), "aspect": 28, "pad": 0.015, "fraction": 0.05}
    bar = figure.colorbar(colours, ax=list(panels), **place)
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "0.25", "0.5", "0.75", "1"])
    bar.set_label(f"skill: 0 = as accurate as {beaten}, 1 = always right", fontsize=8)
    bar.outline.set_linewidth(0.5)


def _map_legend(
    figure: Figure, notes: set[str], columns: int, shown_targets: Sequence[tuple[Grid, str]], free: Axes | None
) -> None:
    """What the marks of maps mean, in the panel that is free or below all panels."""
    beaten = "chance and every input" if _roles(shown_targets) & set(MUST_BEAT) else "chance"
    handles = {
        "best": (Line2D([], [], marker="*", color="white", markeredgecolor="black", markersize=10, linestyle=""),
                 "star: best cell (chosen on validation)"),
        "above_x0": (Line2D([], [], marker="o", color=SHOWN, markeredgecolor="white", markersize=6, linestyle=""),
                     "dot: more accurate than x0-hat"),
        "blank": (Patch(facecolor="white", edgecolor=FRAME, linewidth=0.6), f"blank: no evidence above {beaten}"),
        "no_room": (Patch(facecolor=UNDEFINED), f"grey: an input alone is right on more than {100 * CEILING:.0f} %"),
    }  # fmt: skip
    shown = [handles[name] for name in handles if name in notes]
    if free is None:
        _legend(figure, [h for h, _ in shown], [label for _, label in shown], columns)
    else:
        free.axis("off")
        free.legend(*zip(*shown, strict=True), loc="center left", frameon=False, handlelength=1.8)


def _legend(figure: Figure, handles: list, labels: list[str], columns: int) -> None:
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=1.8)
