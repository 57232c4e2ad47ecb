"""Report of an experiment: claims with intervals and verdicts, a page in Markdown, a figure, TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import xarray as xr
from jaxtyping import Float
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from rich.console import Console
from rich.table import Table

from cosprobe.causal.clean import NONE
from cosprobe.causal.effects import CLEAN, Agreement
from cosprobe.causal.experiments import CONTROL, PROBE, Condition
from cosprobe.causal.run import Outcomes
from cosprobe.evaluation import (
    ALPHA,
    HOLDS,
    UNCLEAR,
    UNTESTED,
    Claim,
    difference_interval,
    mean_interval,
    verdict,
)
from cosprobe.files import make_folder, whole_file, write_json
from cosprobe.reporting import STYLE, UNDEFINED, log_figure, markdown_table, new_figure

CLAIMS = "claims.json"
TOO_FEW = "too few samples"
COUNTED = {"swap": "donor's answer", "steer": "answer steered towards"}
MOST_NAMED = 6  # points of a figure that are named
LEAST_PAIRS = 20  # with fewer samples no claim gets a verdict
LINES = {"fresh": "#d55e00", "equal damage": "#0072b2", "renoised": "#009e73"}
OTHER_LINE, RANDOM_LINE = "#cc79a7", "#888888"
MARKS = "osD^vP"
NOISES = {  # what stands behind the name of a kind of noise in a legend
    "fresh": "Gaussian noise instead of the latent",
    "equal damage": "noise of the same norm at every place",
    "renoised": "x0-hat with fresh noise of its level",
}
OTHER_NOISE = "as fresh, in runs of other lengths"
SWAPS = {  # titles of panels: whose state is written where
    "swap": "the donor",
    "same answer": "donor, same answer",
    "random state": "random, same norm",
    "wrong step": "donor, another step",
    "two regions": "donor, answer regions",
    "wrong regions": "donor, other regions",
    "last frame": "donor, last frame",
}
CHANGED = {"erase": "erased from the output of a layer", "ablate": "what a layer adds to its input is replaced"}
REPLACED = {
    "zero": "removed (zero)",
    "mean": "mean over the batch",
    "resample": "that of another sample",
    "zero, last frame": "removed in the last frame",
    "zero, region of the answer": "removed in the region of the answer",
    "zero, another region": "removed in another region",
    "erased": "the answer is erased",
    "control erased": "random labels are erased",
    "random directions erased": "random directions are erased",
}
ABOUT = {
    "noise": "The latent of a step, or one of its frames in every step, is replaced by Gaussian noise (`fresh`, as in "
    "arXiv 2603.16870). Controls: noise of the same squared norm for every hit (`equal damage`); x0-hat of the run "
    "with fresh noise of the level of the step (`renoised`); hits that leave the same number of evaluations.",
    "swap": "The output of one block at one step is replaced by that of a donor, another sample whose finished video "
    "shows another answer. Counted are videos that then show the donor's answer. Controls: a donor with the host's own "
    "answer, a random state with tokens of the same norms, the donor's state of another step, and regions of other "
    "answers.",
    "steer": "The direction along which the score of the probe rises is added to the output of one block at one step. "
    "Counted are videos that then show the answer steered towards. Controls: random directions of the same norm, and "
    "the direction of a probe that was trained on random labels. A dose of 1 is as long as a token is on average.",
    "erase": "What any linear probe could read of the answer is removed from block outputs (LEACE). Counted are videos "
    "that keep the answer of the clean run. Controls: a change of the same size along as many random directions, and "
    "random labels, erased in the same way. A claim holds only if it holds against both, at the same place.",
    "ablate": "What one block adds to its input is removed (`zero`), or replaced by its mean over the batch (`mean`) "
    "or by that of another sample (`resample`). Counted are videos that keep the answer of the clean run.",
}  # fmt: skip


def claims(table: xr.Dataset, outcomes: Outcomes) -> list[Claim]:
    """The statements that an experiment tests: those of the paper, and for the other experiments our own.

    With fewer than LEAST_PAIRS samples no claim gets a verdict. Claims are not corrected for each other.
    """
    kind = str(table.attrs["edit"])
    if kind in ("noise", "swap"):
        stated = _noise_claims(outcomes) if kind == "noise" else _swap_claims(table)
    elif kind == "ablate":
        stated = _ablate_claims(table)
    elif kind == "erase":
        stated = [_against_every(table, "Erasing the answer changes more videos than each control does")]
    else:
        claim = "The direction of the probe moves answers to the label more than the control does"
        stated = [_clearest(table, str(c), claim) for c in dict.fromkeys(table.control.values.tolist())]
    order = list(dict.fromkeys(claim.claim for claim in stated))
    stated = sorted(stated, key=lambda claim: order.index(claim.claim))
    if table.attrs["n"] >= LEAST_PAIRS:
        return stated
    return [replace(c, verdict=c.verdict if c.verdict == UNTESTED else TOO_FEW) for c in stated]


def _clearest(table: xr.Dataset, control: str, claim: str) -> Claim:
    """The cell with the smallest corrected p against a control, and of these the largest effect. Its bounds hold for
    all cells together, so it may be chosen by what it shows."""
    rows = table.isel(comparison=np.flatnonzero(table.control.values == control))
    if not rows.sizes["comparison"]:
        return Claim(claim, "", control, np.nan, np.nan, np.nan, UNTESTED)
    at = np.lexsort([-rows.effect.values, rows.p.values])[0]
    return _of_cell(rows.isel(comparison=at), rows.sizes["comparison"], claim)


def _against_every(table: xr.Dataset, claim: str) -> Claim:
    """The cell that is clearest against every control of a table. The claim holds only if it holds against each.

    The estimate is that of the control with the weakest evidence; the measure has all of them. The same cell has to
    beat all controls (an intersection-union test), so no correction for the number of controls is needed.
    """
    controls = list(dict.fromkeys(table.control.values.tolist()))
    by = [table.isel(comparison=np.flatnonzero(table.control.values == control)) for control in controls]
    cells = [
        list(zip(*(rows[f"at_{n}"].values.tolist() for n in ("step", "layer", "frame")), strict=True)) for rows in by
    ]
    shared = [cell for cell in cells[0] if all(cell in others for others in cells[1:])] if cells else []
    if not shared:
        return Claim(claim, "", ", ".join(controls), np.nan, np.nan, np.nan, UNTESTED)
    by = [rows.isel(comparison=[of.index(cell) for cell in shared]) for rows, of in zip(by, cells, strict=True)]
    p, effect = (np.stack([rows[name].values for rows in by]) for name in ("p", "effect"))
    best = int(np.lexsort([-effect.sum(axis=0), -effect.min(axis=0), p.max(axis=0)])[0])
    each = [_of_cell(rows.isel(comparison=best), len(shared), claim) for rows in by]
    weakest = max(range(len(each)), key=lambda i: (each[i].verdict != HOLDS, p[i, best], -each[i].lower))
    if len(each) == 1:
        return each[0]
    parts = [f"minus {one.control}: {one.estimate}, p {own:.3f}" for one, own in zip(each, p[:, best], strict=True)]
    one = by[0].isel(comparison=best)
    where = _cell(int(one.at_step), int(one.at_layer), int(one.at_frame))
    chosen = f"clearest of {len(shared)} cells" if len(shared) > 1 else "the only cell"
    measure = f"{one.compared.values}, {where}, {chosen}; {'; '.join(parts)}"
    return replace(each[weakest], measure=measure, control=f"each of: {', '.join(controls)}")


def _of_cell(one: xr.Dataset, cells: int, claim: str, how: str = "clearest") -> Claim:
    """A claim about one cell of a comparison of `cells` cells. how: it was chosen."""
    p, dose, control = float(one.p), float(one.at_dose), str(one.control.values)
    where = _cell(int(one.at_step), int(one.at_layer), int(one.at_frame))
    where += "" if np.isnan(dose) else f", dose {dose:g}"
    chosen = f"{how} of {cells} cells" if cells > 1 else "the only cell"
    measure = f"{one.compared.values} minus {control}: {where}, {chosen}, p {p:.3f}"
    # the test of all cells has bounds of width zero where all samples agree, the interval of the cell never
    lower = min(float(one.lower_bound), float(one.effect_lower))
    upper = max(float(one.upper_bound), float(one.effect_upper))
    outcome = HOLDS if p <= ALPHA and lower > 0 else UNCLEAR
    return Claim(claim, measure, control, float(one.effect), lower, upper, outcome)


def _ablate_claims(table: xr.Dataset) -> list[Claim]:
    found = []
    for claim, rows in (
        ("Replacing what a block adds, at one step, changes answers", table.at_step.values != NONE),
        ("Replacing what a block adds, at all steps, changes answers", table.at_step.values == NONE),
    ):
        part = table.isel(comparison=np.flatnonzero(rows & (table.control.values == CLEAN)))
        for how in dict.fromkeys(part.compared.values.tolist()):
            one = _clearest(part.isel(comparison=np.flatnonzero(part.compared.values == how)), CLEAN, claim)
            found.append(replace(one, control=str(how)))
    regions = [c for c in dict.fromkeys(table.control.values.tolist()) if c != CLEAN]
    claim = "The region of the answer matters more than another region"
    return found + [_clearest(table, str(control), claim) for control in regions]


def _cell(step: int, layer: int, frame: int = NONE) -> str:
    parts = [f"{name} {value}" for name, value in (("step", step), ("layer", layer), ("frame", frame)) if value != NONE]
    return ", ".join(["all steps", *parts] if step == NONE and parts else parts) or "all probed steps and layers"


def _noise_claims(outcomes: Outcomes) -> list[Claim]:
    there = outcomes.complete
    keys, conditions = outcomes.keys[there], outcomes.conditions
    kept = (outcomes.answers[there] == outcomes.labels[there]).astype(float)
    found = []
    for name in dict.fromkeys(c.name for c in conditions):
        steps = [i for i, c in enumerate(conditions) if c.name == name and c.frame == NONE]
        frames = [i for i, c in enumerate(conditions) if c.name == name and c.frame != NONE]
        if steps and frames:
            values = kept[:, frames].mean(axis=1) - kept[:, steps].mean(axis=1)
            found.append(
                _paired(
                    "Noise at one step hurts more than noise in one frame at every step",
                    "answers kept: mean over frames minus mean over steps", name, values, keys,
                )
            )  # fmt: skip
    for name in ("fresh", "equal damage", "renoised"):
        at = [
            i
            for i, c in enumerate(conditions)
            if c.name == name and c.frame == NONE and np.isfinite(outcomes.cka[:, i]).any()
        ]
        if len(at) < 3:
            continue
        end = outcomes.cka[there][:, at, -1]
        third = max(len(at) // 3, 1)
        values = end[:, :third].mean(axis=1) - end[:, -third:].mean(axis=1)
        found.append(
            _meaned(
                "Early hits stay visible to the end, late ones less",
                "1 - CKA at the last step: first third of the hits minus last third", name, values, keys,
            )
        )  # fmt: skip
        later = np.stack([outcomes.cka[there][:, i, conditions[i].step :].mean(axis=1) for i in at], axis=1)
        middle = later[:, third : len(at) - third].mean(axis=1)
        both = [
            _meaned(
                "Sensitivity peaks in the middle of sampling (the paper: steps 20 to 30 of 50)",
                f"1 - CKA, mean of later steps: middle third of the hits minus the {end} third", name,
                middle - ends, keys,
            )
            for end, ends in (("first", later[:, :third].mean(axis=1)), ("last", later[:, -third:].mean(axis=1)))
        ]  # fmt: skip
        found.append(min(both, key=lambda claim: claim.lower))  # a peak needs both, so the weaker one decides
    if at := [i for i, c in enumerate(conditions) if c.steps]:
        at.sort(key=lambda i: conditions[i].step / conditions[i].steps)
        values = kept[:, at[-1]] - kept[:, at[0]]
        found.append(
            _paired(
                "An early hit hurts more than a late one, with the same number of evaluations left",
                f"answers kept: hit at {_share(conditions[at[-1]])} minus at {_share(conditions[at[0]])} of the run",
                conditions[at[0]].name,
                values, keys,
            )
        )  # fmt: skip
    return found


def _share(condition: Condition) -> str:
    return f"{condition.step / condition.steps:.2f}"


def _swap_claims(table: xr.Dataset) -> list[Claim]:
    depth, claim = int(table.attrs["depth"]), "The state of a middle layer at step 0 decides the answer"
    single = table.at_step.values != NONE
    whole = table.isel(comparison=np.flatnonzero((table.compared.values == "swap") & single))
    every = table.isel(comparison=np.flatnonzero((table.compared.values == "swap") & ~single))
    found, controls = list[Claim](), list(dict.fromkeys(whole.control.values.tolist()))
    for control in controls:
        rows = whole.isel(comparison=np.flatnonzero(whole.control.values == control))
        middle = np.abs(rows.at_layer.values + 1 - depth / 2)
        at = np.flatnonzero((rows.at_step.values == 0) & (middle <= max(depth / 6, 1)))
        if len(at):
            found.append(
                _of_cell(rows.isel(comparison=at[middle[at].argmin()]), rows.sizes["comparison"], claim, "one")
            )
        else:
            found.append(Claim(claim, "step 0, middle layers", str(control), np.nan, np.nan, np.nan, UNTESTED))
    if controls:
        found.append(_against_every(whole, "Some cell of the plane decides the answer"))
    claim = "The states of one layer at all steps decide the answer"
    found += [_clearest(every, str(control), claim) for control in dict.fromkeys(every.control.values.tolist())]
    regions = "The regions of both answers decide it more than other regions"
    return [*found, _clearest(table, "wrong regions", regions)]


def _paired(claim: str, measure: str, control: str, values: np.ndarray, keys: np.ndarray) -> Claim:
    (lower,), (upper,) = difference_interval(values[None], keys)
    return Claim(claim, measure, control, float(values.mean()), float(lower), float(upper), verdict(lower, upper))


def _meaned(claim: str, measure: str, control: str, values: np.ndarray, keys: np.ndarray) -> Claim:
    (lower,), (upper,) = mean_interval(values[None], keys)
    return Claim(claim, measure, control, float(values.mean()), float(lower), float(upper), verdict(lower, upper))


# the page


def write_page(
    table: xr.Dataset,
    stated: Sequence[Claim],
    found: Agreement | None,
    folder: Path,
    tensorboard: Path,
) -> Path:
    """Writes EDIT.md and EDIT.png to `folder`, and the figure to TensorBoard. Returns the path of the page."""
    make_folder(folder)
    name = str(table.attrs["edit"])
    about = {key: table.attrs[key] for key in ("edit", "task", "kind", "n", "problems", "clean_runs")}
    numbers = [{n: None if v != v else v for n, v in asdict(claim).items()} for claim in stated]  # NaN: not measured
    named = {"about": f"{table.attrs['kind']}: {name}", "trial": bool(table.attrs["n"] < LEAST_PAIRS)}
    said = [ABOUT[name], _size(table), *(agreement_lines(found) if found is not None else []), *_notes(table)]
    texts = {"remarks": said, "conditions": condition_rows(table)}
    write_json(folder / CLAIMS, about | named | {"claims": numbers} | texts)
    drawn = figure(table)
    with whole_file(folder / f"{name}.png") as part:
        drawn.savefig(part, format="png")
    log_figure(folder / f"{name}.png", f"interventions/{name}", tensorboard)
    if found is not None:
        with whole_file(folder / "agreement.png") as part:
            agreement_figure(found).savefig(part, format="png")
        log_figure(folder / "agreement.png", "interventions/decodable against used", tensorboard)
    page = folder / f"{name}.md"
    with whole_file(page) as part:
        part.write_text("\n".join(lines(table, stated, found)) + "\n")
    return page


def lines(table: xr.Dataset, stated: Sequence[Claim], found: Agreement | None) -> list[str]:
    """The page in Markdown."""
    about, name = table.attrs, str(table.attrs["edit"])
    out = [
        f"# {name.capitalize()}: {about['task']}, kind {about['kind']}",
        "",
        ABOUT[name],
        "",
        _size(table),
        "",
        *markdown_table(*claim_rows(stated)),
        "",
        f"![{name}]({name}.png)",
        "",
    ]
    if found is not None:
        out += [
            "## Decodable and used",
            "",
            *(f"* {line}" for line in agreement_lines(found)),
            "",
            "![agreement](agreement.png)",
            "",
        ]
    return [*out, "## All conditions", "", *markdown_table(*condition_rows(table)), "", *_notes(table)]


def _size(table: xr.Dataset) -> str:
    a = table.attrs
    reason = " or no donor" if a["edit"] == "swap" else ""
    left = f" {a['left_out']} more are left out: their clean video shows no answer{reason}." if a["left_out"] else ""
    ratio = a["naive_evaluations"] / a["evaluations"]
    shared = f" Without shared first steps it would be {ratio:.2f} times as many." if ratio > 1 else ""
    return (
        f"{a['n']} samples of {a['problems']} problems.{left} {a['clean_right']:.0%} of the clean videos are right. "
        f"The experiment took {a['evaluations']:.0f} network evaluations per sample, as many as {a['clean_runs']:.0f} "
        f"clean runs of {a['total_steps']} steps.{shared}"
    )


def _notes(table: xr.Dataset) -> list[str]:
    return [
        "Intervals are 95 % intervals over problems. Where a claim is about the clearest of several cells, its bounds "
        "hold for all cells together, and p is corrected for them; it `holds` where p is at most 0.05 and the lower "
        "bound above zero. Claims are not corrected for each other. A video that does not keep its answer shows "
        "another one or none: see the columns. "
        "`causal.nc` has all numbers, `edits.yaml` the edits of every condition."
    ]


def claim_rows(stated: Sequence[Claim]) -> list[list[str]]:
    """The table of the claims, heading first."""
    head = ["claim", "control", "measured", "difference [95 %]", "verdict"]
    return [head, *([c.claim, c.control, c.measure, c.estimate, c.verdict] for c in stated)]


def condition_rows(table: xr.Dataset) -> list[list[str]]:
    """The table of the conditions, heading first. Random directions are one row, the mean of all."""
    counted = COUNTED.get(str(table.attrs["edit"]), "answer kept")
    head = ["condition", "where", "dose", counted, "answer kept", "no answer", "right", "pixel change elsewhere"]
    only = [i for i, name in enumerate(head) if not (name == "dose" and np.isnan(table.dose.values).all())]
    only = [i for i in only if i != 4 or counted != "answer kept"]  # else it stands before
    drawn = table.draw.values != NONE
    body = []
    for i in range(table.sizes["condition"]):
        one = table.isel(condition=i)
        name, (step, layer, frame) = str(one.name.values), (int(one[n]) for n in ("step", "layer", "frame"))
        where, steps, dose = _cell(step, layer, frame), int(one.steps), float(one.dose)
        label = f"{float(one.label):.2f} [{float(one.label_lower):.2f}, {float(one.label_upper):.2f}]"
        if drawn[i]:
            same = np.flatnonzero(drawn & (table.step.values == step) & (table.layer.values == layer))
            if i != same[0]:
                continue
            one = table.isel(condition=same).mean("condition")
            name, label = f"{name}, mean of {len(same)}", f"{float(one.label):.2f}"
        body.append(
            [
                name,
                where + (f" of {steps}" if steps else ""),
                "" if np.isnan(dose) else f"{dose:g}",
                label,
                *(f"{float(one[n]):.2f}" for n in ("unchanged", "none", "right")),
                f"{float(one.change):.3f}",
            ]
        )
    return [[row[i] for i in only] for row in (head, *body)]


def agreement_lines(found: Agreement) -> list[str]:
    """Sentences on where probes and causes agree."""
    r, low, high = found.correlation

    def named(cells: Sequence[tuple[int, int]]) -> str:
        return ", ".join(f"step {s} layer {n}" for s, n in cells) or "none"

    first = (
        f"Rank correlation of the accuracy of the probe above chance with the effect of a swap, over "
        f"{len(found.cells)} cells: {r:.2f} [{low:.2f}, {high:.2f}]. The interval is for the correlation with the "
        "true effects; the error of the accuracy is not included."
        if np.isfinite(r)
        else "The rank correlation of the accuracy of the probe with the effect of a swap is not defined: all effects "
        "are equal, or there are too few cells."
    )
    return [
        first,
        f"Decodable, and an effect of {found.margin:g} or more is ruled out: {named(found.not_used)}.",
        f"Used, and no evidence that it is decodable: {named(found.not_decodable)}.",
    ]


def print_page(table: xr.Dataset, stated: Sequence[Claim], found: Agreement | None, page: Path) -> None:
    """Prints the claims, and the path of the page."""
    console = Console()
    shown = Table("control", "difference [95 %]", "verdict", box=None, padding=(0, 2, 0, 0))
    last = ""
    console.print(_size(table) + "\n", highlight=False, soft_wrap=True)
    for claim in stated:
        if claim.claim != last:
            if shown.row_count:
                console.print(shown)
            console.print(f"\n{claim.claim}?", highlight=False, soft_wrap=True)
            shown, last = Table("control", "difference [95 %]", "verdict", box=None, padding=(0, 2, 0, 2)), claim.claim
        shown.add_row(claim.control, claim.estimate, claim.verdict)
    console.print(shown)
    for line in agreement_lines(found) if found is not None else []:
        console.print(f"* {line}", highlight=False, soft_wrap=True)
    console.print(f"\npage: {page}", highlight=False, soft_wrap=True)


# figures


def figure(table: xr.Dataset) -> Figure:
    """The figure of an experiment."""
    drawers = {
        "noise": _draw_noise,
        "swap": _draw_swap,
        "steer": _draw_steer,
        "erase": _draw_rows,
        "ablate": _draw_rows,
    }
    with rc_context(STYLE):
        return drawers[str(table.attrs["edit"])](table)


def _where(table: xr.Dataset, **values: object) -> xr.Dataset:
    keep = np.ones(table.sizes["condition"], bool)
    for name, value in values.items():
        keep &= table[name].values == value
    return table.isel(condition=np.flatnonzero(keep))


def _draw_noise(table: xr.Dataset) -> Figure:
    sheet = new_figure(8.0, 6.2)
    grid = sheet.subplots(2, 2, width_ratios=(1.25, 1), height_ratios=(1.15, 1))
    of_steps, of_frames = _where(table, frame=NONE), table.isel(condition=np.flatnonzero(table.frame.values != NONE))
    total = int(table.attrs["total_steps"])
    names = list(dict.fromkeys(table.name.values.tolist()))
    for rank, name in enumerate(names):
        beside = 0.05 * (rank - (len(names) - 1) / 2)  # of a frame, so that intervals do not cover each other
        for axes, rows, along in ((grid[0, 0], of_steps, "step"), (grid[0, 1], of_frames, "frame")):
            one = _where(rows, name=name)
            if not one.sizes["condition"]:
                continue
            x = one[along].values.astype(float)
            if along == "step":
                x = x / np.where(one.steps.values > 0, one.steps.values, total) + beside / 5
            else:
                x = x + beside
            mean = one.label.values
            ends = [mean - one.label_lower.values, one.label_upper.values - mean]
            label, colour = f"{name}: {NOISES.get(name, OTHER_NOISE)}", LINES.get(name, OTHER_LINE)
            style = {"marker": "o", "markersize": 3.5, "elinewidth": 0.8, "linewidth": 1.2}
            axes.errorbar(x, mean, ends, label=label, color=colour, **style)
    grid[0, 0].set(xlabel="share of the run before the noise", ylim=(-0.03, 1.03))
    grid[0, 0].set_ylabel(f"share of answers kept (n = {table.attrs['n']})")
    grid[0, 0].set_title("noise at one step", loc="left")
    grid[0, 1].set(
        xlabel="frame of the latent", ylim=(-0.03, 1.03), xticks=sorted(set(of_frames.frame.values.tolist()))
    )
    grid[0, 1].set_title("noise in one frame, at every step", loc="left")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    sheet.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    below = [(axes, _where(of_steps, name=name, steps=0), name)
             for axes, name in ((grid[1, 0], "fresh"), (grid[1, 1], "renoised"))]  # fmt: skip
    most = max([0.1, *(float(np.nanmax(one.cka)) for _, one, _ in below if np.isfinite(one.cka).any())])
    images = []
    for axes, one, name in below:
        if not one.sizes["condition"]:
            axes.set_visible(False)
            continue
        shown = one.cka.values.copy()
        for i, step in enumerate(one.step.values):
            shown[i, : int(step)] = np.nan
        images.append(axes.imshow(shown, aspect="auto", cmap="Blues", vmin=0, vmax=most, interpolation="nearest"))
        axes.set_facecolor(UNDEFINED)
        axes.set_xticks(range(0, total, max(1, total // 5)))
        axes.set_yticks(range(one.sizes["condition"]), [str(s) for s in one.step.values])
        axes.set(xlabel="step that is compared (0 = noisiest)", ylabel="step of the noise")
        axes.set_title(f"{name}: x0-hat differs (grey: before the noise)", loc="left")
    if images:
        bar = sheet.colorbar(images[0], ax=list(grid[1]), pad=0.015, fraction=0.05)
        bar.set_label("1 - CKA (0: as in the clean run)", fontsize=8)
    return sheet


def _plane(table: xr.Dataset, name: str) -> tuple[Float[np.ndarray, "layer step"], list[int], list[int]]:
    """Shares of a condition over all layers and steps of the table, NaN where it was not made, and both axes."""
    one = _where(table, name=name)
    steps, layers = (sorted(set(table[n].values.tolist())) for n in ("step", "layer"))
    steps.sort(key=lambda step: (step == NONE, step))  # all steps come last
    found = np.full((len(layers), len(steps)), np.nan)
    for step, layer, share in zip(one.step.values, one.layer.values, one.label.values, strict=True):
        found[layers.index(int(layer)), steps.index(int(step))] = share
    return found, steps, layers


def _draw_swap(table: xr.Dataset) -> Figure:
    names = list(dict.fromkeys(table.name.values.tolist()))
    columns = 4
    rows = -(-len(names) // columns)
    sheet = new_figure(8.0, 2.3 * rows + 0.6)
    sheet.suptitle("the output of a layer is replaced by that of ...", x=0.01, ha="left", fontsize=9)
    grid = sheet.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, name in zip(grid.ravel(), names, strict=False):
        shown, steps, layers = _plane(table, name)
        image = axes.imshow(shown, aspect="auto", cmap="Blues", vmin=0, vmax=1, origin="lower", interpolation="nearest")
        every, each = -(-len(steps) // 6), -(-len(layers) // 8)
        axes.set_xticks(range(0, len(steps), every), ["all" if s == NONE else str(s) for s in steps[::every]])
        axes.set_yticks(range(0, len(layers), each), [str(n) for n in layers[::each]])
        axes.set_title(SWAPS.get(name, name), loc="left")
        axes.set_facecolor(UNDEFINED)
        axes.spines[:].set_visible(True)
        if shown.size <= 24:
            for (y, x), value in np.ndenumerate(shown):
                if np.isfinite(value):
                    ink = "w" if value > 0.6 else "k"
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
    for axes in grid.ravel()[len(names) :]:
        axes.set_visible(False)
    for axes in grid.ravel()[max(len(names) - columns, 0) : len(names)]:  # nothing is shown below these
        axes.set_xlabel("step that is changed")
        axes.tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel("layer that is changed")
    about = f"share of videos with the donor's answer\n(n = {table.attrs['n']}; grey: not tried)"
    sheet.colorbar(image, ax=grid.ravel().tolist(), label=about, aspect=30, fraction=0.05, pad=0.015)
    return sheet


def agreement_figure(found: Agreement) -> Figure:
    """Effect of a swap against accuracy of the probe, one point per cell, named by its layer."""
    with rc_context(STYLE):
        sheet = new_figure(6.0, 3.8)
        axes = sheet.subplots()
        steps = sorted({step for step, _ in found.cells})
        ends = np.stack([found.effect - found.lower, found.upper - found.effect])
        every = np.array([step for step, _ in found.cells])
        for i, step in enumerate(steps):
            at = every == step
            colour = colormaps["viridis"](0.9 * i / max(1, len(steps) - 1))
            style = {"color": colour, "marker": "os^Dv"[i % 5], "markersize": 5, "elinewidth": 0.8, "linestyle": ""}
            axes.errorbar(found.skill[at], found.effect[at], ends[:, at], label=f"step {step}", **style)
        axes.axhline(0, color="#888888", linewidth=0.8)
        margin = {"color": "#888888", "linewidth": 1, "linestyle": ":"}
        axes.axhline(found.margin, label=f"margin, {found.margin:g}", **margin)
        axes.set(xlabel="accuracy of the probe minus chance", ylabel="effect of a swap (share of videos)")
        axes.set_title("is what a probe reads also used? (numbers: layers of outliers)", loc="left")
        sheet.legend(loc="outside right upper", frameon=False)
        sheet.draw_without_rendering()  # so that the places of points in the figure are known
        _name_outliers(axes, found)
        return sheet


def _name_outliers(axes: Axes, found: Agreement) -> None:
    """Writes the layers of the cells that are furthest from the middle of all, in both directions, beside their points.

    Cells of the same place share one text. A text that would lie over another one, a point or its interval is left out.
    """
    points = np.stack([found.skill, found.effect], axis=1)
    spread = np.abs(points - np.median(points, axis=0))
    spread = (spread / np.where(np.ptp(points, axis=0) > 0, np.ptp(points, axis=0), 1.0)).max(axis=1)
    places: dict[tuple[float, float], list[int]] = {}
    for i in np.argsort(-spread, kind="stable"):
        places.setdefault((round(float(points[i, 0]), 2), round(float(points[i, 1]), 2)), []).append(int(i))
    point = axes.get_figure(root=True).dpi / 72
    ends = (axes.transData.transform(np.stack([found.skill, end], axis=1)) for end in (found.lower, found.upper))
    taken = [Bbox([low - point, high + point]) for low, high in zip(*ends, strict=True)]
    taken += [Bbox([at - 3 * point, at + 3 * point]) for at in axes.transData.transform(points)]
    shown = 0
    for at in places.values():
        if shown == MOST_NAMED or spread[at[0]] == 0:
            break
        layers = ", ".join(str(n) for n in sorted({found.cells[i][1] for i in at}))
        for beside, side in ((5, "left"), (-5, "right")):
            text = axes.annotate(layers, points[at[0]], (beside, 4), textcoords="offset points", ha=side, fontsize=8)
            box = text.get_window_extent()
            if box.x0 > axes.bbox.x0 and box.x1 < axes.bbox.x1 and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                shown += 1
                break
            text.remove()


def _draw_steer(table: xr.Dataset) -> Figure:
    of_probe = _where(table, name=PROBE)
    cells = sorted(
        set(zip(of_probe.step.values.tolist(), of_probe.layer.values.tolist(), strict=True)),
        key=lambda cell: (cell[0] == NONE, cell),  # all steps come last
    )
    shown = cells if len(cells) <= 4 else [cells[i] for i in np.linspace(0, len(cells) - 1, 4).round().astype(int)]
    sheet = new_figure(8.0, 3.1)
    grid = sheet.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axes, (step, layer) in zip(grid, shown, strict=True):
        one = _where(of_probe, step=step, layer=layer).sortby("dose")
        mean = one.label.values
        ends = [mean - one.label_lower.values, one.label_upper.values - mean]
        kept = {"color": RANDOM_LINE, "linestyle": ":", "linewidth": 1.5}
        axes.plot(one.dose.values, one.unchanged.values, label="probe: answer of the clean run kept", **kept)
        axes.errorbar(one.dose.values, mean, ends, color="#0072b2", marker="o", markersize=3.5,
                      label="probe: answer steered towards")  # fmt: skip
        marks = (
            (
                "random direction",
                -0.12,
                "D",
                "#000000",
                "random directions (left of dose {:g}): answer steered towards",
            ),
            (CONTROL, 0.12, "x", "#d55e00", "probe of random labels (right of dose {:g}): answer steered towards"),
        )
        for name, beside, mark, colour, label in marks:
            control = _where(table, name=name, step=step, layer=layer)
            if control.sizes["condition"]:  # beside their dose, so that points of the probe do not hide them
                axes.plot(control.dose.values + beside, control.label.values, mark, color=colour, markersize=6,
                          markerfacecolor="none", clip_on=False, zorder=4,
                          label=label.format(float(control.dose[0])))  # fmt: skip
        axes.set(xlabel="dose (1 = norm of a token)", ylim=(-0.03, 1.03))
        axes.set_title(f"{'all steps' if step == NONE else f'step {step}'}, layer {layer}", loc="left")
    grid[0].set_ylabel(f"share of videos (n = {table.attrs['n']})")
    handles, labels = grid[0].get_legend_handles_labels()
    sheet.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return sheet


def _draw_rows(table: xr.Dataset) -> Figure:
    """One row per cell, one mark per condition."""
    cells = sorted(
        set(zip(table.step.values.tolist(), table.layer.values.tolist(), strict=True)),
        key=lambda cell: (cell[0] == NONE, cell),  # all steps come last
    )
    names = list(dict.fromkeys(table.name.values.tolist()))
    sheet = new_figure(8.0, 1.5 + 0.36 * len(cells))
    axes: Axes = sheet.subplots()
    palette = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
    for place, (step, layer) in enumerate(cells):
        if place % 2:
            axes.axhspan(place - 0.5, place + 0.5, color="#f2f2f2", linewidth=0)
        for number, name in enumerate(names):
            one = _where(table, name=name, step=step, layer=layer)
            if not one.sizes["condition"]:
                continue
            y, colour = place + 0.13 * (number - (len(names) - 1) / 2), palette[number % len(palette)]
            low, high = float(one.unchanged_lower[0]), float(one.unchanged_upper[0])
            axes.plot([low, high], [y, y], color=colour, linewidth=1)
            axes.plot(float(one.unchanged[0]), y, MARKS[number % len(MARKS)], color=colour, markersize=4,
                      label=REPLACED.get(name, name) if not place else None)  # fmt: skip
    axes.set_yticks(range(len(cells)), [_cell(int(s), int(n)) for s, n in cells])
    axes.set(xlabel=f"share of videos that keep the answer of the clean run (n = {table.attrs['n']})")
    axes.set_xlim(-0.03, 1.03)
    axes.set_title(CHANGED[str(table.attrs["edit"])], loc="left")
    axes.set_ylim(len(cells) - 0.5, -0.5)
    sheet.legend(loc="outside lower center", ncols=3, frameon=False)
    return sheet
