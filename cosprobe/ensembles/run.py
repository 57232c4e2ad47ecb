"""Seed ensembles: samples several noise seeds of one problem in one batch and returns one video.

    answer = ensemble(pipeline, problem, strategy="prune", seeds=8, probes="runs/maze-layers")
    answer.video, answer.answer, answer.disagreement

Every strategy (`strategies`) except those that make runs one after another is a single call of the pipeline. Runs that
are dropped are removed from the batch during the call, averages are computed between blocks, and the first frame of a
problem is encoded once for all seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cosprobe.activations import ActivationCache, Pooling, Sampler, capture
from cosprobe.config import PipelineConfig
from cosprobe.ensembles.probe_scorer import ProbeScorer
from cosprobe.ensembles.strategies import (
    WINDOWED,
    Finished,
    Hyperparameters,
    Strategy,
    build_strategy,
    disagreement,
    only,
    sequential,
    windows,
)
from cosprobe.errors import InputError
from cosprobe.tasks import FAMILIES, Problem, Sample, Task, noise_seed


@dataclass(frozen=True, eq=False)
class RunContext:
    """A pipeline with its task, and optionally probes. Raises InputError if probes were trained with other settings."""

    sampler: Sampler
    scorer: ProbeScorer | None = None

    def __post_init__(self) -> None:
        if self.scorer is None:
            return
        for name in ("steps", "guidance"):
            trained, given = (getattr(one, name) for one in (self.scorer.bank.store.pipeline, self.sampler.config))
            if trained != given:
                raise InputError(
                    f"pipeline.{name}={given}: these probes were trained at {trained}; use pipeline.{name}={trained}, "
                    "or train other probes"
                )


@dataclass(frozen=True, eq=False)
class Outcome:
    """Result of a strategy for a batch of problems.

    answers: answer of each returned video, -1 for no answer.
    run: index of the seed that the video comes from.
    begun: number of runs that were begun.
    disagreement: share of seeds that do not give the most frequent answer. Answers are those of the finished videos if
    several runs were finished, otherwise those of the probes at the first step they are read; NaN if neither exists.
    video: the returned videos.
    finished: answers and scores of the runs that were finished.
    proba: by step, probabilities of the runs that were left at that step.
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
    """Result of a strategy for one problem.

    video: float [frame, height, width, 3] in [0, 1]. answer: what the video shows, None for no answer. disagreement:
    see `Outcome`. run: index of the seed that the video comes from. evaluations: network evaluations of all runs.
    """

    video: np.ndarray
    answer: int | None
    disagreement: float
    run: int
    evaluations: int


def ensemble(
    pipeline: Any,
    problem: Problem,
    strategy: str = "prune",
    seeds: int = 8,
    probes: ProbeScorer | Path | str | None = None,
    task: Task | None = None,
    config: PipelineConfig | None = None,
    seed: int = 0,
    **hyperparameters: Any,
) -> EnsembleAnswer:
    """Gets one answer to `problem` from several noise seeds.

    strategy: a name in `STRATEGIES`. seeds: number of noise seeds.
    probes: probes of a finished train.py run, or the folder of that run.
    task, config: settings of the task and of sampling. Default: those that the probes were trained with; without
    probes, the default settings of the task and 20 steps.
    seed: the noise seeds are derived from it.
    hyperparameters: `steps`, `layers`, `back`, `length` of `Hyperparameters`.
    Raises InputError for an unknown strategy, fewer than two seeds, layers outside the model, a strategy that needs
    probes without probes, and probes that were trained on other kinds of problems.
    """
    scorer = ProbeScorer.load(probes, problem.task) if isinstance(probes, str | Path) else probes
    made_for = None if scorer is None else scorer.bank.store
    if task is None and problem.task not in FAMILIES:
        raise InputError(
            f"task={problem.task!r}: not a task of this package, whose videos could be read; expected one of "
            f"{', '.join(FAMILIES)}, or pass task="
        )
    task = task or FAMILIES[problem.task](**({} if made_for is None else made_for.task)).build()
    config = config or (PipelineConfig(frames=task.frames) if made_for is None else made_for.pipeline)
    context = RunContext(Sampler(pipeline, config, task), scorer)
    config = context.sampler.config
    if strategy in WINDOWED:
        hyperparameters.setdefault("layers", windows(context.sampler.depth)["middle"])
    params = Hyperparameters(seeds, **hyperparameters)
    outcome = run(context, strategy, params, [problem], seed)
    answer, chosen = int(outcome.answers[0]), build_strategy(strategy, params, config.steps)
    return EnsembleAnswer(
        outcome.video[0],
        None if answer < 0 else answer,
        float(outcome.disagreement[0]),
        int(outcome.run[0]),
        chosen.evaluations(config.steps) * int(outcome.begun[0]) // chosen.seeds,
    )


