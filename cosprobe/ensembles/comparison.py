"""Compares seed ensembles at equal compute: hyperparameters are chosen on validation, accuracies measured on test.

Compute is counted in operations, not in seeds. There are two budgets: that of the method of arXiv 2603.16870 (three
seeds at the first step, then one run), and that of three whole runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from cosprobe.activations import Cost, flops, images
from cosprobe.ensembles.run import RunContext
from cosprobe.ensembles.strategies import PROBES, STRATEGIES, Hyperparameters, build_strategy, windows
from cosprobe.ensembles.trajectories import READS, Candidate, Trajectories
from cosprobe.evaluation import difference_interval, max_t_bootstrap, share_interval
from cosprobe.tasks import Problem, fresh_problems

PAPER = Hyperparameters(seeds=3, steps=(0,))  # of `hidden` in arXiv 2603.16870, with the middle layers
CURVES = ("vote", "best_of", "retry", "probe_best", "prune", "probe_vote", "probe_retry")
SLACK = 1e-9  # budgets with a smaller relative difference count as equal


@dataclass(frozen=True)
class Size:
    """Size of a comparison.

    seeds: noise seeds of each problem. validation, test: number of problems. windows: windows of layers, in order of
    preference on ties; that of the paper is the first. shifts: steps at which averages are tried. counts: numbers of
    seeds K that are tried for strategies that change their runs.
    """

    seeds: int
    validation: int
    test: int
    windows: tuple[str, ...]
    shifts: tuple[tuple[int, ...], ...]
    counts: tuple[int, ...]


SIZES = {
    "quick": Size(6, 16, 32, ("middle", "early", "all"), ((0,),), (3,)),
    "full": Size(6, 40, 240, ("middle", "early", "second", "late", "all"), ((0,), (0, 1, 2)), (3,)),
}


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95 % interval."""

    mean: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: np.ndarray, bounds: tuple[np.ndarray, np.ndarray]) -> Estimate:
        """From values per problem, and bounds as the interval functions of `cosprobe.evaluation` return them."""
        return cls(float(values.mean()), float(bounds[0][0]), float(bounds[1][0]))

    @property
    def clear(self) -> bool:
        """Whether the whole interval is above zero."""
        return self.lower > 0


@dataclass(frozen=True, eq=False)
class Comparison:
    """Results of all strategies on the problems of one task.

    task, steps: task, and sampler steps of a run.
    keys: keys of the test problems.
    cost: GFLOP of a candidate for one problem, the mean over validation problems. spent: the same over test problems;
    it differs if the strategy decides how many runs it makes.
    validation, test: share of right answers [problem], by candidate.
    budgets: GFLOP by name. chosen: the chosen candidate by budget and strategy.
    windows: the method of the paper by window of layers.
    curves: by strategy, candidates with default hyperparameters and 2, 3, ... seeds.
    groups: masks of test problems by name.
    plain_cost: GFLOP of one whole run.
    right: whether whole runs on test are right, [problem, seed].
    ranking: by step, the share of pairs of a right and a wrong run of one test problem in which the probe gives the
    right run the higher probability; NaN without such pairs.
    """

    task: str
    steps: int
    keys: np.ndarray
    cost: dict[Candidate, float]
    spent: dict[Candidate, float]
    validation: dict[Candidate, np.ndarray]
    test: dict[Candidate, np.ndarray]
    budgets: dict[str, float]
    chosen: dict[str, dict[str, Candidate]]
    windows: dict[str, Candidate]
    curves: dict[str, list[Candidate]]
    groups: dict[str, np.ndarray]
    plain_cost: float
    right: np.ndarray
    ranking: dict[int, float] = field(default_factory=dict)

    @property
    def plain(self) -> np.ndarray:
        """Accuracy of one run per test problem, as the mean over all seeds."""
        return self.right.mean(axis=1)

    def estimate(self, right: np.ndarray, group: str = "all") -> Estimate:
        """Share of right answers among the test problems of a group."""
        mask = self.groups[group]
        return Estimate.of(right[mask], share_interval(right[None, mask], self.keys[mask]))

    def gain(self, one: Candidate, other: Candidate | None = None, group: str = "all") -> Estimate:
        """Accuracy of `one` minus that of `other` (default: one run) on the same problems, with a paired interval."""
        mask = self.groups[group]
        more = (self.test[one] - (self.test[other] if other else self.plain))[mask]
        return Estimate.of(more, difference_interval(more[None], self.keys[mask]))

    def p_better(self, budget: str, reference: str = "hidden") -> dict[str, float]:
        """For every other strategy, p of the test that its accuracy is above that of `reference`, corrected for all of
        them."""
        chosen = self.chosen[budget]
        others = [m for m in chosen if m != reference]
        differences = np.stack([self.test[chosen[m]] - self.test[chosen[reference]] for m in others])
        return dict(zip(others, max_t_bootstrap(differences, self.keys).p.tolist(), strict=True))


