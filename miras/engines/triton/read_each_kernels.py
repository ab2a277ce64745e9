"""Kernels of `read_each` and of its way back: a chunk's tokens one after another, a matrix' channels some at a time.

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
from miras.engines.triton.link import of_rows, weight, weight_back, whole
from miras.engines.triton.parts import activation, norm, norm_back, save_tokens, slope, tokens

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
def _of_chunk(given, here, head, P: tl.constexpr):
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
def _between_of(between, here, P: tl.constexpr):
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
def _coefficient(steps, i: tl.constexpr, j: tl.constexpr, c, P: tl.constexpr):
    """What the next dual, i = 0, or slot takes of the dual, j = 0, the slot or the gradient, the last."""
    at = steps + (i * (2 + P.slots) + j) * P.width
    return tl.load(at + c) if P.width > 1 else tl.load(at)


@triton.jit
def _learned(dual, slot, narrow, wide, steps, c, P: tl.constexpr):
    """The dual and the slot behind a token's gradient, narrow wide^T."""
    grad = narrow * wide
    next_dual = _coefficient(steps, 0, 0, c, P) * dual + _coefficient(steps, 0, 1 + P.slots, c, P) * grad
    if P.slots:
        next_dual += _coefficient(steps, 0, 1, c, P) * slot
        slot = (
            _coefficient(steps, 1, 0, c, P) * dual
            + _coefficient(steps, 1, 1, c, P) * slot
            + _coefficient(steps, 1, 2, c, P) * grad
        )
    return next_dual, slot


@triton.jit
def _factor(sums, t, OUTER: tl.constexpr, UNIT: tl.constexpr, P: tl.constexpr, MODEL: tl.constexpr):
    """What W_t has yet to be scaled by, and the mean that this is of."""
    D: tl.constexpr = P.d_v if OUTER else P.d_k
    return whole(tl.load(sums + 2 * t + (0 if OUTER else 1)), D, P.hidden, UNIT, MODEL)


@triton.jit
def _hidden(a, sums, t, h, P: tl.constexpr, MODEL: tl.constexpr):
    """a_t."""
    x = tl.load(a + t * P.hidden + h)
    if MODEL.whole:
        _, factor = _factor(sums, t, False, MODEL.unit2, P, MODEL)
        x *= factor
    return x


@triton.jit
def _add(at, x):
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
            dual, slot = _learned(
                dual, slot, tl.load(narrow + t * D + c), tl.load(wide + t * P.hidden + h), steps + t * P.step, c, P
            )
            full = (found if P.before else dual) + initial
            if MODEL.whole:
                _add(between.sums + 2 * t + (0 if OUTER else 1), tl.sum(power(full * full, MODEL.q / 2)))
            first, second = of_rows(full, UNIT, MODEL)
            w = weight(full, first, second, UNIT, MODEL)
            if OUTER:
                x = activation(_hidden(between.a, between.sums, t, h, P, MODEL), MODEL.activation)
                tl.store(between.z + t * D + c, tl.sum(w * x, 1, keep_dims=True))
            else:
                _add(between.a + t * P.hidden + h, tl.sum(w * tl.load(q + t * D + c), 0, keep_dims=True))
        tl.debug_barrier()


@triton.jit
def read_each_forward(given, between, y, heads, P: tl.constexpr, MODEL: tl.constexpr):
    """See `read_each.fused`; a and the sums hold zeros."""
    here, head = tl.program_id(0).to(tl.int64), tl.program_id(0) % heads
    of, between = _of_chunk(given, here, head, P), _between_of(between, here, P)
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
            n, _ = norm(z, P.d_v)
            scale, shift = of.affine
            z = n * tl.load(scale + o)[None, :] + tl.load(shift + o)[None, :]
        if MODEL.residual:
            z += tokens(of.q, t, P.chunk, P.d_k, P.d_k)
        save_tokens(y, t, z, P.chunk, P.d_v, P.d_v)


# -- backward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _add_coefficient(to_steps, i: tl.constexpr, j: tl.constexpr, x, c, P: tl.constexpr):
    """Add the cotangent of a coefficient, that of each channel."""
    at = to_steps + (i * (2 + P.slots) + j) * P.width
    if P.width > 1:
        _add(at + c, x)
    else:
        _add(at, tl.sum(x, 0))


