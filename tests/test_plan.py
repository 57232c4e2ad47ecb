"""What a plan announces, compared with what a run needs."""

from __future__ import annotations

import functools
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch.nn.modules.module import register_module_forward_pre_hook

import train
from cosprobe.activations import ActivationStore, Sampler, flops, images, store_bytes
from cosprobe.activations.collection import StoreSettings
from cosprobe.activations.dataset import load_samples
from cosprobe.command import load
from cosprobe.config import TrainRun
from cosprobe.errors import InputError
from cosprobe.evaluation import detectable_accuracy
from cosprobe.models.defaults import with_defaults
from cosprobe.models.loading import load_pipeline, outline
from cosprobe.plan import evaluation_flops, make_plan
from cosprobe.reporting.film import record
from cosprobe.tasks import Maze
from cosprobe.tasks.samples import draw_samples
from tests.examples.a14b import with_plan
from tests.examples.pipelines import save_wan
from tests.examples.stores import collected

ROOT = Path(__file__).resolve().parent.parent
SIZE = ["pipeline.steps=3", "pipeline.frames=5", "task.frames=5", "task.problems=20", "pipeline.batch=8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "wan"
    save_wan(path)
    return path


@pytest.fixture
def bare(folder, tmp_path):
    """The model without weights and tokenizer."""
    shutil.copytree(folder, tmp_path / "bare")
    for path in [*(tmp_path / "bare").rglob("*.safetensors"), *(tmp_path / "bare" / "tokenizer").glob("*")]:
        path.unlink()
    return tmp_path / "bare"


def planned(path, *settings):
    run = load(TrainRun, [f"pipeline.path={path}", *SIZE, *settings])
    run.pipeline = with_defaults(run.pipeline)
    task = run.task.build()
    drawn = draw_samples(task, run.task, run.seed)
    return run, task, drawn, make_plan(run, task, drawn)


def said(*settings):
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as errors:
        code = train.main([*SIZE, *settings])
    return code, out.getvalue(), errors.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("pipeline.guidance=3", "probe.random_weights=10"),
        ("probe.layers=1", "probe.steps='0,2'", "probe.decode=0", "probe.frames=true", "probe.random_weights=0"),
    ],
)
def test_a_run_needs_what_was_planned(folder, tmp_path, monkeypatch, settings):
    run, task, drawn, plan = planned(folder, *settings)
    sampler = Sampler(load_pipeline(run.pipeline), run.pipeline, task, run.trainer)
    counted = {"evaluations": 0, "decodes": 0}
    sampler.model.transformer.register_forward_pre_hook(
        lambda module, given, named: counted.update(evaluations=counted["evaluations"] + len(named["hidden_states"])),
        with_kwargs=True,
    )
    decode = type(sampler.model.vae).decode

    def watched(self, latents, *rest, **named):
        counted["decodes"] += len(latents)
        return decode(self, latents, *rest, **named)

    monkeypatch.setattr(type(sampler.model.vae), "decode", watched)
    settings_of = StoreSettings.of(run.pipeline, run.task, run.probe, run.seed)
    stored = collected(sampler, drawn, settings_of, tmp_path / "run")
    samples = load_samples(stored)[0]
    film = record(sampler, lambda: drawn, samples, run.probe)
    films = len(film.rows) if film else 0
    each = plan.evaluations - counted["evaluations"], plan.decodes - counted["decodes"]
    left_out = 3 - films  # of the largest number of problems of a film
    branches = 2 if "pipeline.guidance=3" in settings else 1
    assert each == (left_out * 3 * branches, left_out * len(run.probe.steps_decoded(3)))
    assert plan.cells == len(samples.cells) and sum(plan.samples.values()) == len(samples) == 20
    tensors = stored.store.read()[0] | stored.store.read("untrained.")[0]
    kept = [v for n, v in tensors.items() if "features" in n or n.startswith("input.") and n != "input.prompt.whole"]
    assert plan.stored["region"] == sum(values.nbytes for values in kept)
    assert not plan.warnings


def test_a_plan_needs_no_weights(folder, bare, tmp_path):
    whole = planned(folder, f"run_dir={tmp_path / 'run'}")[3]
    without = planned(bare, "pipeline.dtype=float32", f"run_dir={tmp_path / 'run'}")[3]
    assert whole.hours is not None and 0 < whole.hours[0] < 1 and without.hours is None
    assert replace(without, warnings=(), hours=None) == replace(whole, hours=None)
    assert len(without.warnings) == 1 and "tokenizer" in without.warnings[0]
    half = planned(bare, "pipeline.dtype=bfloat16")[3]
    assert {name: 2 * size for name, size in half.stored.items()} == without.stored
    timed = planned(bare, "plan.flops_per_second=1e6")[3]
    assert timed.hours[0] == pytest.approx(timed.flops / 1e6 / 3600) and "1e+06" in timed.hours[1]


def test_what_would_stop_the_run_is_listed(folder, monkeypatch):
    assert any("pipeline.frames=6" in line for line in planned(folder, "pipeline.frames=6")[3].warnings)
    assert any("guidance_2" in line for line in planned(folder, "pipeline.guidance_2=3")[3].warnings)
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    assert any("free" in line for line in planned(folder)[3].warnings)
    with pytest.raises(InputError, match=r"probe\.layers"):
        planned(folder, "probe.layers=99")


