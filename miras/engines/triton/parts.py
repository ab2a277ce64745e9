"""Device functions that kernels share: products, activations with two derivatives, LN with two derivatives.

Tiles are [tokens, channels] or [tokens, hidden]; a tile's tokens beyond the chunk hold zeros. In the interpreter a
constexpr must stand to the right of a tensor that it is multiplied with.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import knobs

# Triton's interpreter multiplies the bit patterns of bfloat16: there operands are rounded and widened again.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
TANH_SCALE = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
TANH_CUBE = tl.constexpr(0.044715)

# What operands of products are rounded to, by the dtype of autocast or of the tensors.
OPERANDS = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def sum_dtype(operands: torch.dtype) -> torch.dtype:
    """The dtype of sums of products of these."""
    return torch.promote_types(operands, torch.float32)


class Rounding:
    """A problem whose products round their operands to `operand`."""

    operand: tl.dtype

    @property
    def sum(self) -> tl.dtype:
        """The dtype of sums and of what is elementwise."""
        return tl.float64 if self.operand == tl.float64 else tl.float32


# -- products ---------------------------------------------------------------------------------------------------------


@triton.jit
def operand(x, OPERAND: tl.constexpr):
    """A tile as products take it."""
    x = x.to(OPERAND)
    if INTERPRETED and OPERAND != tl.float64:
        x = x.to(tl.float32)
    return x


@triton.jit
def add_product(total, a, b, OPERAND: tl.constexpr):
    """total + a b: operands rounded, sums in the dtype of `total`, float32 or float64."""
    return tl.dot(operand(a, OPERAND), operand(b, OPERAND), acc=total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def product(a, b, OPERAND: tl.constexpr, SUM: tl.constexpr):
    """a b, with sums in `SUM`."""
    return tl.dot(operand(a, OPERAND), operand(b, OPERAND), input_precision="ieee", out_dtype=SUM)


# -- tiles ------------------------------------------------------------------------------------------------------------


@triton.jit
def channels(vector, D: tl.constexpr, WIDTH: tl.constexpr):
    """A vector [D, 1], or one number for all channels [1, 1]."""
    return tl.load(vector + tl.arange(0, D if WIDTH > 1 else 1)[:, None])


@triton.jit
def load(at, t, LIMIT: tl.constexpr, other=0.0):
    """What stands at [T, ..] for the tokens t [T] of a chunk; `other` beyond its length LIMIT, if that is not 0."""
    return tl.load(at) if LIMIT == 0 else tl.load(at, mask=t[:, None] < LIMIT, other=other)


@triton.jit
def save(at, x, t, LIMIT: tl.constexpr):
    """Store [T, ..] for the tokens t of a chunk."""
    if LIMIT == 0:
        tl.store(at, x)
    else:
        tl.store(at, x, mask=t[:, None] < LIMIT)


@triton.jit
def rows(matrix, t, columns, WIDTH: tl.constexpr, LIMIT: tl.constexpr, other=0.0):
    """Rows t and some columns of a matrix of that width; of a chunk's tokens, or of whatever else with LIMIT 0."""
    return load(matrix + t[:, None] * WIDTH + columns[None, :], t, LIMIT, other)


@triton.jit
def save_rows(matrix, t, columns, x, WIDTH: tl.constexpr, LIMIT: tl.constexpr):
    """The reverse."""
    save(matrix + t[:, None] * WIDTH + columns[None, :], x, t, LIMIT)


@triton.jit
def tokens(chunk, t, LIMIT: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, other=0.0):
    """The tokens t of a chunk, [T, D], or one number for each, [T, 1]."""
    return rows(chunk, t, tl.arange(0, D if WIDTH > 1 else 1), WIDTH, LIMIT, other)


