"""What a run will need, before it starts: problems, bytes, evaluations, memory, hours, and what it could show.

Everything but measured seconds follows from the settings, the problems and the configuration files of the model.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cosprobe.activations import (
    NOT_SEEN,
    RANDOM_WEIGHTS,
    Pooling,
    Sampler,
    SampleTable,
    few_samples,
    few_steps,
    folds_of,
    images,
    seconds,
    store_bytes,
)
from cosprobe.cells import SPLIT_ORDER
from cosprobe.config import POOLINGS, CaptureConfig, TrainRun
from cosprobe.errors import InputError
from cosprobe.evaluation import MUST_BEAT, detectable_accuracy
from cosprobe.files import size_text
from cosprobe.models import (
    architecture,
    block_list,
    check_guidance,
    check_prompts,
    check_size,
    experts,
    first_transformer,
    load_pipeline,
    outline,
)
from cosprobe.reporting import FILMED
from cosprobe.tasks import Role, Sample, Task

FEW = 8  # most classes of a target whose samples are counted one by one
HIDDEN = 12  # tensors of the size of the hidden states that a block holds at once, about


@dataclass(frozen=True)
class Power:
    """What the test problems can show of a target, at p = 0.05 corrected for all cells.

    counts: number of samples by split and class. problems: test problems with a label. chance: accuracy of the best
    guess on them. accuracy: the smallest that a map shows with probability 0.8, None if it can show none.
    """

    target: str
    counts: dict[str, dict[str, int]]
    problems: int
    chance: float
    accuracy: float | None

    def __str__(self) -> str:
        least = f"{self.target}: {self.problems} test problems, chance {self.chance:.2f}: "
        if self.accuracy is None:
            return least + "too few to show anything, even if every answer were right"
        return least + f"a true accuracy of {self.accuracy:.2f} (skill {self.skill:.2f}) is significant in 4 of 5 runs"

    @property
    def skill(self) -> float | None:
        """(accuracy - chance) / (1 - chance)."""
        return None if self.accuracy is None else (self.accuracy - self.chance) / (1 - self.chance)


@dataclass(frozen=True)
class Plan:
    """What a run will need.

    samples: number by split. cells: of the map. stored: bytes of the activations by pooling. evaluations: samples that
    go through the transformer, counted twice with classifier-free guidance; further ones with random weights included.
    decodes: clips that are decoded. host, device: bytes of memory, estimated. flops: operations of all evaluations,
    estimated from the sizes of layers. hours: with the reason for it; None if nothing is known of the speed.
    power: of every target that needs evidence. warnings: what would stop the run or mislead its user, a sentence each.
    """

    samples: dict[str, int]
    cells: int
    pooling: str
    stored: dict[str, int]
    evaluations: int
    decodes: int
    host: int
    device: int
    flops: float
    hours: tuple[float, str] | None
    power: tuple[Power, ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        samples = ", ".join(f"{count} {split}" for split, count in self.samples.items())
        others = ", ".join(f"{name} {size_text(size)}" for name, size in self.stored.items() if name != self.pooling)
        speed = "not known: set plan.flops_per_second"
        if self.hours is not None:
            hours, source = self.hours
            speed = f"{hours:.3g} h on one device ({source})" if hours > 1 else f"{60 * hours:.2g} min ({source})"
        lines = [
            f"samples        {samples}",
            f"cells          {self.cells} (steps x layers x branches of guidance x positions)",
            f"disk           {size_text(self.stored[self.pooling])} with probe.pooling={self.pooling} ({others})",
            f"evaluations    {self.evaluations} of the transformer, {self.flops:.3g} operations",
            f"decodes        {self.decodes} clips, finished videos and x0-hat",
            f"host memory    about {size_text(self.host)} for each process",
            f"device memory  about {size_text(self.device)} for each process, without decoding",
            f"sampling       {speed}",
        ]
        for one in self.power:
            lines += [
                f"labels         {one.target}, of the samples that have it: {_counted(one.counts)}",
                f"power          {one}",
            ]
        return "\n".join([*lines, *(f"warning        {line}" for line in self.warnings)])


def make_plan(run: TrainRun, task: Task, drawn: Sequence[Sample]) -> Plan:
    """The plan of a run of probes.

    task: of the run, with its margin. drawn: its samples.
    Raises InputError for settings that have no plan, such as layers that the model has not.
    """
    model = outline(run.pipeline)
    sampler = Sampler(model, run.pipeline, task, run.trainer)
    config, probe, table = sampler.config, run.probe, SampleTable.of(task, drawn, {})
    splits = np.array(SPLIT_ORDER)[table.columns["split"].numpy()]
    branches = _branches(sampler)
    few = few_samples(splits, probe.random_weights) if probe.random_weights else []
    cells = cells_of(sampler, probe)
    poolings = [name for name in POOLINGS if task.regions or name != "region"]
    stored = {p: store_bytes(sampler, replace(probe, pooling=p), len(drawn), len(few)) for p in poolings}

    parser, decoded = task.candidates > 0, probe.steps_decoded(config.steps)
    films = FILMED if parser else 0
    evaluations = (len(drawn) + films) * config.steps * branches
    evaluations += len(few) * len(RANDOM_WEIGHTS) * len(few_steps(probe, config.steps))
    before_last = len([step for step in decoded if step < config.steps - 1])
    decodes = len(drawn) + int((splits != "train").sum()) * before_last + films * len(decoded) if parser else 0
    flops = evaluations * evaluation_flops(sampler)
    host, device = _memory(sampler, probe.memory)
    warnings = _found(run, sampler, drawn, stored[probe.pooling])
    hours = None
    if run.plan.flops_per_second:
        rate = run.plan.flops_per_second
        hours = flops / rate / 3600, f"assuming {rate:.3g} operations per second, without decoding"
    elif not warnings and any(run.pipeline.folder.glob("transformer/*.safetensors")):
        hours = _timed(run, sampler, drawn, evaluations / branches, decodes)
    samples = {split: int((splits == split).sum()) for split in SPLIT_ORDER}
    if probe.folds:
        samples = {f"in {probe.folds} folds": len(drawn)}
    return Plan(
        samples, cells, probe.pooling, stored, evaluations, decodes, host, device, flops, hours,
        power(task, table, cells, probe.folds), tuple(warnings),
    )  # fmt: skip


def cells_of(sampler: Sampler, probe: CaptureConfig) -> int:
    """Number of cells of the map of a run."""
    boxes = [(0.0, 0.0, 1.0, 1.0)] * sampler.task.regions
    positions = Pooling(probe.pooling, probe.frames, [boxes]).positions(sampler.token_grid)
    kept = len(probe.steps_kept(sampler.config.steps)) * len(probe.layers_kept(sampler.depth))
    return kept * _branches(sampler) * len(positions)


def _branches(sampler: Sampler) -> int:
    """Evaluations of the transformer in a step: two with classifier-free guidance."""
    return 2 if sampler.config.guided(architecture(sampler.model).guidance) else 1


def power(task: Task, table: SampleTable, cells: int, folds: int = 0) -> tuple[Power, ...]:
    """What the test problems can show of every target that is compared with inputs.

    Not of answers of the model, which are not known before it samples, and not of labels of regions. cells: number of
    cells of the map. folds: of cross-fitting, with which every problem is a test problem.
    Raises InputError for fewer problems than folds.
    """
    found, keys = [], table.columns["key"].numpy()
    splits = np.array(SPLIT_ORDER)[table.columns["split"].numpy()]
    if folds:
        folds_of(keys, folds)  # refuses fewer problems than folds
        splits[:] = "test"
    for target in task.targets:
        if target.role not in MUST_BEAT or target.role is Role.MODEL_ANSWER or target.form == "region":
            continue
        label = table.columns[f"label.{target.name}"].numpy()
        names = target.names or tuple(map(str, range(task.regions if target.form == "candidate" else target.classes)))
        counts = {
            split: {
                names[value]: int((label[splits == split] == value).sum()) for value in np.unique(label[label >= 0])
            }
            for split in (("test",) if folds else SPLIT_ORDER)
        }
        test = (splits == "test") & (label >= 0)
        if test.any():
            guess = max(1 / len(names), max(counts["test"].values()) / int(test.sum()))
            problems = len(np.unique(keys[test]))
            accuracy = detectable_accuracy(problems, guess, cells) if guess < 1 else None
            found.append(Power(target.name, counts, problems, guess, accuracy))
    return tuple(found)


def evaluation_flops(sampler: Sampler) -> float:
    """Operations of one evaluation of the transformer for one sample, from the sizes of its layers.

    A multiplication and an addition count as two. Layers for text are counted as if they ran on all tokens of the
    video, which is too much by a few percent; operations without weights other than attention are not counted.
    """
    grid, transformer = sampler.token_grid, first_transformer(sampler.model)
    tokens, width = math.prod(grid), transformer.config.num_attention_heads * transformer.config.attention_head_dim
    blocks = block_list(sampler.model)
    weights = sum(part.weight.numel() for block in blocks for part in block.modules() if isinstance(part, nn.Linear))
    return 2.0 * weights * tokens + 4.0 * len(blocks) * tokens * (tokens + sampler.config.prompt_tokens) * width


def _memory(sampler: Sampler, chunk: float) -> tuple[int, int]:
    """Bytes of host and device memory. chunk: probe.memory."""
    parts = {name: part for name, part in sampler.model.components.items() if isinstance(part, nn.Module)}
    sizes = {name: sum(p.numel() * p.element_size() for p in part.parameters()) for name, part in parts.items()}
    transformer = first_transformer(sampler.model)
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    states = (
        sampler.config.batch * math.prod(sampler.token_grid) * width * next(transformer.parameters()).element_size()
    )
    held = {"none": sum(sizes.values()), "model": max(sizes.values())}
    of_experts = sum(sizes[name] for name, part in parts.items() if part in experts(sampler.model).values())
    held["group"] = sum(sizes.values()) - of_experts + 2 * of_experts // max(1, len(block_list(sampler.model)))
    offloaded = 0 if sampler.config.offload == "none" and torch.cuda.is_available() else sum(sizes.values())
    return offloaded + int(chunk * 1e9) + 10**9, held[sampler.config.offload] + HIDDEN * states


def _timed(run: TrainRun, sampler: Sampler, drawn: Sequence[Sample], calls: float, decodes: int) -> tuple[float, str]:
    """Hours of sampling on one device of this machine, and where they are from. calls: evaluations without guidance."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = replace(sampler, model=load_pipeline(run.pipeline, device))
    problems = [sample.problem for sample in drawn[: loaded.config.batch]]
    cost = seconds(loaded.model, loaded.config, images(loaded.task, problems), [p.prompt for p in problems])
    spent = calls * cost.evaluation + decodes * cost.decode + len(drawn) * (cost.text + cost.image)
    return spent / 3600, f"from one step and one decoding of {len(problems)} samples"


