"""What a person gets from a run: a folder with figures and a summary, TensorBoard charts, a table in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from cosprobe.evaluation import FILE, Grid
from cosprobe.evaluation.checks import Checks
from cosprobe.reporting.check_figures import check_panels, generalisation
from cosprobe.reporting.figures import curves, frame_maps, headline, maps
from cosprobe.reporting.film import Film, film_strip
from cosprobe.reporting.summary import flattened, shown_targets, summary_markdown
from cosprobe.runtime import make_folder, whole_file
from cosprobe.tasks import HEADLINE


def write_report(grid: Grid, checks: Checks, run_dir: Path, films: Film | None = None) -> Path:
    """Writes the folder run_dir/report: grid.nc, figures as PNG, and summary.md last. Returns the folder."""
    folder = Path(run_dir) / "report"
    make_folder(folder)
    grid.save(folder / FILE)
    shown = grid.with_role(*HEADLINE) or grid.targets[:2]
    others = [target for target in shown_targets(grid) if target not in shown]
    figures: dict[str, Callable[[], Figure]] = {
        "headline.png": partial(headline, grid),
        "curves.png": partial(curves, grid, shown),
    }
    if grid.dataset.sizes["place"] > 1:
        figures |= {f"frames_{target}.png": partial(frame_maps, grid, target) for target in shown}
    if checks.best:
        figures["checks.png"] = partial(check_panels, grid, checks)
    if checks.matrices:
        figures["generalisation.png"] = partial(generalisation, checks.matrices)
    if others:
        figures["others.png"] = partial(maps, grid, others)
    if films is not None:
        figures["film.png"] = partial(film_strip, films.rows, films.steps)
    for name, draw in figures.items():
        with whole_file(folder / name) as part:
            draw().savefig(part)
    text = summary_markdown(grid, checks, tuple(figures))
    with whole_file(folder / "summary.md") as part:
        part.write_text(text, encoding="utf-8")
    return folder


def log_tensorboard(grid: Grid, folder: Path, hparams: Mapping[str, Any]) -> Path:
    """Writes the run `grid` into a TensorBoard folder, in place of an earlier one; returns its folder.

    Scalars `answer/layer 3` and `answer/baseline x_t` run over denoising steps; Custom Scalars shows one chart per
    target with all of them; Images holds one map per target; HParams holds `hparams` (flattened) and the accuracy of
    each target's best cell.
    """
    run = Path(folder) / "grid"
    for old in run.glob("events.out.tfevents.*"):
        old.unlink()
    charts = {}
    with SummaryWriter(str(run)) as writer:
        for target in shown_targets(grid):
            plane = grid.plane(target).transpose("step", ...)
            lines = {f"layer {int(n)}": plane.accuracy.sel(layer=n) for n in plane.layer.values}
            lines |= {f"baseline {n}": plane.baseline_accuracy.sel(baseline=n) for n in plane.baseline.values}
            for name, line in lines.items():
                for step, value in zip(plane.step.values, line.values, strict=True):
                    if np.isfinite(value):
                        writer.add_scalar(f"{target}/{name}", value, int(step))
            title = f"accuracy of {target} by denoising step"
            charts[target] = {title: ["Multiline", [rf"^{target}/(layer|baseline) .*$"]]}
            writer.add_image(f"maps/{target}", _pixels(maps(grid, [target])), dataformats="HWC")
        writer.add_image("maps/headline", _pixels(headline(grid)), dataformats="HWC")
        writer.add_custom_scalars(charts)
        metrics = {f"best/{target}": grid.best(target).accuracy for target in shown_targets(grid)}
        settings = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in flattened(hparams).items()}
        writer.add_hparams(settings, metrics, run_name=".")  # any other name would open a run of its own
    return run


def _pixels(figure: Figure) -> np.ndarray:
    figure.set_dpi(110)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]
