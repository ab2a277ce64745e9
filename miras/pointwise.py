"""The element-wise parts of a layer: the short convolution before its memory, the gated norm after it.

On a CPU they are in C++ (`miras.engines.native.pointwise`), in the dtype of the parameters: what autocast has rounded
is not rounded again. What is here is for GPUs, for other dtypes and head sizes and for CPUs without a compiler; on
these it works on some tokens at a time, so few that the cache holds all that is between input and output. Nothing of
that is kept for the way back, which computes it again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from miras.engines.native import pointwise as native
from miras.layout import Layout, take

# Tokens at a time, on a CPU; elsewhere all.
BLOCK = 128
# The least norm of a query or a key that is scaled to 1.
EPS = 1e-6


def _blocks(tokens: int, device: torch.device) -> list[slice]:
    size = BLOCK if device.type == "cpu" else tokens
    return [slice(t, min(t + size, tokens)) for t in range(0, tokens, size)]


class ShortConv(nn.Module):
    """Causal depthwise convolution over the last `width` tokens of each sequence, then SiLU; queries and keys then get
    norm 1, head by head, and values norm `rest` if that is not 0.

    Args:
        channels: number of channels.
        width: tokens seen, the present one included.
        unit: channels that get norm 1, from the first on.
        size: channels of a head.
        rest: norm of the heads behind these, 0: as they are.
    """

    def __init__(self, channels: int, width: int, unit: int = 0, size: int = 1, rest: float = 0.0) -> None:
        super().__init__()
        self.width, self.unit, self.size, self.rest = width, unit, size, rest
        self.weight = nn.Parameter(torch.empty(width, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform as PyTorch's own convolutions are."""
        nn.init.uniform_(self.weight, -1 / math.sqrt(self.width), 1 / math.sqrt(self.width))

    def forward(self, x: Tensor, state: Tensor | None, where: Layout) -> tuple[Tensor, Tensor]:
        """x [B, T, C], the last width - 1 inputs of each sequence [N, width - 1, C] -> y [B, T, C], the next state."""
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        kernel = where.dense and native.runs(x.device, dtype, self.size)
        x = x.to(dtype) if kernel else x
        if state is None:
            state = x.new_zeros(where.rows, self.width - 1, x.shape[-1])
        state = state.to(x.dtype)
        if where.dense:
            given = state, x, self.weight.to(x.dtype), self.unit, self.size, self.rest
            y = native.short_conv(*given, EPS) if kernel else _Convolved.apply(*given)
            assert isinstance(y, Tensor)
            return y, torch.cat([state[:, where.length :], x[:, max(where.length - self.width + 1, 0) :]], 1)
        source = torch.cat([x.flatten(0, 1), state.flatten(0, 1)])
        y = torch.zeros_like(x)
        for lag, weight in enumerate(self.weight.flip(0)):
            token = torch.where(where.valid, where.place(where.row, where.rank - lag, self.width - 1), -1)
            y = y + take(source, token) * weight
        y = F.silu(y)
        heads = y.unflatten(-1, (-1, self.size))
        unit, rest = heads.split([self.unit // self.size, heads.shape[-2] - self.unit // self.size], -2)
        y = torch.cat([to_norm(unit, 1.0), to_norm(rest, self.rest) if self.rest else rest], -2).flatten(-2)
        rows = torch.arange(where.rows, device=x.device)[:, None]
        last = where.count[:, None] + torch.arange(1 - self.width, 0, device=x.device)
        after = take(source, where.place(rows, last, self.width - 1))
        return y, after


class _Convolved(torch.autograd.Function):
    """z_t = silu(sum_j w_j x_{t - J + j}) for x [B, T, C] after the J inputs before, [B, J, C], and w [J + 1, C]; heads
    that get a norm n as n z / |z|.

    PyTorch's own backward of a depthwise convolution takes three times as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, before: Tensor, x: Tensor, weight: Tensor, *norms: Any) -> Tensor:
        ctx.save_for_backward(before, x, weight)
        ctx.norms = norms
        y = torch.empty_like(x)
        for block in _blocks(x.shape[1], x.device):
            z = F.silu(_taps(_window(before, x, block), weight), inplace=True)
            heads, scale, _ = _normed(z, *norms)
            heads.mul_(scale)
            y[:, block] = z
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        before, x, weight = ctx.saved_tensors
        to_before, to_x, to_weight = torch.zeros_like(before), torch.zeros_like(x), torch.zeros_like(weight)
        for block in _blocks(x.shape[1], x.device):
            window, above = _window(before, x, block), grad[:, block]
            taps = _taps(window, weight)
            heads, scale, square = _normed(F.silu(taps), *ctx.norms)
            above = above.clone()
            to_heads = above[..., : heads.shape[-2] * heads.shape[-1]].unflatten(-1, heads.shape[-2:])
            along = (to_heads * heads).sum(-1, keepdim=True).div_(square)
            to_heads.addcmul_(heads, along, value=-1).mul_(scale)
            u, to_window = torch.ops.aten.silu_backward(above, taps), torch.zeros_like(window)
            for j, tap in enumerate(weight):
                seen = slice(j, j + u.shape[1])
                to_window[:, seen].addcmul_(u, tap)
                to_weight[j] += (u * window[:, seen]).sum((0, 1))
            old = max(before.shape[1] - block.start, 0)
            to_before[:, block.start :] += to_window[:, :old]
            to_x[:, block.start + old - before.shape[1] : block.stop] += to_window[:, old:]
        return to_before, to_x, to_weight, None, None, None


def _window(before: Tensor, x: Tensor, block: slice) -> Tensor:
    """What the convolution at some tokens sees."""
    begin = block.start - before.shape[1]
    return x[:, begin : block.stop] if begin >= 0 else torch.cat([before[:, block.start :], x[:, : block.stop]], 1)


def _taps(window: Tensor, weight: Tensor) -> Tensor:
    """The convolution where all of its taps see something."""
    length = window.shape[1] - weight.shape[0] + 1
    y = window[:, :length] * weight[0]
    for j, tap in enumerate(weight[1:], 1):
        y.addcmul_(window[:, j : j + length], tap)
    return y


def to_norm(heads: Tensor, norm: float) -> Tensor:
    """Heads [..., d] at a norm, 0 as it is."""
    return F.normalize(heads, dim=-1, eps=EPS) * norm


def _normed(z: Tensor, unit: int, size: int, rest: float) -> tuple[Tensor, Tensor, Tensor]:
    """A view of the heads that get a norm, what to multiply each with, and its squared norm, inf if it is too short."""
    heads = (z if rest else z[..., :unit]).unflatten(-1, (-1, size))
    norm = torch.linalg.vector_norm(heads, dim=-1, keepdim=True)
    scale = norm.clamp_min(EPS).reciprocal_()
    scale[..., unit // size :, :] *= rest
    return heads, scale, torch.where(norm > EPS, norm.square(), torch.inf)


class GatedNorm(nn.RMSNorm):
    """Each head's output over its root mean square, times a gate: y = w (.) x / rms(x) (.) silu(g)."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        """x and g [B, T, H, d] -> y [B, T, H, d]."""
        given = torch.promote_types(gate.dtype, self.weight.dtype)
        dtype = torch.promote_types(x.dtype, given)
        if native.runs(x.device, dtype, x.shape[-1]):
            y = native.gated_norm(x.to(dtype), self.weight.to(dtype), gate.to(dtype), self.eps).to(given)
        else:
            y = _GatedNorm.apply(x, self.weight, gate, self.eps)
        assert isinstance(y, Tensor)
        return y


class _GatedNorm(torch.autograd.Function):
    """In float32 at least: what autocast has rounded is not rounded again before the end."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, gate)
        ctx.eps = eps
        y = torch.empty_like(x, dtype=torch.promote_types(weight.dtype, gate.dtype))
        for block in _blocks(x.shape[1], x.device):
            unit, _, g = _parts(x, gate, block, eps)
            y[:, block] = unit.mul_(weight).mul_(F.silu(g))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, gate = ctx.saved_tensors
        grad_x, grad_gate = torch.empty_like(x), torch.empty_like(gate)
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for block in _blocks(x.shape[1], x.device):
            unit, scale, g = _parts(x, gate, block, ctx.eps)
            above = grad[:, block] * unit
            lit = F.silu(g)
            grad_gate[:, block] = torch.ops.aten.silu_backward(above * weight, g)
            grad_weight += above.mul_(lit).sum((0, 1, 2))
            to_unit = lit.mul_(grad[:, block]).mul_(weight)
            along = above.mul_(weight).mean(-1, keepdim=True)
            grad_x[:, block] = to_unit.addcmul_(unit, along, value=-1).mul_(scale)
        return grad_x, grad_weight.to(weight.dtype), grad_gate, None


def _parts(x: Tensor, gate: Tensor, block: slice, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x / rms(x), 1 / rms(x) and the gate at some tokens."""
    x = x[:, block].to(torch.promote_types(x.dtype, torch.float32))
    scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x * scale, scale, gate[:, block].to(x.dtype)
