"""A page: its parts, and how they become one HTML file that needs nothing else.

A page is a title, a few sentences and sections of blocks. Every text that comes from a run is escaped, and the browser
runs no other script than those of this package (a Content-Security-Policy with their hashes), nor loads anything.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from markupsafe import escape as escaped
from PIL import Image
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

from cosprobe.errors import InputError
from cosprobe.evaluation import ALPHA
from cosprobe.files import make_folder, size_text, whole_file
from cosprobe.webpage.heat_map import SCALES, Colouring, HeatMap

DASHES = {"solid": "none", "dash": "7 4", "dot": "2 3", "dashdot": "7 3 2 3"}  # of Plotly and of SVG
FIGURE = 0.58  # scale of a PNG file
WIDEST = 1200  # pixels of a PNG file on the page
LARGEST = 10_000_000  # bytes of a page
MOST_BYTES = 9_500_000  # of its scripts, charts and pictures; pictures that do not fit are left out, with a note


@dataclass(frozen=True)
class Text:
    """Paragraphs. Text between backticks is code. warning: they are set apart."""

    kind: ClassVar[str] = "text"
    paragraphs: tuple[str, ...]
    warning: bool = False


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    kind: ClassVar[str] = "bullets"
    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table. The first cell of each row names the row."""

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Code:
    """Text as it is, such as a file or a command. caption: its name."""

    kind: ClassVar[str] = "code"
    caption: str
    text: str


@dataclass(frozen=True)
class Picture:
    """A PNG or GIF file.

    path: of the file. alt: what is in it, for those who do not see it. still: for a GIF, a PNG file that is shown in
    its place where motion is unwanted. first: it is kept before others, where not all pictures fit on the page.

    A PNG file is embedded with at most WIDEST pixels of width and a palette of 256 colours.
    """

    kind: ClassVar[str] = "picture"
    path: Path
    alt: str
    caption: str
    still: Path | None = None
    first: bool = False

    @property
    def size(self) -> int:
        """Bytes that the picture takes on the page."""
        return len(self.uri) + len(self.still_uri)

    @property
    def newest(self) -> float:
        """When the file was written, in seconds."""
        return self.path.stat().st_mtime

    @property
    def size_shown(self) -> tuple[int, int]:
        """Width and height on the page in CSS pixels."""
        return _size_shown(self.path)

    @property
    def still_size_shown(self) -> tuple[int, int]:
        """The same of the still picture."""
        return _size_shown(self.still or self.path)

    @cached_property
    def uri(self) -> str:
        """The file as an address."""
        return _data_uri(self.path)

    @cached_property
    def still_uri(self) -> str:
        """The still picture as an address; empty without one."""
        return "" if self.still is None else _data_uri(self.still)


@dataclass(frozen=True, eq=False)
class Chart:
    """A chart of lines by Plotly. label: what it shows, for those who do not see it.

    Every line has a name, and a text for each of its points. Traces with `hoverinfo="skip"` are not read.
    """

    title: str
    label: str
    caption: str
    figure: Figure

    @property
    def keys(self) -> list[tuple[str, str, str]]:
        """Name, colour and dashes (of SVG) of every line, for the legend; `ring` for points without a line."""
        read = [trace for trace in self.figure.data if trace.hoverinfo != "skip"]
        return [
            (trace.name, trace.line.color, "ring" if trace.mode == "markers" else DASHES[trace.line.dash or "solid"])
            for trace in read
        ]


@dataclass(frozen=True, eq=False)
class Charts:
    """Charts side by side, where there is room."""

    kind: ClassVar[str] = "charts"
    charts: tuple[Chart, ...]


@dataclass(frozen=True, eq=False)
class Maps:
    """Heat maps with one switch for the colour of all of them, and a legend in words.

    name: of the switch. legend: pairs of a mark (`best`, `struck`, `outlined`, `grey`) and its meaning.
    """

    kind: ClassVar[str] = "maps"
    name: str
    colourings: tuple[Colouring, ...]
    maps: tuple[HeatMap, ...]
    legend: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Folded:
    """Blocks that are shown when the reader opens them."""

    kind: ClassVar[str] = "folded"
    title: str
    blocks: tuple[Block, ...]


Block = Text | Heading | Bullets | Table | Code | Picture | Charts | Maps | Folded


@dataclass(frozen=True)
class Section:
    """A part of a page with a heading."""

    title: str
    blocks: tuple[Block, ...]

    @property
    def anchor(self) -> str:
        """The address of the section in the page."""
        return "-".join(re.findall(r"[a-z0-9]+", self.title.lower())) or "section"


@dataclass(frozen=True)
class Page:
    """A page. about: one line under the title. sentences: what a reader who stops here should know. caveat: index of
    the sentence that is set apart."""

    title: str
    about: str
    sentences: tuple[str, ...]
    caveat: int
    sections: tuple[Section, ...]


class PageTooLarge(InputError):
    """A page that would be larger than 10 MB without its pictures."""


