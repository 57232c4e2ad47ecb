"""What the best cell of every answer or choice survives, in one table: a row per way of fooling oneself."""

from __future__ import annotations

import numpy as np
import xarray as xr

from cosprobe.activations.random_weights import RANDOMISED
from cosprobe.evaluation.checks.suite import Checks
from cosprobe.evaluation.checks.untrained import TRAINED
from cosprobe.evaluation.grid import ALPHA, Grid

NONE = "-"


def check_table(grid: Grid, checks: Checks) -> tuple[list[str], list[list[str]]]:
    """Head and rows; a column per target of `checks.best`, `-` where a check could not be made."""
    columns = {name: _column(grid, checks, name) for name in checks.best}
    head = [f"{name}: layer {cell.site}, step {cell.step}" for name, cell in checks.best.items()]
    rows = [[row, *(column[row] for column in columns.values())] for row in next(iter(columns.values()))]
    return ["check of the best cell", *head], rows


def _column(grid: Grid, checks: Checks, name: str) -> dict[str, str]:
    cell = grid.at(name, checks.best[name])
    probe_first, shown_first = bool(cell.latency_at_most), bool(cell.visible_latency_at_most)
    return {
        "above every input": _above(cell, "reference", "p_inputs"),
        "above what x0-hat shows": _above(cell, "visible", "p_excess"),
        "selectivity": _interval(cell, "selectivity", "+.2f"),
        "latency, steps": _interval(cell, "latency", ".1f", "at or before " if probe_first else ""),
        "latency of x0-hat, steps": _interval(cell, "visible_latency", ".1f", "at or before " if shown_first else ""),
        "lag of x0-hat, steps": _lag(cell, probe_first, shown_first),
        "depth at this step, layers": _interval(cell, "depth", ".1f"),
        "says what the video will": _number(cell.agreement),
        "right where the video is wrong": _knew(cell),
        "calibration error": _trust(cell),
        "Brier score": _number(cell.brier),
        "bits per label": _bits(grid.dataset, name),
        "nuisances removed": _residual(grid.dataset, name),
        "random weights": _weights(checks, name),
    }


def _number(value: xr.DataArray, form: str = ".2f") -> str:
    return format(float(value), form) if np.isfinite(value) else NONE


def _interval(cell: xr.Dataset, name: str, form: str = ".2f", before: str = "") -> str:
    if not np.isfinite(cell[name]):
        return NONE
    value, *ends = (_number(cell[f"{name}{end}"], form) for end in ("", "_lower", "_upper"))
    # an onset at the first step in every draw has no interval: "at or before" says all that is known
    bounded = NONE not in ends and float(cell[f"{name}_lower"]) < float(cell[f"{name}_upper"])
    return f"{before}{value} [{', '.join(ends)}]" if bounded else f"{before}{value}"


def _lag(cell: xr.Dataset, probe_first: bool, shown_first: bool) -> str:
    """Both may be there at the first step already: then nothing is known of which was earlier."""
    if probe_first and shown_first:
        return "unknown: both from the first step on"
    return _interval(cell, "lag", "+.1f", "at least " if probe_first else "at most " if shown_first else "")


def _above(cell: xr.Dataset, other: str, p: str) -> str:
    if not np.isfinite(cell[p]):
        return NONE
    source = str(cell[f"{other}_source"].values)
    evidence = f"p = {float(cell[p]):.3f}" if float(cell[p]) <= ALPHA else "no evidence"
    return f"{float(cell.accuracy - cell[other]):+.2f} over {source}, {evidence}"


def _knew(cell: xr.Dataset) -> str:
    if not np.isfinite(cell.knew):
        return NONE
    wrong = int(cell.n_wrong)
    return f"{round(float(cell.knew) * wrong)} of {wrong} wrong videos, {_interval(cell, 'knew')}"


def _trust(cell: xr.Dataset) -> str:
    if not np.isfinite(cell.ece):
        return NONE
    error, raw, heat, rows = float(cell.ece), float(cell.ece_raw), float(cell.temperature), int(cell.n_test)
    return f"{error:.3f} at T = {heat:.2f} ({raw:.3f} at 1), n = {rows}"


def _bits(data: xr.Dataset, name: str) -> str:
    if "bits" not in data or not np.isfinite(data.bits.sel(target=name)).any():
        return NONE
    here = data.sel(target=name)
    known = [(str(source), float(here.bits.sel(source=source))) for source in here.source.values]
    first = next(value for source, value in known if source == "best")
    others = [f"{source} {value:.2f}" for source, value in known if source != "best" and np.isfinite(value)]
    return f"{first:.2f} ({', '.join([*others, f'no probe {float(here.bits_uniform):.2f}'])})"


def _residual(data: xr.Dataset, name: str) -> str:
    if "residual_before" not in data or not np.isfinite(data.residual_before.sel(target=name)):
        return NONE
    here = data.sel(target=name)
    change = f"[{float(here.residual_lower):+.2f}, {float(here.residual_upper):+.2f}]"
    alone = float(here.nuisance_alone)
    return f"{float(here.residual_before):.2f} to {float(here.residual_after):.2f} {change}; alone {alone:.2f}"


def _weights(checks: Checks, name: str) -> str:
    """Best layer of each on validation, at the first of the few steps."""
    table = checks.weights
    if table is None or name not in table.targets:
        return NONE
    first = min(cell.step for cell in table.cells)
    at = [i for i, cell in enumerate(table.cells) if cell.step == first]
    t = table.targets.index(name)
    best = table.validation[t][:, at].argmax(axis=1)
    values = (f"{how} {table.accuracy[t, w, at[best[w]]]:.2f}" for w, how in enumerate((TRAINED, *RANDOMISED)))
    return f"{', '.join(values)} at step {first}"
