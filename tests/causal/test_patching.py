"""Edits while a pipeline samples, against runs whose inside is known and against arithmetic of the test's own."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cosprobe.activations import Pooling, box_masks, capture
from cosprobe.causal import LATENT, At, Edit, patch
from cosprobe.errors import InputError
from cosprobe.models import architecture, block_list, experts, hidden_states, noise_level, sample
from cosprobe.tasks import Mask
from cosprobe.tasks.regions import digest_of
from tests.conformity.checks import Case, grid_of, tokens_of
from tests.examples.families import FAMILIES
from tests.examples.pipelines import CONFIG, PROMPT, cogvideox, wan
from tests.examples.planted import Adds, given, own_states, scheduled, traces, with_blocks

STEPS = 3
QUICK = {  # one of each way to differ: experts, scheduler, packed, given first frame, layout, noise counted upwards
    *(("wan22_t2v", True), ("wan21_t2v_dpm", False), ("ltx_i2v", True), ("cogvideox15_i2v", True), ("mochi", False)),
    *(("wan22_ti2v_i2v", True), ("ltx_t2v", False)),
}
EVERY = [
    pytest.param(name, guided, marks=() if (name, guided) in QUICK else pytest.mark.docs)
    for name in FAMILIES
    for guided in (False, True)
]
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
QUARTERS = [[(0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)], [(0.5, 0.0, 1.0, 0.5), (0.0, 0.5, 0.5, 1.0)]]  # of samples


@cache
def toy(name="wan"):
    return {"wan": wan, "cogvideox": cogvideox, "experts": lambda: wan(experts=2)}[name]()


def draw(pipeline, guidance=1.0, steps=STEPS, seeds=(1, 2), **more):
    """The last latents of a run."""
    config = replace(CONFIG, guidance=guidance, steps=steps, frames=9 if "Cog" in type(pipeline).__name__ else 5)
    more = {"output_type": "latent"} | more
    return torch.as_tensor(sample(pipeline, config, IMAGES[: len(seeds)], [PROMPT] * len(seeds), seeds, **more))


def edited(pipeline, *edits, sources=None, boxes=(), noise=(), **run):
    with patch(pipeline, edits, sources, boxes, noise):
        return draw(pipeline, **run)


@cache
def clean(name="wan"):
    return draw(toy(name))


# every family


@cache
def known(name: str, guided: bool):
    """A case, the states of its clean run, and where that run ends."""
    case = Case(name, guided)
    return case, *own_states(case, num_inference_steps=STEPS)


def run(case, *edits, sources=None, boxes=()):
    with (
        patch(case.pipeline, edits, sources, boxes),
        scheduled(case.pipeline) as latents,
        given(case.pipeline) as calls,
    ):
        end = torch.as_tensor(case.run(output_type="latent", num_inference_steps=STEPS))
    assert not traces(case.pipeline)
    return end, latents, calls


@pytest.mark.parametrize(("name", "guided"), EVERY)
def test_states_of_the_run_itself_change_nothing(name, guided):
    """Whole, one frame, one region, latent and hidden, every step; and so do no edits and an amount of 0."""
    case, states, end = known(name, guided)
    sources, layers = {"own": states}, (0, case.depth - 1)
    every = [Edit("swap", source="own"), Edit("swap", layers=layers, source="own")]
    parts = [replace(edit, frames=(1,), regions=(1,)) for edit in every]
    none = [Edit("noise", amount=0.0), Edit("ablate", layers=layers, amount=0.0)]
    for edits in ((), every, parts, none):
        found, latents, _ = run(case, *edits, sources=sources, boxes=QUARTERS)
        assert torch.equal(found, end)
        assert all(torch.equal(latent, states[step, -1, ""]) for step, latent in enumerate(latents))


@pytest.mark.parametrize(("name", "guided"), EVERY)
def test_fresh_noise_is_what_the_model_and_the_scheduler_get_in_that_step(name, guided):
    case, states, _ = known(name, guided)
    family = architecture(case.pipeline)
    frames, rows, columns = grid_of(case)
    for step in (0, 1):
        _, latents, calls = run(case, Edit("noise", steps=(step,)))
        assert torch.equal(latents[0], states[0, -1, ""]) == (step > 0)
        noise, old = latents[step], states[step, -1, ""]
        keeps = family.keeps_first_frame(case.pipeline)
        per_step = len(calls) // STEPS
        for call in calls[step * per_step : (step + 1) * per_step]:
            half = call[: len(noise)] / scale(case.pipeline, step)
            half, axis = (
                (half, 1)
                if half.ndim == 3 and noise.ndim == 3
                else (family.unpacked(half, SimpleNamespace(frames=frames, rows=rows)), family.axis("f"))
            )
            one = int(keeps)  # the given first frame
            size = half.shape[axis] - one
            torch.testing.assert_close(half.narrow(axis, one, size), noise.narrow(axis, noise.shape[axis] - size, size))
        if keeps and noise.shape[family.axis("f")] == frames:
            assert torch.equal(noise[:, :, 0], old[:, :, 0])
            noise, old = noise[:, :, 1:], old[:, :, 1:]
        assert not (noise == old).any()
        unit = noise_level(case.pipeline.scheduler, step).unit
        assert noise.std() / unit == pytest.approx(1, abs=0.15) and abs(noise.mean() / unit) < 0.15
        assert abs(torch.corrcoef(torch.stack([noise.flatten(), old.flatten()]))[0, 1]) < 4 / noise.numel() ** 0.5


def scale(pipeline, step):
    """What the model input is divided by."""
    if "Euler" in type(pipeline.scheduler).__name__ and "Flow" not in type(pipeline.scheduler).__name__:
        return 1 / (float(pipeline.scheduler.sigmas[step]) ** 2 + 1) ** 0.5
    return 1.0


@pytest.mark.parametrize(("name", "guided"), EVERY)
def test_noise_stays_in_its_frames_and_regions(name, guided):
    """The place of a patch in the latent is worked out here, from the axes of the family."""
    case, states, _ = known(name, guided)
    family, (frames, rows, columns) = architecture(case.pipeline), grid_of(case)
    inside = torch.zeros(2, frames, rows, columns, dtype=torch.bool)
    for row, boxes in enumerate(QUARTERS):
        inside[row, 1] = box_masks(boxes[:1], rows, columns)[0].reshape(rows, columns) > 0
    _, latents, _ = run(case, Edit("noise", steps=(1,), frames=(1,), regions=(0,)), boxes=QUARTERS)
    new, old = latents[1], states[1, -1, ""]
    if new.ndim == 3:
        assert torch.equal((new != old), inside.flatten(1)[:, :, None].expand_as(new))
        return
    differs = (new != old).movedim(family.axis("c"), 1).all(dim=1)
    assert torch.equal(differs, (new != old).movedim(family.axis("c"), 1).any(dim=1))
    height, width = differs.shape[2] // rows, differs.shape[3] // columns
    time = -(-differs.shape[1] // frames)
    expected = inside.repeat_interleave(time, 1).repeat_interleave(height, 2).repeat_interleave(width, 3)
    assert torch.equal(differs, expected[:, -differs.shape[1] :])


@pytest.mark.parametrize(("name", "guided"), EVERY)
def test_a_block_without_its_update_gives_its_input(name, guided):
    case, states, end = known(name, guided)
    layer = min(case.depth - 1, 1)
    seen = []
    with patch(case.pipeline, [Edit("ablate", steps=(1,), layers=(layer,))]), ExitStack() as undo:
        for model in experts(case.pipeline).values():
            first, then = block_list(case.pipeline, model)[layer - 1 : layer + 1]
            undo.callback(first.register_forward_hook(lambda b, a, out: seen.append(out)).remove)
            undo.callback(then.register_forward_hook(lambda b, a, out: seen.append(out)).remove)
        found = torch.as_tensor(case.run(output_type="latent", num_inference_steps=STEPS))
    assert not torch.equal(found, end)
    seen = [out[0] if isinstance(out, tuple) else out for out in seen]
    per_step = len(seen) // STEPS
    for number in range(0, len(seen), 2):
        assert torch.equal(seen[number], seen[number + 1]) == (number // per_step == 1)


@pytest.mark.parametrize(("name", "guided"), EVERY)
def test_what_follows_a_swap_of_the_latent_is_of_the_donor_alone(name, guided):
    """Also where the scheduler remembers earlier steps, and draws noise of its own."""
    case, states, end = known(name, guided)
    with patch(case.pipeline, [Edit("noise", steps=(0,))]):
        donor, other = own_states(case, num_inference_steps=STEPS)
    assert not torch.equal(other, end)
    swap = [Edit("swap", steps=(step,), source="donor") for step in (0, 1)]
    found, latents, _ = run(case, swap[0], sources={"donor": donor})
    assert torch.equal(found, other)
    hosts = [run(case, Edit("noise", steps=(0,), seed=seed), swap[1], sources={"donor": donor})[:2] for seed in (1, 2)]
    (one, latents), (two, more) = hosts
    free = int(architecture(case.pipeline).keeps_first_frame(case.pipeline))  # the model is given another frame 0
    assert torch.equal(latents[1][:, :, free:], donor[1, -1, ""][:, :, free:]) and not torch.equal(latents[0], more[0])
    assert torch.equal(one, two)


# known constants


def halves(pipeline, *edits, order, steps=STEPS, **more):
    """Of every step and branch: expert, input of the first block and output of the last one. order: of branches."""
    found = []

    def on_first(expert):
        return lambda block, args, kwargs: found.append((expert, hidden_states(args, kwargs)))

    def on_last(block, args, output):
        expert, start = found.pop()
        end = tokens_of(output)
        found.extend((expert, *pair) for pair in zip(start.split(2), end.split(2), strict=True))

    sources, boxes = more.pop("sources", None), more.pop("boxes", QUARTERS)
    with ExitStack() as undo:
        undo.enter_context(patch(pipeline, edits, sources, boxes))
        for expert, model in experts(pipeline).items():
            first, last = block_list(pipeline, model)[0], block_list(pipeline, model)[-1]
            undo.callback(first.register_forward_pre_hook(on_first(expert), with_kwargs=True).remove)
            undo.callback(last.register_forward_hook(on_last).remove)
        draw(pipeline, steps=steps, **more)
    assert len(found) == steps * len(order)
    return {(i // len(order), order[i % len(order)]): triple for i, triple in enumerate(found)}


def constant(expert, layer):
    return 10.0 * (layer + 1) + (0.5 if expert == "low" else 0.0)


ADDING = {
    "wan": (lambda: with_blocks(wan(), lambda e, i: Adds(constant(e, i))), ("cond", "uncond"), (2, 4, 4)),
    "cogvideox": (lambda: with_blocks(cogvideox(), lambda e, i: Adds(constant(e, i), text=True)), ("uncond", "cond"),
                  (3, 2, 2)),
    "experts": (lambda: with_blocks(wan(experts=2), lambda e, i: Adds(constant(e, i))), ("cond", "uncond"), (2, 4, 4)),
}  # fmt: skip


@pytest.mark.parametrize(
    "place",
    [
        {},
        {"frames": (1,)},
        {"regions": (0,)},
        {"regions": (0, 1), "frames": (0,)},
        {"branch": "cond"},
        {"branch": "uncond", "regions": (1,)},
        {"amount": 0.25},
        {"expert": "high", "steps": (0,)},
        {"expert": "low", "steps": (3,)},
        {"steps": ()},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ADDING)
def test_a_swap_puts_the_state_of_the_donor_where_it_was_asked_for_and_nowhere_else(name, place):
    make, order, (frames, rows, columns) = ADDING[name]
    edit = Edit("swap", layers=(1,), source="donor", **{"steps": (1,)} | place)
    steps = 4 if name == "experts" else STEPS
    if edit.expert and name != "experts":
        with pytest.raises(InputError, match="expected one of only"), patch(make(), [edit], {"donor": {}}):
            pass
        return
    size = (2, frames * rows * columns, 24 if name != "cogvideox" else 32)
    donor = {At(s, layer, b): torch.randn(size) for s in range(steps) for layer in range(3) for b in order}
    found = halves(make(), edit, order=order, sources={"donor": donor}, guidance=3.0, steps=steps)
    inside = torch.ones(2, frames, rows, columns, dtype=torch.bool)
    if edit.frames:
        inside &= torch.isin(torch.arange(frames), torch.tensor(edit.frames))[None, :, None, None]
    if edit.regions:
        allowed = torch.zeros_like(inside)
        for row in range(2):
            for x0, y0, x1, y1 in [QUARTERS[row][region] for region in edit.regions]:
                allowed[row, :, int(y0 * rows) : int(y1 * rows), int(x0 * columns) : int(x1 * columns)] = True
        inside &= allowed
    inside = inside.flatten(1).unsqueeze(-1)
    made = 0
    for (step, branch), (expert, value, end) in found.items():
        for layer in range(3):
            value = value + constant(expert, layer)
            here = step in (edit.steps or range(steps)) and layer == 1
            if here and edit.branch in ("", branch) and edit.expert in ("", expert):
                new = donor[step, layer, branch]
                new = new if edit.amount == 1 else value + edit.amount * (new - value)
                value, made = torch.where(inside, new, value), made + 1
        assert torch.equal(end, value)
    assert made == len(edit.steps or range(steps)) * (1 if edit.branch else 2)


@pytest.fixture(scope="module")
def adding():
    return ADDING["wan"][0]()


def after(pipeline, *edits, **more):
    """What the edits add to the output of the last block at step 1; all blocks add constants."""
    triple = halves(pipeline, *edits, order=("cond",), **more)[1, "cond"]
    start, end = triple[1:]
    return start, end


def test_edits_are_made_in_order_and_equal_ones_each(adding):
    donor = {At(1, 2, "cond"): torch.randn(2, 32, 24)}
    sources = {"donor": donor, "up": torch.full((2, 1, 24), 7.0)}
    swap, steer = (Edit(kind, steps=(1,), layers=(2,), source=s) for kind, s in (("swap", "donor"), ("steer", "up")))
    for edits, added in (((swap, steer), 7), ((steer, swap), 0), ((steer, swap, steer, steer), 14)):
        _, end = after(adding, *edits, sources=sources)
        assert torch.equal(end, donor[1, 2, "cond"] + (7.0 if added else 0) + (7.0 if added == 14 else 0))


def test_a_direction_is_added_to_every_token_of_its_region(adding):
    directions = torch.randn(2, 3, 24)
    boxes = [[*QUARTERS[row], (0.0, 0.0, 1.0, 0.5)] for row in range(2)]  # the third one overlaps both
    edit = Edit("steer", steps=(1,), layers=(1,), source="up", amount=-2.0, frames=(1,))
    start, end = after(adding, edit, sources={"up": directions}, boxes=boxes)
    expected = torch.zeros(2, 2, 4, 4, 24)
    for row in range(2):
        for (x0, y0, x1, y1), direction in zip(boxes[row], directions[row], strict=True):
            expected[row, 1, int(4 * y0) : int(4 * y1), int(4 * x0) : int(4 * x1)] -= 2 * direction
    torch.testing.assert_close(end - start - 60, expected.flatten(1, 3), atol=1e-4, rtol=0)


def test_steering_adds_the_share_of_a_mask_and_other_edits_change_every_token_that_it_touches(adding, tmp_path):
    inside = np.zeros((8, 8), dtype=bool)
    inside[0:3, 2:4] = True  # all of token (0, 1), half of token (1, 1)
    Image.fromarray(inside).save(tmp_path / "mask.png")
    masks = [[Mask(digest_of(inside), (0.0, 0.0, 1.0, 1.0), tmp_path / "mask.png"), QUARTERS[0][1]]] * 2
    steer = Edit("steer", steps=(1,), layers=(1,), source="up")
    directions = torch.randn(2, 2, 24) * torch.tensor([1.0, 0.0])[:, None]  # nothing is added in the second region
    start, end = after(adding, steer, sources={"up": directions}, boxes=masks)
    expected = torch.zeros(2, 2, 4, 4, 24)
    expected[:, :, 0, 1] = directions[:, :1]
    expected[:, :, 1, 1] = directions[:, :1] / 2
    torch.testing.assert_close(end - start - 60, expected.flatten(1, 3), atol=1e-4, rtol=0)
    donor = {At(1, 2, "cond"): torch.randn(2, 32, 24)}
    swap = Edit("swap", steps=(1,), layers=(2,), source="donor", regions=(0,))
    start, end = after(adding, swap, sources={"donor": donor}, boxes=masks)
    same = (end == donor[1, 2, "cond"]).all(-1).reshape(2, 2, 4, 4)
    assert same.nonzero()[:, 2:].tolist() == [[0, 1], [1, 1]] * 4


def test_an_eraser_gets_the_tokens_of_its_step_and_layer(adding):
    """It removes channel 0, by half, in one region."""
    seen = []

    def erases(x):
        seen.append(x)
        return torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], dim=1)

    edit = Edit("erase", steps=(1,), layers=(2,), source="erasers", amount=0.5, regions=(1,))
    start, end = after(adding, edit, sources={"erasers": {(1, 2): erases}})
    before = start + 10 + 20 + 30
    assert torch.equal(seen[0], before.flatten(0, 1)) and len(seen) == 1
    halved = torch.where(box_masks_of(1), before * torch.tensor([0.5] + [1.0] * 23), before)
    torch.testing.assert_close(end, halved)


def box_masks_of(region):
    masks = torch.stack([box_masks([boxes[region]], 4, 4)[0] > 0 for boxes in QUARTERS])
    return masks.repeat(1, 2).unsqueeze(-1)


@pytest.mark.parametrize(("how", "expected"), [("zero", [0, 0, 0]), ("mean", [4, 4, 4]), ("resample", [2, 9, 1])])
def test_an_ablated_block_adds_nothing_the_mean_or_what_it_added_to_the_next(how, expected):
    each = torch.tensor([1.0, 2.0, 9.0])[:, None, None]
    pipeline = with_blocks(wan(), lambda expert, layer: Adds(each if layer == 1 else 0.0))
    ends = []
    block_list(pipeline)[0].register_forward_pre_hook(lambda block, args: ends.append(args[0]))
    edit = Edit("ablate", how, steps=(1,), layers=(1,))
    with patch(pipeline, [edit]):
        block_list(pipeline)[2].register_forward_hook(lambda block, args, out: ends.append(out))
        sample(pipeline, replace(CONFIG, steps=2), IMAGES[:1].repeat(3, 1, 1, 1), [PROMPT] * 3, (1, 2, 3))
    for step, added in ((0, [1, 2, 9]), (1, expected)):
        change = ends[2 * step + 1] - ends[2 * step]
        torch.testing.assert_close(
            change, torch.tensor(added).float()[:, None, None].expand_as(change), atol=1e-4, rtol=0
        )


# a planted use


WRITES, READS, WHEN, DEPTH = 1, 4, 1, 6


class Remembers(nn.Module):
    """Block 1 writes an answer into the first frame's first quarter, channel 0, in step 1; block 4 reads it there and
    removes it."""

    def __init__(self, layer, state):
        super().__init__()
        self.layer, self.state = layer, state

    def forward(self, hidden_states, *rest):
        if self.layer == 0:
            self.state.step += 1
        place = torch.zeros(2, 2, 4, 4)
        for row, boxes in enumerate(QUARTERS):
            place[row, 0] = box_masks(boxes[:1], 4, 4)[0].reshape(4, 4)
        place, tokens = place.flatten(1), hidden_states + self.layer
        if self.state.step == WHEN and self.layer == WRITES:
            tokens[..., 0] += 1000.0 * self.state.answer * place
        if self.state.step == WHEN and self.layer == READS:
            self.state.read = (hidden_states[..., 0] * place).sum(1).sign().tolist()
            tokens[..., 0] *= 1 - place
        return tokens


@pytest.fixture(scope="module")
def planted():
    """A pipeline, its state, and the states of a run with the other answer."""
    state = SimpleNamespace(answer=-1.0, step=-1, read=None)
    pipeline = with_blocks(wan(), lambda expert, layer: Remembers(layer, state), DEPTH)
    donor = {}

    def keep(layer):
        return lambda block, args, output: donor.update({(state.step, layer, "cond"): output.clone()})

    hooks = [block.register_forward_hook(keep(layer)) for layer, block in enumerate(block_list(pipeline))]
    draw(pipeline)
    for hook in hooks:
        hook.remove()
    assert state.read == [-1, -1] and len(donor) == STEPS * DEPTH
    return pipeline, state, {"donor": donor}


def read_after(planted, **where):
    pipeline, state, sources = planted
    state.answer, state.step = 1.0, -1
    edited(pipeline, Edit("swap", source="donor", **where), sources=sources, boxes=QUARTERS)
    return state.read


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("layer", range(DEPTH))
def test_a_swap_flips_the_answer_exactly_between_writing_and_reading(planted, step, layer):
    between = step == WHEN and WRITES <= layer < READS
    assert read_after(planted, steps=(step,), layers=(layer,)) == ([-1, -1] if between else [1, 1])


@pytest.mark.parametrize(
    ("where", "flips"),
    [
        ({"frames": (0,)}, True),
        ({"frames": (1,)}, False),
        ({"regions": (0,)}, True),
        ({"regions": (1,)}, False),
        ({"regions": (0,), "frames": (1,)}, False),
        ({"branch": "cond"}, True),
        ({"amount": 0.75}, True),
        ({"amount": 0.25}, False),
    ],
    ids=str,
)
def test_a_swap_flips_the_answer_only_where_it_is_written(planted, where, flips):
    assert read_after(planted, steps=(WHEN,), layers=(2,), **where) == ([-1, -1] if flips else [1, 1])


def test_a_latent_that_stays_is_swapped_until_it_is_read():
    """The model predicts 0, so that the latent of a step is that of the next, and reads in step 1."""
    pipeline = wan()
    nn.init.zeros_(pipeline.transformer.proj_out.weight)
    nn.init.zeros_(pipeline.transformer.proj_out.bias)
    with scheduled(pipeline) as donor:
        draw(pipeline, seeds=(8, 9))
    sources = {"donor": {(step, LATENT, ""): latent for step, latent in enumerate(donor)}}
    for step in range(STEPS):
        with given(pipeline) as read:
            edited(pipeline, Edit("swap", steps=(step,), source="donor"), sources=sources)
        assert torch.equal(read[1], donor[1]) == (step <= 1)


# noise


def latents_of(pipeline, *edits, noise=(), seeds=(1, 2), **more):
    with patch(pipeline, edits, noise and {}, (), noise), scheduled(pipeline) as latents:
        draw(pipeline, seeds=seeds, **more)
    return latents


@pytest.mark.parametrize("step", [0, 1])
def test_noise_depends_on_the_seed_of_the_sample_of_the_edit_and_on_the_step(step):
    edit, pipeline = Edit("noise", steps=(step,)), toy()
    both = latents_of(pipeline, edit, noise=(7, 8))[step]
    assert torch.equal(latents_of(pipeline, edit, noise=(8, 7))[step], both.flip(0))
    assert torch.equal(latents_of(pipeline, edit, noise=(8,), seeds=(5,))[step], both[1:])
    assert torch.equal(latents_of(toy("experts"), edit, noise=(7, 8), steps=4, guidance=3.0)[step], both)
    assert torch.equal(latents_of(pipeline, edit)[step], latents_of(pipeline, edit, noise=(0, 1), seeds=(3, 4))[step])
    others = [latents_of(pipeline, replace(edit, seed=1), noise=(7, 8))[step], both.flip(0)]
    others.append(latents_of(pipeline, Edit("noise", steps=((step + 1) % STEPS,)), noise=(7, 8))[(step + 1) % STEPS])
    assert not any((other == both).any() for other in others)


@pytest.mark.parametrize("where", [{}, {"frames": (1,)}, {"regions": (1,)}], ids=str)
def test_damage_changes_the_latent_by_a_squared_norm_in_each_step(where):
    """Towards the noise that `fresh` puts there; a change in a step is seen against the same run without it."""
    pipeline = toy()
    for step in (0, 1):
        edits = [Edit("noise", "damage", steps=tuple(range(step + i)), amount=3.0, **where) for i in (0, 1)]
        latents = []
        for edit in edits:
            with patch(pipeline, [edit] if edit.steps else [], None, QUARTERS), scheduled(pipeline) as found:
                draw(pipeline)
            latents.append(found[step])
        change = latents[1] - latents[0]
        torch.testing.assert_close(change.square().flatten(1).sum(1), torch.full((2,), 3.0), rtol=1e-4, atol=0)
        with patch(pipeline, [Edit("noise", steps=(step,))]), scheduled(pipeline) as fresh:
            draw(pipeline)
        toward = (fresh[step] - latents[0])[change != 0] / change[change != 0]
        for row in range(2):
            ratio = ((fresh[step] - latents[0])[row] / change[row])[change[row] != 0]
            torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=0.05, atol=0)
        assert (toward > 0).all()
        expected = torch.ones(2, 2, 4, 4, dtype=torch.bool)
        if "frames" in where:
            expected[:, 0] = False
        if "regions" in where:
            expected = box_masks_of(1).reshape(2, 2, 4, 4)
        assert torch.equal((change != 0).any(dim=1), expected)


@pytest.mark.parametrize("amount", [1.0, 0.5])
def test_renoised_is_the_last_estimate_with_noise_of_the_level_of_the_step(amount):
    """x0-hat and the model output are worked out from the latents of the clean run."""
    pipeline = toy()
    plain, sigma = latents_of(pipeline), pipeline.scheduler.sigmas
    for step in (1, 2):
        velocity = (plain[step] - plain[step - 1]) / (sigma[step] - sigma[step - 1])
        estimate = plain[step - 1] - sigma[step - 1] * velocity
        noise = latents_of(pipeline, Edit("noise", steps=(step,), seed=3))[step]
        found = latents_of(pipeline, Edit("noise", "renoised", steps=(step,), seed=3, amount=amount))[step]
        expected = (1 - sigma[step]) * estimate + sigma[step] * noise
        torch.testing.assert_close(found, plain[step] + amount * (expected - plain[step]), atol=1e-4, rtol=1e-4)


def test_an_amount_is_the_share_of_the_way_to_the_noise():
    pipeline = toy()
    plain, fresh = (latents_of(pipeline, *edits)[1] for edits in ((), (Edit("noise", steps=(1,)),)))
    found = latents_of(pipeline, Edit("noise", steps=(1,), amount=0.3))[1]
    torch.testing.assert_close(found, plain + 0.3 * (fresh - plain))


# what is left behind, and what is refused


def test_nothing_is_left_behind(monkeypatch):
    pipeline, plain = toy("experts"), clean("experts")
    edits = [Edit("noise", steps=(1,)), Edit("ablate", layers=(0, 1))]
    with patch(pipeline, []):
        assert not traces(pipeline)
    with pytest.raises(KeyboardInterrupt), patch(pipeline, edits):
        assert traces(pipeline)
        raise KeyboardInterrupt
    assert not traces(pipeline)
    with pytest.raises(RuntimeError, match="broken"), patch(pipeline, edits):
        draw(pipeline, callback_on_step_end=lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    assert not traces(pipeline)
    assert not torch.equal(edited(pipeline, *edits), plain)
    assert not traces(pipeline) and torch.equal(draw(pipeline), plain)


def test_a_pipeline_that_was_wrapped_before_is_as_it_was():
    """What stands on it from outside, such as another `patch`, stays."""
    pipeline = toy()
    with patch(pipeline, [Edit("noise", steps=(1,))]):
        outer = {"prepare": vars(pipeline)["prepare_latents"], "step": vars(pipeline.scheduler)["step"]}
        with patch(pipeline, [Edit("noise", steps=(1,), seed=5)]):
            both = draw(pipeline)
        assert vars(pipeline)["prepare_latents"] is outer["prepare"]
        assert vars(pipeline.scheduler)["step"] is outer["step"]
    assert torch.equal(both, edited(pipeline, Edit("noise", steps=(1,), seed=5)))
    assert not traces(pipeline)


STATES = {At(1, 1, "cond"): torch.zeros(2, 32, 24), At(1, LATENT, ""): torch.zeros(2, 4, 2, 4, 4)}
SWAP, STEER = Edit("swap", steps=(1,), layers=(1,), source="a"), Edit("steer", steps=(1,), layers=(1,), source="a")
ERASE = Edit("erase", steps=(1,), layers=(1,), source="a")


@pytest.mark.parametrize(
    ("edit", "given", "message"),
    [
        (Edit("ablate", layers=(0, 3)), {}, r"layers=\[0, 3\].*layer 3.*0 to 2"),
        (Edit("ablate", layers=(0,), steps=(1, 3)), {}, "step 3, layer 0.*3 steps"),
        (Edit("noise", steps=(7,)), {}, "step 7, latent.*3 steps"),
        (Edit("ablate", layers=(0,), branch="uncond"), {}, "was not carried out at any step, layer 0"),
        (Edit("ablate", layers=(0,), expert="low"), {}, "expert='low'.*only"),
        (Edit("ablate", layers=(0,), frames=(1, 2)), {}, r"frames=\[1, 2\].*2 frames.*0 to 1"),
        (Edit("noise", frames=(2,)), {}, r"frames=\[2\].*2 frames.*0 to 1"),
        (Edit("noise", frames=(2,), amount=0.0), {}, r"frames=\[2\].*2 frames.*0 to 1"),
        (Edit("ablate", layers=(0,), frames=(2,), amount=0.0), {}, r"frames=\[2\].*2 frames.*0 to 1"),
        (Edit("noise", regions=(0,)), {}, r"regions=\[0\].*0 regions.*boxes"),
        (Edit("noise", regions=(0, 2)), {"boxes": QUARTERS}, r"regions=\[0, 2\].*2 regions"),
        (Edit("noise", regions=(1,)), {"boxes": [QUARTERS[0], QUARTERS[1][:1]]}, r"regions=\[1\].*1 regions"),
        (Edit("noise", regions=(0,)), {"boxes": QUARTERS[:1]}, "boxes: regions of 1 samples, expected 2"),
        (Edit("noise", regions=(0,)), {"boxes": [[(0.5, 0.0, 0.5, 1.0)]] * 2}, r"boxes: \[0.5, 0.0, 0.5, 1.0\]"),
        (Edit("noise", regions=(0,)), {"boxes": [[(float("nan"), 0.0, 0.5, 1.0)]] * 2}, r"boxes: \[nan"),
        (Edit("noise", regions=(0,)), {"boxes": [[(0.0, 0.0, 32.0, 32.0)]] * 2}, r"boxes: .*32.0.*fractions"),
        (Edit("noise"), {"seeds": (1, 2, 3)}, "seeds: 3 for a batch of 2"),
        (Edit("noise", "renoised", steps=(0,)), {}, "x0-hat.*from 1"),
        (SWAP, {}, "no source 'a'; expected one of none"),
        (SWAP, {"sources": {"b": {}}}, "no source 'a'; expected one of b"),
        (SWAP, {"sources": {"a": {}}}, "'a': no state of step 1, layer 1, cond"),
        (SWAP, {"sources": {"a": torch.zeros(2, 32, 24)}}, "'a': Tensor, expected a mapping"),
        (SWAP, {"sources": {"a": {At(1, 1, "cond"): torch.zeros(1, 32, 24)}}},
         r"shape \[1, 32, 24\], expected \[2, 32, 24\]"),
        (Edit("swap", steps=(1,), source="a"), {"sources": {"a": {}}}, "no state of step 1, layer -1, latent"),
        (Edit("swap", steps=(1,), source="a"), {"sources": {"a": {k: v[:, :, :1] for k, v in STATES.items()}}},
         r"shape \[2, 4, 1, 4, 4\], expected \[2, 4, 2, 4, 4\]"),
        (Edit("swap", steps=(0,), source="a"), {"sources": {"a": {(0, -1, ""): torch.zeros(2, 4, 1, 4, 4)}}},
         r"shape \[2, 4, 1, 4, 4\]"),
        (SWAP, {"sources": {"a": {k: v + torch.nan for k, v in STATES.items()}}}, "NaN.*step 1, layer 1"),
        (replace(SWAP, amount=1e300), {"sources": {"a": STATES}}, "NaN.*step 1, layer 1.*amount=1e.300"),
        (Edit("noise", steps=(1,), amount=1e200), {}, "NaN.*step 1, layer -1.*amount=1e.200"),
        (Edit("noise", "damage", steps=(1,), amount=1e200), {}, "NaN.*step 1, layer -1.*amount=1e.200"),
        (STEER, {"sources": {"a": {}}}, "'a': dict, expected a tensor"),
        *((STEER, {"sources": {"a": torch.zeros(shape)}}, r"directions of shape .*expected \[2, region, 24\]")
          for shape in ((24,), (2, 24), (1, 1, 24), (2, 1, 23), (2, 1, 1, 24))),
        (STEER, {"sources": {"a": torch.zeros(2, 3, 24)}, "boxes": QUARTERS}, "directions of 3 regions, expected 2"),
        (STEER, {"sources": {"a": torch.zeros(2, 2, 24)}}, "boxes: regions of 0 samples"),
        (STEER, {"sources": {"a": torch.zeros(2, 2, 24)}, "boxes": [QUARTERS[0], QUARTERS[1][:1]]}, "expected 1, 2"),
        (STEER, {"sources": {"a": torch.zeros(2, 0, 24)}, "boxes": [[], []]}, "directions of 0 regions"),
        (replace(STEER, amount=1e300), {"sources": {"a": torch.ones(2, 1, 24)}}, "NaN.*lower amount=1e.300"),
        (ERASE, {"sources": {"a": {(0, 1): torch.abs}}}, "no eraser for step 1, layer 1"),
        (ERASE, {"sources": {"a": {(1, 1): lambda x: x[:, :3]}}}, r"eraser of step 1, layer 1 gave \[64, 3\]"),
    ],
)  # fmt: skip
def test_what_the_run_has_not_is_refused_in_one_line_and_leaves_nothing(edit, given, message):
    pipeline = toy()
    with pytest.raises(InputError, match=message) as raised, patch(pipeline, [edit], **given):
        draw(pipeline)
    assert len(str(raised.value).splitlines()) == 1
    assert not traces(pipeline)


def test_a_context_without_a_run_is_refused():
    for edit in (Edit("noise"), Edit("ablate", layers=(0,))):
        with pytest.raises(InputError, match="was not carried out at any step"), patch(toy(), [edit]):
            pass


def test_a_step_cache_that_could_skip_an_edited_block_is_refused():
    from diffusers import FirstBlockCacheConfig

    pipeline = wan()
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(InputError, match="step cache"), patch(pipeline, [Edit("ablate", layers=(0,))]):
        pass
    assert not traces(pipeline)


def test_one_sample_has_no_next_one_to_resample_from():
    with pytest.raises(InputError, match="1 sample, expected at least 2"):
        edited(toy(), Edit("ablate", "resample", layers=(0,)), seeds=(1,))


def test_an_expert_that_does_not_run_in_a_step_is_refused():
    pipeline = toy("experts")
    assert not torch.equal(edited(pipeline, Edit("ablate", layers=(0,), expert="high")), clean("experts"))
    with pytest.raises(InputError, match="step 2, layer 0.*expert"):
        edited(pipeline, Edit("ablate", layers=(0,), steps=(2,), expert="high"))


def test_a_given_first_frame_alone_cannot_be_edited():
    case, _, _ = known("ltx_i2v", True)
    with pytest.raises(InputError, match="frame 0 is the given image"):
        run(case, Edit("noise", frames=(0, 0)))


# together with capture


@pytest.mark.parametrize("kind", ["steer", "swap"])
def test_capture_reads_edited_states_inside_and_the_others_outside(kind):
    pipeline = toy()
    source = torch.randn(2, 1, 24) if kind == "steer" else {At(1, 1, "cond"): torch.randn(2, 32, 24)}
    edit = Edit(kind, steps=(1,), layers=(1,), source="a")
    ends, features = [], []
    for patched_first in (True, False):
        contexts = [lambda: patch(pipeline, [edit], {"a": source}), lambda: capture(pipeline, "all", Pooling("clip"))]
        with ExitStack() as undo:
            entered = [undo.enter_context(make()) for make in (contexts if patched_first else contexts[::-1])]
            ends.append(draw(pipeline))
        features.append(next(cache for cache in entered if cache is not None).features()[:, :, :, 0, 0, 0])
    with capture(pipeline, "all", Pooling("clip")) as cache:
        draw(pipeline)
    plain, (inside, outside) = cache.features()[:, :, :, 0, 0, 0], features
    assert torch.equal(*ends)
    change = inside[:, 1, 1] - plain[:, 1, 1] if kind == "steer" else inside[:, 1, 1]
    torch.testing.assert_close(
        change, source[:, 0] if kind == "steer" else source[1, 1, "cond"].mean(1), atol=1e-5, rtol=1e-4
    )
    assert torch.equal(outside[:, 1, 1], plain[:, 1, 1])
    for found in (inside, outside):  # before the edit nothing differs, after it everything
        assert torch.equal(found[:, 0], plain[:, 0]) and torch.equal(found[:, 1, 0], plain[:, 1, 0])
        assert not torch.equal(found[:, 1, 2], plain[:, 1, 2]) and not torch.equal(found[:, 2, 0], plain[:, 2, 0])


def test_capture_sees_a_removed_update_from_outside_or_with_other_layers_only():
    pipeline, edit = toy(), Edit("ablate", steps=(1,), layers=(1,))
    with capture(pipeline, "all"), patch(pipeline, [edit]):
        draw(pipeline)
    with patch(pipeline, [edit]), capture(pipeline, "1:3"):
        draw(pipeline)
    refused = pytest.raises(RuntimeError, match="layer 1 returned its input at step 1")
    with refused, patch(pipeline, [edit]), capture(pipeline, "all"):
        draw(pipeline)