def price(candidate: Candidate, steps: int, cost: Cost, begun: float | None = None) -> float:
    """Operations for one problem: prompts of all seeds, the first frame once, every step of every run, and decodes.

    A strategy that makes runs one after another costs `begun` whole runs (default: all seeds). Probes are not counted:
    they take thousands of operations, a block takes millions.
    """
    strategy = build_strategy(candidate.name, candidate.params, steps)
    if strategy.acceptance is not None:
        return cost.run(steps) * (strategy.seeds if begun is None else begun)
    return (
        cost.text * strategy.seeds
        + cost.image
        + strategy.evaluations(steps) * cost.evaluation
        + strategy.finished * cost.decode
    )


def candidates(context: RunContext, size: Size) -> list[Candidate]:
    """All candidates that are tried on validation, in order of preference on ties.

    Raises InputError, before anything is sampled, when a candidate needs probes that were not trained.
    """
    parts, reads = windows(context.sampler.depth), range(min(READS, context.sampler.config.steps))
    found = [Candidate(m, Hyperparameters(k)) for k in range(2, size.seeds + 1) for m in ("vote", "best_of", "retry")]
    if context.scorer is not None:
        found += [
            Candidate(m, Hyperparameters(k, (s,)))
            for m in ("probe_best", "probe_vote", "probe_retry")
            for k in range(2, size.seeds + 1)
            for s in reads
        ]
        for k in range(3, size.seeds + 1):
            rounds = (k - 1).bit_length()
            starts = [tuple(range(s, s + stride * rounds, stride)) for stride in (1, 2) for s in reads]
            found += [Candidate("prune", Hyperparameters(k, steps)) for steps in starts if steps[-1] in reads]
    shifts = [s for s in size.shifts if max(s) < context.sampler.config.steps]
    for k in size.counts:
        for steps in shifts:
            found += [Candidate("hidden", Hyperparameters(k, steps, parts[w])) for w in size.windows]
            found += [Candidate(m, Hyperparameters(k, steps)) for m in ("x0", "latent")]
            if context.scorer is not None:
                found.append(Candidate("probe_weighted", Hyperparameters(k, steps, parts["middle"])))
    found.append(Candidate("hidden", Hyperparameters(size.counts[0], (0,), parts["middle"], "all")))  # costs three runs
    for candidate in found:
        if context.scorer is not None and candidate.name in PROBES:
            context.scorer.check(candidate.params.steps or (0,), candidate.params.layers or (None,))
    return list(dict.fromkeys(found))


def compare(
    context: RunContext, size: Size, used: int, seed: int, folder: Path, identity: dict[str, Any]
) -> Comparison:
    """Samples the runs that are not on disk yet, chooses candidates on validation, and compares them on test.

    used: number of problems that the run of the probes has drawn; fresh problems are drawn after them. folder: where
    runs are kept. identity: everything else that results depend on (model, bank, task).
    """
    sampler, steps = context.sampler, context.sampler.config.steps
    counts = {"validation": size.validation, "test": size.test}
    kinds = sampler.task.kinds if context.scorer is None else context.scorer.kinds  # some kinds may have no probes
    problems = {split: fresh_problems(sampler.task, split, used, count, kinds) for split, count in counts.items()}
    first = problems["validation"][:1]
    cost = flops(sampler.model, sampler.config, images(sampler.task, first), [p.prompt for p in first])
    trajectories = Trajectories(context, problems, size.seeds, seed, folder, identity)

    options, parts = candidates(context, size), windows(context.sampler.depth)
    swept = {name: Candidate("hidden", replace(PAPER, layers=parts[name])) for name in size.windows}
    paper = price(Candidate("hidden", replace(PAPER, layers=parts["middle"])), steps, cost)
    budgets = {"the paper's": paper, "three runs'": price(Candidate("vote", Hyperparameters(3)), steps, cost)}
    rivals = [
        c for c in options if c.free or sum(o.name == c.name for o in options) > 1
    ]  # otherwise there is nothing to choose
    tried = trajectories.of(rivals, "validation")
    validation = {c: one.right for c, one in tried.items()}
    prices = {c: price(c, steps, cost, float(tried[c].begun.mean()) if c in tried else None) for c in options}
    chosen = {name: choose(prices, validation, cost, budget) for name, budget in budgets.items()}

    curves = {m: [Candidate(m, Hyperparameters(k)) for k in range(2, size.seeds + 1)] for m in CURVES}
    curves = {m: row for m, row in curves.items() if context.scorer is not None or m not in PROBES}
    used_ones = [c for row in (*chosen.values(), swept) for c in row.values()] + [c for r in curves.values() for c in r]
    test = trajectories.of(list(dict.fromkeys(used_ones)), "test")
    pool = trajectories.whole_runs("test")
    return Comparison(
        task=sampler.task.name,
        steps=steps,
        keys=np.array([p.key for p in problems["test"]]),
        cost={c: value / 1e9 for c, value in prices.items()},
        spent={c: price(c, steps, cost, float(one.begun.mean())) / 1e9 for c, one in test.items()},
        validation=validation,
        test={c: one.right for c, one in test.items()},
        budgets={name: budget / 1e9 for name, budget in budgets.items()},
        chosen=chosen,
        windows=swept,
        curves=curves,
        groups=groups(problems["test"]),
        plain_cost=cost.run(steps) / 1e9,
        right=pool["right"].numpy().astype(float),
        ranking=_ranking(pool, trajectories.reads) if trajectories.reads else {},
    )


