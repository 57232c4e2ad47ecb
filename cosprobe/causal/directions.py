"""What probes give to edits: directions that raise the score of a label, and erasers of a concept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from concept_erasure import LeaceEraser
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from cosprobe.activations import ProbeSamples
from cosprobe.cells import Cell
from cosprobe.errors import InputError
from cosprobe.probes import ProbeBank

NOTHING = 1e-9  # singular values (of covariances of whitened features with concepts) below this are rounding errors


def probe_directions(
    bank: ProbeBank, target: str, cell: Cell, labels: Int[Tensor, " sample"]
) -> Float[Tensor, "sample region channel"]:
    """The direction, in the space of hidden states, along which the score of a label rises fastest.

    labels: for every sample the label whose score is to rise: for form `candidate` a region, otherwise a class.
    The direction of a sample has norm 1 over regions and channels together. It is the gradient of the decision value of
    the label minus the mean decision value of all labels, without the standardisation of the features. For form
    `candidate` it raises the score in the region of the label and lowers it, by less, in the others.
    Raises InputError for a target of form `region`, and for an unknown target or cell.
    """
    form = bank.target(target).form
    if form == "region":
        raise InputError(
            f"use.target={target!r}: has one label per region; expected a target with one label per problem"
        )
    one = bank.select([cell])
    weights, scale = one.weights[target][0], one.std[0].clamp_min(torch.finfo(torch.float32).tiny)
    if form == "candidate":
        score = torch.eye(bank.regions) - 1 / bank.regions
        found = score[labels][:, :, None] * (weights[:, 0] / scale)[None, None]
    else:
        wanted = weights - weights.mean(dim=1, keepdim=True)
        found = wanted.T[labels].unflatten(1, (bank.regions, -1)) / scale
    return found / found.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None]


def random_directions(
    like: Float[Tensor, "sample region channel"], seed: int
) -> Float[Tensor, "sample region channel"]:
    """Directions of norm 1 that share one random channel vector, with the weights of the regions in `like`.

    So a random direction is added in the same regions, as strongly, as the direction it is compared with. It has the
    other sign in regions where that direction points away from that of its strongest region.
    """
    vector = torch.randn(like.shape[2], generator=torch.Generator().manual_seed(seed))
    size = like.norm(dim=2, keepdim=True)
    strongest = like[torch.arange(len(like)), size[:, :, 0].argmax(dim=1)]
    away = torch.einsum("brc,bc->br", like, strongest)[:, :, None] < 0
    found = torch.where(away, -size, size) * vector
    return found / found.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None]


def concept_erasers(samples: ProbeSamples, target: str, cells: Sequence[Cell]) -> Mapping[tuple[int, int], LeaceEraser]:
    """Erasers, by (step, layer), that make a target undecodable from features for linear probes of its form.

    samples: training samples. A vector is the feature of one region. Its concept is, for form `candidate`, whether the
    region is the label; for form `region`, the label of the region. For form `problem`, whose probes read the regions
    side by side, it is the label of the problem in each region separately: all regions together could have equal class
    means where single ones do not.
    Features are means over tokens. An eraser is affine, so what it does to every token it does to their mean.
    Source: Belrose et al. (2023), "LEACE: Perfect linear concept erasure in closed form", arXiv 2306.03819.
    """
    form, labels = samples.target(target).form, samples.labels[target]
    kept = torch.nonzero((labels.flatten(1) if labels.ndim > 1 else labels[:, None]).amin(dim=1) >= 0)[:, 0]
    labels, regions = labels[kept], samples.regions
    if form == "problem":
        classes = one_hot(labels).double()
        each = torch.eye(regions, dtype=torch.float64)  # [region of the vector, region of the column]
        columns = torch.einsum("bk,rs->brsk", classes - classes.mean(dim=0), each).flatten(2).flatten(0, 1)
    else:
        concept = one_hot(labels, regions) if form == "candidate" else labels
        columns = one_hot(concept.flatten()).double()  # of class numbers, LEACE would take one for twice the other
    found = {}
    for cell in cells:
        at = samples.cell_index(cell.step, cell.layer, cell.branch, cell.position)
        vectors = samples.features[kept, at].flatten(0, 1).double()
        eraser = LeaceEraser.fit(vectors, columns, shrinkage=False, svd_tol=NOTHING)
        found[cell.step, cell.layer] = LeaceEraser(*(part.float() for part in _parts(eraser)))
    return found


def random_erasers(erasers: Mapping[tuple[int, int], LeaceEraser], seed: int) -> Mapping[tuple[int, int], LeaceEraser]:
    """Erasers that remove as many random dimensions as those they are compared with, around the same mean."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for at, eraser in erasers.items():
        channels, removed = eraser.proj_right.shape[1], int(eraser.proj_right.any(dim=1).sum())
        drawn = torch.randn(channels, removed, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(drawn)[0].to(eraser.proj_left)
        found[at] = LeaceEraser(basis, basis.T, eraser.bias)
    return found


@dataclass(frozen=True)
class Matched:
    """Moves every vector within the directions that `random` removes, as far as `eraser` would move it.

    Random directions alone remove less of a vector than those of a concept, so they would be a control of another size.
    """

    eraser: LeaceEraser
    random: LeaceEraser

    def __call__(self, x: Float[Tensor, "vector channel"]) -> Float[Tensor, "vector channel"]:
        size = (self.eraser(x) - x).norm(dim=-1, keepdim=True)
        change = self.random(x) - x
        return x + change * (size / change.norm(dim=-1, keepdim=True).clamp_min(1e-12))


def on_device(erasers: Mapping[tuple[int, int], LeaceEraser], device: Any) -> Mapping[tuple[int, int], LeaceEraser]:
    """The same erasers on another device."""
    return {at: LeaceEraser(*(part.to(device) for part in _parts(eraser))) for at, eraser in erasers.items()}


def _parts(eraser: LeaceEraser) -> tuple[Tensor, Tensor, Tensor]:
    assert eraser.bias is not None
    return eraser.proj_left, eraser.proj_right, eraser.bias
