"""Self-correction against a sampled null: the same x0-hat, with fresh noise, goes on to the end.

A run whose x0-hat is wrong at an early step may end on the right answer. That is a correction by the run only if it is
rarer when the same x0-hat is noised again to the same level with fresh noise, and sampled to the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped

from cosprobe.activations import (
    ActivationStore,
    FrozenSampling,
    Pooling,
    Sampled,
    Sampler,
    Shard,
    announce,
    capture,
    predict_shards,
    watch,
)
from cosprobe.behaviour.answers import NONE
from cosprobe.behaviour.findings import CORRECTION, DESCRIBED, LEAST_CHANGES, Example, Finding, finding, without_numbers
from cosprobe.causal import Edit, patch, recorded, replayed
from cosprobe.cells import X0, parse_selection
from cosprobe.config import BehaviourConfig
from cosprobe.errors import InputError
from cosprobe.evaluation import UNTESTED, Claim, clearest_either_way, share_interval
from cosprobe.probes import ProbeBank
from cosprobe.reporting import Film, film_row
from cosprobe.runtime import say
from cosprobe.tasks import Problem, Sample, TaskConfig, fresh_problems, with_noise

FOLDER = "continuations"  # in the folder of a result
STEPS = 3  # number of steps, if none are given
FILMED = 4  # examples in the contact sheet


@dataclass(frozen=True, eq=False)
class Continuations:
    """What x0-hat shows at a few steps, and where runs end that go on from there. Answers: -1 for none.

    steps: step indices. problems: of the samples. shown, scores: answer and scores of the parser in x0-hat. clean:
    answer of the finished video. fresh: that of the video that goes on from the same x0-hat with fresh noise.
    solutions: which candidates are right; the last column, for no answer, is False.
    """

    kind: str
    steps: tuple[int, ...]
    problems: tuple[Problem, ...]
    shown: Int[np.ndarray, "sample step"]
    scores: Float[np.ndarray, "sample step candidate"]
    clean: Int[np.ndarray, " sample"]
    fresh: Int[np.ndarray, "sample step"]
    solutions: Bool[np.ndarray, "sample candidate_or_none"]

    @property
    def keys(self) -> Shaped[np.ndarray, " sample"]:
        """The problem of every sample."""
        return np.array([problem.key for problem in self.problems])

    def right(self, answers: Int[np.ndarray, "sample *step"]) -> Bool[np.ndarray, "sample *step"]:
        """Whether answers are right."""
        return np.stack([row[given] for row, given in zip(self.solutions, answers, strict=True)])


def sample_continuations(
    sampler: Sampler, task: TaskConfig, bank: ProbeBank, use: BehaviourConfig, seed: int, folder: Path
) -> list[Continuations]:
    """Samples new problems of every kind, and from their x0-hat at a few steps again with fresh noise.

    Answers are kept in `folder`, that of the result; what is there already is not sampled again. With several
    processes, all of them sample. Raises InputError for a task without a parser, and for steps that the run does not
    have or that no step follows.
    """
    if not sampler.task.candidates:
        raise InputError(
            f"use.problems={use.problems}: task {sampler.task.name!r} has no parser, so no answer can be read; "
            "expected 0"
        )
    total = sampler.config.steps
    steps = continued_steps(use.steps, bank.store.probe.steps_decoded(total), total)
    problems = fresh_problems(sampler.task, "test", task.problems, use.problems, sampler.task.kinds)
    evaluations = total + sum(total - step - 1 for step in steps)
    found, module = [], FreshContinuation(sampler, steps)
    for kind in dict.fromkeys(problem.kind for problem in problems):
        samples = with_noise([problem for problem in problems if problem.kind == kind], seed)
        identity: dict[str, Any] = bank.store.identity | {"continued": list(steps)}
        name = f"{kind}-{ActivationStore(folder, identity).fingerprint[:8]}"
        store = ActivationStore(folder / FOLDER / name, identity)
        names = [sample.name for sample in samples]
        absent = set(store.missing(names))
        what = f"{len(samples)} new problems, each once to the end and again from steps {', '.join(map(str, steps))}"
        announce(store, names, len(absent), 8 * len(samples) * (len(steps) * (2 + sampler.task.candidates) + 1), what)
        if absent:
            say(f"{kind}: {evaluations * len(absent)} network evaluations, {evaluations / total:.1f} runs of a problem")
        batches = sampler.batches([sample for sample in samples if sample.name in absent])
        shards = [Shard(store, {"": [sample.name for sample in batch]}, batch) for batch in batches]
        predict_shards(module, shards, [(store, names)], sampler.trainer)
        read = {key: values.numpy() for key, values in store.read(names=names)[0].items()}
        solutions = np.zeros((len(samples), sampler.task.candidates + 1), dtype=bool)
        for row, sample in zip(solutions, samples, strict=True):
            row[list(sampler.task.solutions(sample.problem))] = True
        found.append(Continuations(kind, steps, tuple(s.problem for s in samples), **read, solutions=solutions))
    return found


def continued_steps(given: str, decoded: Sequence[int], total: int) -> tuple[int, ...]:
    """The steps from which runs go on: those of `given`, or else the first STEPS decoded ones, or step 0.

    Raises InputError as `sample_continuations` does.
    """
    last = total - 1
    if not given:
        if not last:
            raise InputError("use.problems: runs of one step cannot go on from an x0-hat; expected use.problems=0")
        return tuple(step for step in decoded if step < last)[:STEPS] or (0,)
    steps = parse_selection(given, total, "use.steps")
    if last in steps:
        raise InputError(f"use.steps={given!r}: step {last} is the last one; expected steps that others follow")
    return steps


class FreshContinuation(FrozenSampling):
    """Samples batches to the end, and again from x0-hat at some steps with fresh noise, for `Trainer.predict`."""

    def __init__(self, sampler: Sampler, steps: Sequence[int]):
        super().__init__(sampler)
        self.steps = tuple(steps)

    @torch.no_grad()
    def predict_step(self, batch: Shard, index: int) -> Sampled:
        """shown, fresh [sample, step], scores [sample, step, candidate] and clean [sample], see `Continuations`.

        x0-hat of a step is noised again to the level of the next one. Steps before are those of the first run.
        """
        samples: list[Sample] = batch.content
        sampler, problems, seeds = self.sampler, [s.problem for s in samples], [s.seed for s in samples]
        with (
            capture(sampler.model, [X0], Pooling("clip"), "last", clean=self.steps) as cache,
            recorded(sampler.model) as prefix,
        ):
            video = sampler(samples)
        fresh = []
        for step in self.steps:
            renoised = Edit("noise", "renoised", (step + 1,))
            with replayed(sampler.model, prefix, step + 1), patch(sampler.model, [renoised], seeds=seeds):
                fresh.append(sampler.parse(problems, sampler(samples)).answers)
        shown = [sampler.parse(problems, sampler.decode(cache.clean[step])) for step in self.steps]
        return {
            "clean": sampler.parse(problems, video).answers,
            "fresh": torch.stack(fresh, dim=1),
            "shown": torch.stack([one.answers for one in shown], dim=1),
            "scores": torch.stack([one.scores for one in shown], dim=1).double(),
        }, {"steps": list(self.steps)}


# findings


def sampled_corrections(one: Continuations) -> list[Finding]:
    """How often the run and a fresh continuation from the same x0-hat change a wrong answer into the right one, draw
    the right one where x0-hat shows none, and lose the right one.

    Of several steps the clearest counts, with p and lower bound corrected for all of them. A claim has no verdict where
    the two differ on fewer than LEAST_CHANGES samples.
    """
    none, right = one.shown == NONE, one.right(one.shown)
    wrong = ~none & ~right
    end, fresh = one.right(one.clean)[:, None], one.right(one.fresh)
    same = (one.fresh == one.clean[:, None]).T.astype(float)
    ends = zip(same.mean(axis=1), *share_interval(same, one.keys), one.steps, strict=True)
    shares = ", ".join(f"{mean:.2f} [{lower:.2f}, {upper:.2f}] from step {step}" for mean, lower, upper, step in ends)
    described = without_numbers(
        CORRECTION, one.kind, "What x0-hat has fixed",
        f"share of fresh continuations that end on the answer of the run: {shares}", one.keys, DESCRIBED,
    )  # fmt: skip
    rest = "than a fresh continuation from the same x0-hat does"
    return [
        _against_fresh(one, f"The model corrects wrong answers more often {rest}", "wrong", wrong, wrong & end,
                       wrong & fresh),
        _against_fresh(one, f"The model comes from no answer to the right one more often {rest}", "none", none,
                       none & end, none & fresh),
        _against_fresh(one, f"The model loses right answers less often {rest}", "right", right, right & ~end,
                       right & ~fresh, -1),
        described,
    ]  # fmt: skip


def _against_fresh(
    one: Continuations,
    stated: str,
    name: str,
    begun: Bool[np.ndarray, "sample step"],
    changed: Bool[np.ndarray, "sample step"],
    fresh: Bool[np.ndarray, "sample step"],
    sign: int = 1,
) -> Finding:
    """Changes in the run minus changes in the fresh continuation, at every step. name, begun: what x0-hat shows, and
    where. sign: -1 where fewer changes are claimed."""
    difference = sign * (changed.astype(float) - fresh).T
    found, outcome = clearest_either_way(difference, one.keys)
    to = "lost" if sign < 0 else "right at the end"
    counts = "; ".join(
        f"step {step}: {shown} {name}, of these {own} {to}, with fresh noise {other}"
        for step, shown, own, other in zip(
            one.steps, begun.sum(axis=0), changed.sum(axis=0), fresh.sum(axis=0), strict=True
        )
    )
    few = np.count_nonzero(difference[found.at]) < LEAST_CHANGES
    several = f"clearest of {len(one.steps)} steps, " if len(one.steps) > 1 else ""
    chosen = f"step {one.steps[found.at]}, {several}p {found.p:.3f}"
    measure = f"{len(one.keys)} samples; {counts}; {chosen}{'; too few differ to tell' if few else ''}"
    claim = Claim(
        stated, measure, "fresh noise", found.value, found.lower, found.upper, UNTESTED if few else outcome
    )  # fmt: skip
    return finding(CORRECTION, one.kind, claim, one.keys)


# examples


def corrected(found: Sequence[Continuations]) -> list[Example]:
    """Samples whose x0-hat shows a wrong answer at some step and whose finished video shows a right one; the most
    clearly wrong first. Of several steps, the one that is most clearly wrong counts.

    How clearly: the highest score of the parser among wrong candidates, minus that among right ones.
    """
    return sorted((example for one in found for example in _examples(one)), key=lambda example: -example.margin)


def _examples(one: Continuations) -> Iterator[Example]:
    wrong = (one.shown != NONE) & ~one.right(one.shown)
    for row in np.flatnonzero(wrong.any(axis=1) & one.right(one.clean)):
        right = one.solutions[row, :-1]
        margins = one.scores[row][:, ~right].max(axis=1) - one.scores[row][:, right].max(axis=1)
        at = int(np.where(wrong[row], margins, -np.inf).argmax())
        answers = int(one.shown[row, at]), int(one.clean[row]), int(one.fresh[row, at])
        yield Example(one.problems[row], one.steps[at], *answers, float(margins[at]))


def film_examples(sampler: Sampler, examples: Sequence[Example], steps: Sequence[int], seed: int) -> Film | None:
    """The first FILMED examples, sampled again: x0-hat at the steps and the finished video. None without examples."""
    shown = examples[:FILMED]
    if not shown:
        return None
    steps = (*steps, sampler.config.steps - 1)
    clips = watch(sampler, with_noise([example.problem for example in shown], seed), steps)
    rows = [
        film_row(sampler.task, e.problem.title, e.problem, clip, e.answer) for e, clip in zip(shown, clips, strict=True)
    ]
    return Film(tuple(rows), steps)
