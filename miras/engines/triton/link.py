"""Device functions of the links W = link(F), F the full dual, and of the way back; see `miras.retention`.

A matrix is looked at as [D, hidden] whichever way it lies, in tiles [D, BLOCK]; KL's softmax runs along the hidden axis
of both matrices. What a link needs of the whole matrix are two vectors [D].
"""

# Kernels are written in the language of Triton, whose values have other types than Python sees.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from miras.engines.triton.bias import power
from miras.retention import lq

EPS = tl.constexpr(lq.EPS)


@triton.jit
def full(dual, home, at, MODEL: tl.constexpr):
    """A tile of the dual itself, from the one that is stored relative to `home`."""
    tile = tl.load(dual + at)
    return tile + tl.load(home + at) if MODEL.home else tile


@triton.jit
def statistics(
    dual,
    home,
    ACROSS: tl.constexpr,
    ALONG: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    MODEL: tl.constexpr,
):
    """What the link needs of a matrix with the strides ACROSS of the hidden axis and ALONG of the channels."""
    at = tl.arange(0, D)[:, None] * ALONG + tl.arange(0, BLOCK)[None, :] * ACROSS
    total = tl.zeros((D,), dual.dtype.element_ty)
    if MODEL.link == "identity" or MODEL.link == "logistic":
        return total, total
    elif MODEL.link == "kl":
        top = total - float("inf")
        for begin in range(0, HIDDEN, BLOCK):
            tile = full(dual, home, at + begin * ACROSS, MODEL)
            higher = tl.maximum(top, tl.max(tile, 1))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(tile - higher[:, None]), 1)
            top = higher
        return top, UNIT / total
    else:
        for begin in range(0, HIDDEN, BLOCK):
            tile = full(dual, home, at + begin * ACROSS, MODEL)
            total += tl.sum(power(tile * tile, MODEL.q / 2), 1)
        return whole(tl.zeros_like(total) + tl.sum(total, 0), D, HIDDEN, UNIT, MODEL)


@triton.jit
def whole(total, D: tl.constexpr, HIDDEN: tl.constexpr, UNIT: tl.constexpr, MODEL: tl.constexpr):
    """Of Lq, from the sum of |F|^q over a whole matrix."""
    mean = total / (D * HIDDEN * UNIT**MODEL.q) + EPS
    return mean, power(mean, (2 - MODEL.q) / MODEL.q)


@triton.jit
def of_rows(full, UNIT: tl.constexpr, MODEL: tl.constexpr):
    """`statistics` of a tile's channels, with their whole hidden axis in it; of Lq such that W has yet to be scaled."""
    if MODEL.link == "kl":
        top = tl.max(full, 1)
        return top, UNIT / tl.sum(tl.exp(full - top[:, None]), 1)
    else:
        one = tl.full([full.shape[0]], 1.0, full.dtype)
        return one, one


@triton.jit
def weight(full, first, second, UNIT: tl.constexpr, MODEL: tl.constexpr):
    """A tile of W from one of F and the statistics."""
    if MODEL.link == "identity":
        return full
    elif MODEL.link == "kl":
        return tl.exp(full - first[:, None]) * second[:, None]
    elif MODEL.link == "logistic":
        return tl.sigmoid(full / UNIT) * (4 * UNIT)
    elif MODEL.link == "lq_paper":
        return full * second[:, None]
    else:
        tl.static_assert(MODEL.link == "lq_mirror")
        return full * second[:, None] * power(full * full / (UNIT * UNIT) + EPS, (MODEL.q - 2) / 2)


@triton.jit
def weight_back(
    cotangent,
    inner,
    full,
    first,
    second,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    UNIT: tl.constexpr,
    MODEL: tl.constexpr,
):
    """The cotangent of a tile of F from that of W and from <cotangent, W> along the hidden axis, inner [D]; of Lq only
    their sum over the channels counts.
    """
    if MODEL.link == "identity":
        return cotangent
    elif MODEL.link == "kl":
        return weight(full, first, second, UNIT, MODEL) * (cotangent - inner[:, None] / UNIT)
    elif MODEL.link == "logistic":
        share = tl.sigmoid(full / UNIT)
        return cotangent * share * (1 - share) * 4
    else:
        # W = factor(mean |F / s|^q) F (..): through F itself, and through the factor.
        square = full * full
        slope = tl.full(full.shape, 1.0, full.dtype)
        if MODEL.link == "lq_mirror":
            size = square / (UNIT * UNIT) + EPS
            slope = power(size, (MODEL.q - 2) / 2) + power(size, (MODEL.q - 4) / 2) * square * (
                (MODEL.q - 2) / (UNIT * UNIT)
            )
        through = tl.sum(inner, 0) * ((2 - MODEL.q) / (D * HIDDEN * UNIT**MODEL.q)) / first
        return cotangent * slope * second[:, None] + through[:, None] * power(square, (MODEL.q - 2) / 2) * full
