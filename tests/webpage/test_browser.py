"""The page in a browser, headless Chromium: hovering, the switch, keys, labels, widths. `make test-browser` runs it.

Screenshots at both widths are in the temporary folder of the test, whose name is printed with `-s`.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from cosprobe.evaluation import Grid
from cosprobe.reporting import shown_targets
from cosprobe.webpage import write_page
from cosprobe.webpage.grid_charts import colourings, frame_maps, layer_map
from cosprobe.webpage.run_page import run_page
from tests.examples.pages import COMMAND, SCRIPT, result

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parent.parent.parent
FINISHED = ROOT / "runs" / "maze-layers" / "logistic"  # of `make demo`
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = (400, 1600)
CONTRAST = """() => {
  const parts = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  for (const element of document.querySelectorAll("body *:not(script):not(svg):not(svg *)")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || element.closest("noscript") || !element.checkVisibility()) continue;
    let behind = element, colour = [0, 0, 0, 0];
    while (behind && (colour[3] ?? 1) === 0) {
      colour = parts(getComputedStyle(behind).backgroundColor);
      behind = behind.parentElement;
    }
    const [a, b] = [light(parts(getComputedStyle(element).color)), light(colour[3] === 0 ? [255, 255, 255] : colour)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`${element.tagName} ${element.className} ${ratio}`);
  }
  return found;
}"""
CONTROLS = "a[href], button, select, summary, [tabindex='0']"


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("playwright is missing: pip install -e '.[browser]'", pytrace=False)
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.fail("Chromium is missing: apt-get install chromium", pytrace=False)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])


DEMO = ["make demo"] if (FINISHED / "report" / "grid.nc").is_file() else []


@pytest.fixture(scope="module", params=["example", *DEMO])
def made(request, tmp_path_factory):
    """The file of a page, the grid it was made from, and its name: a small example, and `make demo` if it has run."""
    place = tmp_path_factory.mktemp("page")
    folder = result(place / "example") if request.param == "example" else FINISHED
    return write_page(run_page(folder, COMMAND), place / "report.html"), Grid.load(folder), request.param


class Opened:
    """A page in a tab without network. wrong: errors and warnings of the console, exceptions, dialogs, requests."""

    def __init__(self, browser, path: Path, width: int, **options) -> None:
        self.wrong: list[str] = []
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, **options)
        self.tab = context.new_page()
        self.tab.on("console", lambda said: self.wrong.append(said.text) if said.type in ("error", "warning") else None)
        self.tab.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.tab.on("dialog", lambda dialog: (self.wrong.append(dialog.message), dialog.dismiss()))
        self.tab.on("request", lambda asked: self.wrong.append(asked.url[:200]) if self._outside(asked, path) else None)
        self.tab.goto(path.as_uri())
        self.tab.wait_for_selector("html[data-drawn]", timeout=120_000)

    @staticmethod
    def _outside(asked, path: Path) -> bool:
        return not asked.url.startswith("data:") and asked.url != path.as_uri()


@pytest.fixture(scope="module", params=WIDTHS)
def opened(request, browser, made):
    page = Opened(browser, made[0], request.param)
    yield page
    page.tab.context.close()


def maps(grid: Grid) -> list:
    """The maps of a page, in its order; their charts come in this order too."""
    answers = grid.with_role("answer", "model_answer")
    targets = sorted(shown_targets(grid), key=lambda name: name not in answers)
    return [one for target in targets for one in (layer_map(grid, target), *frame_maps(grid, target))]


def over(tab, chart: str, row: int, column: int) -> str:
    """The text of the hover label after the mouse has moved onto a cell."""
    tab.mouse.move(0, 0)
    tab.evaluate(f"document.getElementById('{chart}').scrollIntoView({{block: 'center'}})")
    x, y = tab.evaluate(
        """([chart, row, column]) => {
          const place = document.getElementById(chart), at = place.getBoundingClientRect();
          const {xaxis, yaxis} = place._fullLayout;
          return [at.left + xaxis._offset + xaxis.d2p(column), at.top + yaxis._offset + yaxis.d2p(row)];
        }""",
        [chart, row, column],
    )
    tab.mouse.move(x - 1, y - 1)
    tab.mouse.move(x, y, steps=3)
    tab.wait_for_selector(f"#{chart} .hoverlayer .hovertext")
    tab.wait_for_timeout(120)
    return " ".join(tab.locator(f"#{chart} .hoverlayer .hovertext text").all_text_contents())


def test_it_opens_without_errors_requests_and_scrolling_sideways(made, opened, tmp_path):
    assert made[0].stat().st_size < 10_000_000
    width = opened.tab.viewport_size["width"]
    picture = tmp_path / f"{width}.png"
    opened.tab.screenshot(path=picture, full_page=True)
    sys.stdout.write(f"\n{picture}\n")
    assert opened.tab.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.tab.locator(".plot .main-svg").first.is_visible()
    assert opened.wrong == []


def test_hovering_a_cell_shows_its_numbers(made, opened):
    found, rng = maps(made[1]), np.random.default_rng(0)
    for number in sorted({0, len(found) - 1, int(rng.integers(len(found)))}):
        one = found[number]
        for _ in range(3):
            row, column = int(rng.integers(len(one.rows))), int(rng.integers(len(one.columns)))
            said = over(opened.tab, f"chart-{number + 1}", row, column).replace("\u2212", "-")
            value, low, high = (one.fields[name][row, column] for name in ("accuracy", "lower", "upper"))
            assert f"{one.row} {one.rows[row]}, {one.column} {one.columns[column]}" in said
            ends = re.search(r"accuracy ([\d.]+) \[([\d.]+), ([\d.]+)\]", said)
            np.testing.assert_allclose([float(end) for end in ends.groups()], [value, low, high], atol=0.0051)
            p = one.fields["p"][row, column]
            assert (
                ("no p-value" in said) if np.isnan(p) else abs(float(re.search(r"p = ([\d.]+)", said)[1]) - p) < 0.00051
            )
            assert ("no evidence" in said) == one.struck[row, column] or np.isnan(p)
    assert opened.wrong == []


def test_the_switch_changes_what_the_colour_is(made, opened):
    grid = made[1]
    choices = colourings(grid, shown_targets(grid))
    assert opened.tab.locator("select option").all_text_contents() == [one.label for one in choices]
    assert len(choices) >= 8
    looks = set()
    for one in choices:
        opened.tab.select_option("select", label=one.label)
        opened.tab.wait_for_timeout(60)
        assert opened.tab.locator(".switch p").text_content() == one.meaning
        for number, shown in enumerate(maps(grid)):
            expected = shown.fields[one.value]
            if one.minus:
                expected = expected - shown.fields.get(one.minus, np.array([[np.nan]]))
            place = f"document.getElementById('chart-{number + 1}')"
            z = opened.tab.evaluate(f"{place}.data[0].z")
            np.testing.assert_allclose(np.array(z, dtype=float), expected, atol=1.01e-4)
            note = opened.tab.evaluate(f"({place}.layout.annotations || []).map((one) => one.text)")
            assert ("not measured for this target" in note) == bool(np.isnan(expected).all())
            first = opened.tab.evaluate(f"{place}.data[0].text[0][0]").replace("\u2212", "-")
            value = "not measured" if np.isnan(expected[0, 0]) else f"{z[0][0]:.2f}"
            assert not one.minus or f"{one.label}: {value}" in first
        looks.add(opened.tab.evaluate("document.querySelector('#chart-1 .heatmaplayer image').getAttribute('href')"))
    assert len(looks) >= len(choices) - 2  # two baselines may be the same
    opened.tab.select_option("select", index=0)
    assert opened.wrong == []


def test_strikes_and_their_legend_follow_the_switch(made, opened):
    grid, tab = made[1], opened.tab
    count = "(chart) => document.querySelectorAll(`#${chart} .scatterlayer path.point`).length"
    seen = {}
    for one in colourings(grid, shown_targets(grid)):
        tab.select_option("select", label=one.label)
        tab.wait_for_timeout(60)
        assert tab.locator("#switch-1-struck").text_content() == one.struck
        for number, shown in enumerate(maps(grid)):
            star = int(shown.best is not None)
            p = shown.fields[one.test] if one.test else np.zeros((1, 1))
            value = shown.fields[one.value] - (shown.fields.get(one.minus, np.nan) if one.minus else 0)
            expected = (p > 0.05) | (np.isnan(p) & np.isfinite(value))
            drawn = tab.evaluate(count, f"chart-{number + 1}") - star
            assert drawn == np.broadcast_to(expected, shown.struck.shape).sum(), (one.label, shown.title)
            seen[one.label, number] = drawn
    assert seen["skill (above the best input)", 0] != seen["accuracy minus what x0-hat shows", 0]
    assert {seen["accuracy minus chance", number] for number in range(len(maps(grid)))} == {0}
    tab.select_option("select", index=0)
    tab.wait_for_timeout(60)
    assert "struck through: no evidence for the difference that is shown" in tab.locator(".legend").first.inner_text()
    assert opened.wrong == []


def test_every_control_is_reached_by_tab_and_its_focus_is_seen(opened):
    tab = opened.tab
    expected = tab.evaluate(f"""() => [...document.querySelectorAll("{CONTROLS}")]
        .filter((one) => one.checkVisibility() && !one.closest("details:not([open]) > :not(summary)"))
        .map((one, i) => {{ one.dataset.number = i; return one.outerHTML.slice(0, 60); }})""")
    reached = []
    tab.focus(".skip")
    for _ in expected:
        number, seen = tab.evaluate(
            "() => [document.activeElement.dataset.number, getComputedStyle(document.activeElement).outlineStyle]"
        )
        if number is not None:
            reached.append(int(number))
            assert seen != "none", expected[int(number)]
        tab.keyboard.press("Tab")
    assert reached == list(range(len(expected)))


def test_arrow_keys_read_cells_and_points(made, opened):
    tab, one = opened.tab, maps(made[1])[0]
    tab.focus("#chart-1")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowUp")
    said = tab.locator("#said").text_content()
    assert said.startswith(
        f"{one.row} {one.rows[1]}, {one.column} {one.columns[1]}; accuracy {one.fields['accuracy'][1, 1]:.2f}"
    )
    assert tab.locator("#chart-1 .hoverlayer .hovertext").count() == 1
    tab.keyboard.press("Escape")
    curve = f"chart-{len(maps(made[1])) + 1}"
    tab.focus(f"#{curve}")
    tab.keyboard.press("ArrowRight")
    assert re.match(r"layer \d+: layer \d+, step \d+; \d\.\d\d \[", tab.locator("#said").text_content())
    tab.evaluate("document.activeElement.blur()")
    assert opened.wrong == []


def test_screen_readers_get_names_for_all_that_is_shown(made, opened):
    session = opened.tab.context.new_cdp_session(opened.tab)
    nodes = [node for node in session.send("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    named: dict[str, list[str]] = {}
    for node in nodes:
        named.setdefault(node["role"]["value"], []).append(str(node.get("name", {}).get("value", "")))
    for role in ("figure", "image", "application", "combobox", "table", "button", "link", "heading", "navigation"):
        assert named.get(role), role
        assert all(name.strip() for name in named[role]), role
    for label in named["application"]:
        assert re.search(r"\d\.\d\d", label), label  # numbers, not only names
    assert len(named["application"]) >= len(maps(made[1]))
    assert {"banner", "main"} <= set(named) and len(named["main"]) == 1
    levels = opened.tab.evaluate(
        "[...document.querySelectorAll('h1, h2, h3, h4')].map((one) => Number(one.tagName[1]))"
    )
    assert levels.count(1) == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))


def test_text_stands_out_from_what_is_behind_it(opened):
    assert opened.tab.evaluate(CONTRAST) == []


def test_the_numbers_of_a_map_can_be_read_as_a_table(made, opened):
    tab, one = opened.tab, maps(made[1])[0]
    tab.select_option("select", label="accuracy")
    details = tab.locator("details.numbers").first
    details.locator("summary").click()
    rows = [row.split("\t") for row in details.locator("table").inner_text().split("\n") if "\t" in row]
    assert rows[0][1:] == list(one.columns) and [row[0] for row in rows[1:]] == list(one.rows)[::-1]
    np.testing.assert_allclose(
        [[float(v) for v in row[1:]] for row in rows[:0:-1]], one.fields["accuracy"], atol=0.0051
    )
    tab.select_option("select", index=0)
    details.locator("summary").click()


def test_films_stand_still_for_those_who_want_it(browser, made):
    films = made[0].read_text(encoding="utf-8").count("data:image/gif;base64")
    there = 1 if made[2] == "example" else len(list((FINISHED / "report" / "film").glob("*.gif")))
    assert films == there
    shown = "[...document.querySelectorAll('picture img')].map((one) => one.currentSrc.slice(0, 14))"
    for preference, kind in (("no-preference", "data:image/gif"), ("reduce", "data:image/png")):
        page = Opened(browser, made[0], 1600, reduced_motion=preference)
        assert page.tab.evaluate(shown) == [kind] * films
        button = page.tab.locator("button.still").first
        if films and kind.endswith("gif"):
            button.click()
            page.tab.wait_for_timeout(300)
            assert page.tab.evaluate(shown)[0] == "data:image/png" and button.get_attribute("aria-pressed") == "true"
            button.click()
            page.tab.wait_for_timeout(300)
            assert page.tab.evaluate(shown)[0] == "data:image/gif"
        page.tab.context.close()


@pytest.mark.parametrize("made", ["example"], indirect=True)
def test_names_that_are_scripts_are_shown_and_do_not_run(made, opened):
    assert SCRIPT in opened.tab.locator("body").inner_text()
    assert opened.tab.locator("header").inner_text().count(SCRIPT) == 1
    assert opened.wrong == []


def test_pictures_fit_the_width_and_commands_wrap(opened):
    wide = opened.tab.evaluate("""() => [...document.querySelectorAll(".picture .scroll, pre")]
        .filter((one) => one.checkVisibility() && one.scrollWidth > one.clientWidth).map((one) => one.outerHTML)""")
    assert wide == []
    shadows = opened.tab.evaluate("getComputedStyle(document.querySelector('.table')).backgroundAttachment")
    assert shadows == "local, local, scroll, scroll"


def test_it_can_be_printed(opened, tmp_path):
    assert len(opened.tab.pdf(path=tmp_path / "page.pdf", format="A4")) > 50_000
    assert opened.wrong == []
