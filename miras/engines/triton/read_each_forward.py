"""The kernel of `read_each`: a chunk's tokens one after another, a matrix' channels some at a time.

Both matrices are looked at as [D, hidden], see `link`. A tile is `P.block` channels with their whole hidden axis, along
which KL normalises; the dual and the slot in it stay in registers from token to token. `P` is the `Problem` that a
kernel is compiled for. `OUTER`: the matrix is W1, z_t = W1_t x_t, a sum over the hidden axis; else it is W2,
a_t = W2_t q_t, a sum over the channels, to which each block of them is added.
"""

# Kernels are written in the language of Triton, whose values have other types than Python sees.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from miras.engines.triton.bias import power
from miras.engines.triton.link import of_rows, weight, whole
from miras.engines.triton.parts import activation, norm, save_tokens, tokens

PART = tl.constexpr(16)  # tokens at a time where they do not see each other


class Given(NamedTuple):
    """What reads depend on: tensors, or their shapes, or pointers.

    Attributes:
        q: queries [M, H, C, d_k].
        k: keys that the chunk learned from, likewise.
        steps: what each token makes of the dual, the S slots and its gradient, [M, H, C, 1 + S, 2 + S, 1 | d].
        left1: [M, H, C, d_v].
        right1: [M, H, C, hidden].
        left2: [M, H, C, hidden].
        bases1: dual and slots of W1 before the chunk, 1 + S matrices [M, H, d_v, hidden].
        bases2: 1 + S matrices [M, H, hidden, d_k].
        homes: of W1 and W2, [H, o, i], or nothing.
        affine: scale and shift of the norm, [H, d_v], or nothing where there is no norm.
    """

    q: Any
    k: Any
    steps: Any
    left1: Any
    right1: Any
    left2: Any
    bases1: Sequence[Any]
    bases2: Sequence[Any]
    homes: Sequence[Any]
    affine: Sequence[Any]

    @property
    def flat(self) -> list[Any]:
        """As operators take it."""
        return [*self[:6], *self.bases1, *self.bases2, *self.homes, *self.affine]

    @classmethod
    def of(cls, flat: Sequence[Any], bases: int, home: bool) -> Given:
        """The reverse."""
        rest = iter(flat[6:])
        lists = [tuple(next(rest) for _ in range(count)) for count in (bases, bases, 2 * home)]
        return cls._make([*flat[:6], *lists, tuple(rest)])


class Between(NamedTuple):
    """What the way back takes of reads, or has between its passes, of all chunks.

    Attributes:
        a: W2_t q_t, [M, H, C, hidden]; where the link's statistics are of a whole matrix, not yet scaled by them.
        z: W1_t x_t, [M, H, C, d_v].
        sums: of such a link, the sums of |F_t|^q for W1 and W2, [M, H, C, 2].
        to_z: [M, H, C, d_v].
        to_x: [M, H, C, hidden].
    """

    a: Any
    z: Any
    sums: Any
    to_z: Any
    to_x: Any


# -- a chunk's own ----------------------------------------------------------------------------------------------------


@triton.jit
def of_chunk(given, here, head, P: tl.constexpr):
    """`Given` or its cotangents, of one chunk and head."""
    return Given(
        given.q + here * P.chunk * P.d_k,
        given.k + here * P.chunk * P.d_k,
        given.steps + here * P.chunk * P.step,
        given.left1 + here * P.chunk * P.d_v,
        given.right1 + here * P.chunk * P.hidden,
        given.left2 + here * P.chunk * P.hidden,
        [base + here * P.hidden * P.d_v for base in given.bases1],
        [base + here * P.hidden * P.d_k for base in given.bases2],
        (given.homes[0] + head * P.hidden * P.d_v, given.homes[1] + head * P.hidden * P.d_k),
        [x + head * P.d_v for x in given.affine],
    )


@triton.jit
def between_of(between, here, P: tl.constexpr):
    """`Between` of one chunk and head."""
    return Between(
        between.a + here * P.chunk * P.hidden,
        between.z + here * P.chunk * P.d_v,
        between.sums + here * P.chunk * 2,
        between.to_z + here * P.chunk * P.d_v,
        between.to_x + here * P.chunk * P.hidden,
    )


# -- one token --------------------------------------------------------------------------------------------------------


@triton.jit
def coefficient(steps, i: tl.constexpr, j: tl.constexpr, c, P: tl.constexpr):
    """What the next dual, i = 0, or slot takes of the dual, j = 0, the slot or the gradient, the last."""
    at = steps + (i * (2 + P.slots) + j) * P.width
    return tl.load(at + c) if P.width > 1 else tl.load(at)


