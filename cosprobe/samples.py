"""From a store to what probes are trained on: features of every cell, labels of every target.

Two things are added to what was stored. Sources that are the same at every step (noise, first frame, prompt,
nuisances) become cells of their own, so that the baselines are fitted by the same solver as the layers. And every
answer or choice gets a control of the same shape: a random relabelling of an attribute that can be seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from cosprobe.collect import say
from cosprobe.data import ProbeSamples
from cosprobe.nuisance import nuisance_rows, own_blocks
from cosprobe.scoring import RELABELLED
from cosprobe.store import ActivationStore
from cosprobe.tasks import Target, Task
from cosprobe.types import EVERY_STEP, NUISANCE, PROMPT, SPLIT_ORDER, Cell

HEADLINE = ("answer", "choice")  # roles whose claims need a selectivity control


def load_samples(store: ActivationStore, task: Task) -> tuple[ProbeSamples, list[str]]:
    """What probes are trained on, and the expert that ran at each step kept."""
    tensors, notes = store.read()
    cells = tuple(
        Cell(step, site, branch, place)
        for step in notes["steps"]
        for site in notes["sites"]
        for branch in notes["branches"]
        for place in notes["places"]
    )
    kinds = np.array(task.kinds)[tensors["kind"].numpy()]
    split = np.array(SPLIT_ORDER)[tensors["split"].numpy()]
    labels = {}
    for target in task.targets:
        if target.role == "choice":
            labels[target.name] = torch.where(torch.from_numpy(np.isin(kinds, target.kinds)), tensors["choice"], -1)
        else:
            labels[target.name] = tensors[f"label.{target.name}"]
    targets = [t for t in task.targets if t.role != "choice" or _settles(labels[t.name].numpy(), split, t.name)]
    controls, relabels = relabelled(targets, labels)
    samples = ProbeSamples(
        features=tensors["features"].flatten(1, 4),
        cells=cells,
        targets=(*targets, *controls),
        labels=labels | relabels,
        split=split,
        keys=np.array([f"{key:015x}" for key in tensors["key"].tolist()]),
        kinds=kinds,
        choice=tensors["choice"].numpy(),
        replica=tensors["replica"].numpy(),
        scores={name: tensors[name].numpy() for name in ("x0_readout", "final", "solved")},
        difficulty={name: value.numpy() for name, value in _under("difficulty.", tensors).items()},
    )
    return with_fixed(samples, _under("fixed.", tensors), notes["branches"][0], notes["places"]), notes["experts"]


def with_fixed(samples: ProbeSamples, fixed: Mapping[str, Tensor], branch: str, places: list[str]) -> ProbeSamples:
    """The same samples with a cell per place for every source that belongs to the whole run.

    fixed: [sample, place, region, channel], the prompt [sample, channel]. Prompt and nuisances are the same for
    every region; each region holds them in columns of its own, or a scorer shared by the regions could not use them.
    """
    regions, width = samples.features.shape[2:]
    columns, cells = [samples.features], list(samples.cells)
    rows = dict(fixed)
    if PROMPT in rows:
        rows[PROMPT] = own_blocks(rows[PROMPT].float(), regions, width)[:, None].expand(-1, len(places), -1, -1)
    if samples.difficulty:
        rows[NUISANCE] = nuisance_rows(samples, width)[:, None].expand(-1, len(places), -1, -1)
    for name, values in rows.items():
        columns.append(pad(values, (0, width - values.shape[-1])).to(samples.features.dtype))
        cells += [Cell(EVERY_STEP, name, branch, place) for place in places]
    return replace(samples, features=torch.cat(columns, dim=1), cells=tuple(cells))


def relabelled(
    targets: Sequence[Target], labels: Mapping[str, Tensor]
) -> tuple[tuple[Target, ...], dict[str, Int[Tensor, " sample"]]]:
    """A control for every answer or choice: same form, same classes, same samples, another label.

    Each value of a visible attribute (the first perception target with one label per problem) gets one random class,
    the same in every split, so a probe can learn it by remembering values (Hewitt and Liang 2019, arXiv 1909.03368,
    section 2). Nothing when there is no such attribute.
    """
    attributes = [labels[t.name].long() for t in targets if t.role == "perception" and t.form == "problem"]
    if not attributes:
        return (), {}
    shown, controls, found = attributes[0], [], {}
    for target in targets:
        if target.role in HEADLINE:
            control = replace(target, name=f"{target.name}_{RELABELLED}", role=RELABELLED)
            seed = int(hashlib.sha256(control.name.encode()).hexdigest()[:12], 16)
            table = torch.from_numpy(np.random.default_rng(seed).integers(control.classes, size=int(shown.max()) + 1))
            found[control.name] = torch.where((labels[target.name] >= 0) & (shown >= 0), table[shown.clamp(min=0)], -1)
            controls.append(control)
    return tuple(controls), found


def _settles(labels: np.ndarray, split: np.ndarray, name: str) -> bool:
    """Whether the model settles on answers often enough to train probes of them; says so when it does not."""
    classes = len(np.unique(labels[(split == "train") & (labels >= 0)]))
    empty = [part for part in SPLIT_ORDER if not (labels[split == part] >= 0).any()]
    if classes < 2 or empty:
        say(f"target {name!r} is left out: the model settles on {classes} different answers in training samples")
    return classes >= 2 and not empty


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose name begins with `prefix`, under the rest of their name."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
