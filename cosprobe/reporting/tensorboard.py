"""TensorBoard charts of a grid: accuracy by denoising step, maps, the film, and settings to compare runs by.

Time Series, the dashboard that TensorBoard opens on, has one card per tag with one line per TensorBoard run, and sorts
the groups of tags by name. So each layer and each baseline is a run (a folder), all with the same tags, one per target.
"""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, UInt8
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from cosprobe.cells import X0
from cosprobe.evaluation import X0_PARSED, Grid
from cosprobe.files import writable
from cosprobe.monitoring import remove_events
from cosprobe.reporting.figures import default_layers
from cosprobe.reporting.film import Film, film_motion
from cosprobe.reporting.summary import shown_targets
from cosprobe.tasks import ANSWER_ROLES, Role

REPORT = "report"  # the TensorBoard run of everything that is not a line
BY_STEP, OTHERS_BY_STEP = "accuracy by denoising step", "other targets by denoising step"  # groups of tags
IMAGES, SUMMARY, ENDS = "map and film", "summary", "upper and lower ends of 95 % intervals"
FIGURES = {  # of the report
    "curves.png": f"{BY_STEP}/with 95 % intervals",
    "headline.png": f"{IMAGES}/map of skill",
    "others.png": f"{IMAGES}/map of skill, other targets",
    "film.png": f"{IMAGES}/x0-hat, last frame by denoising step",
}
OWN = ("layer ", "baseline ", "finished video", REPORT)  # how the names of the runs begin that are written here
WIDTH = 880  # of an image, in pixels
BASELINES = (X0, X0_PARSED)  # the others are in the best input
MOST_LAYERS = 28  # with 12 other runs there are 40; of more, Custom Scalars selects none at first
VARIED = (  # the settings that runs usually differ in
    *("task", "task.problems", "task.seeds", "task.image_size", "task.frames"),
    *("pipeline.path", "pipeline.lora", "pipeline.steps", "pipeline.guidance"),
    *("probe.pooling", "probe.frames", "probe.kind", "probe.penalties", "seed"),
)
FRAMES_PER_SECOND = 6  # of the film
Ends = Float[np.ndarray, "3 step"]  # accuracy, lower and upper end of its interval


def log_tensorboard(
    grid: Grid, report: Path, folder: Path, film: Film | None = None, settings: Mapping[str, Any] | None = None
) -> Path:
    """Writes the charts of a grid as TensorBoard runs in `folder`, which replace those of an earlier call.

    Each layer, each baseline and the finished video is a run with the tags `accuracy by denoising step/TARGET` for
    targets of role `answer` and `model_answer`, and `other targets by denoising step/TARGET`. The axis of both is the
    denoising step (a step index). Their intervals are in Custom Scalars. The run `report` has the figures of the report
    in FIGURES that are there, the film, the hyperparameters and the results of the best cells. Runs of sampling,
    training and `probe.py` stay.
    report: the folder that `write_report` returned.
    settings: all settings by their dotted names. Those in VARIED become hyperparameters. Returns `folder`.
    """
    folder = Path(folder)
    for earlier in folder.glob("*/"):
        if earlier.name.startswith(OWN):
            remove_events(earlier)
    answers = grid.with_role(*ANSWER_ROLES) or grid.targets[:2]
    groups = {target: BY_STEP if target in answers else OTHERS_BY_STEP for target in shown_targets(grid)}
    layers, steps = default_layers(grid, answers, MOST_LAYERS), grid.dataset.step.values.tolist()
    lines: dict[str, dict[str, Ends]] = {}
    for target in groups:
        for run, values in _lines(grid, target, layers).items():
            lines.setdefault(run, {})[target] = values
    with writable(folder):
        for run, targets in lines.items():
            with SummaryWriter(str(folder / run)) as writer:
                for target, values in targets.items():
                    for tag, line in zip(_tags(groups[target], target), values, strict=True):
                        for step in np.flatnonzero(np.isfinite(line)):
                            writer.add_scalar(tag, line[step], steps[step])
        with SummaryWriter(str(folder / REPORT)) as writer:
            charts: dict[str, dict[str, list]] = {}
            for target, group in groups.items():  # TensorBoard keeps the order of categories, not that of their charts
                category = f"{group}/{target}" if target in answers else group
                charts.setdefault(category, {})[f"{target}, with 95 % intervals"] = ["Margin", [*_tags(group, target)]]
            writer.add_custom_scalars(charts)
            _add_images(writer, report, film)
            _add_results(writer, grid, settings or {})
    return folder


