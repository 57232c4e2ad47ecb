"""Runs that share their first steps: what a first run computed in them is kept, and given to the others.

    with recorded(pipeline) as prefix:
        clean = pipeline(...)
    with replayed(pipeline, prefix, steps=5), patch(pipeline, edits_at_step_5):
        video = pipeline(...)                       # no transformer runs in steps 0 to 4

The pipeline itself goes through all its steps. Outputs of the transformers in the first steps, and of the encoders of
prompt and image, are those of the first run. The scheduler computes as always, so its own memory of earlier steps is
what it was in the first run, and results are bit-identical, also for multistep and stochastic schedulers.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cosprobe.errors import InputError
from cosprobe.models import counted_steps, experts, hidden_states
from cosprobe.wrapping import wrapped


@dataclass
class Prefix:
    """What one pipeline call computed.

    outputs: per transformer call, in order, its step index and its output, on the CPU. inputs: a hash of the arguments
    of each of these calls. encoded: by name of an encoder, for each of its calls a hash of the arguments, and the
    result.
    """

    outputs: list[tuple[int, Tensor]] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    encoded: dict[str, list[tuple[str, Any]]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Number of steps."""
        return max((step for step, _ in self.outputs), default=-1) + 1


@contextmanager
def recorded(pipeline: Any) -> Iterator[Prefix]:
    """Keeps what the transformers and encoders of one pipeline call compute that is made inside the context.

    Raises InputError for a second call.
    """
    prefix = Prefix()
    with ExitStack() as undo:
        count = undo.enter_context(counted_steps(pipeline))

        def of_model(original: Callable, *args: Any, **kwargs: Any) -> Any:
            prefix.inputs.append(_digest(args, kwargs))
            result = original(*args, **kwargs)
            prefix.outputs.append((count.now, result[0].to("cpu", copy=True)))
            return result

        def begin(original: Callable, *args: Any, **kwargs: Any) -> Any:
            if prefix.outputs or any(prefix.encoded.values()):
                raise InputError("recorded: a second pipeline call; expected one, and a context of its own for each")
            return original(*args, **kwargs)

        undo.enter_context(wrapped(pipeline, "check_inputs", begin))
        for model in experts(pipeline).values():
            undo.enter_context(wrapped(model, "forward", of_model))
        for name, owner, method in _encoders(pipeline):
            undo.enter_context(wrapped(owner, method, _keeping(prefix.encoded.setdefault(name, []))))
        yield prefix


@contextmanager
def replayed(pipeline: Any, prefix: Prefix, steps: int) -> Iterator[None]:
    """Takes the first `steps` steps, and what encoders compute, from `prefix`, in calls made inside the context.

    Hooks on the transformers run in all steps, hooks on their blocks only in the others.
    Raises InputError for more steps than the prefix has, and, in the call, where an encoder, or a transformer in one of
    these steps, gets other arguments than in the first run: other problems, seeds or settings, or a latent that was
    edited. The weights have to be the same; that is not checked.
    """
    if type(steps) is not int or not 0 <= steps <= prefix.steps:
        raise InputError(f"steps={steps!r}: expected 0 to {prefix.steps}, the steps of the recorded run")
    with ExitStack() as undo:
        count = undo.enter_context(counted_steps(pipeline))
        place = _Place()

        def begin(original: Callable, *args: Any, **kwargs: Any) -> Any:
            place.call, place.encoded = 0, Counter()
            return original(*args, **kwargs)

        def of_model(original: Callable, *args: Any, **kwargs: Any) -> Any:
            if count.now >= steps:
                return original(*args, **kwargs)
            same = place.call < len(prefix.outputs) and prefix.outputs[place.call][0] == count.now
            if not same or prefix.inputs[place.call] != _digest(args, kwargs):
                raise InputError(
                    f"transformer call {place.call}, in step {count.now}: its input is not that of the recorded run; "
                    "expected the same pipeline call, with the same problems, seeds and settings, and no edit before "
                    f"step {steps}"
                )
            output = prefix.outputs[place.call][1]
            place.call += 1
            return (output.to(hidden_states(args, kwargs).device, copy=True),)

        def of_encoder(name: str) -> Callable:
            def around(original: Callable, *args: Any, **kwargs: Any) -> Any:
                done, at = prefix.encoded.get(name, []), place.encoded[name]
                place.encoded[name] += 1
                if at >= len(done) or done[at][0] != _digest(args, kwargs):
                    raise InputError(
                        f"{name}: call {at} is not that of the recorded run; expected the same pipeline call, with the "
                        "same problems"
                    )
                return done[at][1]

            return around

        undo.enter_context(wrapped(pipeline, "check_inputs", begin))
        for model in experts(pipeline).values():
            undo.enter_context(wrapped(model, "forward", of_model))
        for name, owner, method in _encoders(pipeline):
            undo.enter_context(wrapped(owner, method, of_encoder(name)))
        yield


@dataclass
class _Place:
    """How far a replayed call has come."""

    call: int = 0
    encoded: Counter[str] = field(default_factory=Counter)


def _encoders(pipeline: Any) -> list[tuple[str, Any, str]]:
    """The parts of a pipeline that encode prompts and images: name, part and method."""
    models = [id(model) for model in experts(pipeline).values()]
    found = []
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and id(part) not in models:
            found.append((name, part, "encode" if hasattr(part, "encode") else "forward"))
    return found


def _keeping(results: list[tuple[str, Any]]) -> Callable:
    def around(original: Callable, *args: Any, **kwargs: Any) -> Any:
        results.append((_digest(args, kwargs), original(*args, **kwargs)))
        return results[-1][1]

    return around


def _digest(*values: Any) -> str:
    """A hash of all tensors, numbers and texts in nested values."""
    digest = hashlib.sha256()
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            digest.update(str((tuple(leaf.shape), leaf.dtype)).encode())
            flat = leaf.detach().cpu().flatten().clone(memory_format=torch.contiguous_format)  # of one row: any stride
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        elif isinstance(leaf, bool | int | float | str):
            digest.update(repr(leaf).encode())
    return digest.hexdigest()
