"""The whole line on a toy pipeline with random weights, through the command people type."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import probe
import train as training
from cosprobe import Grid, ensemble, load_pipeline, load_probes
from cosprobe.activations.collection import UNTRAINED
from cosprobe.activations.dataset import load_samples
from cosprobe.activations.store import ActivationStore
from cosprobe.command import MARK, read_run
from cosprobe.ensembles.comparison import SIZES
from cosprobe.ensembles.strategies import STRATEGIES
from cosprobe.errors import InputError
from cosprobe.models.identity import fingerprint
from cosprobe.processes import LOST
from cosprobe.reporting import results_page
from cosprobe.runs import results
from tests.examples import processes
from tests.examples.folders import write
from tests.examples.pictures import undrawn
from tests.examples.pipelines import save_wan
from tests.examples.probe_tiny import TINY, run_commands
from tests.examples.shapes import unchecked

ROOT = Path(__file__).resolve().parent.parent
RESULT = "logistic-epochs-5"  # what `train` makes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "wan"
    save_wan(path)
    return path


def command(script, *settings):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(ROOT / script), *settings], capture_output=True, text=True, env=environment, timeout=400
    )


def within(script, *settings):
    """The same in this process: one of its own takes seconds to start."""
    main = {"train.py": training.main, "probe.py": probe.main}[script]
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(io.StringIO()) as errors, unchecked():
        code = main(list(settings))
    return subprocess.CompletedProcess(settings, code, said.getvalue(), errors.getvalue())


def settings_of(model, folder, *settings):
    """What `train` is given."""
    return [
        "probe=layers", f"pipeline.path={model}", "pipeline.steps=3", "pipeline.frames=5", "pipeline.batch=8",
        "task.frames=5", "task.problems=64", "probe.epochs=5", f"run_dir={folder}", *settings,
    ]  # fmt: skip


def train(model, folder, *settings, start=within, drawn=False):
    """Of 64 problems no two answers are equally frequent in train: between such a probe of a constant input takes
    whichever rounding prefers."""
    with undrawn(not drawn):
        result = start("train.py", *settings_of(model, folder, *settings))
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """The folder of the result of a run, and what the run printed."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    output = train(model, folder, drawn=True)
    return folder / RESULT, output


@pytest.mark.slow
def test_the_run_folder_is_complete(run, model):
    folder, output = run
    for name in (
        "config.yaml", "activations.json", "../store/manifest.json", "probes/bank.safetensors", "probes/bank.json",
        "tensorboard", "report/finished.json",
    ):  # fmt: skip
        assert (folder / name).exists(), name
    for name in ("grid.nc", "summary.md", "headline.png", "curves.png", "film.png", "others.png", "report.html"):
        assert (folder / "report" / name).stat().st_size > 1000, name
    page = (folder / "report" / "report.html").read_text(encoding="utf-8")
    command = f"python train.py task=maze task.problems=64 task.frames=5 pipeline.path={model} pipeline.steps=3"
    assert "Strongest caveat" in page and command in page
    for name in ("checks.png", "generalisation.png"):
        assert (folder / "report" / name).stat().st_size > 1000, name
    assert str(folder / "report" / "report.html") in output
    assert str(folder / "report" / "summary.md") in output and str(folder / "tensorboard") in output
    assert "64 samples" in output
    grid, text = Grid.load(folder), (folder / "report" / "summary.md").read_text()
    best = grid.best("answer").cell
    head = f"answer: layer {best.layer}, step {best.step}"  # of the table of checks
    assert head in text and head in output
    assert re.search(rf"\b{grid.dataset.attrs['weights_evaluations']}\b.*network evaluations", text)


@pytest.mark.slow
def test_the_grid_has_the_promised_names(run):
    grid = Grid.load(run[0]).dataset
    assert {"target", "step", "layer", "position"} <= set(grid.dims) and "branch" not in grid.dims
    assert {"accuracy", "lower", "upper", "chance", "skill", "p_permutation"} <= set(grid.data_vars)
    assert {"p_inputs", "p_evidence", "p_x0", "selectivity", "latency", "lag", "ece", "brier"} <= set(grid.data_vars)
    assert {"transfer_step", "transfer_layer", "weights_accuracy"} <= set(grid.data_vars)
    assert {"answer", "answer_relabelled", "control"} <= set(grid.target.values)
    baseline = grid.baseline_accuracy.sel(target="answer").isel(step=0, position=0)
    assert baseline.sizes["baseline"] == 12
    assert np.isfinite(baseline).all(), baseline
    assert np.isfinite(grid.selectivity.sel(target="answer")).all()
    assert grid.sizes["step"] == 3 and grid.sizes["layer"] == 3
    assert {"answer", "start", "corridors", "length", "control"} <= set(grid.target.values)
    assert (grid.p_permutation.sel(target="control") > 0.05).all()