def log_figure(picture: Path, tag: str, folder: Path) -> None:
    """Writes a figure, as a run of its own that replaces that of an earlier call.

    picture: a PNG file. folder: of the TensorBoard runs of a result.
    """
    run = Path(folder) / tag
    if run.is_dir():
        remove_events(run)
    with writable(Path(folder)), SummaryWriter(str(run)) as writer:
        writer.add_image(tag, _pixels(picture), dataformats="HWC")


def _pixels(picture: Path) -> UInt8[np.ndarray, "height width 3"]:
    with Image.open(picture) as drawn:
        return np.asarray(drawn.convert("RGB").resize((WIDTH, round(WIDTH * drawn.height / drawn.width))))


def _tags(group: str, target: str) -> tuple[str, str, str]:
    """Tags of the accuracy and of the lower and upper end of its interval."""
    return f"{group}/{target}", f"{ENDS}/{target}, lower", f"{ENDS}/{target}, upper"


def _lines(grid: Grid, target: str, layers: list[int]) -> dict[str, Ends]:
    """Accuracy by step and both ends of its interval, NaN where there is none, by name of the TensorBoard run."""
    plane = grid.plane(target).transpose("step", ...)
    digits = len(str(max(layers)))  # so that an alphabetical list is in order
    lines = {
        f"layer {layer:0{digits}d}": _ends(plane.sel(layer=layer), "accuracy", "lower", "upper") for layer in layers
    }
    names = ("baseline_accuracy", "baseline_lower", "baseline_upper")
    lines |= {f"baseline {name}": _ends(plane.sel(baseline=name), *names) for name in BASELINES}
    lines["baseline best input"] = _ends(plane.sel(baseline=plane.reference_source), *names)
    lines["baseline chance"] = np.full((3, plane.sizes["step"]), float(plane.chance))
    if target in grid.with_role(Role.ANSWER):
        ends = [grid.dataset.attrs[f"model_accuracy{end}"] for end in ("", "_lower", "_upper")]
        lines["finished video"] = np.repeat(np.array(ends)[:, None], plane.sizes["step"], axis=1)
    return {name: values for name, values in lines.items() if np.isfinite(values[0]).any()}


def _ends(data: xr.Dataset, *names: str) -> Ends:
    return np.stack([data[name].values for name in names]).astype(float)


def _add_results(writer: SummaryWriter, grid: Grid, settings: Mapping[str, Any]) -> None:
    """Adds what runs are compared by: the results of the best cells and of the finished video, and settings."""
    found = {"finished video, accuracy": float(grid.dataset.attrs["model_accuracy"])}
    for target in grid.with_role(*ANSWER_ROLES):
        best = grid.best(target)
        found |= {
            f"{target}, accuracy of the best cell": best.accuracy,
            f"{target}, accuracy of the best input there": float(grid.at(target, best.cell).reference),
            f"{target}, layer of the best cell": best.cell.layer,
            f"{target}, step of the best cell": best.cell.step,
        }
    results = {f"{SUMMARY}/{name}": value for name, value in found.items() if np.isfinite(value)}
    for tag, value in results.items():
        writer.add_scalar(tag, value)
    varied = {name: settings[name] for name in VARIED if settings.get(name) not in (None, "")}
    shown = {name: value if type(value) in (int, float) else str(value) for name, value in varied.items()}
    # Without the summary of the experiment, TensorBoard lists the settings that differ between run folders first, and
    # takes all scalars of this run as metrics.
    _, *session = hparams(shown, results)
    for summary in session:
        writer._get_file_writer().add_summary(summary)


def _add_images(writer: SummaryWriter, report: Path, film: Film | None) -> None:
    for name, tag in FIGURES.items():
        if (report / name).is_file():
            writer.add_image(tag, _pixels(report / name), dataformats="HWC")
    if film is not None:
        tag = f"{IMAGES}/x0-hat, moving (slider: denoising step)"
        for index, step in enumerate(film.steps):
            frames = film_motion(film, index)
            height, width = frames.shape[1:3]
            picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=_gif(frames))
            writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=picture)]), step)


def _gif(frames: UInt8[np.ndarray, "frame height width 3"]) -> bytes:
    """An animated GIF that repeats for ever. `SummaryWriter.add_video` would need moviepy."""
    first, *others = (Image.fromarray(frame) for frame in frames)
    file, milliseconds = BytesIO(), 1000 // FRAMES_PER_SECOND
    first.save(file, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)
    return file.getvalue()
