"""The site has every page and every package; its pages and the citation say what the code says."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path

import pytest
import yaml

import cosprobe
from tests.architecture import ROOMS

ROOT = Path(__file__).resolve().parent.parent
API = ROOT / "docs" / "api"
PACKAGES = [room for room in ROOMS if (ROOT / "cosprobe" / room.replace(".", "/")).is_dir()]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.fixture(scope="module")
def settings():
    return runpy.run_path(str(ROOT / "docs" / "conf.py"))


def test_every_page_is_in_the_table_of_contents(settings):
    listed = [page for pages in settings["CONTENTS"].values() for page in pages.values()]
    written = {str(path.relative_to(ROOT).with_suffix("")) for path in (ROOT / "docs").glob("*.md")}
    assert written <= set(listed), written - set(listed)
    assert all((ROOT / f"{page}.md").is_file() for page in listed)
    assert len(set(listed)) == len(listed)


def test_every_package_has_a_page():
    listed = re.findall(r"^([a-z_.]+)$", (API / "index.md").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(PACKAGES)
    assert {path.stem for path in API.glob("*.md")} == {*listed, "index"}
    for name in listed:
        assert f".. automodule:: cosprobe.{name}\n   :members:\n" in (API / f"{name}.md").read_text()


def test_the_first_page_of_the_reference_lists_the_names_of_the_package():
    listed = re.findall(r"^   ~[a-z_.]+\.(\w+)$", (API / "index.md").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(cosprobe.__all__)


def test_symptoms_are_words_of_the_code():
    files = [*sorted((ROOT / "cosprobe").rglob("*.py")), ROOT / "train.py", ROOT / "probe.py"]
    code = "".join(path.read_text() for path in files)
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # a message over several lines
    rows = [line for line in (ROOT / "docs" / "errors.md").read_text().splitlines() if line.startswith("| `")]
    shown = [text for row in rows for text in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    assert len(shown) > 30
    for text in shown:
        for words in re.split(r"\.\.\.|\S*[=\d]\S*|--foo:", text):  # without the values of the example
            assert words.strip(" ,?") in code, f"{text}: {words}"


def test_the_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["title"], citation["version"]) == ("cosprobe", VERSION)
    assert citation["references"][0]["url"].endswith("2603.16870")
