"""Every architecture keeps the protocol, and what it says agrees with diffusers."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from cosprobe.errors import InputError
from cosprobe.models.architectures import ARCHITECTURES, REFUSED, Architecture, TokenGrid, architecture
from tests.examples.pipelines import wan


@pytest.fixture(params=ARCHITECTURES, ids=lambda one: type(one).__name__)
def known(request) -> Architecture:
    return request.param


def test_it_stands_for_classes_of_diffusers_that_no_other_one_stands_for(known):
    for name in known.transformers:
        assert issubclass(getattr(diffusers, name), nn.Module)
    for name in known.pipelines:
        assert issubclass(getattr(diffusers, name), DiffusionPipeline)
        assert [one for one in ARCHITECTURES if name in one.pipelines] == [known]
        assert name not in REFUSED


def test_video_tokens_can_be_replaced_and_nothing_else_changes(known):
    tokens, text, other = torch.randn(2, 6, 4), torch.randn(2, 3, 4), torch.randn(2, 6, 4)
    output = tokens if known.video_tokens(tokens) is tokens else (tokens, text)
    assert known.video_tokens(output) is tokens
    changed = known.with_video_tokens(output, other)
    assert known.video_tokens(changed) is other
    assert type(changed) is type(output)
    if isinstance(output, tuple):
        assert changed[1] is text and output[0] is tokens


def test_channels_are_where_the_layout_says(known):
    assert sorted(known.layout.split()) == sorted(["b", "c", "f", "h", "w"])
    assert known.layout.split()[known.axis("c")] == "c"


def test_blocks_and_tokens_of_wan_are_those_of_the_transformer():
    pipeline = wan()
    model, family = pipeline.transformer, architecture(pipeline)
    assert family.blocks(model) == list(model.blocks)
    latent = torch.randn(2, model.config.in_channels, 2, 4, 4)
    embedded = model.patch_embedding(latent)  # batch, channel, frame, row, column
    assert family.token_grid(model, latent, {}) == TokenGrid(*embedded.shape[2:])
    tokens, columns = family.latent_tokens(model, latent), family.patch_columns(pipeline, model)
    assert tokens.shape == (2, embedded[0, 0].numel(), columns.noisy + columns.condition)
    assert columns.noisy * model.config.in_channels == tokens.shape[2] * model.config.out_channels


def test_every_refused_pipeline_is_one_of_diffusers():
    for name in REFUSED:
        assert issubclass(getattr(diffusers, name), DiffusionPipeline), name


def test_an_unknown_pipeline_and_an_unknown_transformer_are_named():
    pipeline = wan()
    pipeline.transformer.__class__ = type("NewTransformer", (type(pipeline.transformer),), {})
    with pytest.raises(InputError, match=r"NewTransformer.*WanTransformer3DModel"):
        architecture(pipeline)
    for name, reason in (("NewPipeline", "is not supported yet"), ("HeliosPipeline", REFUSED["HeliosPipeline"])):
        pipeline.__class__ = type(name, (type(pipeline),), {})
        with pytest.raises(InputError, match=rf"{name} {reason}.*WanPipeline.*support\.md"):
            architecture(pipeline)