def _found(run: TrainRun, sampler: Sampler, drawn: Sequence[Sample], size: int) -> list[str]:
    """What would stop the run or its user."""
    model, config = sampler.model, sampler.config
    lines = [] if sampler.sees_image else [NOT_SEEN]
    sides = sampler.task.image(drawn[0].problem).shape[:2]
    checks: list[Callable[[], Any]] = [lambda: check_guidance(model, config)]
    checks.append(lambda: check_size(model, sides, config.frames))
    if model.tokenizer is None:
        lines.append("the length of prompts was not checked: the folder of the model has no tokenizer")
    else:
        prompts = [*(sample.problem.prompt for sample in drawn), config.negative_prompt]
        checks.append(lambda: check_prompts(model, prompts, config.prompt_tokens))
    for one in checks:
        try:
            one()
        except InputError as error:
            lines.append(" ".join(str(error).split()))
    folder = Path(run.run_dir).absolute()
    place = next(path for path in (folder, *folder.parents) if path.is_dir())
    if (free := shutil.disk_usage(place).free) < size:
        lines.append(f"run_dir={run.run_dir!r}: {size_text(free)} are free there, {size_text(size)} are needed")
    return lines


def _counted(counts: dict[str, dict[str, int]]) -> str:
    """Number of samples of every class by split, or, of many classes, the fewest and most."""
    classes = list(counts["test"])
    splits = " / ".join(counts)
    if len(classes) <= FEW:
        each = (f"{name}: {' / '.join(str(counts[split][name]) for split in counts)}" for name in classes)
        return f"{', '.join(each)} ({splits})"
    fewest = (f"{min(of.values())} to {max(of.values())}" for of in counts.values())
    return f"{len(classes)} classes of {' / '.join(fewest)} samples ({splits})"
