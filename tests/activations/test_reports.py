"""Symptoms from public reports about diffusers and tools like this one: capture is right, or refuses and says what.

Numbers with # are issues of diffusers, unless another project is named.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import MethodType, SimpleNamespace
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig, UniPCMultistepScheduler
from diffusers.hooks import (
    FasterCacheConfig,
    LayerSkipConfig,
    PyramidAttentionBroadcastConfig,
    apply_faster_cache,
    apply_first_block_cache,
    apply_group_offloading,
    apply_layer_skip,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from cosprobe.activations.capture import ActivationCache, capture
from cosprobe.activations.halt import halting
from cosprobe.activations.pooling import Pooling
from cosprobe.activations.random_weights import RANDOM_WEIGHTS, replay, with_random_weights
from cosprobe.cells import Cell
from cosprobe.errors import InputError
from cosprobe.models import block_list, experts, sample
from tests.conformity.checks import STEPS, Case
from tests.examples.families import PROMPTS
from tests.examples.pipelines import CONFIG, PROMPT, wan

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))
SIZE = replace(CONFIG, guidance=1.0)
GUIDED = replace(CONFIG, guidance=3.0)
EVERY = ["0", "1", "2", "embed", "x_t", "x0_latent"]
LAYERS = (0, 1, 2)
CPU = torch.device("cpu")
CELL = Cell(1, 1, "cond", "all")


def run(pipeline: Any, config: Any = SIZE, rows: tuple[int, ...] = (0, 1), **more: Any) -> np.ndarray:
    return np.asarray(sample(pipeline, config, IMAGES[list(rows)], [PROMPT] * len(rows), rows, **more))


def captured(pipeline: Any, config: Any = SIZE, hook_points: Any = EVERY, **more: Any) -> ActivationCache:
    with capture(pipeline, hook_points, **more) as cache:
        run(pipeline, config)
    return cache


def refused(pipeline: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught, capture(pipeline, ["1"]):
        pytest.fail("capture has begun")
    assert "\n" not in str(caught.value)


@functools.cache
def bare() -> tuple[Tensor, np.ndarray]:
    """Features and video of the toy pipeline, with nothing put on it."""
    pipeline = wan()
    return captured(pipeline).features(), run(pipeline)


# Contexts


def test_a_pipeline_that_says_more_than_the_branch_to_its_context():
    """WanPipeline of 0.42 gives `cache_context` the step and the noise level too."""
    case, given = Case("wan21_t2v", guided=True), []
    model = case.pipeline.transformer
    original = model.cache_context

    def context(name: str, **more: Any) -> Any:
        given.append((name, more["step_index"]))
        return original(name, **more)

    model.cache_context = context
    with capture(case.pipeline, "all") as cache:
        case.run()
    assert given == [(branch, step) for step in range(STEPS) for branch in ("cond", "uncond")]
    assert cache.branches == ("cond", "uncond") and cache.features().shape[1] == STEPS
    assert model.cache_context is context


@pytest.mark.parametrize("guided", [False, True])
def test_guidance_that_is_an_input_of_the_model_is_no_second_call(guided):
    """HunyuanVideo: #13588. `guidance_scale` is an embedding, and `true_cfg_scale` the guidance of other models."""
    case, seen = Case("hunyuan_t2v", guided), []
    hook = case.pipeline.transformer.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(kwargs["guidance"].tolist()), with_kwargs=True
    )
    with capture(case.pipeline, "all") as cache:
        case.run()
    hook.remove()
    assert cache.branches == (("cond", "uncond") if guided else ("cond",))
    assert seen == [[6000.0, 6000.0]] * STEPS * len(cache.branches)


@pytest.mark.parametrize("name", ["cogvideox_t2v", "cogvideox15_i2v"])
def test_guidance_whose_scale_changes_with_every_step(name):
    """CogVideoX with `use_dynamic_cfg`: #13622, #9641. The scale is 1 and a little at some steps."""
    case, rows, scales = Case(name, guided=True), [], []
    hook = case.pipeline.transformer.register_forward_hook(lambda *_: scales.append(case.pipeline.guidance_scale))
    block = block_list(case.pipeline)[1]
    other = block.register_forward_hook(lambda block, args, output: rows.append(output[0].mean(dim=1)))
    with capture(case.pipeline, ["1", "x_t"]) as cache:
        case.run(use_dynamic_cfg=True)
    hook.remove(), other.remove()
    assert len(set(scales)) == STEPS
    features = cache.features()[:, :, 0, :, 0, 0]  # sample step branch channel
    for step in range(STEPS):
        uncond, cond = rows[step].chunk(2)
        torch.testing.assert_close(features[:, step], torch.stack([cond, uncond], dim=1))


