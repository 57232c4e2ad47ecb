"""A page is one file: escaped, without addresses, with everything in its place. What it looks like: test_browser.py."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from plotly.graph_objects import Figure, Scatter

from cosprobe.errors import InputError
from cosprobe.webpage import page as pages
from cosprobe.webpage.heat_map import SCALES, Colouring, HeatMap
from cosprobe.webpage.page import (
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
from tests.examples.pages import SCRIPT

pytestmark = pytest.mark.slow
VALUES = np.array([[0.12345, np.nan, 0.5], [1.0, 0.0, 0.25]])


def heat_map() -> HeatMap:
    return HeatMap(
        title=SCRIPT, label=f"Map {SCRIPT}.", caption="two rows", rows=["0", "1"], columns=["0", "5", SCRIPT],
        row="layer", column="step", row_title="layer", column_title="step",
        fields={"accuracy": VALUES, "chance": np.array([[0.25]]), "name": np.array([["b", "a", "b"]])},
        hover=[("accuracy {accuracy}", "none"), ("{name}", "")], best=(1, 0),
        struck=VALUES < 0.2, outlined=VALUES > 0.4,
    )  # fmt: skip


def lines() -> Chart:
    figure = Figure(
        Scatter(x=[0, 1], y=[0.5, 1], name="layer 3", text=["a", "b"], line={"color": "#000", "dash": "dash"})
    )
    return Chart("Lines", "Lines that rise.", "caption", figure)


def page(*blocks) -> Page:
    return Page(f"Title {SCRIPT}", "about `code`", (f"One {SCRIPT}.", "Two."), 1, (Section("First part", blocks),))


def everything() -> Page:
    share = Colouring("accuracy", "accuracy", "share", "White: never right.")
    return page(
        Text((f"a & b {SCRIPT}", "a `code`"), warning=True), Heading("Inner"), Bullets(("x", SCRIPT)),
        Table(f"Table {SCRIPT}", ["name", "value"], [["a", SCRIPT], ["b", "2"]]), Code("file", f"</pre>{SCRIPT}"),
        Folded("More", (Charts((lines(),)), Maps("Colour", (share,), (heat_map(),), (("best", "star"),)))),
    )  # fmt: skip


class Reader(HTMLParser):
    """Tags with their attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.inside = False
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.inside = True
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "script"

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def test_what_comes_from_a_run_is_text_and_never_markup():
    text = render(everything())
    assert SCRIPT not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 10
    reader = Reader(text)
    kinds = [attributes.get("type") for tag, attributes in reader.tags if tag == "script"]
    assert kinds == ["application/json", None, None]  # data, Plotly, ours
    assert "<code>code</code>" in text


