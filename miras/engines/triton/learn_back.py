"""The way back through `learn`, one kernel: a program walks over its chunks from the last to the first.

The cotangents of the state stay in place, in tiles, as the state does. With U_j that of A_j behind a chunk, and
(narrow, wide) as in `learn` for both matrices, a chunk gives

    to narrow: sum_j row_j (.) (wide U_j^T)     to wide: sum_j (row_j (.) narrow) U_j       to A_i: sum_j row_ji U_j

and what reads had of it, and then through a = W2 k, x = s(a), z = W1 x, u1 = u(z), p = W1^T u1, u2 = s'(a) (.) p:

    inner = s'(a) (.) to_u2                     to_u1 += W1 inner           to_z = (du / dz)^T to_u1
    to_a = s''(a) (.) p (.) to_u2 + s'(a) (.) (to_x + W1^T to_z)            to_k += W2^T to_a
    to_W1 = u1 inner^T + to_z x^T               to_W2 = to_a k^T

in three passes over the hidden axis, each with few tiles at a time: to_u1; to_a; the matrices.
"""

# Kernels are written in the language of Triton, whose values have other types than Python sees.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from miras.engines.triton.head import surprise_back
from miras.engines.triton.link import full, statistics, weight, weight_back
from miras.engines.triton.parts import (
    add_product,
    channels,
    curvature,
    load,
    narrowed,
    product,
    save,
    save_channels,
    save_tokens,
    slope,
    tokens,
)


