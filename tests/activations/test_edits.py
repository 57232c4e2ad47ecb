from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from cosprobe.activations.capture import capture
from cosprobe.activations.edits import (
    average_blocks,
    average_clean,
    average_latents,
    group_mean,
)
from cosprobe.models.pipelines import sample
from tests.examples.pipelines import CONFIG, PROMPT, wan

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5)).repeat_interleave(3, dim=0)
SEEDS = [1, 2, 3, 4, 5, 6]  # two problems, three seeds each
AVERAGES = {
    "hidden": lambda pipeline, **k: average_blocks(pipeline, 3, (1, 2), **k),
    "x0": lambda pipeline, **k: average_clean(pipeline, 3, **k),
    "latent": lambda pipeline, **k: average_latents(pipeline, 3, **k),
}


@pytest.fixture(scope="module")
def pipeline():
    return wan()


def draw(pipeline, seeds=SEEDS, config=CONFIG, images=IMAGES, **more):
    return np.asarray(sample(pipeline, config, images, [PROMPT] * len(images), seeds, **more))


def outputs(pipeline, layer, at=0):
    """What comes out of a block at its call number `at`, seen by a hook that is registered now."""
    seen = []
    hook = pipeline.transformer.blocks[layer].register_forward_hook(lambda block, args, out: seen.append(out.clone()))
    draw(pipeline)
    hook.remove()
    return seen[at]


