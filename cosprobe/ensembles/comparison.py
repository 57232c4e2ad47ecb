"""Seed ensembles compared at matched compute: hyperparameters chosen on validation, one comparison on test.

Compute is counted operations, not seeds. Two budgets: that of the paper's method (three seeds at the first step, then
one run), and that of three whole runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from cosprobe.activations import Cost, flops
from cosprobe.ensembles.ensemble import RunContext
from cosprobe.ensembles.strategies import METHODS, PROBES, Plan, course, windows
from cosprobe.ensembles.trajectories import READS, Candidate, Trials
from cosprobe.errors import InputError
from cosprobe.evaluation import difference_interval, max_t_bootstrap, share_interval
from cosprobe.tasks import Problem, fresh_problems, images

PAPER = Plan(seeds=3, steps=(0,))  # of `hidden` in arXiv 2603.16870, in the middle layers
CURVES = ("vote", "best_of", "retry", "probe_best", "prune", "probe_vote", "probe_retry")
SLACK = 1e-9  # relative; two budgets closer than this are equal


@dataclass(frozen=True)
class Size:
    """seeds: of each problem in the records. validation, test: problems. windows: of layers, the paper's first, which
    is taken when others are no better. shifts: steps at which means are tried. counts: K that are tried for methods
    that change their runs."""

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


@dataclass
class EnsembleConfig:
    """Compare seed ensembles at matched compute. size: `quick` (minutes) or `full` (for the docs, resumable)."""

    size: str = "quick"

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise InputError(f"use.size={self.size!r}: expected one of {', '.join(SIZES)}")


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95 % interval."""

    mean: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: np.ndarray, bounds: tuple[np.ndarray, np.ndarray]) -> Estimate:
        return cls(float(values.mean()), float(bounds[0][0]), float(bounds[1][0]))

    @property
    def clear(self) -> bool:
        """Above zero, and the interval with it."""
        return self.lower > 0


