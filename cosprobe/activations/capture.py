"""Captures the outputs of the blocks of a transformer at every denoising step while a diffusers pipeline samples.

    with capture(pipeline, hook_points="all", pooling=Pooling("clip")) as cache:
        pipeline(...)
    cache.features()   # [sample, step, hook_point, branch, position, region, channel]

The label of every block call comes from the pipeline: the step from the scheduler, the branch from the guidance of the
family (`Architecture.branches`), and the expert from the transformer that runs. Timesteps do not name a step: two can
be equal. At the end, the calls that were captured are compared with one call per step and branch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cosprobe.activations.calls import RunningCall, watched_calls
from cosprobe.activations.pooling import Pooling, whole_frame
from cosprobe.activations.unsupported import refuse_unsupported
from cosprobe.cells import EMBED, FIRST_FRAME, NOISE, PROMPT, SOURCES, X0, X_T, Cell, parse_selection
from cosprobe.errors import InputError
from cosprobe.models import (
    COND,
    UNCOND,
    Branches,
    architecture,
    block_list,
    clean_estimate,
    experts,
    hidden_states,
    step_call,
)
from cosprobe.wrapping import wrapped


@dataclass
class ActivationCache:
    """The activations of one pipeline call.

    hook_points: layer numbers as text, then sources. steps: indices of the captured steps. branches: `cond`, `uncond`
    or both. positions: names of the positions. experts: the transformer that ran at each step.
    clean: x0-hat latents, at the steps selected by the argument `clean` of `capture`.
    inputs: pooled inputs and x0-hat, by name, step index and part (`region`, `token` or `whole`); see `input_features`.
    Inputs that are the same at every step are at step 0. Inputs that the transformer does not have are missing.
    recorded: branches and arguments of the transformer call with the `cond` branch, at the steps selected by the
    argument `record` of `capture`.
    unprojected: features with all channels by step and layer, of the `cond` branch, where the argument `unprojected` of
    `capture` asked for them.
    parts: pooled features by step, hook point and branch. They are on the CPU; while the call runs, `wait` comes before
    reading them. calls: number of calls by step, expert and branches.
    """

    hook_points: tuple[str, ...]
    steps: tuple[int, ...] = ()
    branches: tuple[str, ...] = ()
    positions: tuple[str, ...] = ()
    experts: dict[int, str] = field(default_factory=dict)
    clean: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[str, dict[int, dict[str, Tensor]]] = field(default_factory=dict)
    recorded: dict[int, tuple[Branches, tuple, dict]] = field(default_factory=dict)
    unprojected: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    parts: dict[tuple[int, str, str], Tensor] = field(default_factory=dict)
    calls: Counter[tuple[int, str, Branches]] = field(default_factory=Counter)
    _copied: set[torch.device] = field(default_factory=set, init=False, repr=False)

    def to_cpu(self, value: Tensor) -> Tensor:
        """A tensor on the CPU. From a GPU it is copied in the background, see `wait`."""
        if value.is_cuda:
            self._copied.add(value.device)
        return value.to("cpu", non_blocking=value.is_cuda)

    def wait(self) -> None:
        """Waits until everything that was copied from a GPU is there."""
        for device in self._copied:
            torch.cuda.synchronize(device)

    def features(self) -> Float[Tensor, "sample step hook_point branch position region channel"]:
        """All captured features, on the CPU. Sources with fewer channels than a block are padded with zeros.

        Raises InputError inside the `with` block of the capture.
        """
        self._check_ended("features()")
        width = max(part.shape[-1] for part in self.parts.values())

        def part(step: int, hook_point: str, branch: str) -> Tensor:
            value = self.parts.get((step, hook_point, branch), self.parts.get((step, hook_point, "")))
            assert value is not None  # `audit` has checked this
            return nn.functional.pad(value, (0, width - value.shape[-1]))

        grid = [
            torch.stack(
                [torch.stack([part(s, hook_point, b) for b in self.branches]) for hook_point in self.hook_points]
            )
            for s in self.steps
        ]
        return torch.stack(grid).permute(3, 0, 1, 2, 4, 5, 6).contiguous()

    def at(self, cell: Cell) -> Float[Tensor, "sample region channel"]:
        """The features of one cell."""
        return self.parts[cell.step, str(cell.layer), cell.branch][:, self.positions.index(cell.position)]

    def input_features(self) -> dict[str, Float[Tensor, "sample step frame part channel"]]:
        """Pooled inputs, with separate latent frames, as `NAME.region`, `NAME.token` and `NAME.whole`.

        The axis part has the regions of the pooling (`region`, only with region pooling), all tokens of a frame
        (`token`, only with token pooling) or the coarse cells of `whole_frame` (`whole`). The axis step has one entry
        for inputs that are the same at every step.
        Raises InputError inside the `with` block of the capture.
        """
        self._check_ended("input_features()")
        found = {}
        for name, by_step in self.inputs.items():
            steps = self.steps if name in SOURCES else (0,)
            for part in by_step[steps[0]]:
                found[f"{name}.{part}"] = torch.stack([by_step[step][part] for step in steps], dim=1)
        return found

    def _check_ended(self, call: str) -> None:
        if not self.branches:  # set when the capture ends
            raise InputError(
                f"{call}: the capture has not ended, or ended with an error; expected a call after the `with` block"
            )


@contextmanager
def capture(
    pipeline: Any,
    hook_points: str | Sequence[str] = "all",
    pooling: Pooling | None = None,
    steps: str = "all",
    clean: Sequence[int] = (),
    record: Sequence[int] = (),
    inputs: bool = False,
    unprojected: Collection[tuple[int, int]] = (),
) -> Iterator[ActivationCache]:
    """Captures one call of `pipeline` that is made inside the context. Hooks are removed on exit, also after errors.

    hook_points: a layer selection (`all`, `0:30:5`) or a list of layer numbers and sources (`embed`, `x_t`,
    `x0_latent`). pooling: default `clip`, one mean per clip. steps: selection of the steps to capture.
    clean: step indices at which the x0-hat latent is kept. record: step indices at which the arguments of the
    transformer call are kept, for `replay`. inputs: also keep the inputs of the run and the latents of every captured
    step, for baselines. unprojected: pairs of step and layer whose features are also kept with all channels.

    Raises InputError where capture would be wrong: unknown pipeline or transformer class, step cache or other hook or
    function that replaces what a block computes, compiled block, tokens that are divided among devices, sampler that
    calls the model more than once per step, selection out of range.
    Raises RuntimeError when the captured calls are not one per step and branch, and when a block returned its input.
    """
    models = experts(pipeline)
    refuse_unsupported(pipeline, models)
    chosen = _hook_points(hook_points, min(len(block_list(pipeline, model)) for model in models.values()))
    watcher = _Watcher(
        *(pipeline, models, chosen, pooling or Pooling("clip"), steps, set(clean), set(record), inputs),
        unprojected=frozenset(unprojected),
    )
    with ExitStack() as undo:
        watcher.call = undo.enter_context(watched_calls(pipeline))
        for model in models.values():
            undo.callback(model.register_forward_pre_hook(watcher.on_model, with_kwargs=True).remove)
            blocks = block_list(pipeline, model)
            undo.callback(blocks[0].register_forward_pre_hook(watcher.on_embed, with_kwargs=True).remove)
            for layer, block in enumerate(blocks):
                if str(layer) in watcher.cache.hook_points:
                    undo.callback(block.register_forward_hook(watcher.on_block(str(layer))).remove)
        undo.enter_context(wrapped(pipeline.scheduler, "step", watcher.around_step))
        yield watcher.cache
    watcher.audit()


class _Watcher:
    """The hooks of one capture and the state they share."""

    call: RunningCall

    def __init__(
        self,
        pipeline: Any,
        models: dict,
        hook_points: tuple[str, ...],
        pooling: Pooling,
        steps: str,
        clean: set,
        record: set,
        inputs: bool,
        unprojected: frozenset[tuple[int, int]],
    ):
        self.pipeline, self.models, self.pooling, self.spec, self.clean = pipeline, models, pooling, steps, clean
        self.record, self.inputs, self.unprojected = record, inputs, unprojected
        self.family = architecture(pipeline)
        self.whole: dict[int, Pooling] = {}  # pooling of inputs, by number of channels
        self.cache = ActivationCache(hook_points)
        self.model_input: Tensor | None = None  # of the `cond` branch, unpacked
        self.keep: tuple[int, ...] = ()

    def on_model(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """A pre-forward hook for a transformer: keeps inputs of the call."""
        call, latent = self.call, hidden_states(args, kwargs)
        if not self.keep:
            self.keep = parse_selection(self.spec, len(self.pipeline.scheduler.timesteps), "probe.steps")
            self.cache.steps = self.keep
        self.cache.experts[call.step] = call.expert
        self.cache.calls[(call.step, call.expert, call.branches)] += 1
        if COND in call.branches:
            latent = self.family.unpacked(conditional(call.branches, latent), call.grid)
            self.model_input = latent.narrow(self.family.axis("c"), 0, self.family.noisy_channels(model))
            if call.step == 0 and self.inputs:
                self._keep_start(model, latent, kwargs.get("encoder_hidden_states"))
            if call.step in self.record:
                self.cache.recorded[call.step] = (call.branches, args, kwargs)

    def _keep_start(self, model: nn.Module, latent: Tensor, prompt: Tensor | None) -> None:
        """Keeps the inputs of the run: noise, image condition and prompt, all of the `cond` branch."""
        noise, condition = self.family.split_input(self.pipeline, model, latent)
        for name, part in ((NOISE, noise), (FIRST_FRAME, condition)):
            if part is not None:
                self._keep_input(name, self.family.latent_tokens(model, part))
        if prompt is not None:
            mean = conditional(self.call.branches, prompt).float().flatten(1, -2).mean(dim=1)
            self.cache.inputs[PROMPT] = {0: {"whole": mean[:, None, None].cpu()}}

    def _keep_input(self, name: str, tokens: Tensor) -> None:
        """Pools one input over the whole frame and, with region or token pooling, over regions or tokens, and keeps the
        means."""
        width = tokens.shape[-1]
        if width not in self.whole:
            # with grid pooling, inputs have the same cells as the probes they are compared with
            self.whole[width] = self.pooling if self.pooling.kind == "grid" else whole_frame(width)
        pooled = {"whole": self.whole[width].by_frame(tokens, self.call.grid)}
        if self.pooling.kind in ("region", "token"):
            pooled[self.pooling.kind] = self.pooling.by_frame(tokens, self.call.grid)
        kind = self._dtype()
        kept = {part: self.cache.to_cpu(value.to(kind)) for part, value in pooled.items()}
        self.cache.inputs.setdefault(name, {})[self.call.step] = kept

    def _dtype(self) -> torch.dtype:
        """The type of numbers that the transformer computes in: that of its input. Weights can be stored in another."""
        assert self.model_input is not None
        return self.model_input.dtype

    def on_embed(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        """A pre-forward hook for block 0: keeps its input."""
        if EMBED in self.cache.hook_points:
            self._keep_tokens(EMBED, hidden_states(args, kwargs))
        if self.inputs and self.call.step in self.keep and COND in self.call.branches:
            self._keep_input(EMBED, conditional(self.call.branches, hidden_states(args, kwargs)))

    def on_block(self, hook_point: str) -> Callable:
        """A forward hook for a block: keeps its output."""

        def hook(block: nn.Module, args: tuple, output: Any) -> None:
            self._keep_tokens(hook_point, self.family.video_tokens(output))

        return hook

    def around_step(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """Wraps `step` of the scheduler: keeps the noisy latent and x0-hat."""
        step = self.call.count.now
        hook_points = self.cache.hook_points if step in self.keep else ()
        inputs = self.inputs and step in self.keep
        if self.model_input is not None and (inputs or {X_T, X0} & {*hook_points} or step in self.clean):
            scheduler, model = self.pipeline.scheduler, self.models[self.call.expert]
            call = step_call(scheduler, args, kwargs)
            if X_T in hook_points or inputs:
                tokens = self.family.latent_tokens(model, self._whole(call.noisy))
                self._keep_latent(X_T, tokens, X_T in hook_points)
            if X0 in hook_points or inputs or step in self.clean:
                estimate = self._whole(clean_estimate(scheduler, call))
                if X0 in hook_points or inputs:
                    self._keep_latent(X0, self.family.latent_tokens(model, estimate), X0 in hook_points)
                if step in self.clean:
                    self.cache.clean[step] = estimate
        return original(*args, **kwargs)

    def _whole(self, latent: Tensor) -> Tensor:
        """A latent of the scheduler, unpacked, with the first frame where the pipeline keeps it apart."""
        assert self.model_input is not None
        return self.family.whole(self.pipeline, self.family.unpacked(latent, self.call.grid), self.model_input)

    def _keep_tokens(self, hook_point: str, tokens: Tensor) -> None:
        if self.call.step not in self.keep:
            return
        for branch, half in zip(self.call.branches, tokens.chunk(len(self.call.branches)), strict=True):
            self._store(hook_point, branch, half)

    def _keep_latent(self, name: str, tokens: Tensor, as_hook_point: bool) -> None:
        if as_hook_point:
            self._store(name, "", tokens)  # the same for every branch
        if self.inputs:
            self._keep_input(name, tokens)

    def _store(self, hook_point: str, branch: str, tokens: Tensor) -> None:
        kind = tokens.dtype if hook_point not in (X_T, X0) else self._dtype()
        key = (self.call.step, hook_point, branch)
        if key in self.cache.parts:
            raise RuntimeError(
                f"hook point {hook_point} ran twice at step {self.call.step}, branch {branch or 'any'}: expected once"
            )
        if not self.cache.positions:
            self.cache.positions = self.pooling.positions(self.call.grid)
        means = self.pooling.means(tokens, self.call.grid)
        if branch == COND and hook_point.isdigit() and (self.call.step, int(hook_point)) in self.unprojected:
            self.cache.unprojected[self.call.step, int(hook_point)] = self.cache.to_cpu(means.to(kind))
        self.cache.parts[key] = self.cache.to_cpu(self.pooling.projected(means).to(kind))

    def audit(self) -> None:
        """Raises RuntimeError unless every step had one transformer call per branch, all of one expert."""
        cache, seen = self.cache, self.cache.calls
        cache.wait()
        if not seen:
            raise RuntimeError("nothing was captured: expected one pipeline call inside the context, found none")
        refuse_unsupported(self.pipeline, self.models)  # again: a step cache may have been enabled since
        total = len(self.pipeline.scheduler.timesteps)
        last = max(step for step, _, _ in seen) if getattr(self.pipeline, "_interrupt", False) else total - 1
        every = {branches for _, _, branches in seen}
        expected = Counter((step, cache.experts.get(step, "none"), b) for step in range(last + 1) for b in every)
        if seen != expected:
            extra = sorted((seen - expected).items()) + sorted((expected - seen).items())
            raise RuntimeError(
                f"((step, expert, branch), calls)={extra[0]}: expected one transformer call per step and branch; make "
                "one complete pipeline call inside the context"
            )
        cache.steps = tuple(s for s in self.keep if s <= last)
        cache.branches = tuple(b for b in (COND, UNCOND) if any(b in branches for branches in every))
        for hook_point in cache.hook_points:
            for step in cache.steps:
                for branch in cache.branches:
                    if not {(step, hook_point, branch), (step, hook_point, "")} & cache.parts.keys():
                        raise RuntimeError(
                            f"hook point {hook_point} did not run at step {step}, branch {branch}: expected "
                            f"{', '.join(cache.hook_points)}"
                        )
        self._check_computed()

    def _check_computed(self) -> None:
        """Raises RuntimeError for a block that gave the output of the block before it: a cache has skipped it."""
        layers = [int(hook_point) for hook_point in self.cache.hook_points if hook_point not in SOURCES]
        for before, layer in pairwise(layers):
            for (step, hook_point, branch), part in self.cache.parts.items() if layer == before + 1 else ():
                if hook_point == str(layer) and torch.equal(part, self.cache.parts[step, str(before), branch]):
                    raise RuntimeError(
                        f"layer {layer} returned its input at step {step}: expected a block that computes; turn off "
                        "what skips blocks, such as a step cache"
                    )


def conditional(branches: Branches, tensor: Tensor) -> Tensor:
    """The part of a batch that belongs to the `cond` branch. branches: of the transformer call."""
    return tensor.chunk(len(branches))[branches.index(COND)]


def _hook_points(spec: str | Sequence[str], depth: int) -> tuple[str, ...]:
    """Layer numbers (as text) and sources; a string selects layers only."""
    if isinstance(spec, str):
        return tuple(str(layer) for layer in parse_selection(spec, depth, "probe.layers"))
    layers = [hook_point for hook_point in spec if hook_point not in SOURCES]
    chosen = parse_selection(",".join(layers), depth, "probe.layers") if layers else ()
    return (*(str(layer) for layer in chosen), *(hook_point for hook_point in SOURCES if hook_point in spec))
