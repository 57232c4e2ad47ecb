"""Captures the outputs of the blocks of a transformer at every denoising step while a diffusers pipeline samples.

    with capture(pipeline, hook_points="all", pooling=Pooling("clip")) as cache:
        pipeline(...)
    cache.features()   # [sample, step, hook_point, branch, position, region, channel]

The label of every block call comes from the pipeline: the step from its current timestep, the branch from the argument
of `cache_context`, and the expert from the transformer that runs. Calls are not counted to find the step. At the end,
the calls that were captured are compared with one call per step and branch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cosprobe.activations.pooling import Pooling, whole_frame
from cosprobe.activations.unsupported import refuse_unsupported
from cosprobe.cells import EMBED, FIRST_FRAME, NOISE, PROMPT, SOURCES, X0, X_T, Cell, parse_selection
from cosprobe.errors import InputError
from cosprobe.models import architecture, block_list, clean_estimate, experts, step_now

BRANCHES = {"cond": ("cond",), "uncond": ("uncond",), "cond_uncond": ("uncond", "cond")}  # in batch order


@dataclass
class ActivationCache:
    """The activations of one pipeline call.

    hook_points: layer numbers as text, then sources. steps: indices of the captured steps. branches: `cond`, `uncond`
    or both. positions: names of the positions. experts: the transformer that ran at each step.
    clean: x0-hat latents, at the steps selected by the argument `clean` of `capture`.
    inputs: pooled inputs and x0-hat, by name, step index and part (`region` or `whole`); see `input_features`. Inputs
    that are the same at every step are at step 0. Inputs that the transformer does not have are missing.
    recorded: guidance context and arguments of the transformer call with the `cond` branch, at the steps selected by
    the argument `record` of `capture`.
    parts: pooled features by step, hook point and branch. calls: number of calls by step, expert and guidance context.
    """

    hook_points: tuple[str, ...]
    steps: tuple[int, ...] = ()
    branches: tuple[str, ...] = ()
    positions: tuple[str, ...] = ()
    experts: dict[int, str] = field(default_factory=dict)
    clean: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[str, dict[int, dict[str, Tensor]]] = field(default_factory=dict)
    recorded: dict[int, tuple[str, tuple, dict]] = field(default_factory=dict)
    parts: dict[tuple[int, str, str], Tensor] = field(default_factory=dict)
    calls: Counter[tuple[int, str, str]] = field(default_factory=Counter)

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
        """Pooled inputs, with separate latent frames, as `NAME.region` and `NAME.whole`.

        The axis part has the regions of the pooling (`region`, only with region pooling) or the coarse cells of
        `whole_frame` (`whole`). The axis step has one entry for inputs that are the same at every step.
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
) -> Iterator[ActivationCache]:
    """Captures one call of `pipeline` that is made inside the context. Hooks are removed on exit, also after errors.

    hook_points: a layer selection (`all`, `0:30:5`) or a list of layer numbers and sources (`embed`, `x_t`,
    `x0_latent`). pooling: default `clip`, one mean per clip. steps: selection of the steps to capture.
    clean: step indices at which the x0-hat latent is kept. record: step indices at which the arguments of the
    transformer call are kept, for `replay`. inputs: also keep the inputs of the run and the latents of every captured
    step, for baselines.

    Raises InputError where capture would be wrong: unknown transformer class, step cache, compiled block, sampler that
    calls the model more than once per step, selection out of range.
    Raises RuntimeError when the captured calls are not one per step and branch.
    """
    models = experts(pipeline)
    refuse_unsupported(pipeline, models)
    chosen = _hook_points(hook_points, models)
    watcher = _Watcher(pipeline, models, chosen, pooling or Pooling("clip"), steps, set(clean), set(record), inputs)
    with ExitStack() as undo:
        for expert, model in models.items():
            undo.callback(model.register_forward_pre_hook(watcher.on_model(expert), with_kwargs=True).remove)
            blocks = block_list(model)
            undo.callback(blocks[0].register_forward_pre_hook(watcher.on_embed, with_kwargs=True).remove)
            for layer, block in enumerate(blocks):
                if str(layer) in watcher.cache.hook_points:
                    undo.callback(block.register_forward_hook(watcher.on_block(str(layer))).remove)
            undo.enter_context(wrapped(model, "cache_context", watcher.around_context))
        undo.enter_context(wrapped(pipeline.scheduler, "step", watcher.around_step))
        yield watcher.cache
    watcher.audit()


