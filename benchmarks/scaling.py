"""Peak memory and seconds of fitting and evaluating probes, on synthetic stores of growing size.

Each size runs in a process of its own. Its peak is the largest resident memory, minus that after all imports. `store`
is the size of the features and inputs on disk, `chunk` the setting probe.memory. `floor` is what no solver of this kind
can avoid: for every cell and form of target, the product of the rows with themselves (Gram matrix, or covariance if
there are more rows than columns), 2 n d min(n, d) operations, at the rate of a large matrix product on this machine.
This benchmark alone: `python -m benchmarks.scaling [NAME ...]`.
"""

from __future__ import annotations

import multiprocessing
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.fitting import synthetic, whole_fit
from cosprobe.activations import ActivationStore, InputFeatures, StoredTensor
from cosprobe.cells import EMBED, NOISE, Cell
from cosprobe.command import keep_freed_memory
from cosprobe.config import ProbeConfig
from cosprobe.evaluation import build_grid, evaluate, read_inputs

SHARD = 16  # samples of a shard, as in the demo
SHARES = {"train": 0.5, "validation": 0.2, "test": 0.3}


@dataclass(frozen=True)
class Size:
    """A synthetic run. inputs: whether it has inputs, of the shapes of the demo."""

    samples: int
    steps: int
    layers: int
    channels: int
    inputs: bool = True
    kind: str = "logistic"
    dtype: torch.dtype = torch.float32

    @property
    def sizes(self) -> dict[str, int]:
        """Number of samples by split."""
        return {split: round(share * self.samples) for split, share in SHARES.items()}


SIZES = {
    "600 samples of the demo": Size(600, 20, 8, 128),
    "6,000 samples of the demo": Size(6000, 20, 8, 128),
    "600 samples, ridge": Size(600, 20, 8, 128, kind="ridge"),
    "6,000 samples, ridge": Size(6000, 20, 8, 128, kind="ridge"),
    "300 samples, 40 cells, 5,120 channels, bf16": Size(300, 1, 40, 5120, inputs=False, dtype=torch.bfloat16),
    "300 samples, 40 cells, 5,120 channels, bf16, ridge": Size(
        300, 1, 40, 5120, inputs=False, kind="ridge", dtype=torch.bfloat16
    ),
}


def write(size: Size, folder: Path) -> ActivationStore:
    """Writes a store of noise, shard by shard."""
    store = ActivationStore(folder, {"synthetic": str(size)})
    store.begin(0)
    names = [str(i) for i in range(sum(size.sizes.values()))]
    for start in range(0, len(names), SHARD):
        part, generator = names[start : start + SHARD], torch.Generator().manual_seed(start)
        shapes: dict[str, tuple[int, ...]] = {"features": (size.steps * size.layers, 4, size.channels)}
        if size.inputs:
            shapes |= {f"{NOISE}.region": (1, 4, 4, 12), f"{NOISE}.whole": (1, 4, 16, 12)}
            shapes |= {f"{EMBED}.{name}": (size.steps, 4, 4, size.channels) for name in ("region", "whole")}
        tensors = {n: torch.randn(len(part), *shape, generator=generator).to(size.dtype) for n, shape in shapes.items()}
        store.write({"": part}, tensors, {})
    store.finish(names)
    return store


def run(size: Size, folder: Path, connection: multiprocessing.connection.Connection) -> None:
    """Fits and evaluates the probes of a store. Sends the peak memory in bytes, and the seconds."""
    keep_freed_memory()  # as the commands do
    before = peak_memory()
    begin = perf_counter()
    tensors, _ = ActivationStore.open(folder).tensors()
    few = synthetic(size.sizes, 1, 1, 2)  # labels and splits
    split = np.random.default_rng(0).permutation(few.split)  # every shard has samples of all splits, as in a run
    samples = replace(few, features=tensors["features"], cells=_cells(size), split=split)
    config = ProbeConfig(kind=size.kind)
    bank = whole_fit(samples, config)
    readings = read_inputs(samples, _inputs(tensors), size.kind, config.penalties) if size.inputs else {}
    build_grid(evaluate(samples, ["only"] * size.steps, bank, readings), draws=100)
    connection.send((peak_memory() - before, perf_counter() - begin))


def _cells(size: Size) -> tuple[Cell, ...]:
    return synthetic({"train": 1}, size.steps, size.layers, 2).cells


def _inputs(tensors: dict[str, StoredTensor]) -> dict[str, InputFeatures]:
    return {name: InputFeatures(tensors[f"{name}.whole"], tensors[f"{name}.region"]) for name in (NOISE, EMBED)}


def floor(size: Size) -> float:
    """Seconds of the products of the training rows of all cells with themselves."""
    train, each = size.sizes["train"], 0.0
    for rows, width in ((4 * train, size.channels), (4 * train, size.channels), (train, 4 * size.channels)):
        each += 2.0 * rows * width * min(rows, width)
    return size.steps * size.layers * each / matmul_rate()


def matmul_rate() -> float:
    """Operations per second of a product of large matrices in fp32."""
    one = torch.randn(2048, 2048)
    seconds = []
    for _ in range(5):
        begin = perf_counter()
        one @ one
        seconds.append(perf_counter() - begin)
    return 2.0 * 2048**3 / min(seconds)


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes. `getrusage` would include that of the process that has
    started it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]


def measure(size: Size, within: Callable[..., None] = run) -> tuple[int, int, float]:
    """Bytes of the store, peak memory above imports in bytes, and seconds. within: called in the process, as `run`."""
    context = multiprocessing.get_context("spawn")
    with TemporaryDirectory() as folder:
        store = write(size, Path(folder) / "store")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=within, args=(size, store.folder, sender))
        process.start()
        sender.close()
        peak, seconds = receiver.recv()
        process.join()
        return store.size(), peak, seconds


def main(names: Sequence[str]) -> int:
    """Runs the sizes whose name holds one of `names` (default: all) and prints the table. Returns the exit status."""
    found = Table("run", "store", "chunk", "peak above imports", "seconds", "floor", box=box.SIMPLE_HEAD)
    for name, size in SIZES.items():
        if not names or any(part in name for part in names):
            stored, peak, seconds = measure(size)
            gigabytes = (f"{value / 1e9:.2f} GB" for value in (stored, ProbeConfig().memory * 1e9, peak))
            found.add_row(name, *gigabytes, f"{seconds:.0f}", f"{floor(size):.1f}")
    Console(width=140).print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