@triton.jit
def _through_learned(
    to_dual, to_slot, dual, slot, narrow, wide, steps, to_steps, to_narrow, to_wide, c, h, P: tl.constexpr
):
    """The way back through `_learned`: the cotangents of the dual and the slot before it; those of the rest are stored,
    or added to what is there.
    """
    _add_coefficient(to_steps, 0, 0, tl.sum(to_dual * dual, 1), c, P)
    of_dual = tl.sum(to_dual * wide, 1)
    _add_coefficient(to_steps, 0, 1 + P.slots, of_dual * narrow, c, P)
    column = c[:, None]
    to_grad = _coefficient(steps, 0, 1 + P.slots, column, P) * to_dual
    before = _coefficient(steps, 0, 0, column, P) * to_dual
    if P.slots:
        _add_coefficient(to_steps, 0, 1, tl.sum(to_dual * slot, 1), c, P)
        _add_coefficient(to_steps, 1, 0, tl.sum(to_slot * dual, 1), c, P)
        _add_coefficient(to_steps, 1, 1, tl.sum(to_slot * slot, 1), c, P)
        of_slot = tl.sum(to_slot * wide, 1)
        _add_coefficient(to_steps, 1, 2, of_slot * narrow, c, P)
        to_grad += _coefficient(steps, 1, 2, column, P) * to_slot
        before += _coefficient(steps, 1, 0, column, P) * to_slot
        to_slot = _coefficient(steps, 0, 1, column, P) * to_dual + _coefficient(steps, 1, 1, column, P) * to_slot
    tl.store(to_narrow + c, tl.sum(to_grad * wide, 1))
    _add(to_wide + h, tl.sum(to_grad * narrow[:, None], 0, keep_dims=True))
    return before, to_slot


@triton.jit
def _keep(at, dual, slot, P: tl.constexpr):
    """Store both in scratch."""
    tl.store(at, dual)
    if P.slots:
        tl.store(at + P.tile, slot)


