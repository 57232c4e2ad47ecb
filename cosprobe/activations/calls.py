"""Which transformer call of a running pipeline it is: step, guidance branches, expert and token grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from cosprobe.models import (
    COND,
    UNCOND,
    Branches,
    StepCount,
    TokenGrid,
    architecture,
    counted_steps,
    experts,
    hidden_states,
)
from cosprobe.wrapping import wrapped


class RunningCall:
    """The transformer call that runs, or the last one.

    step: step index, -1 before the first call. expert: the transformer. branches: guidance branches, in the order of
    the batch. grid: its token grid. before: number of calls before it in this step. count: the steps of the scheduler
    that are finished.
    """

    count: StepCount

    def __init__(self, pipeline: Any):
        self.pipeline, self.family = pipeline, architecture(pipeline)
        self.step, self.expert, self.before = -1, "", 0
        self.branches: Branches = ()
        self.grid = TokenGrid(0, 0, 0)
        self._context, self._guided = "", False

    def on_model(self, expert: str) -> Callable[..., None]:
        """A pre-forward hook for a transformer."""

        def hook(model: nn.Module, args: tuple, kwargs: dict) -> None:
            if self.step == -1 or self.count.now < self.step:  # a pipeline with dynamic guidance changes its scale
                self._guided = self.family.guided(self.pipeline)
            self.before = self.before + 1 if self.count.now == self.step else 0
            self.step, self.expert = self.count.now, expert
            found = self.family.branches(self._context, self.before, self._guided)
            if found is None:
                raise RuntimeError(
                    f"transformer call {self.before} of step {self.step}, in context {self._context!r}: expected one "
                    f"call for each of {COND} and {UNCOND}"
                )
            self.branches = found
            self.grid = self.family.token_grid(model, hidden_states(args, kwargs), kwargs)

        return hook

    @contextmanager
    def around_context(self, original: Callable, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Wraps `cache_context` of a transformer: remembers the name of the context."""
        outer, self._context = self._context, name
        try:
            with original(name, *args, **kwargs):
                yield
        finally:
            self._context = outer


@contextmanager
def watched_calls(pipeline: Any) -> Iterator[RunningCall]:
    """Follows the transformer calls of the pipeline calls that are made inside the context.

    The step comes from the scheduler, the branch from the guidance of the family (`Architecture.branches`), and the
    expert from the transformer that runs. Raises RuntimeError, in the call, for a branch that cannot be told.
    """
    running = RunningCall(pipeline)
    with ExitStack() as undo:
        running.count = undo.enter_context(counted_steps(pipeline))
        for expert, model in experts(pipeline).items():
            undo.callback(model.register_forward_pre_hook(running.on_model(expert), with_kwargs=True).remove)
            undo.enter_context(wrapped(model, "cache_context", running.around_context))
        yield running
