"""Watch every block at every denoising step while the real pipeline samples.

    with capture(pipeline, sites="all", pooling=Pooling("clip")) as cache:
        pipeline(...)
    cache.features()   # [sample, step, site, branch, place, region, channel]

The label of every block call is read from the pipeline itself: the step from its own timestep, the branch
from the name its `cache_context` was given, the expert from which transformer ran. Nothing is counted or
guessed; at the end the calls that were seen are compared with those the pipeline should have made.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cosprobe.activations.pooling import Pooling, whole_frame
from cosprobe.cells import EMBED, FIRST_FRAME, NOISE, PROMPT, SOURCES, X0, X_T, parse_selection
from cosprobe.errors import InputError
from cosprobe.models import architecture, block_list, clean_estimate, experts, latent_tokens, token_grid

BRANCHES = {"cond": ("cond",), "uncond": ("uncond",), "cond_uncond": ("uncond", "cond")}  # order inside a batch


@dataclass
class ActivationCache:
    """What one pipeline call left behind.

    sites: layer numbers as text, then sources. steps: the step indices kept. experts: per kept step, the
    transformer that ran. clean: x0-hat latents at the steps asked for. inputs: by name and step index, `region` and
    `whole` of every input and of x0-hat, where the transformer has it (`input_features`); what does not change along
    the steps stands at step 0. recorded: per step asked for, the guidance context and the arguments of the
    transformer call that served `cond`.
    """

    sites: tuple[str, ...]
    steps: tuple[int, ...] = ()
    branches: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    experts: dict[int, str] = field(default_factory=dict)
    clean: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[str, dict[int, dict[str, Tensor]]] = field(default_factory=dict)
    recorded: dict[int, tuple[str, tuple, dict]] = field(default_factory=dict)
    parts: dict[tuple[int, str, str], Tensor] = field(default_factory=dict)
    calls: Counter[tuple[int, str, str]] = field(default_factory=Counter)

    def features(self) -> Float[Tensor, "sample step site branch place region channel"]:
        """Everything captured, on the CPU. Sources with fewer channels than a block end in zeros."""
        width = max(part.shape[-1] for part in self.parts.values())

        def part(step: int, site: str, branch: str) -> Tensor:
            value = self.parts.get((step, site, branch), self.parts.get((step, site, "")))
            assert value is not None  # the audit has passed
            return nn.functional.pad(value, (0, width - value.shape[-1]))

        grid = [
            torch.stack([torch.stack([part(s, site, b) for b in self.branches]) for site in self.sites])
            for s in self.steps
        ]
        return torch.stack(grid).permute(3, 0, 1, 2, 4, 5, 6).contiguous()

    def input_features(self) -> dict[str, Float[Tensor, "sample step frame part channel"]]:
        """Every input under `NAME.region` (parts are the regions of the pooling, if it has any) and `NAME.whole` (parts
        are the coarse cells of `whole_frame`), all latent frames apart. step has one entry for what does not change."""
        found = {}
        for name, by_step in self.inputs.items():
            steps = self.steps if name in SOURCES else (0,)
            for part in by_step[steps[0]]:
                found[f"{name}.{part}"] = torch.stack([by_step[step][part] for step in steps], dim=1)
        return found


@contextmanager
def capture(
    pipeline: Any,
    sites: str | Sequence[str] = "all",
    pooling: Pooling | None = None,
    steps: str = "all",
    clean: Sequence[int] = (),
    record: Sequence[int] = (),
    inputs: bool = False,
) -> Iterator[ActivationCache]:
    """Captures one call of `pipeline` made inside the block; undone on exit, whatever happens.

    sites: a layer selection (`all`, `0:30:5`) or a list of layer numbers and sources (`embed`, `x_t`,
    `x0_latent`). pooling: default one mean per clip. steps: step indices to keep. clean: step indices at
    which the x0-hat latent itself is kept. record: step indices at which the arguments of the transformer's
    calls are kept, for `replay`. inputs: keep what the run is given and the latents of every step too, for baselines.

    Raises ValueError for what can't be captured right: an unknown transformer class, a step cache, a
    compiled block, a sampler that calls the model more than once a step, a selection out of range; and
    RuntimeError when the calls seen are not the calls a run should make.
    """
    models = experts(pipeline)
    _refuse(pipeline, models)
    chosen = _sites(sites, models)
    watcher = _Watcher(pipeline, models, chosen, pooling or Pooling("clip"), steps, set(clean), set(record), inputs)
    with ExitStack() as undo:
        for expert, model in models.items():
            undo.callback(model.register_forward_pre_hook(watcher.on_model(expert), with_kwargs=True).remove)
            blocks = block_list(model)
            undo.callback(blocks[0].register_forward_pre_hook(watcher.on_embed, with_kwargs=True).remove)
            for layer, block in enumerate(blocks):
                if str(layer) in watcher.cache.sites:
                    undo.callback(block.register_forward_hook(watcher.on_block(str(layer))).remove)
            undo.enter_context(wrapped(model, "cache_context", watcher.around_context))
        undo.enter_context(wrapped(pipeline.scheduler, "step", watcher.around_step))
        yield watcher.cache
    watcher.audit()


class _Watcher:
    """State shared by the hooks of one capture."""

    def __init__(
        self,
        pipeline: Any,
        models: dict,
        sites: tuple[str, ...],
        pooling: Pooling,
        steps: str,
        clean: set,
        record: set,
        inputs: bool,
    ):
        self.pipeline, self.models, self.pooling, self.spec, self.clean = pipeline, models, pooling, steps, clean
        self.record, self.inputs = record, inputs
        self.whole: dict[int, Pooling] = {}  # by number of channels
        self.cache = ActivationCache(sites)
        self.context = ""
        self.step = -1
        self.expert = ""
        self.size = (0, 0, 0)
        self.keep: tuple[int, ...] = ()

    def on_model(self, expert: str) -> Callable:
        def hook(model: nn.Module, args: tuple, kwargs: dict) -> None:
            self.step = self._step_index()
            self.expert = expert
            self.size = token_grid(model, hidden_states(args, kwargs))
            self.cache.experts[self.step] = expert
            self.cache.calls[(self.step, expert, self._context())] += 1
            if self._context() != "uncond":
                if self.step == 0 and self.inputs:
                    self._keep_start(model, hidden_states(args, kwargs), kwargs.get("encoder_hidden_states"))
                if self.step in self.record:
                    self.cache.recorded[self.step] = (self._context(), args, kwargs)

        return hook

    def _keep_start(self, model: nn.Module, latent: Tensor, prompt: Tensor | None) -> None:
        """What the run starts from: the noise, whatever stands beside it on the channel axis, and the prompt."""
        latent, channel = conditional(self._context(), latent), architecture(model).layout.split().index("c")
        noise, beside = latent.tensor_split([model.config.out_channels], dim=channel)
        for name, part in ((NOISE, noise), (FIRST_FRAME, beside)):
            if part.shape[channel]:
                self._keep_input(name, latent_tokens(model, part))
        if prompt is not None:
            mean = conditional(self._context(), prompt).float().mean(dim=1)
            self.cache.inputs[PROMPT] = {0: {"whole": mean[:, None, None].cpu()}}

    def _keep_input(self, name: str, tokens: Tensor) -> None:
        width = tokens.shape[-1]
        if width not in self.whole:
            # a grid probe is compared with the same cells
            self.whole[width] = self.pooling if self.pooling.kind == "grid" else whole_frame(width)
        pooled = {"whole": self.whole[width].by_frame(tokens, self.size)}
        if self.pooling.kind == "region":
            pooled["region"] = self.pooling.by_frame(tokens, self.size)
        kind = next(self.models[self.expert].parameters()).dtype
        kept = {part: value.to(kind).to("cpu", non_blocking=tokens.is_cuda) for part, value in pooled.items()}
        self.cache.inputs.setdefault(name, {})[self.step] = kept

    def on_embed(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        if EMBED in self.cache.sites:
            self._keep_tokens(EMBED, hidden_states(args, kwargs))
        if self.inputs and self.step in self.keep and self._context() != "uncond":
            self._keep_input(EMBED, conditional(self._context(), hidden_states(args, kwargs)))

    def on_block(self, site: str) -> Callable:
        def hook(block: nn.Module, args: tuple, output: Any) -> None:
            index = architecture(self.models[self.expert]).video
            self._keep_tokens(site, output if index is None else output[index])

        return hook

    @contextmanager
    def around_context(self, original: Callable, name: str) -> Iterator[None]:
        before, self.context = self.context, name
        try:
            with original(name):
                yield
        finally:
            self.context = before

    def around_step(self, original: Callable, output: Tensor, timestep: Any, noisy: Tensor, *a: Any, **k: Any) -> Any:
        step, model = self._step_index(), self.models[self.expert]
        sites = self.cache.sites if step in self.keep else ()
        inputs = self.inputs and step in self.keep
        if X_T in sites or inputs:
            self._keep_latent(X_T, latent_tokens(model, noisy), X_T in sites)
        if X0 in sites or inputs or step in self.clean:
            estimate = clean_estimate(self.pipeline.scheduler, step, output, noisy)
            if X0 in sites or inputs:
                self._keep_latent(X0, latent_tokens(model, estimate), X0 in sites)
            if step in self.clean:
                self.cache.clean[step] = estimate
        return original(output, timestep, noisy, *a, **k)

    def _step_index(self) -> int:
        """The step the pipeline says it is at, from its own timestep."""
        timesteps = self.pipeline.scheduler.timesteps
        if not self.keep:
            self.keep = parse_selection(self.spec, len(timesteps), "probe.steps")
            self.cache.steps = self.keep
        match = (timesteps == self.pipeline._current_timestep).nonzero().flatten()
        if len(match) != 1:
            raise RuntimeError(f"timestep {self.pipeline._current_timestep} names {len(match)} steps, expected one")
        return int(match)

    def _context(self) -> str:
        guided = getattr(self.pipeline, "guidance_scale", 1.0) > 1
        if self.context in ("", "cond_uncond") and not guided:
            return "cond"  # CogVideoX names its context `cond_uncond` even when it does not double the batch
        if self.context in BRANCHES:
            return self.context
        raise RuntimeError(f"guidance branch {self.context!r} is not known: expected one of {', '.join(BRANCHES)}")

    def _keep_tokens(self, site: str, tokens: Tensor) -> None:
        if self.step not in self.keep:
            return
        branches = BRANCHES[self._context()]
        for branch, half in zip(branches, tokens.chunk(len(branches)), strict=True):
            self._store(site, branch, half)

    def _keep_latent(self, name: str, tokens: Tensor, as_site: bool) -> None:
        if as_site:
            self._store(name, "", tokens)  # the same for every branch
        if self.inputs:
            self._keep_input(name, tokens)

    def _store(self, site: str, branch: str, tokens: Tensor) -> None:
        kind = tokens.dtype if site not in (X_T, X0) else next(self.models[self.expert].parameters()).dtype
        key = (self.step, site, branch)
        if key in self.cache.parts:
            raise RuntimeError(f"site {site} ran twice at step {self.step}, branch {branch or 'any'}: expected once")
        pooled = self.pooling(tokens, self.size).to(kind)
        self.cache.parts[key] = pooled.to("cpu", non_blocking=tokens.is_cuda)

    def audit(self) -> None:
        """Compares the calls seen with those of a whole run: each step once per branch, by one expert."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies above are asynchronous
        cache, seen = self.cache, self.cache.calls
        if not seen:
            raise RuntimeError("nothing was captured: expected one pipeline call inside the block, saw none")
        total = len(self.pipeline.scheduler.timesteps)
        last = max(step for step, _, _ in seen) if getattr(self.pipeline, "_interrupt", False) else total - 1
        contexts = {name for _, _, name in seen}
        expected = Counter((step, cache.experts.get(step, "none"), c) for step in range(last + 1) for c in contexts)
        if seen != expected:
            extra = sorted((seen - expected).items()) + sorted((expected - seen).items())
            raise RuntimeError(
                f"block calls differ from one per step and branch, e.g. (step, expert, branch) {extra[0]}"
            )
        cache.steps = tuple(s for s in self.keep if s <= last)
        cache.branches = tuple(b for b in ("cond", "uncond") if any(b in BRANCHES[name] for name in contexts))
        cache.places = self.pooling.places(self.size[0])
        for site in cache.sites:
            for step in cache.steps:
                if not any((step, site, b) in cache.parts for b in ("", *cache.branches)):
                    raise RuntimeError(f"site {site} never ran at step {step}; sites: {', '.join(cache.sites)}")


