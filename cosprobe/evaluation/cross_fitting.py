"""Cross-fitting: for few problems, every problem is a test problem of one bank and a training problem of others.

Fold k is predicted by bank k, which was fitted to all folds but k and k + 1, with penalties chosen on fold k + 1 (the
first fold follows the last). Choices are nested: bank k chooses its best cell on fold k + 1, and fold k measures it
(`nested_accuracy` in `grid.nc`).
Source: Chernozhukov et al. (2018), "Double/debiased machine learning", section 3, for the name and the scheme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from cosprobe.activations import ProbeSamples
from cosprobe.errors import InputError
from cosprobe.evaluation.predictions import Evaluated, InputReading, SplitPredictions, TargetPredictions, evaluate
from cosprobe.probes import ProbeBank

Readings = Mapping[str, Mapping[str, InputReading]]


def evaluate_divisions(
    samples: ProbeSamples, experts: Sequence[str], banks: Sequence[ProbeBank], readings: Sequence[Readings]
) -> list[Evaluated]:
    """What `evaluate` returns for each division of the samples: one without folds.

    experts: see `evaluate`. banks, readings: the probes of each division, in order, and those on its inputs.
    Raises InputError for other numbers of banks or readings than of divisions.
    """
    divisions = samples.divisions()
    if not len(divisions) == len(banks) == len(readings):
        raise InputError(f"{len(banks)} banks, {len(readings)} readings: expected one each for {len(divisions)} folds")
    return [evaluate(part, experts, bank, read) for part, bank, read in zip(divisions, banks, readings, strict=True)]


def joined(each: Sequence[Evaluated]) -> Evaluated:
    """The predictions of all divisions, with every sample as a test sample of one bank and a validation sample of
    another. A single division is returned as it is.

    x0-hat is not parsed: runs decode it for some problems only. Calibration is not measured: it would be of several
    banks. The reading of an input is that of the first bank, with the mean of the cross-validated accuracies.
    """
    if len(each) == 1:
        return each[0]
    targets = zip(*(one.results for one in each), strict=True)
    return replace(each[0], results=tuple(_joined(of_folds) for of_folds in targets))


def _joined(folds: Sequence[TargetPredictions]) -> TargetPredictions:
    """The predictions of one target by all banks."""
    first = folds[0]
    readings = {
        name: replace(one, accuracy=np.mean([fold.readings[name].accuracy for fold in folds], axis=0))
        for name, one in first.readings.items()
    }
    return replace(
        first,
        validation=_all([fold.validation for fold in folds]),
        test=_all([fold.test for fold in folds]),
        penalties=np.median([fold.penalties for fold in folds], axis=0),
        calibration={},
        readings=readings,
    )


def _all(parts: Sequence[SplitPredictions]) -> SplitPredictions:
    """The predictions of all banks on one split, one after the other."""
    answers = [part.model_answer for part in parts if part.model_answer is not None]
    return SplitPredictions(
        labels=np.concatenate([part.labels for part in parts]),
        keys=np.concatenate([part.keys for part in parts]),
        predicted=np.concatenate([part.predicted for part in parts], axis=1),
        model_answer=np.concatenate(answers) if answers else None,
        inputs={name: np.concatenate([p.inputs[name] for p in parts], axis=2) for name in parts[0].inputs},
        fold=np.repeat(np.arange(len(parts)), [len(part.keys) for part in parts]),
    )
