"""Strategies that get one answer from several noise seeds.

A strategy defines what is averaged over the runs of a problem, which runs go on after which step, and which finished
video is returned. These decisions depend on probabilities of probes and on parsed answers only. A strategy that
averages nothing therefore gives the same result when it is run (`run.run`) and when it is replayed on whole runs
(`replay`).

The order of the seeds does not matter, with two exceptions: `hidden`, `x0`, `latent` and `probe_weighted` continue the
run of the first seed, and `retry` and `probe_retry` make runs one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from cosprobe.activations import BACK, average_blocks, average_clean, average_latents
from cosprobe.errors import InputError

Probabilities = Float[Tensor, "problem seed candidate"]  # at one step
AcceptanceScore = Callable[["Finished", list[Probabilities]], Float[Tensor, "problem seed"]]


@dataclass(frozen=True)
class Hyperparameters:
    """Hyperparameters of a strategy.

    seeds: number of noise seeds of each problem, K.
    steps: step indices at which the strategy averages, reads probes or drops runs; None: its default.
    layers: block indices that `hidden` and `probe_weighted` average.
    back: which runs an average is written into: `first` (the run of the first seed, which alone goes on) or `all` (all
    runs, which then vote).
    length: number of sampler steps of `single`; 0: as many network evaluations as K whole runs.
    Raises InputError for fewer than two seeds, an unknown `back`, and negative or repeated steps.
    """

    seeds: int = 3
    steps: tuple[int, ...] | None = None
    layers: tuple[int, ...] = ()
    back: str = "first"
    length: int = 0

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise InputError(f"seeds={self.seeds}: expected at least 2; for one seed use strategy='single'")
        if self.back not in BACK:
            raise InputError(f"back={self.back!r}: expected one of {', '.join(BACK)}")
        if self.steps is not None and (not self.steps or min(self.steps) < 0 or len(set(self.steps)) < len(self.steps)):
            raise InputError(f"steps={list(self.steps)}: expected step indices from 0 on, each once")


@dataclass(frozen=True)
class Finished:
    """Answers parsed from the finished videos (-1 for no answer), and the parser's score of every candidate."""

    answers: Int[Tensor, "problem seed"]
    scores: Float[Tensor, "problem seed candidate"]


@dataclass(frozen=True)
class Cut:
    """After a step, only the `kept` runs that `choose` returns go on. reads: whether `choose` needs probabilities."""

    kept: int
    choose: Callable[[Probabilities], Int[Tensor, "problem kept"]]
    reads: bool = True


@dataclass(frozen=True)
class Strategy:
    """Defines how the runs of a problem are sampled and which video is returned.

    seeds: number of runs at the start.
    pick: returns the run whose video is returned.
    cuts: by step index, which runs go on.
    edit: context manager that averages. It is called with the pipeline and, for a weighted mean (`weighs`), with a
    function that returns the weights of samples.
    length: number of sampler steps, 0 for that of the pipeline.
    acceptance: if given, runs of a problem are made one after another, at most `seeds`, until the acceptance score of a
    video is at least 1. It is called with the videos so far and their probabilities at each of `acceptance_steps`.
    """

    seeds: int
    pick: Callable[[Finished], Int[Tensor, " problem"]]
    cuts: dict[int, Cut] = field(default_factory=dict)
    edit: Callable[..., AbstractContextManager] | None = None
    weighs: bool = False
    length: int = 0
    acceptance: AcceptanceScore | None = None
    acceptance_steps: tuple[int, ...] = ()

    @property
    def reads(self) -> tuple[int, ...]:
        """Step indices at which probes are read."""
        return tuple(sorted({*self.acceptance_steps, *(step for step, cut in self.cuts.items() if cut.reads)}))

    def accepted(self, finished: Finished, proba: list[Probabilities]) -> Bool[Tensor, " problem"]:
        """Whether the last run so far is accepted, so that no further run is made."""
        assert self.acceptance is not None
        return self.acceptance(finished, proba)[:, -1] >= 1

    def evaluations(self, steps: int) -> int:
        """Network evaluations of all runs of one problem, for a sampler of `steps` steps.

        The maximum, for a strategy that makes runs one after another.
        """
        alive, total = self.seeds, 0
        for step in range(self.length or steps):
            total += alive
            alive = self.cuts[step].kept if step in self.cuts else alive
        return total

    @property
    def finished(self) -> int:
        """Number of runs of each problem that are finished and decoded."""
        return min([self.seeds, *(cut.kept for cut in self.cuts.values())])


