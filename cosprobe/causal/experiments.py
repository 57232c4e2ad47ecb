"""The experiments: which edits are made, with which controls, and what they need.

Every experiment lists `Condition`s. A condition is a few edits with the coordinates of its cell. What is measured is
the same for all: whether the finished video shows the label that the condition is about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from concept_erasure import LeaceEraser
from jaxtyping import Float, Int
from torch import Tensor

from cosprobe.activations import ProbeSamples
from cosprobe.causal.clean import NONE, CleanRun, random_states, taken_from
from cosprobe.causal.directions import (
    Matched,
    concept_erasers,
    on_device,
    probe_directions,
    random_directions,
    random_erasers,
)
from cosprobe.causal.edits import ABLATIONS, Edit
from cosprobe.causal.patching import At, Eraser
from cosprobe.cells import Cell
from cosprobe.probes import ProbeBank
from cosprobe.tasks import Region, Task

LARGE = 10**9
OTHER, SAME = "donor", "donor with the same answer"
RANDOM, LATER = "random state", "donor at another step"
PROBE, CONTROL = "direction of the probe", "direction of the control target"


@dataclass(frozen=True)
class Condition:
    """One way to change the runs.

    name: what is done, such as `swap` or the name of a control. edits: carried out together. step, layer, frame: the
    cell, -1 where there is none. dose: amount of steering. draw: number of a random direction. steps: number of sampler
    steps of the run, 0 for that of the settings.
    """

    name: str
    edits: tuple[Edit, ...]
    step: int = NONE
    layer: int = NONE
    frame: int = NONE
    dose: float = math.nan
    draw: int = NONE
    steps: int = 0

    @property
    def first(self) -> int:
        """The first step that is changed (a step index); all steps before it are those of the clean run."""
        return min(min(edit.steps, default=0) for edit in self.edits)

    @property
    def coordinates(self) -> dict[str, Any]:
        """Everything but the edits, for tables."""
        return {name: value for name, value in asdict(self).items() if name != "edits"}


@dataclass(frozen=True)
class Needed:
    """What `patch` needs besides the edits: its arguments of the same names."""

    sources: Mapping[str, Any] = field(default_factory=dict)
    boxes: Sequence[Sequence[Region]] = ()


class Experiment(Protocol):
    """Conditions, what each needs, and the label that it is about."""

    def conditions(self) -> list[Condition]:
        """All conditions."""
        ...

    def needed(self, run: CleanRun, condition: Condition) -> Needed:
        """What the edits of a condition need, for one batch."""
        ...

    def labels(self, run: CleanRun) -> Int[Tensor, " sample"]:
        """For every sample, the answer whose frequency is measured; NONE: the sample is left out."""
        ...


@dataclass(frozen=True)
class Noise:
    """Noise at a step, and noise at a frame, with controls. The label is the answer of the clean run.

    fresh: the latent, or one frame of it in every step, is replaced by Gaussian noise, as in arXiv 2603.16870, section
    3.2. `equal damage`: the same, but the squared norm of all changes of a run is `damage`, one per step of a frame.
    `renoised`: the run's own x0-hat, with fresh noise of the level of the step. `R evaluations left`: the hit is made
    where `left` evaluations of the transformer follow it, in runs of other numbers of steps; for a frame, in every step
    up to there.
    steps: step indices that are hit. total: number of steps of a run. frames: those of the token grid that are hit.
    damage: squared norm of the changes. lengths: numbers of steps of the runs with `left` evaluations after the hit.
    """

    steps: Sequence[int]
    total: int
    frames: Sequence[int]
    damage: float
    left: int
    lengths: Sequence[int]

    def conditions(self) -> list[Condition]:
        found = []
        for step in self.steps:
            fresh = Edit("noise", "fresh", (step,))
            found.append(Condition("fresh", (fresh,), step))
            found.append(Condition("equal damage", (Edit("noise", "damage", (step,), amount=self.damage),), step))
            if step:
                found.append(Condition("renoised", (Edit("noise", "renoised", (step,)),), step))
        for length in self.lengths:
            hit = length - self.left
            name = f"{self.left} evaluations left"
            found.append(Condition(name, (Edit("noise", "fresh", (hit,)),), hit, steps=length))
        later, each = tuple(range(1, self.total)), self.damage / self.total
        for frame in self.frames:
            of_frame: dict[str, Any] = {"frames": (frame,)}
            every = tuple(range(self.total))
            found.append(Condition("fresh", (Edit("noise", "fresh", every, **of_frame),), frame=frame))
            hit_less = Edit("noise", "damage", every, amount=each, **of_frame)
            found.append(Condition("equal damage", (hit_less,), frame=frame))
            if later:
                found.append(Condition("renoised", (Edit("noise", "renoised", later, **of_frame),), frame=frame))
            early = tuple(range(self.total - self.left + 1))
            name = f"{self.left} evaluations left"
            found.append(Condition(name, (Edit("noise", "fresh", early, **of_frame),), frame=frame))
        return found

    def needed(self, run: CleanRun, condition: Condition) -> Needed:
        return Needed()

    def labels(self, run: CleanRun) -> Int[Tensor, " sample"]:
        return run.answers


@dataclass(frozen=True)
class Swap:
    """The hidden state of one layer and step, from a donor run, with controls. The label is the answer of the donor.

    The state of every token of a block output is replaced, in every guidance branch. Controls: a donor whose answer is
    that of the host; a random state whose tokens have the norms of the donor's; the donor's state of another step. If
    answers are regions: only the tokens of the regions of both answers, and of as many other regions. And only the
    tokens of the last frame.
    steps, layers: the plane. total: number of steps of a run. frames: of the token grid. regions: whether answers are
    regions, and there are enough of them for a wrong region. whole: also swap each layer at all steps.
    """

    steps: Sequence[int]
    layers: Sequence[int]
    total: int
    frames: int
    regions: bool
    seed: int = 0
    whole: bool = False

    def conditions(self) -> list[Condition]:
        found = []
        for step in self.steps:
            for layer in self.layers:
                at: dict[str, Any] = {"steps": (step,), "layers": (layer,)}
                sources = {"swap": OTHER, "same answer": SAME, "random state": RANDOM}
                for name, source in (sources | ({"wrong step": LATER} if self.total > 1 else {})).items():
                    found.append(Condition(name, (Edit("swap", source=source, **at),), step, layer))
                if self.regions:
                    for name, where in (("two regions", (0, 1)), ("wrong regions", (2, 3))):
                        found.append(Condition(name, (Edit("swap", source=OTHER, regions=where, **at),), step, layer))
                last = self.frames - 1
                found.append(Condition("last frame", (Edit("swap", source=OTHER, frames=(last,), **at),), step, layer))
        for layer in self.layers if self.whole else ():
            for name, source in {"swap": OTHER, "same answer": SAME, "random state": RANDOM}.items():
                found.append(Condition(name, (Edit("swap", source=source, layers=(layer,)),), layer=layer))
        return found

    def needed(self, run: CleanRun, condition: Condition) -> Needed:
        source, step = condition.edits[0].source, condition.step
        if step == NONE:
            rows = run.donors.same if source == SAME else run.donors.other
            every = {at: s for at, s in run.states_of_all_steps().items() if at.layer == condition.layer}
            every = taken_from(every, rows)
            return Needed({source: random_states(every, self.seed) if source == RANDOM else every})
        if source == LATER:
            other = (step + self.total // 2) % self.total
            return Needed({source: taken_from(run.states(other), run.donors.other, step)})
        if source == SAME:
            return Needed({source: taken_from(run.states(step), run.donors.same, step)})
        states = taken_from(run.states(step), run.donors.other, step)
        if source == RANDOM:
            only = {at: state for at, state in states.items() if at.layer == condition.layer}
            return Needed({source: random_states(only, self.seed + step)})
        if not condition.edits[0].regions:
            return Needed({source: states})
        host, donor = run.answers.tolist(), self.labels(run).tolist()
        first = [[a, b] if NONE not in (a, b) else [] for a, b in zip(host, donor, strict=True)]
        return Needed({source: states}, run.boxes(first))

    def labels(self, run: CleanRun) -> Int[Tensor, " sample"]:
        """The answer of the other donor; NONE for a sample that lacks one of its donors."""
        there = (run.donors.other != NONE) & (run.donors.same != NONE)
        answers = run.answers[torch.from_numpy(run.donors.other)]
        return torch.where(torch.from_numpy(there), answers, NONE)


@dataclass(frozen=True)
class Steer:
    """The direction of a probe, added to the tokens of the regions, with controls.

    The label is a plausible answer that the clean run does not show, drawn for every sample. With a dose of 1, the
    vector that is added in the region where the direction of the probe is longest is as long as a token of the sample
    is on average, in the clean run at this cell. Controls: random directions, and the direction of a probe of random
    labels; over all regions they are as long as the direction of the probe.
    target: its labels are answers. cells: where the direction is added, one for a step and layer. through: cells of one
    layer at which directions are added in the same run, each that of its own probe. doses: of the probe.
    draws: number of random directions, at the dose `compared`. control: name of the target with random labels; empty
    for none.
    """

    bank: ProbeBank
    target: str
    cells: Sequence[Cell]
    doses: Sequence[float]
    compared: float
    draws: int
    control: str
    task: Task
    seed: int = 0
    through: Sequence[Cell] = ()

    def conditions(self) -> list[Condition]:
        kinds = [(PROBE, dose, NONE) for dose in self.doses]
        kinds += [(CONTROL, self.compared, NONE)] if self.control else []
        kinds += [("random direction", self.compared, draw) for draw in range(self.draws)]
        places: list[Sequence[Cell]] = [*((cell,) for cell in self.cells), *([self.through] if self.through else [])]
        return [self._condition(cells, *kind) for cells in places for kind in kinds]

    def _condition(self, cells: Sequence[Cell], name: str, dose: float, draw: int) -> Condition:
        edits = [
            Edit("steer", source=f"{name}, step {c.step}", amount=dose, steps=(c.step,), layers=(c.layer,))
            for c in cells
        ]
        step = cells[0].step if len(cells) == 1 else NONE
        return Condition(name, tuple(edits), step, cells[0].layer, dose=dose, draw=draw)

    def needed(self, run: CleanRun, condition: Condition) -> Needed:
        cells = {(c.step, c.layer): c for c in (*self.through, *self.cells)}
        sources = {
            edit.source: self._direction(run, condition, cells[edit.steps[0], edit.layers[0]])
            for edit in condition.edits
        }
        return Needed(sources, [problem.regions for problem in run.problems])

    def _direction(self, run: CleanRun, condition: Condition, cell: Cell) -> Float[Tensor, "sample region channel"]:
        labels = self.labels(run).clamp_min(0)
        found = probe_directions(self.bank, self.target, cell, labels)
        longest = found.norm(dim=2).amax(dim=1).clamp_min(1e-12)
        if condition.name == CONTROL:
            found = probe_directions(self.bank, self.control, cell, labels % self.bank.target(self.control).classes)
        elif condition.name != PROBE:
            found = random_directions(found, self.seed + condition.draw)
        size = run.token_norms(At(cell.step, cell.layer, cell.branch))
        return found * (size / longest)[:, None, None]

    def labels(self, run: CleanRun) -> Int[Tensor, " sample"]:
        found = []
        for sample, answer in zip(run.samples, run.answers.tolist(), strict=True):
            others = [a for a in self.task.plausible_answers(sample.problem) if a != answer]
            rng = np.random.default_rng([self.seed, sample.seed % LARGE])
            found.append(int(rng.choice(others)) if others and answer != NONE else NONE)
        return torch.tensor(found)


@dataclass(frozen=True)
class Erase:
    """A concept is removed from block outputs with LEACE, with controls. The label is the answer of the clean run.

    At one cell, or in every layer at every step. Controls: the concept `control` (random labels), and random
    directions, as many as LEACE removes, along which every token moves as far as with LEACE.
    samples: training samples. plane: every cell with features, one for a step and layer. cells: those that are erased
    alone.
    """

    samples: ProbeSamples
    target: str
    control: str
    plane: Sequence[Cell]
    cells: Sequence[Cell]
    seed: int = 0
    _made: dict[str, Mapping[tuple[int, int], LeaceEraser]] = field(default_factory=dict, init=False, repr=False)

    def conditions(self) -> list[Condition]:
        found = []
        steps, layers = sorted({c.step for c in self.plane}), sorted({c.layer for c in self.plane})
        for name in ("erased", *(["control erased"] if self.control else []), "random directions erased"):
            for cell in self.cells:
                edit = Edit("erase", source=name, steps=(cell.step,), layers=(cell.layer,))
                found.append(Condition(name, (edit,), cell.step, cell.layer))
            every = Edit("erase", source=name, steps=tuple(steps), layers=tuple(layers))
            found.append(Condition(name, (every,)))
        return found

    def needed(self, run: CleanRun, condition: Condition) -> Needed:
        name, device = condition.edits[0].source, run.sampler.model._execution_device
        found: Mapping[tuple[int, int], Eraser] = on_device(self._erasers(name), device)
        if name == "random directions erased":
            own = on_device(self._erasers("erased"), device)
            found = {at: Matched(own[at], random) for at, random in on_device(self._erasers(name), device).items()}
        return Needed({name: found})

    def _erasers(self, name: str) -> Mapping[tuple[int, int], LeaceEraser]:
        if name not in self._made:
            if name == "random directions erased":
                self._made[name] = random_erasers(self._erasers("erased"), self.seed)
            else:
                target = self.target if name == "erased" else self.control
                self._made[name] = concept_erasers(self.samples, target, self.plane)
        return self._made[name]

    def labels(self, run: CleanRun) -> Int[Tensor, " sample"]:
        return run.answers


@dataclass(frozen=True)
class Ablate:
    """What a block adds to its input is removed or replaced, at a cell or in all steps. The label is the clean answer.

    Whole, in the last frame, and in the region of the answer against another region.
    """

    steps: Sequence[int]
    layers: Sequence[int]
    total: int
    frames: int
    regions: bool

    def conditions(self) -> list[Condition]:
        found, last = [], self.frames - 1
        for layer in self.layers:
            for step in (NONE, *self.steps):
                steps = tuple(range(self.total)) if step == NONE else (step,)
                at: dict[str, Any] = {"steps": steps, "layers": (layer,)}
                for how in ABLATIONS:
                    found.append(Condition(how, (Edit("ablate", how, **at),), step, layer))
                found.append(
                    Condition("zero, last frame", (Edit("ablate", "zero", frames=(last,), **at),), step, layer)
                )
                if self.regions:
                    for name, region in (("zero, region of the answer", 0), ("zero, another region", 1)):
                        edit = Edit("ablate", "zero", regions=(region,), **at)
                        found.append(Condition(name, (edit,), step, layer))
        return found

    def needed(self, run: CleanRun, condition: Condition) -> Needed:
        if not condition.edits[0].regions:
            return Needed()
        return Needed({}, run.boxes([[a] if a != NONE else [] for a in run.answers.tolist()]))

    def labels(self, run: CleanRun) -> Int[Tensor, " sample"]:
        return run.answers


def best_cells(accuracy: Mapping[Cell, float]) -> list[Cell]:
    """For each step, the cell with the highest accuracy; on a tie the lowest layer."""
    steps = sorted({cell.step for cell in accuracy})
    return [max((c for c in accuracy if c.step == s), key=lambda c: (accuracy[c], -c.layer)) for s in steps]
