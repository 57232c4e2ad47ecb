"""Run a pipeline only as far as it takes: read its blocks while it samples, and halt behind one of them.

with halting(pipeline, cells, pooling, enough) as cache:
    video = pipeline(...)
# halted: the later blocks and steps and the decoder have not run, and `video` was never assigned
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cosprobe.activations.capture import ActivationCache, capture
from cosprobe.activations.pooling import Pooling
from cosprobe.cells import Cell
from cosprobe.errors import InputError
from cosprobe.models import block_list, experts


class _Halted(Exception):
    """Leaves a pipeline call from inside a block."""


@contextmanager
def halting(
    pipeline: Any,
    cells: Sequence[Cell],
    pooling: Pooling,
    enough: Callable[[Cell, Float[Tensor, "sample region channel"]], bool],
) -> Iterator[ActivationCache]:
    """Shows `enough` the features of every cell as soon as its block has run, in one call of `pipeline` made inside
    the block, and leaves that call, and what follows it in the block, when the answer is True.

    What was computed until then is what a whole run computes, bit for bit. Nothing is left behind: hooks are removed,
    offloaded parts are freed, and the pipeline is ready for its next call.
    Raises ValueError for cells that are no layers, and what `capture` raises.
    """
    if not cells or not all(cell.is_layer for cell in cells):
        raise InputError(f"cells {[str(c) for c in cells][:3]}: expected at least one, all of them layers")
    at: dict[str, list[Cell]] = {}
    for cell in cells:
        at.setdefault(cell.site, []).append(cell)
    steps = ",".join(str(step) for step in sorted({cell.step for cell in cells}))
    with ExitStack() as undo:
        undo.enter_context(_left(pipeline))
        cache = undo.enter_context(capture(pipeline, sorted(at, key=int), pooling, steps))
        for transformer in experts(pipeline).values():
            for site, here in at.items():
                block = block_list(transformer)[int(site)]  # hooks run in the order of registration: after the cache's
                undo.callback(block.register_forward_hook(_asks(cache, here, pooling, enough)).remove)
        yield cache


def _asks(
    cache: ActivationCache, cells: Sequence[Cell], pooling: Pooling, enough: Callable[[Cell, Tensor], bool]
) -> Callable[..., None]:
    """A hook that shows `enough` each of the cells once, when its features are there."""
    left = list(cells)

    def hook(block: nn.Module, args: tuple, output: Any) -> None:
        for cell in list(left):
            part = cache.parts.get((cell.step, cell.site, cell.branch))
            if part is None:
                continue
            left.remove(cell)
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # the cache copies to the host asynchronously
            places = pooling.places(part.shape[1])[: part.shape[1]]
            if enough(cell, part[:, places.index(cell.place)]):
                raise _Halted

    return hook


@contextmanager
def _left(pipeline: Any) -> Iterator[None]:
    """Ends a call that was left from inside as the pipeline itself would have ended it."""
    try:
        yield
    except _Halted:
        pipeline._current_timestep = None
        pipeline.maybe_free_model_hooks()
