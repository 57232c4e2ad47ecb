"""Carries out edits while a pipeline samples.

    with patch(pipeline, [Edit("swap", steps=(0,), layers=(20,), source="donor")], {"donor": states}):
        video = pipeline(...)

Edits of blocks are forward hooks on the blocks, where `capture` reads them. Edits of the latent change what the
scheduler returns, and before the first step what `prepare_latents` returns, so that the model and the scheduler get the
same latent. Everything is undone on exit, also after errors. Without edits, nothing is put on the pipeline.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cosprobe.activations import RunningCall, box_masks, check_layers, watched_calls
from cosprobe.causal.edits import Edit
from cosprobe.errors import InputError
from cosprobe.models import (
    TokenGrid,
    architecture,
    block_list,
    clean_estimate,
    experts,
    first_transformer,
    hidden_states,
    noise_level,
    step_call,
)
from cosprobe.tasks import Box
from cosprobe.wrapping import wrapped


class At(NamedTuple):
    """Where a state is from: step index, block index (-1: the latent) and guidance branch (empty: the latent)."""

    step: int
    layer: int
    branch: str


LATENT = -1  # in place of a layer
States = Mapping[
    At, Float[Tensor, "batch ..."]
]  # of blocks [batch, token, channel]; of the latent, as schedulers have it
Directions = Float[Tensor, "batch region channel"]  # added to every token of a region; one region: of the whole frame


class Eraser(Protocol):
    """Removes a concept from vectors, such as `concept_erasure.LeaceEraser`."""

    def __call__(self, x: Tensor) -> Tensor: ...


Source = States | Directions | Mapping[tuple[int, int], Eraser]  # erasers by (step, layer)


@contextmanager
def patch(
    pipeline: Any,
    edits: Sequence[Edit],
    sources: Mapping[str, Any] | None = None,
    boxes: Sequence[Sequence[Box]] = (),
    seeds: Sequence[int] = (),
) -> Iterator[None]:
    """Carries out `edits`, in order, in the pipeline call that is made inside the context.

    sources: by name, what edits use. `swap`: `States`. `steer`: `Directions`; a token that lies in several regions gets
    the sum. `erase`: an eraser for every step and layer of the edit.
    boxes: regions of every sample, as fractions of the image; needed for edits of regions and for directions by region.
    seeds: a seed for every sample of the batch, for noise; by default the index in the batch. Noise depends on the seed
    of the sample, the seed of the edit and the step, and on nothing else.

    Raises InputError for a layer, expert, frame, region or step that the run does not have, for sources that are
    missing or have another shape, for a result that is not finite, and, at the end, for an edit that was not carried
    out at one of its steps and layers.
    """
    if not edits:
        yield
        return
    edits, sources = tuple(edits), sources or {}
    with ExitStack() as undo:
        call = undo.enter_context(watched_calls(pipeline))
        patcher = _Patcher(pipeline, edits, sources, boxes, seeds, call)
        for expert, model in experts(pipeline).items():
            blocks = block_list(pipeline, model)
            for edit in edits:
                check_layers(edit.layers, len(blocks))
            for layer, block in enumerate(blocks):
                here = [edit for edit in edits if layer in edit.layers and edit.expert in ("", expert)]
                if here:
                    undo.callback(block.register_forward_hook(patcher.on_block(layer, here), with_kwargs=True).remove)
        if any(not edit.layers for edit in edits):
            undo.enter_context(wrapped(pipeline, "prepare_latents", patcher.around_prepare))
            undo.enter_context(wrapped(pipeline.scheduler, "step", patcher.around_step))
        yield
        patcher.check_fired()


class _Patcher:
    """The hooks of one `patch` and the state they share."""

    def __init__(
        self,
        pipeline: Any,
        edits: Sequence[Edit],
        sources: Mapping[str, Any],
        boxes: Sequence[Sequence[Box]],
        seeds: Sequence[int],
        call: RunningCall,
    ):
        self.pipeline, self.edits, self.sources, self.boxes = pipeline, edits, sources, boxes
        self.seeds, self.call, self.family = seeds, call, architecture(pipeline)
        self.fired: set[tuple[int, int, int]] = set()  # number of the edit, step, layer
        known = experts(pipeline)
        for edit in edits:
            if edit.source and edit.source not in sources:
                raise InputError(
                    f"edit {edit}: no source {edit.source!r}; expected one of {', '.join(sources) or 'none'}"
                )
            if edit.expert and edit.expert not in known:
                raise InputError(f"edit {edit}: expert={edit.expert!r}; expected one of {', '.join(known)}")
            if edit.regions and max(edit.regions) >= min(map(len, boxes), default=0):
                least = min(map(len, boxes), default=0)
                raise InputError(f"edit {edit}: this run has {least} regions; pass boxes, or other regions")

    # blocks

    def on_block(self, layer: int, edits: Sequence[Edit]) -> Callable[..., Any]:
        """A forward hook for a block."""

        def hook(block: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            tokens = self.family.video_tokens(output)
            changed = tokens
            for edit in edits:
                if edit.steps and self.call.step not in edit.steps:
                    continue
                halves = list(changed.chunk(len(self.call.branches)))
                before = hidden_states(args, kwargs).chunk(len(self.call.branches))
                for i, branch in enumerate(self.call.branches):
                    if edit.branch in ("", branch):
                        halves[i] = self._edited(edit, At(self.call.step, layer, branch), halves[i], before[i])
                changed = torch.cat(halves) if len(halves) > 1 else halves[0]
            return None if changed is tokens else self.family.with_video_tokens(output, changed)

        return hook

    def _edited(self, edit: Edit, at: At, tokens: Tensor, before: Tensor) -> Tensor:
        """The output of a block for one branch after an edit. before: the input of the block."""
        self.fired.add((self.edits.index(edit), at.step, at.layer))
        if edit.amount == 0:
            return tokens
        mask = self._token_mask(edit, len(tokens))
        if edit.kind == "steer":
            wanted = tokens + edit.amount * self._steering(edit, tokens)
        elif edit.kind == "erase":
            wanted = _toward(tokens, self._erased(edit, at, tokens), edit.amount)
        elif edit.kind == "swap":
            wanted = _toward(tokens, self._state(edit, at, tokens), edit.amount)
        else:
            wanted = _toward(tokens, _ablated(edit.how, tokens, before), edit.amount)
        result = wanted.to(tokens.dtype) if mask is None else torch.where(mask, wanted.to(tokens.dtype), tokens)
        self._check_finite(edit, at, result)
        return result

    def _token_mask(self, edit: Edit, batch: int) -> Bool[Tensor, "batch token 1"] | None:
        """Which tokens an edit changes; None for all."""
        if not edit.frames and not edit.regions:
            return None
        return self._mask(edit, batch, self.call.grid).flatten(1).unsqueeze(-1)

    def _mask(self, edit: Edit, batch: int, grid: TokenGrid) -> Bool[Tensor, "batch frame token"]:
        where = self.pipeline._execution_device
        chosen = torch.ones(batch, grid.frames, grid.rows * grid.columns, dtype=torch.bool)
        if edit.frames:
            if max(edit.frames) >= grid.frames:
                raise InputError(
                    f"edit {edit}: this run has {grid.frames} frames of tokens; expected frames from 0 to "
                    f"{grid.frames - 1}"
                )
            chosen &= torch.isin(torch.arange(grid.frames), torch.tensor(edit.frames))[None, :, None]
        if edit.regions:
            chosen &= (self._regions(batch, grid)[:, list(edit.regions)].amax(dim=1) > 0)[:, None]
        return chosen.to(where)

    def _regions(self, batch: int, grid: TokenGrid) -> Float[Tensor, "batch region token"]:
        if len(self.boxes) != batch:
            raise InputError(f"boxes: regions of {len(self.boxes)} samples, expected {batch}, one entry per sample")
        return torch.stack([box_masks(boxes, grid.rows, grid.columns) for boxes in self.boxes])

    def _steering(self, edit: Edit, tokens: Tensor) -> Float[Tensor, "batch token channel"]:
        directions: Tensor = self.sources[edit.source].to(tokens)
        regions = directions.shape[1] if directions.ndim == 3 else 0
        if directions.ndim != 3 or (len(directions), directions.shape[2]) != (len(tokens), tokens.shape[2]):
            raise InputError(
                f"source {edit.source!r}: directions of shape {list(directions.shape)}, expected [{len(tokens)}, "
                f"region, {tokens.shape[2]}]"
            )
        grid = self.call.grid
        if regions == 1:
            return directions.expand(-1, tokens.shape[1], -1)
        masks = self._regions(len(tokens), grid).to(tokens)
        if masks.shape[1] != regions:
            raise InputError(f"source {edit.source!r}: directions of {regions} regions, expected {masks.shape[1]}")
        return torch.einsum("brs,brc->bsc", masks, directions).repeat(1, grid.frames, 1)

    def _erased(self, edit: Edit, at: At, tokens: Tensor) -> Tensor:
        erasers: Mapping[tuple[int, int], Eraser] = self.sources[edit.source]
        if (at.step, at.layer) not in erasers:
            raise InputError(f"source {edit.source!r}: no eraser for step {at.step}, layer {at.layer}")
        return erasers[at.step, at.layer](tokens.float().flatten(0, 1)).reshape(tokens.shape)

    def _state(self, edit: Edit, at: At, host: Tensor) -> Tensor:
        states: States = self.sources[edit.source]
        if at not in states:
            raise InputError(
                f"source {edit.source!r}: no state of step {at.step}, layer {at.layer}, {at.branch or 'latent'}"
            )
        state = states[at]
        if state.shape != host.shape:
            raise InputError(
                f"source {edit.source!r}: a donor state of shape {list(state.shape)}, expected {list(host.shape)}; "
                "use a donor of the same size and number of frames"
            )
        return state.to(host)

    def _check_finite(self, edit: Edit, at: At, values: Tensor) -> None:
        if not values.isfinite().all():
            raise InputError(
                f"edit {edit}: NaN or infinite values at step {at.step}, layer {at.layer}; lower amount={edit.amount:g}"
            )

    # the latent

    def around_prepare(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """Wraps `prepare_latents` of a pipeline: edits the latent of step 0."""
        given = signature(type(self.pipeline).prepare_latents).bind(self.pipeline, *args, **kwargs).arguments
        result = original(*args, **kwargs)
        latent, *rest = result if isinstance(result, tuple) else (result,)
        changed = self._edited_latent(latent, 0, None, self._grid_of(given))
        return (changed, *rest) if isinstance(result, tuple) else changed

    def around_step(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """Wraps `step` of the scheduler: edits the latent of the next step."""
        following = self.call.count.now + 1
        scheduler = self.pipeline.scheduler
        clean = clean_estimate(scheduler, step_call(scheduler, args, kwargs)) if self._needs_clean(following) else None
        result = original(*args, **kwargs)
        if following == len(scheduler.timesteps):
            return result
        if isinstance(result, tuple):
            return (self._edited_latent(result[0], following, clean, self.call.grid), *result[1:])
        result.prev_sample = self._edited_latent(result.prev_sample, following, clean, self.call.grid)
        return result

    def _needs_clean(self, step: int) -> bool:
        return any(e.how == "renoised" and (not e.steps or step in e.steps) for e in self.edits)

    def _grid_of(self, given: Mapping[str, Any]) -> TokenGrid:
        """The token grid of a call of `prepare_latents` with these arguments."""
        model = first_transformer(self.pipeline)
        side = self.family.scale(self.pipeline).side * self.family.patch(model)[-1]
        frames = self.family.token_frames(self.pipeline, model, given["num_frames"])
        return TokenGrid(frames, given["height"] // side, given["width"] // side)

    def _edited_latent(self, latent: Tensor, step: int, clean: Tensor | None, grid: TokenGrid) -> Tensor:
        for number, edit in enumerate(self.edits):
            if edit.layers or (edit.steps and step not in edit.steps):
                continue
            self.fired.add((number, step, LATENT))
            if edit.amount != 0:
                new = self._new_latent(edit, latent, step, clean)
                mask = self._latent_mask(edit, latent, grid)
                if edit.how == "damage":
                    change = torch.where(mask, new - latent, 0).float()
                    size = change.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
                    share = (math.sqrt(max(edit.amount, 0.0)) / size).reshape(-1, *[1] * (latent.ndim - 1))
                    latent = latent + (share * change).to(latent.dtype)
                else:
                    latent = torch.where(mask, _toward(latent, new, edit.amount), latent)
                self._check_finite(edit, At(step, LATENT, ""), latent)
        return latent

    def _new_latent(self, edit: Edit, latent: Tensor, step: int, clean: Tensor | None) -> Tensor:
        """What an edit replaces the whole latent by."""
        if edit.kind == "swap":
            return self._state(edit, At(step, LATENT, ""), latent)
        seeds = self.seeds or range(len(latent))
        if len(seeds) != len(latent):
            raise InputError(f"seeds: {len(seeds)} for a batch of {len(latent)}, expected one per sample")
        level = noise_level(self.pipeline.scheduler, step)
        noise = torch.stack([_noise(latent.shape[1:], (seed, edit.seed, step)) for seed in seeds]).to(latent)
        if edit.how != "renoised":
            return level.unit * noise
        if clean is None:
            raise InputError(f"edit {edit}: before step 0 there is no x0-hat; expected steps from 1")
        return (level.signal * clean + level.noise * noise.float()).to(latent.dtype)

    def _latent_mask(self, edit: Edit, latent: Tensor, grid: TokenGrid) -> Bool[Tensor, "batch ..."]:
        """Which values of the latent of a scheduler an edit changes. A given first frame is never changed."""
        if edit.frames == (0,) and self.family.keeps_first_frame(self.pipeline):
            raise InputError(f"edit {edit}: frame 0 is the given image; expected frames from 1")
        chosen = self._mask(edit, len(latent), grid)
        if self.family.keeps_first_frame(self.pipeline):
            chosen[:, 0] = False
        if latent.ndim == 3:  # packed: one token per row
            return chosen.flatten(1)[:, -latent.shape[1] :, None]
        patch, axis = self.family.patch(first_transformer(self.pipeline)), self.family.axis
        each = chosen.unflatten(2, (grid.rows, grid.columns))
        for dim, times in enumerate(patch):
            each = each.repeat_interleave(times, dim=dim + 1)
        each = each[:, -latent.shape[axis("f")] :, : latent.shape[axis("h")], : latent.shape[axis("w")]]
        return each.unsqueeze(axis("c"))

    # the end

    def check_fired(self) -> None:
        """Raises InputError for an edit that was not carried out at all of its steps and layers."""
        for number, edit in enumerate(self.edits):
            for step in edit.steps or (None,):
                for layer in edit.layers or (LATENT,):
                    if not any(n == number and step in (None, s) and one == layer for n, s, one in self.fired):
                        where = f"{'any step' if step is None else f'step {step}'}, "
                        where += "latent" if layer == LATENT else f"layer {layer}"
                        steps = len(self.pipeline.scheduler.timesteps)
                        raise InputError(
                            f"edit {edit}: was not carried out at {where}; expected one whole pipeline call inside the "
                            f"context, with such a step; the last one had {steps} steps"
                        )


def _toward(old: Tensor, new: Tensor, amount: float) -> Tensor:
    """`new` for an amount of 1, bit for bit; otherwise that share of the way from `old` to `new`."""
    return new if amount == 1 else old + amount * (new - old)


def _ablated(how: str, tokens: Tensor, before: Tensor) -> Tensor:
    """The output of a block with its update replaced. before: the input of the block."""
    if how == "zero":
        return before
    update = tokens - before
    if how == "mean":
        return before + update.float().mean(dim=0, keepdim=True).to(update.dtype)
    if len(tokens) < 2:
        raise InputError("edit ablate, how=resample: a batch of 1 sample, expected at least 2")
    return before + update.roll(-1, dims=0)


def _noise(shape: Sequence[int], seeds: tuple[int, ...]) -> Tensor:
    """Standard Gaussian noise that depends on its seeds alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(_seed_of(seeds)))


def _seed_of(numbers: Sequence[int]) -> int:
    """A seed from several numbers, the same in every process."""
    return int(hashlib.sha256("/".join(map(str, numbers)).encode()).hexdigest()[:12], 16)