def surest(proba: Probabilities, kept: int = 1) -> Int[Tensor, "problem kept"]:
    """The `kept` runs whose most probable answer has the highest probability."""
    return proba.amax(dim=-1).topk(kept, dim=1).indices


def agreeing(proba: Probabilities, kept: int = 1) -> Int[Tensor, "problem kept"]:
    """The `kept` runs with the highest probability of the answer that is most probable on average over seeds."""
    answer = proba.mean(dim=1).argmax(dim=-1)
    of_answer = proba.gather(2, answer[:, None, None].expand(-1, proba.shape[1], 1))[..., 0]
    return of_answer.topk(kept, dim=1).indices


def first_run(proba: Probabilities) -> Int[Tensor, "problem 1"]:
    """The run of the first seed, which averages are written into."""
    return torch.zeros(len(proba), 1, dtype=torch.long)


def only(finished: Finished) -> Int[Tensor, " problem"]:
    """The only run that is left."""
    return torch.zeros(len(finished.answers), dtype=torch.long)


def most_confident(finished: Finished) -> Int[Tensor, " problem"]:
    """The video with the largest margin between its two highest scores.

    A video without an answer is returned only if no video has an answer.
    """
    return _rank(finished.answers >= 0, margin(finished.scores)).argmax(dim=1)


def majority(finished: Finished) -> Int[Tensor, " problem"]:
    """The video with the largest margin among those that show the most frequent answer.

    If answers are equally frequent, the one with the larger sum of scores over all videos wins. Videos without an
    answer do not vote. If no video has an answer, the sums of scores decide.
    """
    counts = one_hot(finished.answers + 1, finished.scores.shape[-1] + 1).sum(dim=1)[:, 1:]
    winner = _rank(counts, finished.scores.sum(dim=1)).argmax(dim=1)
    return _rank(finished.answers == winner[:, None], margin(finished.scores)).argmax(dim=1)


def margin(scores: Float[Tensor, "*any candidate"]) -> Float[Tensor, "*any"]:
    """The highest score minus the second highest."""
    two = scores.topk(2, dim=-1).values
    return two[..., 0] - two[..., 1]


def answered(finished: Finished, proba: list[Probabilities]) -> Float[Tensor, "problem seed"]:
    """Acceptance score: 1 for a video with an answer, 0 for a video without one."""
    return (finished.answers >= 0).float()


def supported(finished: Finished, proba: list[Probabilities]) -> Float[Tensor, "problem seed"]:
    """Acceptance score: the probability of the video's answer, averaged over the runs so far, relative to a guess.

    It is the mean probability times the number of candidates; 0 for a video without an answer.
    """
    (read,) = proba
    support = read.mean(dim=1).gather(1, finished.answers.clamp_min(0)) * read.shape[-1]
    return torch.where(finished.answers >= 0, support, torch.zeros_like(support))


class Turns(NamedTuple):
    """Runs of each problem made one after another. begun: their number. run: index of the one that is returned."""

    begun: Int[Tensor, " problem"]
    run: Int[Tensor, " problem"]


def sequential(strategy: Strategy, finished: Finished, proba: list[Probabilities]) -> Turns:
    """Which runs a strategy makes one after another.

    The first run with an acceptance score of at least 1 is returned; if there is none, the run with the highest score.
    finished, proba: of all runs that can be made, proba for each step of `strategy.acceptance_steps`. Runs after the
    accepted one are not used.
    """
    assert strategy.acceptance is not None
    count = finished.answers.shape[1]
    begun = torch.full((len(finished.answers),), count)
    run = strategy.acceptance(finished, proba).argmax(dim=1)
    for made in range(count, 0, -1):
        so_far = Finished(finished.answers[:, :made], finished.scores[:, :made])
        enough = strategy.accepted(so_far, [read[:, :made] for read in proba])
        begun, run = torch.where(enough, made, begun), torch.where(enough, made - 1, run)
    return Turns(begun, run)