def write_page(page: Page, path: Path) -> Path:
    """Writes a page as one HTML file, atomically, and returns the file.

    Raises InputError when it cannot be written, and PageTooLarge.
    """
    text = render(page).encode()
    if len(text) >= LARGEST:
        raise PageTooLarge(f"{str(path)!r}: the page has {size_text(len(text))}, expected less than 10 MB; show less")
    make_folder(path.parent)
    with whole_file(path, len(text)) as part:
        part.write_bytes(text)
    return path


def render(page: Page) -> str:
    """A page as HTML. Pictures beyond MOST_BYTES are replaced by a note with their names: first those that are not kept
    before others, and of these the oldest."""
    charts: dict[str, dict[str, Any]] = {}

    def number(chart: Chart | HeatMap) -> str:
        name = f"chart-{len(charts) + 1}"
        charts[name] = chart.spec() if isinstance(chart, HeatMap) else {"figure": plain(chart.figure.to_plotly_json())}
        return name

    names = {id(chart): number(chart) for chart in _charts(page)}
    switches = {
        f"switch-{i + 1}": {
            "colourings": [colouring.spec() for colouring in block.colourings],
            "charts": [names[id(one)] for one in block.maps],
        }
        for i, block in enumerate(one for one in _blocks(page) if isinstance(one, Maps))
    }
    data = Markup(_json({"charts": charts, "switches": switches, "scales": SCALES, "alpha": ALPHA}))
    scripts = [get_plotlyjs(), _resource("page.js")]
    if any(re.search(r"</script|<!--|\r", script, flags=re.IGNORECASE) for script in scripts):
        raise RuntimeError("a script of the page cannot stand in HTML: it holds </script, <!-- or a carriage return")
    room = MOST_BYTES - sum(len(text.encode()) for text in (*scripts, data))
    fitting = set()
    pictures = [block for block in _blocks(page) if isinstance(block, Picture)]
    for picture in sorted(pictures, key=lambda one: (one.first, one.newest), reverse=True):
        if picture.size <= room:
            room -= picture.size
            fitting.add(id(picture))
    return (
        _environment()
        .get_template("page.html")
        .render(
            page=page,
            style=Markup(_resource("page.css")),
            scripts=[Markup(script) for script in scripts],
            hashes=" ".join(f"'sha256-{_hash(script)}'" for script in scripts),
            data=data,
            name_of=lambda chart: names[id(chart)],
            switch_of=iter(switches).__next__,
            fits=lambda picture: id(picture) in fitting,
        )
    )


def plain(value: Any) -> Any:
    """A value for JSON: NumPy arrays as lists, numbers with four decimals, NaN as None."""
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return round(value, 4) if abs(value) < float("inf") else None
    return value


def _blocks(page: Page) -> Iterator[Block]:
    def inside(blocks: Sequence[Block]) -> Iterator[Block]:
        for block in blocks:
            yield block
            if isinstance(block, Folded):
                yield from inside(block.blocks)

    for section in page.sections:
        yield from inside(section.blocks)


def _charts(page: Page) -> Iterator[Chart | HeatMap]:
    for block in _blocks(page):
        if isinstance(block, Charts):
            yield from block.charts
        if isinstance(block, Maps):
            yield from block.maps


def _json(value: Any) -> str:
    """JSON that can stand in a script element: without the letters that could end it."""
    text = json.dumps(plain(value), separators=(",", ":"), allow_nan=False)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _marked(text: str) -> Markup:
    """Escaped text in which what stands between backticks is code."""
    parts = str(text).split("`")
    if len(parts) % 2 == 0:
        return escaped(text)
    return Markup("").join(
        escaped(p) if i % 2 == 0 else Markup("<code>{}</code>").format(p) for i, p in enumerate(parts)
    )


def _size_shown(path: Path) -> tuple[int, int]:
    """Letters of our figures, 8 points at 200 dots per inch, are 13 CSS pixels high then."""
    with Image.open(path) as picture:
        scale = FIGURE if path.suffix == ".png" else 1
        return round(picture.width * scale), round(picture.height * scale)


def _data_uri(path: Path) -> str:
    content = _reduced(path) if path.suffix == ".png" else path.read_bytes()
    return f"data:image/{path.suffix.removeprefix('.')};base64,{base64.b64encode(content).decode()}"


def _reduced(path: Path) -> bytes:
    """A PNG file on white, scaled down to WIDEST and with a palette; the file itself if that is not larger."""
    content, made = path.read_bytes(), BytesIO()
    with Image.open(BytesIO(content)) as picture:
        on_white = Image.new("RGBA", picture.size, "white")
        on_white.alpha_composite(picture.convert("RGBA"))
    on_white.thumbnail((WIDEST, on_white.height), Image.Resampling.LANCZOS)
    on_white.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(made, "PNG", optimize=True)
    return min(content, made.getvalue(), key=len)


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _resource(name: str) -> str:
    return (files("cosprobe.webpage") / "templates" / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    found = Environment(
        loader=PackageLoader("cosprobe.webpage"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    found.filters["marked"] = _marked
    found.globals["wide"] = Markup(' class="wide"')  # of a cell with a sentence in it
    return found