@triton.jit
def _apply_back(
    bases,
    home,
    narrow,
    wide,
    steps,
    q,
    grad_y,
    between,
    to_bases,
    to_home,
    to_narrow,
    to_wide,
    to_steps,
    to_q,
    scratch,
    ALONG: tl.constexpr,
    ACROSS: tl.constexpr,
    UNIT: tl.constexpr,
    OUTER: tl.constexpr,
    P: tl.constexpr,
    MODEL: tl.constexpr,
):
    """The way back through `_apply`, from the cotangent of z, and of x for W1 or q for W2."""
    D: tl.constexpr = P.d_v if OUTER else P.d_k
    STATE: tl.constexpr = (1 + P.slots) * P.tile
    h = tl.arange(0, P.hidden)[None, :]
    within = scratch + tl.arange(0, P.block)[:, None] * P.hidden + h
    some = within + P.segments * STATE
    for begin in tl.range(0, D, P.block, disable_licm=True):
        c = begin + tl.arange(0, P.block)
        column = c[:, None]
        at = column * ALONG + h * ACROSS
        dual, slot = tl.load(bases[0] + at), tl.load(bases[P.slots] + at)
        initial = tl.load(home + at) if MODEL.home else tl.zeros_like(dual)
        # What each segment finds; then, segment by segment, what each of its tokens finds.
        for t in tl.range(0, P.chunk, disable_licm=True):
            if t % P.segment == 0:
                _keep(within + t // P.segment * STATE, dual, slot, P)
            dual, slot = _learned(
                dual, slot, tl.load(narrow + t * D + column), tl.load(wide + t * P.hidden + h), steps + t * P.step,
                column, P,
            )  # fmt: skip
        tl.debug_barrier()
        to_dual, to_slot, to_initial = tl.zeros_like(dual), tl.zeros_like(dual), tl.zeros_like(dual)
        for back in tl.range(0, P.segments, disable_licm=True):
            first_t = (P.segments - 1 - back) * P.segment
            last_t = tl.minimum(first_t + P.segment, P.chunk)
            mark = within + (P.segments - 1 - back) * STATE
            dual, slot = tl.load(mark), tl.load(mark + P.slots * P.tile)
            for t in tl.range(first_t, last_t, disable_licm=True):
                _keep(some + (t - first_t) * STATE, dual, slot, P)
                dual, slot = _learned(
                    dual, slot, tl.load(narrow + t * D + column), tl.load(wide + t * P.hidden + h),
                    steps + t * P.step, column, P,
                )  # fmt: skip
            tl.debug_barrier()
            for back_t in tl.range(first_t, last_t, disable_licm=True):
                t = first_t + last_t - 1 - back_t
                found = some + (t - first_t) * STATE
                old, old_slot = tl.load(found), tl.load(found + P.slots * P.tile)
                factor, factor_wide = tl.load(narrow + t * D + c), tl.load(wide + t * P.hidden + h)
                full, _ = _learned(old, old_slot, factor[:, None], factor_wide, steps + t * P.step, column, P)
                if P.before:
                    full = old
                full += initial
                if MODEL.whole:
                    mean, scale = _factor(between.sums, t, OUTER, UNIT, P, MODEL)
                    first, second = tl.zeros_like(factor) + mean, tl.zeros_like(factor) + scale
                else:
                    first, second = of_rows(full, UNIT, MODEL)
                w = weight(full, first, second, UNIT, MODEL)
                a = _hidden(between.a, between.sums, t, h, P, MODEL)
                # The cotangent of W_t is left right^T.
                if OUTER:
                    left, right = tl.load(between.to_z + t * D + c), activation(a, MODEL.activation)
                    inner = left * tl.load(between.z + t * D + c)
                    if MODEL.whole:
                        o = tl.arange(0, D)
                        inner = tl.load(between.to_z + t * D + o) * tl.load(between.z + t * D + o)
                    _add(between.to_x + t * P.hidden + h, tl.sum(w * left[:, None], 0, keep_dims=True))
                else:
                    left = tl.load(q + t * D + c)
                    right = tl.load(between.to_x + t * P.hidden + h) * slope(a, MODEL.activation)
                    row = tl.sum(w * right, 1)
                    inner = left * row
                    if MODEL.whole:
                        inner = tl.sum(a * right, 0)
                    if MODEL.residual:
                        row += tl.load(grad_y + t * D + c)
                    tl.store(to_q + t * D + c, row)
                to_full = weight_back(left[:, None] * right, inner, full, first, second, D, P.hidden, UNIT, MODEL)
                to_initial += to_full
                if not P.before:
                    to_dual += to_full
                to_dual, to_slot = _through_learned(
                    to_dual, to_slot, old, old_slot, factor, factor_wide, steps + t * P.step, to_steps + t * P.step,
                    to_narrow + t * D, to_wide + t * P.hidden, c, h, P,
                )  # fmt: skip
                if P.before:
                    to_dual += to_full
            tl.debug_barrier()
        tl.store(to_bases[0] + at, to_dual)
        if P.slots:
            tl.store(to_bases[1] + at, to_slot)
        if MODEL.home:
            _add(to_home + at, to_initial)
        tl.debug_barrier()


@triton.jit
def read_each_backward(
    given, between, grad_y, to, to_homes, to_affine, scratch, chunks, heads, P: tl.constexpr, MODEL: tl.constexpr
):
    """See `read_each.fused_backward`. A program goes over some chunks of a head, and has of its own scratch, and the
    cotangents of homes, of scale and of shift. What is added to holds zeros.
    """
    head = tl.program_id(1).to(tl.int64)
    own = tl.program_id(0) * heads + head
    scratch += own * P.scratch
    to_home1, to_home2 = to_homes[0] + own * P.hidden * P.d_v, to_homes[1] + own * P.hidden * P.d_k
    o = tl.arange(0, P.d_v)
    to_scale = tl.full([P.d_v], 0.0, scratch.dtype.element_ty)
    to_shift = to_scale
    for number in tl.range(tl.program_id(0), chunks, tl.num_programs(0), disable_licm=True):
        here = number * heads + head
        of, along, back = _of_chunk(given, here, head, P), _between_of(between, here, P), _of_chunk(to, here, head, P)
        above = grad_y + here * P.chunk * P.d_v
        for begin in tl.range(0, P.chunk, PART, disable_licm=True):
            t = begin + tl.arange(0, PART)
            to_z = tokens(above, t, P.chunk, P.d_v, P.d_v)
            if MODEL.norm:
                n, rstd = norm(tokens(along.z, t, P.chunk, P.d_v, P.d_v), P.d_v)
                to_scale += tl.sum(to_z * n, 0)
                to_shift += tl.sum(to_z, 0)
                to_z = norm_back(to_z * tl.load(of.affine[0] + o)[None, :], n, rstd, P.d_v)
            save_tokens(along.to_z, t, to_z, P.chunk, P.d_v, P.d_v)
        tl.debug_barrier()
        _apply_back(
            of.bases1, of.homes[0], of.left1, of.right1, of.steps, of.q, above, along, back.bases1, to_home1,
            back.left1, back.right1, back.steps, back.q, scratch, P.hidden, 1, MODEL.unit1, True, P, MODEL,
        )  # fmt: skip
        _apply_back(
            of.bases2, of.homes[1], of.k, of.left2, of.steps, of.q, above, along, back.bases2, to_home2,
            back.k, back.left2, back.steps, back.q, scratch, 1, P.d_k, MODEL.unit2, False, P, MODEL,
        )  # fmt: skip
    if MODEL.norm:
        tl.store(to_affine[0] + own * P.d_v + o, to_scale)
        tl.store(to_affine[1] + own * P.d_v + o, to_shift)
