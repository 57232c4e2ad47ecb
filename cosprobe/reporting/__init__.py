"""Reports of a run: figures, summary, TensorBoard, film strip, comparison of runs."""

from cosprobe.reporting.figures import (
    BASELINE_STYLE,
    LAYER_LABEL,
    QUESTIONS,
    SHOWN,
    STEP_LABEL,
    STYLE,
    UNDEFINED,
    border,
    default_layers,
    headline,
    maps,
    new_figure,
    skill_colours,
    ticks,
)
from cosprobe.reporting.figures import MapFigure as MapFigure  # a type
from cosprobe.reporting.film import Film, film_row, film_strip, record, record_once
from cosprobe.reporting.report import write_report
from cosprobe.reporting.summary import (
    CAPTIONS,
    COLUMNS,
    SUMMARY,
    WIDTH,
    counted,
    markdown_table,
    open_table,
    print_summary,
    shown_targets,
    summarise,
)
from cosprobe.reporting.tensorboard import log_figure, log_tensorboard

__all__ = [
    "BASELINE_STYLE",
    "CAPTIONS",
    "COLUMNS",
    "LAYER_LABEL",
    "QUESTIONS",
    "SHOWN",
    "STEP_LABEL",
    "STYLE",
    "SUMMARY",
    "UNDEFINED",
    "WIDTH",
    "Film",
    "border",
    "counted",
    "default_layers",
    "film_row",
    "film_strip",
    "headline",
    "log_figure",
    "log_tensorboard",
    "maps",
    "markdown_table",
    "new_figure",
    "open_table",
    "print_summary",
    "record",
    "record_once",
    "shown_targets",
    "skill_colours",
    "summarise",
    "ticks",
    "write_report",
]
