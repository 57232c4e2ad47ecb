"""The page of a comparison, in the format of the page of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from cosprobe.comparison.differences import Compared, Row
from cosprobe.evaluation import ALPHA
from cosprobe.webpage import Block, Bullets, Code, Colouring, HeatMap, Maps, Page, Section, Table, Text, write_page

PAGE = "compare.html"
Settings = Sequence[tuple[str, str, str]]  # a setting and its value in both runs
HEAD = ("what", "base", "other", "difference [95 %]", "n")
SAME = "no evidence of a difference"
HOVER = (
    ("{base_name}: accuracy {base}", ""),
    ("{other_name}: accuracy {other} (its step {other_step}, layer {other_layer})", ""),
    ("difference {difference} [{lower}, {upper}], n = {n}", ""),
    ("{verdict}: corrected p = {p}", "not tested"),
)
LEGEND = (
    ("outlined", f"orange outline: the runs differ (p at most {ALPHA} after correction for all cells of the target)"),
    ("struck", "struck through: no evidence of a difference"),
)


def said(one: Compared) -> list[str]:
    """A sentence for finished videos, one for the cells of each target, and what was left out."""
    lines = []
    for row in one.rows:
        if row.what == "finished video":
            lines.append(
                f"Finished videos of {one.other} are right on {row.other:.2f} of the problems, those of {one.base} on "
                f"{row.base:.2f}: {row.change}, {_clear(row.lower, row.upper)}."
            )
    for target in one.cells.target.values.tolist():
        better, worse, cells = one.count(target)
        if np.isnan(one.cells.p.sel(target=target)).all():
            lines.append(f"{target}: cells were not tested, because fewer than 12 test problems are shared.")
        elif better or worse:
            lines.append(
                f"{target}: {one.other} is more accurate in {better} and less accurate in {worse} of {cells} "
                f"cells (corrected p at most {ALPHA})."
            )
        else:
            lines.append(f"{target}: {SAME} in any of {cells} cells.")
    return lines + [f"Not compared: {reason}." for reason in one.not_compared]


def _clear(lower: float, upper: float) -> str:
    return "more often" if lower > 0 else "less often" if upper < 0 else SAME


def how(one: Compared) -> str:
    """On which problems both runs are measured."""
    each = ", ".join(f"{target} {int(one.cells.n.sel(target=target))}" for target in one.cells.target.values)
    if one.paired:
        return f"Both runs are measured on the test problems that they share ({each}). Intervals are paired by problem."
    return f"The runs share fewer than 12 test problems. Each is measured on its own ones (at least {each})."


def caveat(one: Compared) -> str:
    """What a difference may come from besides the setting of interest."""
    fitted = (
        "Strongest caveat: each run has probes of its own, so a difference can come from the model or from how its "
        "probes were fitted."
    )
    same = one.cells.step.values.tolist() == one.cells.other_step.values.tolist()
    aligned = "" if same else " Steps are matched by their share of the schedule."
    return f"{fitted}{aligned} Intervals treat the probes as fixed: other training problems would give others."


def cells_of(row: Row) -> list[str]:
    """Texts of a row of the table."""
    return [row.what, f"{row.base:.2f}", f"{row.other:.2f}", row.change, str(row.n)]


def write_comparison_page(
    found: Sequence[Compared], changed: Sequence[Settings], runs: Sequence[Path], place: Path, made_by: str
) -> Path:
    """Writes the page and returns it. changed: for each of `found`, the settings that differ. runs: the folders of all
    results, the base run first. place: folder of the report. made_by: the command."""
    base = found[0].base
    alone = len(found) == 1  # then what is said of the run stands at the top
    sections = [
        Section(one.other, tuple(_blocks(one, settings)[alone:])) for one, settings in zip(found, changed, strict=True)
    ]
    sections.append(Section("How it was made", (Code("command", made_by),)))
    sentences = said(found[0]) if alone else [said(one)[0] for one in found]
    page = Page(
        f"{', '.join(one.other for one in found)} compared with {base}",
        f"results {', '.join(f'`{run}`' for run in runs)}",
        (*sentences, caveat(found[0])),
        len(sentences),
        tuple(sections),
    )
    return write_page(page, place / PAGE)


def _blocks(one: Compared, settings: Settings) -> list[Block]:
    maps = tuple(cell_map(one, str(target)) for target in one.cells.target.values)
    colourings = (
        Colouring("difference", "difference", "change", f"Blue: {one.other} is more accurate. Brown: {one.base} is."),
        Colouring(f"accuracy of {one.base}", "base", "share", "White 0, dark blue 1."),
        Colouring(f"accuracy of {one.other}", "other", "share", "White 0, dark blue 1."),
    )
    differ = Table("Settings that differ", ("setting", one.base, one.other), [list(each) for each in settings])
    head = (HEAD[0], one.base, one.other, *HEAD[3:])
    return [
        Bullets(tuple(said(one))),
        Text((how(one),)),
        Table(
            "Finished videos, and the best cell of each run (chosen on validation)",
            head,
            [cells_of(r) for r in one.rows],
        ),
        differ if settings else Text(("All settings agree.",)),
        Maps(f"Colour of the maps of {one.other}", colourings, maps, LEGEND),
    ]


def plane(one: Compared, target: str) -> xr.Dataset:
    """A target by layer and step, at the branch and position of the base run's best cell on validation."""
    data = one.cells.sel(target=target)
    at = np.unravel_index(np.nanargmax(data.base_validation.values), data.base_validation.shape)
    places = dict(zip(data.base_validation.dims, at, strict=True))
    return data.isel(branch=places["branch"], position=places["position"]).transpose("layer", "step")


def cell_map(one: Compared, target: str) -> HeatMap:
    """The map of a target: both accuracies and their difference, at the position of the base run's best cell."""
    data = plane(one, target)
    differ = data.p.values <= ALPHA
    fields = {name: data[name].values for name in ("base", "other", "difference", "lower", "upper", "p")}
    for name, text in (("base_name", one.base), ("other_name", one.other), ("n", str(int(data.n)))):
        fields[name] = np.array([[text]])
    fields["verdict"] = np.where(differ, "the runs differ", SAME)
    fields["other_step"] = data.other_step.values.astype(str)[None]
    fields["other_layer"] = data.other_layer.values.astype(str)[:, None]
    better, worse, cells = one.count(target)
    return HeatMap(
        target,
        f"Difference in accuracy of {target} between {one.other} and {one.base}, by layer and step: more accurate in "
        f"{better}, less accurate in {worse} of {cells} cells.",
        f"n = {int(data.n)} test problems; rows and columns are those of {one.base}.",
        [str(layer) for layer in data.layer.values],
        [str(step) for step in data.step.values],
        "layer", "step", "layer (block output)", f"denoising step of {one.base}",
        fields, HOVER, data.p.values > ALPHA, differ,
    )  # fmt: skip
