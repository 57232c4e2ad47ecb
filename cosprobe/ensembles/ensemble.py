"""Seed ensembles: several noise seeds of one problem in one batch, one video out of them.

    answer = ensemble(pipeline, problem, method="prune", seeds=8, probes="runs/maze-layers")
    answer.video, answer.choice, answer.disagreement

Every method (`strategies`) is one call of the real pipeline: runs that are given up leave the running batch,
what is averaged is averaged between its blocks, and the first frame of a problem is encoded once for all its seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cosprobe.activations import ActivationCache, Pooling, capture
from cosprobe.cells import Cell
from cosprobe.ensembles.probe_scorer import ProbeScorer
from cosprobe.ensembles.strategies import WINDOWED, Course, Finished, Plan, course, disagreement, in_turn, only, windows
from cosprobe.errors import InputError
from cosprobe.models import PipelineConfig, block_list, experts, sample
from cosprobe.tasks import FAMILIES, Problem, Task, images, noise_seed


@dataclass(frozen=True, eq=False)
class RunContext:
    """What ensembles run on: a pipeline and how it samples, the task that reads its videos, and probes, if any."""

    model: Any
    config: PipelineConfig
    task: Task
    scorer: ProbeScorer | None = None

    def __post_init__(self) -> None:
        made = {} if self.scorer is None else self.scorer.bank.provenance["store"]
        for name in ("steps", "guidance"):
            if made and made[f"pipeline.{name}"] != getattr(self.config, name):
                raise InputError(
                    f"pipeline.{name}={getattr(self.config, name)}: these probes were trained at "
                    f"{made[f'pipeline.{name}']}; sample as they were, or train others"
                )

    @property
    def depth(self) -> int:
        return min(len(block_list(model)) for model in experts(self.model).values())


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a method returned for a batch of problems.

    answers: -1 for none. run: which seed's video it is. begun: how many of its seeds were. disagreement: share of seeds
    that do not give the most frequent answer, by the finished videos where several were, else by the first probes
    read of several; NaN where neither. finished and proba (by step) are of the runs and seeds that were there.
    """

    answers: Int[Tensor, " problem"]
    run: Int[Tensor, " problem"]
    begun: Int[Tensor, " problem"]
    disagreement: Float[Tensor, " problem"]
    video: np.ndarray
    finished: Finished
    proba: dict[int, Float[Tensor, "problem seed candidate"]]


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
    probes: ProbeScorer | Path | str | None = None,
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
    scorer = ProbeScorer.load(probes, problem.task) if isinstance(probes, str | Path) else probes
    made = {} if scorer is None else scorer.bank.provenance["store"]
    task = task or _as_made(FAMILIES[problem.task], "task", made).build()
    config = config or _as_made(PipelineConfig, "pipeline", made or {"pipeline.frames": task.frames})
    context = RunContext(pipeline, config, task, scorer)
    if method in WINDOWED:
        plan.setdefault("layers", windows(context.depth)["middle"])
    chosen = Plan(seeds, **plan)
    outcome = run(context, method, chosen, [problem], seed)
    answer, path = int(outcome.answers[0]), course(method, chosen, context.config.steps)
    return EnsembleAnswer(
        outcome.video[0],
        None if answer < 0 else answer,
        float(outcome.disagreement[0]),
        int(outcome.run[0]),
        path.evaluations(context.config.steps) * int(outcome.begun[0]) // path.seeds,
    )


@torch.no_grad()
def run(
    context: RunContext,
    method: str,
    plan: Plan,
    problems: Sequence[Problem],
    seed: int = 0,
    which: Sequence[int] | None = None,
    read: Sequence[int] = (),
) -> Outcome:
    """Runs a method on problems, all seeds of all problems in one batch; where a method makes runs one after another,
    one seed of all problems that still ask for one.

    which: numbers of the noise seeds of each problem, default 0, 1, .. K - 1. read: further step indices at which all
    probes are read. Raises ValueError as `ensemble` does.
    """
    path = course(method, plan, context.config.steps)
    scorer = context.scorer
    if scorer is None and (path.reads or path.weighs or read):
        raise InputError(
            f"method={method!r} reads probes: pass those of a train.py run; without: vote, best_of, hidden"
        )
    numbers = list(range(path.seeds) if which is None else which[: path.seeds])
    together = partial(_together, context, plan, seed=seed, read=read)
    return together(path, problems, numbers) if path.credit is None else _in_turn(together, path, problems, numbers)


def _together(
    context: RunContext,
    plan: Plan,
    path: Course,
    problems: Sequence[Problem],
    numbers: Sequence[int],
    seed: int,
    read: Sequence[int],
) -> Outcome:
    """All runs of a course in one batch."""
    samples = [problem for problem in problems for _ in range(path.seeds)]
    seeds = [noise_seed(problem, k, seed) for problem in problems for k in numbers]
    model, config = context.model, replace(context.config, steps=path.length or context.config.steps)
    alive = torch.arange(path.seeds).expand(len(problems), -1)
    proba: dict[int, Tensor] = {}
    with ExitStack() as stack:
        steps = sorted({*path.reads, *read})
        reading = stack.enter_context(_reading(context, steps, samples)) if steps else None
        if path.edit is not None:
            weigh = {"weigh": _weigh(context, plan, samples)} if path.weighs else {}
            stack.enter_context(path.edit(model, **weigh))

        def filter_batch(step: int) -> list[int] | None:
            nonlocal alive
            if reading is not None and step in steps:
                proba[step] = reading(step).unflatten(0, alive.shape)
            if step not in path.cuts or path.cuts[step].kept == alive.shape[1]:
                return None
            cut = path.cuts[step]
            chosen = cut.choose(proba[step] if cut.reads else torch.zeros(*alive.shape, 1))
            at = (torch.arange(len(alive))[:, None] * alive.shape[1] + chosen).flatten().tolist()
            alive = alive.gather(1, chosen)
            if reading is not None:
                reading.keep(at)
            return at

        prompts, watched = [p.prompt for p in samples], filter_batch if path.cuts or steps else None
        video = np.asarray(sample(model, config, images(context.task, samples), prompts, seeds, watched))
    return _outcome(context.task, path, problems, alive, video, proba)


