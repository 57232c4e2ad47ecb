"""A fitted bank read on validation and test: the numbers a grid is built from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cosprobe.data import ProbeSamples
from cosprobe.probes import ProbeBank
from cosprobe.scoring import Evaluated, SplitPredictions, TargetPredictions
from cosprobe.tasks import Target


def evaluate(samples: ProbeSamples, experts: Sequence[str], bank: ProbeBank) -> Evaluated:
    """Predictions of every cell for every target of the bank. experts: the transformer of each step kept."""
    steps = sorted({cell.step for cell in samples.cells})
    train, validation, test = (samples.subset(split) for split in ("train", "validation", "test"))
    settled = np.zeros(len(samples)) if samples.choice is None else samples.choice
    results = []
    for target in bank.targets:
        kinds = np.isin(samples.kinds, target.kinds)
        none = int((kinds & (settled < 0)).sum()) if target.role == "choice" else 0
        results.append(
            TargetPredictions(
                target,
                train.labels[target.name].numpy(),
                _predictions(validation, target, bank, steps),
                _predictions(test, target, bank, steps),
                bank.lambdas[target.name].numpy(),
                none,
            )
        )
    return Evaluated(samples.cells, tuple(experts), tuple(results))


def _predictions(samples: ProbeSamples, target: Target, bank: ProbeBank, steps: list[int]) -> SplitPredictions:
    readout = None
    if target.role in ("answer", "choice"):  # what a forced choice reads from the decoded x0-hat
        scores = samples.scores["x0_readout"][:, steps]
        readout = np.where(np.isnan(scores).any(-1), -1, np.nan_to_num(scores).argmax(-1)).T
    return SplitPredictions(
        labels=samples.labels[target.name].numpy(),
        keys=samples.keys,
        predicted=bank.predict(samples.features, target.name).numpy(),
        readout=readout,
        drawn=samples.choice,
    )
