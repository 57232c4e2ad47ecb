"""Ways to get one answer from several noise seeds: each a small function from a plan to a course.

A course says what is averaged while the runs of a problem share a batch, which of them go on after which step, and
which finished video is returned. Everything that decides is a function of probe readings and readouts alone, so a
course without an edit can be run (`ensemble.run`) or replayed on records of whole runs (`replay`), with the
same result. Seeds are exchangeable: the order they are given in decides nothing, but for `hidden`, `x0`, `latent`
and `probe_weighted`, where the first seed is the run that goes on, and for `retry` and `probe_retry`, which run them
one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from cosprobe.activations import BACK, average_blocks, average_clean, average_latents
from cosprobe.errors import InputError

Probabilities = Float[Tensor, "problem seed candidate"]
Credit = Callable[["Finished", list[Probabilities]], Float[Tensor, "problem seed"]]


@dataclass(frozen=True)
class Plan:
    """How a method goes about it.

    seeds: noise seeds of each problem, K. steps: step indices at which it averages, reads probes or drops runs; None:
    the method's own. layers: the window of `hidden` and `probe_weighted` (block indices). back: whether a mean is
    written back into the `first` seed's run, which goes on alone, or into `all`, which then vote. length: sampler
    steps of `single`, 0 for as many network evaluations as K whole runs. Raises ValueError for what cannot be.
    """

    seeds: int = 3
    steps: tuple[int, ...] | None = None
    layers: tuple[int, ...] = ()
    back: str = "first"
    length: int = 0

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise InputError(f"seeds={self.seeds}: expected at least 2; one seed is no ensemble, use method='single'")
        if self.back not in BACK:
            raise InputError(f"back={self.back!r}: expected one of {', '.join(BACK)}")
        if self.steps is not None and (not self.steps or min(self.steps) < 0 or len(set(self.steps)) < len(self.steps)):
            raise InputError(f"steps={list(self.steps)}: expected step indices from 0 on, each once")


@dataclass(frozen=True)
class Finished:
    """What the runs of each problem that were finished show: the answer read, -1 for none, and forced-choice scores."""

    answers: Int[Tensor, "problem seed"]
    scores: Float[Tensor, "problem seed candidate"]


@dataclass(frozen=True)
class Cut:
    """After a step, `kept` runs of each problem go on, those `choose` names; with `reads`, by probe readings."""

    kept: int
    choose: Callable[[Probabilities], Int[Tensor, "problem kept"]]
    reads: bool = True


@dataclass(frozen=True)
class Course:
    """seeds: runs of each problem at the start. cuts: by step index. edit: called with the pipeline and, for a
    weighted mean, what weighs the samples. pick: which of the runs left is returned. length: sampler steps where
    they are not the pipeline's own. credit: with it the runs of a problem are made one after another, `seeds` at most,
    until a video has a credit of 1; called with the videos so far and, for each step of `asks`, the readings so far.
    """

    seeds: int
    pick: Callable[[Finished], Int[Tensor, " problem"]]
    cuts: dict[int, Cut] = field(default_factory=dict)
    edit: Callable[..., AbstractContextManager] | None = None
    weighs: bool = False
    length: int = 0
    credit: Credit | None = None
    asks: tuple[int, ...] = ()

    @property
    def reads(self) -> tuple[int, ...]:
        """Step indices at which probes are read to decide which runs go on, or whether another is made."""
        return tuple(sorted({*self.asks, *(step for step, cut in self.cuts.items() if cut.reads)}))

    def enough(self, finished: Finished, proba: list[Probabilities]) -> Bool[Tensor, " problem"]:
        """Where the last of the runs made so far has the credit that ends the making of runs."""
        assert self.credit is not None
        return self.credit(finished, proba)[:, -1] >= 1

    def evaluations(self, steps: int) -> int:
        """Whole steps run for one problem, those of all its seeds together, by a sampler of `steps` steps; at most
        so many where runs are made one after another."""
        alive, total = self.seeds, 0
        for step in range(self.length or steps):
            total += alive
            alive = self.cuts[step].kept if step in self.cuts else alive
        return total

    @property
    def finished(self) -> int:
        """Runs of each problem that are decoded."""
        return min([self.seeds, *(cut.kept for cut in self.cuts.values())])


def surest(proba: Probabilities, kept: int = 1) -> Int[Tensor, "problem kept"]:
    """The runs whose probe gives its answer the highest probability."""
    return proba.amax(dim=-1).topk(kept, dim=1).indices


def agreeing(proba: Probabilities, kept: int = 1) -> Int[Tensor, "problem kept"]:
    """The runs that believe most in what all probes together, averaged over seeds, take for the answer."""
    answer = proba.mean(dim=1).argmax(dim=-1)
    belief = proba.gather(2, answer[:, None, None].expand(-1, proba.shape[1], 1))[..., 0]
    return belief.topk(kept, dim=1).indices


def foremost(proba: Probabilities) -> Int[Tensor, "problem 1"]:
    """The first seed: the run that means were written into."""
    return torch.zeros(len(proba), 1, dtype=torch.long)


def only(finished: Finished) -> Int[Tensor, " problem"]:
    """The run that is left."""
    return torch.zeros(len(finished.answers), dtype=torch.long)


def most_confident(finished: Finished) -> Int[Tensor, " problem"]:
    """The video whose best candidate is furthest ahead of the second by forced-choice score; one that settles on no
    candidate only where all are such."""
    return _rank(finished.answers >= 0, margin(finished.scores)).argmax(dim=1)


def majority(finished: Finished) -> Int[Tensor, " problem"]:
    """The most confident of the videos that show the answer most of them show. Between answers with as many videos
    the scores of all videos decide; videos that settle on none have no vote unless all are such."""
    counts = one_hot(finished.answers + 1, finished.scores.shape[-1] + 1).sum(dim=1)[:, 1:]
    winner = _rank(counts, finished.scores.sum(dim=1)).argmax(dim=1)
    return _rank(finished.answers == winner[:, None], margin(finished.scores)).argmax(dim=1)


def margin(scores: Float[Tensor, "*any candidate"]) -> Float[Tensor, "*any"]:
    """How far the best forced-choice score is above the second."""
    two = scores.topk(2, dim=-1).values
    return two[..., 0] - two[..., 1]


def shown(finished: Finished, proba: list[Probabilities]) -> Float[Tensor, "problem seed"]:
    """1 for a video that shows an answer, 0 for one that settles on none."""
    return (finished.answers >= 0).float()


def believed(finished: Finished, proba: list[Probabilities]) -> Float[Tensor, "problem seed"]:
    """How much more than a guess the probes, averaged over the runs so far, believe in what each video shows: 1 is as
    much as a guess; 0 for a video that settles on no candidate."""
    (read,) = proba
    belief = read.mean(dim=1).gather(1, finished.answers.clamp_min(0)) * read.shape[-1]
    return torch.where(finished.answers >= 0, belief, torch.zeros_like(belief))


def in_turn(
    path: Course, finished: Finished, proba: list[Probabilities]
) -> tuple[Int[Tensor, " problem"], Int[Tensor, " problem"]]:
    """Of runs made one after another how many are begun, and which of them is returned: the first with a credit of 1,
    else the one with the highest. finished, proba (for each step of `path.asks`): of all that may be made; runs behind
    the one that ended the making of runs do not count."""
    assert path.credit is not None
    count = finished.answers.shape[1]
    begun = torch.full((len(finished.answers),), count)
    run = path.credit(finished, proba).argmax(dim=1)
    for made in range(count, 0, -1):
        so_far = Finished(finished.answers[:, :made], finished.scores[:, :made])
        enough = path.enough(so_far, [read[:, :made] for read in proba])
        begun, run = torch.where(enough, made, begun), torch.where(enough, made - 1, run)
    return begun, run


def disagreement(answers: Int[Tensor, "problem seed"]) -> Float[Tensor, " problem"]:
    """Share of a problem's seeds that do not give its most frequent answer, from 0 to below 1."""
    return 1 - one_hot(answers + 1).sum(dim=1).amax(dim=1) / answers.shape[1]