# Step caches, skipped layers, and whatever else runs in place of blocks: #14025, #12012, #12648, #14037


def first_block(model: nn.Module) -> None:
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.5))


def mag(model: nn.Module) -> None:
    apply_mag_cache(model, MagCacheConfig(mag_ratios=torch.ones(3), num_inference_steps=3))


def taylor(model: nn.Module) -> None:
    config = TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, cache_identifiers=[r"blocks\.1"])
    apply_taylorseer_cache(model, config)


def taylor_lite(model: nn.Module) -> None:
    apply_taylorseer_cache(model, TaylorSeerCacheConfig(use_lite_mode=True))


def broadcast(model: nn.Module) -> None:
    config = {"spatial_attention_block_skip_range": 2, "current_timestep_callback": lambda: 500}
    apply_pyramid_attention_broadcast(model, PyramidAttentionBroadcastConfig(**config))


def faster(model: nn.Module) -> None:
    config = {"spatial_attention_block_skip_range": 2, "current_timestep_callback": lambda: 500}
    apply_faster_cache(model, FasterCacheConfig(**config, tensor_format="BCFHW"))


def skip_layer(model: nn.Module) -> None:
    apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn="blocks"))


def skip_feed_forward(model: nn.Module) -> None:
    apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn="blocks", skip_attention=False))


CACHES = {
    first_block: r"'fbc_leader_block_hook' is on blocks\.0 of transformer 'only'",
    mag: r"'mag_cache_leader_block_hook' is on blocks\.0 of transformer 'only'",
    taylor: r"'taylorseer_cache' is on blocks\.1 of transformer 'only'",
    taylor_lite: r"'taylorseer_cache' is on blocks\.0 of transformer 'only'",
    broadcast: r"'pyramid_attention_broadcast' is on blocks\.0\.attn1 of transformer 'only'",
    faster: r"'faster_cache_denoiser' is on transformer 'only'",
    skip_layer: r"'layer_skip_hook' is on blocks\.1 of transformer 'only'",
    skip_feed_forward: r"'layer_skip_hook' is on blocks\.1\.ffn of transformer 'only'",
}