@dataclass(frozen=True, eq=False)
class Comparison:
    """Everything measured on the problems of one task.

    keys: of the test problems. cost: GFLOP of a candidate for one problem, the mean over those of validation; spent:
    on test, which differs where the course decides how many runs are made. validation, test: share of right answers
    per problem, [problem], by candidate. budgets: GFLOP by name. chosen: by budget and method. windows: the paper's
    method by window of layers. curves: by method, default settings with more and more seeds. groups: masks of test
    problems. plain_cost: GFLOP of one whole run. right: [problem, seed] of the records on test. order: how often the
    probe is surer of the right one of a right and a wrong run of one test problem, by step; NaN without such pairs.
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
    order: dict[int, float] = field(default_factory=dict)

    @property
    def plain(self) -> np.ndarray:
        """One run, the mean over its seeds, per test problem."""
        return self.right.mean(axis=1)

    def estimate(self, right: np.ndarray, group: str = "all") -> Estimate:
        """Share of right answers among the test problems of a group."""
        mask = self.groups[group]
        return Estimate.of(right[mask], share_interval(right[None, mask], self.keys[mask]))

    def gain(self, one: Candidate, other: Candidate | None = None, group: str = "all") -> Estimate:
        """How much more often `one` is right than `other`, or than one run, on the same problems."""
        mask = self.groups[group]
        more = (self.test[one] - (self.test[other] if other else self.plain))[mask]
        return Estimate.of(more, difference_interval(more[None], self.keys[mask]))

    def p_better(self, budget: str, reference: str = "hidden") -> dict[str, float]:
        """p of every other method being more often right than `reference` at a budget, corrected for all of them."""
        chosen = self.chosen[budget]
        others = [m for m in chosen if m != reference]
        differences = np.stack([self.test[chosen[m]] - self.test[chosen[reference]] for m in others])
        return dict(zip(others, max_t_bootstrap(differences, self.keys).p.tolist(), strict=True))


def price(candidate: Candidate, steps: int, cost: Cost, begun: float | None = None) -> float:
    """Operations for one problem: prompts of all seeds, its first frame once, every step of every run, decodes. Where
    runs are made one after another, whole runs: `begun` of them, all when not given.
    Probes, thousands of operations where a block takes millions, are left out."""
    path = course(candidate.method, candidate.plan, steps)
    if path.credit is not None:
        return cost.run(steps) * (path.seeds if begun is None else begun)
    return cost.text * path.seeds + cost.image + path.evaluations(steps) * cost.evaluation + path.finished * cost.decode


def candidates(context: RunContext, size: Size) -> list[Candidate]:
    """Everything that is tried on validation; of equals the first one is taken."""
    parts, reads = windows(context.depth), range(min(READS, context.config.steps))
    found = [Candidate(m, Plan(k)) for k in range(2, size.seeds + 1) for m in ("vote", "best_of", "retry")]
    if context.scorer is not None:
        found += [
            Candidate(m, Plan(k, (s,)))
            for m in ("probe_best", "probe_vote", "probe_retry")
            for k in range(2, size.seeds + 1)
            for s in reads
        ]
        for k in range(3, size.seeds + 1):
            rounds = (k - 1).bit_length()
            starts = [tuple(range(s, s + stride * rounds, stride)) for stride in (1, 2) for s in reads]
            found += [Candidate("prune", Plan(k, steps)) for steps in starts if steps[-1] in reads]
    shifts = [s for s in size.shifts if max(s) < context.config.steps]
    for k in size.counts:
        for steps in shifts:
            found += [Candidate("hidden", Plan(k, steps, parts[w])) for w in size.windows]
            found += [Candidate(m, Plan(k, steps)) for m in ("x0", "latent")]
            if context.scorer is not None:
                found.append(Candidate("probe_weighted", Plan(k, steps, parts["middle"])))
    found.append(Candidate("hidden", Plan(size.counts[0], (0,), parts["middle"], "all")))  # it spends three runs
    return list(dict.fromkeys(found))


def compare(
    context: RunContext, size: Size, used: int, seed: int, folder: Path, identity: dict[str, Any]
) -> Comparison:
    """Runs what is not on disk yet, chooses on validation, compares on test.

    used: problems the probes' run has drawn. identity: what else shapes results (model, bank, task).
    """
    steps = context.config.steps
    counts = {"validation": size.validation, "test": size.test}
    kinds = (
        context.task.kinds if context.scorer is None else context.scorer.kinds
    )  # a model may never settle on a choice
    problems = {split: fresh_problems(context.task, split, used, count, kinds) for split, count in counts.items()}
    one = problems["validation"][:1]
    cost = flops(context.model, context.config, images(context.task, one), [p.prompt for p in one])
    trials = Trials(context, problems, size.seeds, seed, folder, identity)

    options, parts = candidates(context, size), windows(context.depth)
    swept = {name: Candidate("hidden", replace(PAPER, layers=parts[name])) for name in size.windows}
    paper = price(Candidate("hidden", replace(PAPER, layers=parts["middle"])), steps, cost)
    budgets = {"the paper's": paper, "three runs'": price(Candidate("vote", Plan(3)), steps, cost)}
    rivals = [c for c in options if c.free or sum(o.method == c.method for o in options) > 1]  # else nothing to choose
    tried = trials.of(rivals, "validation")
    validation = {c: trial.right for c, trial in tried.items()}
    prices = {c: price(c, steps, cost, float(tried[c].begun.mean()) if c in tried else None) for c in options}
    chosen = {name: choose(prices, validation, cost, budget) for name, budget in budgets.items()}

    curves = {m: [Candidate(m, Plan(k)) for k in range(2, size.seeds + 1)] for m in CURVES}
    curves = {m: row for m, row in curves.items() if context.scorer is not None or m not in PROBES}
    used_ones = [c for row in (*chosen.values(), swept) for c in row.values()] + [c for r in curves.values() for c in r]
    test = trials.of(list(dict.fromkeys(used_ones)), "test")
    pool = trials.records("test")
    return Comparison(
        task=context.task.name,
        steps=steps,
        keys=np.array([p.key for p in problems["test"]]),
        cost={c: value / 1e9 for c, value in prices.items()},
        spent={c: price(c, steps, cost, float(trial.begun.mean())) / 1e9 for c, trial in test.items()},
        validation=validation,
        test={c: trial.right for c, trial in test.items()},
        budgets={name: budget / 1e9 for name, budget in budgets.items()},
        chosen=chosen,
        windows=swept,
        curves=curves,
        groups=groups(problems["test"]),
        plain_cost=cost.run(steps) / 1e9,
        right=pool["right"].numpy().astype(float),
        order=_order(pool, trials.reads) if trials.reads else {},
    )


def choose(
    prices: dict[Candidate, float], right: dict[Candidate, np.ndarray], cost: Cost, budget: float
) -> dict[str, Candidate]:
    """Of every method what is most often right on validation and costs no more than `budget`; of equals the cheapest,
    then the first. `single` takes as many steps as the budget pays for. prices: operations for one problem."""
    affordable = [c for c, value in prices.items() if value <= budget * (1 + SLACK)]
    chosen = {}
    for method in METHODS:
        mine = [c for c in affordable if c.method == method]
        if mine:
            chosen[method] = max(mine, key=lambda c: (_score(right, c), -prices[c])) if len(mine) > 1 else mine[0]
    length = 1 + int((budget * (1 + SLACK) - cost.run(1)) / cost.evaluation)
    return {"single": Candidate("single", Plan(length=length))} | chosen


def groups(problems: Sequence[Problem]) -> dict[str, np.ndarray]:
    """Masks of problems: all, each kind, and the lower and the upper half of everything that makes them hard."""
    kinds = np.array([p.kind for p in problems])
    found = {"all": np.ones(len(problems), bool)}
    if len(set(kinds)) > 1:
        found |= {kind: kinds == kind for kind in dict.fromkeys(kinds.tolist())}
    for name in problems[0].difficulty:
        values = np.array([p.difficulty[name] for p in problems])
        cuts = np.unique(values)[:-1].tolist()
        if cuts:  # the cut that comes nearest to halves
            cut = min(cuts, key=lambda c: abs((values <= c).mean() - 0.5))
            found |= {f"{name} <= {cut}": values <= cut, f"{name} > {cut}": values > cut}
    return found


def oracle(right: Float[np.ndarray, "problem seed"], seeds: int) -> Float[np.ndarray, " problem"]:
    """Chance that at least one of `seeds` runs drawn from a problem's records is right: what no choice can exceed."""
    total, wrong = right.shape[1], (right.shape[1] - right.sum(axis=1)).astype(int)
    none = np.ones(len(right))
    for i in range(seeds):  # drawn without replacement
        none *= np.clip(wrong - i, 0, None) / (total - i)
    return 1 - none


