"""All settings of a command: the root dataclasses."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from glob import glob
from typing import Any, ClassVar

from cosprobe.bounds import LARGEST_SEED, check_bounds
from cosprobe.config.pipeline import PipelineConfig
from cosprobe.config.plan import PlanConfig
from cosprobe.config.probe import ProbeConfig
from cosprobe.config.trainer import TrainerConfig
from cosprobe.config.uses import (
    BehaviourConfig,
    CompareConfig,
    EarlyConfig,
    EnsembleConfig,
    FilmConfig,
    InterveneConfig,
    LengthsConfig,
    PredictConfig,
    RunsConfig,
    TokensConfig,
)
from cosprobe.config.video_training import AdapterConfig, MiniConfig
from cosprobe.errors import InputError
from cosprobe.tasks import FAMILIES, FROM_DISK

MISSING: Any = "???"  # how OmegaConf marks a setting without a value


@dataclass
class ProbeExperiment:
    """Trains probes on a frozen pipeline. It has no settings of its own: the other groups hold them."""


# Groups whose options are different classes. Options of the other groups are different values of one class.
SCHEMAS: dict[str, dict[str, type]] = {
    "task": FAMILIES | FROM_DISK,
    "experiment": {"probes": ProbeExperiment, "mini": MiniConfig, "mini_small": MiniConfig, "lora": AdapterConfig},
    "use": {
        "predict": PredictConfig,
        "early": EarlyConfig,
        "ensemble": EnsembleConfig,
        "intervene": InterveneConfig,
        "behaviour": BehaviourConfig,
        "film": FilmConfig,
        "compare": CompareConfig,
        "tokens": TokensConfig,
        "lengths": LengthsConfig,
        "runs": RunsConfig,
    },
}


@dataclass
class TrainRun:
    """Settings of `train.py`."""

    entry: ClassVar[str] = "train"
    task: Any = MISSING  # a TaskConfig; OmegaConf does not support protocols as types
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    experiment: Any = MISSING
    plan: PlanConfig = field(default_factory=PlanConfig)
    run_dir: str = ""
    "The run folder; empty: `runs/<task>-<probe>`, or `runs/<task>-<experiment>` for another experiment than `probes`."
    store: str = ""
    "A folder of activations to read and to add to; empty: `store` in the run folder, or that of a run beside it."
    seed: int = 0
    "Base of the noise seeds and of all other randomness, 0 or more."

    def __post_init__(self) -> None:
        check_bounds("", self, seed=(0, LARGEST_SEED))
        if hasattr(self.task, "frames"):
            self.pipeline = self.pipeline.with_own_defaults(self.task.frames)
        self.run_dir, self.store = (os.path.expanduser(path) for path in (self.run_dir, self.store))


@dataclass
class UseRun:
    """Settings of `probe.py`."""

    entry: ClassVar[str] = "probe"
    use: Any = MISSING
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    run: str = MISSING
    "The folder of a finished `train.py` run, or of one of its results; with `use=runs`, a folder of run folders."
    runs: list[str] = field(default_factory=list)
    "Only for `use=compare`: two run folders or more; a name with `*` stands for all folders that it fits."
    seed: int = 0
    "Base of the noise seeds and of all other randomness, 0 or more."

    def __post_init__(self) -> None:
        check_bounds("", self, seed=(0, LARGEST_SEED))
        self.run = os.path.expanduser(self.run)
        compares = isinstance(self.use, CompareConfig)
        if self.runs and not compares:
            raise InputError(f"runs={self.runs}: only for use=compare; expected run=FOLDER")
        if compares:
            self.runs = expanded(self.runs)
            if len(self.runs) < 2 or len(set(self.runs)) < len(self.runs):
                given = f"run={self.run!r}, runs={self.runs}" if self.run else f"runs={self.runs}"
                raise InputError(f"{given}: use=compare expects two or more different folders, runs=[FIRST,SECOND]")


def expanded(names: list[str]) -> list[str]:
    """The folders that the names stand for, sorted for a name with `*`. Raises InputError for one that fits none."""
    found = []
    for name in map(os.path.expanduser, names):
        fitting = sorted(path for path in glob(name) if os.path.isdir(path)) if "*" in name else [name]
        if not fitting:
            raise InputError(f"runs={name!r}: fits no folder; expected run folders, such as runs/maze-*")
        found += fitting
    return found
