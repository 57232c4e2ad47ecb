"""What a killed fit and killed trainings leave on disk, and how they end when they go on."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from cosprobe.minimodel import flow_matching, recipe
from cosprobe.probes import checkpoints
from tests.probes.ddp_fit import kill_before
from tests.torture.world import World, content, run

EXPERIMENTS = ("mini_small", "lora")
TRAINING = [  # settings of a training of a second
    *(
        "experiment.families=[maze]",
        "experiment.clips=[8]",
        "experiment.flow.stages=[[5,4]]",
        "experiment.flow.batch=2",
    ),
    "experiment.flow.compile=false",
]
MINI = [*("experiment.layers=1", "experiment.heads=1", "experiment.card=[1,0,1]"), "experiment.solve_every=1000"]


@dataclass(frozen=True)
class Killed:
    """A command that was killed. left: a copy of its folder. found: what is in the folder when it has gone on."""

    command: tuple[str, ...]
    left: Path
    found: Any

    def again(self, folder: Path) -> list[str]:
        """The command for a copy of its folder."""
        return [*self.command, f"run_dir={folder}"]


def make(world: World) -> None:
    """Makes all of them, once."""
    fit(world), [training(world, name) for name in EXPERIMENTS]


@cache
def fit(world: World) -> Killed:
    """A fit in its second chunk of cells: the first is finished, and the second has a checkpoint."""
    command = [part for part in world.train(Path("x"), "probe.memory=1e-3") if not part.startswith("run_dir=")]
    return _killed(world, "fit", command, _kill_fit)


@cache
def training(world: World, experiment: str) -> Killed:
    """The training of a model (`mini_small`) or of adapters (`lora`), with a checkpoint after each step."""
    small = MINI if experiment == "mini_small" else ["experiment.card=1", f"pipeline.path={world.model}"]
    command = ["train", f"experiment={experiment}", *TRAINING, *small, "task.frames=5", "pipeline.frames=5"]
    return _killed(world, experiment, command, _kill_training)


def found(folder: Path) -> Any:
    """What a fit or a training has made."""
    if any(folder.glob("store")):
        return content(folder)
    return {
        str(path.relative_to(folder)): load_file(path)
        for name in ("pipeline", "adapter")
        for path in sorted((folder / name).rglob("*.safetensors"))
    }


def other(one: Any, two: Any) -> list[str]:
    """The files of two trainings that differ by more than rounding."""
    return [
        name
        for name in sorted({*one, *two})
        if not (name in one and name in two and one[name].keys() == two[name].keys())
        or not all(torch.allclose(values, two[name][key], atol=1e-3) for key, values in one[name].items())
    ]


def _killed(world: World, name: str, command: Sequence[str], before: Any) -> Killed:
    folder = world.place(f"left-{name}")
    killed = Killed(tuple(command), folder, None)
    ended = run(killed.again(folder), world.root / "log", before=before)
    if ended.code != -signal.SIGKILL or not list(folder.rglob("*.ckpt")):
        raise RuntimeError(f"{name}: expected a kill with a checkpoint, got {ended.code}:\n{ended.said[-2000:]}")
    whole = world.copy(f"whole-{name}", folder)
    ended = run(killed.again(whole), world.root / "log")
    if ended.code != 0:
        raise RuntimeError(f"{name} ended with {ended.code}:\n{ended.said[-2000:]}")
    return Killed(tuple(command), folder, found(whole))


def save_often() -> None:
    """Has checkpoints written after every epoch of a fit, and after every step of a training."""
    checkpoints.INTERVAL = 0.0
    recipe.ModelCheckpoint = _every_step


def _kill_fit() -> None:
    save_often()
    kill_before(6)  # of 3 epochs of one step, in each chunk


def _kill_training() -> None:
    save_often()
    step, made = flow_matching.FlowMatching.training_step, iter(range(2))

    def counted(*args: Any) -> None:
        if next(made, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        step(*args)

    flow_matching.FlowMatching.training_step = counted


def _every_step(*args: Any, **given: Any) -> ModelCheckpoint:
    return ModelCheckpoint(*args, **(given | {"every_n_train_steps": 1}))
