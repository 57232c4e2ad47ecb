"""Heat maps and curves of a grid for a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Shaped
from plotly.colors import sample_colorscale
from plotly.graph_objects import Figure, Scatter

from cosprobe.cells import DIFFICULTY, EMBED, FIRST_FRAME, NOISE, PROMPT, X0, X_T
from cosprobe.evaluation import ALPHA, BASELINES, CEILING, GUESSES, MUST_BEAT, X0_PARSED, Grid
from cosprobe.reporting import (
    BASELINE_STYLE,
    LAYER_LABEL,
    QUESTIONS,
    STEP_LABEL,
    counted,
    default_layers,
    ticks,
)
from cosprobe.tasks import Role
from cosprobe.webpage.heat_map import FONT, Colouring, HeatMap
from cosprobe.webpage.page import Chart
from cosprobe.webpage.sentences import decoded_steps, x0_in_words

POSITION_LABEL = "latent frame"
IN_WORDS = {  # baselines, as a switch names them
    NOISE: "the initial noise", FIRST_FRAME: "the first frame", PROMPT: "the prompt",
    DIFFICULTY: "the difficulty of the problem", EMBED: "the input of block 0", X_T: "the noisy latent x_t",
    X0: "a probe of x0-hat", X0_PARSED: "the parser on decoded x0-hat",
    "permuted_weights": "permuted weights", "fresh_weights": "fresh weights",
}  # fmt: skip
HOVER = (
    ("accuracy {accuracy} [{lower}, {upper}], n = {n}", ""),
    ("reference: {reference} ({reference_name})", "reference: not measured"),
    ("skill {skill}", f"no skill: the reference is missing or above {CEILING:g}"),
    ("{verdict}: corrected p = {p}", "no p-value"),
    ("x0-hat: {x0} ({x0_name})", "x0-hat: not compared"),
    ("minus x0-hat: {above_x0} [{above_x0_lower}, {above_x0_upper}], corrected p = {p_x0}", ""),
)
NO_EVIDENCE = "struck through: no evidence for the difference that is shown"
STRUCK = f"{NO_EVIDENCE}, above chance and above the inputs in question, after correction for all cells"
STRUCK_X0 = f"{NO_EVIDENCE}, that the probe is more accurate than x0-hat, after correction for all cells"
UNTESTED = "nothing is struck through: differences without a test"
LEGEND = (
    ("best", "star: best cell, chosen on validation problems"),
    ("struck", STRUCK),
    (
        "outlined",
        "orange outline: more accurate than x0-hat at that step and at the nearest decoded ones, after correction for "
        "all cells",
    ),
    ("grey", "grey: nothing to show (an input alone is right on more than 95 %, or it was not measured)"),
)
DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}  # of matplotlib and of Plotly
BAND = 0.14  # opacity of an interval


def colourings(grid: Grid, targets: Sequence[str]) -> tuple[Colouring, ...]:
    """What the colour of the maps of these targets can show. Baselines that none of them has are left out."""
    lighter = "White: no difference. Blue: the probe is more accurate. Brown: less accurate."
    found = [
        Colouring(
            "skill (above the best input)", "skill", "skill",
            "White: as accurate as the best input of that step, or chance. Blue: more accurate; the darkest blue is "
            "always right. Brown: less accurate.", test="p", struck=STRUCK,
        ),
        Colouring(
            "accuracy", "accuracy", "share", "White: never right. The darkest blue: always right.", test="",
            struck="nothing is struck through: accuracies without a test",
        ),
        Colouring("accuracy minus chance", "accuracy", "difference", lighter, "chance", "", UNTESTED),
        Colouring("accuracy minus what x0-hat shows", "accuracy", "difference", lighter, "x0", "p_x0", STRUCK_X0),
    ]  # fmt: skip
    data = grid.dataset.baseline_accuracy.sel(target=list(targets))
    found += [
        Colouring(f"accuracy minus {IN_WORDS[name]}", "accuracy", "difference", lighter, name, "", UNTESTED)
        for name in BASELINES
        if name in IN_WORDS and bool(data.sel(baseline=name).notnull().any())
    ]
    return tuple(found)


def layer_map(grid: Grid, target: str) -> HeatMap:
    """The map of layers and steps of a target, at the position and branch of its best cell."""
    return _map(grid, target, grid.plane(target), "layer", "step", "")


def frame_maps(grid: Grid, target: str) -> tuple[HeatMap, ...]:
    """The maps over positions: positions and steps at the layer of the best cell, layers and positions at its step.
    Empty if the grid has one position."""
    if grid.dataset.sizes["position"] < 2:
        return ()
    best = grid.best(target).cell
    data = grid.dataset.sel(target=target)
    data = data.sel(branch=best.branch) if "branch" in data.dims else data
    at_layer, at_step = data.sel(layer=best.layer), data.sel(step=best.step)
    return (
        _map(grid, target, at_layer, "position", "step", f", at layer {best.layer}"),
        _map(grid, target, at_step, "layer", "position", f", at step {best.step}"),
    )


def curves(grid: Grid, target: str) -> Chart:
    """Accuracy over steps of some layers, with 95 % intervals, and of baselines."""
    plane, best = grid.plane(target).transpose("step", ...), grid.best(target)
    steps = plane.step.values.tolist()
    figure, shown = Figure(), default_layers(grid, [target])
    depth = max(1, int(grid.dataset.layer.values.max()))
    for layer in shown:
        line = plane.sel(layer=layer)
        (colour,) = sample_colorscale("viridis_r", [0.25 + 0.75 * layer / depth])
        _add(figure, f"layer {layer}", steps, line.accuracy, line.lower, line.upper, {"color": colour, "width": 2.2})
    for name, (label, style) in BASELINE_STYLE.items():
        one = plane.sel(baseline=name)
        dashed = {"color": style["color"], "width": 1.8, "dash": DASHES.get(style["linestyle"])}
        _add(figure, label, steps, one.baseline_accuracy, one.baseline_lower, one.baseline_upper, dashed, band=False)
    if plane.reference.notnull().any():
        names = plane.reference_source.values
        level = plane.reference.values
        text = [f"step {s}<br>best input {v:.2f} ({n})" for s, v, n in zip(steps, level, names, strict=True)]
        figure.add_trace(_line("best input (the reference)", steps, level, text, {"color": "#1a1a1a", "dash": "dash"}))
    chance = float(plane.chance)
    _level(figure, "chance", steps, chance, {"color": "#767676", "dash": "dot"}, f"chance {chance:.2f}")
    a = grid.dataset.attrs
    if target in grid.with_role(Role.ANSWER) and np.isfinite(a["model_accuracy"]):
        ends = f"{a['model_accuracy']:.2f} [{a['model_accuracy_lower']:.2f}, {a['model_accuracy_upper']:.2f}]"
        style = {"color": "#a8447f", "dash": "dashdot"}
        _level(figure, "finished video", steps, a["model_accuracy"], style, f"finished video {ends}")
    axis = {"fixedrange": True, "zeroline": False, "ticks": "outside", "ticklen": 3}
    figure.update_layout(
        height=380, margin={"l": 58, "r": 12, "t": 12, "b": 48}, plot_bgcolor="white", paper_bgcolor="white",
        dragmode=False, hovermode="closest", font={"size": 13, "color": "#1a1a1a", "family": FONT},
        hoverlabel={"align": "left", "font": {"size": 13}, "namelength": 0}, showlegend=False,
        xaxis={**axis, "title": {"text": STEP_LABEL}, "showgrid": False, "tickvals": ticks(plane.step.values, 10),
               "range": [steps[0] - 0.4, steps[-1] + 0.4]},
        yaxis={**axis, "title": {"text": "test accuracy"}, "range": [0, 1.02], "gridcolor": "#e6e6e6"},
    )  # fmt: skip
    first = plane.accuracy.sel(layer=best.cell.layer).values
    return Chart(
        _title(grid, target),
        f"Accuracy of {target} over {len(steps)} denoising steps. Layer {best.cell.layer} goes from {first[0]:.2f} at "
        f"step {steps[0]} to {first[-1]:.2f} at step {steps[-1]}. Chance is {chance:.2f}.",
        f"Test accuracy (n = {int(plane.n_test)}) of probes on some layers, with 95 % intervals as bands, and of "
        "baselines.",
        figure,
    )


def _title(grid: Grid, target: str, where: str = "") -> str:
    """A target with the question it asks."""
    question = QUESTIONS.get(Role(str(grid.dataset.role.sel(target=target).values)), "")
    return f"{target}{where}{': ' if question else ''}{question}"


def _map(grid: Grid, target: str, data: xr.Dataset, row: str, column: str, where: str) -> HeatMap:
    best = grid.best(target)
    data = data.transpose(row, column, ...)
    p, p_x0 = data.p_evidence.values, data.p_x0.values
    found = p <= ALPHA
    above = found & (p_x0 <= ALPHA)
    titles = {"layer": LAYER_LABEL, "step": STEP_LABEL, "position": POSITION_LABEL}
    rows, columns = (data[axis].values.tolist() for axis in (row, column))
    inside = best.p <= ALPHA
    at = (rows.index(getattr(best.cell, row)), columns.index(getattr(best.cell, column)))
    beaten = "chance and every input" if Role(str(data.role.values)) in MUST_BEAT else "chance"
    if not where and grid.dataset.sizes["position"] > 1:
        where = {"all": ", mean over latent frames"}.get(best.cell.position, f", latent frame {best.cell.position}")
    if "branch" in grid.dataset.dims:
        where += f", branch {best.cell.branch}"
    cell = f"layer {best.cell.layer}, step {best.cell.step}"
    cell += f", position {best.cell.position}" if grid.dataset.sizes["position"] > 1 else ""
    accuracy = f"{best.accuracy:.2f} [{best.lower:.2f}, {best.upper:.2f}]"
    count = int(above.sum())
    x0 = f"{count or 'no cell'} {'is' if count < 2 else 'are'} shown to be more accurate than x0-hat"
    counts = (
        f"{int(found.sum())} of {counted(found.size, 'cell')} have evidence above {beaten}; "
        f"{x0 if np.isfinite(p_x0).any() else 'not compared with x0-hat'}. "
        f"Best cell: {cell}, accuracy {accuracy}{'' if inside else ', no evidence'}."
    )
    return HeatMap(
        title=_title(grid, target, where),
        label=f"Map of {target}, {row} by {column}{where}. {counts}",
        caption=counts,
        rows=[str(name) for name in rows],
        columns=[str(name) for name in columns],
        row=row,
        column=column,
        row_title=titles[row],
        column_title=titles[column],
        fields=_fields(data, row, column),
        hover=HOVER,
        struck=~found,
        outlined=above,
        best=at if inside else None,
        borders=_experts(data) if column == "step" else (),
    )


def _fields(data: xr.Dataset, row: str, column: str) -> dict[str, Shaped[np.ndarray, "row column"]]:
    """What the hover label and the colour need. Baselines stand under their names."""

    def plane(values: xr.DataArray) -> Shaped[np.ndarray, "row column"]:
        missing = [axis for axis in (row, column) if axis not in values.dims]
        return values.expand_dims(missing).transpose(row, column).values

    sources = {"reference": "reference", "reference_name": "reference_source", "x0": "x0_accuracy",
               "x0_name": "x0_source", "p": "p_evidence", "n": "n_test"}  # fmt: skip
    sources |= {name: name for name in ("accuracy", "lower", "upper", "skill", "p_x0", "chance")}
    sources |= {name: name for name in ("above_x0", "above_x0_lower", "above_x0_upper")}
    found = {name: plane(data[source]) for name, source in sources.items()}
    decoded = decoded_steps(data)
    names = xr.apply_ufunc(lambda name, at: x0_in_words(str(name), int(at), decoded), data.x0_source, data.step,
                           vectorize=True, output_dtypes=["U80"])  # fmt: skip
    found["x0_name"] = plane(names)
    found["n"] = found["n"].astype(str)
    found["verdict"] = np.where(found["p"] <= ALPHA, "evidence", "no evidence")
    named = found["reference_name"]
    found["reference_name"] = np.where(np.isin(named, GUESSES), np.char.add("chance: ", named.astype(str)), named)
    for name in IN_WORDS:
        values = plane(data.baseline_accuracy.sel(baseline=name, drop=True))
        if np.isfinite(values).any():
            found[name] = values
    return found


def _experts(data: xr.Dataset) -> list[tuple[int, str, str]]:
    """Steps before which another transformer takes over, with the names of both."""
    names = data.expert.values
    return [(int(i), str(names[i - 1]), str(names[i])) for i in np.flatnonzero(names[1:] != names[:-1]) + 1]


def _add(
    figure: Figure,
    name: str,
    steps: list[int],
    mean: xr.DataArray,
    lower: xr.DataArray,
    upper: xr.DataArray,
    style: dict[str, Any],
    band: bool = True,
) -> None:
    """A line with its interval, at the steps where it is known; rings, where its style has no dashes."""
    known = np.isfinite(mean.values)
    if not known.any():
        return
    x = np.array(steps)[known].tolist()
    y, low, high = (values.values[known].tolist() for values in (mean, lower, upper))
    text = [f"{name}, step {s}<br>{v:.2f} [{a:.2f}, {b:.2f}]" for s, v, a, b in zip(x, y, low, high, strict=True)]
    if band:
        figure.add_trace(
            Scatter(
                x=[*x, *reversed(x)], y=[*high, *reversed(low)], fill="toself", fillcolor=style["color"], opacity=BAND,
                line={"width": 0}, hoverinfo="skip", showlegend=False, mode="lines",
            )
        )  # fmt: skip
    line = _line(name, x, y, text, style)
    if "dash" in style and style["dash"] is None:  # known at few steps: a line between them would be invented
        ring = {"size": 9, "color": "white", "line": {"color": style["color"], "width": 2}}
        line.update(mode="markers", marker=ring)
    figure.add_trace(line)


def _level(figure: Figure, name: str, steps: list[int], value: float, style: dict[str, Any], text: str) -> None:
    figure.add_trace(_line(name, steps, [value] * len(steps), [text] * len(steps), style))


def _line(name: str, x: Any, y: Any, text: list[str], style: dict[str, Any]) -> Scatter:
    return Scatter(x=x, y=y, name=name, text=text, hoverinfo="text", mode="lines", line={"width": 1.8, **style})
