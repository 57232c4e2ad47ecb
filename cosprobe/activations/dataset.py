"""From a store to what probes are trained on: features of every cell, labels of every target.

Two things are added to what was stored. Every answer or choice gets a control of the same shape: a random relabelling
of an attribute that can be seen. And the nuisances become an input, beside those that were captured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from cosprobe.probes.datamodule import ProbeSamples
from cosprobe.evaluation.baselines import InputFeatures
from cosprobe.evaluation.checks.confounds import nuisance_columns
from cosprobe.evaluation.scoring import RELABELLED
from cosprobe.activations.store import ActivationStore
from cosprobe.tasks import Target, Task
from cosprobe.cells import NUISANCE, SPLIT_ORDER, Cell

HEADLINE = ("answer", "choice")  # roles whose claims need a selectivity control


def load_samples(store: ActivationStore, task: Task) -> tuple[ProbeSamples, dict[str, InputFeatures], list[str]]:
    """What probes are trained on, the inputs they are compared with, and the expert that ran at each step kept.

    Targets that no probe can be trained on are left out, and the samples say why.
    """
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
    reasons = {t.name: _unfit(t, labels[t.name].numpy(), split) for t in task.targets}
    targets = [t for t in task.targets if not reasons[t.name]]
    controls, relabels = relabelled(targets, labels)
    samples = ProbeSamples(
        features=tensors["features"].flatten(1, 4),
        cells=cells,
        targets=(*targets, *(t for t in controls if not _unfit(t, relabels[t.name].numpy(), split))),
        labels=labels | relabels,
        split=split,
        keys=np.array([f"{key:015x}" for key in tensors["key"].tolist()]),
        kinds=kinds,
        choice=tensors["choice"].numpy(),
        replica=tensors["replica"].numpy(),
        scores={name: tensors[name].numpy() for name in ("x0_readout", "final", "solved")},
        difficulty={name: value.numpy() for name, value in _under("difficulty.", tensors).items()},
        left_out=tuple(reason for reason in reasons.values() if reason),
    )
    captured = _under("input.", tensors)
    names = dict.fromkeys(name.rpartition(".")[0] for name in captured)
    inputs = {name: InputFeatures(captured[f"{name}.whole"], captured.get(f"{name}.region")) for name in names}
    if samples.difficulty:
        inputs[NUISANCE] = InputFeatures(nuisance_columns(samples)[:, None, None, None])
    return samples, inputs, notes["experts"]


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


def _unfit(target: Target, labels: np.ndarray, split: np.ndarray) -> str:
    """Why no probe of a target can be trained and read on these samples; empty when one can."""
    carried = labels.reshape(len(labels), -1)[:, 0] >= 0
    classes = len(np.unique(labels[(split == "train") & carried]))
    empty = [part for part in SPLIT_ORDER if not carried[split == part].any()]
    whose = "the model settles on" if target.role == "choice" else "it has"
    if empty:
        return f"target {target.name!r} is left out: no sample of {' and '.join(empty)} carries it"
    if classes < 2:
        which = "1 class" if classes == 1 else f"{classes} classes"
        return f"target {target.name!r} is left out: {whose} {which} in the training samples, expected at least 2"
    return ""


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose name begins with `prefix`, under the rest of their name."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
