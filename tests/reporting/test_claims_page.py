"""The table of claims in a page of the docs is that of the reports."""

from __future__ import annotations

import pytest

from cosprobe.errors import InputError
from cosprobe.files import write_json
from cosprobe.reporting.claims_page import BEGIN, END, HEAD, main

CLAIM = {"claim": "It moves", "measure": "a minus b", "control": "b", "value": 0.5, "lower": 0.25, "upper": 0.75}
UNKNOWN = dict.fromkeys(("value", "lower", "upper"))


def written(folder, name, **content):
    path = folder / "report" / name / "claims.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


@pytest.fixture
def result(tmp_path, monkeypatch):
    monkeypatch.setattr("cosprobe.reporting.claims_page.find_result", lambda run: tmp_path / run)
    written(tmp_path / "one", "causal-a", about="kind: a", n=23, claims=[CLAIM | {"verdict": "holds"}])
    written(tmp_path / "one", "causal-b", about="kind: b", n=4, trial=True, claims=[CLAIM | {"verdict": "no"}])
    return tmp_path


def test_text_around_the_table_stays_and_trials_are_left_out(result):
    page = result / "page.md"
    page.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nThe end.\n")
    main([str(page), "causal-*/claims.json", "maze=one"])
    table = [
        f"| {' | '.join(HEAD)} |", "| " + " | ".join("-" * max(3, len(name)) for name in HEAD) + " |",
        "| maze, kind: a | It moves | b | a minus b | +0.50 [+0.25, +0.75] | 23 | holds |",
    ]  # fmt: skip
    assert page.read_text() == "\n".join(["# Title", "", BEGIN, *table, END, "", "The end.", ""])


def test_a_report_of_full_size_stands_for_the_quick_one(result):
    written(result / "one", "causal-a-full", about="kind: a", n=72, claims=[CLAIM | {"verdict": "holds"}])
    page = result / "page.md"
    page.write_text(f"{BEGIN}{END}")
    main([str(page), "causal-*/claims.json", "maze=one"])
    assert [line for line in page.read_text().splitlines() if "maze" in line] == [
        "| maze, kind: a | It moves | b | a minus b | +0.50 [+0.25, +0.75] | 72 | holds |"
    ]


def test_a_claim_may_have_its_own_number_of_samples_or_no_numbers(result):
    own = CLAIM | UNKNOWN | {"verdict": "untested", "n": 0, "about": "all: memory"}
    written(result / "two", "behaviour", claims=[own, CLAIM | {"verdict": "holds", "n": 7, "about": "x: y"}])
    page = result / "page.md"
    page.write_text(f"{BEGIN}{END}")
    main([str(page), "none/claims.json,behaviour/claims.json", "maze=two"])
    lines = page.read_text().splitlines()
    assert "| maze, all: memory | It moves | b | a minus b |  |  | untested |" in lines
    assert "| maze, x: y | It moves | b | a minus b | +0.50 [+0.25, +0.75] | 7 | holds |" in lines


def test_a_report_that_is_not_there_is_named(result):
    page = result / "page.md"
    page.write_text("kept")
    with pytest.raises(InputError, match=r"one/report.*behaviour/none\.json"):
        main([str(page), "behaviour/none.json", "maze=one"])
    assert page.read_text() == "kept"
