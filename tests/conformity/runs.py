"""One family end to end, from the command line: train.py, and every use of the trained probes."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import probe
import train
from cosprobe.ensembles.comparison import SIZES
from tests.examples.families import FAMILIES
from tests.examples.probe_tiny import TINY
from tests.examples.shapes import unchecked

STEPS = 3
USES = {
    "predict": ["use.step=1", "use.problems=2"],
    "early": ["use.calibration=59", "use.problems=2", "use.error_reference=truth"],
    "ensemble": [],
}


def size_of(name: str) -> list[str]:
    """Settings of images and frames that the toy model takes. The images of tasks have 64 pixels."""
    frames = FAMILIES[name].frames
    if name == "allegro":
        return ["task.image_size=128", f"pipeline.frames={frames}", "task.frames=13"]
    margin = ["pipeline.height=64", "pipeline.width=96"]
    return [f"pipeline.frames={frames}", f"task.frames={min(frames, 13)}", *margin]


def end_to_end(name: str, folder: Path) -> dict[str, str]:
    """Runs every command, and returns what each of them printed. Raises RuntimeError for one that fails."""
    example = FAMILIES[name]
    example.build().save_pretrained(folder / "model")
    given = [
        "probe=layers", f"pipeline.path={folder / 'model'}", f"pipeline.steps={STEPS}", "pipeline.guidance=1",
        f"pipeline.prompt_tokens={example.call['max_sequence_length']}", "pipeline.batch=8", "task.problems=64",
        "probe.epochs=5", "trainer=cpu", *size_of(name), f"run_dir={folder / 'run'}",
    ]  # fmt: skip
    said = {"train": _said(train.main, given)}
    for use, settings in USES.items():
        said[use] = _said(probe.main, [f"use={use}", f"run={folder / 'run'}", "trainer=cpu", *settings])
    return said


def _said(main, arguments: list[str]) -> str:
    before, SIZES["quick"] = SIZES["quick"], TINY
    try:
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err, unchecked():
            code = main(arguments)
    finally:
        SIZES["quick"] = before
    if code:
        raise RuntimeError(f"{' '.join(arguments)} ended with {code}: {err.getvalue().strip()[-400:]}")
    return out.getvalue() + err.getvalue()