def _rank(first: Tensor, then: Tensor) -> Tensor:
    """A number that orders a row by `first` and, where that is equal, by `then`."""
    return first.long() * then.shape[-1] + then.argsort(dim=-1).argsort(dim=-1)


def single(plan: Plan, steps: int) -> Course:
    """One run with more sampler steps: what the same evaluations give without an ensemble."""
    return Course(1, only, length=plan.length or plan.seeds * steps)


def hidden(plan: Plan, steps: int) -> Course:
    """Averages the hidden states of a window of layers at some steps (arXiv 2603.16870; first step, middle layers)."""
    return _averaged(plan, partial(average_blocks, layers=plan.layers))


def x0(plan: Plan, steps: int) -> Course:
    """Averages the clean estimates at some steps."""
    return _averaged(plan, average_clean)


def latent(plan: Plan, steps: int) -> Course:
    """Averages the noisy latents after some steps."""
    return _averaged(plan, average_latents)


def probe_weighted(plan: Plan, steps: int) -> Course:
    """`hidden`, each seed weighing as much as its probe at that layer is surer than a guess."""
    return _averaged(plan, partial(average_blocks, layers=plan.layers), weighs=True)


def vote(plan: Plan, steps: int) -> Course:
    """Finishes all runs; the answer most of them draw."""
    return Course(plan.seeds, majority)


