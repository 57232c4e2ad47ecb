"""Settings of a plan: what a run would need."""

from __future__ import annotations

from dataclasses import dataclass

from cosprobe.bounds import check_bounds


@dataclass
class PlanConfig:
    """What is printed instead of a run. Raises InputError for a value out of range."""

    only: bool = False
    "Print what the run would need, and stop; `plan=true` is short for it. No weights of the model are needed."
    flops_per_second: float = 0.0
    "Operations per second of one device, for the hours; 0: from one step, where the weights are on this machine."

    def __post_init__(self) -> None:
        check_bounds("plan.", self, flops_per_second=(0, 1e24))
