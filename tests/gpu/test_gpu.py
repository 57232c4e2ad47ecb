"""What is promised on CPUs also holds on a GPU with CUDA. `make gpu-check` runs these tests, `make test` does not.

To try the tests themselves on a machine without a GPU: `GPU_TESTS_ON=cpu .venv/bin/python -m pytest tests/gpu`.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import probe
import train
from benchmarks.gpu.device import full_precision
from cosprobe.activations.capture import capture
from cosprobe.activations.cost import flops, seconds
from cosprobe.activations.halt import halting
from cosprobe.activations.pooling import Pooling
from cosprobe.activations.random_weights import RANDOM_WEIGHTS, replay, with_random_weights
from cosprobe.activations.sampler import Sampler, images
from cosprobe.activations.store import ActivationStore
from cosprobe.cells import Cell
from cosprobe.config import KINDS, PipelineConfig, ProbeConfig, TrainerConfig
from cosprobe.config.pipeline import OFFLOADS
from cosprobe.ensembles.run import RunContext, run
from cosprobe.ensembles.strategies import Hyperparameters
from cosprobe.models.identity import model_fingerprint, pipeline_fingerprint
from cosprobe.models.loading import load_pipeline
from cosprobe.models.pipelines import decode, experts, sample
from cosprobe.probes.logistic import fit
from tests.conformity.checks import CHECKS, TOLERANCE, Case
from tests.examples.banks import TASK, scorer
from tests.examples.pipelines import CONFIG, PROMPT, wan
from tests.probes.ddp_fit import RECIPE, TARGETS, planted
from tests.test_conformity import FEW

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")
CUDA = DEVICE.startswith("cuda")
OFFLOADED = {"wan22_i2v": True, "ltx_i2v": True}  # two experts; latents as tokens
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA and not torch.cuda.is_available(), reason="needs a GPU with CUDA"),
]


@pytest.fixture(autouse=True)
def precise():
    with full_precision():
        yield


def conforms(case: Case) -> None:
    for check in CHECKS.values():
        check(case)


@pytest.mark.parametrize(("name", "guided"), FEW.items())
def test_a_family_conforms(name, guided):
    case = Case(name, guided)
    case.pipeline.to(DEVICE)
    conforms(case)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_family_conforms_on_a_gpu_that_is_not_the_current_one():
    case = Case("wan22_i2v", True)
    case.pipeline.to("cuda:1")
    conforms(case)


def offload_models(pipeline) -> None:
    pipeline.enable_model_cpu_offload(device=DEVICE)


def offload_blocks(pipeline, stream: bool = False) -> None:
    for part in experts(pipeline).values():
        part.enable_group_offload(
            torch.device(DEVICE), torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1,
            use_stream=stream and CUDA,
        )  # fmt: skip
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module) and not name.startswith("transformer"):
            part.to(DEVICE)


def offload_blocks_with_a_stream(pipeline) -> None:
    offload_blocks(pipeline, stream=True)


@pytest.mark.parametrize("offload", [offload_models, offload_blocks, offload_blocks_with_a_stream])
@pytest.mark.parametrize(("name", "guided"), OFFLOADED.items())
def test_offloading_leaves_the_features_and_every_check(name, guided, offload):
    whole, moved = Case(name, guided), Case(name, guided)
    whole.pipeline.to(DEVICE)
    offload(moved.pipeline)
    found = []
    for case in (moved, whole):
        with capture(case.pipeline, "all", Pooling("frame"), inputs=True) as cache:
            case.run()
        found.append(cache.features())
    assert torch.equal(*found)
    conforms(moved)


def test_a_halt_in_the_first_call_leaves_the_order_of_offloaded_blocks():
    """With a stream, diffusers notes the order of the blocks during the first call, and loads them ahead after it."""
    whole, moved = Case("wan22_i2v", True), Case("wan22_i2v", True)
    whole.pipeline.to(DEVICE)
    offload_blocks_with_a_stream(moved.pipeline)
    with halting(moved.pipeline, [Cell(0, 1, "cond", "all")], Pooling("clip"), lambda *_: True):
        moved.run()
    for _ in range(2):
        assert np.array_equal(moved.run(), whole.run())


@pytest.mark.parametrize("offload", OFFLOADS if CUDA else ["none"])  # a CPU has nothing to take parts from
def test_a_loaded_model_is_the_same_wherever_its_weights_wait(offload):
    config = PipelineConfig(steps=2, guidance=1.0, frames=5, prompt_tokens=32, offload=offload)
    pipeline, problems = load_pipeline(config, DEVICE), TASK.problems("test", 2)
    with capture(pipeline, "all", Pooling("frame"), clean=[1]) as cache:
        video = sample(pipeline, config, images(TASK, problems), [p.prompt for p in problems], [1, 2])
    np.testing.assert_allclose(decode(pipeline, cache.clean[1], 5), video, atol=TOLERANCE)
    assert pipeline_fingerprint(pipeline) == model_fingerprint(config)


@pytest.mark.parametrize("kind", KINDS)
def test_probes_are_those_of_the_cpu(kind, tmp_path):
    samples, config = planted(), ProbeConfig(**RECIPE, kind=kind)
    banks = [fit(samples, config, trainer(name), tmp_path / name, seed=0) for name in ("cpu", DEVICE)]
    for target in TARGETS:
        one, other = (bank.decision(samples.features, target.name) for bank in banks)
        torch.testing.assert_close(one, other, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "changes", [{"deterministic": True}, {"precision": "bf16-mixed"}, *([{"precision": "16-mixed"}] if CUDA else [])]
)
def test_probes_converge_with_every_setting_of_the_trainer(changes, tmp_path):
    try:
        bank = fit(planted(), ProbeConfig(**RECIPE), replace(trainer(DEVICE), **changes), tmp_path, seed=0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(done == fits for done, fits in bank.provenance.converged.values())


def trainer(accelerator: str) -> TrainerConfig:
    return TrainerConfig(accelerator=accelerator, devices="1", enable_progress_bar=False)


@pytest.mark.parametrize("how", RANDOM_WEIGHTS)
def test_random_weights_are_those_of_the_cpu(how):
    found = []
    for device in ("cpu", DEVICE):
        pipeline = wan(experts=2).to(device)
        with capture(pipeline, "all", Pooling("frame"), record=(0, 2)) as cache:
            sample(pipeline, CONFIG, IMAGES, [PROMPT] * 2, [1, 2])
        with with_random_weights(pipeline, how, seed=0):
            found.append(replay(pipeline, cache, (0, 1, 2), Pooling("frame"), [1]))
    torch.testing.assert_close(*found, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_compute_of_a_run_is_counted_and_timed():
    here, there = (flops(wan().to(device), CONFIG, IMAGES, [PROMPT] * 2) for device in ("cpu", DEVICE))
    assert here == there
    spent = seconds(wan().to(DEVICE), CONFIG, IMAGES, [PROMPT] * 2)
    assert 0 < spent.layers[0] < spent.layers[-1] < spent.evaluation


@pytest.mark.parametrize("strategy", ["prune", "hidden", "probe_weighted"])
def test_ensembles_are_those_of_the_cpu(strategy):
    """Probes are read while runs are sampled, runs leave the batch, and blocks are averaged."""
    params, problems = Hyperparameters(3, layers=(1,)), TASK.problems("test", 2)
    here, there = (
        run(RunContext(Sampler(wan().to(device), CONFIG, TASK), scorer()), strategy, params, problems)
        for device in ("cpu", DEVICE)
    )
    assert torch.equal(here.run, there.run)
    np.testing.assert_allclose(here.video, there.video, atol=10 * TOLERANCE)


def test_a_run_and_a_use_of_it(tmp_path, capsys):
    """`train.py` with the model in the package, then `probe.py` with its probes."""
    device = [f"trainer.accelerator={DEVICE}", "trainer.devices=1", "trainer.enable_progress_bar=false"]
    small = ["probe=layers", "task.problems=30", "task.frames=5", "pipeline.frames=5", "pipeline.steps=4",
             "pipeline.batch=8", "probe.layers=6:8", "probe.epochs=3", "probe.random_weights=20"]  # fmt: skip
    folder = tmp_path / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert train.main([*small, *device, f"run_dir={folder}"]) == 0, capsys.readouterr()
        used = probe.main(["use=predict", "use.problems=2", "use.step=1", *device, f"run={folder}"])
    assert used == 0, capsys.readouterr()
    assert ActivationStore.open(folder / "store").read()[0]["features"].isfinite().all()