def test_the_command_prints_and_writes_nothing(folder, tmp_path):
    code, out, errors = said("plan=true", f"pipeline.path={folder}", f"run_dir={tmp_path / 'run'}")
    assert code == 0 and not (tmp_path / "run").exists(), errors
    assert all(word in out for word in ("evaluations", "decodes", "disk", "power", "probe.pooling=region", "token"))
    code, _, errors = said("plan=true", "experiment=mini", f"run_dir={tmp_path / 'run'}")
    assert code == 2 and "plan=true" in errors and len(errors.splitlines()) == 1


def test_operations_are_those_that_are_counted():
    """A few percent too many, for the text: of the model in the package."""
    run = load(TrainRun, [])
    run.pipeline, task = with_defaults(run.pipeline), Maze()
    sampler = Sampler(outline(run.pipeline), run.pipeline, task, run.trainer)
    problem = task.problems("test", 1)[0]
    counted = flops(load_pipeline(), sampler.config, images(task, [problem]), [problem.prompt]).evaluation
    assert 1.0 <= evaluation_flops(sampler) / counted < 1.15


@pytest.mark.parametrize(("problems", "chance", "cells"), [(180, 0.25, 160), (30, 0.5, 1), (12, 1 / 3, 40)])
def test_the_accuracy_that_can_be_shown(problems, chance, cells):
    found = detectable_accuracy(problems, chance, cells)

    def reached(hits, share):
        tail = range(hits, problems + 1)
        return sum(comb(problems, k) * share**k * (1 - share) ** (problems - k) for k in tail)

    hits = next(k for k in range(problems + 1) if reached(k, chance) <= 0.05 / cells)
    assert reached(hits, found) == pytest.approx(0.8) and reached(hits - 1, chance) > 0.05 / cells
    drawn = np.random.default_rng(0).binomial(problems, found, 20_000)
    assert (drawn >= hits).mean() == pytest.approx(0.8, abs=0.01)


def test_too_few_problems_show_nothing():
    assert detectable_accuracy(4, 0.5, 1) is None  # all four right by chance: p 1 / 16
    assert detectable_accuracy(5, 0.5, 1) == pytest.approx(0.8**0.2)  # all five: p 1 / 32
    assert detectable_accuracy(5, 0.5, 2) is None
    for wrong in ((0, 0.5, 1), (5, 0.0, 1), (5, 1.0, 1), (5, 0.5, 0)):
        with pytest.raises(InputError, match=r"problems=\d"):
            detectable_accuracy(*wrong)


@pytest.mark.slow
@pytest.mark.docs
def test_a_run_of_the_model_in_the_package_needs_what_was_planned(tmp_path, monkeypatch):
    """Within 2 %: a plan counts a film of three problems, and there may be fewer of the kinds that are filmed."""
    settings = ["probe=layers", "task.problems=128", f"run_dir={tmp_path / 'run'}"]
    run = load(TrainRun, settings)
    run.pipeline = with_defaults(run.pipeline)
    drawn = draw_samples(run.task.build(), run.task, run.seed)
    plan = make_plan(run, run.task.build(), drawn)
    counted, decode = {"blocks": 0, "decodes": 0}, AutoencoderKLWan.decode

    def evaluated(module, given):  # a hook: what replaces `forward` is refused
        counted["blocks"] += len(given[0]) if isinstance(module, WanTransformerBlock) else 0

    @functools.wraps(decode)
    def decoded(self, latents, *given, **named):
        counted["decodes"] += len(latents)
        return decode(self, latents, *given, **named)

    monkeypatch.setattr(AutoencoderKLWan, "decode", decoded)
    handle = register_module_forward_pre_hook(evaluated)
    try:
        assert train.main(settings) == 0
    finally:
        handle.remove()
    depth = outline(run.pipeline).transformer.config.num_layers
    found = (counted["blocks"] / depth, counted["decodes"], ActivationStore.open(tmp_path / "run" / "store").size())
    planned = (plan.evaluations, plan.decodes, plan.stored["region"])
    print(f"planned {planned}, counted {found}")  # noqa: T201
    assert found == pytest.approx(planned, rel=0.02)


@pytest.mark.slow
@pytest.mark.docs
def test_the_plan_in_the_docs_is_that_of_its_command():
    page = (ROOT / "docs" / "wan22.md").read_text()
    assert "evaluations" in page and with_plan(page) == page
    (projected,) = re.findall(r"`(probe\.project=512)` keeps 512 .*: ([\d.]+ GB)", page)
    (first,) = re.findall(r"^python train\.py plan=true.*$", page, flags=re.MULTILINE)
    assert f"disk           {projected[1]} with" in with_plan(page.replace(first, f"{first} {projected[0]}"))


def test_the_store_of_an_outline_has_the_size_of_the_models(folder):
    run, task, drawn, _ = planned(folder)
    loaded, bare = (Sampler(make(run.pipeline), run.pipeline, task) for make in (load_pipeline, outline))
    assert store_bytes(bare, run.probe, len(drawn)) == store_bytes(loaded, run.probe, len(drawn))
    assert all(p.device == torch.device("meta") for p in bare.model.transformer.parameters())