@triton.jit
def learned(dual, slot, narrow, wide, steps, c, P: tl.constexpr):
    """The dual and the slot behind a token's gradient, narrow wide^T."""
    grad = narrow * wide
    next_dual = coefficient(steps, 0, 0, c, P) * dual + coefficient(steps, 0, 1 + P.slots, c, P) * grad
    if P.slots:
        next_dual += coefficient(steps, 0, 1, c, P) * slot
        slot = (
            coefficient(steps, 1, 0, c, P) * dual
            + coefficient(steps, 1, 1, c, P) * slot
            + coefficient(steps, 1, 2, c, P) * grad
        )
    return next_dual, slot


@triton.jit
def factor_of(sums, t, OUTER: tl.constexpr, UNIT: tl.constexpr, P: tl.constexpr, MODEL: tl.constexpr):
    """What W_t has yet to be scaled by, and the mean that this is of."""
    D: tl.constexpr = P.d_v if OUTER else P.d_k
    return whole(tl.load(sums + 2 * t + (0 if OUTER else 1)), D, P.hidden, UNIT, MODEL)


@triton.jit
def hidden_of(a, sums, t, h, P: tl.constexpr, MODEL: tl.constexpr):
    """a_t."""
    x = tl.load(a + t * P.hidden + h)
    if MODEL.whole:
        _, factor = factor_of(sums, t, False, MODEL.unit2, P, MODEL)
        x *= factor
    return x


@triton.jit
def add(at, x):
    """Add to what is there."""
    tl.store(at, tl.load(at) + x)


# -- forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _apply(
    bases,
    home,
    narrow,
    wide,
    steps,
    q,
    between,
    ALONG: tl.constexpr,
    ACROSS: tl.constexpr,
    UNIT: tl.constexpr,
    OUTER: tl.constexpr,
    P: tl.constexpr,
    MODEL: tl.constexpr,
):
    """a of all tokens, or `OUTER` z from it, and the sums that scale them."""
    D: tl.constexpr = P.d_v if OUTER else P.d_k
    h = tl.arange(0, P.hidden)[None, :]
    for begin in range(0, D, P.block):
        c = begin + tl.arange(0, P.block)[:, None]
        at = c * ALONG + h * ACROSS
        dual, slot = tl.load(bases[0] + at), tl.load(bases[P.slots] + at)
        initial = tl.load(home + at) if MODEL.home else tl.zeros_like(dual)
        for t in range(0, P.chunk):
            found = dual
            dual, slot = learned(
                dual, slot, tl.load(narrow + t * D + c), tl.load(wide + t * P.hidden + h), steps + t * P.step, c, P
            )
            full = (found if P.before else dual) + initial
            if MODEL.whole:
                add(between.sums + 2 * t + (0 if OUTER else 1), tl.sum(power(full * full, MODEL.q / 2)))
            first, second = of_rows(full, UNIT, MODEL)
            w = weight(full, first, second, UNIT, MODEL)
            if OUTER:
                x = activation(hidden_of(between.a, between.sums, t, h, P, MODEL), MODEL.activation)
                tl.store(between.z + t * D + c, tl.sum(w * x, 1, keep_dims=True))
            else:
                add(between.a + t * P.hidden + h, tl.sum(w * tl.load(q + t * D + c), 0, keep_dims=True))
        tl.debug_barrier()


@triton.jit
def read_each_forward(given, between, y, heads, P: tl.constexpr, MODEL: tl.constexpr):
    """See `read_each.fused`; a and the sums hold zeros."""
    here, head = tl.program_id(0).to(tl.int64), tl.program_id(0) % heads
    of, between = of_chunk(given, here, head, P), between_of(between, here, P)
    y += here * P.chunk * P.d_v
    _apply(
        of.bases2, of.homes[1], of.k, of.left2, of.steps, of.q, between, 1, P.d_k, MODEL.unit2, False, P, MODEL
    )  # fmt: skip
    _apply(
        of.bases1, of.homes[0], of.left1, of.right1, of.steps, of.q, between, P.hidden, 1, MODEL.unit1, True, P, MODEL
    )  # fmt: skip
    o = tl.arange(0, P.d_v)
    for begin in range(0, P.chunk, PART):
        t = begin + tl.arange(0, PART)
        z = tokens(between.z, t, P.chunk, P.d_v, P.d_v)
        if MODEL.whole:
            sums = tl.load(between.sums + 2 * t[:, None], mask=t[:, None] < P.chunk, other=1.0)
            _, factor = whole(sums, P.d_v, P.hidden, MODEL.unit1, MODEL)
            z *= factor
            save_tokens(between.z, t, z, P.chunk, P.d_v, P.d_v)
        if MODEL.norm:
            n, _ = norm(z, MODEL.eps, P.d_v)
            scale, shift = of.affine
            z = n * tl.load(scale + o)[None, :] + tl.load(shift + o)[None, :]
        if MODEL.residual:
            z += tokens(of.q, t, P.chunk, P.d_k, P.d_k)
        save_tokens(y, t, z, P.chunk, P.d_v, P.d_v)
