"""How much data a probe needs: online description length of the labels, and accuracy by number of training problems.

Accuracy alone does not show how many training problems a probe needs to reach it. The online (prequential) code of
Voita and Titov (2020), "Information-theoretic probing with minimum description length", section 3.2, arXiv 2003.12298
(after Blier and Ollivier 2018, "The description length of deep learning models") measures this. Labels are encoded in
blocks. The first block costs log2 K bits per label for K classes. Every later block is encoded with the probe that is
fitted to all blocks before it. A short code means that few problems were enough.

Departures from the paper:

* Blocks consist of whole problems, so samples of one problem are never in two blocks. Every block
  doubles the number of problems encoded so far.
* A probe fitted to n labels assigns the probability (n p + 1/K) / (n + 1) instead of p. This is one uniform
  pseudo-label. Without it, a class that is absent from the early blocks would have unbounded cost.
* Features are standardised by all training samples. This uses no labels, so a receiver who has the features can decode.
* All sizes use the penalty that was chosen at full size. Early blocks may therefore cost more than necessary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cosprobe.activations import ProbeSamples
from cosprobe.cells import Cell
from cosprobe.evaluation.checks.refitting import (
    Estimate,
    NotEnoughSamples,
    decide,
    estimate_mean,
    estimate_share,
    labelled,
    readable,
    refit,
    right,
    statistics,
)
from cosprobe.probes import standardise

FIRST = 10  # the first block has at least this many problems, and fewer than twice as many


@dataclass(frozen=True)
class DescriptionLength:
    """Code length of one target's training labels at some cells.

    names: names of the cells; after `side_by_side` names such as `best` and those of inputs.
    sizes: number of training problems of each probe, the last one all of them.
    bits, lower, upper: bits per label with a 95 % interval by problem, given the order of problems and the probes.
    uniform: log2 K bits, the cost of a label without a probe.
    compression: uniform / bits.
    prior: bits per label of the same code if only the label frequencies are learnt.
    accuracy: test accuracy of the probe of every size.
    labels, n: number of encoded labels and of test samples.
    converged: whether every fit of a cell met its tolerance.
    """

    target: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    bits: Float[np.ndarray, " cell"]
    lower: Float[np.ndarray, " cell"]
    upper: Float[np.ndarray, " cell"]
    uniform: float
    compression: Float[np.ndarray, " cell"]
    prior: float
    accuracy: Estimate
    labels: int
    n: int
    converged: Bool[np.ndarray, " cell"]


def description_length(
    samples: ProbeSamples,
    target: str,
    cells: Sequence[Cell],
    penalties: Float[Tensor, " penalty"],
    seed: int = 0,
) -> DescriptionLength:
    """Bits per label of `target` at each cell, and test accuracy against the number of training problems.

    penalties: the penalty of each cell. seed: seed of the order of problems, which is the same for every cell.
    Raises InputError for an unknown target or cell, or a number of penalties other than one per cell. Raises
    NotEnoughSamples when a split has no sample with a label of the target, or training problems do not suffice for two
    blocks.
    """
    kind = readable(samples, target)
    train, test = (labelled(samples, kind, cells, split) for split in ("train", "test"))
    problems, problem = np.unique(train.keys, return_inverse=True)
    sizes = doubling(len(problems), target)
    position = np.random.default_rng(seed).permutation(len(problems))[problem]
    stats = statistics(samples, cells)
    x, held = standardise(train.features, *stats), standardise(test.features, *stats)
    classes = samples.regions if kind.form == "candidate" else kind.classes
    uniform = math.log2(classes)
    bits = np.full((len(cells) + 1, len(train)), uniform)  # the last row is the prior
    hits, converged = [], np.full(len(cells), True)
    for size, following in zip(sizes, (*sizes[1:], 0), strict=True):
        seen = torch.from_numpy(position < size)
        known = train.labels[seen]
        probes = refit(x[:, seen], known, kind, penalties)
        converged &= probes.converged
        hits.append(right(decide(held, probes, kind.form), test.labels))
        if size < following:
            block = (position >= size) & (position < following)
            at = torch.from_numpy(block)
            coming = train.labels[at]
            frequency = known.flatten().bincount(minlength=classes).double() / known.numel()
            bits[:-1, block] = code_length(decide(x[:, at], probes, kind.form), coming, known.numel())
            bits[-1, block] = code_length(frequency.log().expand(1, *coming.shape, -1), coming, known.numel())[0]
    length = estimate_mean(bits, train.keys)
    return DescriptionLength(
        target=target,
        names=tuple(map(str, cells)),
        sizes=sizes,
        bits=length.value[:-1],
        lower=length.lower[:-1],
        upper=length.upper[:-1],
        uniform=uniform,
        compression=uniform / length.value[:-1],
        prior=float(length.value[-1]),
        accuracy=estimate_share(np.stack(hits, axis=1), test.keys),
        labels=train.labels.numel(),
        n=len(test),
        converged=converged,
    )


def side_by_side(named: Mapping[str, DescriptionLength]) -> DescriptionLength:
    """Joins results of one cell each into one result with these names. All must be of the same labels of one target."""
    lengths = list(named.values())
    bits, lower, upper, compression, converged = (
        np.concatenate([getattr(one, name) for one in lengths])
        for name in ("bits", "lower", "upper", "compression", "converged")
    )
    accuracy = Estimate(*(np.concatenate([getattr(one.accuracy, name) for one in lengths])
                          for name in ("value", "lower", "upper")))  # fmt: skip
    return replace(
        lengths[0], names=tuple(named), bits=bits, lower=lower, upper=upper,
        compression=compression, accuracy=accuracy, converged=converged,
    )  # fmt: skip


def doubling(problems: int, target: str) -> tuple[int, ...]:
    """Numbers of problems that double from at least FIRST up to `problems`. Raises NotEnoughSamples for a single
    size."""
    sizes = [problems]
    while sizes[0] // 2 >= FIRST:
        sizes.insert(0, sizes[0] // 2)
    if len(sizes) < 2:
        raise NotEnoughSamples(
            f"target {target!r}: {problems} training problems, expected at least {2 * FIRST} for a description length; "
            "raise task.problems"
        )
    return tuple(sizes)


def code_length(
    decision: Float[Tensor, "cell sample *region out"], labels: Int[Tensor, " sample *region"], seen: int
) -> Float[np.ndarray, "cell sample"]:
    """Bits per label under the probabilities softmax(decision), with one uniform pseudo-label added to `seen` labels.

    The mean over regions for region labels.
    """
    proba = decision.double().softmax(dim=-1)
    of_label = proba.gather(-1, labels.expand(proba.shape[:-1])[..., None])[..., 0]
    bits = -((seen * of_label + 1 / proba.shape[-1]) / (seen + 1)).log2()
    return bits.flatten(2).mean(dim=2).numpy() if bits.ndim > 2 else bits.numpy()
