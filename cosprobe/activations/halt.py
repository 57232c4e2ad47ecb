"""Ends a pipeline call early, after the block of a given step and layer.

with halting(pipeline, cells, pooling, enough) as cache:
    video = pipeline(...)
# when halted: later blocks, later steps and the decoder did not run, and `video` is not assigned
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from cosprobe.activations.capture import ActivationCache, capture
from cosprobe.activations.pooling import Pooling
from cosprobe.cells import Cell
from cosprobe.errors import InputError
from cosprobe.models import block_list, experts


class _Halted(Exception):
    """Raised in a forward hook to leave a pipeline call."""


@contextmanager
def halting(
    pipeline: Any,
    cells: Sequence[Cell],
    pooling: Pooling,
    enough: Callable[[Cell, Float[Tensor, "sample region channel"]], bool],
) -> Iterator[ActivationCache]:
    """Calls `enough(cell, features)` as soon as the features of a cell exist, during one call of `pipeline`.

    cells: the cells to read. pooling: of their features. enough: returns True to halt. The pipeline call is then left,
    and so is the rest of the context.
    Until then, the values are bit-identical to those of a complete run. Afterwards hooks are removed, offloaded parts
    are freed, and the pipeline can be called again.
    Raises InputError when `cells` is empty, and the errors of `capture`.
    """
    if not cells:
        raise InputError("cells: none, expected at least one cell")
    at: dict[int, list[Cell]] = {}
    for cell in cells:
        at.setdefault(cell.layer, []).append(cell)
    steps = ",".join(str(step) for step in sorted({cell.step for cell in cells}))
    with ExitStack() as undo:
        undo.enter_context(_left(pipeline))
        cache = undo.enter_context(capture(pipeline, list(map(str, sorted(at))), pooling, steps))
        for transformer in experts(pipeline).values():
            for layer, here in at.items():
                block = block_list(pipeline, transformer)[layer]  # its hook runs after that of `capture`
                undo.callback(block.register_forward_hook(_halting_hook(cache, here, enough)).remove)
        yield cache


def _halting_hook(
    cache: ActivationCache, cells: Sequence[Cell], enough: Callable[[Cell, Tensor], bool]
) -> Callable[..., None]:
    """A forward hook that calls `enough` once for each of the cells, as soon as its features exist."""
    left = list(cells)

    def hook(block: nn.Module, args: tuple, output: Any) -> None:
        for cell in list(left):
            if (cell.step, str(cell.layer), cell.branch) not in cache.parts:
                continue
            left.remove(cell)
            cache.wait()
            if enough(cell, cache.at(cell)):
                raise _Halted

    return hook


@contextmanager
def _left(pipeline: Any) -> Iterator[None]:
    """Catches `_Halted` and does what the pipeline does at the end of a call."""
    try:
        yield
    except _Halted:
        pipeline._current_timestep = None
        pipeline.maybe_free_model_hooks()