@pytest.mark.slow
def test_every_token_has_a_probe(model, tmp_path):
    """Tokens of the toy model: 2 latent frames of 8 x 8. A path is known for the half of the problems with one exit."""
    tokens = ("probe=tokens", "probe.layers=1", "probe.steps=0", "task.problems=80")
    output = train(model, tmp_path / "run", *tokens, drawn=True)
    (report,) = (tmp_path / "run").glob("ridge*/report")
    grid = Grid.load(report).dataset
    assert grid.sizes["position"] == 2 * 8 * 8 and "corridors" not in grid.target.values
    assert (int(grid.frame.max()), int(grid.row.max()), int(grid.column.max())) == (1, 7, 7)
    assert np.isfinite(grid.accuracy).all()
    with xr.open_dataset(report / "path.nc") as path:
        assert path.attrs["n_test"] == 12 and path.accuracy.notnull().any() and path.p_evidence.notnull().any()
        assert set(path.baseline.values) == {"guess", "noise", "first_frame", "embed", "x_t"}
    text = (report / "summary.md").read_text()
    for name in ("path.png", "tokens_answer.png"):
        assert (report / name).stat().st_size > 1000 and f"]({name})" in text
    assert "Which tokens know that they lie on the path" in text and str(report / "summary.md") in output


@pytest.mark.slow
def test_random_weights_decode_no_answer_beyond_what_goes_in(run):
    """The pipeline is random: whatever its probes read they read from the input."""
    grid = Grid.load(run[0])
    best = grid.best("answer")
    assert best.lower <= float(grid.at("answer", best.cell).baseline_accuracy.max()) + 0.25


@pytest.mark.slow
def test_a_second_run_reuses_the_store_and_gives_the_same_grid(model, run):
    before = Grid.load(run[0]).dataset.load()
    killed = run[0] / "tensorboard" / "training" / "median" / "events.out.tfevents.1.killed"
    shutil.copy(next(killed.parent.glob("events*")), killed)
    (run[0] / "probes" / "bank.json").unlink()  # as if killed while fitting
    store = run[0].parent / "store"
    board = {path.relative_to(run[0]).parent for path in run[0].rglob("events.out.tfevents.*")}
    assert {path.name for path in board} >= {"sampling", "training", "median", "layer 0", "finished video", "report"}
    written = {path: path.stat().st_mtime_ns for path in store.iterdir()}
    output = train(model, run[0].parent)
    assert output.count("re-using them") == 1  # the activations
    assert output.count("re-using it") == 2  # baselines and film
    assert {path: path.stat().st_mtime_ns for path in store.iterdir()} == written
    events = [path.relative_to(run[0]).parent for path in run[0].rglob("events.out.tfevents.*")]
    assert set(events) == board and len(events) == len(board)  # one file each: no chart is drawn twice
    after = Grid.load(run[0]).dataset
    for name in ("accuracy", "skill", "p_permutation", "p_inputs", "p_x0", "latency", "baseline_accuracy",
                 "baseline_form", "transfer_step", "weights_accuracy"):  # fmt: skip
        np.testing.assert_array_equal(before[name].values, after[name].values)


EARLY = ("use=early", "use.calibration=59", "use.problems=4", "use.error_reference=truth")