@pytest.mark.parametrize("back", ["first", "all"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_group_mean_is_what_a_loop_gives(back, weighted):
    values, weights = torch.randn(8, 3, 2), torch.tensor([1.0, 3, 0, 0, 0, 0, 0, 5]) if weighted else None
    expected = values.clone()
    for start in (0, 4):
        shares = torch.ones(4) if weights is None or start == 9 else weights[start : start + 4]
        mean = sum(w * v for w, v in zip(shares / shares.sum(), values[start : start + 4], strict=True))
        for row in range(start, start + (4 if back == "all" else 1)):
            expected[row] = mean
    torch.testing.assert_close(group_mean(values, 4, back, weights), expected)


def test_a_group_without_weight_is_averaged_equally():
    values = torch.randn(4, 3)
    torch.testing.assert_close(group_mean(values, 4, "first", torch.zeros(4))[0], values.mean(0))


def test_a_batch_that_is_not_whole_groups_is_refused():
    with pytest.raises(ValueError, match=r"\b5 samples.*\b3 seeds"):
        group_mean(torch.zeros(5, 2), 3, "first")


def test_the_first_run_goes_on_from_the_average_and_the_others_from_their_own(pipeline):
    raw = outputs(pipeline, 1)
    with average_blocks(pipeline, 3, (1,), (0,)):
        edited = outputs(pipeline, 1)
    for first in (0, 3):
        torch.testing.assert_close(edited[first], (raw[first] + raw[first + 1] + raw[first + 2]) / 3)
        assert torch.equal(edited[first + 1 : first + 3], raw[first + 1 : first + 3])
    with average_blocks(pipeline, 3, (1,), (1,)):
        assert torch.equal(outputs(pipeline, 1), raw)  # another step is left alone
        assert not torch.equal(outputs(pipeline, 1, at=1)[0], raw[0])


def test_planted_constants_are_averaged_layer_after_layer(monkeypatch):
    """Blocks that add a constant to every sample of its own: the mean of all that was added must come out."""
    model = wan()
    planted = torch.arange(18.0).reshape(3, 6)  # layer, sample

    class Adds(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, hidden_states, *rest, **more):
            return hidden_states + planted[self.layer, : len(hidden_states), None, None]

    model.transformer.blocks = nn.ModuleList([Adds(i) for i in range(3)])
    start = []
    model.transformer.blocks[0].register_forward_pre_hook(lambda block, args: start.append(args[0].clone()))
    with average_blocks(model, 3, (0, 2), (0,)):
        end = outputs(model, 2)
    value = start[0]
    for layer in range(3):
        value = value + planted[layer, :, None, None]
        if layer != 1:  # outside of the window
            value = torch.stack(
                [value[i - i % 3 : i - i % 3 + 3].mean(0) if i % 3 == 0 else value[i] for i in range(6)]
            )
    torch.testing.assert_close(end, value)


def test_a_weighted_average_follows_the_weights(pipeline):
    raw = outputs(pipeline, 1)
    asked = []

    def weigh(step, layer, tokens, size):
        asked.append((step, layer, size, torch.equal(tokens, raw)))
        return torch.tensor([1.0, 0, 0, 0, 1, 3])

    with average_blocks(pipeline, 3, (1,), (0,), weigh=weigh):
        edited = outputs(pipeline, 1)
    assert asked == [(0, 1, (2, 4, 4), True)]
    torch.testing.assert_close(edited[0], raw[0])
    torch.testing.assert_close(edited[3], raw[4] / 4 + raw[5] * 3 / 4)


def test_both_branches_are_averaged_and_weights_are_asked_for_once(pipeline):
    asked, seen = [], []

    def weigh(step, layer, tokens, size):
        asked.append((step, layer))
        return torch.ones(len(tokens))

    with average_blocks(pipeline, 3, (0,), (0, 1), weigh=weigh):
        block = pipeline.transformer.blocks[0]
        hook = block.register_forward_hook(lambda b, a, out: seen.append(out.clone()))
        draw(pipeline, config=replace(CONFIG, guidance=3.0), images=IMAGES)
        hook.remove()
    assert asked == [(0, 0), (1, 0)] and len(seen) == 2 * CONFIG.steps


@pytest.mark.slow
@pytest.mark.parametrize("name", AVERAGES)
def test_nothing_chosen_is_bit_identical_and_everything_is_undone(pipeline, name):
    plain = draw(pipeline)
    with AVERAGES[name](pipeline, steps=()):
        assert np.array_equal(draw(pipeline), plain)
    with average_blocks(pipeline, 3, (), (0, 1, 2)):
        assert np.array_equal(draw(pipeline), plain)
    with AVERAGES[name](pipeline, steps=(0,)):
        assert not np.array_equal(draw(pipeline)[0], plain[0])
    with pytest.raises(KeyboardInterrupt), AVERAGES[name](pipeline, steps=(0,)):
        raise KeyboardInterrupt
    assert np.array_equal(draw(pipeline), plain)
    assert "step" not in vars(pipeline.scheduler)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipeline.transformer.modules())


@pytest.mark.parametrize("name", AVERAGES)
def test_equal_seeds_average_to_themselves_and_the_others_go_on_as_they_are(pipeline, name):
    plain = draw(pipeline)
    with AVERAGES[name](pipeline, steps=(0, 1)):
        np.testing.assert_allclose(draw(pipeline, [7] * 6), draw(wan(), [7] * 6), atol=1e-5)
        edited = draw(pipeline)
    others = [1, 2, 4, 5]
    assert np.array_equal(edited[others], plain[others])


@pytest.mark.parametrize("name", AVERAGES)
def test_the_order_of_the_other_seeds_changes_nothing(pipeline, name):
    with AVERAGES[name](pipeline, steps=(0,)):
        one, other = draw(pipeline, [1, 2, 3, 4, 5, 6]), draw(pipeline, [1, 3, 2, 4, 6, 5])
    np.testing.assert_allclose(one[[0, 3]], other[[0, 3]], atol=1e-4)


@pytest.mark.parametrize("name", AVERAGES)
def test_written_back_into_all_every_run_moves_and_order_changes_nothing(pipeline, name):
    with AVERAGES[name](pipeline, steps=(1,), back="all"):
        one, other = draw(pipeline), draw(pipeline, [3, 1, 2, 6, 4, 5])
    np.testing.assert_allclose(one, other[[1, 2, 0, 4, 5, 3]], atol=1e-4)


def test_the_clean_estimate_of_the_first_run_becomes_the_mean(pipeline):
    with capture(pipeline, "0", clean=[1]) as raw:
        draw(pipeline)
    stepped = []
    with average_clean(pipeline, 3, (1,)):
        draw(pipeline, callback_on_step_end=lambda p, step, t, tensors: stepped.append(tensors["latents"]) or {})
    before, after = stepped[0], stepped[1]
    sigma = pipeline.scheduler.sigmas
    estimate = before - sigma[1] * (after - before) / (sigma[2] - sigma[1])  # from where the step has led
    for first in (0, 3):
        torch.testing.assert_close(estimate[first], raw.clean[1][first : first + 3].mean(0), atol=1e-4, rtol=0)
        torch.testing.assert_close(estimate[first + 1], raw.clean[1][first + 1], atol=1e-4, rtol=0)


def test_the_latent_of_the_first_run_becomes_the_mean(pipeline):
    def latents():
        seen = []
        draw(pipeline, callback_on_step_end=lambda p, step, t, tensors: seen.append(tensors["latents"]) or {})
        return seen[0]

    raw = latents()
    with average_latents(pipeline, 3, (0,)):
        edited = latents()
    torch.testing.assert_close(edited[3], raw[3:6].mean(0))
    assert torch.equal(edited[4:], raw[4:])


def test_what_cannot_be_averaged_is_refused_in_one_line_and_leaves_no_hook(pipeline):
    outside = pytest.raises(ValueError, match=r"layers=\[1, 3\].*\blayer 3\b.*\b0\b.*\b2\b")
    with outside, average_blocks(pipeline, 3, (1, 3), (0,)):
        pass
    unknown = pytest.raises(ValueError, match="back='some'.*first.*all")
    with unknown, average_blocks(pipeline, 3, (1,), (0,), back="some"):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipeline.transformer.modules())


def test_activations_that_are_not_finite_are_named(pipeline):
    def poison(block, args, out):
        out[4, 0, 0] = torch.nan
        return out

    hook = pipeline.transformer.blocks[1].register_forward_hook(poison)
    try:
        message = r"\blayer 1\b.*\bstep 0\b.*\bsample 4\b"
        with pytest.raises(ValueError, match=message), average_blocks(pipeline, 3, (1,), (0,)):
            draw(pipeline)
    finally:
        hook.remove()


def test_both_experts_are_edited_and_restored():
    model = wan(experts=2)
    config, plain = replace(CONFIG, steps=4), None
    plain = draw(model, config=config)
    with average_blocks(model, 3, (0,), (3,)):  # the last step belongs to the second expert
        edited = draw(model, config=config)
    assert not np.array_equal(edited[0], plain[0]) and np.array_equal(edited[1], plain[1])
    assert np.array_equal(draw(model, config=config), plain)
