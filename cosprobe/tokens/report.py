"""Report of the token measures: figures, arrays with labels, a page in Markdown, TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from cosprobe.cells import EMBED
from cosprobe.checked import write_tensors
from cosprobe.evaluation import ALPHA, LEAST_PROBLEMS, Claim, max_t_bootstrap, mean_interval, verdict
from cosprobe.files import make_folder, whole_file, write_json
from cosprobe.reporting import SHOWN, STYLE, border, log_figure, markdown_table, new_figure
from cosprobe.runs import REPORT
from cosprobe.tokens.measures import COMPONENTS, MASSIVE, MEANING, TokenRun, colour_range

TOKENS = "tokens"
DRAWN = {  # quantity: title
    "energy": "energy: root mean square over channels",
    "temporal_energy": "temporal energy: change since the latent frame before",
    "channel_variance": "variance over channels",
    "cosine": "cosine to the same token at the last step",
    "components": "first three principal components of the layer, as red, green and blue",
}
COLOURS = "viridis"
OPAQUE = 0.7  # of the tokens over the picture
PAGE, NUMBERS = "tokens.md", "tokens.json"
SIDE = 7.6  # inches


@dataclass(frozen=True)
class Contrast:
    """Energy of tokens on the path of the solution over that of other tokens that a solution may change.

    ratio, lower, upper: ratio of geometric means with its 95 % interval over problems, by step and layer. p: of the
    test that it is above 1, corrected for all steps and layers. claim: what it says about middle layers.
    """

    ratio: Float[np.ndarray, "step layer"]
    lower: Float[np.ndarray, "step layer"]
    upper: Float[np.ndarray, "step layer"]
    p: Float[np.ndarray, "step layer"]
    claim: Claim
    n: int


def write_tokens(runs: Sequence[TokenRun], folder: Path) -> list[Path]:
    """Writes figures of the first run, arrays of all, numbers and, last, the page. Returns the paths, page first.

    folder: of the result. All files are in its folder report/tokens; the energy is logged to TensorBoard.
    """
    place = folder / REPORT / TOKENS
    make_folder(place)
    paths = []
    for run in runs:
        paths.append(place / f"{run.name}.safetensors")
        save(run, paths[-1])
    pictures = []
    for quantity in DRAWN:
        pictures.append(place / f"{runs[0].name}_{quantity}.png")
        with rc_context(STYLE), whole_file(pictures[-1]) as part:
            token_figure(runs[0], quantity).savefig(part, format="png")
    log_figure(pictures[0], TOKENS, folder / "tensorboard")
    found = contrast(runs)
    write_json(place / NUMBERS, _numbers(runs, found))
    with whole_file(place / PAGE) as part:
        part.write_text("\n".join(page(runs, [p.name for p in pictures], [p.name for p in paths], found)) + "\n")
    return [place / PAGE, *pictures, *paths, place / NUMBERS]


def save(run: TokenRun, path: Path) -> None:
    """Writes all arrays of a run to a safetensors file, with the names along their axes in its metadata (`about`)."""
    measures = run.measures
    arrays = {str(name): torch.from_numpy(np.ascontiguousarray(value.values)) for name, value in measures.items()}
    about = {
        "name": run.name, "prompt": run.prompt, "layers": measures.layer.values.tolist(),
        "steps": measures.step.values.tolist(), "axes": {str(n): list(v.dims) for n, v in measures.items()},
        "meaning": MEANING,
    }  # fmt: skip
    write_tensors(path, arrays | {"picture": torch.from_numpy(run.picture)}, about)


def contrast(runs: Sequence[TokenRun]) -> Contrast | None:
    """Compares the energy of path tokens with that of others, over runs with a known path.

    The claim compares the middle third of the layers at the first measured step with the input of block 0: embedded
    tokens on the path could be larger already. None with fewer than LEAST_PROBLEMS such runs.
    """
    known = [run.contrast for run in runs if run.contrast is not None]
    if len(known) < LEAST_PROBLEMS:
        return None
    values, keys = np.stack(known), np.arange(len(known))
    flat = values.reshape(len(values), -1).T
    lower, upper = mean_interval(flat, keys)
    p = max_t_bootstrap(flat, keys).p
    layers = runs[0].measures.layer.values.tolist()
    inner = [i for i, name in enumerate(layers) if name != EMBED]
    middle = inner[len(inner) // 3 : -(len(inner) // 3) or None]
    gain = values[:, 0, middle].mean(axis=1) - values[:, 0, layers.index(EMBED)]
    (least,), (most,) = mean_interval(gain[None], keys)
    step = int(runs[0].measures.step[0])
    named = f"layers {layers[middle[0]]} to {layers[middle[-1]]}, step {step}"
    claim = Claim(
        "Middle layers raise the energy of tokens on the path", f"log ratio of energies, path over others, {named}",
        "the same ratio in the input of block 0", float(gain.mean()), float(least), float(most), verdict(least, most),
    )  # fmt: skip
    ratio, low, high = (np.exp(one).reshape(values.shape[1:]) for one in (flat.mean(axis=1), lower, upper))
    return Contrast(ratio, low, high, p.reshape(values.shape[1:]), claim, len(known))


def _numbers(runs: Sequence[TokenRun], found: Contrast | None) -> dict[str, Any]:
    """What the page says, as numbers."""
    rows = [
        {
            "name": run.name, "prompt": run.prompt, "layers": run.measures.layer.values.tolist(),
            "steps": run.measures.step.values.tolist(), "explained": run.measures.explained.values.tolist(),
            "massive": massive(run),
        }
        for run in runs
    ]  # fmt: skip
    claim = None
    if found is not None:
        names = ("ratio", "lower", "upper", "p")
        cells = {name: getattr(found, name).tolist() for name in names}  # of every step and layer
        claim = asdict(found.claim) | {"n": found.n, "cells": cells}
    return {"runs": rows, "path": claim}


def massive(run: TokenRun) -> dict[str, dict[str, float]]:
    """By layer: number of tokens with massive activations (of all steps), most of them channels of a token, and the
    largest magnitude as a multiple of the median."""
    found = {}
    for name in run.measures.layer.values.tolist():
        one = run.measures.sel(layer=name)
        count = one.massive_channels.values
        found[name] = {
            "tokens": int((count > 0).sum()), "of": int(count.size), "channels": int(count.max()),
            "largest": float(one.largest.max()),
        }  # fmt: skip
    return found


def page(runs: Sequence[TokenRun], pictures: Sequence[str], files: Sequence[str], found: Contrast | None) -> list[str]:
    """Lines of the page."""
    first = runs[0]
    step, layers = first.measures.step.values.tolist(), first.measures.layer.values.tolist()
    lines = [
        "# Tokens", "",
        f"{len(runs)} sample{'s' if len(runs) > 1 else ''}; layers {', '.join(layers)} (`{EMBED}`: the input of block "
        f"0), steps {', '.join(map(str, step))}. The figures show {first.name}: {first.prompt}", "",
        "Every picture is the last latent frame of the tokens over the last frame of the finished video. Colours of a "
        "row go from the 1 % to the 99 % quantile of these tokens over all steps; the number of tokens beyond is in "
        "the row. An orange line is around the tokens through which the solution passes, where one is known. The "
        "arrays hold every latent frame, and no value in them is cut.", "",
        "## Massive activations", "",
        f"Channels of a token whose magnitude is above {MASSIVE:g} times the median of the layer and step. Norms, "
        "cosines and principal components follow them. Colour scales leave such tokens out.", "",
        *markdown_table(
            ("layer", "tokens with some", "most channels of a token", "largest / median"),
            *(
                (name, f"{one['tokens']:.0f} of {one['of']:.0f}", f"{one['channels']:.0f}", f"{one['largest']:.0f}")
                for name, one in massive(first).items()
            ),
        ), "",
    ]  # fmt: skip
    lines += ["## Tokens on the path of the solution", ""]
    if found is None:
        lines += [
            f"Not tested: {LEAST_PROBLEMS} problems with one right answer are needed (`use.problems`), here are "
            f"{sum(run.contrast is not None for run in runs)}.", "",
        ]  # fmt: skip
    else:
        claim = found.claim
        lines += [
            f"{claim.claim}: {claim.verdict}. {claim.measure}, minus {claim.control}: {claim.estimate}, n = {found.n} "
            "problems. The table has the ratio of energies, path over other tokens that a solution may change, in the "
            "latent frames after the first, with 95 % interval. `*`: above 1 after correction for all layers and "
            "steps.", "",
            *markdown_table(
                ("layer", *(f"step {one}" for one in step)),
                *(
                    (
                        name,
                        *(
                            f"{found.ratio[s, i]:.2f} [{found.lower[s, i]:.2f}, {found.upper[s, i]:.2f}]"
                            + (" *" if found.p[s, i] <= ALPHA else "")
                            for s in range(len(step))
                        ),
                    )
                    for i, name in enumerate(layers)
                ),
            ), "",
        ]  # fmt: skip
    for name, title in zip(pictures, DRAWN.values(), strict=True):
        lines += [f"## {title[0].upper()}{title[1:]}", "", f"![{name}]({name})", ""]
    lines += ["## Arrays", "", "| array | meaning |", "| --- | --- |"]
    lines += [f"| `{name}` | {text} |" for name, text in MEANING.items()]
    lines += [
        "",
        f"Of every sample in {', '.join(f'`{name}`' for name in files)}: axes and coordinates are in the metadata.",
    ]
    return lines


def token_figure(run: TokenRun, quantity: str) -> Figure:
    """One quantity by layer (rows) and step (columns), drawn over the last frame of the video. Last latent frame."""
    measures = run.measures
    layers, steps = measures.layer.values.tolist(), measures.step.values.tolist()
    height, width = run.picture.shape[:2]
    side = (SIDE - 1.3) / len(steps)
    sheet = new_figure(SIDE, len(layers) * (side * height / width + 0.08) + 0.8)
    panels = sheet.subplots(len(layers), len(steps), squeeze=False)
    grey = run.picture.astype(float).mean(axis=-1) / 255
    colours = quantity == "components"
    for i, name in enumerate(reversed(layers)):  # the last layer on top, as in the maps of layers and steps
        one = measures.sel(layer=name)
        shown = one[quantity].isel(frame=-1)
        text = f"layer {name}" if name != EMBED else "input of\nblock 0"
        if colours:
            values = _rgb(one)
            text += "\n" + " + ".join(f"{share:.0%}" for share in one.explained.values)
        else:
            low, high = colour_range(shown.values, one.massive_channels.isel(frame=-1).values > 0)
            beyond = int(((shown.values < low) | (shown.values > high)).sum())
            text += f"\n{low:.2g} to {high:.2g}" + (f"\n({beyond} beyond)" if beyond else "")
        for k, axes in enumerate(panels[i]):
            extent = (0, shown.sizes["column"], shown.sizes["row"], 0)
            axes.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest")
            if colours:
                axes.imshow(values[k], alpha=OPAQUE, extent=extent, interpolation="nearest")
            else:
                axes.imshow(
                    shown.values[k], cmap=COLOURS, vmin=low, vmax=high, alpha=OPAQUE, extent=extent,
                    interpolation="nearest",
                )  # fmt: skip
            if run.path is not None:
                axes.add_collection(LineCollection(border(run.path), colors=SHOWN, linewidths=1.2))
            axes.spines[:].set_visible(False)
            axes.set(xticks=[], yticks=[], aspect=height / width * shown.sizes["column"] / shown.sizes["row"])
            if i == 0:
                axes.set_title(f"step {steps[k]}", fontsize=9)
            if k == 0:
                axes.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8)
    if not colours:
        bar = sheet.colorbar(
            ScalarMappable(Normalize(0, 1), COLOURS), ax=panels, extend="both", extendfrac=0.02, aspect=40, pad=0.01
        )
        bar.set_ticks([0, 1], labels=["low end of the row", "high end"])
        bar.ax.tick_params(labelsize=8, labelrotation=90)
        for label in bar.ax.get_yticklabels():
            label.set_va("center")
    sheet.suptitle(f"{DRAWN[quantity]}\n{run.name}, last latent frame", x=0.01, ha="left", fontsize=9)
    return sheet


def _rgb(layer: xr.Dataset) -> Float[np.ndarray, "step row column 3"]:
    """Components of the last latent frame as colours, each from its 1 % to its 99 % quantile over the steps."""
    heavy = layer.massive_channels.isel(frame=-1).values > 0
    shown = layer.components.isel(frame=-1).values
    found = np.empty(shown.shape)
    for axis in range(COMPONENTS):
        low, high = colour_range(shown[..., axis], heavy)
        found[..., axis] = np.clip((shown[..., axis] - low) / (high - low), 0, 1)
    return found