def best_of(plan: Plan, steps: int) -> Course:
    """Finishes all runs; the video that shows its answer most clearly."""
    return Course(plan.seeds, most_confident)


def probe_best(plan: Plan, steps: int) -> Course:
    """Runs all seeds to an early step and goes on with the one whose probe is surest."""
    return Course(plan.seeds, only, {_last(plan): Cut(1, surest)})


def probe_vote(plan: Plan, steps: int) -> Course:
    """Averages the early probes of all seeds and goes on with the run that agrees most with what they say."""
    return Course(plan.seeds, only, {_last(plan): Cut(1, agreeing)})


def prune(plan: Plan, steps: int) -> Course:
    """Successive halving: after each of some steps the surer half of the runs goes on, after the last of them one."""
    cuts, alive = {}, plan.seeds
    at = sorted(plan.steps or range(min(steps, (plan.seeds - 1).bit_length())))
    for step in at:
        alive = 1 if step == at[-1] else -(-alive // 2)
        cuts[step] = Cut(alive, partial(surest, kept=alive))
    return Course(plan.seeds, only, cuts)


def retry(plan: Plan, steps: int) -> Course:
    """One run after another until a video shows an answer."""
    return Course(plan.seeds, only, credit=shown)


def probe_retry(plan: Plan, steps: int) -> Course:
    """One run after another until a video shows what the early probes believe in more than a guess."""
    return Course(plan.seeds, only, credit=believed, asks=(_last(plan),))


METHODS: dict[str, Callable[[Plan, int], Course]] = {
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

    The third quarter is called `middle` as the paper does (20 to 29 of 40). Every quarter has at least one block.
    """
    edges = [depth * i // 4 for i in range(5)]
    parts = {n: tuple(range(a, max(a + 1, b))) for n, (a, b) in zip(QUARTERS, pairwise(edges), strict=True)}
    return parts | {"all": tuple(range(depth))}


def course(method: str, plan: Plan, steps: int) -> Course:
    """The course of a method for a sampler of `steps` steps.

    Raises ValueError for an unknown method, and for steps that the sampler does not reach.
    """
    if method not in METHODS:
        raise InputError(f"method={method!r}: expected one of {', '.join(METHODS)}")
    if plan.steps and max(plan.steps) >= steps:
        raise InputError(f"steps={list(plan.steps)}: expected step indices from 0 to {steps - 1}")
    if method in WINDOWED and not plan.layers:
        raise InputError(f"method={method!r}: expected a window of layers to average, such as layers=(2, 3)")
    return METHODS[method](plan, steps)


def replay(
    path: Course, finished: Finished, proba: dict[int, Probabilities]
) -> tuple[Int[Tensor, " problem"], Int[Tensor, " problem"], Int[Tensor, " problem"]]:
    """What a course without an edit returns, from records of all runs finished: the answer of each problem, which of
    its seeds gave it, and how many runs of it were begun. proba: probe readings of all seeds by step index.

    Raises ValueError for a course that changes its runs: what it returns is in no record.
    """
    if path.edit is not None or path.length:
        raise InputError("this course changes what its runs compute: expected one that only chooses among them")
    if path.credit is not None:
        begun, run = in_turn(path, finished, [proba[step] for step in path.asks])
        return finished.answers.gather(1, run[:, None])[:, 0], run, begun
    alive = torch.arange(path.seeds).expand(len(finished.answers), -1)
    for step in sorted(path.cuts):
        here = proba[step].gather(1, _along(alive, proba[step])) if path.cuts[step].reads else _blank(alive)
        alive = alive.gather(1, path.cuts[step].choose(here))
    left = Finished(finished.answers.gather(1, alive), finished.scores.gather(1, _along(alive, finished.scores)))
    run = alive.gather(1, path.pick(left)[:, None])
    return finished.answers.gather(1, run)[:, 0], run[:, 0], torch.full((len(run),), path.seeds)


def _averaged(plan: Plan, average: Callable[..., Any], weighs: bool = False) -> Course:
    steps = plan.steps or (0,)
    edit = partial(average, group=plan.seeds, steps=steps, back=plan.back)
    if plan.back == "all":
        return Course(plan.seeds, majority, edit=edit, weighs=weighs)
    # once the last mean is in the first run, nothing of the others is needed
    return Course(plan.seeds, only, {max(steps): Cut(1, foremost, reads=False)}, edit, weighs)


def _last(plan: Plan) -> int:
    return max(plan.steps or (0,))


def _along(places: Int[Tensor, "problem kept"], values: Float[Tensor, "problem seed candidate"]) -> Tensor:
    return places[..., None].expand(-1, -1, values.shape[-1])


def _blank(alive: Int[Tensor, "problem seed"]) -> Probabilities:
    """No readings, for a choice that needs none."""
    return torch.zeros(*alive.shape, 1)
