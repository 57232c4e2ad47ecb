"""A fitted bank read on validation and test: the numbers a grid is built from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cosprobe.activations import ProbeSamples
from cosprobe.evaluation.predictions import Evaluated, InputReading, SplitPredictions, TargetPredictions
from cosprobe.probes import ProbeBank, brier, ece
from cosprobe.tasks import Target


def evaluate(
    samples: ProbeSamples,
    experts: Sequence[str],
    bank: ProbeBank,
    readings: Mapping[str, Mapping[str, InputReading]] | None = None,
) -> Evaluated:
    """Predictions of every cell for every target of the bank. experts: the transformer of each step kept. readings: of
    inputs, by target and input."""
    steps = sorted({cell.step for cell in samples.cells})
    train, validation, test = (samples.subset(split) for split in ("train", "validation", "test"))
    settled = np.zeros(len(samples)) if samples.choice is None else samples.choice
    results = []
    for target in bank.targets:
        read = dict((readings or {}).get(target.name, {}))
        kinds = np.isin(samples.kinds, target.kinds)
        none = int((kinds & (settled < 0)).sum()) if target.role == "choice" else 0
        results.append(
            TargetPredictions(
                target,
                train.labels[target.name].numpy(),
                train.keys,
                _predictions(validation, target, bank, steps, {name: one.validation for name, one in read.items()}),
                _predictions(test, target, bank, steps, {name: one.test for name, one in read.items()}),
                bank.lambdas[target.name].numpy(),
                none,
                _trust(test, target, bank),
                read,
            )
        )
    return Evaluated(samples.cells, tuple(experts), tuple(results), samples.left_out)


def _predictions(
    samples: ProbeSamples, target: Target, bank: ProbeBank, steps: list[int], inputs: dict[str, np.ndarray]
) -> SplitPredictions:
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
        inputs=inputs,
    )


def _trust(test: ProbeSamples, target: Target, bank: ProbeBank) -> dict[str, np.ndarray]:
    """How far the probabilities of every cell can be trusted, on test; nothing for a bank without temperatures."""
    labels = test.labels[target.name].flatten()
    if target.name not in bank.temperatures or not (labels >= 0).any():
        return {}
    raw = bank.decision(test.features, target.name).reshape(len(bank.cells), len(labels), -1)
    heat = bank.temperatures[target.name]
    proba = (raw / heat[:, None, None]).softmax(dim=-1)
    found = {"temperature": heat, "ece": ece(proba, labels), "ece_raw": ece(raw.softmax(-1), labels)}
    return {name: value.numpy() for name, value in (found | {"brier": brier(proba, labels)}).items()}
