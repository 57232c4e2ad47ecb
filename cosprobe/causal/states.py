"""Records the hidden states of a run, so that they can be given to another one.

with record_states(pipeline, layers=[20], steps=[0]) as states:
    pipeline(...)                                     # the donor
with patch(pipeline, [Edit("swap", steps=(0,), layers=(20,), source="donor")], {"donor": states}):
    video = pipeline(...)                             # the host
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from cosprobe.activations import check_layers, watched_calls
from cosprobe.causal.patching import At
from cosprobe.models import architecture, block_list, experts


@contextmanager
def record_states(
    pipeline: Any, layers: Sequence[int], steps: Sequence[int]
) -> Iterator[dict[At, Float[Tensor, "batch token channel"]]]:
    """Records the outputs of the blocks `layers` at `steps` (step indices) in the call that is made inside the context.

    Yields a dictionary that holds them after the call, on the CPU, by step, layer and guidance branch: the form in
    which `patch` takes the source of a swap. All video tokens are kept: a state of a large model takes hundreds of
    megabytes. Raises InputError for a layer that the transformer does not have.
    """
    family, found = architecture(pipeline), dict[At, Tensor]()

    def keep(layer: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple, output: Any) -> None:
            if call.step in steps:
                halves = family.video_tokens(output).chunk(len(call.branches))
                for branch, half in zip(call.branches, halves, strict=True):
                    found[At(call.step, layer, branch)] = half.detach().to("cpu", copy=True)

        return hook

    with ExitStack() as undo:
        call = undo.enter_context(watched_calls(pipeline))
        for model in experts(pipeline).values():
            blocks = block_list(pipeline, model)
            check_layers(layers, len(blocks))
            for layer in layers:
                undo.callback(blocks[layer].register_forward_hook(keep(layer)).remove)
        yield found
