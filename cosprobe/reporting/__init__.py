"""Reports of a run: figures, summary, TensorBoard, film strip, comparison of runs."""

from cosprobe.reporting.figures import STYLE, UNDEFINED, headline, maps, new_figure
from cosprobe.reporting.figures import MapFigure as MapFigure  # a type
from cosprobe.reporting.film import Film, film_row, film_strip, record, record_once
from cosprobe.reporting.report import write_report
from cosprobe.reporting.summary import WIDTH, markdown_table, open_table, print_summary
from cosprobe.reporting.tensorboard import log_figure, log_tensorboard

__all__ = [
    "STYLE",
    "UNDEFINED",
    "WIDTH",
    "Film",
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
    "write_report",
]
