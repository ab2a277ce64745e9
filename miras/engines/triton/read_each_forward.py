"""The kernel of `read_each`: a chunk's tokens one after another, a matrix' channels some at a time.

All matrices are looked at as [D, hidden], see `link`. A tile is `P.block` channels with their whole hidden axis, along
which KL normalises; the dual and the slot in it stay in registers from token to token. `P` is the `Problem` that a
kernel is compiled for. `MATRIX` is 0 for W1: z_t = W1_t x_t is a sum over the hidden axis. It is 1 for W2, 2 for W3 of
a gated memory: a_t = W2_t q_t and b_t = W3_t q_t are sums over the channels, to which each block of them is added.
"""

# Kernels are written in the language of Triton, whose values have other types than Python sees.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from miras.engines.model import Model
from miras.engines.triton.bias import power
from miras.engines.triton.link import of_rows, weight, whole
from miras.engines.triton.parts import activation, norm, save_tokens, tokens

PART = tl.constexpr(16)  # tokens at a time where they do not see each other


class Given(NamedTuple):
    """What reads depend on: tensors, or pointers.

    Attributes:
        q: queries [M, H, C, d_k].
        k: keys that the chunk learned from, likewise.
        steps: what each token makes of the dual, the S slots and its gradient, [M, H, C, 1 + S, 2 + S, 1 | d].
        x: what W1 learned from, [M, H, C, hidden].
        lefts: factors of the gradients, of W1 [M, H, C, d_v], of each other matrix [M, H, C, hidden].
        bases: dual and slots before the chunk, of W1 1 + S matrices [M, H, d_v, hidden], then of each other one as many
            [M, H, hidden, d_k].
        homes: of each matrix, [H, o, i], or nothing.
        affine: scale and shift of the norm, [H, d_v], or nothing where there is no norm.
    """

    q: Any
    k: Any
    steps: Any
    x: Any
    lefts: Sequence[Any]
    bases: Sequence[Any]
    homes: Sequence[Any]
    affine: Sequence[Any]

    @property
    def flat(self) -> list[Any]:
        """As operators take it."""
        return [*self[:4], *self.lefts, *self.bases, *self.homes, *self.affine]

    @classmethod
    def of(cls, flat: Sequence[Any], model: Model) -> Given:
        """The reverse."""
        rest, matrices = iter(flat[4:]), 2 + model.gated
        counts = matrices, matrices * (1 + model.slots), matrices * model.home
        lists = [tuple(next(rest) for _ in range(count)) for count in counts]
        return cls._make([*flat[:4], *lists, tuple(rest)])


class Between(NamedTuple):
    """What the way back takes of reads, or has between its passes, of all chunks.

    Attributes:
        a: W2_t q_t, [M, H, C, hidden]; where the link's statistics are of a whole matrix, not yet scaled by them.
        b: of a gated memory, W3_t q_t, likewise.
        z: W1_t x_t, [M, H, C, d_v].
        sums: of such a link, the sum of |F_t|^q of each matrix, [M, H, C, 2 | 3].
        to_z: [M, H, C, d_v].
        to_x: [M, H, C, hidden].
    """

    a: Any
    b: Any
    z: Any
    sums: Any
    to_z: Any
    to_x: Any


# -- a chunk's own ----------------------------------------------------------------------------------------------------


@triton.jit
def between_of(between, here, P: tl.constexpr, MODEL: tl.constexpr):
    """`Between` of one chunk and head."""
    return Between(
        between.a + here * P.chunk * P.hidden,
        between.b + here * P.chunk * P.hidden,
        between.z + here * P.chunk * P.d_v,
        between.sums + here * P.chunk * (2 + MODEL.gated),
        between.to_z + here * P.chunk * P.d_v,
        between.to_x + here * P.chunk * P.hidden,
    )


@triton.jit
def factors_of(given, here, MATRIX: tl.constexpr, P: tl.constexpr):
    """The factors of a matrix' gradients in a chunk, narrow [C, D] and wide [C, hidden], or their cotangents."""
    if MATRIX == 0:
        return given.lefts[0] + here * P.chunk * P.d_v, given.x + here * P.chunk * P.hidden
    else:
        return given.k + here * P.chunk * P.d_k, given.lefts[MATRIX] + here * P.chunk * P.hidden


@triton.jit
def bases_of(given, here, MATRIX: tl.constexpr, P: tl.constexpr):
    """A matrix' dual and slot that a chunk finds, or their cotangents; the dual again where there is no slot."""
    size = P.hidden * (P.d_v if MATRIX == 0 else P.d_k)
    first: tl.constexpr = MATRIX * (1 + P.slots)
    return given.bases[first] + here * size, given.bases[first + P.slots] + here * size


