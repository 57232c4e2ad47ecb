from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

import probe
from cosprobe.config import ProbeConfig, TrainerConfig
from cosprobe.errors import InputError
from cosprobe.files import write_json
from cosprobe.runs import (
    delete_run,
    find_result,
    finished,
    list_runs,
    mark_finished,
    outdated_reports,
    print_runs,
    result_name,
)


@pytest.mark.parametrize(
    ("probe", "precision", "name"),
    [
        ({}, "32-true", "logistic"),
        ({"layers": "0", "steps": "1", "random_weights": 0, "memory": 1.0}, "32-true", "logistic"),
        ({"kind": "ridge"}, "32-true", "ridge"),
        ({"penalties": [0.1, 1.0], "lr": 0.5}, "32-true", "logistic-penalties-0.1-1.0-lr-0.5"),
        ({"batch": 64}, "bf16-mixed", "logistic-batch-64-precision-bf16-mixed"),
    ],
)
def test_a_result_is_named_by_what_differs_from_the_defaults(probe, precision, name):
    assert result_name(ProbeConfig(**probe), TrainerConfig(precision=precision)) == name


def test_a_run_folder_with_one_result_stands_for_it(tmp_path):
    assert find_result(tmp_path / "none") == tmp_path / "none"
    for name in ("logistic", "ridge"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "config.yaml").write_text("")
        assert find_result(tmp_path / "run" / name) == tmp_path / "run" / name
        if name == "logistic":
            assert find_result(str(tmp_path / "run")) == tmp_path / "run" / name
    with pytest.raises(InputError, match=r"run='.*/run'.*2 results.*run/logistic, .*run/ridge"):
        find_result(tmp_path / "run")


def test_a_report_is_finished_with_its_probes_code_and_files_alone(tmp_path, monkeypatch):
    assert finished(tmp_path, "a") is None
    (tmp_path / "map.png").write_text("picture")
    mark_finished(tmp_path, "a", "seen: all")
    assert finished(tmp_path, "a") == "seen: all" and finished(tmp_path, "b") is None
    mark_finished(tmp_path, "a", "seen: all")
    (tmp_path / "map.png").unlink()  # it has to be drawn again
    assert finished(tmp_path, "a") is None
    mark_finished(tmp_path, "a")
    assert finished(tmp_path, "a") == ""
    monkeypatch.setattr("cosprobe.runs.code_fingerprint", lambda: "other")
    assert finished(tmp_path, "a") is None


def test_reports_of_other_probes_are_found(tmp_path):
    for name, probes in (("early", "a"), ("ensemble", "b")):
        (tmp_path / "report" / name).mkdir(parents=True)
        mark_finished(tmp_path / "report" / name, probes)
    (tmp_path / "report" / "mine").mkdir()
    (tmp_path / "report" / "mine" / "finished.json").write_text("no JSON")
    assert outdated_reports(tmp_path, "a") == [tmp_path / "report" / "ensemble"]
    assert outdated_reports(tmp_path / "none", "a") == []


@pytest.fixture
def runs(tmp_path):
    """Run `a` has two results and the activations that run `b` reads too; `c` trained a model; `d` was killed."""
    root = tmp_path / "runs"
    for name, size in (
        ("a/logistic/config.yaml", 10), ("a/logistic/report/finished.json", 10), ("a/ridge/config.yaml", 10),
        ("a/store/settings.json", 1000), ("b/logistic/config.yaml", 10), ("b/logistic/report/finished.json", 10),
        ("c/config.yaml", 7), ("d/store/settings.json", 100), ("notes/mine.txt", 1),
    ):  # fmt: skip
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x" * size)
    for name, store in (("a/logistic", "../store"), ("a/ridge", "../store"), ("b/logistic", "../../a/store")):
        write_json(root / name / "activations.json", {"store": store})
    return root


def test_run_folders_are_listed_with_results_sizes_and_whose_activations_they_read(runs):
    found = {run.folder.name: run for run in list_runs(runs)}
    assert list(found) == ["a", "b", "c", "d"]
    assert found["a"].results == ("logistic", "ridge") and found["a"].unfinished == ("ridge",)
    assert (found["a"].stored, found["c"].size, found["d"].results) == (1000, 7, ())
    assert found["a"].size == sum(path.stat().st_size for path in (runs / "a").rglob("*") if path.is_file())
    assert found["b"].reads == {"logistic": (runs / "a" / "store").resolve()}
    text = io.StringIO()
    print_runs(list(found.values()), Console(file=text))
    lines = text.getvalue().splitlines()
    assert any(re.search(r"^ *a +logistic, ridge \(unfinished\) +0 +0 +a *$", line) for line in lines)
    assert any(re.search(r"^ *b +logistic +0 +0 +a *$", line) for line in lines)
    with pytest.raises(InputError, match=r"run='.*/nowhere'.*runs"):
        list_runs(runs / "nowhere")


def test_a_run_folder_is_no_folder_of_run_folders(runs):
    with pytest.raises(InputError, match=r"run='.*/runs/a'.*is a run folder.*runs'"):
        list_runs(runs / "a")


def test_activations_that_others_read_are_not_deleted(runs):
    for name in ("a", str(runs / "a" / "store"), "a/store"):
        with pytest.raises(InputError, match=r"use\.delete=.*read by .*b/logistic"):
            delete_run(runs, name)
    size = (runs / "a" / "ridge" / "activations.json").stat().st_size
    assert delete_run(runs, "a/ridge") == 10 + size and not (runs / "a" / "ridge").exists()
    delete_run(runs, str(runs / "b"))
    with pytest.raises(InputError, match=r"use\.delete='a/store'.*read by .*a/logistic"):
        delete_run(runs, "a/store")
    assert delete_run(runs, "a") > 1000
    assert [run.folder.name for run in list_runs(runs)] == ["c", "d"]


@pytest.mark.parametrize("name", ["..", ".", "notes", "a/logistic/..", "../other", "a/logistic/config.yaml", "zzz"])
def test_nothing_but_runs_and_their_parts_is_deleted(runs, name):
    (runs.parent / "other" / "logistic").mkdir(parents=True)
    (runs.parent / "other" / "logistic" / "config.yaml").write_text("")
    before = sorted(runs.parent.rglob("*"))
    with pytest.raises(InputError, match=r"use\.delete='.*expected a run folder in .*a, b, c, d|read by"):
        delete_run(runs, name)
    assert sorted(runs.parent.rglob("*")) == before


def test_the_command_lists_and_deletes(runs, capsys):
    assert probe.main(["use=runs", f"run={runs}", "use.delete=d"]) == 0
    said = capsys.readouterr().out
    assert "d: deleted" in said and re.search(r"^ *a +logistic", said, re.MULTILINE)
    assert not re.search(r"^ *d +", said, re.MULTILINE)