@triton.jit
def through_update(
    wide,
    to_wide,
    from_wide,
    at,
    narrow,
    to_state,
    at_state,
    ACROSS: tl.constexpr,
    coef,
    to_coef,
    t,
    ADD: tl.constexpr,
    NEXT: tl.constexpr,
    LIMIT: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_WIDTH: tl.constexpr,
    MODEL: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """The way back through the update of one matrix, to its gradient's factors. Stores the cotangents of the wide one
    and of the coefficients, the latter added to what the other matrix has left; returns that of the narrow one.
    """
    total = tl.zeros((TILE, D), to_state.dtype.element_ty)
    slot_total = tl.zeros((TILE, D), to_state.dtype.element_ty)
    factor = tokens(narrow, t, LIMIT, D, D)
    for begin in tl.range(0, HIDDEN, BLOCK, disable_licm=True):
        tile, to_tile = load(wide + at + begin, t, LIMIT), load(from_wide + at + begin, t, LIMIT)
        above = tl.load(to_state + at_state + begin * ACROSS)
        total = add_product(total, tile, tl.trans(above), OPERAND)
        to_tile = add_product(to_tile, tokens(coef, t, LIMIT, D, ROW_WIDTH) * factor, above, OPERAND)
        if MODEL.slots:
            above = tl.load(to_state + D * HIDDEN + at_state + begin * ACROSS)
            slot_total = add_product(slot_total, tile, tl.trans(above), OPERAND)
            to_tile = add_product(to_tile, tokens(coef + NEXT, t, LIMIT, D, ROW_WIDTH) * factor, above, OPERAND)
        save(to_wide + at + begin, to_tile, t, LIMIT)
    save_row(to_coef, tokens(narrow, t, LIMIT, D, D) * total, t, ADD, LIMIT, D, ROW_WIDTH)
    total *= tokens(coef, t, LIMIT, D, ROW_WIDTH)
    if MODEL.slots:
        save_row(to_coef + NEXT, tokens(narrow, t, LIMIT, D, D) * slot_total, t, ADD, LIMIT, D, ROW_WIDTH)
        total += tokens(coef + NEXT, t, LIMIT, D, ROW_WIDTH) * slot_total
    return total


@triton.jit
def save_row(to_coef, x, t, ADD: tl.constexpr, LIMIT: tl.constexpr, D: tl.constexpr, ROW_WIDTH: tl.constexpr):
    """Store the cotangents of coefficients, or add them to what is there."""
    x = narrowed(x, 1, ROW_WIDTH)
    if ADD:
        x += tokens(to_coef, t, LIMIT, D, ROW_WIDTH)
    save_tokens(to_coef, t, x, LIMIT, D, ROW_WIDTH)


@triton.jit
def state_back(
    to_full,
    i,
    at,
    found,
    from_found,
    to_state,
    to_origin,
    to_home,
    keep,
    keep_01,
    keep_10,
    keep_11,
    SIZE: tl.constexpr,
    MODEL: tl.constexpr,
):
    """A tile of a state's cotangent, in place, from that of the full dual at which gradients were taken. Returns the
    cotangents of the numbers row_ji, [D] each.
    """
    dual, above = tl.load(found + at), tl.load(to_state + at)
    to_dual = tl.load(from_found + at) + keep * above
    of_00 = tl.sum(dual * above, 1, keep_dims=True)
    of_01, of_10, of_11 = of_00, of_00, of_00
    if MODEL.slots:
        slot, slot_above = tl.load(found + SIZE + at), tl.load(to_state + SIZE + at)
        to_dual += keep_10 * slot_above
        tl.store(to_state + SIZE + at, tl.load(from_found + SIZE + at) + keep_01 * above + keep_11 * slot_above)
        of_01, of_10, of_11 = (
            tl.sum(slot * above, 1, keep_dims=True),
            tl.sum(dual * slot_above, 1, keep_dims=True),
            tl.sum(slot * slot_above, 1, keep_dims=True),
        )
    if MODEL.home:
        tl.store(to_home + at, tl.load(to_home + at) + to_full)
    if i == 0:
        tl.store(to_origin + at, to_full)
    else:
        to_dual += to_full
    tl.store(to_state + at, to_dual)
    return of_00, of_01, of_10, of_11


@triton.jit
def learn_back_kernel(
    k,
    v,
    gate,
    rows,
    first,
    count,
    origin1,
    origin2,
    home1,
    home2,
    gamma,
    beta,
    found1,
    found2,
    left1,
    x,
    left2,
    z,
    from_found1,
    from_found2,
    from_left1,
    from_x,
    from_left2,
    to_k,
    to_v,
    to_gate,
    to_rows,
    to_start1,
    to_start2,
    to_origin1,
    to_origin2,
    to_home1,
    to_home2,
    to_gamma,
    to_beta,
    scratch,
    length,
    C: tl.constexpr,
    LIMIT: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    GATE_WIDTH: tl.constexpr,
    ROW_WIDTH: tl.constexpr,
    MODEL: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """See `learn_backward`; to_start1 and to_start2 hold the cotangents of the states at the end, to_home1 and to_home2
    zeros; scratch [N, H, C (3 hidden + d)].
    """
    n, h, heads = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    SUM: tl.constexpr = found1.dtype.element_ty
    SIZE: tl.constexpr = D * HIDDEN
    COPIES: tl.constexpr = 1 + MODEL.slots
    ROWS: tl.constexpr = COPIES + C
    NEXT: tl.constexpr = ROWS * ROW_WIDTH
    # A loop over one tile that the compiler knows to be one, it dissolves; at d = 128 that takes more registers.
    stop = length if D > 64 else C
    tile, part = tl.arange(0, TILE), tl.arange(0, PART)
    c, hidden = tl.arange(0, D)[:, None], tl.arange(0, BLOCK)[None, :]
    at1, at2 = c * HIDDEN + hidden, hidden * D + c
    own = n * heads + h
    home1 += h * SIZE
    home2 += h * SIZE
    to_home1 += own * SIZE
    to_home2 += own * SIZE
    to_origin1 += own * SIZE
    to_origin2 += own * SIZE
    to_state1, to_state2 = to_start1 + own * COPIES * SIZE, to_start2 + own * COPIES * SIZE
    inners = scratch + own * C * (3 * HIDDEN + D)
    slopes, to_as, to_zs = inners + C * HIDDEN, inners + 2 * C * HIDDEN, inners + 3 * C * HIDDEN
    to_scale, to_shift = tl.zeros((1, D), SUM), tl.zeros((1, D), SUM)
    last = tl.load(count + n) - 1
    for back in tl.range(0, last + 1, disable_licm=True):
        i = last - back
        chunk = (tl.load(first + i) + n) * heads + h
        here = chunk * COPIES * SIZE
        if i == 0:
            start1, start2 = origin1 + own * SIZE, origin2 + own * SIZE
        else:
            start1, start2 = found1 + here, found2 + here
        s1a, s1b = statistics(start1, home1, 1, HIDDEN, D, HIDDEN, BLOCK, MODEL.unit1, MODEL)
        s2a, s2b = statistics(start2, home2, D, 1, D, HIDDEN, BLOCK, MODEL.unit2, MODEL)
        k_here, left1_here, to_k_here = k + chunk * C * D, left1 + chunk * C * D, to_k + chunk * C * D
        x_here, left2_here = x + chunk * C * HIDDEN, left2 + chunk * C * HIDDEN
        to_dual = chunk * COPIES * ROWS * ROW_WIDTH
        to_slot = to_dual + NEXT
        of_dual = to_dual + COPIES * ROW_WIDTH

        # Through the update: to u2 and x, in `scratch`, and to u1 and the keys.
        for begin_t in tl.range(0, stop, TILE, disable_licm=True):
            t = begin_t + tile
            at = t[:, None] * HIDDEN + hidden
            to_u1 = through_update(
                x_here, to_as, from_x + chunk * C * HIDDEN, at, left1_here, to_state1, at1, 1, rows + of_dual,
                to_rows + of_dual, t, False, NEXT, LIMIT, D, HIDDEN, TILE, BLOCK, ROW_WIDTH, MODEL, OPERAND,
            )  # fmt: skip
            to_u1 += tokens(from_left1 + chunk * C * D, t, LIMIT, D, D)
            save_tokens(to_zs, t, to_u1 * MODEL.rate1, LIMIT, D, D)
        tl.debug_barrier()
        for begin_t in tl.range(0, stop, TILE, disable_licm=True):
            t = begin_t + tile
            at = t[:, None] * HIDDEN + hidden
            to_keys = through_update(
                left2_here, inners, from_left2 + chunk * C * HIDDEN, at, k_here, to_state2, at2, D, rows + of_dual,
                to_rows + of_dual, t, True, NEXT, LIMIT, D, HIDDEN, TILE, BLOCK, ROW_WIDTH, MODEL, OPERAND,
            )  # fmt: skip
            save_tokens(to_k_here, t, to_keys, LIMIT, D, D)
        tl.debug_barrier()

        # Through u2 to u1, and to a.
        along1 = tl.zeros((D,), SUM)  # <to_W1, W1> along the hidden axis
        for begin_t in tl.range(0, stop, TILE, disable_licm=True):
            t = begin_t + tile
            at = t[:, None] * HIDDEN + hidden
            narrow1, narrow2 = tokens(left1_here, t, LIMIT, D, D), tokens(k_here, t, LIMIT, D, D)
            inside = tl.zeros((TILE, D), SUM)  # W1 inner
            for begin in tl.range(0, HIDDEN, BLOCK, disable_licm=True):
                w2 = weight(full(start2, home2, at2 + begin * D, MODEL), s2a, s2b, MODEL.unit2, MODEL)
                a = product(narrow2, w2, OPERAND, SUM)
                bend = slope(a, MODEL.activation)
                save(slopes + at + begin, bend, t, LIMIT)
                w1 = weight(full(start1, home1, at1 + begin, MODEL), s1a, s1b, MODEL.unit1, MODEL)
                to_u2 = load(inners + at + begin, t, LIMIT) * MODEL.rate2
                to_a = product(narrow1, w1, OPERAND, SUM) / MODEL.rate1 * to_u2 * curvature(a, MODEL.activation)
                save(to_as + at + begin, to_a + load(to_as + at + begin, t, LIMIT) * bend, t, LIMIT)
                inner = to_u2 * bend
                save(inners + at + begin, inner, t, LIMIT)
                inside = add_product(inside, inner, tl.trans(w1), OPERAND)
            along1 += tl.sum(tokens(left1_here, t, LIMIT, D, D) * inside, 0) / MODEL.rate1
            save_tokens(to_zs, t, tokens(to_zs, t, LIMIT, D, D) + inside, LIMIT, D, D)
        tl.debug_barrier()

        # Through the loss.
        for begin_t in tl.range(0, stop, PART, disable_licm=True):
            t = begin_t + part
            outer = tokens(z + chunk * C * D, t, LIMIT, D, D)
            to_z, to_keys, to_values, to_gates, by_scale, by_shift = surprise_back(
                tokens(to_zs, t, LIMIT, D, D),
                outer,
                tokens(k_here, t, LIMIT, D, D),
                tokens(v + chunk * C * D, t, LIMIT, D, D),
                tokens(gate + chunk * C * GATE_WIDTH, t, LIMIT, D, GATE_WIDTH, 1.0),
                tl.trans(channels(gamma + h * D, D, D)),
                tl.trans(channels(beta + h * D, D, D)),
                D,
                MODEL,
            )
            to_scale += tl.sum(by_scale, 0, keep_dims=True)
            to_shift += tl.sum(by_shift, 0, keep_dims=True)
            along1 += tl.sum(to_z * outer, 0)
            save_tokens(to_zs, t, to_z, LIMIT, D, D)
            save_tokens(to_k_here, t, tokens(to_k_here, t, LIMIT, D, D) + to_keys, LIMIT, D, D)
            save_tokens(to_v + chunk * C * D, t, to_values, LIMIT, D, D)
            if GATE_WIDTH > 0:
                to_gates = narrowed(to_gates, 1, GATE_WIDTH)
                save_tokens(to_gate + chunk * C * GATE_WIDTH, t, to_gates, LIMIT, D, GATE_WIDTH)
        tl.debug_barrier()

        # Through z to a, and to the keys.
        along2 = tl.zeros((D,), SUM)  # <to_W2, W2>
        for begin_t in tl.range(0, stop, TILE, disable_licm=True):
            t = begin_t + tile
            at = t[:, None] * HIDDEN + hidden
            to_z = tokens(to_zs, t, LIMIT, D, D)
            inside = tl.zeros((TILE, D), SUM)  # W2^T to_a
            for begin in tl.range(0, HIDDEN, BLOCK, disable_licm=True):
                w1 = weight(full(start1, home1, at1 + begin, MODEL), s1a, s1b, MODEL.unit1, MODEL)
                to_a = product(to_z, w1, OPERAND, SUM) * load(slopes + at + begin, t, LIMIT)
                to_a += load(to_as + at + begin, t, LIMIT)
                save(to_as + at + begin, to_a, t, LIMIT)
                w2 = weight(full(start2, home2, at2 + begin * D, MODEL), s2a, s2b, MODEL.unit2, MODEL)
                inside = add_product(inside, to_a, tl.trans(w2), OPERAND)
            along2 += tl.sum(tokens(k_here, t, LIMIT, D, D) * inside, 0)
            save_tokens(to_k_here, t, tokens(to_k_here, t, LIMIT, D, D) + inside, LIMIT, D, D)
        tl.debug_barrier()

        # To the states that the chunk found, in place of those that it left.
        keep = channels(rows + to_dual, D, ROW_WIDTH)
        keep_01, keep_10, keep_11 = keep, keep, keep
        if MODEL.slots:
            keep_01 = channels(rows + to_dual + ROW_WIDTH, D, ROW_WIDTH)
            keep_10 = channels(rows + to_slot, D, ROW_WIDTH)
            keep_11 = channels(rows + to_slot + ROW_WIDTH, D, ROW_WIDTH)
        of_00 = tl.zeros((D, 1), SUM)
        of_01, of_10, of_11 = of_00, of_00, of_00
        for begin in tl.range(0, HIDDEN, BLOCK, disable_licm=True):
            to_w1, to_w2 = tl.zeros((D, BLOCK), SUM), tl.zeros((D, BLOCK), SUM)
            for begin_t in tl.range(0, stop, TILE, disable_licm=True):
                t = begin_t + tile
                at = t[:, None] * HIDDEN + hidden
                inner = load(inners + at + begin, t, LIMIT)
                to_w1 = add_product(to_w1, tl.trans(tokens(left1_here, t, LIMIT, D, D) / MODEL.rate1), inner, OPERAND)
                wide = load(x_here + at + begin, t, LIMIT)
                to_w1 = add_product(to_w1, tl.trans(tokens(to_zs, t, LIMIT, D, D)), wide, OPERAND)
                to_a = load(to_as + at + begin, t, LIMIT)
                to_w2 = add_product(to_w2, tl.trans(tokens(k_here, t, LIMIT, D, D)), to_a, OPERAND)
            w1, w2 = full(start1, home1, at1 + begin, MODEL), full(start2, home2, at2 + begin * D, MODEL)
            to_w1 = weight_back(to_w1, along1, w1, s1a, s1b, D, HIDDEN, MODEL.unit1, MODEL)
            to_w2 = weight_back(to_w2, along2, w2, s2a, s2b, D, HIDDEN, MODEL.unit2, MODEL)
            a00, a01, a10, a11 = state_back(
                to_w1, i, at1 + begin, found1 + here, from_found1 + here, to_state1, to_origin1, to_home1,
                keep, keep_01, keep_10, keep_11, SIZE, MODEL,
            )  # fmt: skip
            b00, b01, b10, b11 = state_back(
                to_w2, i, at2 + begin * D, found2 + here, from_found2 + here, to_state2, to_origin2, to_home2,
                keep, keep_01, keep_10, keep_11, SIZE, MODEL,
            )  # fmt: skip
            of_00 += a00 + b00
            of_01 += a01 + b01
            of_10 += a10 + b10
            of_11 += a11 + b11
        save_channels(to_rows + to_dual, narrowed(of_00, 0, ROW_WIDTH), D, ROW_WIDTH)
        if MODEL.slots:
            save_channels(to_rows + to_dual + ROW_WIDTH, narrowed(of_01, 0, ROW_WIDTH), D, ROW_WIDTH)
            save_channels(to_rows + to_slot, narrowed(of_10, 0, ROW_WIDTH), D, ROW_WIDTH)
            save_channels(to_rows + to_slot + ROW_WIDTH, narrowed(of_11, 0, ROW_WIDTH), D, ROW_WIDTH)
        tl.debug_barrier()
    if MODEL.norm:
        save_channels(to_gamma + own * D, tl.trans(to_scale), D, D)
        save_channels(to_beta + own * D, tl.trans(to_shift), D, D)
