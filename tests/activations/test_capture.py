from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from cosprobe.activations.capture import capture
from cosprobe.activations.pooling import Pooling
from cosprobe.cells import FIRST_FRAME, NOISE
from cosprobe.cells import PROMPT as WORDS
from cosprobe.errors import InputError
from cosprobe.models.architectures import architecture
from cosprobe.models.pipelines import block_list, decode, hidden_states, sample
from tests.examples.pipelines import CONFIG, PROMPT, cogvideox, wan

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
PROMPTS = [PROMPT] * 3
SEEDS = [11, 12, 13]


@pytest.fixture(scope="module")
def pipeline():
    return wan()


def run(pipeline, **changes):
    return sample(pipeline, changes.pop("config", CONFIG), IMAGES, PROMPTS, SEEDS, **changes)


def test_video_is_bit_identical_with_and_without_capture(pipeline):
    bare = run(pipeline)
    with capture(pipeline, ["0", "1", "2", "embed", "x_t", "x0_latent"], Pooling("frame"), clean=[0], inputs=True):
        watched = run(pipeline)
    assert np.array_equal(bare, watched)


def test_weights_are_unchanged_and_frozen(pipeline):
    def digest():
        state = pipeline.transformer.state_dict()
        return hashlib.sha256(b"".join(state[k].numpy().tobytes() for k in sorted(state))).hexdigest()

    before = digest()
    with capture(pipeline):
        run(pipeline)
    assert digest() == before
    assert not pipeline.transformer.training
    assert not any(p.requires_grad for p in pipeline.transformer.parameters())


def test_features_are_there_when_the_capture_has_ended(pipeline):
    with capture(pipeline, "0", Pooling("clip"), inputs=True) as cache:
        for call in ("features", "input_features"):
            with pytest.raises(InputError, match=rf"^{call}\(\): the capture has not ended.*after the `with` block"):
                getattr(cache, call)()
        run(pipeline)
        with pytest.raises(InputError, match=r"after the `with` block"):
            cache.features()
    assert cache.features().shape[0] == 3 and cache.input_features()


def test_features_equal_a_hand_written_hook(pipeline):
    seen = []
    handle = block_list(pipeline)[1].register_forward_hook(lambda m, a, out: seen.append(out.clone()))
    try:
        with capture(pipeline, "all", Pooling("clip")) as cache:
            run(pipeline)
    finally:
        handle.remove()
    features = cache.features()  # sample step hook point branch position region channel
    assert features.shape == (3, 3, 3, 1, 1, 1, 24)
    for step in range(3):
        torch.testing.assert_close(features[:, step, 1, 0, 0, 0], seen[step].mean(1), atol=1e-6, rtol=0)


def test_blocks_that_add_known_constants_are_labelled_right(pipeline):
    """An oracle for layer and step labels: every block adds its own constant to its input."""

    def constant(layer):
        def hook(module, args, output):
            return args[0] + 10.0 ** (layer - 2)

        return hook

    blocks = block_list(pipeline)
    handles = [block.register_forward_hook(constant(i)) for i, block in enumerate(blocks)]
    try:
        with capture(pipeline, ["0", "1", "2", "embed"], Pooling("clip")) as cache:
            run(pipeline)
    finally:
        for handle in handles:
            handle.remove()
    layers = cache.features()[:, :, :, 0, 0, 0]  # sample step hook point channel
    for hook_point, total in enumerate((0.01, 0.11, 1.11)):
        torch.testing.assert_close(layers[:, :, hook_point] - layers[:, :, 3], torch.full_like(layers[:, :, 3], total))


