"""Command line: `python -m benchmarks.gpu [PAGE]`. It needs CUDA. PAGE: a page of the docs that gets the table."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.gpu.findings import Finding, check_page, machine, save, table, write_page

NUMBERS = Path("runs") / "gpu-check.json"
TESTS = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
LONGEST = 150  # seconds of the tests
PARTS = ("agreement", "width", "fits", "processes")  # modules; imported when there is a GPU


def main(arguments: Sequence[str]) -> int:
    """Runs the tests and all parts. Returns the exit status: 1 if anything does not hold, 2 if nothing could be run."""
    page = Path(arguments[0]) if arguments else None
    refused = "" if torch.cuda.is_available() else "torch sees no GPU with CUDA; expected one"
    refused = refused or ("" if page is None else check_page(page))
    if refused:
        Console(stderr=True).print(f"error: {refused}", highlight=False, soft_wrap=True)
        return 2
    findings, about = [tests()], machine("cuda")
    for name in PARTS:
        findings += measured(name, "cuda")
        save(findings, about, NUMBERS)  # what was measured is kept if a later part ends the process
    Console().print(table(findings, about))
    if page is not None:
        write_page(findings, about, page)
    return int(any(one.holds is False for one in findings))


def tests() -> Finding:
    """The tests that need a GPU, in a process of their own."""
    try:
        ended = subprocess.run(TESTS, stdout=subprocess.PIPE, text=True, timeout=LONGEST)
        output, code = ended.stdout, ended.returncode
    except subprocess.TimeoutExpired as late:
        output, code = f"{late.output or ''}\nnot ended after {LONGEST} s", 1
    Console().print(output, markup=False, highlight=False, soft_wrap=True)
    last = (output.strip() or "no output").splitlines()[-1].strip("= ")
    return Finding("tests marked `gpu`", last, {"exit status": code}, code == 0)


def measured(name: str, device: str) -> list[Finding]:
    """The rows of a part. An error is a row, so that the other parts still run."""
    begin = time.perf_counter()
    try:
        found: list[Finding] = import_module(f"benchmarks.gpu.{name}").measure(device)
    except Exception as error:  # whatever it is
        Console().print_exception()
        found = [Finding(name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", {}, False)]
    Console().print(f"{name}: {time.perf_counter() - begin:.0f} s", highlight=False)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
