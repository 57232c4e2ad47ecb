"""Fitting all probes of a grid, compared with loops over its cells in scikit-learn, on the same standardised features.

cosprobe: `cosprobe.probes.fit` as in a run, with standardisation, choice of the penalty and temperatures, for all
cells, targets and penalties. scikit-learn, for each cell and target:

* `logistic`, `newton`: `LogisticRegression` at every penalty; the one with the best validation accuracy is kept. Both
  sides reach the same relative gap of the objective: scikit-learn gets the loosest of TOLERANCES at which all measured
  fits are within PROMISED of the optimum. Gaps of both sides are bounded by the same function (`newton.relative_gaps`)
  in fp64. The loop is measured twice: with the default number of threads, and with one thread. Matrix products of this
  size do not gain from several threads, and are slower if other processes use the cores.
* `ridge`: `RidgeClassifier` at every penalty and fold of whole problems, which is the same work; and
  `RidgeClassifierCV`, which is faster because it uses leave-one-out over rows and ignores problems.

scikit-learn has no scorer that is shared by candidates. For such targets the loops fit a binary classifier ("is this
region the answer?") on the same rows, which is an easier problem. Features for scikit-learn are standardised before
timing. The loops run on a few evenly spaced cells, and their time is scaled up to all cells.

Features are synthetic and have the size of the demo. Their channels are correlated, with variance proportional to 1 / k
along the k-th principal axis. (For the model in the package it is similar, and falls faster beyond the first 32 axes.)
The signal of `answer`, `model_answer` and `corridors` grows linearly from zero in the first cell to STRENGTH in the
last. Only this benchmark: `python -m benchmarks fit`.
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
from cosprobe.config import KINDS, ProbeConfig, TrainerConfig
from cosprobe.probes import ProbeBank, design, fit, problem_folds, spread, standardise
from cosprobe.probes.newton import PROMISED, relative_gaps
from cosprobe.tasks import Maze, Role, Target

SIZES = {"train": 300, "validation": 120, "test": 180}
TOLERANCES = (1e-2, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 1e-6)  # `tol` of scikit-learn; its default is 1e-4
STRENGTH = 3.0  # signal in the last cell, in standard deviations of the strongest principal axis


@dataclass(frozen=True)
class Rows:
    """Training data of one classifier (rows, labels, folds), and validation data (`held`, `held_label`)."""

    rows: np.ndarray
    label: np.ndarray
    fold: np.ndarray
    held: np.ndarray
    held_label: np.ndarray


def logistic(part: Rows, penalties: Sequence[float], tolerance: float = TOLERANCES[-1]) -> Any:
    """The classifier with the penalty of best validation accuracy."""
    return max(each_penalty(part, penalties, tolerance), key=lambda one: one.score(part.held, part.held_label))


def each_penalty(part: Rows, penalties: Sequence[float], tolerance: float) -> list[LogisticRegression]:
    """One logistic regression per penalty."""
    vectors = 2 if len(np.unique(part.label)) == 2 else 1  # one weight vector in place of two opposite ones
    strengths = [vectors / (value * len(part.rows)) for value in penalties]
    return [LogisticRegression(C=c, max_iter=10000, tol=tolerance).fit(part.rows, part.label) for c in strengths]


def ridge_by_folds(part: Rows, penalties: Sequence[float]) -> Any:
    """The classifier fitted to all rows with the penalty of best cross-validated accuracy over folds."""
    right = np.zeros(len(penalties))
    for i, value in enumerate(penalties):
        for left_out in np.unique(part.fold):
            held = part.fold == left_out
            fit = RidgeClassifier(alpha=value * len(part.rows)).fit(part.rows[~held], part.label[~held])
            right[i] += (fit.predict(part.rows[held]) == part.label[held]).sum()
    return RidgeClassifier(alpha=penalties[int(right.argmax())] * len(part.rows)).fit(part.rows, part.label)


def ridge_by_rows(part: Rows, penalties: Sequence[float]) -> Any:
    """The classifier with the penalty that scikit-learn chooses by leave-one-out over rows."""
    return RidgeClassifierCV([value * len(part.rows) for value in penalties]).fit(part.rows, part.label)


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
    """One pair per kind of probe and scikit-learn loop. some: number of cells that the loops run on."""
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
            loop = partial(sklearn_loop, x, held, samples, config.penalties, rival, limit)
            pair = side_by_side(what, loop, f"fit, kind={kind}", ours, repeats, len(samples.cells) / some)
            pairs.append(replace(pair, gaps=gaps))
    return pairs


def loosest(x: Tensor, held: Tensor, samples: ProbeSamples) -> tuple[float, tuple[float, ...]]:
    """The loosest tolerance at which every fit of scikit-learn is within PROMISED (otherwise the tightest), and the
    gaps at this tolerance."""
    penalties = ProbeConfig().penalties
    for tolerance in TOLERANCES:
        gaps: list[float] = []

        def keep(
            part: Rows, penalties: Sequence[float], tolerance: float = tolerance, gaps: list[float] = gaps
        ) -> None:
            fits = each_penalty(part, penalties, tolerance)
            gaps += [sklearn_gap(part, *one) for one in zip(fits, penalties, strict=True)]

        sklearn_loop(x, held, samples, penalties, keep, 1)
        if max(gaps) <= PROMISED:
            break
    return tolerance, tuple(gaps)


def sklearn_gap(part: Rows, fit: LogisticRegression, penalty: float) -> float:
    """Relative gap of one logistic regression. A single weight vector for two classes is split into two opposite
    halves."""
    weight, bias = torch.from_numpy(fit.coef_).double(), torch.from_numpy(fit.intercept_).double()
    if len(weight) == 1:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    target = Target("rows", len(weight), "problem", Role.ANSWER, ("any",))
    x = torch.from_numpy(part.rows).double()[None, :, None]
    label = torch.from_numpy(np.searchsorted(fit.classes_, part.label))
    return relative_gaps(x, label, target, [penalty], weight.T[None, :, None], bias[None, None]).item()


def fit_gaps(samples: ProbeSamples, cells: np.ndarray, config: ProbeConfig) -> tuple[float, ...]:
    """Relative gaps of the fits of cosprobe at some cells, for every target and penalty."""
    gaps: list[float] = []
    chosen = replace(samples, features=samples.features[:, cells], cells=tuple(samples.cells[i] for i in cells))
    train = chosen.subset("train")
    for penalty in config.penalties:
        bank = whole_fit(chosen, replace(config, penalties=[penalty]))
        x = standardise(train.features[:], bank.mean, bank.std).double()
        for target in bank.targets:
            weight, bias = bank.weights[target.name].double(), bank.biases[target.name].double()
            found = relative_gaps(x, train.labels[target.name], target, [penalty], weight[:, :, None], bias[:, None])
            gaps += found.flatten().tolist()
    return tuple(gaps)


def synthetic(sizes: dict[str, int], steps: int, layers: int, channels: int, seed: int = 0) -> ProbeSamples:
    """Synthetic samples with the targets of a maze run, relabelled targets included. One noise seed per problem."""
    count, regions, task = sum(sizes.values()), 4, Maze()
    cells = tuple(Cell(t, n, "cond", "all") for t in range(steps) for n in range(layers))
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
    signal += F.one_hot(torch.maximum(labels["answer"], labels["model_answer"]), regions)[..., None] * basis[0]
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
    """Fits all probes as a run does."""
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit(samples, config, TrainerConfig(), Path(folder), seed=0)


def standardised(samples: ProbeSamples, cells: np.ndarray) -> tuple[Tensor, Tensor]:
    """Standardised training and validation features at some cells, [cell, sample, region, channel]."""
    train, validation = (samples.subset(split).features[:, cells] for split in ("train", "validation"))
    mean, std = spread(train)
    return standardise(train, mean, std), standardise(validation, mean, std)


def sklearn_loop(
    x: Tensor, held: Tensor, samples: ProbeSamples, penalties: Sequence[float], rival: Rival, threads: int | None = None
) -> dict[tuple[int, str], Any]:
    """Fits one classifier per cell and target with scikit-learn, by cell index (first axis of `x`) and target.

    threads: largest number of threads of the linear algebra libraries; None: their default.
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
                kept[cell, target.name] = rival(Rows(rows, label, fold, others, other_label), penalties)
    return kept


def flat(
    x: Tensor, labels: Tensor, target: Target, folds: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows with a label, their labels, and their folds (zeros if not given). Candidates become binary labels of
    regions."""
    rows = design(x, target.form)[0]
    fold = np.zeros(len(rows), dtype=int) if folds is None else folds
    if target.form == "candidate":
        labels = torch.where(labels[:, None] >= 0, (labels[:, None] == torch.arange(rows.shape[1])).long(), -1)
    label = labels.reshape(len(rows), -1)
    keep = (label >= 0).flatten().numpy()
    return rows.flatten(0, 1).numpy()[keep], label.flatten().numpy()[keep], np.repeat(fold, rows.shape[1])[keep]
