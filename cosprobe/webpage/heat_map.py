"""Heat maps of a page: the values of every cell, what its hover label says, and marks for what is shown.

The browser computes the colours, because the reader can change what they show, and the labels, because together they
would be larger than the values they are made of. The marks and axes are a figure of Plotly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped
from plotly.graph_objects import Figure, Heatmap, Scatter

from cosprobe.reporting import SHOWN, UNDEFINED, border, skill_colours, ticks

FONT = 'system-ui, -apple-system, "Segoe UI", "Noto Sans", Roboto, "Liberation Sans", Arial, sans-serif'
CELL = 26  # pixels of a row
NARROWEST = 7  # pixels of a column; a map with more columns than fit is scrolled


BROWN, WHITE = "rgb(166,118,29)", "rgb(255,255,255)"
STRUCK = "#8a8a8a"
WORST = -0.5  # lower end of the scale of skill


def _above() -> list[tuple[float, str]]:
    """From white at 0 over the colours of skill to dark blue at 1. For Plotly."""
    rgb = (255 * skill_colours()(np.linspace(0, 1, 24))[:, :3]).round().astype(int).tolist()
    return [(0.0, WHITE), *(((i + 1) / 24, f"rgb({r},{g},{b})") for i, (r, g, b) in enumerate(rgb))]


def _from_brown(zero: float) -> list[list[Any]]:
    """From brown over white, at `zero`, to dark blue at 1."""
    return [[0.0, BROWN], *([zero + (1 - zero) * x, colour] for x, colour in _above())]


SCALES = {  # by name: lowest and highest value, and colours
    "skill": {"low": WORST, "high": 1.0, "colours": _from_brown(-WORST / (1 - WORST))},
    "share": {"low": 0.0, "high": 1.0, "colours": [list(stop) for stop in _above()]},
    "change": {"low": -0.3, "high": 0.3, "colours": [[0.0, BROWN], [0.5, WHITE], [1.0, "rgb(8,48,107)"]]},
    "difference": {"low": -1.0, "high": 1.0, "colours": _from_brown(0.5)},
}


@dataclass(frozen=True)
class Colouring:
    """What the colour of a map can show: a field, or the difference of two.

    label: in the switch. value, minus: names of fields; the second may be empty. scale: a name of SCALES. meaning: of
    the colours, in a sentence.
    test: field with the p-values of the test of what is shown; cells whose p is above 0.05 are struck through. Empty:
    there is no test, and no cell is. None: the cells of `HeatMap.struck` are. struck: what the legend says of strikes
    then; empty: what it says at first.
    """

    label: str
    value: str
    scale: str
    meaning: str
    minus: str = ""
    test: str | None = None
    struck: str = ""

    def spec(self) -> dict[str, str | None]:
        """For the browser."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class HeatMap:
    """A map of cells.

    label: what it shows in a sentence with numbers, for those who do not see it. caption: text below it.
    rows, columns: names of the cells along both axes; row, column: what they are (`layer`, `step`).
    fields: values by name, numbers (NaN for none) or texts. An axis of length 1 means the same value along that axis.
    hover: lines of the hover label. `{name}` stands for a field: `p` and `p_...` with three decimals, others with two.
    A line with a field that has no value is replaced by the second text, or left out if that is empty.
    struck: cells without evidence, which are struck through unless the colouring has a test of its own. outlined: cells
    with an outline. best: row and column of the cell with a star.
    borders: column before which a line is drawn, and the names on both sides of it.
    """

    title: str
    label: str
    caption: str
    rows: Sequence[str]
    columns: Sequence[str]
    row: str
    column: str
    row_title: str
    column_title: str
    fields: Mapping[str, Shaped[np.ndarray, "row column"]]
    hover: Sequence[tuple[str, str]]
    struck: Bool[np.ndarray, "row column"]
    outlined: Bool[np.ndarray, "row column"]
    best: tuple[int, int] | None = None
    borders: Sequence[tuple[int, str, str]] = field(default=())

    @property
    def least_width(self) -> int:
        """Pixels below which the map is scrolled."""
        return 110 + NARROWEST * len(self.columns)

    def spec(self) -> dict[str, Any]:
        """For the browser: the figure, without the values of cells, and the fields."""
        return {
            "figure": self.figure().to_plotly_json(),
            "map": {
                "rows": list(self.rows),
                "columns": list(self.columns),
                "row": self.row,
                "column": self.column,
                "fields": {name: _packed(values) for name, values in self.fields.items()},
                "hover": [list(line) for line in self.hover],
            },
        }

    def figure(self) -> Figure:
        """Axes and marks. The first trace is the map itself, whose values the browser fills in."""
        height, width = len(self.rows), len(self.columns)
        cells = {"x": list(range(width)), "y": list(range(height)), "z": [[None] * width] * height}
        figure = Figure(Heatmap(
            **cells, hoverinfo="text",
            colorbar={"thickness": 12, "len": 1, "outlinewidth": 0.5, "tickfont": {"size": 12}, "xpad": 4},
        ))  # fmt: skip
        y, x = np.nonzero(self.struck)
        marked = {"symbol": "line-ne-open", "color": STRUCK, "size": 8, "line": {"width": 1.4, "color": STRUCK}}
        figure.add_trace(_unread(Scatter(x=x.tolist(), y=y.tolist(), mode="markers", marker=marked, name="struck")))
        path = {  # None ends a line
            axis: [x for line in border(self.outlined) for x in (line[0][i] - 0.5, line[1][i] - 0.5, None)]
            for i, axis in enumerate("xy")
        }
        figure.add_trace(_unread(Scatter(**path, mode="lines", line={"color": SHOWN, "width": 3}, name="outlined")))
        if self.best is not None:
            star = {"symbol": "star", "size": 15, "color": "white", "line": {"color": "black", "width": 1.2}}
            figure.add_trace(
                _unread(Scatter(x=[self.best[1]], y=[self.best[0]], mode="markers", marker=star, name="best"))
            )
        for at, before, after in self.borders:
            figure.add_vline(at - 0.5, line={"color": "black", "width": 1, "dash": "dash"})
            for name, side in ((before, "right"), (after, "left")):
                figure.add_annotation(
                    x=at - 0.5, y=1, yref="paper", text=name, showarrow=False, xanchor=side, yanchor="top",
                    bgcolor="rgba(255,255,255,0.8)", font={"size": 12},
                )  # fmt: skip
        axis = {"fixedrange": True, "showgrid": False, "zeroline": False, "ticks": "outside", "ticklen": 3}
        figure.update_layout(
            height=max(220, min(620, 90 + CELL * height)), margin={"l": 58, "r": 10, "t": 12, "b": 48},
            plot_bgcolor=UNDEFINED, paper_bgcolor="white", dragmode=False, showlegend=False,
            font={"size": 13, "color": "#1a1a1a", "family": FONT}, hoverlabel={"align": "left", "font": {"size": 13}},
            xaxis={**axis, **_ticks(self.columns), "title": {"text": self.column_title}, "range": [-0.5, width - 0.5]},
            yaxis={**axis, **_ticks(self.rows), "title": {"text": self.row_title}, "range": [-0.5, height - 0.5]},
        )  # fmt: skip
        return figure


def _unread(trace: Scatter) -> Scatter:
    """A trace of marks, which leaves hovering to the cells below it."""
    return trace.update(hoverinfo="skip", showlegend=False)


def _ticks(names: Sequence[str]) -> dict[str, Any]:
    shown = ticks(np.arange(len(names)), 10)
    return {"tickvals": shown, "ticktext": [names[i] for i in shown]}


def _packed(values: np.ndarray) -> dict[str, Any]:
    """Numbers as they are, texts as indices of their list."""
    if values.dtype.kind in "biuf":
        return {"values": values.astype(float)}
    names, index = np.unique(values.astype(str), return_inverse=True)
    return {"names": names.tolist(), "values": index.reshape(values.shape)}