def test_sources_are_the_latents_of_the_step(pipeline):
    pipeline.scheduler.set_timesteps(3)
    latents = []
    original = pipeline.scheduler.step

    def spy(output, t, noisy, **kwargs):
        latents.append((output, noisy))
        return original(output, t, noisy, **kwargs)

    pipeline.scheduler.step = spy
    try:
        with capture(pipeline, ["x_t", "x0_latent"], Pooling("frame"), clean=[1]) as cache:
            run(pipeline)
    finally:
        del pipeline.scheduler.step
    features = cache.features()
    for step, (output, noisy) in enumerate(latents):
        by_frame = noisy.mean(dim=(3, 4)).transpose(1, 2)
        torch.testing.assert_close(features[:, step, 0, 0, :, 0, :4], by_frame)
        clean = noisy - pipeline.scheduler.sigmas[step] * output
        torch.testing.assert_close(features[:, step, 1, 0, :, 0, :4], clean.mean(dim=(3, 4)).transpose(1, 2))
    torch.testing.assert_close(cache.clean[1], latents[1][1] - pipeline.scheduler.sigmas[1] * latents[1][0])
    assert features[..., 4:].numel() == 0 or not features[..., 4:].any()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_what_a_run_starts_from_is_kept_once(pipeline, guidance):
    config = type(CONFIG)(steps=3, frames=5, prompt_tokens=32, guidance=guidance)
    seen = []

    def spy(module, args, kwargs):
        seen.append((kwargs["hidden_states"], kwargs["encoder_hidden_states"]))

    handle = pipeline.transformer.register_forward_pre_hook(spy, with_kwargs=True)
    try:
        with capture(pipeline, ["0"], Pooling("frame"), "1,2", inputs=True) as cache:
            run(pipeline, config=config)
    finally:
        handle.remove()
    latent, prompt = seen[0]  # Wan calls the transformer with the prompt first
    tokens = latent.flatten(3).permute(0, 2, 3, 1)  # sample frame token channel: the 16 tokens are the coarse cells
    found = cache.input_features()
    assert {name for name, values in found.items() if values.shape[1] == 1} == {
        f"{NOISE}.whole", f"{FIRST_FRAME}.whole", f"{WORDS}.whole",
    }  # fmt: skip
    torch.testing.assert_close(found[f"{NOISE}.whole"][:, 0], tokens[..., :4])
    torch.testing.assert_close(found[f"{FIRST_FRAME}.whole"][:, 0], tokens[..., 4:])
    torch.testing.assert_close(found[f"{WORDS}.whole"], prompt.mean(1)[:, None, None, None])
    assert tokens[:, 0, :, 4:].std() > 0
    with capture(pipeline, ["0"], Pooling("frame"), "0", inputs=True) as first:
        run(pipeline, config=config)
    assert torch.equal(
        found[f"{NOISE}.whole"], first.input_features()["x_t.whole"]
    )  # although step 0 was not asked for


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_inputs_of_every_step_are_kept_by_frame_region_and_cell(pipeline, guidance):
    config = type(CONFIG)(steps=3, frames=5, prompt_tokens=32, guidance=guidance)
    boxes = [[(0.0, 0.0, 0.5, 0.5), (0.75, 0.75, 1.0, 1.0)], [(0.5, 0.0, 1.0, 1.0)] * 2, [(0.0, 0.0, 1.0, 1.0)] * 2]
    first, latents = [], []
    original = pipeline.scheduler.step

    def spy(output, t, noisy, **kwargs):
        latents.append((output, noisy))
        return original(output, t, noisy, **kwargs)

    pipeline.scheduler.step = spy
    handle = block_list(pipeline)[0].register_forward_pre_hook(
        lambda m, args, kwargs: first.append(hidden_states(args, kwargs)), with_kwargs=True
    )
    try:
        with capture(pipeline, ["1"], Pooling("region", boxes=boxes), "0,2", inputs=True) as cache:
            run(pipeline, config=config)
    finally:
        handle.remove()
        del pipeline.scheduler.step
    found = cache.input_features()
    assert {name.partition(".")[0] for name in found if name.endswith(".region")} == {
        NOISE, FIRST_FRAME, "embed", "x_t", "x0_latent",
    }  # fmt: skip
    for at, step in enumerate((0, 2)):
        output, noisy = latents[step]
        clean = noisy - pipeline.scheduler.sigmas[step] * output
        by_token = {name: latent.flatten(2).mT for name, latent in (("x_t", noisy), ("x0_latent", clean))}
        by_token["embed"] = first[2 * step if guidance > 1 else step]  # the half that saw the prompt comes first
        for name, tokens in by_token.items():
            grid = tokens.unflatten(1, (2, 4, 4))  # frame row column
            torch.testing.assert_close(found[f"{name}.whole"][:, at], tokens.unflatten(1, (2, 16)))
            region = found[f"{name}.region"][:, at]  # sample frame region channel
            torch.testing.assert_close(region[0, :, 0], grid[0, :, :2, :2].mean((1, 2)))
            torch.testing.assert_close(region[0, :, 1], grid[0, :, 3, 3])
            torch.testing.assert_close(region[1, :, 1], grid[1, :, :, 2:].mean((1, 2)))
            torch.testing.assert_close(region[2, :, 0], grid[2].mean((1, 2)))
    assert cache.hook_points == ("1",) and cache.features().shape[2] == 1  # no input is a hook point of the probes


