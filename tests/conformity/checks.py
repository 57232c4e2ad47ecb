"""What has to hold for every family of video pipelines, checked without what `capture` says about itself.

Every check is a function of a `Case`; it returns nothing, or a number that the table of `make support` shows, and
raises AssertionError. The step comes from the callback of the pipeline, the branch from the prompt that a call gets,
and the expert from the module that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cosprobe.activations import Pooling, average_blocks, capture, halting
from cosprobe.cells import Cell
from cosprobe.config import PipelineConfig
from cosprobe.models import architecture, block_list, decode, experts, sample
from cosprobe.models.pipelines import hidden_states
from tests.examples.families import FAMILIES, NEGATIVE, PROMPTS, Example

STEPS = 4
GUIDANCE = 3.0
TOLERANCE = 1e-4  # of values that are computed in another order


@dataclass
class Case:
    """One family, with guidance or without."""

    name: str
    guided: bool

    @cached_property
    def example(self) -> Example:
        return FAMILIES[self.name]

    @cached_property
    def pipeline(self) -> Any:
        return self.example.build()

    @cached_property
    def config(self) -> PipelineConfig:
        named = {"guidance": GUIDANCE if self.guided else 1.0}
        if "true_cfg_scale" in self.example.guided:  # guidance is an input of the model, with a default of its own
            own = signature(type(self.pipeline).__call__).parameters["guidance_scale"].default
            named = {"guidance": own, "true_cfg": GUIDANCE if self.guided else 1.0}
        return PipelineConfig(
            steps=STEPS, frames=self.example.frames, prompt_tokens=self.example.call["max_sequence_length"],
            negative_prompt=NEGATIVE, **named,
        )  # fmt: skip

    @cached_property
    def images(self) -> Tensor:
        """Different pictures of 8 bits."""
        size = (4, 3, self.example.height, self.example.width)
        return torch.randint(0, 256, size, generator=torch.Generator().manual_seed(3)).float() / 255

    @property
    def depth(self) -> int:
        return min(len(block_list(self.pipeline, model)) for model in experts(self.pipeline).values())

    @property
    def branches(self) -> tuple[str, ...]:
        return ("cond", "uncond") if self.guided else ("cond",)

    def run(self, rows: tuple[int, ...] = (0, 1), **more: Any) -> np.ndarray:
        prompts = [PROMPTS[row % len(PROMPTS)] for row in rows]
        video = sample(
            self.pipeline, self.config, self.images[list(rows)], prompts, [10 + row for row in rows], **more
        )  # fmt: skip
        return np.asarray(video)

    def direct(self, row: int = 0) -> np.ndarray:
        """One sample from a call of the pipeline as its documentation shows it."""
        given = {"negative_prompt": NEGATIVE} | self.example.arguments([PROMPTS[row]], self.guided)
        given |= {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(10 + row)}
        for name in ("decode_timestep", "decode_noise_scale"):
            given.pop(name, None)
        if self.example.takes_image:
            pixels = (self.images[row] * 255).round().to(torch.uint8).permute(1, 2, 0)
            given["image"] = Image.fromarray(pixels.numpy())
        return self.pipeline(**given, output_type="np").frames


def parts_of(pipeline: Any) -> dict[str, Any]:
    """The transformers of a pipeline: of two, the first works at high noise, the second at low noise."""
    both = {"high": pipeline.transformer, "low": getattr(pipeline, "transformer_2", None)}
    there = {name: part for name, part in both.items() if part is not None}
    return there if len(there) == 2 else dict.fromkeys(("only",), *there.values())


@contextmanager
def followed(case: Case) -> Iterator[_Followed]:
    """Follows a run with hooks of its own: which step, branch and expert every transformer call belongs to."""
    found = _Followed()

    def on_call(expert: str) -> Any:
        def hook(model: Any, args: tuple, kwargs: dict) -> None:
            rows = kwargs["encoder_hidden_states"]
            halves = rows.split(2)  # two samples with different prompts, and the same negative prompt
            found.branches = tuple("uncond" if torch.equal(*half) else "cond" for half in halves)
            found.expert = expert

        return hook

    with ExitStack() as undo:
        for name, part in parts_of(case.pipeline).items():
            undo.callback(part.register_forward_pre_hook(on_call(name), with_kwargs=True).remove)
        yield found


@dataclass
class _Followed:
    """Step, branches and expert of the transformer call that runs. `callback` counts the steps."""

    step: int = 0
    branches: tuple[str, ...] = ()
    expert: str = ""

    def callback(self, pipeline: Any, step: int, timestep: Any, tensors: dict) -> dict:
        assert step == self.step
        self.step += 1
        return {}


@contextmanager
def on_blocks(case: Case, hook: Callable[[int], Any]) -> Iterator[None]:
    """Puts `hook(layer)` on every block of every transformer."""
    with ExitStack() as undo:
        for model in experts(case.pipeline).values():
            for layer, block in enumerate(block_list(case.pipeline, model)):
                undo.callback(block.register_forward_hook(hook(layer)).remove)
        yield


def tokens_of(output: Any) -> Tensor:
    """The video tokens in the output of a block: the first of several tensors, or the only one."""
    return output[0] if isinstance(output, tuple) else output


def changed(output: Any, tokens: Tensor) -> Any:
    return (tokens, *output[1:]) if isinstance(output, tuple) else tokens


def labels(case: Case) -> None:
    """Blocks write step, layer, branch, expert, sample, frame, row and column into their own output: every stored
    feature has its own address."""
    frames, rows, columns = grid_of(case)
    boxes = [(x / columns, y / rows, (x + 1) / columns, (y + 1) / rows) for y in range(rows) for x in range(columns)]
    places = torch.cartesian_prod(*(torch.arange(float(n)) for n in (frames, rows, columns)))

    def spelled(layer: int) -> Any:
        def hook(block: Any, args: tuple, output: Any) -> Any:
            tokens = tokens_of(output).clone()
            for half, branch in zip(tokens.split(2), now.branches, strict=True):
                head = torch.tensor([now.step, layer, branch == "uncond", now.expert == "low"])
                half[:, :, :4], half[:, :, 5:8] = head.float(), places
                half[:, :, 4] = torch.arange(2.0)[:, None]
            return changed(output, tokens)

        return hook

    with ExitStack() as undo:
        now = undo.enter_context(followed(case))
        for model in experts(case.pipeline).values():
            for number, block in enumerate(block_list(case.pipeline, model)):
                undo.callback(block.register_forward_hook(spelled(number)).remove)
        pooling = Pooling("region", frames=True, boxes=[boxes] * 2)
        cache = undo.enter_context(capture(case.pipeline, "all", pooling))
        case.run(callback_on_step_end=now.callback)
    found = cache.features()  # sample step layer branch position region channel
    assert cache.branches == case.branches and cache.steps == tuple(range(STEPS))
    assert now.step == STEPS
    sample_, step, layer, branch, frame, region = torch.meshgrid(
        *(torch.arange(float(n)) for n in (2, STEPS, case.depth, len(case.branches), frames, rows * columns)),
        indexing="ij",
    )
    expert = torch.tensor([cache.experts[at] == "low" for at in range(STEPS)]).float()[step.long()]
    spelt = torch.stack([step, layer, branch, expert, sample_, frame, region // columns, region % columns], dim=-1)
    assert torch.equal(found[:, :, :, :, 1:, :, :8], spelt)
    assert set(cache.experts.values()) == set(parts_of(case.pipeline))


def order_of_tokens(case: Case) -> None:
    """Changing one patch of the latent changes exactly one token at the input of the first block: that of its place."""
    frames, rows, columns = grid_of(case)
    family, pipeline = architecture(case.pipeline), case.pipeline
    model = next(iter(experts(pipeline).values()))
    with capture(pipeline, "0", Pooling("clip"), record=[0]) as cache:
        case.run()
    _, args, kwargs = cache.recorded[0]
    seen: list[Tensor] = []
    hook = block_list(pipeline, model)[0].register_forward_pre_hook(
        lambda block, args, kwargs: seen.append(hidden_states(args, kwargs)), with_kwargs=True
    )
    latent = hidden_states(args, kwargs)
    for frame, row, column in {(0, 0, 1), (frames - 1, rows - 1, 0), (1, 0, columns - 1)}:
        other, (time, height, width) = latent.clone(), family.patch(model)
        if latent.ndim == 3:
            other[:, (frame * rows + row) * columns + column] += 1
        else:
            part = other.movedim(1, 2) if case.name.startswith("cogvideox") else other  # b c f h w
            part[:, :, frame * time, row * height, column * width] += 1
        seen.clear()
        for value in (latent, other):
            model(*args, **{**kwargs, "hidden_states": value})
        (where,) = (seen[0] != seen[1]).any(dim=2)[0].nonzero(as_tuple=True)
        assert where.tolist() == [(frame * rows + row) * columns + column]
    hook.remove()


def same_video(case: Case) -> None:
    """The video is the same, bit for bit, with and without capture; that of one sample is that of a plain call of
    diffusers."""
    bare = case.run()
    with capture(case.pipeline, "all", Pooling("frame"), clean=[0], inputs=True):
        watched = case.run()
    assert np.array_equal(bare, watched)
    assert np.array_equal(case.run((0,)), case.direct())


def same_as_hooks(case: Case) -> None:
    """Features equal those of plain forward hooks that were written for this check."""
    seen: dict[tuple[int, int, str], Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(block: Any, args: tuple, output: Any) -> None:
            for half, branch in zip(tokens_of(output).split(2), now.branches, strict=True):
                seen[now.step, layer, branch] = half.float().mean(dim=1).cpu()

        return hook

    with ExitStack() as undo:
        now = undo.enter_context(followed(case))
        undo.enter_context(on_blocks(case, keep))
        cache = undo.enter_context(capture(case.pipeline, "all", Pooling("clip")))
        case.run(callback_on_step_end=now.callback)
    for (step, layer, branch), mean in seen.items():
        cell = Cell(step, layer, branch, "all")
        torch.testing.assert_close(cache.at(cell)[:, 0], mean, atol=1e-5, rtol=1e-5)
    assert len(seen) == STEPS * case.depth * len(case.branches)


def batch_as_single(case: Case) -> float:
    """Problems in one batch give the features that each gives alone. The number is the largest difference, relative to
    the largest feature."""

    def captured(rows: tuple[int, ...]) -> tuple[Tensor, np.ndarray]:
        with capture(case.pipeline, "all", Pooling("frame")) as cache:
            video = case.run(rows)
        return cache.features(), video

    (together, video), singles = captured((0, 1)), [captured((row,)) for row in (0, 1)]
    alone = torch.cat([features for features, _ in singles])
    apart = float((together - alone).abs().max() / alone.abs().max())
    assert apart <= TOLERANCE
    np.testing.assert_allclose(video, np.concatenate([one for _, one in singles]), atol=10 * TOLERANCE)
    return apart


def halted_prefix(case: Case) -> None:
    """A run that is stopped early is, up to there, the same as a full one, bit for bit. It computes nothing afterwards,
    and leaves the next run unchanged."""
    cell, ran = Cell(1, 1, "cond", "all"), []
    with capture(case.pipeline, "all", Pooling("clip")) as whole:
        video = case.run()
    last = block_list(case.pipeline)[2]
    hook = last.register_forward_hook(lambda *_: ran.append(1))
    with halting(case.pipeline, [cell], Pooling("clip"), lambda *_: True) as cache:
        case.run()
    hook.remove()
    assert torch.equal(cache.at(cell) if cache.positions else cache.parts[1, "1", "cond"][:, 0], whole.at(cell))
    assert len(ran) <= STEPS // 2 * len(case.branches)
    assert np.array_equal(case.run(), video)


def edit_lands(case: Case) -> None:
    """Replacing the output of layer 1 at step 1 by the mean of two samples takes effect there, and changes nothing
    before."""

    def captured(*edits: Any) -> Tensor:
        with ExitStack() as stack:
            for edit in edits:
                stack.enter_context(edit)
            cache = stack.enter_context(capture(case.pipeline, "0:3", Pooling("frame")))
            case.run()
        return cache.features()  # sample step layer branch ...

    plain, edited = captured(), captured(average_blocks(case.pipeline, 2, [1], [1], back="all"))
    assert torch.equal(edited[:, 0], plain[:, 0]) and torch.equal(edited[:, 1, 0], plain[:, 1, 0])
    torch.testing.assert_close(edited[:, 1, 1], plain[:, 1, 1].mean(0, keepdim=True).expand_as(plain[:, 1, 1]))
    assert not torch.equal(edited[:, 1, 2], plain[:, 1, 2])


def last_estimate_is_video(case: Case) -> float:
    """At the last step, the decoded x0-hat is the finished video."""
    with capture(case.pipeline, ["x0_latent"], Pooling("clip"), clean=[STEPS - 1]) as cache:
        video = case.run()
    apart = float(np.abs(decode(case.pipeline, cache.clean[STEPS - 1], case.example.frames) - video).max())
    assert apart <= TOLERANCE
    return apart


def samples_leave(case: Case) -> None:
    """When some samples leave a batch, the others end as if alone, and no transformer computes anything for those that
    left."""
    sizes: list[int] = []
    with ExitStack() as undo:
        for model in experts(case.pipeline).values():
            hook = block_list(case.pipeline, model)[0].register_forward_hook(
                lambda block, args, output: sizes.append(len(tokens_of(output)))
            )
            undo.callback(hook.remove)
        video = case.run((0, 1, 2), filter_batch={0: [0, 2], 1: [1]}.get)
    np.testing.assert_allclose(video, case.run((2,)), atol=10 * TOLERANCE)
    assert sum(sizes) == (3 + 2 + (STEPS - 2)) * len(case.branches)


def sources(case: Case) -> None:
    """The noise depends on the seed only, and the first frame on the image only."""

    def started(images: Tensor, seed: int) -> dict[str, Tensor]:
        with capture(case.pipeline, "0", Pooling("frame"), "0", inputs=True) as cache:
            sample(case.pipeline, case.config, images, [PROMPTS[0]], [seed])
        return cache.input_features()

    one, other_image, other_seed = (
        started(self_images, seed)
        for self_images, seed in ((case.images[:1], 1), (case.images[1:2], 1), (case.images[:1], 2))
    )
    assert ("first_frame.whole" in one) == case.example.takes_image
    # HunyuanVideo mixes a thousandth of the image into the noise
    torch.testing.assert_close(one["noise.whole"], other_image["noise.whole"], atol=0.01, rtol=0)
    assert not torch.allclose(one["noise.whole"], other_seed["noise.whole"], atol=0.1)
    if case.example.takes_image:
        difference = (one["first_frame.whole"] - other_image["first_frame.whole"]).abs()
        assert difference[:, :, 0].max() > 0.01
        again = (one["first_frame.whole"] - other_seed["first_frame.whole"]).abs()
        # CogVideoX and LTX draw the latent of the image, with the seed of the sample
        assert again.max() == 0 or case.name.startswith(("cogvideox", "ltx"))
    assert one["x_t.whole"].shape[2] == one["noise.whole"].shape[2] == grid_of(case)[0]


CHECKS = {
    "labels": labels,
    "token order": order_of_tokens,
    "video unchanged": same_video,
    "equal to hooks": same_as_hooks,
    "batch as single": batch_as_single,
    "halting": halted_prefix,
    "edits": edit_lands,
    "x0-hat": last_estimate_is_video,
    "samples leave": samples_leave,
    "inputs": sources,
}


def grid_of(case: Case) -> tuple[int, int, int]:
    """Frames, rows and columns of the tokens, worked out by hand: sizes over the scale of the autoencoder and the
    patch. CogVideoX 1.5 pads three latent frames to four, two in a patch."""
    if case.name == "allegro":
        return 6, 8, 11
    if case.name.startswith("cogvideox_i2v"):
        return 3, 4, 6
    return (2 if case.name.startswith("cogvideox15") else 3), 2, 3