@torch.no_grad()
def run(
    context: RunContext,
    name: str,
    params: Hyperparameters,
    problems: Sequence[Problem],
    seed: int = 0,
    which: Sequence[int] | None = None,
    read: Sequence[int] = (),
) -> Outcome:
    """Runs a strategy on a batch of problems.

    All seeds of all problems are in one batch. A strategy that makes runs one after another samples, in each round, one
    seed of every problem that has no accepted video yet.

    which: indices of the noise seeds of each problem, by default 0 to K - 1. read: further step indices at which probes
    are read. Raises InputError as `ensemble` does.
    """
    strategy = build_strategy(name, params, context.sampler.config.steps)
    scorer = context.scorer
    if scorer is None and (strategy.reads or strategy.weighs or read):
        raise InputError(
            f"strategy={name!r} needs probes: pass those of a train.py run; without probes: vote, best_of, hidden"
        )
    numbers = list(range(strategy.seeds) if which is None else which[: strategy.seeds])
    together = partial(_together, context, params, seed=seed, read=read)
    return (
        together(strategy, problems, numbers)
        if strategy.acceptance is None
        else _sequential(together, strategy, problems, numbers)
    )


def _together(
    context: RunContext,
    params: Hyperparameters,
    strategy: Strategy,
    problems: Sequence[Problem],
    numbers: Sequence[int],
    seed: int,
    read: Sequence[int],
) -> Outcome:
    """Samples all runs of a strategy in one batch."""
    samples = [Sample(problem, noise_seed(problem, k, seed), k) for problem in problems for k in numbers]
    repeated = [s.problem for s in samples]
    config = context.sampler.config
    sampler = replace(context.sampler, config=replace(config, steps=strategy.length or config.steps))
    alive = torch.arange(strategy.seeds).expand(len(problems), -1)
    proba: dict[int, Tensor] = {}
    with ExitStack() as stack:
        steps = sorted({*strategy.reads, *read})
        reading = stack.enter_context(_reading(context, steps, repeated)) if steps else None
        if strategy.edit is not None:
            weigh = {"weigh": _weigh(context, params, repeated)} if strategy.weighs else {}
            stack.enter_context(strategy.edit(sampler.model, **weigh))

        def filter_batch(step: int) -> list[int] | None:
            nonlocal alive
            if reading is not None and step in steps:
                proba[step] = reading(step).unflatten(0, alive.shape)
            if step not in strategy.cuts or strategy.cuts[step].kept == alive.shape[1]:
                return None
            cut = strategy.cuts[step]
            chosen = cut.choose(proba[step] if cut.reads else torch.zeros(*alive.shape, 1))
            at = (torch.arange(len(alive))[:, None] * alive.shape[1] + chosen).flatten().tolist()
            alive = alive.gather(1, chosen)
            if reading is not None:
                reading.keep(at)
            return at

        video = np.asarray(sampler(samples, filter_batch=filter_batch if strategy.cuts or steps else None))
    return _outcome(sampler.task, strategy, problems, alive, video, proba)


def _sequential(
    together: Callable[..., Outcome], strategy: Strategy, problems: Sequence[Problem], numbers: Sequence[int]
) -> Outcome:
    """Makes runs one after another: in each round, one run of every problem that has no accepted video yet."""
    size, active = (len(problems), len(numbers)), torch.arange(len(problems))
    clips: dict[tuple[int, int], np.ndarray] = {}
    for at, number in enumerate(numbers):
        one = together(
            Strategy(1, only, acceptance_steps=strategy.acceptance_steps), [problems[i] for i in active], [number]
        )
        if not at:  # allocated for the largest number of runs
            answers, scores = torch.full(size, -1), torch.full((*size, one.finished.scores.shape[-1]), torch.nan)
            proba = {step: torch.full((*size, read.shape[-1]), torch.nan) for step, read in one.proba.items()}
        answers[active, at], scores[active, at] = one.finished.answers[:, 0], one.finished.scores[:, 0]
        for step, read in one.proba.items():
            proba[step][active, at] = read[:, 0]
        clips |= {(int(i), at): clip for i, clip in zip(active, one.video, strict=True)}
        so_far = Finished(answers[active, : at + 1], scores[active, : at + 1])
        active = active[
            ~strategy.accepted(so_far, [proba[step][active, : at + 1] for step in strategy.acceptance_steps])
        ]
        if not len(active):
            break
    finished, rows = Finished(answers, scores), torch.arange(len(problems))
    begun, run = sequential(strategy, finished, [proba[step] for step in strategy.acceptance_steps])
    shares = [disagreement(some[None, :n])[0] for some, n in zip(answers, begun.tolist(), strict=True)]
    apart = torch.where(begun > 1, torch.stack(shares), torch.nan)
    video = np.stack([clips[i, at] for i, at in enumerate(run.tolist())])
    return Outcome(answers[rows, run], run, begun, apart, video, finished, proba)