@triton.jit
def save_tokens(chunk, t, x, LIMIT: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """The reverse."""
    save_rows(chunk, t, tl.arange(0, D if WIDTH > 1 else 1), x, WIDTH, LIMIT)


@triton.jit
def narrowed(x, AXIS: tl.constexpr, WIDTH: tl.constexpr):
    """What a tile's cotangent is to one that was the same along an axis."""
    return tl.sum(x, AXIS, keep_dims=True) if WIDTH <= 1 else x


@triton.jit
def save_channels(vector, x, D: tl.constexpr, WIDTH: tl.constexpr):
    """Store a vector [D, 1] or a number [1, 1]."""
    tl.store(vector + tl.arange(0, D if WIDTH > 1 else 1)[:, None], x)


# -- activations: s(a), s'(a), s''(a) ---------------------------------------------------------------------------------


@triton.jit
def tanh(x):
    """By the one transcendental function that every backend has."""
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def activation(a, NAME: tl.constexpr):
    """s(a), see `miras.memory.activation`."""
    if NAME == "gelu":
        return 0.5 * a * (1 + tl.erf(a * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        return 0.5 * a * (1 + tanh((a + a * a * a * TANH_CUBE) * TANH_SCALE))
    else:
        tl.static_assert(NAME == "silu")
        return a * tl.sigmoid(a)


@triton.jit
def slope(a, NAME: tl.constexpr):
    """s'(a)."""
    if NAME == "gelu":
        return 0.5 * (1 + tl.erf(a * 0.7071067811865476)) + a * DENSITY_AT_0 * tl.exp(-0.5 * a * a)
    elif NAME == "gelu_tanh":
        t = tanh((a + a * a * a * TANH_CUBE) * TANH_SCALE)
        return 0.5 * (1 + t) + 0.5 * a * (1 - t * t) * (1 + a * a * TANH_CUBE * 3) * TANH_SCALE
    else:
        tl.static_assert(NAME == "silu")
        s = tl.sigmoid(a)
        return s * (1 + a * (1 - s))


@triton.jit
def curvature(a, NAME: tl.constexpr):
    """s''(a)."""
    if NAME == "gelu":
        return tl.exp(-0.5 * a * a) * (2 - a * a) * DENSITY_AT_0
    elif NAME == "gelu_tanh":
        t = tanh((a + a * a * a * TANH_CUBE) * TANH_SCALE)
        first = (1 + a * a * TANH_CUBE * 3) * TANH_SCALE
        return (1 - t * t) * (first + a * (a * TANH_CUBE * TANH_SCALE * 3 - t * first * first))
    else:
        tl.static_assert(NAME == "silu")
        s = tl.sigmoid(a)
        return s * (1 - s) * (2 + a * (1 - 2 * s))


# -- LN over the channels: n = (z - mean z) rstd ----------------------------------------------------------------------


@triton.jit
def mean(x, D: tl.constexpr):
    """Over the channels, [tokens, 1]."""
    return tl.sum(x, 1)[:, None] / D


@triton.jit
def norm(z, EPS: tl.constexpr, D: tl.constexpr):
    """N [tokens, D], rstd [tokens, 1]."""
    centred = z - mean(z, D)
    rstd = 1 / tl.sqrt(mean(centred * centred, D) + EPS)
    return centred * rstd, rstd


@triton.jit
def norm_back(w, n, rstd, D: tl.constexpr):
    """The cotangent u of z from the cotangent w of n: u = rstd (w - mean w - n mean(w n)), linear and symmetric."""
    return rstd * (w - mean(w, D) - n * mean(w * n, D))


@triton.jit
def norm_back_back(cotangent, w, n, rstd, D: tl.constexpr):
    """The cotangents of w, and of z through n and rstd, from that of u = norm_back(w, n, rstd)."""
    to_w = norm_back(cotangent, n, rstd, D)
    u = norm_back(w, n, rstd, D)
    to_n = -rstd * (mean(w * n, D) * cotangent + mean(cotangent * n, D) * w)
    return to_w, norm_back(to_n, n, rstd, D) - rstd * n * mean(cotangent * u, D)