def test_inputs_are_kept_only_when_asked_for_and_in_the_cells_of_a_grid_probe(pipeline):
    with capture(pipeline, ["0", "embed", "x_t"], Pooling("clip")) as bare:
        run(pipeline)
    assert bare.inputs == bare.input_features() == {}
    with capture(pipeline, ["0"], Pooling("grid", across=2), "1", inputs=True) as cache:
        run(pipeline)
    found = cache.input_features()
    for name in (NOISE, FIRST_FRAME, "embed", "x_t", "x0_latent"):
        assert found[f"{name}.whole"].shape[:4] == (3, 1, 2, 4)
        assert f"{name}.region" not in found
    assert cache.positions == ("r0c0", "r0c1", "r1c0", "r1c1")  # the cells of the probe, in the same order
    assert cache.features().shape[4] == 4


def test_a_doubled_batch_keeps_the_inputs_of_the_half_that_saw_the_prompt():
    pipeline = cogvideox()
    calls = {"num_inference_steps": 2, "height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 32}
    seen, first = [], []

    def spy(module, args, kwargs):
        seen.append(kwargs["encoder_hidden_states"])

    handles = [
        pipeline.transformer.register_forward_pre_hook(spy, with_kwargs=True),
        block_list(pipeline)[0].register_forward_pre_hook(
            lambda m, args, kwargs: first.append(hidden_states(args, kwargs)), with_kwargs=True
        ),
    ]
    try:
        with capture(pipeline, ["0"], Pooling("frame"), inputs=True) as cache:
            pipeline(PROMPT, guidance_scale=4.0, output_type="latent", **calls)
    finally:
        for handle in handles:
            handle.remove()
    found = cache.input_features()
    assert set(found) == {f"{name}.whole" for name in (NOISE, WORDS, "embed", "x_t", "x0_latent")}  # no image beside it
    torch.testing.assert_close(found[f"{WORDS}.whole"][0, 0, 0, 0], seen[0][1].mean(0))
    assert not torch.allclose(seen[0][0], seen[0][1])
    for step in range(2):
        by_frame = first[step][1].unflatten(0, (found["embed.whole"].shape[2], -1)).mean(1)
        torch.testing.assert_close(found["embed.whole"][0, step].mean(1), by_frame, atol=1e-5, rtol=1e-5)
    assert torch.equal(found[f"{NOISE}.whole"][:, 0], found["x_t.whole"][:, 0])


def test_recorded_calls_are_those_of_the_conditional_branch(pipeline):
    config = type(CONFIG)(steps=3, frames=5, prompt_tokens=32, guidance=3.0)
    seen = []

    def spy(module, args, kwargs):
        seen.append(kwargs)

    handle = pipeline.transformer.register_forward_pre_hook(spy, with_kwargs=True)
    try:
        with capture(pipeline, ["0"], Pooling("clip"), "0,2", record=(0, 2)) as cache:
            run(pipeline, config=config)
    finally:
        handle.remove()
    assert sorted(cache.recorded) == [0, 2]
    for step, (branches, args, kwargs) in cache.recorded.items():
        assert branches == ("cond",)
        assert args == ()
        assert torch.equal(kwargs["hidden_states"], seen[2 * step]["hidden_states"])
        assert torch.equal(kwargs["encoder_hidden_states"], seen[2 * step]["encoder_hidden_states"])
    with capture(pipeline, ["0"], Pooling("clip")) as bare:
        run(pipeline)
    assert bare.recorded == {}


def test_noise_depends_on_the_seed_alone(pipeline):
    together = run(pipeline, output_type="latent", config=CONFIG)
    for i in range(3):
        alone = sample(pipeline, CONFIG, IMAGES[i : i + 1], [PROMPT], [SEEDS[i]], output_type="latent")
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=0)
    with capture(pipeline, ["x_t"], Pooling("frame"), "0") as first:
        sample(pipeline, CONFIG, IMAGES, PROMPTS, SEEDS)
    with capture(pipeline, ["x_t"], Pooling("frame"), "0") as second:
        sample(pipeline, CONFIG, IMAGES[[2, 0]], PROMPTS[:2], [SEEDS[2], SEEDS[0]])
    assert torch.equal(first.features()[[2, 0]], second.features())  # exactly: the noise itself


