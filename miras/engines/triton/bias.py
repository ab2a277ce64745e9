"""Device functions of the biases: the gradient u of a loss by its prediction, and the way back through it.

Formulas and sources are in `miras.bias`, names in `model`. Tiles y, v, gate
[tokens, D]; a gate per token is the same in all channels.
"""

# Kernels are written in the language of Triton, whose values have other types than Python sees.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from miras.bias import huber, lp, robust
from miras.engines.triton.parts import tanh

LP_EPS = tl.constexpr(lp.EPS)
HUBER_EPS = tl.constexpr(huber.EPS)
ROBUST_EPS = tl.constexpr(robust.EPS)


@triton.jit
def power(x, EXPONENT: tl.constexpr):
    """x^EXPONENT for x >= 0, without a logarithm where there is a shorter way."""
    if EXPONENT == 0.0:
        return tl.full(x.shape, 1.0, x.dtype)
    elif EXPONENT == 0.5:
        return tl.sqrt(x)
    elif EXPONENT == 1.0:
        return x
    elif EXPONENT == 2.0:
        return x * x
    elif EXPONENT == -0.5:
        return 1 / tl.sqrt(x)
    else:
        return tl.exp(tl.log(x) * EXPONENT)


@triton.jit
def dot(a, b):
    """<a, b> of each token, [tokens, 1]."""
    return tl.sum(a * b, 1)[:, None]


@triton.jit
def shorten(u, limit):
    """u min(1, sqrt(limit) / ||u||) of each token."""
    return u * tl.sqrt(limit / tl.maximum(dot(u, u), limit))


@triton.jit
def shorten_back(cotangent, u, limit):
    """The cotangent of u."""
    size = tl.maximum(dot(u, u), limit)
    along = tl.where(dot(u, u) > limit, dot(u, cotangent) / size, 0.0)
    return (cotangent - u * along) * tl.sqrt(limit / size)


@triton.jit
def gradient(y, v, gate, D: tl.constexpr, MODEL: tl.constexpr):
    """dL/dy, before `clip`."""
    r = y - v
    if MODEL.bias == "dot":
        return -v
    elif MODEL.bias == "l2":
        return r
    elif MODEL.bias == "lp_smooth":
        return r * power(r * r + LP_EPS, (MODEL.p - 2) / 2) * MODEL.p
    elif MODEL.bias == "lp_paper":
        return tanh(r * MODEL.sharpness) * power(r * r + LP_EPS, (MODEL.p - 1) / 2) * MODEL.p
    elif MODEL.bias == "huber_coordinate":
        return tl.minimum(tl.maximum(r, -gate), gate)
    elif MODEL.bias == "huber_norm":
        return shorten(r, gate * gate)
    elif MODEL.bias == "huber_mixture":
        return tl.where(dot(r, r) <= gate * gate * D, r, gate * r / tl.sqrt(r * r + HUBER_EPS))
    else:
        tl.static_assert(MODEL.bias == "robust")
        return r + gate * r / tl.sqrt(dot(r, r) + ROBUST_EPS)


@triton.jit
def gradient_back(cotangent, y, v, gate, D: tl.constexpr, MODEL: tl.constexpr):
    """The cotangents of y, v and the gate (the latter to be summed over the channels) from that of `gradient`."""
    r = y - v
    to_r = cotangent
    to_gate = tl.zeros_like(cotangent)
    if MODEL.bias == "dot":
        return to_gate, -cotangent, to_gate
    elif MODEL.bias == "lp_smooth":
        square = r * r + LP_EPS
        to_r = cotangent * power(square, (MODEL.p - 4) / 2) * (r * r * (MODEL.p - 1) + LP_EPS) * MODEL.p
    elif MODEL.bias == "lp_paper":
        square, t = r * r + LP_EPS, tanh(r * MODEL.sharpness)
        slope = (1 - t * t) * power(square, (MODEL.p - 1) / 2) * MODEL.sharpness + t * r * power(
            square, (MODEL.p - 3) / 2
        ) * (MODEL.p - 1)
        to_r = cotangent * slope * MODEL.p
    elif MODEL.bias == "huber_coordinate":
        to_gate = tl.where(r > gate, cotangent, tl.where(r < -gate, -cotangent, 0.0))
        to_r = tl.where(tl.abs(r) <= gate, cotangent, 0.0)
    elif MODEL.bias == "huber_norm":
        limit = gate * gate
        to_gate = tl.where(dot(r, r) > limit, cotangent * r / tl.sqrt(tl.maximum(dot(r, r), limit)), 0.0)
        to_r = shorten_back(cotangent, r, limit)
    elif MODEL.bias == "huber_mixture":
        ordinary, size = dot(r, r) <= gate * gate * D, r * r + HUBER_EPS
        to_gate = tl.where(ordinary, 0.0, cotangent * r / tl.sqrt(size))
        to_r = tl.where(ordinary, cotangent, cotangent * gate * power(size, -1.5) * HUBER_EPS)
    elif MODEL.bias == "robust":
        norm = tl.sqrt(dot(r, r) + ROBUST_EPS)
        to_gate = cotangent * r / norm
        to_r = cotangent + gate * (cotangent - r * dot(r, cotangent) / (norm * norm)) / norm
    else:
        tl.static_assert(MODEL.bias == "l2")
    return to_r, -to_r, to_gate