@pytest.fixture(scope="module")
def early(run):
    """What early answers printed."""
    result = within("probe.py", *EARLY, f"run={run[0]}")
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def seeds(run):
    """What a comparison of ensembles printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "quick", TINY)
        result = within("probe.py", "use=ensemble", f"run={run[0]}")
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def pair(model, run, tmp_path_factory):
    """The folder of what two processes make: a run, and early answers and ensembles of a copy of the run of one.

    They are started as Lightning's launcher does, without its seconds of imports and waits."""
    folder = tmp_path_factory.mktemp("pair")
    shutil.copytree(run[0].parent, folder / "copy", ignore=shutil.ignore_patterns("early", "ensemble"))
    uses = [["probe", *use, f"run={folder / 'copy'}", "trainer.devices=2"] for use in (EARLY, ("use=ensemble",))]
    new = folder / "new" / "two"  # without a run beside it whose activations could be read
    commands = [["train", *settings_of(model, new, "trainer.devices=2")], *uses]
    assert processes.run_devices(run_commands, commands) == [0, 0]
    return folder


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("launched", [False, pytest.param(True, marks=pytest.mark.docs)])
def test_two_processes_give_the_same_grid(model, run, tmp_path, launched, request):
    folder = (tmp_path if launched else request.getfixturevalue("pair") / "new") / "two"
    if launched:
        train(model, folder, "trainer.devices=2", start=command)
    one, two = (ActivationStore.open(folder / "store") for folder in (run[0].parent, folder))
    assert one.fingerprint == two.fingerprint
    assert one.names() == two.names() and one.names(UNTRAINED) == two.names(UNTRAINED)
    tensors = [store.read()[0] | store.read(UNTRAINED, store.names(UNTRAINED))[0] for store in (one, two)]
    for name in tensors[0].keys() - {"untrained.spent"}:  # seconds are never the same
        torch.testing.assert_close(tensors[0][name], tensors[1][name], rtol=0, atol=1e-6, equal_nan=True)
    samples, _, _ = load_samples(one)
    banks = load_probes(run[0]), load_probes(folder)
    for target in banks[0].targets:
        values = [bank.decision(samples.features, target.name) for bank in banks]
        torch.testing.assert_close(*values, rtol=0, atol=1e-4)
    grids = Grid.load(run[0]).dataset, Grid.load(folder).dataset
    np.testing.assert_allclose(grids[0].accuracy.values, grids[1].accuracy.values)
    np.testing.assert_allclose(grids[0].weights_accuracy.values, grids[1].weights_accuracy.values)