@pytest.mark.parametrize(("apply", "message"), CACHES.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_step_cache_that_was_applied_without_enable_cache(apply, message):
    pipeline = wan()
    apply(pipeline.transformer)
    assert not pipeline.transformer.is_cache_enabled
    refused(pipeline, message)


def test_a_step_cache_on_each_of_two_experts_counts_the_steps_of_both():
    pipeline = wan(experts=2)
    mag(pipeline.transformer_2)
    refused(pipeline, "'mag_cache_leader_block_hook'.*'low'")
    mag(pipeline.transformer)
    refused(pipeline, "'mag_cache_leader_block_hook'.*'high'")


def test_a_step_cache_that_is_disabled_again_changes_nothing():
    pipeline = wan()
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    run(pipeline)
    refused(pipeline, r"step cache.*'only'.*disable_cache\(\)")
    pipeline.transformer.disable_cache()
    assert torch.equal(captured(pipeline).features(), bare()[0])


@pytest.mark.parametrize("apply", [first_block, skip_layer])
def test_a_step_cache_that_is_applied_inside_of_the_capture(apply):
    pipeline = wan()
    with pytest.raises(InputError, match=r"is on blocks\.\d of transformer 'only'"), capture(pipeline, ["2"]):
        apply(pipeline.transformer)
        run(pipeline)


def skipping(forward: Callable) -> Callable:
    """A function that computes once, and then adds to its input what was added then, as step caches do."""
    added: list[Tensor] = []

    def cached(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not added:
            added.append(forward(hidden, *args, **kwargs) - hidden)
        return hidden + added[0]

    return cached


class Skipping(nn.Module):
    """The same as a module around a block."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block, self.forward_once = block, skipping(block)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward_once(*args, **kwargs)


def on_transformer(model: nn.Module) -> None:
    """As TeaCache: no block runs in a step whose output is taken from the step before."""
    forward, last = model.forward, []

    def teacache(*args: Any, **kwargs: Any) -> Any:
        if len(last) != 1:
            last.append(forward(*args, **kwargs))
        return last[-1]

    model.forward = teacache


def on_block(model: nn.Module) -> None:
    model.blocks[1].forward = skipping(model.blocks[1].forward)


def on_attention(model: nn.Module) -> None:
    model.blocks[1].attn1.forward = skipping(model.blocks[1].attn1.forward)


def as_method(model: nn.Module) -> None:
    cached = skipping(model.blocks[1].forward)
    model.blocks[1].forward = MethodType(lambda self, *args, **kwargs: cached(*args, **kwargs), model.blocks[1])


def as_partial(model: nn.Module) -> None:
    model.blocks[1].forward = functools.partial(skipping(model.blocks[1].forward))


def with_the_name_of_forward(model: nn.Module) -> None:
    forward = model.blocks[1].forward
    model.blocks[1].forward = functools.wraps(forward)(skipping(forward))


def below_hooks_of_accelerate(model: nn.Module) -> None:
    on_block(model)
    accelerate.cpu_offload(model, CPU)


def below_hooks_of_diffusers(model: nn.Module) -> None:
    on_block(model)
    apply_group_offloading(model, onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
    apply_group_offloading(model.blocks[1], onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def as_module(model: nn.Module) -> None:
    model.blocks[1] = Skipping(model.blocks[1])


WRAPPERS = {
    on_transformer: r"teacache' runs in place of the forward of transformer 'only'",
    on_block: r"cached' runs in place of the forward of blocks\.1 of transformer 'only'",
    on_attention: r"cached' runs in place of the forward of blocks\.1\.attn1 of transformer 'only'",
    as_method: r"<lambda>' runs in place of the forward of blocks\.1 ",
    as_partial: r"cached' runs in place of the forward of blocks\.1 ",
    with_the_name_of_forward: r"cached' runs in place of the forward of blocks\.1 ",
    below_hooks_of_accelerate: r"cached' runs in place of the forward of blocks\.1 ",
    below_hooks_of_diffusers: r"cached' runs in place of the forward of blocks\.1 ",
    as_module: "block 1 of transformer 'only' is a Skipping of .*expected one of diffusers",
}


@pytest.mark.parametrize(("wrap", "message"), WRAPPERS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_package_that_puts_its_own_function_in_place_of_forward(wrap, message):
    """cache-dit #291, and the wrappers of TeaCache, ParaAttention and others."""
    pipeline = wan()
    wrap(pipeline.transformer)
    refused(pipeline, message)


@pytest.mark.parametrize("part", ["transformer", "block"])
def test_a_package_that_puts_its_own_function_into_the_class(monkeypatch, part):
    pipeline = wan()
    model = pipeline.transformer if part == "transformer" else pipeline.transformer.blocks[0]
    monkeypatch.setattr(type(model), "forward", functools.wraps(type(model).forward)(lambda self, *args: args[0]))
    refused(pipeline, rf"<lambda>' runs in place of the forward of {'blocks.0 of ' if part == 'block' else ''}trans")


def after_step_0(change: Callable[[], None]) -> Callable:
    def callback(pipeline: Any, step: int, timestep: Any, tensors: dict) -> dict:
        if step == 0:
            change()
        return {}

    return callback


def test_blocks_that_a_function_skips_in_the_middle_of_a_run():
    pipeline = wan()
    with pytest.raises(InputError, match=r"teacache' runs in place"), capture(pipeline, ["1"]):
        run(pipeline, callback_on_step_end=after_step_0(lambda: on_transformer(pipeline.transformer)))


@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_one_branch_whose_blocks_are_skipped_once(branch):
    pipeline = wan()
    model, calls = pipeline.transformer, []

    def once(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == (1 if branch == "cond" else 2):
            del model.forward  # nothing is left of it when the run has ended
            return (hidden_states[:, :4],)
        return type(model).forward(model, hidden_states, *args, **kwargs)

    with (
        pytest.raises(RuntimeError, match=rf"hook point 1 did not run at step 1, branch {branch}\b"),
        capture(pipeline, ["1", "x_t"]),
    ):
        run(pipeline, GUIDED, callback_on_step_end=after_step_0(lambda: setattr(model, "forward", once)))


def test_functions_that_torch_puts_around_a_block_are_none_of_a_step_cache():
    pipeline = wan()
    for block in block_list(pipeline):
        block.forward = torch.no_grad()(block.forward)
    assert torch.equal(captured(pipeline).features(), bare()[0])


# Steps, noise levels and latents: #10266, #12771, #13239, #13706, #13243, #13258, #12039


@contextmanager
def knowing(pipeline: Any, answer: Tensor) -> Iterator[None]:
    """A pipeline whose velocity leads from its first noise to `answer`, at every step."""
    noise: list[Tensor] = []

    def velocity(model: nn.Module, args: tuple, kwargs: dict, output: tuple) -> tuple:
        noise.append(kwargs["hidden_states"][:, : answer.shape[1]])
        return (noise[0] - answer,)

    with ExitStack() as undo:
        for model in experts(pipeline).values():
            undo.callback(model.register_forward_hook(velocity, with_kwargs=True).remove)
        yield


def check_estimates(case: Case, steps: int, **more: Any) -> None:
    """x0-hat is what the model knows, at every step, and the result is that of the last one."""
    results = []
    answer = torch.randn(1, 4, 3, 4, 6)
    with (
        knowing(case.pipeline, answer),
        capture(case.pipeline, ["0", "x_t", "x0_latent"], inputs=True, clean=range(steps)) as cache,
    ):
        results.append(
            sample(
                case.pipeline, replace(case.config, steps=steps), case.images[:1], PROMPTS[:1], [0],
                output_type="latent", **more,
            )
        )  # fmt: skip
    assert cache.steps == tuple(range(steps)) == tuple(cache.clean)
    for estimate in cache.clean.values():
        torch.testing.assert_close(estimate, answer, atol=2e-3, rtol=0)
    torch.testing.assert_close(results[0], cache.clean[steps - 1], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan21_t2v", "wan22_i2v", "skyreels_t2v"])
def test_a_scheduler_with_more_steps_than_timesteps(name):
    """UniPC rounds timesteps to whole numbers. With 120 steps and shift 12 some are equal. When they are called as they
    are, all of these pipelines but the first one begin at the second step, and fail at the end."""
    case = Case(name, guided=False)
    case.pipeline.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=12.0
    )
    check_estimates(case, 120)
    assert len(set(case.pipeline.scheduler.timesteps.tolist())) == 116


def test_noise_levels_of_ones_own_which_the_scheduler_shifts():
    case, seen = Case("hunyuan_t2v", guided=False), []
    hook = case.pipeline.transformer.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    check_estimates(case, 3, sigmas=[1.0, 0.5, 0.1])
    hook.remove()
    assert seen == [1000.0, 875.0, 437.5]  # 7 s / (1 + 6 s)


def test_a_scheduler_that_takes_the_estimate_of_the_step_before():
    """CogVideoXDPMScheduler, the default of CogVideoX-5b: its third argument is no latent."""
    case, given = Case("cogvideox_t2v_dpm", guided=False), []
    original = case.pipeline.scheduler.step

    @functools.wraps(original)
    def step(output: Tensor, old: Tensor | None, timestep: Any, back: Any, noisy: Tensor, **more: Any) -> Any:
        result = original(output, old, timestep, back, noisy, **more)
        given.append((noisy, result[1]))
        return result

    case.pipeline.scheduler.step = step
    with capture(case.pipeline, ["x_t", "x0_latent"], Pooling("frame"), clean=range(STEPS)) as cache:
        case.run()
    features = cache.features()[:, :, :, 0, :, 0]  # sample step hook point frame channel
    for at, (noisy, estimate) in enumerate(given):
        torch.testing.assert_close(cache.clean[at], estimate, atol=1e-5, rtol=1e-4)
        by_frame = noisy.unflatten(3, (2, 2)).unflatten(5, (3, 2)).mean(dim=(3, 5))  # patches of 2 x 2
        torch.testing.assert_close(features[:, at, 0, :, :16], by_frame.flatten(2))


def test_a_first_frame_that_replaces_a_latent_frame():
    """Wan2.2-TI2V-5B: the scheduler never sees the first frame, so x0-hat gets it from the input of the model."""
    case, seen = Case("wan22_ti2v_i2v", guided=False), []
    hook = case.pipeline.transformer.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(kwargs["hidden_states"][:, :, 0]), with_kwargs=True
    )
    with capture(case.pipeline, EVERY, Pooling("frame"), inputs=True, clean=range(STEPS)) as cache:
        case.run()
    hook.remove()
    found, image = cache.input_features(), cache.clean[0][:, :, 0]
    assert found["first_frame.whole"][:, :, 0].std() > 0 and not found["first_frame.whole"][:, :, 1:].any()
    assert not found["noise.whole"][:, :, 0].any() and found["noise.whole"][:, :, 1:].std() > 0
    for step, estimate in cache.clean.items():
        assert torch.equal(estimate[:, :, 0], image) and torch.equal(seen[step], image)
    assert not torch.equal(image[0], image[1])


# Weights of fewer bits: #10347, #10685, #11270, #11648, #12047


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore")
def test_weights_that_are_stored_in_8_bits_and_computed_in_more(compute):
    pipeline, plain = wan(), wan()
    for one in (pipeline, plain):
        one.transformer.to(compute)
    pipeline.transformer.enable_layerwise_casting(torch.float8_e4m3fn, compute)
    cast = [name for name, part in pipeline.transformer.named_modules() if hasattr(part, "_diffusers_hook")]
    for parameter in (p for name in cast for p in plain.transformer.get_submodule(name).parameters()):
        parameter.data = parameter.data.to(torch.float8_e4m3fn).to(compute)
    assert {p.dtype for p in pipeline.transformer.parameters()} == {torch.float8_e4m3fn, compute}
    cache, expected = (captured(one, record=[0, 1, 2], inputs=True) for one in (pipeline, plain))
    assert {part.dtype for part in cache.parts.values()} == {compute}
    kinds = {name: value.dtype for name, value in cache.input_features().items()}
    assert kinds.pop("prompt.whole") == torch.float32 and set(kinds.values()) == {compute}
    assert torch.equal(cache.features(), expected.features())
    assert (cache.features() - bare()[0]).abs().max() > 1e-3  # it makes a difference
    again = replay(pipeline, cache, LAYERS, Pooling("clip"))
    assert torch.equal(again.to(compute), cache.features()[:, :, :3, 0])


class Packed(nn.Linear):
    """A layer with weights of 8 bits, as of bitsandbytes."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.scale = float(layer.weight.abs().max()) / 127
        packed = (layer.weight / self.scale).round().add(128).to(torch.uint8)
        self.weight, self.bias = nn.Parameter(packed, requires_grad=False), layer.bias

    def unpacked(self) -> Tensor:
        return (self.weight.float() - 128) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.unpacked(), self.bias)


def test_a_first_layer_whose_weights_are_whole_numbers():
    case, plain = Case("ltx_t2v", guided=True), Case("ltx_t2v", guided=True)
    model, pooling = case.pipeline.transformer, Pooling("clip")
    layers = [name for name, part in model.named_modules() if type(part) is nn.Linear]
    for name in layers:
        parent, _, own = name.rpartition(".")
        packed = Packed(model.get_submodule(name))
        setattr(model.get_submodule(parent), own, packed)
        plain.pipeline.transformer.get_submodule(name).weight.data = packed.unpacked()
    assert {p.dtype for p in model.proj_in.parameters()} >= {torch.uint8}
    caches = []
    for one in (case, plain):
        with capture(one.pipeline, EVERY, pooling, inputs=True, record=[0]) as cache:
            one.run()
        caches.append(cache)
    packed, expected = caches
    assert {part.dtype for part in packed.parts.values()} == {torch.float32}
    assert {value.dtype for value in packed.input_features().values()} == {torch.float32}
    assert torch.equal(packed.features(), expected.features())
    trained = replay(case.pipeline, packed, LAYERS, pooling)
    with with_random_weights(case.pipeline, "permuted", 0):
        assert not torch.equal(replay(case.pipeline, packed, LAYERS, pooling), trained)
    assert torch.equal(replay(case.pipeline, packed, LAYERS, pooling), trained)
    with (
        pytest.raises(InputError, match=rf"{layers[0]}\.weight of transformer 'only'.*torch\.uint8.*'permuted'"),
        with_random_weights(case.pipeline, "fresh", 0),
    ):
        pytest.fail("whole numbers were drawn anew")


# Offloading: #11768, #11041, #12096, #13881, #14328


def check_offloaded(pipeline: Any) -> ActivationCache:
    """A halted call, then a whole one: values are those without offload."""
    with halting(pipeline, [CELL], Pooling("clip"), lambda *_: True) as halted:
        run(pipeline)
        pytest.fail("the run was not halted")
    cache = captured(pipeline, record=[0, 1, 2])
    assert torch.equal(halted.parts[1, "1", "cond"], cache.parts[1, "1", "cond"])
    features, video = bare()
    assert torch.equal(cache.features(), features)
    assert np.array_equal(run(pipeline), video)
    assert torch.equal(replay(pipeline, cache, LAYERS, Pooling("clip")), features[:, :, :3, 0])
    return cache


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_groups_of_layers_that_are_offloaded(kind):
    pipeline = wan()
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.vae):
        apply_group_offloading(
            part, onload_device=CPU, offload_device=CPU, offload_type=kind, num_blocks_per_group=1
        )  # fmt: skip
    cache, pooling = check_offloaded(pipeline), Pooling("clip")
    trained = replay(pipeline, cache, LAYERS, pooling)
    for how in RANDOM_WEIGHTS:
        with with_random_weights(pipeline, how, 0):
            assert not torch.equal(replay(pipeline, cache, LAYERS, pooling), trained)
        assert torch.equal(replay(pipeline, cache, LAYERS, pooling), trained)


def test_whole_models_that_are_offloaded():
    """What `enable_model_cpu_offload` does, and a CPU for the GPU. The end of a call puts the hooks on again."""
    pipeline, again = wan(), []
    pipeline._all_hooks, before = [], None
    for name in ("text_encoder", "transformer", "vae"):
        _, before = accelerate.cpu_offload_with_hook(getattr(pipeline, name), CPU, prev_module_hook=before)
        pipeline._all_hooks.append(before)
    pipeline.enable_model_cpu_offload = lambda device: again.append(device)
    check_offloaded(pipeline)
    assert len(again) == 3  # also after the call that was halted


def sequential(pipeline: Any, folder: Any) -> None:
    accelerate.cpu_offload(pipeline.transformer, CPU)


def to_disk(pipeline: Any, folder: Any) -> None:
    apply_group_offloading(
        pipeline.transformer, onload_device=CPU, offload_device=CPU, offload_type="leaf_level",
        offload_to_disk_path=str(folder),
    )  # fmt: skip


@pytest.mark.parametrize("offload", [sequential, to_disk])
def test_weights_that_are_loaded_for_every_call(offload, tmp_path):
    """They can be captured and replayed. Random ones in their place would be replaced by the trained ones again."""
    pipeline = wan()
    offload(pipeline, tmp_path)
    check_offloaded(pipeline)
    for how in RANDOM_WEIGHTS:
        with (
            pytest.raises(InputError, match=r"scale_shift_table of transformer 'only' is not in memory"),
            with_random_weights(pipeline, how, 0),
        ):
            pytest.fail("weights were replaced")


# Tokens or weights on several devices: #14041, #12563


def test_tokens_that_are_divided_among_devices():
    pipeline = wan(experts=2)
    pipeline.transformer_2._parallel_config = SimpleNamespace(context_parallel_config=object())
    refused(pipeline, "'low' runs with context or tensor parallelism.*parallel_config")


def test_weights_that_are_divided_among_devices():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    pipeline = wan()
    layer, mesh = pipeline.transformer.blocks[2].ffn.net[2], init_device_mesh("cpu", (1,))
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.data, mesh, [Shard(0)]), requires_grad=False)
    refused(pipeline, "'only' are divided among devices")


# Compilation: pytorch #117758, #10730


def compile_blocks(model: nn.Module) -> None:
    model.compile_repeated_blocks(backend="eager")


def compile_module(model: nn.Module) -> None:
    model.compile(backend="eager")


def compile_forward(model: nn.Module) -> None:
    model.forward = torch.compile(model.forward, backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize("compile_it", [compile_blocks, compile_module, compile_forward])
def test_a_compiled_model_that_may_ignore_hooks(compile_it):
    pipeline = wan()
    compile_it(pipeline.transformer)
    refused(pipeline, "transformer 'only' is compiled")


@pytest.mark.slow
def test_blocks_whose_forward_alone_is_compiled_run_their_hooks():
    pipeline = wan()
    for block in block_list(pipeline):
        block.forward = torch.compile(block.forward, backend="eager")
    torch.testing.assert_close(captured(pipeline).features(), bare()[0])


# Hooks that stay, or go: TransformerLens #1682, #156, #340


def hooks(pipeline: Any) -> list[tuple[str, str, Any, Any]]:
    return [
        (expert, name, dict(part._forward_hooks), dict(part._forward_pre_hooks))
        for expert, model in experts(pipeline).items()
        for name, part in model.named_modules()
    ]


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, ZeroDivisionError, None])
def test_hooks_of_others_stay_and_ours_go(error):
    pipeline, seen = wan(experts=2), []

    def foreign(block: nn.Module, args: tuple, output: Any = None) -> None:
        seen.append(1)
        if error is not None and len(seen) == 5:
            raise error

    block = pipeline.transformer.blocks[1]
    block.register_forward_hook(foreign)
    pipeline.transformer.register_forward_pre_hook(lambda *_: None)
    pipeline.transformer_2.blocks[0].register_forward_hook(foreign)
    before = hooks(pipeline)
    if error is None:
        captured(pipeline)
    else:
        with pytest.raises((error, InputError)), capture(pipeline, "all", inputs=True, record=[0]):
            run(pipeline, replace(SIZE, steps=8))
    assert hooks(pipeline) == before and seen
    for part in (pipeline, pipeline.scheduler, pipeline.vae, *experts(pipeline).values()):
        assert not {"step", "set_timesteps", "cache_context", "prepare_latents", "encode"} & vars(part).keys()


def test_a_hook_that_others_register_inside_of_the_capture_stays():
    pipeline, seen = wan(), []
    with capture(pipeline, ["0"]):
        handle = block_list(pipeline)[0].register_forward_hook(lambda *_: seen.append(1))
        run(pipeline)
    run(pipeline)
    assert len(seen) == 2 * SIZE.steps
    handle.remove()


# Batches: #2659, #11016, #13578


@pytest.mark.slow
@pytest.mark.parametrize("config", [SIZE, GUIDED], ids=["plain", "guided"])
def test_features_that_depend_on_the_size_of_the_batch(config):
    pipeline, rows = wan(), (0, 1, 2, 3)
    with capture(pipeline, EVERY, Pooling("frame")) as together:
        run(pipeline, config, rows)
    for row in rows:
        with capture(pipeline, EVERY, Pooling("frame")) as alone:
            run(pipeline, config, (row,))
        torch.testing.assert_close(alone.features()[0], together.features()[row], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        *(("wan21_t2v", (0, 1)), ("wan22_i2v", (0, 1)), ("wan22_ti2v_i2v", (0, 1)), ("hunyuan_t2v", (0, 1))),
        *(("ltx_t2v", (1,)), ("mochi", (1,))),
    ],
)
def test_several_videos_of_a_prompt_are_neighbours(name, rows):
    """The videos of a prompt are side by side, and have its image. In diffusers 0.42.1, LTX and Mochi give the masks of
    several prompts to the wrong videos, so they are asked for one prompt."""
    case, found = Case(name, guided=True), {}
    wanted = [(row, 10 * (row + 1) + video) for row in rows for video in (0, 1)]  # prompt and seed
    batches = {
        "several": (rows, {"num_videos_per_prompt": 2}, wanted),
        **{f"{one}": (one[:1], {}, [one]) for one in wanted[1::2]},
    }
    for label, (prompts, more, seeds) in batches.items():
        generators = [torch.Generator().manual_seed(seed) for _, seed in seeds]
        with capture(case.pipeline, ["0", "2", "x_t"]) as cache:
            case.run(prompts, generator=generators, output_type="latent", **more)
        found[label] = cache.features()
    together = found.pop("several")
    assert len(together) == len(wanted)
    for i, alone in enumerate(found.values()):
        torch.testing.assert_close(alone[0], together[2 * i + 1], rtol=1e-3, atol=1e-4)
        assert (alone[0] - together[2 * i]).abs().max() > 1e-2
