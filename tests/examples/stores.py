"""Stores of activations in a folder, collected as `train.py` does it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cosprobe.activations.collection import StoredSamples, StoreSettings, collect, find_store
from cosprobe.activations.sampler import Sampler
from cosprobe.monitoring import ResourceMonitor
from cosprobe.tasks.samples import Sample


def collected(
    sampler: Sampler,
    drawn: Sequence[Sample],
    settings: StoreSettings,
    run_dir: Path,
    monitor: ResourceMonitor | None = None,
    named: str = "",
) -> StoredSamples:
    """The samples in the store of a run folder, or in one beside it."""
    store = find_store(settings, sampler.depth, run_dir / "store", named)
    return collect(sampler, lambda: drawn, settings, store, monitor)