def _outcome(
    task: Task,
    strategy: Strategy,
    problems: Sequence[Problem],
    alive: Tensor,
    video: np.ndarray,
    proba: dict[int, Tensor],
) -> Outcome:
    """Parses the finished videos and picks one for each problem."""
    clips = video.reshape(*alive.shape, *video.shape[1:])
    read = [[task.parse(p, clip) for clip in runs] for p, runs in zip(problems, clips, strict=True)]
    finished = Finished(
        torch.tensor([[-1 if r.answer is None else r.answer for r in runs] for runs in read]),
        torch.tensor([[r.scores for r in runs] for runs in read], dtype=torch.float32),
    )
    at = strategy.pick(finished)
    rows = torch.arange(len(problems))
    if strategy.finished > 1:
        apart = disagreement(finished.answers)
    elif strategy.reads and strategy.seeds > 1:
        apart = disagreement(proba[strategy.reads[0]].argmax(dim=-1))
    else:
        apart = torch.full((len(problems),), torch.nan)
    begun, video = torch.full_like(at, strategy.seeds), clips[rows.numpy(), at.numpy()]
    return Outcome(finished.answers[rows, at], alive[rows, at], begun, apart, video, finished, proba)


class _Reading:
    """Reads probes during a captured call; `keep` drops samples together with the batch of the call."""

    def __init__(self, scorer: ProbeScorer, cache: ActivationCache, pooling: Pooling, samples: Sequence[Problem]):
        self.scorer, self.cache, self.pooling, self.samples = scorer, cache, pooling, list(samples)

    def __call__(self, step: int) -> Float[Tensor, "sample candidate"]:
        self.cache.wait()
        cells = {name: self.scorer.cell(name, step) for name in self.scorer.accuracy}
        return self.scorer.read(cells, self.samples, self.cache.at)

    def keep(self, at: list[int]) -> None:
        self.samples = [self.samples[i] for i in at]
        if isinstance(self.pooling.boxes, list):  # the list that pools the next step
            self.pooling.boxes[:] = [self.pooling.boxes[i] for i in at]


@contextmanager
def _reading(context: RunContext, steps: Sequence[int], samples: Sequence[Problem]) -> Iterator[_Reading]:
    """Captures the layers that the probes need at some steps."""
    scorer = context.scorer
    assert scorer is not None
    names = sorted({scorer.target(p) for p in samples})
    layers = sorted({scorer.cell(name, step).layer for name in names for step in steps})
    pooling = scorer.pooling(samples)
    with capture(context.sampler.model, list(map(str, layers)), pooling, ",".join(map(str, steps))) as cache:
        yield _Reading(scorer, cache, pooling, samples)


def _weigh(context: RunContext, params: Hyperparameters, samples: Sequence[Problem]) -> Callable[..., Tensor]:
    """Weights of samples for an average: highest probability of the probe at the averaged layer minus that of a
    guess."""
    scorer = context.scorer
    assert scorer is not None
    pooling = scorer.pooling(samples)
    names = sorted({scorer.target(p) for p in samples})
    table = {(s, n): {t: scorer.cell(t, s, n) for t in names} for s in params.steps or (0,) for n in params.layers}

    def weigh(step: int, layer: int, tokens: Tensor, size: tuple[int, int, int]) -> Float[Tensor, " batch"]:
        pooled, positions = pooling(tokens, size).cpu(), pooling.positions(size)
        proba = scorer.read(table[step, layer], samples, lambda cell: pooled[:, positions.index(cell.position)])
        return (proba.amax(dim=-1) - 1 / proba.shape[-1]).clamp_min(0)

    return weigh