def test_everything_is_undone_after_success_and_after_an_exception(pipeline):
    def clean():
        model = pipeline.transformer
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        methods = {"cache_context"} & set(vars(model)) | {"step"} & set(vars(pipeline.scheduler))
        return not any(hooks) and not methods and "prepare_latents" not in vars(pipeline)

    with capture(pipeline):
        run(pipeline)
    assert clean()
    with pytest.raises(ZeroDivisionError), capture(pipeline):
        run(pipeline, callback_on_step_end=lambda *a: 1 / 0)
    assert clean()
    with pytest.raises(ValueError, match=r"probe\.layers='0:9'"), capture(pipeline, "0:9"):
        pass
    assert clean()


def test_guidance_in_two_calls_is_labelled(pipeline):
    config = type(CONFIG)(steps=3, frames=5, prompt_tokens=32, guidance=3.0)
    seen = []
    handle = block_list(pipeline)[0].register_forward_hook(lambda m, a, out: seen.append(out.mean(1)))
    try:
        with capture(pipeline, ["0", "x_t"], Pooling("clip")) as cache:
            run(pipeline, config=config)
    finally:
        handle.remove()
    assert cache.branches == ("cond", "uncond")
    features = cache.features()[:, :, :, :, 0, 0]
    for step in range(3):  # Wan calls the transformer with the prompt first, then without
        torch.testing.assert_close(features[:, step, 0, 0], seen[2 * step])
        torch.testing.assert_close(features[:, step, 0, 1], seen[2 * step + 1])
        assert torch.equal(features[:, step, 1, 0], features[:, step, 1, 1])


def test_guidance_in_one_doubled_call_is_labelled():
    pipeline = cogvideox()
    calls = {"num_inference_steps": 2, "height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 32}
    calls["output_type"] = "latent"
    seen = []
    handle = block_list(pipeline)[1].register_forward_hook(lambda m, a, out: seen.append(out[0].mean(1)))
    try:
        with capture(pipeline, ["1", "x0_latent"], Pooling("clip"), clean=[1]) as cache:
            pipeline(PROMPT, guidance_scale=4.0, generator=torch.Generator().manual_seed(0), **calls)
    finally:
        handle.remove()
    assert cache.branches == ("cond", "uncond")
    features = cache.features()[0, :, 0, :, 0, 0]
    for step in range(2):
        torch.testing.assert_close(features[step, 1], seen[step][0])  # diffusers puts the empty prompt first
        torch.testing.assert_close(features[step, 0], seen[step][1])
    with capture(pipeline, ["1"], Pooling("clip")) as plain:
        pipeline(PROMPT, guidance_scale=1.0, generator=torch.Generator().manual_seed(0), **calls)
    assert plain.branches == ("cond",)


def test_two_experts_are_told_apart():
    pipeline = wan(experts=2)
    config = type(CONFIG)(steps=5, frames=5, prompt_tokens=32)
    with capture(pipeline, "all", Pooling("clip")) as cache:
        run(pipeline, config=config)
    boundary = [float(t) >= 875 for t in pipeline.scheduler.timesteps]
    assert [cache.experts[s] for s in range(5)] == ["high" if above else "low" for above in boundary]
    assert set(cache.experts.values()) == {"high", "low"}


def test_region_pooling_reads_each_samples_own_boxes(pipeline):
    boxes = [
        [(0.0, 0.0, 0.25, 0.25), (0.75, 0.75, 1.0, 1.0)],
        [(0.5, 0.0, 1.0, 0.5), (0.0, 0.0, 1.0, 1.0)],
        [(0.0, 0.5, 0.5, 1.0)] * 2,
    ]
    seen = []
    handle = block_list(pipeline)[2].register_forward_hook(lambda m, a, out: seen.append(out.clone()))
    try:
        with capture(pipeline, ["2"], Pooling("region", True, boxes), "1") as cache:
            run(pipeline)
    finally:
        handle.remove()
    features = cache.features()[:, 0, 0, 0]  # sample position region channel
    assert cache.positions == ("all", "0", "1")
    grid = seen[1].unflatten(1, (2, 4, 4))  # frame, row, column: 32 px, 8 px a token
    torch.testing.assert_close(features[0, 1, 0], grid[0, 0, 0, 0])
    torch.testing.assert_close(features[0, 2, 1], grid[0, 1, 3, 3])
    torch.testing.assert_close(features[1, 0, 0], grid[1, :, :2, 2:].mean((0, 1, 2)))
    torch.testing.assert_close(features[1, 0, 1], grid[1].mean((0, 1, 2)))
    torch.testing.assert_close(features[2, 2, 0], grid[2, 1, 2:, :2].mean((0, 1)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hook_points": "0,7"}, r"probe\.layers='0,7'.*\b0\b.*\b2\b"),
        ({"hook_points": "first"}, r"probe\.layers='first'.*all.*last.*start:stop:stride"),
        ({"steps": "9"}, r"probe\.steps='9'.*\b0\b.*\b2\b"),
        ({"pooling": "boxes"}, r"probe\.pooling='boxes'.*clip.*frame.*grid.*region"),
    ],
)
def test_bad_selections_name_the_valid_range(pipeline, arguments, message):
    if "pooling" in arguments:
        with pytest.raises(ValueError, match=message):
            Pooling(arguments["pooling"])
        return
    with pytest.raises(ValueError, match=message), capture(pipeline, **arguments):
        run(pipeline)


def test_refuses_a_step_cache():
    from diffusers import FirstBlockCacheConfig

    pipeline = wan()
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"step cache.*'only'.*disable_cache\(\)"), capture(pipeline):
        run(pipeline)


