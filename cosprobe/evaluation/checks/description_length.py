"""How much data a probe needs: the online description length of labels given features, and accuracy against problems.

Accuracy alone does not say how hard the labels are to extract: a large probe on many problems may reach it anywhere.
The online code (Voita and Titov 2020, "Information-theoretic probing with minimum description length", section 3.2,
arXiv 2003.12298; after Blier and Ollivier 2018, "The description length of deep learning models") sends the labels in
blocks: the first at log2 K bits a label, every other one with the probe fitted to all blocks before it. Few bits
mean that few problems were enough.

Departures: blocks are of whole problems, so that no label is sent with its twin known, and double in size; and a
probe that saw n labels says (n p + 1/K) / (n + 1) instead of p, one uniform pseudo-label, without which a class absent
from an early block would cost without bound. Features are standardised by all training samples (their labels are
not used, so the code stays decodable by whoever holds the features), and the penalty is the same at every size: it was
chosen at full size, so early blocks cost rather more than they could.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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

FIRST = 10  # problems: the first block has at least as many, and fewer than twice


@dataclass(frozen=True)
class DescriptionLength:
    """The code length of one target's training labels at some cells.

    sizes: training problems seen by each probe, the last all of them. bits: per label, with its interval by problem
    (order of problems and fitted probes taken as given). uniform: log2 K bits, what a label costs with no probe.
    compression: uniform / bits. prior: bits per label of the same code when the only thing learnt is how frequent each
    label is. accuracy: on test, of the probe of every size. labels, n: labels sent, test samples. converged: whether
    every fit of a cell met its tolerance.
    """

    target: str
    cells: tuple[Cell, ...]
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
    lambdas: Float[Tensor, " penalty"],
    seed: int = 0,
) -> DescriptionLength:
    """Bits per label of `target` at each cell, and test accuracy against the number of training problems.

    lambdas: the penalty of each cell. seed: of the order of problems, the same for every cell.
    Raises ValueError for an unknown target or cell, not one penalty per cell, or fewer training problems than make two
    blocks.
    """
    kind = readable(samples, target)
    train, test = (labelled(samples, kind, cells, split) for split in ("train", "test"))
    problems, problem = np.unique(train.keys, return_inverse=True)
    sizes = doubling(len(problems), target)
    place = np.random.default_rng(seed).permutation(len(problems))[problem]
    stats = statistics(samples, cells)
    x, held = standardise(train.features, *stats), standardise(test.features, *stats)
    classes = samples.regions if kind.form == "candidate" else kind.classes
    uniform = math.log2(classes)
    bits = np.full((len(cells) + 1, len(train)), uniform)  # one row more: the prior
    hits, converged = [], np.full(len(cells), True)
    for size, following in zip(sizes, (*sizes[1:], 0), strict=True):
        seen = torch.from_numpy(place < size)
        known = train.labels[seen]
        probes = refit(x[:, seen], known, kind, lambdas)
        converged &= probes.converged
        hits.append(right(decide(held, probes, kind.form), test.labels))
        if size < following:
            block = (place >= size) & (place < following)
            at = torch.from_numpy(block)
            coming = train.labels[at]
            frequency = known.flatten().bincount(minlength=classes).double() / known.numel()
            bits[:-1, block] = code_length(decide(x[:, at], probes, kind.form), coming, known.numel())
            bits[-1, block] = code_length(frequency.log().expand(1, *coming.shape, -1), coming, known.numel())[0]
    length = estimate_mean(bits, train.keys)
    return DescriptionLength(
        target=target,
        cells=tuple(cells),
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


def side_by_side(lengths: Sequence[DescriptionLength]) -> DescriptionLength:
    """One result of several that were measured on the same labels of one target, in this order."""
    first = lengths[0]
    bits, lower, upper, compression, converged = (
        np.concatenate([getattr(one, name) for one in lengths])
        for name in ("bits", "lower", "upper", "compression", "converged")
    )
    accuracy = Estimate(*(np.concatenate([getattr(one.accuracy, name) for one in lengths])
                          for name in ("value", "lower", "upper")))  # fmt: skip
    return replace(
        first, cells=tuple(cell for one in lengths for cell in one.cells), bits=bits, lower=lower, upper=upper,
        compression=compression, accuracy=accuracy, converged=converged,
    )  # fmt: skip


def doubling(problems: int, target: str) -> tuple[int, ...]:
    """Sizes that double up to all `problems`, from at least FIRST. Raises ValueError when that is a single one."""
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
    """Bits per label that probabilities softmax(decision), mixed with one uniform pseudo-label after `seen` real
    ones, need for `labels`; the mean over regions where labels have them."""
    proba = decision.double().softmax(dim=-1)
    of_label = proba.gather(-1, labels.expand(proba.shape[:-1])[..., None])[..., 0]
    bits = -((seen * of_label + 1 / proba.shape[-1]) / (seen + 1)).log2()
    return bits.flatten(2).mean(dim=2).numpy() if bits.ndim > 2 else bits.numpy()
