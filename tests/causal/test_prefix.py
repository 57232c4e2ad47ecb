"""Runs that share their first steps: equal to the run alone, bit for bit, in every family."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache

import pytest
import torch

from cosprobe.causal import Edit, patch, recorded, replayed
from cosprobe.causal.prefix import Prefix
from cosprobe.errors import InputError
from cosprobe.models import block_list, experts
from tests.conformity.checks import Case
from tests.examples.families import FAMILIES, PROMPTS
from tests.examples.planted import traces

STEPS = 3
# one of each way to differ: guidance, layout, scheduler, experts, image condition
QUICK = {
    *(("wan22_t2v", True), ("wan21_t2v_dpm", False), ("ltx_i2v", True), ("cogvideox15_i2v", True), ("mochi", False)),
    ("hunyuan_t2v", True),
}
EVERY = [
    pytest.param(name, guided, marks=() if (name, guided) in QUICK else pytest.mark.docs)
    for name in FAMILIES
    for guided in (False, True)
]


def latents(case, rows=(0, 1), **more):
    return torch.as_tensor(case.run(rows, **{"output_type": "latent", "num_inference_steps": STEPS} | more))


@cache
def prefix_of(name: str, guided: bool) -> tuple[Case, Prefix, torch.Tensor]:
    """A case, and its clean run."""
    case = Case(name, guided)
    with recorded(case.pipeline) as prefix:
        clean = latents(case)
    return case, prefix, clean


@pytest.fixture
def wan():
    return prefix_of("wan22_t2v", True)


@contextmanager
def counted(case):
    """How often the first blocks and the encoders run."""
    ran: list[str] = []
    blocks = [block_list(case.pipeline, model)[0] for model in experts(case.pipeline).values()]
    models = [part for name, part in case.pipeline.components.items() if "encoder" in name and part is not None]
    hooks = [block.register_forward_hook(lambda *_: ran.append("block")) for block in blocks]
    inside = [m for part in models for m in part.modules() if m is not part]  # hooks on the encoders run in any case
    hooks += [part.register_forward_hook(lambda *_: ran.append("encoder")) for part in inside]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def calls_in(prefix, steps):
    return sum(step < steps for step, _ in prefix.outputs)


@pytest.mark.parametrize(("name", "guided"), EVERY)
def test_a_replayed_run_is_the_run_itself_and_computes_the_other_steps_only(name, guided):
    case, prefix, clean = prefix_of(name, guided)
    assert torch.equal(latents(case), clean) and prefix.steps == STEPS
    assert calls_in(prefix, STEPS) == len(prefix.outputs) and calls_in(prefix, 1) in (1, 2)
    for steps in range(STEPS + 1):
        with counted(case) as ran, replayed(case.pipeline, prefix, steps):
            assert torch.equal(latents(case), clean)
        assert ran == ["block"] * (len(prefix.outputs) - calls_in(prefix, steps))
    with counted(case) as ran:
        latents(case)
    assert {*ran} == {"block", "encoder"}
    assert not traces(case.pipeline)


@pytest.mark.parametrize(("name", "guided"), EVERY)
def test_a_replayed_run_with_an_edit_is_that_with_the_edit_alone(name, guided):
    case, prefix, clean = prefix_of(name, guided)
    for edit in (Edit("noise", steps=(1,), amount=0.5), Edit("ablate", "resample", steps=(1, 2), layers=(1,))):
        with patch(case.pipeline, [edit]):
            alone = latents(case)
        assert not torch.equal(alone, clean)
        with replayed(case.pipeline, prefix, 1), patch(case.pipeline, [edit]):
            assert torch.equal(latents(case), alone)
        with patch(case.pipeline, [edit]), replayed(case.pipeline, prefix, 1):
            assert torch.equal(latents(case), alone)
    with replayed(case.pipeline, prefix, 2):  # the edits have left nothing
        assert torch.equal(latents(case), clean)


def test_several_runs_in_one_context_are_replayed(wan):
    case, prefix, clean = wan
    with replayed(case.pipeline, prefix, 3):
        assert torch.equal(latents(case), clean) and torch.equal(latents(case), clean)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": (0, 2)},  # another seed
        {"rows": (1, 0)},
        {"rows": (0,)},
        {"rows": (0, 1, 2)},
        {"prompt": [PROMPTS[0]] * 2},
        {"negative_prompt": ["a green box"] * 2},
        {"num_inference_steps": STEPS - 1},
        {"num_inference_steps": STEPS + 1},
        {"guidance_scale": 1.0},
        {"guidance_scale": 4.0},
        {"num_frames": 5},
        {"width": 64},
    ],
    ids=str,
)
def test_another_run_is_refused_in_one_line(wan, change):
    case, prefix, _ = wan
    with pytest.raises(InputError, match="recorded run") as raised, replayed(case.pipeline, prefix, 2):
        latents(case, **change)
    assert len(str(raised.value).splitlines()) == 1
    assert not traces(case.pipeline)


def test_other_images_are_refused():
    case, prefix, _ = prefix_of("ltx_i2v", True)
    other = Case("ltx_i2v", True)
    other.images, other.pipeline = case.images.flip(0), case.pipeline
    with pytest.raises(InputError, match="vae"), replayed(case.pipeline, prefix, 1):
        latents(other)


@pytest.mark.parametrize(
    "edit",
    [
        Edit("noise", steps=(0,)),
        Edit("noise", steps=(1,), frames=(1,), amount=0.1),
        Edit("ablate", layers=(1,), steps=(1,)),
        Edit("ablate", layers=(1,)),  # every step, also those that are not computed
    ],
    ids=str,
)
def test_an_edit_in_a_replayed_step_is_refused(wan, edit):
    case, prefix, _ = wan
    both = pytest.raises(InputError, match=r"no edit before step 2|was not carried out at step [01]")
    with both, replayed(case.pipeline, prefix, 2), patch(case.pipeline, [edit]):
        latents(case)
    assert not traces(case.pipeline)


@pytest.mark.parametrize("steps", [-1, STEPS + 1, True, 1.0, None])
def test_steps_that_the_prefix_has_not_are_refused(wan, steps):
    case, prefix, _ = wan
    with pytest.raises(InputError, match=rf"steps={steps!r}.*0 to {STEPS}"), replayed(case.pipeline, prefix, steps):
        pass


def test_an_empty_prefix_is_refused_when_something_is_encoded(wan):
    case, _, _ = wan
    with pytest.raises(InputError, match="text_encoder: call 0"), replayed(case.pipeline, Prefix(), 0):
        latents(case)


def test_a_second_call_is_not_recorded(wan):
    case, _, _ = wan
    with pytest.raises(InputError, match="second pipeline call"), recorded(case.pipeline):
        latents(case)
        latents(case)
    assert not traces(case.pipeline)


def test_the_outputs_of_a_prefix_are_of_its_own(wan):
    """Whoever changes what a replayed transformer returns changes that run only."""
    case, prefix, clean = wan
    kept = [output.clone() for _, output in prefix.outputs]

    def spoil(model, args, output):
        output[0].zero_()

    hooks = [model.register_forward_hook(spoil) for model in experts(case.pipeline).values()]
    try:
        with replayed(case.pipeline, prefix, 1):
            assert not torch.equal(latents(case), clean)
    finally:
        for hook in hooks:
            hook.remove()
    assert all(torch.equal(a, b) for a, (_, b) in zip(kept, prefix.outputs, strict=True))


def test_an_error_leaves_nothing_behind(wan):
    case, prefix, clean = wan
    for context in (recorded(case.pipeline), replayed(case.pipeline, prefix, 2)):
        with pytest.raises(KeyboardInterrupt), context:
            raise KeyboardInterrupt
    assert not traces(case.pipeline) and torch.equal(latents(case), clean)


def test_hooks_on_transformers_run_in_every_step_and_on_blocks_in_the_others(wan):
    case, prefix, _ = wan
    ran: list[int] = []
    hooks = [model.register_forward_hook(lambda *_: ran.append(1)) for model in experts(case.pipeline).values()]
    with replayed(case.pipeline, prefix, 3):
        latents(case)
    for hook in hooks:
        hook.remove()
    assert len(ran) == len(prefix.outputs)
