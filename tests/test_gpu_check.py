"""Every part of `make gpu-check` runs on a CPU, at a tiny size; nothing is said about speed."""

from __future__ import annotations

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks.gpu import __main__ as gpu_check
from benchmarks.gpu import agreement, device, fits, processes, width
from benchmarks.gpu.findings import Finding, check_page, machine, save, table, write_page
from cosprobe.config import KINDS
from tests.examples.processes import CONTEXT

TINY = width.Size(2, 12, 32, 8, 16, 5, 32, 48, matmul=32)
ABOUT = {"card": "H200", "torch": "2.13", "diffusers": "0.42.1"}
FOUND = [
    Finding("a ratio", "1.01", {"ratio": 1.01}),
    Finding("bits", "the same", {}, True),
    Finding("c", "3", {}, False),
]


@pytest.mark.slow
def test_features_of_both_devices_are_compared():
    close, same = agreement.measure("cpu", ["wan22_i2v", "ltx_t2v"])
    assert close.holds and same.holds
    assert close.numbers == {"gap float32": 0.0, "gap TF32": 0.0, "gap bfloat16": 0.0}
    assert same.numbers == {"pipelines": 2, "changed": 0}


def test_a_gap_is_relative_to_the_largest_value():
    assert agreement.gap(torch.tensor([1.0, -4.0]), torch.tensor([1.0, -3.0])) == 0.25


@pytest.mark.slow
def test_capture_halt_and_offloading_are_measured():
    step, memory, latents, halt, models, blocks = width.measure("cpu", TINY, repeats=1)
    assert step.numbers["ratio"] == pytest.approx(step.numbers["seconds captured"] / step.numbers["seconds bare"])
    assert step.numbers["seconds of the floor"] > 0
    assert halt.numbers["share of blocks"] == 5 / 16
    assert all(one.holds for one in (latents, halt, models, blocks))
    assert "peak" in memory.what


def test_the_tokens_are_those_of_wan22():
    assert (width.A14B.frames - 1) // 4 + 1 == 21
    assert (width.A14B.height // 16, width.A14B.width // 16) == (30, 52)
    assert width.A14B.heads * width.A14B.head == 5120


@pytest.mark.slow
def test_probes_of_both_devices_are_compared():
    sizes = {"train": 60, "validation": 30, "test": 30}
    found = fits.measure("cpu", cells=4, channels=80, sizes=sizes)
    assert [one.what.split()[0] for one in found] == [f"probe.kind={kind}" for kind in KINDS]
    for one in found:
        assert one.holds and one.numbers["equal cells"] == 4
        assert 0.6 < one.numbers["mean accuracy"] < 1


@pytest.mark.ddp
@pytest.mark.slow
def test_processes_exchange_probes_within_the_timeout_of_the_trainer():
    one, two = processes.measure("cpu", CONTEXT)
    assert one.holds and two.holds
    assert one.what.startswith("1 process,") and two.what.startswith("2 processes,")
    assert two.numbers["timeout"] == 1800


@pytest.mark.ddp
def test_a_process_that_fails_is_told():
    found = processes._group(CONTEXT, "no such backend", ["cpu"])
    assert found.holds is False and "no such backend" in found.result


def test_weights_are_cast_as_diffusers_does():
    model = width.build(TINY, "cpu").transformer
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert model.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert model.scale_shift_table.dtype == torch.float32


def test_convolutions_are_precise_for_a_while():
    before = torch.backends.cudnn.allow_tf32
    with device.full_precision():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before


def test_without_cuda_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    output = capsys.readouterr()
    assert re.fullmatch(r"error: .*CUDA.*\n", output.err) and not output.out


def test_a_page_without_its_comments_is_refused_before_anything_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    page = tmp_path / "support.md"
    for text in (None, "no table", "<!-- /gpu --><!-- gpu -->"):
        if text is not None:
            page.write_text(text)
        assert gpu_check.main([str(page)]) == 2
        assert re.fullmatch(r"error: .*support\.md.*\n", capsys.readouterr().err)


def test_the_table_replaces_what_stood_between_the_comments(tmp_path):
    page = tmp_path / "support.md"
    page.write_text("# Support\n\n<!-- gpu -->\nold\n<!-- /gpu -->\n\nEnd.\n")
    for _ in range(2):  # the second time, it is its own
        assert not check_page(page)
        write_page(FOUND, ABOUT, page)
    assert page.read_text() == (
        "# Support\n\n<!-- gpu -->\nMeasured on one H200, torch 2.13, diffusers 0.42.1.\n\n| check | result | holds |\n"
        "|---|---|---|\n| a ratio | 1.01 |  |\n| bits | the same | yes |\n| c | 3 | NO |\n<!-- /gpu -->\n\nEnd.\n"
    )


def test_numbers_are_kept_and_shown(tmp_path):
    save(FOUND, machine("cpu"), tmp_path / "runs" / "numbers.json")
    saved = json.loads((tmp_path / "runs" / "numbers.json").read_text())
    assert saved["torch"] == torch.__version__ and saved["findings"][0]["numbers"] == {"ratio": 1.01}
    with (console := Console(width=100)).capture() as printed:
        console.print(table(FOUND, ABOUT))
    assert "H200" in printed.get() and "NO" in printed.get()


def test_a_part_that_fails_is_a_row_and_the_others_run(monkeypatch, tmp_path, capsys):
    def fails(name):
        raise RuntimeError("out of paper")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "machine", lambda name: ABOUT)
    monkeypatch.setattr(gpu_check, "TESTS", ["echo", "3 passed in 1.0s"])
    for name, measure in (("one", fails), ("two", lambda name: FOUND[:2])):
        monkeypatch.setitem(sys.modules, f"benchmarks.gpu.{name}", SimpleNamespace(measure=measure))
    for parts, status in ((("one", "two"), 1), (("two",), 0)):
        monkeypatch.setattr(gpu_check, "PARTS", parts)
        assert gpu_check.main([]) == status
        rows = json.loads(gpu_check.NUMBERS.read_text())["findings"]
        assert rows[0]["result"] == "3 passed in 1.0s"
        assert [row["what"] for row in rows[-2:]] == ["a ratio", "bits"]
    assert "out of paper" in capsys.readouterr().out
