"""`python probe.py use=intervene`: samples an experiment with its controls, and writes table, figure and page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xarray as xr

from cosprobe.activations import Sampler, StoredSamples, load_samples
from cosprobe.causal.edits import as_plain, save_listed
from cosprobe.causal.effects import CLEAN, FILE, Agreement, Pairing, agreement, save_table, summarised
from cosprobe.causal.experiments import (
    CONTROL,
    PROBE,
    Ablate,
    Erase,
    Experiment,
    Noise,
    Steer,
    Swap,
    best_cells,
)
from cosprobe.causal.report import LEAST_PAIRS, claims, print_page, write_page
from cosprobe.causal.run import Intervention, Outcomes, clean_evaluations, sample_conditions
from cosprobe.cells import parse_selection
from cosprobe.config import InterveneConfig
from cosprobe.ensembles import ProbeScorer
from cosprobe.errors import InputError
from cosprobe.evaluation import Grid
from cosprobe.models import COND, architecture, pipeline_fingerprint
from cosprobe.probes import ProbeBank
from cosprobe.runs import REPORT
from cosprobe.runtime import rank_and_world, say
from cosprobe.tasks import ANSWER_ROLES, Role, Sample, TaskConfig, answers_are_regions, fresh_problems, with_noise

FOLDER = "causal"
PROBLEMS = {"quick": 24, "full": 72}  # with 72, a cell of 64 without a flip has a bound below 0.1
PLANE = {"quick": (3, 3), "full": (5, 8)}  # most steps and layers of a plane
NOISE_STEPS = {"quick": 5, "full": 8}  # steps that are hit; noise has no layers
VERSION = 1  # of what edits do; raised, outcomes of an earlier version are sampled again
STEERED = 1  # cell, and then one layer at all steps: with 20 directions each, more would take over 8 minutes
ALL = "all"  # the position of probes that read all frames
PAIRINGS: dict[str, tuple[Pairing, ...]] = {
    "noise": (
        Pairing("fresh", "equal damage", "unchanged", -1),
        Pairing("fresh", "renoised", "unchanged", -1),
    ),
    "swap": (
        Pairing("swap", "same answer"),
        Pairing("swap", "random state"),
        Pairing("swap", "wrong step"),
        Pairing("two regions", "wrong regions"),
        Pairing("last frame", "same answer"),
    ),
    "steer": (Pairing(PROBE, "random direction"), Pairing(PROBE, CONTROL)),
    "erase": (
        Pairing("erased", "random directions erased", "unchanged", -1),
        Pairing("erased", "control erased", "unchanged", -1),
    ),
    "ablate": (
        Pairing("zero", CLEAN, "unchanged", -1),
        Pairing("mean", CLEAN, "unchanged", -1),
        Pairing("resample", CLEAN, "unchanged", -1),
        Pairing("zero, region of the answer", "zero, another region", "unchanged", -1),
    ),
}


def intervene(
    sampler: Sampler, task: TaskConfig, bank: ProbeBank, use: InterveneConfig, seed: int, folder: Path
) -> None:
    """Changes runs of fresh problems as `use.edit` says, with controls, and reports what their videos show.

    Writes report/causal-EDIT/ and causal/EDIT/ (outcomes) in `folder`, the folder of the result. sampler: the loaded
    pipeline and the task of the run. task: settings of that task. With several processes, all of them sample, and the
    first one writes.
    Raises InputError when the bank was made for another model, for a task without a parser, for steps, layers, kinds or
    targets that the run does not have, and for batches of one sample.
    """
    bank.check_model(pipeline_fingerprint(sampler.model), "the loaded pipeline")
    if not sampler.task.candidates:
        raise InputError(
            f"task {sampler.task.name!r}: has no parser, so no answer can be read from a changed video; expected a "
            "task with one"
        )
    grid, kind = Grid.load(folder), use.kind or sampler.task.kinds[0]
    if kind not in sampler.task.kinds:
        raise InputError(f"use.kind={kind!r}: expected one of {', '.join(sampler.task.kinds)}")
    if sampler.config.batch < 2:
        raise InputError("pipeline.batch=1: donors are other samples of a batch; expected runs with at least 2")
    count = use.problems or PROBLEMS[use.size]
    if count * use.seeds < 2:
        raise InputError(f"use.problems={use.problems}: expected at least 2; donors and means are of other samples")
    if use.edit == "noise" and use.layers:
        raise InputError(f"use.layers={use.layers!r}: noise is in the latent, which has no layers; leave it out")
    if use.target and use.edit not in ("steer", "erase"):
        raise InputError(f"use.target={use.target!r}: only steer and erase use probes; leave it out")
    problems = fresh_problems(sampler.task, "test", task.problems, count, [kind])
    batches = whole_problems(with_noise(problems, seed, use.seeds), use.seeds, sampler.config.batch)
    experiment, layers = build_experiment(sampler, bank, grid, use, kind, batches[0], folder, seed)
    conditions = experiment.conditions()
    samples, steps = sum(map(len, batches)), sampler.config.steps
    clean = clean_evaluations(conditions, steps)
    each = sum((c.steps or steps) - c.first for c in conditions) + clean
    naive = sum(c.steps or steps for c in conditions) + clean
    say(
        f"{use.edit}: {len(conditions)} conditions of {samples} samples ({len(problems)} problems of kind {kind!r}); "
        f"{each * samples} network evaluations, as many as {each / steps:.0f} clean runs of each sample"
    )
    scorer = ProbeScorer.of(bank, grid, sampler.task.name) if use.edit == "noise" and _answers(bank, kind) else None
    module = Intervention(sampler, experiment, layers, scorer, follow=use.edit == "noise")
    identity = {
        "store": bank.store.to_json(), "bank": bank.fingerprint, "edit": use.edit, "target": use.target, "seed": seed
    }  # fmt: skip
    identity |= {"version": VERSION} if VERSION > 1 else {}
    outcomes = sample_conditions(module, batches, folder / FOLDER / use.edit, identity)
    if rank_and_world()[0] == 0:
        flat = [sample for batch in batches for sample in batch]
        report(sampler, use, grid, kind, outcomes, flat, naive, folder)


def report(
    sampler: Sampler,
    use: InterveneConfig,
    grid: Grid,
    kind: str,
    outcomes: Outcomes,
    samples: Sequence[Sample],
    naive: int,
    folder: Path,
) -> xr.Dataset:
    """Writes what an experiment found, prints it, and returns its table.

    naive: evaluations per sample without shared first steps.
    """
    steps, place = sampler.config.steps, folder / REPORT / use.report
    table = summarised(outcomes, PAIRINGS[use.edit], [sampler.task.solutions(s.problem) for s in samples])
    table.attrs |= {
        "task": sampler.task.name, "kind": kind, "edit": use.edit, "size": use.size, "total_steps": steps,
        "depth": sampler.depth, "naive_evaluations": naive, "clean_runs": outcomes.evaluations / steps,
    }  # fmt: skip
    found: Agreement | None = None
    if use.edit == "swap" and (target := _answer_target(grid, kind, sampler)):
        found = agreement(outcomes, grid, target, use.margin)
    if table.attrs["n"] < LEAST_PAIRS:
        say(
            f"warning: {table.attrs['n']} samples have what the experiment needs; with fewer than {LEAST_PAIRS} no "
            f"claim gets a verdict: without a single changed answer, an effect of "
            f"{upper_without_wins(table.attrs['n']):.2f} would still be possible; raise use.problems"
        )
    save_table(table, place / FILE)
    listed = [
        {"condition": c.name, "draw": c.draw, "run_steps": c.steps or steps, "edits": list(map(as_plain, c.edits))}
        for c in outcomes.conditions
    ]
    save_listed(listed, place / "edits.yaml")
    stated = claims(table, outcomes)
    page = write_page(table, stated, found, place, folder / "tensorboard")
    print_page(table, stated, found, page)
    return table


def whole_problems(samples: list[Sample], seeds: int, size: int) -> list[list[Sample]]:
    """Batches of about `size` samples in which every problem has all of its `seeds` noise seeds."""
    each = max(size // seeds, 1) * seeds
    batches = [samples[start : start + each] for start in range(0, len(samples), each)]
    if len(batches) > 1 and len(batches[-1]) < min(each, 4):  # too few to find donors in
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches


def upper_without_wins(count: int) -> float:
    """The upper 95 % bound of a share without a single success in `count` trials."""
    return 1 - 0.05 ** (1 / max(count, 1))


def build_experiment(
    sampler: Sampler,
    bank: ProbeBank,
    grid: Grid,
    use: InterveneConfig,
    kind: str,
    first: list[Sample],
    folder: Path,
    seed: int,
) -> tuple[Experiment, tuple[int, ...]]:
    """The experiment that the settings name, and the layers whose states it needs. first: the first batch."""
    total, depth, frames = sampler.config.steps, sampler.depth, sampler.token_frames
    most_steps, most_layers = PLANE[use.size]
    probed = sorted({c.step for c in bank.cells}) if use.edit in ("steer", "erase") else range(total)
    default = tuple(probed[i] for i in _spaced(len(probed), most_steps))
    steps = parse_selection(use.steps, total, "use.steps") if use.steps else default
    layers = parse_selection(use.layers, depth, "use.layers") if use.layers else _layers(depth, most_layers)
    by_region = answers_are_regions(sampler.task)
    if use.edit == "noise":
        steps = steps if use.steps else _spaced(total, NOISE_STEPS[use.size])
        left = max(total // 2, 1)
        shares = (0.0, 0.25, 0.5, 0.75)
        lengths = sorted({round(left / (1 - share)) for share in shares} - {left})
        hit = range(int(architecture(sampler.model).keeps_first_frame(sampler.model)), frames)  # not the given image
        return Noise(steps, total, hit, _damage(sampler, first), left, lengths), ()
    if use.edit == "swap":
        regions = by_region and sampler.task.regions > 3
        return Swap(steps, layers, total, frames, regions, seed, whole=total > 1), layers
    if use.edit == "ablate":
        steps = steps if use.steps or use.size == "full" else _spaced(total, 2)
        return Ablate(steps, layers, total, frames, by_region and sampler.task.regions > 1), layers
    if bank.store.probe.project:
        raise InputError(
            f"probe.project={bank.store.probe.project}: {use.edit} changes all channels of hidden states, and these "
            "probes read a projection; expected a run with probe.project=0"
        )
    target = use.target or _answer_target(grid, kind, sampler)
    names = [t.name for t in bank.targets if use.edit == "erase" or t.role in ANSWER_ROLES]
    if target not in names:
        raise InputError(
            f"use.target={target!r}: expected one of {', '.join(names) or 'the answers, without probes here'}"
        )
    control = next((t.name for t in bank.targets if t.role == Role.CONTROL and t.name != target), "")
    plane = [c for c in bank.cells if c.branch == COND and c.position == ALL]
    if not plane:
        raise InputError(
            f"probe.pooling={bank.store.probe.pooling!r}: {use.edit} changes all frames; expected probes of all "
            "frames, of a run with probe.pooling=region or clip"
        )
    here = [c for c in plane if c.step in steps and (not use.layers or c.layer in layers)]
    if not here:
        raise InputError(
            f"use.steps={use.steps!r}, use.layers={use.layers!r}: no probes were trained there; expected steps "
            f"{sorted({c.step for c in plane})}, layers {sorted({c.layer for c in plane})}"
        )
    if use.edit == "erase":
        samples = load_samples(StoredSamples.load(folder), bank.folds)[0].subset("train")
        known = sorted({c.layer for c in here})
        some = known if use.layers else [known[i] for i in _layers(len(known), most_layers)]
        return Erase(samples, target, control, plane, [c for c in here if c.layer in some], seed), ()
    best = best_cells({c: float(grid.at(target, c).validation_accuracy) for c in here})
    cells = here if use.layers else best[: STEERED if use.size == "quick" else None]
    chosen = max(here, key=lambda c: (float(grid.at(target, c).validation_accuracy), -c.step, -c.layer)).layer
    through = [c for c in plane if c.layer == chosen]
    layers = tuple(sorted({cell.layer for cell in (*cells, *through)}))
    doses = sorted(set(use.doses))
    compared = doses[-2] if len(doses) > 1 else doses[0]
    if len(through) < 2:
        through = []
    steer = Steer(bank, target, cells, doses, compared, use.directions, control, sampler.task, seed, through)
    return steer, layers


def _spaced(total: int, most: int) -> tuple[int, ...]:
    """At most `most` indices from 0, evenly spaced."""
    return tuple(sorted({i * total // min(most, total) for i in range(min(most, total))}))


def _layers(depth: int, most: int) -> tuple[int, ...]:
    """At most `most` layers, evenly spaced, up to the last one."""
    count = min(most, depth)
    return tuple(sorted({(i + 1) * depth // count - 1 for i in range(count)}))


def _answers(bank: ProbeBank, kind: str) -> bool:
    """Whether there are probes of answers for problems of a kind."""
    return any(t.role in ANSWER_ROLES and kind in t.kinds for t in bank.targets)


def _answer_target(grid: Grid, kind: str, sampler: Sampler) -> str:
    """The target that stands for what the video shows; empty without one."""
    kinds = {t.name: t.kinds for t in sampler.task.targets}
    for name in grid.with_role(*ANSWER_ROLES):
        if kind in kinds.get(name, ()):
            return name
    return ""


@torch.no_grad()
def _damage(sampler: Sampler, samples: list[Sample]) -> float:
    """The squared norm of the change that equal damage makes: half of that of fresh noise in place of a noise latent.

    Such a change has twice as many units as the latent has values, and later latents have less noise, so every hit can
    be scaled down to this size.
    """
    sizes = list[int]()

    def note(running: Any, step: int, timestep: Any, tensors: dict) -> dict:
        sizes.append(tensors["latents"][0].numel())
        running._interrupt = True
        return {}

    sampler(samples[:1], callback_on_step_end=note, output_type="latent")
    return float(sizes[0])