def test_only_the_scripts_of_the_package_may_run_and_nothing_is_loaded():
    text = render(everything())
    reader = Reader(text)
    policy = next(a["content"] for tag, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy")
    digests = [hashlib.sha256(script.encode()).digest() for script in reader.scripts[1:]]
    hashes = {f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests}
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert set(rules["script-src"].split()) == hashes
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    assert all(str(a.get("href", "#")).startswith("#") for _, a in reader.tags)
    assert all(str(a.get(name, "data:")).startswith("data:") for _, a in reader.tags for name in ("src", "srcset"))


def test_the_data_of_charts_is_json_with_rounded_numbers_and_null():
    data = json.loads(Reader(render(everything())).scripts[0])
    first, second = data["charts"].values()
    assert "map" not in first and second["map"]["columns"][2] == SCRIPT
    assert second["map"]["fields"]["accuracy"]["values"] == [[0.1235, None, 0.5], [1.0, 0.0, 0.25]]
    assert second["map"]["fields"]["name"] == {"names": ["a", "b"], "values": [[1, 0, 1]]}
    (switch,) = data["switches"].values()
    assert switch["charts"] == ["chart-2"] and switch["colourings"][0]["scale"] in data["scales"]
    assert data["scales"] == pages.plain(SCALES)


def test_marks_are_where_the_masks_say():
    figure = heat_map().figure()
    marks = {trace.name: trace for trace in figure.data}
    assert sorted(zip(marks["struck"].y, marks["struck"].x, strict=True)) == [(0, 0), (1, 1)]
    assert (marks["best"].y, marks["best"].x) == ((1,), (0,))
    ends = [(x, y) for x, y in zip(marks["outlined"].x, marks["outlined"].y, strict=True) if x is not None]
    assert len(ends) == 2 * 8  # two cells that do not touch
    assert {x for x, _ in ends} == {-0.5, 0.5, 1.5, 2.5}


def test_colours_of_scales_are_those_of_the_figures():
    for name, place, zero in (("share", 0, 0.0), ("skill", 1, 1 / 3), ("difference", 1, 0.5)):
        at, colour = SCALES[name]["colours"][place]
        assert (
            at == pytest.approx(zero) and min(map(int, re.findall(r"\d+", colour))) >= 252
        )  # white, for no difference
    for scale in SCALES.values():
        stops = [x for x, _ in scale["colours"]]
        assert stops == sorted(stops) and (stops[0], stops[-1]) == (0, 1)


def test_headings_are_in_order_and_parts_are_labelled():
    reader = Reader(render(everything()))
    levels = [int(tag[1]) for tag, _ in reader.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    names = {attributes["id"] for _, attributes in reader.tags if "id" in attributes}
    for tag, attributes in reader.tags:
        assert set((attributes.get("aria-labelledby") or "").split()) <= names
        if tag == "th":
            assert attributes["scope"] in ("col", "row")
    assert len(names) == len([a for _, a in reader.tags if "id" in a])  # no name twice
    assert [tag for tag, _ in reader.tags if tag in ("header", "main", "nav")] == ["header", "main", "nav"]


def picture(folder, side: int = 4, caption: str = "caption", first: bool = False) -> Picture:
    """A picture of noise, which cannot be made much smaller."""
    noise = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    path = folder / f"p{side}.png"
    Image.fromarray(noise).save(path)
    return Picture(path, f"alt {SCRIPT}", caption, first=first)


def inside(text: str) -> int:
    """How many pictures are in a page."""
    return sum(str(a.get("src")).startswith("data:image/png;base64,") for tag, a in Reader(text).tags if tag == "img")


def test_pictures_are_inside_until_the_page_would_be_too_large(tmp_path, monkeypatch):
    small, large = picture(tmp_path), picture(tmp_path, 400, "of the large one")
    text = render(page(large, small))
    assert inside(text) == 2 and ">of the large one<" in text
    room = len(render(page()).encode()) + 100_000
    monkeypatch.setattr(pages, "MOST_BYTES", room)
    text = render(page(large, small))
    assert inside(text) == 1 and "p400.png is left out" in text and "of the large one" not in text
    assert len(text.encode()) < room + 20_000


def test_films_and_the_newest_pictures_are_kept(tmp_path, monkeypatch):
    old, new, film = (picture(tmp_path, side, first=side == 300) for side in (280, 290, 300))
    for seconds, one in enumerate((film, old, new)):
        os.utime(one.path, (seconds, seconds))
    empty = len(render(page()).encode())
    for room, lost in ((old.size // 2, {280, 290, 300}), (film.size, {280, 290}), (film.size + new.size, {280})):
        monkeypatch.setattr(pages, "MOST_BYTES", empty + room)
        names = re.findall(r"p(\d+)\.png is left out", render(page(old, new, film)))
        assert set(map(int, names)) == lost


def test_pictures_are_made_smaller_and_stay_alike(tmp_path):
    shades = np.linspace(0, 255, 1600).astype(np.uint8)[None, :, None].repeat(400, axis=0).repeat(3, axis=2)
    pixels = np.dstack([shades, np.full((400, 1600), 255, dtype=np.uint8)])
    pixels[:, 800:, 3] = 0  # transparent
    Image.fromarray(pixels).save(tmp_path / "wide.png", compress_level=0)
    one = Picture(tmp_path / "wide.png", "alt", "caption")
    content = base64.b64decode(one.uri.removeprefix("data:image/png;base64,"))
    found = Image.open(BytesIO(content))
    assert found.size == (1200, 300) and found.mode == "P" and len(content) < one.path.stat().st_size / 4
    shown = np.asarray(found.convert("L"), dtype=float)[150]
    np.testing.assert_allclose(shown[10:590:3], shades[0, 14:787:4, 0], atol=4)
    assert shown[700] == 255  # on white
    assert one.size_shown == (928, 232)


def test_a_moving_picture_has_a_still_one_and_a_button(tmp_path):
    one = picture(tmp_path)
    Image.new("P", (4, 4)).save(tmp_path / "a.gif")
    text = render(page(replace(one, path=tmp_path / "a.gif", still=one.path)))
    reader = Reader(text)
    (source,) = [a for tag, a in reader.tags if tag == "source"]
    assert source["media"] == "(prefers-reduced-motion: reduce)" and source["srcset"].startswith("data:image/png")
    assert [a["src"][:14] for tag, a in reader.tags if tag == "img"] == ["data:image/gif"]
    assert [tag for tag, _ in reader.tags].count("button") == 1


def test_a_page_is_written_whole_or_refused(tmp_path, monkeypatch):
    path = write_page(page(Text(("small",))), tmp_path / "new" / "a.html")
    assert path.read_text(encoding="utf-8") == render(page(Text(("small",)))) and len(list(path.parent.iterdir())) == 1
    with pytest.raises(InputError, match=r"10\.\d MB, expected less than 10 MB"):
        write_page(page(Code("long", "x" * 6_000_000)), tmp_path / "b.html")
    assert not (tmp_path / "b.html").exists()