def disagreement(answers: Int[Tensor, "problem seed"]) -> Float[Tensor, " problem"]:
    """Share of a problem's seeds that do not give its most frequent answer, from 0 to below 1."""
    return 1 - one_hot(answers + 1).sum(dim=1).amax(dim=1) / answers.shape[1]


def _rank(first: Tensor, then: Tensor) -> Tensor:
    """A number that orders a row by `first` and, where that is equal, by `then`."""
    return first.long() * then.shape[-1] + then.argsort(dim=-1).argsort(dim=-1)


def single(params: Hyperparameters, steps: int) -> Strategy:
    """One run with more sampler steps: as many network evaluations as an ensemble of whole runs."""
    return Strategy(1, only, length=params.length or params.seeds * steps)


def hidden(params: Hyperparameters, steps: int) -> Strategy:
    """Averages hidden states over seeds, in a window of layers at some steps (arXiv 2603.16870: first step, middle)."""
    return _averaged(params, partial(average_blocks, layers=params.layers))


def x0(params: Hyperparameters, steps: int) -> Strategy:
    """Averages x0-hat over seeds at some steps."""
    return _averaged(params, average_clean)


def latent(params: Hyperparameters, steps: int) -> Strategy:
    """Averages the noisy latents over seeds after some steps."""
    return _averaged(params, average_latents)


def probe_weighted(params: Hyperparameters, steps: int) -> Strategy:
    """`hidden` with weights: highest probability of the probe for each seed minus the probability of a guess."""
    return _averaged(params, partial(average_blocks, layers=params.layers), weighs=True)


def vote(params: Hyperparameters, steps: int) -> Strategy:
    """Finishes all runs and returns a video with the most frequent answer."""
    return Strategy(params.seeds, majority)


def best_of(params: Hyperparameters, steps: int) -> Strategy:
    """Finishes all runs and returns the video with the largest margin."""
    return Strategy(params.seeds, most_confident)


def probe_best(params: Hyperparameters, steps: int) -> Strategy:
    """Runs all seeds up to an early step; only the run with the highest probability goes on."""
    return Strategy(params.seeds, only, {_last(params): Cut(1, surest)})


def probe_vote(params: Hyperparameters, steps: int) -> Strategy:
    """Runs all seeds up to an early step; only the run that agrees most with the mean probabilities goes on."""
    return Strategy(params.seeds, only, {_last(params): Cut(1, agreeing)})


