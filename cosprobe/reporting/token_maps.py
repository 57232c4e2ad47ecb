"""Maps of skill over single tokens, drawn over an example picture: one small map per layer, step and latent frame."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import xarray as xr
from jaxtyping import UInt8
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.patches import Patch

from cosprobe.evaluation import ALPHA, MUST_BEAT, Grid
from cosprobe.reporting.figures import STYLE, UNDEFINED, MapFigure, bold, new_figure, skill_colours
from cosprobe.tasks import Role

MOST_LAYERS, MOST_FRAMES, MOST_COLUMNS = 6, 4, 8
OPAQUE = 0.8  # of the tokens over the picture


def token_maps(
    data: xr.Dataset, title: str, reference: str, picture: UInt8[np.ndarray, "height width 3"] | None = None
) -> MapFigure:
    """Skill of every token, by layer (rows) and by step and latent frame (columns).

    data: of one target, with the variables skill, accuracy and p_evidence, the axes step, layer and position, and the
    coordinates frame, row and column. title: the first line. reference: what skill 0 is, for the scale.
    picture: an example, drawn in grey below the tokens.
    Tokens without evidence show the picture, as do those without a probe; tokens without skill are grey. At
    most MOST_LAYERS layers and MOST_FRAMES latent frames are shown, evenly spaced, and as many steps as fit into
    MOST_COLUMNS.
    """
    layers = _spaced(data.layer.values.tolist(), MOST_LAYERS)[::-1]  # the last layer on top, as in other maps
    frames = _spaced(sorted({*data.frame.values.tolist()}), MOST_FRAMES)
    steps = _spaced(data.step.values.tolist(), MOST_COLUMNS // len(frames))
    rows, columns = int(data.row.max()) + 1, int(data.column.max()) + 1
    shape = picture.shape[:2] if picture is not None else (rows, columns)
    side = min(1.5, 6.3 / (len(steps) * len(frames)))
    notes: set[str] = set()
    with rc_context(STYLE):
        figure = new_figure(8.0, 1.25 + len(layers) * (side * shape[0] / shape[1] + 0.06))
        panels = figure.subplots(len(layers), len(steps) * len(frames), squeeze=False)
        for i, layer in enumerate(layers):
            for k, (step, frame) in enumerate(product(steps, frames)):
                axes = panels[i, k]
                at = data.sel(step=step, layer=layer).isel(position=data.frame.values == frame)
                _picture(axes, picture, rows, columns)
                notes |= _tokens(axes, at, rows, columns)
                if i == 0:
                    axes.set_title((f"step {step}" if frame == frames[0] else "") + f"\nframe {frame}", loc="left")
                if k == 0:
                    axes.set_ylabel(f"layer {layer}")
        scale = ScalarMappable(Normalize(0, 1), skill_colours())
        bar = figure.colorbar(scale, ax=panels, aspect=30, pad=0.015, fraction=0.04)
        bar.set_ticks([0, 0.25, 0.5, 0.75, 1])
        bar.set_label(f"skill: 0 = as accurate as\n{reference},\n1 = always right", fontsize=8)
        marks = {
            "no_room": (Patch(facecolor=UNDEFINED), "grey square: an input alone is right on more than 95 %"),
            "no_evidence": (Patch(facecolor="none"), "no square: no evidence, or no probe as all labels are the same"),
        }
        shown = [mark for name, mark in marks.items() if name in notes]
        handles, texts = [handle for handle, _ in shown], [text for _, text in shown]
        figure.legend(handles, texts, loc="outside lower center", ncols=2, frameon=False)
        behind = "" if picture is None else "\ncolours: over all test problems; picture behind them: one example"
        figure.suptitle(f"{title}{behind}", x=0.01, ha="left", fontsize=9)
    return figure


def target_tokens(grid: Grid, target: str, picture: UInt8[np.ndarray, "height width 3"] | None) -> MapFigure:
    """The maps of a target of a grid with token pooling, at the branch of its best cell."""
    best, data = grid.best(target), grid.dataset.sel(target=target)
    data = data.sel(branch=best.cell.branch) if "branch" in data.dims else data
    beaten = "the best input or chance" if Role(str(data.role.values)) in MUST_BEAT else "chance"
    found = int((data.p_evidence <= ALPHA).sum())
    text = f"{found} of {data.p_evidence.size} cells have evidence"
    title = f"$\\bf{{{bold(target)}}}$, read from single tokens: {text}, n = {int(data.n_test)}"
    return token_maps(data, title, beaten, picture)


def path_tokens(path: xr.Dataset, picture: UInt8[np.ndarray, "height width 3"] | None) -> MapFigure:
    """The maps of `evaluation.read_path`."""
    tested = int(path.accuracy.notnull().sum())
    text = f"{int((path.p_evidence <= ALPHA).sum())} of {tested} cells have evidence"
    title = f"$\\bf{{on\\ the\\ path}}$: does the solution pass through this token? {text}, n = {path.attrs['n_test']}"
    return token_maps(path, title, "the best input of the token\nor its usual label", picture)


def _spaced(values: Sequence[int], most: int) -> list[int]:
    """At most `most` of the values, evenly spaced, with the first and the last."""
    at = np.linspace(0, len(values) - 1, min(len(values), most)).round().astype(int)
    return [values[i] for i in dict.fromkeys(at.tolist())]


def _picture(axes: Axes, picture: np.ndarray | None, rows: int, columns: int) -> None:
    if picture is not None:
        grey = picture.astype(float).mean(axis=-1) / 255
        axes.imshow(
            grey, cmap="gray", vmin=0, vmax=1, extent=(0, columns, rows, 0), interpolation="nearest", aspect="auto"
        )
    axes.set(xticks=[], yticks=[], xlim=(0, columns), ylim=(rows, 0))
    axes.spines[:].set_visible(False)
    axes.set_box_aspect(rows / columns if picture is None else picture.shape[0] / picture.shape[1])


def _tokens(axes: Axes, at: xr.Dataset, rows: int, columns: int) -> set[str]:
    """Draws the tokens of one map. Returns the names of the marks that occur."""
    order = (at.row.values, at.column.values)
    skill, p, accuracy = (np.full((rows, columns), np.nan) for _ in range(3))
    for name, plane in (("skill", skill), ("p_evidence", p), ("accuracy", accuracy)):
        plane[order] = at[name].values
    there = np.isfinite(accuracy)
    no_room = np.isnan(skill) & there
    hidden = ~(p <= ALPHA) & there & ~no_room
    colours = np.where(there, np.nan_to_num(skill), np.nan)
    shown = np.ma.masked_where(no_room | hidden, np.ma.masked_invalid(colours))
    clear = skill_colours().with_extremes(bad="none")
    axes.pcolormesh(shown, cmap=clear, vmin=0, vmax=1, alpha=OPAQUE, edgecolors="none")
    axes.pcolormesh(np.ma.masked_where(~no_room, np.zeros(skill.shape)), cmap=ListedColormap([UNDEFINED]))
    found = {"no_evidence": hidden | ~there, "no_room": no_room}
    return {name for name, mask in found.items() if mask.any()}