def error_correlation(right: Float[np.ndarray, "problem seed"]) -> float:
    """Correlation of being wrong between two seeds of one problem: 0 independent errors, 1 the same errors. NaN when
    all runs are right, or all wrong."""
    count, wrong = right.shape[1], right.shape[1] - right.sum(axis=1)
    rate, both = float(wrong.mean() / count), float((wrong * (wrong - 1)).mean() / (count * (count - 1)))
    return (both - rate**2) / (rate * (1 - rate)) if 0 < rate < 1 else float("nan")


def _score(right: dict[Candidate, np.ndarray], candidate: Candidate) -> float:
    return round(float(right[candidate].mean()), 9)  # sums of equal parts may differ in rounding


def _order(pool: dict[str, Tensor], reads: Sequence[int]) -> dict[int, float]:
    """How often the probe is surer of the right run, over all pairs of a right and a wrong run of one problem."""
    sure, right = pool["odds"].amax(dim=-1), pool["right"].bool()  # [problem, seed, step], [problem, seed]
    pairs = right[:, :, None] & ~right[:, None, :]
    above = (sure[:, :, None] > sure[:, None, :]).float() + 0.5 * (sure[:, :, None] == sure[:, None, :]).float()
    return {step: float(above[..., i][pairs].mean()) for i, step in enumerate(reads)}