class _Watcher:
    """The hooks of one capture and the state they share."""

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
    ):
        self.pipeline, self.models, self.pooling, self.spec, self.clean = pipeline, models, pooling, steps, clean
        self.record, self.inputs = record, inputs
        self.whole: dict[int, Pooling] = {}  # pooling of inputs, by number of channels
        self.cache = ActivationCache(hook_points)
        self.context = ""
        self.step = -1
        self.expert = ""
        self.size = (0, 0, 0)
        self.keep: tuple[int, ...] = ()

    def on_model(self, expert: str) -> Callable:
        """A pre-forward hook for a transformer: sets step, expert and token grid, and keeps inputs of the call."""

        def hook(model: nn.Module, args: tuple, kwargs: dict) -> None:
            self.step = self._step_index()
            self.expert = expert
            self.size = architecture(model).token_grid(model, hidden_states(args, kwargs))
            self.cache.experts[self.step] = expert
            self.cache.calls[(self.step, expert, self._context())] += 1
            if self._context() != "uncond":
                if self.step == 0 and self.inputs:
                    self._keep_start(model, hidden_states(args, kwargs), kwargs.get("encoder_hidden_states"))
                if self.step in self.record:
                    self.cache.recorded[self.step] = (self._context(), args, kwargs)

        return hook

    def _keep_start(self, model: nn.Module, latent: Tensor, prompt: Tensor | None) -> None:
        """Keeps the inputs of the run: noise, the condition concatenated to it on the channel axis, and prompt."""
        family, latent = architecture(model), conditional(self._context(), latent)
        noise, condition = latent.tensor_split([model.config.out_channels], dim=family.channel_axis)
        for name, part in ((NOISE, noise), (FIRST_FRAME, condition)):
            if part.shape[family.channel_axis]:
                self._keep_input(name, family.latent_tokens(model, part))
        if prompt is not None:
            mean = conditional(self._context(), prompt).float().mean(dim=1)
            self.cache.inputs[PROMPT] = {0: {"whole": mean[:, None, None].cpu()}}

    def _keep_input(self, name: str, tokens: Tensor) -> None:
        """Pools one input over the whole frame and, with region pooling, over the regions, and keeps the means."""
        width = tokens.shape[-1]
        if width not in self.whole:
            # with grid pooling, inputs have the same cells as the probes they are compared with
            self.whole[width] = self.pooling if self.pooling.kind == "grid" else whole_frame(width)
        pooled = {"whole": self.whole[width].by_frame(tokens, self.size)}
        if self.pooling.kind == "region":
            pooled["region"] = self.pooling.by_frame(tokens, self.size)
        kind = next(self.models[self.expert].parameters()).dtype
        kept = {part: value.to(kind).to("cpu", non_blocking=tokens.is_cuda) for part, value in pooled.items()}
        self.cache.inputs.setdefault(name, {})[self.step] = kept

    def on_embed(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        """A pre-forward hook for block 0: keeps its input."""
        if EMBED in self.cache.hook_points:
            self._keep_tokens(EMBED, hidden_states(args, kwargs))
        if self.inputs and self.step in self.keep and self._context() != "uncond":
            self._keep_input(EMBED, conditional(self._context(), hidden_states(args, kwargs)))

    def on_block(self, hook_point: str) -> Callable:
        """A forward hook for a block: keeps its output."""

        def hook(block: nn.Module, args: tuple, output: Any) -> None:
            self._keep_tokens(hook_point, architecture(self.models[self.expert]).video_tokens(output))

        return hook

    @contextmanager
    def around_context(self, original: Callable, name: str) -> Iterator[None]:
        """Wraps `cache_context` of a transformer: remembers the name of the context."""
        before, self.context = self.context, name
        try:
            with original(name):
                yield
        finally:
            self.context = before

    def around_step(self, original: Callable, output: Tensor, timestep: Any, noisy: Tensor, *a: Any, **k: Any) -> Any:
        """Wraps `step` of the scheduler: keeps the noisy latent and x0-hat."""
        step, model = self._step_index(), self.models[self.expert]
        tokens = partial(architecture(model).latent_tokens, model)
        hook_points = self.cache.hook_points if step in self.keep else ()
        inputs = self.inputs and step in self.keep
        if X_T in hook_points or inputs:
            self._keep_latent(X_T, tokens(noisy), X_T in hook_points)
        if X0 in hook_points or inputs or step in self.clean:
            estimate = clean_estimate(self.pipeline.scheduler, step, output, noisy)
            if X0 in hook_points or inputs:
                self._keep_latent(X0, tokens(estimate), X0 in hook_points)
            if step in self.clean:
                self.cache.clean[step] = estimate
        return original(output, timestep, noisy, *a, **k)

    def _step_index(self) -> int:
        """The current step index, found from the timestep of the pipeline."""
        timesteps = self.pipeline.scheduler.timesteps
        if not self.keep:
            self.keep = parse_selection(self.spec, len(timesteps), "probe.steps")
            self.cache.steps = self.keep
        return step_now(self.pipeline)

    def _context(self) -> str:
        """The guidance context of the current transformer call, a key of BRANCHES."""
        guided = getattr(self.pipeline, "guidance_scale", 1.0) > 1
        if self.context in ("", "cond_uncond") and not guided:
            return "cond"  # CogVideoX names its context `cond_uncond` even when it does not double the batch
        if self.context in BRANCHES:
            return self.context
        raise RuntimeError(f"guidance context {self.context!r} is not known: expected one of {', '.join(BRANCHES)}")

    def _keep_tokens(self, hook_point: str, tokens: Tensor) -> None:
        if self.step not in self.keep:
            return
        branches = BRANCHES[self._context()]
        for branch, half in zip(branches, tokens.chunk(len(branches)), strict=True):
            self._store(hook_point, branch, half)

    def _keep_latent(self, name: str, tokens: Tensor, as_hook_point: bool) -> None:
        if as_hook_point:
            self._store(name, "", tokens)  # the same for every branch
        if self.inputs:
            self._keep_input(name, tokens)

    def _store(self, hook_point: str, branch: str, tokens: Tensor) -> None:
        kind = tokens.dtype if hook_point not in (X_T, X0) else next(self.models[self.expert].parameters()).dtype
        key = (self.step, hook_point, branch)
        if key in self.cache.parts:
            raise RuntimeError(
                f"hook point {hook_point} ran twice at step {self.step}, branch {branch or 'any'}: expected once"
            )
        pooled = self.pooling(tokens, self.size).to(kind)
        self.cache.parts[key] = pooled.to("cpu", non_blocking=tokens.is_cuda)

    def audit(self) -> None:
        """Raises RuntimeError unless every step had one transformer call per branch, all of one expert."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies to the CPU are asynchronous
        cache, seen = self.cache, self.cache.calls
        if not seen:
            raise RuntimeError("nothing was captured: expected one pipeline call inside the context, found none")
        total = len(self.pipeline.scheduler.timesteps)
        last = max(step for step, _, _ in seen) if getattr(self.pipeline, "_interrupt", False) else total - 1
        contexts = {name for _, _, name in seen}
        expected = Counter((step, cache.experts.get(step, "none"), c) for step in range(last + 1) for c in contexts)
        if seen != expected:
            extra = sorted((seen - expected).items()) + sorted((expected - seen).items())
            raise RuntimeError(
                f"((step, expert, branch), calls)={extra[0]}: expected one transformer call per step and branch; make "
                "one complete pipeline call inside the context"
            )
        cache.steps = tuple(s for s in self.keep if s <= last)
        cache.branches = tuple(b for b in ("cond", "uncond") if any(b in BRANCHES[name] for name in contexts))
        cache.positions = self.pooling.positions(self.size[0])
        for hook_point in cache.hook_points:
            for step in cache.steps:
                if not any((step, hook_point, b) in cache.parts for b in ("", *cache.branches)):
                    raise RuntimeError(
                        f"hook point {hook_point} did not run at step {step}: expected {', '.join(cache.hook_points)}"
                    )


def conditional(context: str, tensor: Tensor) -> Tensor:
    """The part of a batch that belongs to the `cond` branch. context: name of the guidance context."""
    return tensor.chunk(len(BRANCHES[context]))[-1]


def hidden_states(args: tuple, kwargs: dict) -> Tensor:
    """The hidden states in the arguments of a transformer or block call."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def _hook_points(spec: str | Sequence[str], models: dict[str, nn.Module]) -> tuple[str, ...]:
    """Layer numbers (as text) and sources; a string selects layers only."""
    depth = min(len(block_list(model)) for model in models.values())
    if isinstance(spec, str):
        return tuple(str(layer) for layer in parse_selection(spec, depth, "probe.layers"))
    layers = [hook_point for hook_point in spec if hook_point not in SOURCES]
    chosen = parse_selection(",".join(layers), depth, "probe.layers") if layers else ()
    return (*(str(layer) for layer in chosen), *(hook_point for hook_point in SOURCES if hook_point in spec))


@contextmanager
def wrapped(owner: Any, name: str, around: Callable) -> Iterator[None]:
    """Replaces the method `name` of one object by `around(original, *args, **kwargs)`, and restores it on exit.

    Does nothing when the object has no such method.
    """
    original = getattr(owner, name, None)
    if original is None:
        yield
        return
    was_instance = name in vars(owner)

    @wraps(original)
    def answer(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(owner, name, answer)
    try:
        yield
    finally:
        if was_instance:
            setattr(owner, name, original)
        else:
            delattr(owner, name)
