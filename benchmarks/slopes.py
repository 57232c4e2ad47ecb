"""How bytes, seconds and peak memory grow with samples, steps, layers and width: each is doubled, one at a time.

A slope is the logarithm of the ratio to the base, divided by that of 2: 0 does not grow, 1 grows linearly, 2 with the
square. Sampling: activations of problems are collected with a transformer of random weights, in the pipeline of the
package; its depth and number of heads are doubled, and all layers and steps are kept. Fitting: probes are fitted
and evaluated on the synthetic stores of `benchmarks.scaling`. Each measurement is made in a process of its own, and its
peak is the largest resident memory minus that after all imports. It has one thread, so that other load on the machine
changes little. The sizes take turns, and medians are printed. At the base, one chunk of `probe.memory` is full.
This benchmark alone: `python -m benchmarks.slopes`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from math import log2
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from diffusers import DiffusionPipeline
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import scaling
from benchmarks.scaling import Size
from cosprobe.activations import Sampler, StoreSettings, collect, find_store
from cosprobe.command import keep_freed_memory, load
from cosprobe.config import TrainRun
from cosprobe.models import load_pipeline
from cosprobe.runs import STORE
from cosprobe.tasks import draw_samples

ROUNDS = 3
DOUBLED = {"samples": "samples", "steps": "steps", "layers": "layers", "width": "channels"}  # fields of Size
SAMPLING, FITTING = Size(32, 5, 8, 128), Size(600, 10, 8, 128)
QUIET = (
    *("probe=layers", "probe.steps=all", "probe.layers=all", "probe.random_weights=0"),
    *("trainer.accelerator=cpu", "trainer.enable_progress_bar=false"),
)


@dataclass(frozen=True)
class Cost:
    """Bytes on disk, seconds, and bytes of peak memory above imports."""

    stored: float
    seconds: float
    peak: float

    @classmethod
    def middle(cls, costs: list[Cost]) -> Cost:
        """The median of each."""
        return cls(*(median(values) for values in zip(*((c.stored, c.seconds, c.peak) for c in costs), strict=True)))

    def slopes(self, base: Cost) -> tuple[float, float, float]:
        """How each has grown from the base, whose size was doubled."""
        pairs = ((self.stored, base.stored), (self.seconds, base.seconds), (self.peak, base.peak))
        bytes_, seconds, peak = (log2(doubled / one) for doubled, one in pairs)
        return bytes_, seconds, peak


def points(base: Size) -> dict[str, Size]:
    """The base, and the sizes with one number doubled, by its name."""
    doubled = {name: replace(base, **{field: 2 * getattr(base, field)}) for name, field in DOUBLED.items()}
    return {"base": base} | doubled


def sampling(size: Size) -> Cost:
    """Collects activations, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=collect_once, args=(size, [], sender))
    process.start()
    sender.close()
    stored, seconds, peak = receiver.recv()
    process.join()
    return Cost(stored, seconds, peak)


def collect_once(size: Size, settings: list[str], connection: Connection) -> None:
    """Collects the activations of a model of this size, with one thread. Sends bytes of the store, seconds, and bytes
    of the peak."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as the commands do
    before = scaling.peak_memory()
    run = load(TrainRun, [*QUIET, f"task.problems={size.samples}", f"pipeline.steps={size.steps}", *settings])
    task, model = run.task.build(), of_size(load_pipeline(run.pipeline), size)
    sampler = Sampler(model, run.pipeline, task, run.trainer)
    described = StoreSettings.of(run.pipeline, run.task, run.probe, run.seed)
    drawn = draw_samples(task, run.task, run.seed)
    with TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        store = find_store(described, sampler.depth, Path(folder) / "run" / STORE)
        begin = perf_counter()
        collect(sampler, lambda: drawn, described, store)
        seconds = perf_counter() - begin
        connection.send((store.size(), seconds, scaling.peak_memory() - before))


def of_size(pipeline: DiffusionPipeline, size: Size) -> DiffusionPipeline:
    """The pipeline with a transformer of random weights that has so many layers and channels.

    The width of its feed-forward layers grows with the channels.
    """
    config: dict[str, Any] = dict(pipeline.transformer.config)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    changed = {
        "num_layers": size.layers,
        "num_attention_heads": size.channels // config["attention_head_dim"],
        "ffn_dim": config["ffn_dim"] * size.channels // width,
    }
    other = type(pipeline.transformer).from_config(config | changed)
    pipeline.register_modules(transformer=other.eval().requires_grad_(False))
    return pipeline


def fitting(size: Size) -> Cost:
    """Fits and evaluates probes of a synthetic store, in a process of its own."""
    stored, peak, seconds = scaling.measure(size, fit_once)
    return Cost(stored, seconds, peak)


def fit_once(*given: Any) -> None:
    """`scaling.run`, with one thread."""
    torch.set_num_threads(1)
    scaling.run(*given)


def measure(what: Callable[[Size], Cost], base: Size, rounds: int = ROUNDS) -> dict[str, Cost]:
    """The cost of the base and of every doubled size, by name. The sizes take turns, `rounds` times."""
    found: dict[str, list[Cost]] = {name: [] for name in points(base)}
    for _ in range(rounds):
        for name, size in points(base).items():
            found[name].append(what(size))
    return {name: Cost.middle(costs) for name, costs in found.items()}


def table(title: str, costs: dict[str, Cost]) -> Table:
    """A row with the numbers of the base, and a row of slopes for each number that was doubled."""
    found = Table(title, "bytes", "seconds", "peak above imports", box=box.SIMPLE_HEAD)
    base = costs["base"]
    found.add_row("base", f"{base.stored / 1e6:.0f} MB", f"{base.seconds:.1f}", f"{base.peak / 1e6:.0f} MB")
    for name in DOUBLED:
        found.add_row(f"slope of {name}", *(f"{slope:.2f}" for slope in costs[name].slopes(base)))
    return found


def main() -> int:
    """Measures all sizes and prints the tables. Returns the exit status."""
    for name, what, base in (("sampling", sampling, SAMPLING), ("fitting", fitting, FITTING)):
        size = f"{base.samples} samples, {base.steps} steps, {base.layers} layers, {base.channels} channels"
        Console(width=140).print(table(f"{name} ({size})", measure(what, base)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