def _in_turn(
    together: Callable[..., Outcome], path: Course, problems: Sequence[Problem], numbers: Sequence[int]
) -> Outcome:
    """Runs made one after another, each of them together with those of all problems that still ask for one."""
    size, asking = (len(problems), len(numbers)), torch.arange(len(problems))
    clips: dict[tuple[int, int], np.ndarray] = {}
    for at, number in enumerate(numbers):
        one = together(Course(1, only, asks=path.asks), [problems[i] for i in asking], [number])
        if not at:  # room for as many as there may be
            answers, scores = torch.full(size, -1), torch.full((*size, one.finished.scores.shape[-1]), torch.nan)
            proba = {step: torch.full((*size, read.shape[-1]), torch.nan) for step, read in one.proba.items()}
        answers[asking, at], scores[asking, at] = one.finished.answers[:, 0], one.finished.scores[:, 0]
        for step, read in one.proba.items():
            proba[step][asking, at] = read[:, 0]
        clips |= {(int(i), at): clip for i, clip in zip(asking, one.video, strict=True)}
        so_far = Finished(answers[asking, : at + 1], scores[asking, : at + 1])
        asking = asking[~path.enough(so_far, [proba[step][asking, : at + 1] for step in path.asks])]
        if not len(asking):
            break
    finished, rows = Finished(answers, scores), torch.arange(len(problems))
    begun, run = in_turn(path, finished, [proba[step] for step in path.asks])
    shares = [disagreement(some[None, :n])[0] for some, n in zip(answers, begun.tolist(), strict=True)]
    apart = torch.where(begun > 1, torch.stack(shares), torch.nan)
    video = np.stack([clips[i, at] for i, at in enumerate(run.tolist())])
    return Outcome(answers[rows, run], run, begun, apart, video, finished, proba)


def _as_made(kind: type, group: str, store: dict[str, Any]) -> Any:
    """Settings of a group as they stand in the provenance of a store; its own defaults for what does not."""
    known = {f.name: store[f"{group}.{f.name}"] for f in fields(kind) if f"{group}.{f.name}" in store}
    return kind(**known)


def _outcome(
    task: Task, path: Course, problems: Sequence[Problem], alive: Tensor, video: np.ndarray, proba: dict[int, Tensor]
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
    elif path.reads and path.seeds > 1:
        apart = disagreement(proba[path.reads[0]].argmax(dim=-1))
    else:
        apart = torch.full((len(problems),), torch.nan)
    begun, video = torch.full_like(at, path.seeds), clips[rows.numpy(), at.numpy()]
    return Outcome(finished.answers[rows, at], alive[rows, at], begun, apart, video, finished, proba)


class _Reading:
    """Asks probes of a run that is under capture; cut together with its batch."""

    def __init__(
        self, scorer: ProbeScorer, cache: ActivationCache, pooling: Pooling, samples: Sequence[Problem], frames: int
    ):
        self.scorer, self.cache, self.pooling = scorer, cache, pooling
        self.samples, self.places = list(samples), pooling.places(frames)

    def __call__(self, step: int) -> Float[Tensor, "sample candidate"]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # captured features are copied asynchronously
        cells = {name: self.scorer.cell(name, step) for name in self.scorer.accuracy}
        return self.scorer.read(cells, self.samples, self._features)

    def _features(self, cell: Cell) -> Tensor:
        return self.cache.parts[cell.step, cell.site, cell.branch][:, self.places.index(cell.place)]

    def keep(self, at: list[int]) -> None:
        self.samples = [self.samples[i] for i in at]
        if isinstance(self.pooling.boxes, list):  # what pools the next step's tokens
            self.pooling.boxes[:] = [self.pooling.boxes[i] for i in at]


@contextmanager
def _reading(context: RunContext, steps: Sequence[int], samples: Sequence[Problem]) -> Iterator[_Reading]:
    scorer = context.scorer
    assert scorer is not None
    names = sorted({scorer.target(p) for p in samples})
    sites = sorted({scorer.cell(name, step).site for name in names for step in steps}, key=int)
    pooling = scorer.pooling(samples)
    with capture(context.model, sites, pooling, ",".join(map(str, steps))) as cache:
        yield _Reading(scorer, cache, pooling, samples, _latent_frames(context))


def _weigh(context: RunContext, plan: Plan, samples: Sequence[Problem]) -> Callable[..., Tensor]:
    """How much surer than a guess the probe of each sample is, at the layer that is being averaged."""
    scorer = context.scorer
    assert scorer is not None
    pooling, places = scorer.pooling(samples), scorer.pooling(samples).places(_latent_frames(context))
    names = sorted({scorer.target(p) for p in samples})
    table = {(s, n): {t: scorer.cell(t, s, n) for t in names} for s in plan.steps or (0,) for n in plan.layers}

    def weigh(step: int, layer: int, tokens: Tensor, size: tuple[int, int, int]) -> Float[Tensor, " batch"]:
        pooled = pooling(tokens, size).cpu()
        proba = scorer.read(table[step, layer], samples, lambda cell: pooled[:, places.index(cell.place)])
        return (proba.amax(dim=-1) - 1 / proba.shape[-1]).clamp_min(0)

    return weigh


def _latent_frames(context: RunContext) -> int:
    return (context.config.frames - 1) // context.model.vae_scale_factor_temporal + 1
