"""Seed ensembles: several noise seeds of one problem in one batch, one video out of them.

    answer = ensemble(pipeline, problem, method="prune", seeds=8, probes="runs/maze-layers")
    answer.video, answer.choice, answer.disagreement

Every method (`cosprobe.methods`) is one call of the real pipeline: runs that are given up leave the running batch,
what is averaged is averaged between its blocks, and the first frame of a problem is encoded once for all its seeds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cosprobe.capture import Tape, capture
from cosprobe.collect import images, noise_seed
from cosprobe.grid import Grid
from cosprobe.interventions import check_finite, encoded_once
from cosprobe.methods import WINDOWED, Course, Finished, Plan, course, disagreement, windows
from cosprobe.pipelines import PipelineConfig, block_list, experts, sample
from cosprobe.pooling import Pooling
from cosprobe.probes import ProbeBank, load_probes
from cosprobe.tasks import FAMILIES, Problem, Task
from cosprobe.types import Cell

ROLES = ("answer", "choice")  # of the targets a run is judged by, in this order


@dataclass(frozen=True, eq=False)
class Judge:
    """Probes that judge a run while it runs, by how sure they are of its answer.

    accuracy: of every layer cell of every answer or choice target on validation, which says what layer to read at a
    step. task: the family the probes were trained on.
    """

    bank: ProbeBank
    accuracy: dict[str, dict[Cell, float]]
    task: str

    @classmethod
    def load(cls, folder: Path | str, task: str) -> Judge:
        """The probes of a finished run on the family `task`."""
        return cls.of(load_probes(folder), Grid.load(folder), task)

    @classmethod
    def of(cls, bank: ProbeBank, grid: Grid, task: str) -> Judge:
        """Raises ValueError when there are no probes that read answers."""
        names = [t.name for role in ROLES for t in bank.targets if t.role == role and t.name in grid.targets]
        if not names:
            raise ValueError("these probes read no answer or choice: expected a target of either; train probes of one")
        cells = [cell for cell in bank.cells if cell.is_layer and cell.branch == "cond"]
        return cls(bank, {n: {c: float(grid.at(n, c).validation_accuracy) for c in cells} for n in names}, task)

    @property
    def fingerprint(self) -> str:
        """Identity of the probes and of which of them are read."""
        digest = hashlib.sha256(repr(sorted((n, sorted(t.items())) for n, t in self.accuracy.items())).encode())
        for name in sorted(self.accuracy):
            digest.update(self.bank.weights[name].contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of problems whose runs can be read."""
        return tuple(sorted({kind for name in self.accuracy for kind in self.bank.target(name).kinds}))

    def target(self, problem: Problem) -> str:
        """The target a run of this problem is read by. Raises ValueError for a problem the probes do not know."""
        fitting = [name for name in self.accuracy if problem.kind in self.bank.target(name).kinds]
        if problem.task != self.task or not fitting:
            raise ValueError(
                f"problem {problem.name!r}: these probes do not know it, expected task {self.task!r}, "
                f"kind {' or '.join(self.kinds)}; train probes on its task"
            )
        return fitting[0]

    def cell(self, target: str, step: int, layer: int | None = None) -> Cell:
        """The cell that is best on validation at a step (index), or at a step and layer. Raises ValueError."""
        table = self.accuracy[target]
        here = [c for c in table if c.step == step and layer in (None, int(c.site))]
        if not here:
            where = f"step {step}" if layer is None else f"step {step}, layer {layer}"
            steps, layers = sorted({c.step for c in table}), sorted({int(c.site) for c in table})
            raise ValueError(f"{where}: no probes were trained there, expected steps {steps} and layers {layers}")
        return max(here, key=lambda c: (table[c], -int(c.site)))

    def pooling(self, problems: Sequence[Problem]) -> Pooling:
        """As the bank's features were pooled; the boxes are a list that may be cut together with the batch."""
        store = self.bank.provenance["store"]
        kind = store["probe.pooling"]
        return Pooling(kind, store["probe.frames"], [p.regions for p in problems] if kind == "region" else ())

    def read(
        self, cells: dict[str, Cell], problems: Sequence[Problem], features: Callable[[Cell], Tensor]
    ) -> Float[Tensor, "sample candidate"]:
        """Probabilities of the candidates for each sample. cells: per target; features: [sample, region, channel]."""
        targets = [self.target(p) for p in problems]
        odds: dict[str, Tensor] = {}
        for name in sorted(set(targets)):
            rows = features(cells[name]).float()
            check_finite(rows, cells[name].step, int(cells[name].site))
            rows = torch.nn.functional.pad(rows, (0, self.bank.mean.shape[1] - rows.shape[-1]))
            odds[name] = self.bank.probabilities(rows[:, None], name, [cells[name]])[0]
        return torch.stack([odds[name][i] for i, name in enumerate(targets)])