def started_by(process):
    """The process of the second device, which Lightning has started."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = path.joinpath("stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == process.pid and b"\0LOCAL_RANK=1\0" in path.joinpath("environ").read_bytes():
                return int(path.name)
    return None


@pytest.mark.docs
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
@pytest.mark.parametrize("killed", [0, 1])
def test_when_a_process_of_the_launcher_is_killed_the_other_ends_in_seconds(model, tmp_path, killed):
    """Long before `trainer.timeout`, which is half an hour."""
    arguments = settings_of(model, tmp_path / "two", "trainer.devices=2", "task.problems=600")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *arguments], stdout=log, stderr=log,
                                 env=environment)  # fmt: skip
    while len(list((tmp_path / "two" / "store").glob("shard-*"))) < 2:
        assert first.poll() is None
        time.sleep(0.02)
    other = started_by(first)
    assert other is not None
    os.kill((first.pid, other)[killed], signal.SIGKILL)
    assert first.wait(60) == (2 if killed else -signal.SIGKILL)
    end = time.monotonic() + 30
    while Path(f"/proc/{other}").exists():
        assert time.monotonic() < end
        time.sleep(0.1)
    said = (tmp_path / "log").read_text()
    assert said.count(LOST) == said.count("error: ") == 1 and "Traceback" not in said, said


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("use", ["early", "ensemble"])
def test_two_processes_sample_what_one_does(run, pair, early, seeds, use):
    """Early answers and ensembles: the same shards, each of them once."""
    one, two = (
        {path.name: ActivationStore.open(path) for path in (result / use).iterdir()}
        for result in (run[0], pair / "copy" / RESULT)
    )
    assert one.keys() == two.keys() and len(one) > 1
    for name, store in one.items():
        shards = [sorted(path.name for path in one.folder.glob("shard-*")) for one in (store, two[name])]
        assert shards[0] == shards[1] and store.names() == two[name].names()
        tensors, others = store.read()[0], two[name].read()[0]
        for part, values in tensors.items():
            torch.testing.assert_close(values, others[part], rtol=0, atol=1e-6, equal_nan=True)
    report = {"early": "early/early.json", "ensemble": "ensemble/ensemble.json"}[use]
    written = [json.loads((result / "report" / report).read_text()) for result in (run[0], pair / "copy" / RESULT)]
    assert written[0].keys() == written[1].keys()
    if use == "ensemble":
        assert written[0] == written[1]


@pytest.mark.slow
def test_predict_reads_early_and_compares(run):
    result = within("probe.py", "use=predict", f"run={run[0]}", "use.step=1", "use.problems=3")
    assert result.returncode == 0, result.stderr
    assert re.search(r"answer.*\bstep 1 of 3\b", result.stdout)
    assert re.search(r"\b\d\.\d\d of 3 problems.*probe \d\.\d\d.*\d\.\d\d", result.stdout)


@pytest.mark.slow
def test_behaviours_are_in_the_report_and_measured_again_to_the_same_numbers(run):
    folder = run[0] / "report" / "behaviour"
    written = {name: (folder / name).read_bytes() for name in ("behaviour.json", "behaviour.md", "behaviour.nc")}
    assert "behaviour/behaviour.md" in (run[0] / "report" / "summary.md").read_text()
    result = within("probe.py", "use=behaviour", f"run={run[0]}")
    assert result.returncode == 0, result.stderr
    assert str(folder / "behaviour.md") in result.stdout and "Predicting" not in result.stdout
    assert {name: (folder / name).read_bytes() for name in written if name != "behaviour.nc"} == {
        name: content for name, content in written.items() if name != "behaviour.nc"
    }
    claims = json.loads(written["behaviour.json"])["claims"]
    assert {claim["about"].partition(": ")[2] for claim in claims} >= {"exploration", "commitment", "layer roles"}


@pytest.mark.slow
def test_a_run_is_compared_with_another(run, tmp_path):
    shutil.copytree(run[0].parent, tmp_path / "same")
    result = within("probe.py", "use=compare", f"runs=[{run[0]},{tmp_path / 'same'}]")
    assert result.returncode == 0, result.stderr
    assert "no evidence of a difference" in result.stdout and "Predicting" not in result.stdout
    place = run[0] / "report" / "compare-same"
    assert str(place / "compare.html") in result.stdout and "All settings agree" in (place / "compare.md").read_text()
    cells = xr.load_dataset(place / "same.nc")
    assert (cells.difference == 0).all() and cells.sizes["layer"] == Grid.load(run[0]).dataset.sizes["layer"]


@pytest.mark.slow
def test_early_stopping_is_calibrated_reported_and_left_in_the_bank(run, early):
    """The model is random, so no risk can be promised: what is checked is the line from the run to its report."""
    assert re.search(r"one_exit.*\b0\.05\b.*\b0\.95\b.*\b59\b", early)
    folder = run[0] / "report" / "early"
    for name in ("early.json", "early.md", "frontier.png", "film_one_exit.png"):
        assert (folder / name).stat().st_size > 500, name
    policy = json.loads((folder / "early.json").read_text())["kinds"]["one_exit"]["policy"]
    assert policy["problems"] == 59 and policy["error_reference"] == "truth"
    assert load_probes(run[0]).provenance.policies == (policy,)
    again = within("probe.py", *EARLY, f"run={run[0]}")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("re-using them") == 2


@pytest.mark.slow
def test_a_second_run_keeps_the_probes_and_their_policies(model, run):
    bank = load_probes(run[0])
    bank.with_provenance(policies=({"threshold": 0.9},)).save(run[0] / "probes")
    before = Grid.load(run[0]).dataset.load()
    (run[0] / "report" / "finished.json").unlink()  # as if the code had changed
    assert train(model, run[0].parent).count("re-using them") == 2  # the activations and the probes
    assert load_probes(run[0]).provenance.policies == ({"threshold": 0.9},)
    bank.save(run[0] / "probes")
    np.testing.assert_array_equal(before.accuracy.values, Grid.load(run[0]).dataset.accuracy.values)


@pytest.mark.slow
def test_a_finished_result_is_printed_again_and_nothing_is_done(model, run):
    train(model, run[0].parent)  # an earlier test may have taken the mark away
    files = {path: path.stat().st_mtime_ns for path in run[0].parent.rglob("*") if path.is_file()}
    output = train(model, run[0].parent)
    assert "unchanged" in output and "re-using" not in output
    assert json.loads((run[0] / "report" / "finished.json").read_text())["printed"] in output
    assert "report: " in output
    assert {path: path.stat().st_mtime_ns for path in run[0].parent.rglob("*") if path.is_file()} == files


@pytest.mark.slow
def test_a_model_that_was_moved_keeps_its_run(model, run, tmp_path):
    moved = shutil.copytree(model, tmp_path / "moved")
    assert "unchanged" in train(moved, run[0].parent)
    assert read_run(run[0]).pipeline.path == str(moved)
    assert within("probe.py", "use=predict", f"run={run[0]}", "use.step=1", "use.problems=2").returncode == 0
    shutil.rmtree(moved)
    gone = within("probe.py", "use=predict", f"run={run[0]}")
    assert gone.returncode == 2 and re.search(r"pipeline\.path='.*/moved'.*was moved.*new place", gone.stderr)
    assert "unchanged" in train(model, run[0].parent) and read_run(run[0]).pipeline.path == str(model)


@pytest.mark.slow
def test_another_kind_of_probes_is_another_result_of_the_run(model, run):
    """It reads the same activations, and the first result keeps its probes, policies, grid and curves."""
    files = {path: path.stat().st_mtime_ns for path in run[0].rglob("*") if path.is_file()}
    output = train(model, run[0].parent, "probe.kind=ridge")
    assert output.count("re-using them") == 1 and "film: computed before" in output and "Predicting" not in output
    other = run[0].parent / "ridge-epochs-5"
    assert Grid.load(other).dataset.accuracy.shape == Grid.load(run[0]).dataset.accuracy.shape
    assert load_probes(other).provenance.probe["kind"] == "ridge" and (other / "tensorboard").is_dir()
    assert {path: path.stat().st_mtime_ns for path in run[0].rglob("*") if path.is_file()} == files
    with pytest.raises(InputError, match=rf"run=.*2 results.*{RESULT}.*ridge-epochs-5"):
        load_probes(run[0].parent)
    shutil.rmtree(other)


@pytest.mark.slow
def test_other_problems_in_the_same_run_folder_are_refused(model, run):
    result = within(
        "train.py", f"pipeline.path={model}", "pipeline.steps=3", "pipeline.frames=5", "pipeline.batch=8",
        "task.frames=5", "task.problems=80", f"run_dir={run[0].parent}",
    )  # fmt: skip
    assert result.returncode == 2
    assert re.search(r"run_dir.*task\.problems=64.*task\.problems=80", result.stderr.splitlines()[-1])


@pytest.mark.slow
def test_ensembles_are_compared_and_answer(model, run, seeds, monkeypatch):
    monkeypatch.setitem(SIZES, "quick", TINY)
    again = within("probe.py", "use=ensemble", f"run={run[0]}")
    assert again.returncode == 0, again.stderr
    for said, bars in ((seeds, 2), (again.stdout, 0)):  # the second time everything is on disk
        assert said.count("Predicting") == bars
        assert all(name in said for name in STRATEGIES)
    for name in ("ensemble.json", "ensemble.md", "ensemble.png"):
        assert (run[0] / "report" / "ensemble" / name).stat().st_size > 1000
    page = (run[0] / "report" / "ensemble" / "ensemble.md").read_text()
    assert all(f"| {name}" in page for name in STRATEGIES)
    settings = read_run(run[0])
    problem = settings.task.build().problems("calibration", 1)[0]
    found = ensemble(load_pipeline(settings.pipeline), problem, "prune", 3, probes=run[0])
    assert found.video.shape == (5, 64, 64, 3) and found.evaluations == 3 + 2 + 1


@pytest.mark.slow
def test_the_page_of_results_reads_everything_a_run_holds(run, early, seeds, tmp_path):
    results_page.main([str(tmp_path / "results.md"), f"one={run[0]}"])
    text, answers, ensembles = (
        (tmp_path / "results.md").read_text(),
        json.loads((run[0] / "report" / "early" / "early.json").read_text()),
        json.loads((run[0] / "report" / "ensemble" / "ensemble.json").read_text()),
    )
    result = answers["kinds"]["one_exit"]["result"]
    assert re.search(rf"^\| one_exit \| {result['samples']} \|.*\b{result['compute']:.3f}\b", text, re.MULTILINE)
    for chosen in ensembles["chosen"].values():
        for one in chosen.values():
            row = rf"^\| {re.escape(one['strategy'])} \|.*\b{one['all']['right']['mean']:.3f}\b"
            assert re.search(row, text, re.MULTILINE)


def edited(run: Path, **settings: str) -> None:
    """Changes settings of a result as someone who also mends the checksum would."""
    path = run / "config.yaml"
    text = path.read_text().partition("\n")[2]
    for name, value in settings.items():
        for old in ("[^'].*", ".*"):  # first where it has a value: a setting of another group may have the same name
            changed, count = re.subn(rf"^(  {name}:) {old}$", rf"\1 {value}", text, flags=re.MULTILINE)
            if count:
                break
        assert count == 1, name
        text = changed
    path.write_text(f"{MARK}{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"steps": "4"}, None),  # stands in two groups: refused by its checksum
        ({"guidance": "3.0"}, r"pipeline\.guidance=1\.0, now pipeline\.guidance=3\.0"),
        ({"dtype": "bfloat16"}, r"pipeline\.dtype"),
        ({"negative_prompt": "ugly"}, r"pipeline\.negative_prompt"),
        ({"prompt_tokens": "30"}, r"pipeline\.prompt_tokens"),
        ({"kind": "ridge"}, r"probe\.kind"),
    ],
)
@pytest.mark.parametrize("use", ["predict", "early", "ensemble"])
def test_a_result_whose_settings_were_edited_is_refused_before_anything_is_written(run, use, settings, named, capsys):
    path = run[0] / "config.yaml"
    before = path.read_text()
    files = {file: file.stat().st_mtime_ns for file in run[0].parent.rglob("*") if file.is_file() and file != path}
    try:
        if named:
            edited(run[0], **settings)
        else:
            path.write_text(before.replace("steps: 3", "steps: 4"))
        assert probe.main([f"use={use}", f"run={run[0]}"]) == 2
    finally:
        path.write_text(before)
    said = capsys.readouterr().err
    assert re.search(named or r"config\.yaml is damaged, was edited", said) and said.count("\n") == 1, said
    now = {file: file.stat().st_mtime_ns for file in run[0].parent.rglob("*") if file.is_file() and file != path}
    assert now == files


@pytest.mark.slow
def test_a_grid_of_other_probes_is_refused(run, capsys):
    path = run[0] / "report" / "grid.nc"
    before = path.read_bytes()
    grid = Grid.load(run[0])
    try:
        other = json.dumps(grid.provenance | {"bank": "0" * 16})
        Grid(grid.dataset.assign_attrs(provenance=other)).save(path)
        assert probe.main(["use=predict", f"run={run[0]}"]) == 2
    finally:
        path.write_bytes(before)
    assert re.search(r"grid is of other probes \(0{16}\)", capsys.readouterr().err)


@pytest.mark.slow
def test_predict_refuses_what_does_not_fit(run, tmp_path, capsys):
    for settings, message in (
        ([f"run={run[0]}", "use.step=7"], r"use\.step=7.*\b0 to 2\b"),
        ([f"run={run[0]}", "use.layer=9"], r"use\.layer=9.*\b0 to 2\b"),
        ([f"run={tmp_path}"], rf"run={str(tmp_path)!r}.*config\.yaml"),
    ):
        assert probe.main(["use=predict", *settings]) == 2
        said = capsys.readouterr().err
        assert re.search(message, said) and said.count("\n") == 1, said


@pytest.mark.slow
def test_another_model_is_refused(model, run, capsys):
    settings = json.loads((run[0] / "probes" / "bank.json").read_text())["provenance"]["store"]
    weights = next((model / "transformer").glob("*.safetensors"))
    original = weights.read_bytes()
    changed = bytearray(original)
    changed[-3] ^= 1
    try:
        weights.write_bytes(changed)
        found = fingerprint(model)
        assert probe.main(["use=predict", f"run={run[0]}"]) == 2
    finally:
        weights.write_bytes(original)
    said = capsys.readouterr().err
    assert [part for part in found if found[part] != settings["model"][part]] == ["transformer"]
    assert re.search(f"{model}.*transformer.*{settings['model']['transformer']}.*{found['transformer']}", said), said
    assert "vae" not in said


@pytest.mark.slow
def test_a_folder_of_problems_gets_a_map_and_no_use_that_reads_videos(model, tmp_path):
    for number in range(62):
        write(tmp_path / "problems" / f"{number:03d}", number)
    given = ["task=folder", "task.label=parameters.answer", "task.boxes=2x2", "task.problems=58", "probe.kind=ridge"]

    def run(root):
        with undrawn():
            return within("train.py", *settings_of(model, tmp_path / "run", *given, f"task.root={tmp_path / root}"))

    result = run("problems")
    assert result.returncode == 0, result.stderr
    assert "answer: 3 classes of 62 problems" in result.stdout
    grid = Grid.load(tmp_path / "run")
    assert grid.targets == ("answer",) and np.isnan(grid.dataset.attrs["model_accuracy"])
    assert (grid.plane("answer").p_evidence > 0.05).all()  # the images are noise

    for use in ("early", "ensemble", "film", "lengths", "intervene"):
        refused = within("probe.py", f"use={use}", f"run={tmp_path / 'run'}")
        assert refused.returncode == 2 and "parser" in refused.stderr, use
    predicted = within("probe.py", "use=predict", "use.step=1", "use.problems=1", f"run={tmp_path / 'run'}")
    assert predicted.returncode == 0 and "full run" not in predicted.stdout.split("right")[0], predicted.stderr
    assert re.search(r"right: probe [01]\.00 of 1 problems.*task\.parser", predicted.stdout)

    (tmp_path / "problems").rename(tmp_path / "moved")
    again = run("moved")
    assert again.returncode == 0 and "has run to its end" in again.stdout
    write(tmp_path / "moved" / "007", 7, answer=2)
    changed = run("moved")
    assert changed.returncode == 2 and "verified" in changed.stderr


@pytest.mark.slow
def test_few_problems_are_cross_fitted_and_nothing_is_fitted_twice(model, tmp_path):
    for number in range(9):
        write(tmp_path / "problems" / f"{number:03d}", number)
    given = ["task=folder", "task.label=parameters.answer", "task.boxes=2x2", "task.problems=0", "probe.kind=ridge"]
    settings = settings_of(model, tmp_path / "run", *given, f"task.root={tmp_path / 'problems'}")

    refused = within("train.py", *settings)
    assert refused.returncode == 2 and re.search(r"of 9 problems.*split.*probe\.folds", refused.stderr)
    refused = within("train.py", *settings, "probe.folds=10")
    assert refused.returncode == 2 and re.search(r"probe\.folds=10: 9 problems", refused.stderr)
    assert not list((tmp_path / "run").glob("store/shard-*"))

    with undrawn():
        result = within("train.py", *settings, "probe.folds=3")
    assert result.returncode == 0, result.stderr
    assert "Cross-fitting: each of 3 folds" in " ".join(result.stdout.split())
    (folder,) = results(tmp_path / "run")
    assert "folds-3" in folder.name
    grid = Grid.load(folder)
    assert int(grid.dataset.n_test.sel(target="answer")) == 9
    banks = [load_probes(folder / "probes"), *(load_probes(folder / "probes" / f"fold-{k}") for k in (1, 2))]
    assert len({bank.fingerprint for bank in banks}) == 3 and [bank.provenance.fold for bank in banks] == [0, 1, 2]

    (folder / "report" / "finished.json").unlink()
    with undrawn():
        again = within("train.py", *settings, "probe.folds=3")
    assert again.returncode == 0
    assert (again.stdout.count("probes: those of this command"), again.stdout.count("inputs: computed")) == (3, 3)
    xr.testing.assert_identical(Grid.load(folder).dataset, grid.dataset)


@pytest.mark.slow
def test_a_projected_run_says_what_that_costs_and_refuses_what_needs_all_channels(model, tmp_path):
    train(model, tmp_path / "run", "probe.project=6", "probe.kind=ridge", "probe.random_weights=0")
    (folder,) = results(tmp_path / "run")
    grid = Grid.load(folder).dataset.sel(target="answer")
    change = grid.projection_kept - grid.projection_all
    assert -1 <= grid.projection_lower <= change <= grid.projection_upper <= 1
    text = (folder / "report" / "summary.md").read_text()
    assert re.search(rf"\| projection \| 6 minus 24 channels: {float(change):+.2f} \[", text)
    assert "probe.project=6" in text
    for edit in ("steer", "erase"):
        refused = within("probe.py", "use=intervene", f"use.edit={edit}", f"run={folder}")
        assert refused.returncode == 2 and re.search(rf"probe\.project=6: {edit}", refused.stderr)
