"""One HTML page with everything that was measured. It opens from disk, without a server or network."""

from cosprobe.webpage.grid_charts import IN_WORDS
from cosprobe.webpage.heat_map import Colouring, HeatMap
from cosprobe.webpage.page import (
    Block,
    Bullets,
    Chart,
    Charts,
    Code,
    Folded,
    Heading,
    Maps,
    Page,
    Picture,
    Section,
    Table,
    Text,
    render,
    write_page,
)
from cosprobe.webpage.run_page import run_page, write_run_page

__all__ = [
    "IN_WORDS",
    "Block",
    "Bullets",
    "Chart",
    "Charts",
    "Code",
    "Colouring",
    "Folded",
    "Heading",
    "HeatMap",
    "Maps",
    "Page",
    "Picture",
    "Section",
    "Table",
    "Text",
    "render",
    "run_page",
    "write_page",
    "write_run_page",
]