def choose(
    prices: dict[Candidate, float], right: dict[Candidate, np.ndarray], cost: Cost, budget: float
) -> dict[str, Candidate]:
    """For every strategy the candidate with the highest validation accuracy that costs no more than `budget`.

    On a tie it is the cheapest, then the first. `single` takes as many steps as the budget allows. prices: operations
    of each candidate for one problem. right: share of right answers [problem], by candidate.
    """
    affordable = [c for c, value in prices.items() if value <= budget * (1 + SLACK)]
    chosen = {}
    for name in STRATEGIES:
        of_name = [c for c in affordable if c.name == name]
        if of_name:
            best = max(of_name, key=lambda c: (_score(right, c), -prices[c])) if len(of_name) > 1 else of_name[0]
            chosen[name] = best
    length = 1 + int((budget * (1 + SLACK) - cost.run(1)) / cost.evaluation)
    return {"single": Candidate("single", Hyperparameters(length=length))} | chosen


def groups(problems: Sequence[Problem]) -> dict[str, np.ndarray]:
    """Masks of problems: all, each kind, and the lower and upper half of each difficulty."""
    kinds = np.array([p.kind for p in problems])
    found = {"all": np.ones(len(problems), bool)}
    if len(set(kinds)) > 1:
        found |= {kind: kinds == kind for kind in dict.fromkeys(kinds.tolist())}
    for name in problems[0].difficulty:
        values = np.array([p.difficulty[name] for p in problems])
        cuts = np.unique(values)[:-1].tolist()
        if cuts:  # the cut nearest to the median
            cut = min(cuts, key=lambda c: abs((values <= c).mean() - 0.5))
            found |= {f"{name} <= {cut}": values <= cut, f"{name} > {cut}": values > cut}
    return found


def oracle(right: Float[np.ndarray, "problem seed"], seeds: int) -> Float[np.ndarray, " problem"]:
    """Per problem, the probability that at least one of `seeds` runs is right. No choice among the runs can exceed
    it."""
    total, wrong = right.shape[1], (right.shape[1] - right.sum(axis=1)).astype(int)
    none = np.ones(len(right))
    for i in range(seeds):  # runs are drawn without replacement
        none *= np.clip(wrong - i, 0, None) / (total - i)
    return 1 - none


def error_correlation(right: Float[np.ndarray, "problem seed"]) -> float:
    """Correlation of errors between two seeds of one problem: 0 for independent errors, 1 for the same errors.

    NaN if all runs are right, or all are wrong.
    """
    count, wrong = right.shape[1], right.shape[1] - right.sum(axis=1)
    rate, both = float(wrong.mean() / count), float((wrong * (wrong - 1)).mean() / (count * (count - 1)))
    return (both - rate**2) / (rate * (1 - rate)) if 0 < rate < 1 else float("nan")


def _score(right: dict[Candidate, np.ndarray], candidate: Candidate) -> float:
    return round(float(right[candidate].mean()), 9)  # rounded, so that ties are ties


def _ranking(pool: dict[str, Tensor], reads: Sequence[int]) -> dict[int, float]:
    """See `Comparison.ranking`."""
    sure, right = pool["proba"].amax(dim=-1), pool["right"].bool()  # [problem, seed, step], [problem, seed]
    pairs = right[:, :, None] & ~right[:, None, :]
    above = (sure[:, :, None] > sure[:, None, :]).float() + 0.5 * (sure[:, :, None] == sure[:, None, :]).float()
    return {step: float(above[..., i][pairs].mean()) for i, step in enumerate(reads)}
