"""The whole fit of a grid against loops over its cells in scikit-learn, on the same standardised features.

Ours: `cosprobe.probes.fit` as a run calls it, with standardisation, choice of the penalty and temperatures, for all
cells, targets and penalties. Theirs, per cell and target:

* `logistic`, `newton`: `LogisticRegression` at every penalty, the best on validation is kept. Both sides answer for the
  same relative gap: scikit-learn gets the loosest of TOLERANCES whose worst fit, of all it is measured on, exceeds the
  optimum by PROMISED of its objective at most. The bound is one for both (`newton.relative_gaps`), taken in fp64.
  Once with its libraries' own number of threads, as a plain loop has it, and once with a single one: products this
  small gain nothing from several and lose much of their time to waiting where other processes share the cores;
* `ridge`: `RidgeClassifier` at every penalty and fold of whole problems, which is the same work, and
  `RidgeClassifierCV`, quicker because it leaves out rows one by one, blind to which problem they belong to.

scikit-learn has no scorer shared by competing candidates; there the loops fit the nearest thing, one binary classifier
of "is this region the one" on the same rows, which is the easier problem. Their features are standardised before the
clock starts. The loops run on a few cells, evenly spread, and their time is scaled up to all of them.

Features are synthetic, of the size of the demo: correlated channels, whose variance falls as 1 / k along the principal
axes (so does that of the model in the package, and faster beyond the first 32), and a signal of `answer`, `choice` and
`corridors` that grows from none in the first cell to a clear one in the last.
Run all: `make bench`; this alone: `python -m benchmarks fit`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, RidgeClassifier, RidgeClassifierCV
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F

from benchmarks.pairs import Pair, side_by_side
from cosprobe.activations import ProbeSamples
from cosprobe.activations.dataset import relabelled
from cosprobe.cells import Cell
from cosprobe.probes import ProbeBank, ProbeConfig, design, fit, problem_folds, spread, standardise
from cosprobe.probes.logistic import KINDS
from cosprobe.probes.newton import PROMISED, relative_gaps
from cosprobe.runtime import TrainerConfig
from cosprobe.tasks import Maze, Target

SIZES = {"train": 300, "validation": 120, "test": 180}
TOLERANCES = (1e-2, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 1e-6)  # of scikit-learn, whose own default is 1e-4
STRENGTH = 3.0  # of the signal in the last cell, in standard deviations of the strongest channel


@dataclass(frozen=True)
class Rows:
    """What one classifier is fitted to (rows, label, the fold of each) and, for some, chosen on."""

    rows: np.ndarray
    label: np.ndarray
    fold: np.ndarray
    held: np.ndarray
    held_label: np.ndarray


def logistic(part: Rows, lambdas: Sequence[float], tolerance: float = TOLERANCES[-1]) -> Any:
    """The penalty with the best accuracy on validation."""
    return max(each_penalty(part, lambdas, tolerance), key=lambda one: one.score(part.held, part.held_label))


def each_penalty(part: Rows, lambdas: Sequence[float], tolerance: float) -> list[LogisticRegression]:
    """The logistic regressions of one loop, a penalty each."""
    vectors = 2 if len(np.unique(part.label)) == 2 else 1  # the penalty of one vector for two opposite ones
    strengths = [vectors / (value * len(part.rows)) for value in lambdas]
    return [LogisticRegression(C=c, max_iter=10000, tol=tolerance).fit(part.rows, part.label) for c in strengths]


def ridge_by_folds(part: Rows, lambdas: Sequence[float]) -> Any:
    """The penalty with most rows right when their fold is left out; then fitted to all."""
    right = np.zeros(len(lambdas))
    for i, value in enumerate(lambdas):
        for left_out in np.unique(part.fold):
            own = part.fold == left_out
            fit = RidgeClassifier(alpha=value * len(part.rows)).fit(part.rows[~own], part.label[~own])
            right[i] += (fit.predict(part.rows[own]) == part.label[own]).sum()
    return RidgeClassifier(alpha=lambdas[int(right.argmax())] * len(part.rows)).fit(part.rows, part.label)


def ridge_by_rows(part: Rows, lambdas: Sequence[float]) -> Any:
    """The penalty scikit-learn chooses from one decomposition, leaving out rows one by one."""
    return RidgeClassifierCV([value * len(part.rows) for value in lambdas]).fit(part.rows, part.label)


ALONE = ", one thread"
Rival = Callable[[Rows, Sequence[float]], Any]
RIVALS: dict[str, dict[str, Rival]] = {
    "logistic": {"LogisticRegression": logistic, f"LogisticRegression{ALONE}": logistic},
    "newton": {"LogisticRegression": logistic, f"LogisticRegression{ALONE}": logistic},
    "ridge": {"RidgeClassifier by folds": ridge_by_folds, "RidgeClassifierCV by rows": ridge_by_rows},
}


def measure(
    repeats: int = 3,
    sizes: dict[str, int] = SIZES,
    steps: int = 20,
    layers: int = 8,
    channels: int = 128,
    some: int = 8,
    kinds: Sequence[str] = KINDS,
) -> list[Pair]:
    """One pair per kind of probe and rival. some: cells the loops run on."""
    samples = synthetic(sizes, steps, layers, channels)
    cells = np.linspace(0, len(samples.cells) - 1, some).round().astype(int)
    x, held = standardised(samples, cells)
    pairs = []
    tolerance, theirs = loosest(x, held, samples) if set(kinds) - {"ridge"} else (0.0, ())
    for kind in kinds:
        config = ProbeConfig(kind=kind)
        ours = partial(whole_fit, samples, config)
        gaps = () if kind == "ridge" else (theirs, fit_gaps(samples, cells, config))
        for name, rival in RIVALS[kind].items():
            limit = 1 if name.endswith(ALONE) else None
            if kind != "ridge":
                name, rival = f"{name}, tol={tolerance:g}", partial(logistic, tolerance=tolerance)
            what = f"{name}, {len(samples.cells)} cells (measured on {some}), {len(samples.targets)} targets"
            loop = partial(sklearn_loop, x, held, samples, config.lambdas, rival, limit)
            pair = side_by_side(what, loop, f"fit, kind={kind}", ours, repeats, len(samples.cells) / some)
            pairs.append(replace(pair, gaps=gaps))
    return pairs


def loosest(x: Tensor, held: Tensor, samples: ProbeSamples) -> tuple[float, tuple[float, ...]]:
    """The first tolerance at which every fit of scikit-learn's loop is within PROMISED, and the gaps there; else the
    last."""
    lambdas = ProbeConfig().lambdas
    for tolerance in TOLERANCES:
        gaps: list[float] = []

        def keep(part: Rows, lambdas: Sequence[float], tolerance: float = tolerance, gaps: list[float] = gaps) -> None:
            fits = each_penalty(part, lambdas, tolerance)
            gaps += [sklearn_gap(part, *one) for one in zip(fits, lambdas, strict=True)]

        sklearn_loop(x, held, samples, lambdas, keep, 1)
        if max(gaps) <= PROMISED:
            break
    return tolerance, tuple(gaps)


def sklearn_gap(part: Rows, fit: LogisticRegression, penalty: float) -> float:
    """Relative gap of one logistic regression; one vector for two classes is two opposite halves."""
    weight, bias = torch.from_numpy(fit.coef_).double(), torch.from_numpy(fit.intercept_).double()
    if len(weight) == 1:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    target = Target("rows", len(weight), "problem", "answer", ("any",))
    x = torch.from_numpy(part.rows).double()[None, :, None]
    label = torch.from_numpy(np.searchsorted(fit.classes_, part.label))
    return relative_gaps(x, label, target, [penalty], weight.T[None, :, None], bias[None, None]).item()


def fit_gaps(samples: ProbeSamples, cells: np.ndarray, config: ProbeConfig) -> tuple[float, ...]:
    """Relative gaps of our fits of some cells, every target and penalty."""
    gaps: list[float] = []
    chosen = replace(samples, features=samples.features[:, cells], cells=tuple(samples.cells[i] for i in cells))
    train = chosen.subset("train")
    for penalty in config.lambdas:
        bank = whole_fit(chosen, replace(config, lambdas=[penalty]))
        x = standardise(train.features, bank.mean, bank.std).double()
        for target in bank.targets:
            weight, bias = bank.weights[target.name].double(), bank.biases[target.name].double()
            found = relative_gaps(x, train.labels[target.name], target, [penalty], weight[:, :, None], bias[:, None])
            gaps += found.flatten().tolist()
    return tuple(gaps)


def synthetic(sizes: dict[str, int], steps: int, layers: int, channels: int, seed: int = 0) -> ProbeSamples:
    """Samples with the targets of a maze run, relabelled controls included, one noise seed per problem."""
    count, regions, task = sum(sizes.values()), 4, Maze()
    cells = tuple(Cell(t, s, "cond", "all") for t in range(steps) for s in map(str, range(layers)))
    generator = torch.Generator().manual_seed(seed)
    kinds = np.array(task.kinds)[np.arange(count) % 2]
    labels = {}
    for target in task.targets:
        shape = (count, regions) if target.form == "region" else (count,)
        label = torch.randint(target.classes, shape, generator=generator)
        label[~np.isin(kinds, target.kinds)] = -1
        labels[target.name] = label
    basis = torch.linalg.qr(torch.randn(channels, channels, generator=generator))[0]
    scale = torch.arange(1, channels + 1).rsqrt()
    features = torch.randn(count, len(cells), regions, channels, generator=generator) @ (scale[:, None] * basis)
    signal = torch.zeros(count, regions, channels)
    signal += F.one_hot(torch.maximum(labels["answer"], labels["choice"]), regions)[..., None] * basis[0]
    signal += labels["corridors"][..., None] * basis[1]
    features += torch.linspace(0, STRENGTH, len(cells))[:, None, None] * signal[:, None]
    controls, relabels = relabelled(task.targets, labels)
    return ProbeSamples(
        features=features,
        cells=cells,
        targets=(*task.targets, *controls),
        labels=labels | relabels,
        split=np.repeat(list(sizes), list(sizes.values())),
        keys=np.array([f"problem {i}" for i in range(count)]),
        kinds=kinds,
    )


def whole_fit(samples: ProbeSamples, config: ProbeConfig) -> ProbeBank:
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit(samples, config, TrainerConfig(), Path(folder), seed=0)


def standardised(samples: ProbeSamples, cells: np.ndarray) -> tuple[Tensor, Tensor]:
    """Features of the training and of the validation samples at some cells, [cell, sample, region, channel]."""
    train, validation = (samples.subset(split).features[:, cells] for split in ("train", "validation"))
    mean, std = spread(train)
    return standardise(train, mean, std), standardise(validation, mean, std)


def sklearn_loop(
    x: Tensor, held: Tensor, samples: ProbeSamples, lambdas: Sequence[float], rival: Rival, threads: int | None = None
) -> dict[tuple[int, str], Any]:
    """The classifier that is kept of every cell (place on the first axis of `x`) and target.

    threads: of scikit-learn's libraries of linear algebra, at most.
    """
    train, validation = samples.subset("train"), samples.subset("validation")
    folds = problem_folds(train.keys, seed=0)
    kept = {}
    with warnings.catch_warnings(), threadpool_limits(threads):
        warnings.simplefilter("ignore")
        for cell in range(len(x)):
            for target in samples.targets:
                rows, label, fold = flat(x[cell : cell + 1], train.labels[target.name], target, folds)
                others, other_label, _ = flat(held[cell : cell + 1], validation.labels[target.name], target)
                kept[cell, target.name] = rival(Rows(rows, label, fold, others, other_label), lambdas)
    return kept


def flat(
    x: Tensor, labels: Tensor, target: Target, folds: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows with a label, their labels, their folds (zeros without); candidates become a binary label per region."""
    rows = design(x, target.form)[0]
    fold = np.zeros(len(rows), dtype=int) if folds is None else folds
    if target.form == "candidate":
        labels = torch.where(labels[:, None] >= 0, (labels[:, None] == torch.arange(rows.shape[1])).long(), -1)
    label = labels.reshape(len(rows), -1)
    keep = (label >= 0).flatten().numpy()
    return rows.flatten(0, 1).numpy()[keep], label.flatten().numpy()[keep], np.repeat(fold, rows.shape[1])[keep]
