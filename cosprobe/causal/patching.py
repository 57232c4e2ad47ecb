"""Carries out edits while a pipeline samples.

    with patch(pipeline, [Edit("swap", steps=(0,), layers=(20,), source="donor")], {"donor": states}):
        video = pipeline(...)

Edits of blocks are forward hooks on the blocks, where `capture` reads them. Edits of the latent change what the
scheduler returns, and before the first step what `prepare_latents` returns, so that the model and the scheduler get the
same latent. Everything is undone on exit, also after errors. Without edits, nothing is put on the pipeline.

Multistep schedulers (UniPC, DPM-Solver++, that of CogVideoX) remember x0-hat of earlier steps. In a step whose latent
was changed, they go on from the new latent alone, as in the first step of a run. This is done value by value: where an
edit changed nothing, they compute as always.
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

from cosprobe.activations import RunningCall, box_masks, check_layers, refuse_step_caches, watched_calls
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
from cosprobe.tasks import Mask, Region
from cosprobe.wrapping import wrapped


class At(NamedTuple):
    """Where a state is from: step index, block index (-1: the latent) and guidance branch (empty: the latent)."""

    step: int
    layer: int
    branch: str


LATENT = -1  # in place of a layer
# of blocks [batch, token, channel]; of the latent, as schedulers have it
States = Mapping[At, Float[Tensor, "batch ..."]]
Directions = Float[Tensor, "batch region channel"]  # added to every token of a region; one region: of the whole frame


class Eraser(Protocol):
    """Removes a concept from vectors, such as `concept_erasure.LeaceEraser`."""

    def __call__(self, x: Tensor) -> Tensor: ...


PREVIOUS = "old_pred_original_sample"  # where the scheduler of CogVideoX is given what it remembers


@contextmanager
def patch(
    pipeline: Any,
    edits: Sequence[Edit],
    sources: Mapping[str, Any] | None = None,
    boxes: Sequence[Sequence[Region]] = (),
    seeds: Sequence[int] = (),
) -> Iterator[None]:
    """Carries out `edits`, in order, in the pipeline call that is made inside the context.

    sources: by name, what edits use. `swap`: `States`. `steer`: `Directions`; a token that lies in several regions gets
    the sum. `erase`: an eraser for every step and layer of the edit.
    boxes: regions of every sample (boxes as fractions of the image, or masks); needed for edits of regions and for
    directions by region. Edits change all of a token that a mask touches; steering adds the share that is inside.
    seeds: a seed for every sample of the batch, for noise; by default the index in the batch. Noise depends on the seed
    of the sample, the seed of the edit and the step, and on nothing else.

    Together with `capture`: entered after `patch`, it reads the edited states; entered before, the states of the edited
    blocks as they were. It refuses a block whose update is removed (`ablate` with `zero`) where it reads the edited
    states of that block and of the one before.

    Raises InputError for a step cache, which would skip edited blocks, for a layer, expert, frame, region or step that
    the run does not have, for sources that are missing or have another shape, for a result that is not finite, and, at
    the end, for an edit that was not carried out at one of its steps and layers, such as those that `replayed` takes
    from another run.
    """
    if isinstance(edits, Edit) or not all(isinstance(edit, Edit) for edit in edits):
        raise InputError(f"edits: {type(edits).__name__}, expected a list of Edit, such as [Edit('noise', steps=(0,))]")
    if not edits:
        yield
        return
    edits, sources, models = tuple(edits), sources or {}, experts(pipeline)
    refuse_step_caches(models)
    with ExitStack() as undo:
        call = undo.enter_context(watched_calls(pipeline))
        patcher = _Patcher(pipeline, edits, sources, boxes, seeds, call)
        for expert, model in models.items():
            blocks = block_list(pipeline, model)
            for edit in edits:
                if edit.expert in ("", expert):
                    check_layers(edit.layers, len(blocks))
            undo.callback(model.register_forward_pre_hook(patcher.on_model).remove)
            for layer, block in enumerate(blocks):
                here = [(n, e) for n, e in enumerate(edits) if layer in e.layers and e.expert in ("", expert)]
                if here:
                    undo.callback(block.register_forward_hook(patcher.on_block(layer, here), with_kwargs=True).remove)
        if any(not edit.layers for edit in edits):
            undo.enter_context(wrapped(pipeline, "prepare_latents", patcher.around_prepare))
            undo.enter_context(wrapped(pipeline.scheduler, "step", patcher.around_step))
            undo.enter_context(wrapped(pipeline.scheduler, "convert_model_output", patcher.around_convert))
            undo.enter_context(wrapped(pipeline.scheduler, "multistep_uni_c_bh_update", patcher.around_corrector))
        yield
        patcher.check_fired()


class _Patcher:
    """The hooks of one `patch` and the state they share."""

    def __init__(
        self,
        pipeline: Any,
        edits: Sequence[Edit],
        sources: Mapping[str, Any],
        boxes: Sequence[Sequence[Region]],
        seeds: Sequence[int],
        call: RunningCall,
    ):
        self.pipeline, self.edits, self.sources, self.boxes = pipeline, edits, sources, boxes
        self.seeds, self.call, self.family = seeds, call, architecture(pipeline)
        self.fired: set[tuple[int, int, int]] = set()  # number of the edit, step, layer
        self.ran: set[tuple[int, str, str]] = set()  # step, expert, branch
        self.grid = TokenGrid(0, 0, 0)  # of the run
        self.moved: Tensor | None = None  # which values of the latent of the coming step are edited
        known = experts(pipeline)
        for edit in edits:
            if edit.source and edit.source not in sources:
                raise InputError(
                    f"edit {edit}: no source {edit.source!r}; expected one of {', '.join(sources) or 'none'}"
                )
            expected = Tensor if edit.kind == "steer" else Mapping
            if edit.source and not isinstance(sources[edit.source], expected):
                raise InputError(
                    f"source {edit.source!r}: {type(sources[edit.source]).__name__}, expected "
                    f"{'a tensor' if edit.kind == 'steer' else 'a mapping'} for kind {edit.kind!r}"
                )
            if edit.expert and edit.expert not in known:
                raise InputError(f"edit {edit}: expert={edit.expert!r}; expected one of {', '.join(known)}")
            if edit.regions and max(edit.regions) >= min(map(len, boxes), default=0):
                least = min(map(len, boxes), default=0)
                raise InputError(f"edit {edit}: this run has {least} regions; pass boxes, or other regions")
        for box in (box for of_sample in boxes for box in of_sample):
            if isinstance(box, Mask):
                continue
            if not (len(box) == 4 and 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
                raise InputError(f"boxes: {list(box)}, expected x0, y0, x1, y1 as fractions of the image")

    def on_model(self, model: nn.Module, args: tuple) -> None:
        """A pre-forward hook for a transformer, after that of `watched_calls`."""
        self.ran |= {(self.call.step, self.call.expert, branch) for branch in self.call.branches}

    # blocks

    def on_block(self, layer: int, edits: Sequence[tuple[int, Edit]]) -> Callable[..., Any]:
        """A forward hook for a block. edits: with their numbers."""

        def hook(block: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            tokens = self.family.video_tokens(output)
            changed = tokens
            for number, edit in edits:
                if edit.steps and self.call.step not in edit.steps:
                    continue
                halves = list(changed.chunk(len(self.call.branches)))
                before = hidden_states(args, kwargs).chunk(len(self.call.branches))
                for i, branch in enumerate(self.call.branches):
                    if edit.branch in ("", branch):
                        self.fired.add((number, self.call.step, layer))
                        halves[i] = self._edited(edit, At(self.call.step, layer, branch), halves[i], before[i])
                changed = torch.cat(halves) if len(halves) > 1 else halves[0]
            return None if changed is tokens else self.family.with_video_tokens(output, changed)

        return hook

    def _edited(self, edit: Edit, at: At, tokens: Tensor, before: Tensor) -> Tensor:
        """The output of a block for one branch after an edit. before: the input of the block."""
        mask = self._token_mask(edit, len(tokens))
        if edit.amount == 0:
            return tokens
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
            self._check_boxes(batch)
            each = [[boxes[region] for region in edit.regions] for boxes in self.boxes]
            chosen &= torch.stack([box_masks(boxes, grid.rows, grid.columns).amax(dim=0) > 0 for boxes in each])[
                :, None
            ]
        return chosen.to(where)

    def _check_boxes(self, batch: int) -> None:
        if len(self.boxes) != batch:
            raise InputError(f"boxes: regions of {len(self.boxes)} samples, expected {batch}, one entry per sample")

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
        self._check_boxes(len(tokens))
        if not regions or {regions} != {len(boxes) for boxes in self.boxes}:
            found = ", ".join(map(str, sorted({len(boxes) for boxes in self.boxes})))
            raise InputError(f"source {edit.source!r}: directions of {regions} regions, expected {found}")
        masks = torch.stack([box_masks(boxes, grid.rows, grid.columns) for boxes in self.boxes]).to(tokens)
        return torch.einsum("brs,brc->bsc", masks, directions).repeat(1, grid.frames, 1)

    def _erased(self, edit: Edit, at: At, tokens: Tensor) -> Tensor:
        erasers: Mapping[tuple[int, int], Eraser] = self.sources[edit.source]
        if (at.step, at.layer) not in erasers:
            raise InputError(f"source {edit.source!r}: no eraser for step {at.step}, layer {at.layer}")
        erased = erasers[at.step, at.layer](tokens.float().flatten(0, 1))
        if erased.shape != (len(tokens) * tokens.shape[1], tokens.shape[2]):
            raise InputError(
                f"source {edit.source!r}: the eraser of step {at.step}, layer {at.layer} gave {list(erased.shape)}, "
                f"expected {[len(tokens) * tokens.shape[1], tokens.shape[2]]}"
            )
        return erased.reshape(tokens.shape)

    def _state(self, edit: Edit, at: At, host: Tensor) -> Tensor:
        states: States = self.sources[edit.source]
        if at not in states:
            raise InputError(
                f"source {edit.source!r}: no state of step {at.step}, layer {at.layer}, {at.branch or 'latent'}"
            )
        state = states[at]
        if at == (0, LATENT, "") and state.shape != host.shape:
            state = self._as_prepared(state, host)
        if state.shape != host.shape:
            raise InputError(
                f"source {edit.source!r}: a donor state of shape {list(state.shape)}, expected {list(host.shape)}; "
                "use a donor of the same size and number of frames"
            )
        return state.to(host)

    def _as_prepared(self, state: Tensor, host: Tensor) -> Tensor:
        """The latent that the scheduler gets in step 0, in the form of what `prepare_latents` returns, where that is
        packed or has the given first frame as well. Another latent is returned as it is."""
        whole, axis = self.family.unpacked(host, self.grid), self.family.axis("f")
        expected = [n - (i == axis) for i, n in enumerate(whole.shape)]
        if not self.family.keeps_first_frame(self.pipeline) or list(state.shape) != expected:
            return state
        state = self.family.whole(self.pipeline, state.to(host), whole)
        return state if host.ndim == whole.ndim else self.family.latent_tokens(first_transformer(self.pipeline), state)

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
        self.moved, self.grid = None, self._grid_of(given)
        changed = self._edited_latent(latent, 0, None, self.grid)
        return (changed, *rest) if isinstance(result, tuple) else changed

    def around_step(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """Wraps `step` of the scheduler: edits the latent of the next step."""
        following = self.call.count.now + 1
        scheduler = self.pipeline.scheduler
        clean = clean_estimate(scheduler, step_call(scheduler, args, kwargs)) if self._needs_clean(following) else None
        args, kwargs = self._forgetting(args, kwargs)
        result = original(*args, **kwargs)
        self.moved = None
        if following == len(scheduler.timesteps):
            return result
        old = result[0] if isinstance(result, tuple) else result.prev_sample
        new = self._edited_latent(old, following, clean, self.call.grid)
        if new is not old and not torch.equal(new, old):
            self.moved = new != old
        if isinstance(result, tuple):
            return (new, *result[1:])
        result.prev_sample = new
        return result

    def _forgetting(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments of a call of `step`, with the x0-hat of the last step replaced by that of this step where the
        latent was edited. Only the scheduler of CogVideoX has it as an argument."""
        scheduler = self.pipeline.scheduler
        bound = signature(type(scheduler).step).bind(scheduler, *args, **kwargs)
        if self.moved is None or bound.arguments.get(PREVIOUS) is None:
            return args, kwargs
        old = bound.arguments[PREVIOUS]
        clean = clean_estimate(scheduler, step_call(scheduler, args, kwargs)).to(old.dtype)
        bound.arguments[PREVIOUS] = torch.where(self.moved, clean, old)
        return bound.args[1:], bound.kwargs

    def around_convert(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """Wraps `convert_model_output` of a multistep scheduler: what it remembers of earlier steps becomes the output
        of this step where the latent was edited, so that their differences are 0."""
        result = original(*args, **kwargs)
        if self.moved is not None:
            outputs = self.pipeline.scheduler.model_outputs
            outputs[:] = [None if old is None else torch.where(self.moved, result, old) for old in outputs]
        return result

    def around_corrector(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """Wraps the corrector of UniPC, which computes the latent of this step again from that of the last one: an
        edited latent stays as it is."""
        corrected = original(*args, **kwargs)
        return corrected if self.moved is None else torch.where(self.moved, kwargs["this_sample"], corrected)

    def _needs_clean(self, step: int) -> bool:
        return any(e.how == "renoised" and (not e.steps or step in e.steps) for e in self.edits)

    def _grid_of(self, given: Mapping[str, Any]) -> TokenGrid:
        """The token grid of a call of `prepare_latents` with these arguments."""
        size = (given[name] for name in ("num_frames", "height", "width"))
        return self.family.video_grid(self.pipeline, first_transformer(self.pipeline), *size)

    def _edited_latent(self, latent: Tensor, step: int, clean: Tensor | None, grid: TokenGrid) -> Tensor:
        for number, edit in enumerate(self.edits):
            if edit.layers or (edit.steps and step not in edit.steps):
                continue
            self.fired.add((number, step, LATENT))
            mask = self._latent_mask(edit, latent, grid)
            if edit.amount != 0:
                new = self._new_latent(edit, latent, step, clean)
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
        seeds = self.seeds if len(self.seeds) else range(len(latent))
        if len(seeds) != len(latent):
            raise InputError(f"seeds: {len(seeds)} for a batch of {len(latent)}, expected one per sample")
        level = noise_level(self.pipeline.scheduler, step)
        noise = torch.stack([_noise(latent.shape[1:], (int(seed), edit.seed, step)) for seed in seeds]).to(latent)
        if edit.how != "renoised":
            return level.unit * noise
        if clean is None:
            raise InputError(f"edit {edit}: before step 0 there is no x0-hat; expected steps from 1")
        return (level.signal * clean + level.noise * noise.float()).to(latent.dtype)

    def _latent_mask(self, edit: Edit, latent: Tensor, grid: TokenGrid) -> Bool[Tensor, "batch ..."]:
        """Which values of the latent of a scheduler an edit changes. A given first frame is never changed."""
        if {*edit.frames} == {0} and self.family.keeps_first_frame(self.pipeline):
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
            ran = {
                step for step, expert, branch in self.ran if edit.expert in ("", expert) and edit.branch in ("", branch)
            }
            done = {(step, layer) for n, step, layer in self.fired if n == number}
            for step in edit.steps or sorted(ran) or (None,):
                for layer in edit.layers or (LATENT,):
                    if (step, layer) not in done:
                        where = f"{'any step' if step is None else f'step {step}'}, "
                        where += "latent" if layer == LATENT else f"layer {layer}"
                        steps = len(self.pipeline.scheduler.timesteps)
                        raise InputError(
                            f"edit {edit}: was not carried out at {where}; expected one whole pipeline call inside the "
                            f"context, with such a step, branch and expert; the last one had {steps} steps"
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
    return before + update.roll(-(len(tokens) // 2), dims=0)  # with several seeds, another problem


def _noise(shape: Sequence[int], seeds: tuple[int, ...]) -> Tensor:
    """Standard Gaussian noise that depends on its seeds alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(_seed_of(seeds)))


def _seed_of(numbers: Sequence[int]) -> int:
    """A seed from several numbers, the same in every process."""
    return int(hashlib.sha256("/".join(map(str, numbers)).encode()).hexdigest()[:12], 16)
