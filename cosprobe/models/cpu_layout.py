"""Faster implementations of some operations of autoencoders and transformers on CPUs.

Nothing is approximated and no weight changes. Outputs equal those of diffusers up to rounding errors.
"""

from __future__ import annotations

from types import MethodType

import torch
from diffusers.models.activations import GELU
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm
from diffusers.models.transformers.transformer_wan import WanAttention
from jaxtyping import Complex, Float
from torch import Tensor, nn

SLOPE, CUBIC = 1.5957691216057308, 0.044715  # constants of the tanh approximation of GELU; SLOPE = sqrt(8 / pi)


def arrange(*models: nn.Module) -> None:
    """Replaces slow operations of autoencoders and transformers, in place. Modules of other types do not change."""
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
            elif isinstance(part, nn.RMSNorm) and len(part.normalized_shape) == 1 and part.weight is not None:
                part.forward = MethodType(_root_mean_square, part)


def channels_last(model: nn.Module) -> nn.Module:
    """Stores weights of 3-D convolutions in channels-last order, in place. This halves the time of the autoencoder."""
    for part in model.modules():
        if isinstance(part, nn.Conv3d):
            part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last_3d)
    return model


def _gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU, with (1 + tanh(u)) / 2 = sigmoid(2 u). Takes half the time, as tanh is slow on CPUs.

    All but the first operation are in place, because writing to new memory takes most of their time.
    """
    if _differentiated(x):
        return x * torch.sigmoid((x * x).mul_(SLOPE * CUBIC).add_(SLOPE) * x)
    return (x * x).mul_(SLOPE * CUBIC).add_(SLOPE).mul_(x).sigmoid_().mul_(x)


def _pad_inside(convolution: WanCausalConv3d) -> None:
    """Moves the spatial zero padding into the convolution. Diffusers copies the video into a larger tensor instead.

    Padding in time differs before and after the video, so it is still done by diffusers.
    """
    left, right, top, bottom, before, after = convolution._padding
    if (left, top) == (right, bottom) and convolution.padding == (0, 0, 0):
        convolution.padding, convolution._padding = (0, top, left), (0, 0, 0, 0, before, after)


def _rms(norm: WanRMS_norm, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The RMS norm of the Wan autoencoder, with its two factors multiplied first and without adding a bias of zero."""
    if x.dtype not in (torch.float32, torch.float64):
        return WanRMS_norm.forward(norm, x)
    length = torch.linalg.vector_norm(x, dim=1 if norm.channel_first else -1, keepdim=True).clamp_min(1e-12)
    scaled = x * (norm.gamma * norm.scale) / length
    return scaled + norm.bias if isinstance(norm.bias, Tensor) else scaled


def _root_mean_square(norm: nn.RMSNorm, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The RMS norm of torch, with one new tensor in place of four. The bits are those of torch."""
    if x.dtype != torch.float32 or norm.eps is None or _differentiated(x, norm.weight):
        return nn.RMSNorm.forward(norm, x)
    squares = x * x
    scale = squares.mean(dim=-1, keepdim=True).add_(norm.eps).rsqrt_()
    return torch.mul(x, scale, out=squares).mul_(norm.weight)


def _rotate_at_once(attention: WanAttention) -> None:
    """Computes the rotary embedding of queries and keys as one complex product each, in an eighth of the time.

    Forward hooks on the query and key norms, which come before the embedding, apply it. The attention processor is
    then called without a rotary embedding. Diffusers multiplies even and odd channels separately.
    """
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
    """Rotates pairs of neighbouring channels, equally in all heads; in place, outside of training."""
    pairs = torch.view_as_complex(tokens.unflatten(-1, (heads, -1, 2)))
    if _differentiated(tokens):
        return torch.view_as_real(pairs * turn).flatten(2)
    pairs.mul_(turn)
    return tokens


def _differentiated(*tensors: Tensor) -> bool:
    """Whether a gradient of one of these tensors may be asked for, so that no value may be overwritten."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
