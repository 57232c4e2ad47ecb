from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig

from cosprobe.activations.capture import capture
from cosprobe.activations.pooling import Pooling
from cosprobe.activations.random_weights import RANDOM_WEIGHTS, replay, with_random_weights
from cosprobe.models.pipelines import experts, sample
from tests.examples.pipelines import CONFIG, PROMPT, cogvideox, wan

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
POOLING = Pooling("frame")


def recorded(pipeline, **changes):
    config = changes.pop("config", CONFIG)
    with capture(pipeline, ["0", "2"], POOLING, "0,2", record=(0, 2)) as cache:
        sample(pipeline, config, IMAGES, [PROMPT] * 2, [1, 2], output_type="latent")
    return cache


def parameters(pipeline):
    return [p.clone() for model in experts(pipeline).values() for p in model.parameters()]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("experts", [1, 2])
def test_replay_with_the_trained_weights_gives_what_was_captured(experts, guidance):
    pipeline = wan(experts)
    cache = recorded(pipeline, config=replace(CONFIG, guidance=guidance))
    cond = cache.features()[:, :, :, cache.branches.index("cond")]
    torch.testing.assert_close(replay(pipeline, cache, (0, 2), POOLING), cond, rtol=0, atol=0)


def test_replay_of_a_doubled_batch_keeps_the_half_that_saw_the_prompt():
    pipeline = cogvideox()
    calls = {"num_inference_steps": 2, "height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 32}
    with capture(pipeline, ["0", "1"], POOLING, record=(0, 1)) as cache:
        pipeline(PROMPT, guidance_scale=4.0, generator=torch.Generator().manual_seed(0), output_type="latent", **calls)
    torch.testing.assert_close(replay(pipeline, cache, (0, 1), POOLING), cache.features()[:, :, :, 0], rtol=0, atol=0)


@pytest.mark.parametrize("how", RANDOM_WEIGHTS)
def test_randomised_weights_change_the_features_and_are_undone(how):
    pipeline = wan(experts=2)
    cache, before = recorded(pipeline), parameters(pipeline)
    with pytest.raises(KeyError), with_random_weights(pipeline, how, seed=0):
        inside = parameters(pipeline)
        assert sum(not torch.equal(a, b) for a, b in zip(before, inside, strict=True)) > len(before) / 2
        if how == "permuted":
            for a, b in zip(before, inside, strict=True):
                assert torch.equal(a.flatten().sort().values, b.flatten().sort().values)
        first = replay(pipeline, cache, (0, 2), POOLING)
        raise KeyError
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(pipeline), strict=True))
    trained = replay(pipeline, cache, (0, 2), POOLING)
    assert (first - trained).abs().mean() > 0.1 * trained.abs().mean()
    with with_random_weights(pipeline, how, seed=0):
        assert torch.equal(replay(pipeline, cache, (0, 2), POOLING), first)


def test_bad_input_is_named():
    pipeline = wan()
    with (
        pytest.raises(ValueError, match="weights='zero'.*permuted.*fresh"),
        with_random_weights(pipeline, "zero", 0),
    ):
        pass
    with capture(pipeline, ["0"], POOLING) as cache:
        sample(pipeline, CONFIG, IMAGES, [PROMPT] * 2, [1, 2], output_type="latent")
    with pytest.raises(ValueError, match=r"capture\(.*record="):
        replay(pipeline, cache, (0,), POOLING)


def test_fresh_weights_of_an_adapted_transformer_are_those_of_the_bare_one():
    plain, adapted = wan(), wan()
    adapted.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "ffn.net.2"], init_lora_weights=False))
    cache, before = recorded(adapted), parameters(adapted)
    with with_random_weights(plain, "fresh", 0), with_random_weights(adapted, "fresh", 0):
        torch.testing.assert_close(replay(adapted, cache, (0, 2), POOLING), replay(plain, cache, (0, 2), POOLING))
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(adapted), strict=True))
    trained = replay(adapted, cache, (0, 2), POOLING)
    assert (trained - replay(plain, cache, (0, 2), POOLING)).abs().max() > 1e-3


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_replay_of_some_samples_is_that_of_all(guidance):
    pipeline = wan(experts=2)
    cache = recorded(pipeline, config=replace(CONFIG, guidance=guidance))
    whole = replay(pipeline, cache, (0, 2), POOLING)
    assert not torch.equal(whole[0], whole[1])
    for rows in ([1], [1, 0]):
        torch.testing.assert_close(replay(pipeline, cache, (0, 2), POOLING, rows), whole[rows], rtol=1e-5, atol=1e-5)


def test_replay_of_some_samples_of_a_doubled_batch():
    pipeline = cogvideox()
    calls = {"num_inference_steps": 2, "height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 32}
    with capture(pipeline, ["0", "1"], POOLING, record=[1]) as cache:
        pipeline(
            [PROMPT, PROMPT[:40]], guidance_scale=4.0, generator=torch.Generator().manual_seed(0),
            output_type="latent", **calls,
        )  # fmt: skip
    whole = cache.features()[:, 1:, :, cache.branches.index("cond")]
    assert not torch.allclose(whole[0], whole[1], atol=1e-2)
    torch.testing.assert_close(replay(pipeline, cache, (0, 1), POOLING, [1]), whole[1:], rtol=1e-5, atol=1e-5)
