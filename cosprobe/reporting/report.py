"""Writes the report of a run: a folder with figures and a summary, and TensorBoard charts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from cosprobe.activations import flattened
from cosprobe.evaluation import FILE, Grid
from cosprobe.evaluation.checks import Checks
from cosprobe.files import make_folder, whole_file
from cosprobe.reporting.check_figures import check_panels, generalisation
from cosprobe.reporting.figures import curves, frame_maps, headline, maps
from cosprobe.reporting.film import Film, film_strip
from cosprobe.reporting.summary import shown_targets, summary_markdown
from cosprobe.tasks import ANSWER_ROLES


def write_report(grid: Grid, checks: Checks, run_dir: Path, films: Film | None = None) -> Path:
    """Writes grid.nc, figures (PNG) and, last, summary.md to the folder run_dir/report. Returns that folder."""
    folder = Path(run_dir) / "report"
    make_folder(folder)
    grid.save(folder / FILE)
    shown = grid.with_role(*ANSWER_ROLES) or grid.targets[:2]
    others = [target for target in shown_targets(grid) if target not in shown]
    figures: dict[str, Callable[[], Figure]] = {
        "headline.png": partial(headline, grid),
        "curves.png": partial(curves, grid, shown),
    }
    if grid.dataset.sizes["position"] > 1:
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


def log_tensorboard(grid: Grid, folder: Path) -> Path:
    """Writes the TensorBoard run `grid` in `folder`, which replaces an earlier one. Returns the folder of that run.

    Scalars such as `answer/layer 3` and `answer/baseline x_t` are accuracies by denoising step. Custom Scalars has one
    chart per target with all its scalars. Images has one map per target. HParams has the provenance (flattened) and the
    accuracy of the best cell of each target.
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
        settings = {
            k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in flattened(grid.provenance).items()
        }
        writer.add_hparams(settings, metrics, run_name=".")  # any other name would start another run
    return run


def _pixels(figure: Figure) -> np.ndarray:
    figure.set_dpi(110)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]