def prune(params: Hyperparameters, steps: int) -> Strategy:
    """Successive halving: after each of `steps`, half of the runs go on, and after the last of them one run.

    Runs with the highest probability are kept.
    """
    cuts, alive = {}, params.seeds
    at = sorted(params.steps or range(min(steps, (params.seeds - 1).bit_length())))
    for step in at:
        alive = 1 if step == at[-1] else -(-alive // 2)
        cuts[step] = Cut(alive, partial(surest, kept=alive))
    return Strategy(params.seeds, only, cuts)


def retry(params: Hyperparameters, steps: int) -> Strategy:
    """Makes one run after another until a video shows an answer."""
    return Strategy(params.seeds, only, acceptance=answered)


def probe_retry(params: Hyperparameters, steps: int) -> Strategy:
    """Makes one run after another until probes at an early step support the video's answer more than a guess."""
    return Strategy(params.seeds, only, acceptance=supported, acceptance_steps=(_last(params),))


STRATEGIES: dict[str, Callable[[Hyperparameters, int], Strategy]] = {
    f.__name__: f
    for f in (
        single, hidden, x0, latent, vote, best_of, retry, probe_best, probe_weighted, prune, probe_vote, probe_retry
    )
}  # fmt: skip
PROBES = ("probe_best", "probe_weighted", "prune", "probe_vote", "probe_retry")
QUARTERS = ("early", "second", "middle", "late")
WINDOWED = ("hidden", "probe_weighted")


def windows(depth: int) -> dict[str, tuple[int, ...]]:
    """Windows of layers of a model with `depth` blocks: `early`, `second`, `middle`, `late` quarter, and `all`.

    The third quarter is called `middle`, as in arXiv 2603.16870 (20 to 29 of 40). Every quarter has at least one block.
    """
    edges = [depth * i // 4 for i in range(5)]
    parts = {n: tuple(range(a, max(a + 1, b))) for n, (a, b) in zip(QUARTERS, pairwise(edges), strict=True)}
    return parts | {"all": tuple(range(depth))}


def build_strategy(name: str, params: Hyperparameters, steps: int) -> Strategy:
    """The strategy of this name, for a sampler of `steps` steps.

    Raises InputError for an unknown name, steps beyond the last one, or an average without layers.
    """
    if name not in STRATEGIES:
        raise InputError(f"strategy={name!r}: expected one of {', '.join(STRATEGIES)}")
    if params.steps and max(params.steps) >= steps:
        raise InputError(f"steps={list(params.steps)}: expected step indices from 0 to {steps - 1}")
    if name in WINDOWED and not params.layers:
        raise InputError(f"strategy={name!r}: expected a window of layers to average, such as layers=(2, 3)")
    return STRATEGIES[name](params, steps)


class Replayed(NamedTuple):
    """Result of a strategy. run: index of the seed the answer comes from. begun: number of runs that were begun."""

    answers: Int[Tensor, " problem"]
    run: Int[Tensor, " problem"]
    begun: Int[Tensor, " problem"]


def replay(strategy: Strategy, finished: Finished, proba: dict[int, Probabilities]) -> Replayed:
    """Computes the result of a strategy from whole runs of all seeds. proba: of all seeds, by step index.

    Raises InputError for a strategy that averages or has another number of steps, because its runs differ from these.
    """
    if strategy.edit is not None or strategy.length:
        raise InputError(
            "this strategy changes what its runs compute: expected one that only selects among finished runs"
        )
    if strategy.acceptance is not None:
        begun, run = sequential(strategy, finished, [proba[step] for step in strategy.acceptance_steps])
        return Replayed(finished.answers.gather(1, run[:, None])[:, 0], run, begun)
    alive = torch.arange(strategy.seeds).expand(len(finished.answers), -1)
    for step in sorted(strategy.cuts):
        here = proba[step].gather(1, _along(alive, proba[step])) if strategy.cuts[step].reads else _blank(alive)
        alive = alive.gather(1, strategy.cuts[step].choose(here))
    left = Finished(finished.answers.gather(1, alive), finished.scores.gather(1, _along(alive, finished.scores)))
    run = alive.gather(1, strategy.pick(left)[:, None])
    begun = torch.full((len(run),), strategy.seeds)
    return Replayed(finished.answers.gather(1, run)[:, 0], run[:, 0], begun)


def _averaged(params: Hyperparameters, average: Callable[..., Any], weighs: bool = False) -> Strategy:
    steps = params.steps or (0,)
    edit = partial(average, group=params.seeds, steps=steps, back=params.back)
    if params.back == "all":
        return Strategy(params.seeds, majority, edit=edit, weighs=weighs)
    # after the last average only the first run is needed
    return Strategy(params.seeds, only, {max(steps): Cut(1, first_run, reads=False)}, edit, weighs)


def _last(params: Hyperparameters) -> int:
    return max(params.steps or (0,))


def _along(positions: Int[Tensor, "problem kept"], values: Float[Tensor, "problem seed candidate"]) -> Tensor:
    return positions[..., None].expand(-1, -1, values.shape[-1])


def _blank(alive: Int[Tensor, "problem seed"]) -> Probabilities:
    """Placeholder for probabilities at steps where probes are not read."""
    return torch.zeros(*alive.shape, 1)
