"""Counted operations are those of arithmetic by hand; the parts add up; metering leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from cosprobe.activations.cost import _ATTENTION, Cost, flops, seconds
from cosprobe.config import PipelineConfig
from cosprobe.models.pipelines import sample
from tests.examples.pipelines import CONFIG, PROMPT, wan

IMAGES = torch.rand(2, 3, 32, 32)
# of tests/examples/pipelines.py: 5 frames of 32 x 32, 4 and 8 times smaller
TOKENS, TEXT, WIDTH, FFN = 2 * 4 * 4, 32, 24, 32


def by_hand(layers: int, channels: int = 12, freq: int = 16, text: int = 64) -> tuple[list[int], int]:
    """Wan: a multiplication and an addition are two operations. After each block, and of the whole evaluation."""
    embedding = 2 * TOKENS * channels * WIDTH
    embedding += 2 * (freq * WIDTH + WIDTH * WIDTH + WIDTH * 6 * WIDTH)  # the timestep
    embedding += 2 * TEXT * (text * WIDTH + WIDTH * WIDTH)
    own = 4 * 2 * TOKENS * WIDTH**2 + 2 * 2 * TOKENS * TOKENS * WIDTH
    cross = 2 * 2 * TOKENS * WIDTH**2 + 2 * 2 * TEXT * WIDTH**2 + 2 * 2 * TOKENS * TEXT * WIDTH
    block = own + cross + 2 * 2 * TOKENS * WIDTH * FFN
    prefix = [embedding + (layer + 1) * block for layer in range(layers)]
    return prefix, prefix[-1] + 2 * TOKENS * WIDTH * 4


def test_attention_on_a_cpu_is_counted():
    query, key = torch.rand(2, 3, 5, 8), torch.rand(2, 3, 7, 8)
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter, torch.no_grad():
        F.scaled_dot_product_attention(query, key, key)
    assert counter.get_total_flops() == 2 * (2 * 3 * 5 * 7 * 8) * 2


def test_an_evaluation_costs_what_arithmetic_says():
    cost = flops(wan(), CONFIG, IMAGES[:1], [PROMPT])
    prefix, whole = by_hand(layers=3)
    assert list(cost.layers) == prefix
    assert cost.evaluation == whole


def test_cost_is_per_sample_whatever_the_batch():
    model = wan()
    one, two = flops(model, CONFIG, IMAGES[:1], [PROMPT]), flops(model, CONFIG, IMAGES, [PROMPT] * 2)
    assert one == two
    assert min(one.text, one.image, one.decode) > 0


def test_parts_add_up_to_a_whole_run():
    """One count over a whole call, decoding included, is `run`."""
    model = wan()
    cost = flops(model, CONFIG, IMAGES[:1], [PROMPT])
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        sample(model, CONFIG, IMAGES[:1], [PROMPT], [0])
    assert counter.get_total_flops() == cost.run(CONFIG.steps)


@pytest.mark.slow
def test_guidance_by_two_calls_doubles_an_evaluation_but_not_its_first_half():
    guided = PipelineConfig(steps=3, frames=5, prompt_tokens=32, guidance=3.0)
    plain, both = (flops(wan(), config, IMAGES[:1], [PROMPT]) for config in (CONFIG, guided))
    assert both.evaluation == 2 * plain.evaluation
    assert both.layers == plain.layers
    assert both.text == 2 * plain.text


def test_halting_is_cheaper_the_earlier():
    cost = Cost(1.0, 10.0, (2.0, 3.0, 4.0), 5.0, 100.0)
    assert cost.run(4) == 1 + 10 + 4 * 5 + 100
    assert cost.until(0, 0) == 13
    assert cost.until(2, 1) == 11 + 2 * 5 + 3
    with pytest.raises(ValueError, match=r"step=0, layer=3.*\b0\b.*\b2\b"):
        cost.until(0, 3)


def test_seconds_are_positive_and_rise_from_layer_to_layer():
    cost = seconds(wan(), CONFIG, IMAGES, [PROMPT] * 2)
    assert 0 < cost.layers[0] < cost.layers[1] < cost.layers[2] < cost.evaluation
    assert min(cost.text, cost.image, cost.decode) > 0


def test_metering_leaves_no_hook_behind():
    model = wan()
    flops(model, CONFIG, IMAGES[:1], [PROMPT])
    modules = [*model.transformer.modules(), *model.text_encoder.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_images_without_prompts_are_refused():
    with pytest.raises(ValueError, match=r"\b2 images.*\b1 prompts"):
        flops(wan(), CONFIG, IMAGES, [PROMPT])
