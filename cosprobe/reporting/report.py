"""Writes the report of a run: a folder with figures and a summary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import xarray as xr
from matplotlib.figure import Figure

from cosprobe.evaluation import FILE, Grid
from cosprobe.evaluation.checks import Checks
from cosprobe.files import make_folder, whole_file, write_json
from cosprobe.reporting.check_figures import check_panels, generalisation
from cosprobe.reporting.figures import curves, frame_maps, headline, maps
from cosprobe.reporting.film import Film, film_strip
from cosprobe.reporting.summary import PATH_PICTURE, SUMMARY, shown_targets, summary_data, summary_markdown
from cosprobe.reporting.token_maps import path_tokens, target_tokens
from cosprobe.tasks import ANSWER_ROLES

PATH = "path.nc"


def write_report(
    grid: Grid,
    checks: Checks,
    run_dir: Path,
    films: Film | None = None,
    behaviours: Mapping[str, Sequence[str]] | None = None,
    path: xr.Dataset | None = None,
) -> Path:
    """Writes grid.nc, figures (PNG), summary.json (remarks and the table of checks) and, last, summary.md to the folder
    run_dir/report. Returns that folder.

    behaviours: sentences about each behaviour. path: see `evaluation.read_path`; it is written to path.nc.
    """
    folder = Path(run_dir) / "report"
    make_folder(folder)
    grid.save(folder / FILE)
    shown = grid.with_role(*ANSWER_ROLES) or grid.targets[:2]
    others = [target for target in shown_targets(grid) if target not in shown]
    figures: dict[str, Callable[[], Figure]] = {
        "headline.png": partial(headline, grid),
        "curves.png": partial(curves, grid, shown),
    }
    picture = films.rows[0].first_frame if films is not None else None
    if int(grid.dataset.row.max()) >= 0 and int(grid.dataset.frame.max()) >= 0:
        figures |= {f"tokens_{target}.png": partial(target_tokens, grid, target, picture) for target in shown}
        if path is not None:
            figures[PATH_PICTURE] = partial(path_tokens, path, picture)
            with whole_file(folder / PATH) as part:
                path.to_netcdf(part, engine="netcdf4")
    elif grid.dataset.sizes["position"] > 1:
        figures |= {f"frames_{target}.png": partial(frame_maps, grid, target) for target in shown}
    if checks.best:
        figures["checks.png"] = partial(check_panels, grid, checks)
    if checks.matrices:
        figures["generalisation.png"] = partial(generalisation, grid, checks.matrices)
    if others:
        figures["others.png"] = partial(maps, grid, others)
    if films is not None:
        figures["film.png"] = partial(film_strip, films.rows, films.steps)
    for name, draw in figures.items():
        with whole_file(folder / name) as part:
            draw().savefig(part)
    write_json(folder / SUMMARY, summary_data(grid, checks))
    text = summary_markdown(grid, checks, tuple(figures), behaviours, path)
    with whole_file(folder / "summary.md") as part:
        part.write_text(text, encoding="utf-8")
    return folder
