"""The processes a run is shared among: one per device, each running the same script."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy


@dataclass
class TrainerConfig:
    """Where fitting runs, in Lightning's words: accelerator, number of devices (processes), precision."""

    accelerator: str = "cpu"
    devices: int = 1
    precision: str = "32-true"

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise ValueError(f"trainer.devices={self.devices}: expected at least 1")


def launch(config: TrainerConfig) -> Fabric:
    """Starts one process per device, each of which runs the script from its top and returns from here.

    The trainer that fits the probes later finds the processes running and joins them.
    """
    strategy: Any = DDPStrategy(process_group_backend=backend(config)) if config.devices > 1 else "auto"
    fabric = Fabric(accelerator=config.accelerator, devices=config.devices, strategy=strategy)
    fabric.launch()
    return fabric


def backend(config: TrainerConfig) -> str | None:
    return "gloo" if config.accelerator == "cpu" else None