@dataclass(frozen=True, eq=False)
class Bench:
    """What ensembles run on: a pipeline and how it samples, the task that reads its videos, and probes, if any."""

    model: Any
    config: PipelineConfig
    task: Task
    judge: Judge | None = None

    def __post_init__(self) -> None:
        made = {} if self.judge is None else self.judge.bank.provenance["store"]
        for name in ("steps", "guidance"):
            if made and made[f"pipeline.{name}"] != getattr(self.config, name):
                raise ValueError(
                    f"pipeline.{name}={getattr(self.config, name)}: these probes were trained at "
                    f"{made[f'pipeline.{name}']}; sample as they were, or train others"
                )

    @property
    def depth(self) -> int:
        return min(len(block_list(model)) for model in experts(self.model).values())


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a method returned for a batch of problems.

    answers: -1 for none. run: which seed's video it is. disagreement: share of seeds that do not give the most
    frequent answer, by the finished videos where several were, else by the first probes read; NaN where neither.
    finished and odds (by step) are of the runs and seeds that were there.
    """

    answers: Int[Tensor, " problem"]
    run: Int[Tensor, " problem"]
    disagreement: Float[Tensor, " problem"]
    video: np.ndarray
    finished: Finished
    odds: dict[int, Float[Tensor, "problem seed candidate"]]


@dataclass(frozen=True, eq=False)
class EnsembleAnswer:
    """One problem's. video: float [frame, height, width, 3] in [0, 1]. choice: what it shows, None for none.
    disagreement: see `Outcome`. run: the seed it came from, from 0. evaluations: whole steps run for it."""

    video: np.ndarray
    choice: int | None
    disagreement: float
    run: int
    evaluations: int


def ensemble(
    pipeline: Any,
    problem: Problem,
    method: str = "prune",
    seeds: int = 8,
    probes: Judge | Path | str | None = None,
    task: Task | None = None,
    config: PipelineConfig | None = None,
    seed: int = 0,
    **plan: Any,
) -> EnsembleAnswer:
    """One answer to `problem` from several noise seeds.

    probes: of a finished train.py run, or its folder. task, config: how the problem is drawn and read, how the pipeline
    samples; default, as when the probes were trained, else the family's own settings and 20 steps. seed: what the
    noise seeds are drawn from. plan: `steps`, `layers`, `back`, `length` of `Plan`.
    Raises ValueError for an unknown method, fewer than two seeds, a window outside the model, a method that reads
    probes without any, and probes that do not know the problem.
    """
    judge = Judge.load(probes, problem.task) if isinstance(probes, str | Path) else probes
    made = {} if judge is None else judge.bank.provenance["store"]
    task = task or _as_made(FAMILIES[problem.task], "task", made).build()
    config = config or _as_made(PipelineConfig, "pipeline", made or {"pipeline.frames": task.frames})
    bench = Bench(pipeline, config, task, judge)
    if method in WINDOWED:
        plan.setdefault("layers", windows(bench.depth)["middle"])
    chosen = Plan(seeds, **plan)
    outcome = run(bench, method, chosen, [problem], seed)
    answer = int(outcome.answers[0])
    return EnsembleAnswer(
        outcome.video[0],
        None if answer < 0 else answer,
        float(outcome.disagreement[0]),
        int(outcome.run[0]),
        course(method, chosen, bench.config.steps).evaluations(bench.config.steps),
    )


@torch.no_grad()
def run(
    bench: Bench,
    method: str,
    plan: Plan,
    problems: Sequence[Problem],
    seed: int = 0,
    which: Sequence[int] | None = None,
    read: Sequence[int] = (),
) -> Outcome:
    """Runs a method on problems, all seeds of all problems in one batch.

    which: numbers of the noise seeds of each problem, default 0, 1, .. K - 1. read: further step indices at which all
    probes are read. Raises ValueError as `ensemble` does.
    """
    path = course(method, plan, bench.config.steps)
    judge = bench.judge
    if judge is None and (path.reads or path.weighs or read):
        raise ValueError(
            f"method={method!r} reads probes: pass those of a train.py run; without: vote, best_of, hidden"
        )
    samples = [problem for problem in problems for _ in range(path.seeds)]
    numbers = range(path.seeds) if which is None else which[: path.seeds]
    seeds = [noise_seed(problem, k, seed) for problem in problems for k in numbers]
    model, config = bench.model, replace(bench.config, steps=path.length or bench.config.steps)
    alive = torch.arange(path.seeds).expand(len(problems), -1)
    odds: dict[int, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(encoded_once(model))
        steps = sorted({*path.reads, *read})
        reading = stack.enter_context(_reading(bench, steps, samples)) if steps else None
        if path.edit is not None:
            weigh = {"weigh": _weigh(bench, plan, samples)} if path.weighs else {}
            stack.enter_context(path.edit(model, **weigh))

        def thin(step: int) -> list[int] | None:
            nonlocal alive
            if reading is not None and step in steps:
                odds[step] = reading(step).unflatten(0, alive.shape)
            if step not in path.cuts or path.cuts[step].kept == alive.shape[1]:
                return None
            cut = path.cuts[step]
            chosen = cut.choose(odds[step] if cut.reads else torch.zeros(*alive.shape, 1))
            at = (torch.arange(len(alive))[:, None] * alive.shape[1] + chosen).flatten().tolist()
            alive = alive.gather(1, chosen)
            if reading is not None:
                reading.keep(at)
            return at

        prompts, watched = [p.prompt for p in samples], thin if path.cuts or steps else None
        video = np.asarray(sample(model, config, images(bench.task, samples), prompts, seeds, watched))
    return _outcome(bench.task, path, problems, alive, video, odds)


def _as_made(kind: type, group: str, store: dict[str, Any]) -> Any:
    """Settings of a group as they stand in the provenance of a store; its own defaults for what does not."""
    known = {f.name: store[f"{group}.{f.name}"] for f in fields(kind) if f"{group}.{f.name}" in store}
    return kind(**known)


def _outcome(
    task: Task, path: Course, problems: Sequence[Problem], alive: Tensor, video: np.ndarray, odds: dict[int, Tensor]
) -> Outcome:
    """Reads the finished videos and picks one for each problem."""
    clips = video.reshape(*alive.shape, *video.shape[1:])
    read = [[task.readout(p, clip) for clip in runs] for p, runs in zip(problems, clips, strict=True)]
    finished = Finished(
        torch.tensor([[-1 if r.answer is None else r.answer for r in runs] for runs in read]),
        torch.tensor([[r.scores for r in runs] for runs in read], dtype=torch.float32),
    )
    at = path.pick(finished)
    rows = torch.arange(len(problems))
    if path.finished > 1:
        apart = disagreement(finished.answers)
    elif path.reads:
        apart = disagreement(odds[path.reads[0]].argmax(dim=-1))
    else:
        apart = torch.full((len(problems),), torch.nan)
    return Outcome(finished.answers[rows, at], alive[rows, at], apart, clips[rows.numpy(), at.numpy()], finished, odds)


class _Reading:
    """Asks probes of a run that is under capture; cut together with its batch."""

    def __init__(self, judge: Judge, tape: Tape, pooling: Pooling, samples: Sequence[Problem], frames: int):
        self.judge, self.tape, self.pooling = judge, tape, pooling
        self.samples, self.places = list(samples), pooling.places(frames)

    def __call__(self, step: int) -> Float[Tensor, "sample candidate"]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # captured features are copied asynchronously
        cells = {name: self.judge.cell(name, step) for name in self.judge.accuracy}
        return self.judge.read(cells, self.samples, self._features)

    def _features(self, cell: Cell) -> Tensor:
        return self.tape.parts[cell.step, cell.site, cell.branch][:, self.places.index(cell.place)]

    def keep(self, at: list[int]) -> None:
        self.samples = [self.samples[i] for i in at]
        if isinstance(self.pooling.boxes, list):  # what pools the next step's tokens
            self.pooling.boxes[:] = [self.pooling.boxes[i] for i in at]


@contextmanager
def _reading(bench: Bench, steps: Sequence[int], samples: Sequence[Problem]) -> Iterator[_Reading]:
    judge = bench.judge
    assert judge is not None
    names = sorted({judge.target(p) for p in samples})
    sites = sorted({judge.cell(name, step).site for name in names for step in steps}, key=int)
    pooling = judge.pooling(samples)
    with capture(bench.model, sites, pooling, ",".join(map(str, steps))) as tape:
        yield _Reading(judge, tape, pooling, samples, _latent_frames(bench))


def _weigh(bench: Bench, plan: Plan, samples: Sequence[Problem]) -> Callable[..., Tensor]:
    """How much surer than a guess the probe of each sample is, at the layer that is being averaged."""
    judge = bench.judge
    assert judge is not None
    pooling, places = judge.pooling(samples), judge.pooling(samples).places(_latent_frames(bench))
    names = sorted({judge.target(p) for p in samples})
    table = {(s, n): {t: judge.cell(t, s, n) for t in names} for s in plan.steps or (0,) for n in plan.layers}

    def weigh(step: int, layer: int, tokens: Tensor, size: tuple[int, int, int]) -> Float[Tensor, " batch"]:
        pooled = pooling(tokens, size).cpu()
        odds = judge.read(table[step, layer], samples, lambda cell: pooled[:, places.index(cell.place)])
        return (odds.amax(dim=-1) - 1 / odds.shape[-1]).clamp_min(0)

    return weigh


def _latent_frames(bench: Bench) -> int:
    return (bench.config.frames - 1) // bench.model.vae_scale_factor_temporal + 1
