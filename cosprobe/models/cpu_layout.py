"""The same models, their arithmetic arranged as CPUs are fast at it.

Nothing is approximated and no weight changes: outputs agree with diffusers' own up to the last bits.
"""

from __future__ import annotations

from types import MethodType

import torch
from diffusers.models.activations import GELU
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm
from diffusers.models.transformers.transformer_wan import WanAttention
from jaxtyping import Complex, Float
from torch import Tensor, nn

SLOPE, CUBIC = 1.5957691216057308, 0.044715  # of the tanh form of GELU; the slope is sqrt(8 / pi)


def arrange(*models: nn.Module) -> None:
    """Arranges autoencoders and transformers, in place; what is not known here stays as it is."""
    for model in models:
        channels_last(model)
        for part in model.modules():
            if isinstance(part, GELU) and part.approximate == "tanh":
                part.gelu = _gelu
            elif isinstance(part, WanAttention) and not part.is_cross_attention:
                _rotate_at_once(part)
            elif isinstance(part, WanCausalConv3d):
                _pad_inside(part)
            elif isinstance(part, WanRMS_norm):
                part.forward = MethodType(_rms, part)


def channels_last(model: nn.Module) -> nn.Module:
    """Weights of 3-D convolutions in the order CPUs compute them fastest in: videos are coded in half the time."""
    for part in model.modules():
        if isinstance(part, nn.Conv3d):
            part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last_3d)
    return model


def _gelu(x: Tensor) -> Tensor:
    """GELU with tanh, (1 + tanh(u)) / 2 written as sigmoid(2 u): half the time, torch's CPU tanh is slow."""
    return x * torch.sigmoid((x * x).mul_(SLOPE * CUBIC).add_(SLOPE) * x)


def _pad_inside(convolution: WanCausalConv3d) -> None:
    """Lets the convolution itself see zeros around each frame, where diffusers copies the video into a larger one; the
    frames before the first, which are not the same on both sides, stay as they are."""
    left, right, top, bottom, before, after = convolution._padding
    if (left, top) == (right, bottom) and convolution.padding == (0, 0, 0):
        convolution.padding, convolution._padding = (0, top, left), (0, 0, 0, 0, before, after)


def _rms(norm: WanRMS_norm, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The norm of an autoencoder: its two factors as one, and no bias of zero is added."""
    if x.dtype not in (torch.float32, torch.float64):
        return WanRMS_norm.forward(norm, x)
    length = torch.linalg.vector_norm(x, dim=1 if norm.channel_first else -1, keepdim=True).clamp_min(1e-12)
    scaled = x * (norm.gamma * norm.scale) / length
    return scaled + norm.bias if isinstance(norm.bias, Tensor) else scaled


def _rotate_at_once(attention: WanAttention) -> None:
    """Rotary embedding of queries and keys as one complex product each, where diffusers goes over every second
    channel: an eighth of its time. The norms before the embedding apply it, the processor is given none."""
    turn: list[Tensor] = []

    def take(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        hidden, context, mask, rotary = (*args, None, None, None)[:4]
        turn.clear()
        if kwargs or rotary is None or hidden.dtype != torch.float32:
            return None
        turn.append(torch.complex(rotary[0][..., 0::2].contiguous(), rotary[1][..., 1::2].contiguous()))
        return (hidden, context, mask, None), kwargs

    def rotate(norm: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        return _rotated(output, turn[0], attention.heads) if turn else None

    attention.register_forward_pre_hook(take, with_kwargs=True)
    for norm in (attention.norm_q, attention.norm_k):
        norm.register_forward_hook(rotate)


def _rotated(
    tokens: Float[Tensor, "batch token channel"], turn: Complex[Tensor, "1 token 1 pair"], heads: int
) -> Float[Tensor, "batch token channel"]:
    """Pairs of neighbouring channels turned, alike in every head."""
    pairs = torch.view_as_complex(tokens.unflatten(-1, (heads, -1, 2)))
    return torch.view_as_real(pairs * turn).flatten(2)