@pytest.mark.slow
def test_refuses_a_compiled_transformer(pipeline):
    pipeline = wan()
    pipeline.transformer.blocks[0].compile()
    with pytest.raises(ValueError, match="'only'.*compiled"), capture(pipeline):
        run(pipeline)


def test_refuses_an_unknown_transformer():
    pipeline = wan()
    pipeline.transformer.__class__ = type("NewTransformer", (type(pipeline.transformer),), {})
    with pytest.raises(ValueError, match="NewTransformer.*WanTransformer3DModel"), capture(pipeline):
        run(pipeline)


def test_refuses_a_second_order_scheduler():
    from diffusers import FlowMatchHeunDiscreteScheduler

    pipeline = wan()
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler()
    with (
        pytest.raises(ValueError, match=r"FlowMatchHeunDiscreteScheduler.*\b2\b.*FlowMatchEulerDiscreteScheduler"),
        capture(pipeline),
    ):
        run(pipeline)


def test_calls_that_do_not_fit_a_run_are_an_error(pipeline):
    with pytest.raises(RuntimeError, match=r"captured.*\bone\b.*\bnone\b"), capture(pipeline):
        pass
    with pytest.raises(RuntimeError, match=r"hook point 0\b.*step 0\b.*cond"), capture(pipeline):
        run(pipeline)
        run(pipeline)

    def skip(pipe, step, timestep, tensors):
        pipe.transformer(torch.zeros(1, 12, 2, 4, 4), timestep[None], torch.zeros(1, 32, 64))
        return {}

    with pytest.raises(RuntimeError, match=r"call 0 of step 1\b.*context ''.*cond"), capture(pipeline):
        run(pipeline, callback_on_step_end=skip)


def test_an_interrupted_run_keeps_its_prefix(pipeline):
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return {}

    with capture(pipeline, "all", Pooling("clip")) as whole:
        run(pipeline)
    with capture(pipeline, "all", Pooling("clip")) as part:
        run(pipeline, callback_on_step_end=stop)
    assert part.steps == (0, 1)
    assert torch.equal(part.features(), whole.features()[:, :2])


def test_x0_of_the_last_step_is_the_video(pipeline):
    with capture(pipeline, ["x_t"], Pooling("clip"), clean=[2]) as cache:
        video = run(pipeline)
    np.testing.assert_allclose(decode(pipeline, cache.clean[2], CONFIG.frames), video, atol=1e-4)


def test_latent_tokens_follow_the_order_of_the_patch_embedding():
    pipeline = wan()
    model = pipeline.transformer
    model.register_to_config(patch_size=(1, 2, 2))
    latent = torch.arange(2 * 3 * 2 * 4 * 4.0).reshape(2, 3, 2, 4, 4)
    tokens = architecture(pipeline).latent_tokens(model, latent)
    conv = torch.nn.Conv3d(3, 12, (1, 2, 2), (1, 2, 2), bias=False)
    conv.weight.data = torch.eye(12).reshape(12, 3, 1, 2, 2)
    assert torch.equal(tokens, conv(latent).flatten(2).transpose(1, 2))