@triton.jit
def entries(c, h, MATRIX: tl.constexpr, P: tl.constexpr):
    """Where channels and hidden units stand in a matrix."""
    return c * P.hidden + h if MATRIX == 0 else c + h * P.d_k


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
def factor_of(sums, t, MATRIX: tl.constexpr, P: tl.constexpr, MODEL: tl.constexpr):
    """What W_t has yet to be scaled by, and the mean that this is of."""
    D: tl.constexpr = P.d_v if MATRIX == 0 else P.d_k
    UNIT: tl.constexpr = MODEL.unit1 if MATRIX == 0 else MODEL.unit2
    return whole(tl.load(sums + (2 + MODEL.gated) * t + MATRIX), D, P.hidden, UNIT, MODEL)


@triton.jit
def hidden_of(between, t, h, MATRIX: tl.constexpr, P: tl.constexpr, MODEL: tl.constexpr):
    """a_t or b_t."""
    x = tl.load((between.a if MATRIX == 1 else between.b) + t * P.hidden + h)
    if MODEL.whole:
        _, factor = factor_of(between.sums, t, MATRIX, P, MODEL)
        x *= factor
    return x


@triton.jit
def features(between, t, h, P: tl.constexpr, MODEL: tl.constexpr):
    """x_t."""
    a = hidden_of(between, t, h, 1, P, MODEL)
    if MODEL.gated:
        return a * activation(hidden_of(between, t, h, 2, P, MODEL), MODEL.activation)
    else:
        return activation(a, MODEL.activation)


@triton.jit
def add(at, x):
    """Add to what is there."""
    tl.store(at, tl.load(at) + x)


# -- forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _apply(given, between, here, head, MATRIX: tl.constexpr, P: tl.constexpr, MODEL: tl.constexpr):
    """a or b of all tokens, or z from them, and the sums that scale them."""
    D: tl.constexpr = P.d_v if MATRIX == 0 else P.d_k
    UNIT: tl.constexpr = MODEL.unit1 if MATRIX == 0 else MODEL.unit2
    narrow, wide = factors_of(given, here, MATRIX, P)
    dual_at, slot_at = bases_of(given, here, MATRIX, P)
    steps, q = given.steps + here * P.chunk * P.step, given.q + here * P.chunk * P.d_k
    h = tl.arange(0, P.hidden)[None, :]
    for begin in range(0, D, P.block):
        c = begin + tl.arange(0, P.block)[:, None]
        at = entries(c, h, MATRIX, P)
        dual, slot = tl.load(dual_at + at), tl.load(slot_at + at)
        initial = tl.load(given.homes[MATRIX] + head * D * P.hidden + at) if MODEL.home else tl.zeros_like(dual)
        for t in range(0, P.chunk):
            found = dual
            dual, slot = learned(
                dual, slot, tl.load(narrow + t * D + c), tl.load(wide + t * P.hidden + h), steps + t * P.step, c, P
            )
            full = (found if P.before else dual) + initial
            if MODEL.whole:
                add(between.sums + (2 + MODEL.gated) * t + MATRIX, tl.sum(power(full * full, MODEL.q / 2)))
            first, second = of_rows(full, UNIT, MODEL)
            w = weight(full, first, second, UNIT, MODEL)
            if MATRIX == 0:
                x = features(between, t, h, P, MODEL)
                tl.store(between.z + t * D + c, tl.sum(w * x, 1, keep_dims=True))
            else:
                to = between.a if MATRIX == 1 else between.b
                add(to + t * P.hidden + h, tl.sum(w * tl.load(q + t * D + c), 0, keep_dims=True))
        tl.debug_barrier()


@triton.jit
def read_each_forward(given, between, y, heads, P: tl.constexpr, MODEL: tl.constexpr):
    """See `read_each.fused`; a, b and the sums hold zeros."""
    here, head = tl.program_id(0).to(tl.int64), tl.program_id(0) % heads
    between = between_of(between, here, P, MODEL)
    y += here * P.chunk * P.d_v
    _apply(given, between, here, head, 1, P, MODEL)
    if MODEL.gated:
        _apply(given, between, here, head, 2, P, MODEL)
    _apply(given, between, here, head, 0, P, MODEL)
    o = tl.arange(0, P.d_v)
    for begin in range(0, P.chunk, PART):
        t = begin + tl.arange(0, PART)
        z = tokens(between.z, t, P.chunk, P.d_v, P.d_v)
        if MODEL.whole:
            sums = tl.load(between.sums + (2 + MODEL.gated) * t[:, None], mask=t[:, None] < P.chunk, other=1.0)
            _, factor = whole(sums, P.d_v, P.hidden, MODEL.unit1, MODEL)
            z *= factor
            save_tokens(between.z, t, z, P.chunk, P.d_v, P.d_v)
        if MODEL.norm:
            n, _ = norm(z, MODEL.eps, P.d_v)
            scale, shift = given.affine
            z = n * tl.load(scale + head * P.d_v + o)[None, :] + tl.load(shift + head * P.d_v + o)[None, :]
        if MODEL.residual:
            z += tokens(given.q + here * P.chunk * P.d_k, t, P.chunk, P.d_k, P.d_k)
        save_tokens(y, t, z, P.chunk, P.d_v, P.d_v)
