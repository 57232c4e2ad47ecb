"""The folder of a result with everything that a page shows, made from predictions whose accuracies are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from cosprobe.command import load, save_config
from cosprobe.config import TrainRun
from cosprobe.evaluation import Grid, build_grid
from cosprobe.evaluation.checks.suite import Checks
from cosprobe.files import write_json
from cosprobe.reporting import write_report
from cosprobe.runs import mark_finished
from tests.examples.films import film
from tests.examples.grids import ANSWER, CONTROL, MODEL_ANSWER, START, synthetic

NOTHING = Checks({}, (), (), (), {}, None, ())
SCRIPT = "<script>alert(1)</script>"
USES = ("behaviour", "behaviour-64problems", "causal-noise", "early", "ensemble", "film", "lengths", "tokens")
COMMAND = "python train.py run_dir=runs/example"
HOLDS = {
    "claim": "Noise hurts `early`", "measure": f"share {SCRIPT}", "control": "fresh", "value": 0.3, "lower": 0.1,
    "upper": 0.5, "verdict": "holds",
}  # fmt: skip
UNKNOWN = HOLDS | {
    "claim": "Noise hurts late",
    "value": None,
    "lower": None,
    "upper": None,
    "verdict": "untested",
}


def grid(samples: int = 120, positions: tuple[str, ...] = ("all", "0", "1")) -> Grid:
    """Two steps of three layers, with several positions. Two cells are above x0-hat."""
    evaluated = synthetic(4, 5, samples, positions=positions, targets=(ANSWER, MODEL_ANSWER, START, CONTROL))
    made = build_grid(evaluated, draws=100, provenance={"bank": "abc", "probe": {"kind": "logistic"}}).dataset
    made.p_x0.loc[{"target": "answer"}] = 1.0
    made.p_x0.loc[{"target": "answer", "step": [2, 3], "layer": 3}] = 0.01
    return Grid(made.assign_coords(not_measured=("target", [""] * made.sizes["target"])))


def result(folder: Path, of: Grid | None = None) -> Path:
    """Writes the result and returns its folder. Its name and prompts would be scripts, if they were not escaped."""
    run = load(TrainRun, ["task=maze", f"run_dir={folder.parent}"])
    run = replace(run, pipeline=replace(run.pipeline, name=SCRIPT))
    save_config(run, folder, {"transformer": "0123"})
    write_report(of or grid(), NOTHING, folder, film())
    report = folder / "report"
    for name in USES:
        (report / name).mkdir()
    both = {"claims": [HOLDS, UNKNOWN]}
    listed = [one | {"about": "one_exit: exploration", "n": 90} for one in both["claims"]]
    sentences = {"exploration": [f"x0-hat draws two {SCRIPT}.", "It is a mean."]}
    groups = [{"kind": "one_exit", "about": "length at most 3", "n": 40, "shares": {"committed": [0.5, 0.25, 0.75]}}]
    write_json(report / "behaviour" / "behaviour.json", {"claims": [], "sentences": {}})
    content = {"claims": listed, "sentences": sentences, "groups": groups}
    write_json(report / "behaviour-64problems" / "behaviour.json", content)
    settings = [{"setting": "9 frames, 20 steps", "right": [0.6, 0.5, 0.7]}]
    lengths = {"about": "one_exit: lengths", "n": 64, "settings": settings} | both
    write_json(report / "lengths" / "lengths.json", lengths)
    for picture in ("lengths/lengths.png", "tokens/maze_1_energy.png", "path.png"):
        _picture(report / picture)
    texts = {
        "remarks": ["Noise replaces it.", "23 samples."],
        "conditions": [["condition", "kept"], ["a", "b"]],
    }
    about = {"edit": "noise", "about": "one_exit: noise", "n": 23, "problems": 23}
    write_json(report / "causal-noise" / "claims.json", about | both | texts)
    _picture(report / "causal-noise" / "noise.png")
    kind = {
        "result": {"compute": 0.125, "risk": 0.05, "interval": [0.0, 0.25], "samples": 20},
        "tables": {"stopping rules": [["rule", "compute"], ["calibrated policy", "0.125"]]},
        "remarks": ["The policy is safe."],
    }
    write_json(report / "early" / "early.json", {"kinds": {"one_exit": kind}})
    _picture(report / "early" / "frontier.png")
    right = {"mean": 0.9, "lower": 0.8, "upper": 0.95}
    tables = {"At equal compute": [["strategy", "right"], ["vote", "0.91"]]}
    found = {"one_run": {"right": right}, "test_problems": 32, "tables": tables, "remarks": ["Vote is not better."]}
    write_json(report / "ensemble" / "ensemble.json", found)
    _picture(report / "film" / "maze.png")
    frames = [Image.fromarray(np.full((60, 90, 3), shade, dtype=np.uint8)) for shade in (0, 120, 240)]
    frames[0].save(report / "film" / "maze.gif", save_all=True, append_images=frames[1:], duration=300, loop=0)
    told = {"prompt": f"draw {SCRIPT}", "steps": [0, 1], "probabilities": [[0.75, 0.25], [0.1, 0.9]], "right": [1]}
    write_json(report / "film" / "maze.json", told)
    for name in USES:
        mark_finished(report / name, "abc", made_by=f"python probe.py use={name}")
    return folder


def _picture(path: Path) -> None:
    Image.fromarray(np.full((400, 800, 3), 200, dtype=np.uint8)).save(path)
