"""A halted run computes the same prefix as a whole one, nothing more, and leaves nothing behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cosprobe.activations.capture import capture
from cosprobe.activations.halt import halting
from cosprobe.activations.pooling import Pooling
from cosprobe.cells import Cell
from cosprobe.config import PipelineConfig
from cosprobe.models.pipelines import block_list, experts, sample
from tests.examples.pipelines import CONFIG, PROMPT, wan

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
GUIDED = PipelineConfig(steps=3, frames=5, prompt_tokens=32, guidance=3.0)
POOLING = Pooling("frame")
CELLS = tuple(Cell(step, layer, "cond", "1") for step in range(3) for layer in (0, 1))
STOP = Cell(1, 1, "cond", "1")


@pytest.fixture(scope="module")
def pipeline():
    return wan()


def run(pipeline, config=CONFIG):
    return sample(pipeline, config, IMAGES, [PROMPT] * 2, [11, 12])


class Calls:
    """Which blocks ran, and whether the decoder did."""

    def __init__(self, pipeline):
        self.blocks, self.decoded, self.handles = [], 0, []
        for name, transformer in experts(pipeline).items():
            for layer, block in enumerate(block_list(pipeline, transformer)):
                self.handles.append(
                    block.register_forward_pre_hook(lambda *_, at=(name, layer): self.blocks.append(at))
                )
        self.handles.append(pipeline.vae.decoder.register_forward_pre_hook(self._decodes))

    def _decodes(self, *_):
        self.decoded += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def halt_at(pipeline, cell, config=CONFIG, cells=CELLS):
    seen = {}
    with halting(pipeline, cells, POOLING, lambda at, features: seen.update({at: features}) or at == cell) as cache:
        run(pipeline, config)
        pytest.fail("the run was not halted")
    return seen, cache


def state(pipeline):
    """Whatever a halted run might have left behind."""
    parts = [pipeline, pipeline.scheduler, *experts(pipeline).values()]
    hooks = [
        m for part in experts(pipeline).values() for m in part.modules() if m._forward_hooks or m._forward_pre_hooks
    ]
    return [sorted(vars(part)) for part in parts], hooks, pipeline._interrupt, pipeline._current_timestep


@pytest.mark.parametrize("config", [CONFIG, GUIDED], ids=["plain", "guided"])
def test_the_prefix_is_that_of_a_whole_run_bit_for_bit(pipeline, config):
    with capture(pipeline, ["0", "1"], POOLING) as whole:
        run(pipeline, config)
    seen, cache = halt_at(pipeline, STOP, config)
    assert list(seen) == list(CELLS[:4])
    for cell, features in seen.items():
        at = (cell.step, str(cell.layer), "cond")
        assert torch.equal(cache.parts[at], whole.parts[at])
        assert torch.equal(features, whole.parts[at][:, 1])


@pytest.mark.parametrize(("config", "branches"), [(CONFIG, 1), (GUIDED, 2)], ids=["plain", "guided"])
def test_later_blocks_later_steps_and_the_decoder_do_not_run(pipeline, config, branches):
    with Calls(pipeline) as calls:
        halt_at(pipeline, STOP, config)
    assert [layer for _, layer in calls.blocks] == [0, 1, 2] * branches + [0, 1]
    assert calls.decoded == 0


def test_the_model_and_the_pipeline_are_as_before(pipeline):
    before, kept = run(pipeline), state(pipeline)
    weights = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    halt_at(pipeline, STOP)
    assert state(pipeline) == kept
    assert all(torch.equal(value, weights[name]) for name, value in pipeline.transformer.state_dict().items())
    assert np.array_equal(run(pipeline), before)


def test_a_run_that_is_never_sure_is_finished(pipeline):
    bare, asked = run(pipeline), []
    with halting(pipeline, CELLS, POOLING, lambda cell, features: asked.append(cell) is not None):
        video = run(pipeline)
    assert np.array_equal(video, bare)
    assert asked == list(CELLS)


def test_it_halts_in_whichever_expert_runs():
    pipeline = wan(experts=2)
    with capture(pipeline, ["0"], POOLING) as whole:
        run(pipeline)
    switch = next(step for step, expert in whole.experts.items() if expert == "low")
    last = Cell(switch, 1, "cond", "1")
    with Calls(pipeline) as calls:
        halt_at(pipeline, last, cells=(*CELLS[:2], last))
    assert calls.blocks[-1] == ("low", 1)
    assert {name for name, _ in calls.blocks[:-2]} == {"high"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_goes_wrong_in_a_run_is_not_swallowed(pipeline, error):
    run(pipeline)
    kept = state(pipeline)[:2]

    def breaks(cell, features):
        raise error("here")

    with pytest.raises(error, match="here"), halting(pipeline, CELLS, POOLING, breaks):
        run(pipeline)
    assert state(pipeline)[:2] == kept


def test_a_halt_needs_a_cell(pipeline):
    with (
        pytest.raises(ValueError, match=r"cells.*\bnone\b.*\bone\b"),
        halting(pipeline, (), POOLING, lambda *_: True),
    ):
        pass