def conditional(context: str, tensor: Tensor) -> Tensor:
    """The part of a batch that served the `cond` branch. context: name of the guidance context."""
    return tensor.chunk(len(BRANCHES[context]))[-1]


def hidden_states(args: tuple, kwargs: dict) -> Tensor:
    """The hidden states a model or a block was called with."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def _sites(spec: str | Sequence[str], models: dict[str, nn.Module]) -> tuple[str, ...]:
    """Layer numbers (as text) and sources; a string selects layers only."""
    depth = min(len(block_list(model)) for model in models.values())
    if isinstance(spec, str):
        return tuple(str(layer) for layer in parse_selection(spec, depth, "probe.layers"))
    layers = [site for site in spec if site not in SOURCES]
    chosen = parse_selection(",".join(layers), depth, "probe.layers") if layers else ()
    return (*(str(layer) for layer in chosen), *(site for site in SOURCES if site in spec))


def _refuse(pipeline: Any, models: dict[str, nn.Module]) -> None:
    if getattr(pipeline.scheduler, "order", 1) != 1:
        raise InputError(
            f"{type(pipeline.scheduler).__name__} calls the model {pipeline.scheduler.order} times a step: "
            "expected a first-order scheduler, e.g. FlowMatchEulerDiscreteScheduler"
        )
    for expert, model in models.items():
        architecture(model)
        if getattr(model, "is_cache_enabled", False):
            raise InputError(
                f"a step cache is on in transformer {expert!r}: a skipped block returns its input, so layers would "
                "be mislabelled; call disable_cache() first"
            )
        if any(getattr(m, "_compiled_call_impl", None) is not None for m in model.modules()):
            raise InputError(
                f"transformer {expert!r} is compiled: hooks added after compilation may be ignored; capture first"
            )


@contextmanager
def wrapped(owner: Any, name: str, around: Callable) -> Iterator[None]:
    """Lets `around(original, *args)` answer for a method of one instance, if it has one of that name."""
    original = getattr(owner, name, None)
    if original is None:
        yield
        return
    was_instance = name in vars(owner)

    @functools.wraps(original)
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
