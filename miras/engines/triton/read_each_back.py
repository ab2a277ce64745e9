"""The kernel of the way back of `read_each`: a chunk's tokens from the last to the first, see `read_each_forward`."""

# Kernels are written in the language of Triton, whose values have other types than Python sees.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from miras.engines.triton.link import of_rows, weight, weight_back
from miras.engines.triton.parts import activation, norm, norm_back, save_tokens, slope, tokens
from miras.engines.triton.read_each_forward import (
    PART,
    add,
    bases_of,
    between_of,
    coefficient,
    entries,
    factor_of,
    factors_of,
    features,
    hidden_of,
    learned,
)


@triton.jit
def _add_coefficient(to_steps, i: tl.constexpr, j: tl.constexpr, x, c, P: tl.constexpr):
    """Add the cotangent of a coefficient, that of each channel."""
    at = to_steps + (i * (2 + P.slots) + j) * P.width
    if P.width > 1:
        add(at + c, x)
    else:
        add(at, tl.sum(x, 0))


@triton.jit
def _put(at, x, MATRIX: tl.constexpr):
    """Store what is of a token's channels alone; W3 reads and learns from the same tokens as W2, and adds to that."""
    if MATRIX == 2:
        add(at, x)
    else:
        tl.store(at, x)


@triton.jit
def _through_learned(
    to_dual, to_slot, dual, slot, narrow, wide, steps, to_steps, to_narrow, to_wide, c, h, MATRIX: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """The way back through `learned`: the cotangents of the dual and the slot before it; those of the rest are stored,
    or added to what is there.
    """
    _add_coefficient(to_steps, 0, 0, tl.sum(to_dual * dual, 1), c, P)
    of_dual = tl.sum(to_dual * wide, 1)
    _add_coefficient(to_steps, 0, 1 + P.slots, of_dual * narrow, c, P)
    column = c[:, None]
    to_grad = coefficient(steps, 0, 1 + P.slots, column, P) * to_dual
    before = coefficient(steps, 0, 0, column, P) * to_dual
    if P.slots:
        _add_coefficient(to_steps, 0, 1, tl.sum(to_dual * slot, 1), c, P)
        _add_coefficient(to_steps, 1, 0, tl.sum(to_slot * dual, 1), c, P)
        _add_coefficient(to_steps, 1, 1, tl.sum(to_slot * slot, 1), c, P)
        of_slot = tl.sum(to_slot * wide, 1)
        _add_coefficient(to_steps, 1, 2, of_slot * narrow, c, P)
        to_grad += coefficient(steps, 1, 2, column, P) * to_slot
        before += coefficient(steps, 1, 0, column, P) * to_slot
        to_slot = coefficient(steps, 0, 1, column, P) * to_dual + coefficient(steps, 1, 1, column, P) * to_slot
    _put(to_narrow + c, tl.sum(to_grad * wide, 1), MATRIX)
    add(to_wide + h, tl.sum(to_grad * narrow[:, None], 0, keep_dims=True))
    return before, to_slot


@triton.jit
def _keep(at, dual, slot, P: tl.constexpr):
    """Store both in scratch."""
    tl.store(at, dual)
    if P.slots:
        tl.store(at + P.tile, slot)


@triton.jit
def _through(between, t, h, MATRIX: tl.constexpr, P: tl.constexpr, MODEL: tl.constexpr):
    """What the cotangent of x_t is multiplied by to be that of a_t, or of b_t."""
    a = hidden_of(between, t, h, 1, P, MODEL)
    if MATRIX == 2:
        return a * slope(hidden_of(between, t, h, 2, P, MODEL), MODEL.activation)
    elif MODEL.gated:
        return activation(hidden_of(between, t, h, 2, P, MODEL), MODEL.activation)
    else:
        return slope(a, MODEL.activation)


@triton.jit
def _apply_back(
    given, between, grad_y, to, to_home, scratch, here, head, MATRIX: tl.constexpr, P: tl.constexpr, MODEL: tl.constexpr
):
    """The way back through `_apply`, from the cotangent of z, and of x for W1 or q for the others."""
    D: tl.constexpr = P.d_v if MATRIX == 0 else P.d_k
    UNIT: tl.constexpr = MODEL.unit1 if MATRIX == 0 else MODEL.unit2
    STATE: tl.constexpr = (1 + P.slots) * P.tile
    narrow, wide = factors_of(given, here, MATRIX, P)
    to_narrow, to_wide = factors_of(to, here, MATRIX, P)
    dual_at, slot_at = bases_of(given, here, MATRIX, P)
    to_dual_at, to_slot_at = bases_of(to, here, MATRIX, P)
    home = given.homes[MATRIX] + head * D * P.hidden
    steps, to_steps = given.steps + here * P.chunk * P.step, to.steps + here * P.chunk * P.step
    q, to_q = given.q + here * P.chunk * P.d_k, to.q + here * P.chunk * P.d_k
    h = tl.arange(0, P.hidden)[None, :]
    within = scratch + tl.arange(0, P.block)[:, None] * P.hidden + h
    some = within + P.segments * STATE
    for begin in tl.range(0, D, P.block, disable_licm=True):
        c = begin + tl.arange(0, P.block)
        column = c[:, None]
        at = entries(column, h, MATRIX, P)
        dual, slot = tl.load(dual_at + at), tl.load(slot_at + at)
        initial = tl.load(home + at) if MODEL.home else tl.zeros_like(dual)
        # What each segment finds; then, segment by segment, what each of its tokens finds.
        for t in tl.range(0, P.chunk, disable_licm=True):
            if t % P.segment == 0:
                _keep(within + t // P.segment * STATE, dual, slot, P)
            dual, slot = learned(
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
                dual, slot = learned(
                    dual, slot, tl.load(narrow + t * D + column), tl.load(wide + t * P.hidden + h),
                    steps + t * P.step, column, P,
                )  # fmt: skip
            tl.debug_barrier()
            for back_t in tl.range(first_t, last_t, disable_licm=True):
                t = first_t + last_t - 1 - back_t
                found = some + (t - first_t) * STATE
                old, old_slot = tl.load(found), tl.load(found + P.slots * P.tile)
                factor, factor_wide = tl.load(narrow + t * D + c), tl.load(wide + t * P.hidden + h)
                full, _ = learned(old, old_slot, factor[:, None], factor_wide, steps + t * P.step, column, P)
                if P.before:
                    full = old
                full += initial
                if MODEL.whole:
                    mean, scale = factor_of(between.sums, t, MATRIX, P, MODEL)
                    first, second = tl.zeros_like(factor) + mean, tl.zeros_like(factor) + scale
                else:
                    first, second = of_rows(full, UNIT, MODEL)
                w = weight(full, first, second, UNIT, MODEL)
                # The cotangent of W_t is left right^T. A thread has 255 registers and this takes 254: what is used last
                # is made last, and `benchmarks/ahead_of_time.py` says whether another order spills.
                if MATRIX == 0:
                    left = tl.load(between.to_z + t * D + c)
                    inner = left * tl.load(between.z + t * D + c)
                    if MODEL.whole:
                        o = tl.arange(0, D)
                        inner = tl.load(between.to_z + t * D + o) * tl.load(between.z + t * D + o)
                    add(between.to_x + t * P.hidden + h, tl.sum(w * left[:, None], 0, keep_dims=True))
                    right = features(between, t, h, P, MODEL)
                else:
                    right = tl.load(between.to_x + t * P.hidden + h) * _through(between, t, h, MATRIX, P, MODEL)
                    row = tl.sum(w * right, 1)
                    left = tl.load(q + t * D + c)
                    inner = left * row
                    if MODEL.whole:
                        inner = tl.sum(hidden_of(between, t, h, MATRIX, P, MODEL) * right, 0)
                    if MODEL.residual and MATRIX == 1:
                        row += tl.load(grad_y + t * D + c)
                    _put(to_q + t * D + c, row, MATRIX)
                to_full = weight_back(left[:, None] * right, inner, full, first, second, D, P.hidden, UNIT, MODEL)
                to_initial += to_full
                if not P.before:
                    to_dual += to_full
                to_dual, to_slot = _through_learned(
                    to_dual, to_slot, old, old_slot, factor, factor_wide, steps + t * P.step, to_steps + t * P.step,
                    to_narrow + t * D, to_wide + t * P.hidden, c, h, MATRIX, P,
                )  # fmt: skip
                if P.before:
                    to_dual += to_full
            tl.debug_barrier()
        tl.store(to_dual_at + at, to_dual)
        if P.slots:
            tl.store(to_slot_at + at, to_slot)
        if MODEL.home:
            add(to_home + at, to_initial)
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
    o = tl.arange(0, P.d_v)
    to_scale = tl.full([P.d_v], 0.0, scratch.dtype.element_ty)
    to_shift = to_scale
    for number in tl.range(tl.program_id(0), chunks, tl.num_programs(0), disable_licm=True):
        here = number * heads + head
        along = between_of(between, here, P, MODEL)
        above = grad_y + here * P.chunk * P.d_v
        for begin in tl.range(0, P.chunk, PART, disable_licm=True):
            t = begin + tl.arange(0, PART)
            to_z = tokens(above, t, P.chunk, P.d_v, P.d_v)
            if MODEL.norm:
                n, rstd = norm(tokens(along.z, t, P.chunk, P.d_v, P.d_v), MODEL.eps, P.d_v)
                to_scale += tl.sum(to_z * n, 0)
                to_shift += tl.sum(to_z, 0)
                to_z = norm_back(to_z * tl.load(given.affine[0] + head * P.d_v + o)[None, :], n, rstd, P.d_v)
            save_tokens(along.to_z, t, to_z, P.chunk, P.d_v, P.d_v)
        tl.debug_barrier()
        _apply_back(
            given, along, above, to, to_homes[0] + own * P.hidden * P.d_v, scratch, here, head, 0, P, MODEL
        )  # fmt: skip
        _apply_back(
            given, along, above, to, to_homes[1] + own * P.hidden * P.d_k, scratch, here, head, 1, P, MODEL
        )  # fmt: skip
        if MODEL.gated:
            _apply_back(
                given, along, above, to, to_homes[2] + own * P.hidden * P.d_k, scratch, here, head, 2, P, MODEL
            )  # fmt: skip
    if MODEL.norm:
        tl.store(to_affine[0] + own * P.d_v + o, to_scale)
        tl.store(to_affine[1] + own * P.d_v + o, to_shift)
