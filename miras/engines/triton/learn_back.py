"""The way back through `learn`, one kernel, as a kernel is one function to its compiler: a program walks over its
chunks from the last to the first.

The cotangents of the state stay in place, in tiles, as the state does. With U_j that of A_j behind a chunk, and
(narrow, wide) as in `learn_forward` for each matrix, a chunk gives

    to narrow: sum_j row_j (.) (wide U_j^T)     to wide: sum_j (row_j (.) narrow) U_j       to A_i: sum_j row_ji U_j

and what reads had of it, and then through a = W2 k, x = s(a), z = W1 x, u1 = u(z), p = W1^T u1, u2 = s'(a) (.) p:

    inner = s'(a) (.) to_u2                     to_u1 += W1 inner           to_z = (du / dz)^T to_u1
    to_a = s''(a) (.) p (.) to_u2 + s'(a) (.) (to_x + W1^T to_z)            to_k += W2^T to_a
    to_W1 = u1 inner^T + to_z x^T               to_W2 = to_a k^T

With a gate, b = W3 k, x = s(b) (.) a, u2 = s(b) (.) p, u3 = s'(b) (.) a (.) p, and W3 as W2:

    inner = s(b) (.) to_u2 + s'(b) (.) a (.) to_u3                          to_k += W3^T to_b
    to_a = s'(b) (.) p (.) to_u3 + s(b) (.) (to_x + W1^T to_z)
    to_b = p (.) (s'(b) (.) to_u2 + s''(b) (.) a (.) to_u3) + s'(b) (.) a (.) (to_x + W1^T to_z)

All in three passes over the hidden axis, each with few tiles at a time: to_u1; to_a and to_b; the matrices. Of first
order nothing goes to the matrices.
"""

# Kernels are written in the language of Triton, whose values have other types than Python sees.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from miras.engines.triton.head import surprise_back
from miras.engines.triton.link import full, statistics, weight, weight_back
from miras.engines.triton.parts import (
    activation,
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
from miras.engines.triton.update_back import state_back, through_update


@triton.jit
def learn_back_kernel(
    k,
    v,
    gate,
    rows,
    first,
    count,
    origins,
    homes,
    affine,
    found,
    lefts,
    x,
    z,
    from_found,
    from_lefts,
    from_x,
    to_k,
    to_v,
    to_gate,
    to_rows,
    to_starts,
    to_origins,
    to_homes,
    to_affine,
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
    """See `learn_backward`; `to_starts` hold the cotangents of the states at the end, `to_homes` and `to_affine` zeros;
    scratch [N, H, C (3 hidden + d)], with a gate 5 hidden.
    """
    n, h, heads = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    SUM: tl.constexpr = found[0].dtype.element_ty
    SIZE: tl.constexpr = D * HIDDEN
    COPIES: tl.constexpr = 1 + MODEL.slots
    ROWS: tl.constexpr = COPIES + C
    NEXT: tl.constexpr = ROWS * ROW_WIDTH
    # Tokens at a time for the matrices' cotangents, which are many: fewer where registers are short.
    SHORT: tl.constexpr = PART if D < 64 or (MODEL.slots and C > TILE) else TILE
    LAST: tl.constexpr = 1 + MODEL.gated  # W3, or W2 once more
    # A loop over one tile that the compiler knows to be one, it dissolves; only at d = 64 that takes fewer registers.
    stop = C if D == 64 else length
    tile, part = tl.arange(0, TILE), tl.arange(0, PART)
    c, hidden = tl.arange(0, D)[:, None], tl.arange(0, BLOCK)[None, :]
    at1, at2 = c * HIDDEN + hidden, hidden * D + c
    own = n * heads + h
    home1, home2 = homes[0] + h * SIZE, homes[1] + h * SIZE
    to_home1, to_home2 = to_homes[0] + own * SIZE, to_homes[1] + own * SIZE
    to_origin1, to_origin2 = to_origins[0] + own * SIZE, to_origins[1] + own * SIZE
    to_state1, to_state2 = to_starts[0] + own * COPIES * SIZE, to_starts[1] + own * COPIES * SIZE
    inners = scratch + own * C * ((5 if MODEL.gated else 3) * HIDDEN + D)
    slopes, to_as, to_zs = inners + C * HIDDEN, inners + 2 * C * HIDDEN, inners + 3 * C * HIDDEN
    if MODEL.gated:
        home3, to_home3, to_origin3 = homes[2] + h * SIZE, to_homes[2] + own * SIZE, to_origins[2] + own * SIZE
        to_state3 = to_starts[2] + own * COPIES * SIZE
        slopes_b, to_bs = to_zs, inners + 4 * C * HIDDEN
        to_zs = inners + 5 * C * HIDDEN
    last = tl.load(count + n) - 1
    for back in tl.range(0, last + 1, disable_licm=True):
        i = last - back
        chunk = (tl.load(first + i) + n) * heads + h
        k_here, left1_here, to_k_here = k + chunk * C * D, lefts[0] + chunk * C * D, to_k + chunk * C * D
        x_here, left2_here = x + chunk * C * HIDDEN, lefts[1] + chunk * C * HIDDEN
        to_dual = chunk * COPIES * ROWS * ROW_WIDTH
        to_slot = to_dual + NEXT
        of_dual = to_dual + COPIES * ROW_WIDTH

        # Through the update: to u2, u3 and x, in `scratch`, and to u1 and the keys.
        for begin_t in tl.range(0, stop, TILE, disable_licm=True):
            t = begin_t + tile
            at = t[:, None] * HIDDEN + hidden
            to_u1 = through_update(
                x_here, to_as, from_x + chunk * C * HIDDEN, at, left1_here, to_state1, at1, 1, rows + of_dual,
                to_rows + of_dual, t, False, NEXT, LIMIT, D, HIDDEN, TILE, BLOCK, ROW_WIDTH, MODEL, OPERAND,
            )  # fmt: skip
            to_u1 += tokens(from_lefts[0] + chunk * C * D, t, LIMIT, D, D)
            save_tokens(to_zs, t, to_u1 * MODEL.rate1, LIMIT, D, D)
        tl.debug_barrier()
        for begin_t in tl.range(0, stop, TILE, disable_licm=True):
            t = begin_t + tile
            at = t[:, None] * HIDDEN + hidden
            to_keys = through_update(
                left2_here, inners, from_lefts[1] + chunk * C * HIDDEN, at, k_here, to_state2, at2, D, rows + of_dual,
                to_rows + of_dual, t, True, NEXT, LIMIT, D, HIDDEN, TILE, BLOCK, ROW_WIDTH, MODEL, OPERAND,
            )  # fmt: skip
            save_tokens(to_k_here, t, to_keys, LIMIT, D, D)
        tl.debug_barrier()
        if MODEL.gated:
            for begin_t in tl.range(0, stop, TILE, disable_licm=True):
                t = begin_t + tile
                at = t[:, None] * HIDDEN + hidden
                to_keys = through_update(
                    lefts[2] + chunk * C * HIDDEN, to_bs, from_lefts[2] + chunk * C * HIDDEN, at, k_here, to_state3,
                    at2, D, rows + of_dual, to_rows + of_dual, t, True, NEXT, LIMIT, D, HIDDEN, TILE, BLOCK, ROW_WIDTH,
                    MODEL, OPERAND,
                )  # fmt: skip
                save_tokens(to_k_here, t, tokens(to_k_here, t, LIMIT, D, D) + to_keys, LIMIT, D, D)
            tl.debug_barrier()

        # Through u2 and u3 to u1, and to a and b.
        here = chunk * COPIES * SIZE
        if i == 0:
            start1, start2, start3 = origins[0] + own * SIZE, origins[1] + own * SIZE, origins[LAST] + own * SIZE
        else:
            start1, start2, start3 = found[0] + here, found[1] + here, found[LAST] + here
        s1a, s1b = statistics(start1, home1, 1, HIDDEN, D, HIDDEN, BLOCK, MODEL.unit1, MODEL)
        s2a, s2b = statistics(start2, home2, D, 1, D, HIDDEN, BLOCK, MODEL.unit2, MODEL)
        if MODEL.gated:
            s3a, s3b = statistics(start3, home3, D, 1, D, HIDDEN, BLOCK, MODEL.unit2, MODEL)
        along1 = tl.zeros((D,), SUM)  # <to_W1, W1> along the hidden axis
        for begin_t in tl.range(0, stop, TILE, disable_licm=True):
            t = begin_t + tile
            at = t[:, None] * HIDDEN + hidden
            narrow1, narrow2 = tokens(left1_here, t, LIMIT, D, D), tokens(k_here, t, LIMIT, D, D)
            inside = tl.zeros((TILE, D), SUM)  # W1 inner
            for begin in tl.range(0, HIDDEN, BLOCK, disable_licm=True):
                w2 = weight(full(start2, home2, at2 + begin * D, MODEL), s2a, s2b, MODEL.unit2, MODEL)
                a = product(narrow2, w2, OPERAND, SUM)
                if MODEL.gated:
                    w3 = weight(full(start3, home3, at2 + begin * D, MODEL), s3a, s3b, MODEL.unit2, MODEL)
                    b = product(narrow2, w3, OPERAND, SUM)
                    by_a, by_b = activation(b, MODEL.activation), slope(b, MODEL.activation) * a
                    save(slopes_b + at + begin, by_b, t, LIMIT)
                else:
                    by_a = slope(a, MODEL.activation)
                save(slopes + at + begin, by_a, t, LIMIT)
                w1 = weight(full(start1, home1, at1 + begin, MODEL), s1a, s1b, MODEL.unit1, MODEL)
                to_u2 = load(inners + at + begin, t, LIMIT) * MODEL.rate2
                p = product(narrow1, w1, OPERAND, SUM) / MODEL.rate1
                if MODEL.gated:
                    to_u3, to_x = load(to_bs + at + begin, t, LIMIT) * MODEL.rate2, load(to_as + at + begin, t, LIMIT)
                    to_b = p * (slope(b, MODEL.activation) * to_u2 + curvature(b, MODEL.activation) * a * to_u3)
                    save(to_bs + at + begin, to_b + to_x * by_b, t, LIMIT)
                    save(to_as + at + begin, p * slope(b, MODEL.activation) * to_u3 + to_x * by_a, t, LIMIT)
                    inner = to_u2 * by_a + to_u3 * by_b
                else:
                    to_a = p * to_u2 * curvature(a, MODEL.activation)
                    save(to_as + at + begin, to_a + load(to_as + at + begin, t, LIMIT) * by_a, t, LIMIT)
                    inner = to_u2 * by_a
                save(inners + at + begin, inner, t, LIMIT)
                inside = add_product(inside, inner, tl.trans(w1), OPERAND)
            along1 += tl.sum(tokens(left1_here, t, LIMIT, D, D) * inside, 0) / MODEL.rate1
            save_tokens(to_zs, t, tokens(to_zs, t, LIMIT, D, D) + inside, LIMIT, D, D)
        tl.debug_barrier()

        # Through the loss.
        to_scale, to_shift = tl.zeros((1, D), SUM), tl.zeros((1, D), SUM)
        for begin_t in tl.range(0, stop, PART, disable_licm=True):
            t = begin_t + part
            outer = tokens(z + chunk * C * D, t, LIMIT, D, D)
            to_z, to_keys, to_values, to_gates, by_scale, by_shift = surprise_back(
                tokens(to_zs, t, LIMIT, D, D),
                outer,
                tokens(k_here, t, LIMIT, D, D),
                tokens(v + chunk * C * D, t, LIMIT, D, D),
                tokens(gate + chunk * C * GATE_WIDTH, t, LIMIT, D, GATE_WIDTH, 1.0),
                tl.trans(channels(affine[0] + h * D, D, D)),
                tl.trans(channels(affine[1] + h * D, D, D)),
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
        if MODEL.norm:
            to_scale += tl.trans(channels(to_affine[0] + own * D, D, D))
            to_shift += tl.trans(channels(to_affine[1] + own * D, D, D))
            tl.debug_barrier()
            save_channels(to_affine[0] + own * D, tl.trans(to_scale), D, D)
            save_channels(to_affine[1] + own * D, tl.trans(to_shift), D, D)
        tl.debug_barrier()

        # Through z to a and b, and to the keys.
        along2 = tl.zeros((D,), SUM)  # <to_W2, W2>
        along3 = along2
        for begin_t in tl.range(0, stop, TILE, disable_licm=True):
            t = begin_t + tile
            at = t[:, None] * HIDDEN + hidden
            to_z = tokens(to_zs, t, LIMIT, D, D)
            inside = tl.zeros((TILE, D), SUM)  # W2^T to_a
            inside3 = inside  # W3^T to_b
            for begin in tl.range(0, HIDDEN, BLOCK, disable_licm=True):
                w1 = weight(full(start1, home1, at1 + begin, MODEL), s1a, s1b, MODEL.unit1, MODEL)
                to_x = product(to_z, w1, OPERAND, SUM)
                to_a = to_x * load(slopes + at + begin, t, LIMIT)
                to_a += load(to_as + at + begin, t, LIMIT)
                save(to_as + at + begin, to_a, t, LIMIT)
                w2 = weight(full(start2, home2, at2 + begin * D, MODEL), s2a, s2b, MODEL.unit2, MODEL)
                inside = add_product(inside, to_a, tl.trans(w2), OPERAND)
                if MODEL.gated:
                    to_b = to_x * load(slopes_b + at + begin, t, LIMIT)
                    to_b += load(to_bs + at + begin, t, LIMIT)
                    save(to_bs + at + begin, to_b, t, LIMIT)
                    w3 = weight(full(start3, home3, at2 + begin * D, MODEL), s3a, s3b, MODEL.unit2, MODEL)
                    inside3 = add_product(inside3, to_b, tl.trans(w3), OPERAND)
            along2 += tl.sum(tokens(k_here, t, LIMIT, D, D) * inside, 0)
            if MODEL.gated:
                along3 += tl.sum(tokens(k_here, t, LIMIT, D, D) * inside3, 0)
                inside += inside3
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
            to_w3 = to_w2
            if not MODEL.first_order:
                for begin_t in tl.range(0, stop, SHORT, disable_licm=True):
                    t = begin_t + tl.arange(0, SHORT)
                    at = t[:, None] * HIDDEN + hidden
                    inner = load(inners + at + begin, t, LIMIT)
                    left1 = tokens(left1_here, t, LIMIT, D, D) / MODEL.rate1
                    to_w1 = add_product(to_w1, tl.trans(left1), inner, OPERAND)
                    wide = load(x_here + at + begin, t, LIMIT)
                    to_w1 = add_product(to_w1, tl.trans(tokens(to_zs, t, LIMIT, D, D)), wide, OPERAND)
                    to_a = load(to_as + at + begin, t, LIMIT)
                    to_w2 = add_product(to_w2, tl.trans(tokens(k_here, t, LIMIT, D, D)), to_a, OPERAND)
                    if MODEL.gated:
                        to_b = load(to_bs + at + begin, t, LIMIT)
                        to_w3 = add_product(to_w3, tl.trans(tokens(k_here, t, LIMIT, D, D)), to_b, OPERAND)
                w1, w2 = full(start1, home1, at1 + begin, MODEL), full(start2, home2, at2 + begin * D, MODEL)
                to_w1 = weight_back(to_w1, along1, w1, s1a, s1b, D, HIDDEN, MODEL.unit1, MODEL)
                to_w2 = weight_back(to_w2, along2, w2, s2a, s2b, D, HIDDEN, MODEL.unit2, MODEL)
            a00, a01, a10, a11 = state_back(
                to_w1, i, at1 + begin, found[0] + here, from_found[0] + here, to_state1, to_origin1, to_home1,
                keep, keep_01, keep_10, keep_11, SIZE, MODEL,
            )  # fmt: skip
            b00, b01, b10, b11 = state_back(
                to_w2, i, at2 + begin * D, found[1] + here, from_found[1] + here, to_state2, to_origin2, to_home2,
                keep, keep_01, keep_10, keep_11, SIZE, MODEL,
            )  # fmt: skip
            of_00 += a00 + b00
            of_01 += a01 + b01
            of_10 += a10 + b10
            of_11 += a11 + b11
            if MODEL.gated:
                if not MODEL.first_order:
                    w3 = full(start3, home3, at2 + begin * D, MODEL)
                    to_w3 = weight_back(to_w3, along3, w3, s3a, s3b, D, HIDDEN, MODEL.unit2, MODEL)
                c00, c01, c10, c11 = state_back(
                    to_w3, i, at2 + begin * D, found[2] + here, from_found[2] + here, to_state3, to_origin3, to_home3,
                    keep, keep_01, keep_10, keep_11, SIZE, MODEL,
                )  # fmt: skip
                of_00 += c00
                of_01 += c01
                of_10 += c10
                of_11 += c11
        save_channels(to_rows + to_dual, narrowed(of_00, 0, ROW_WIDTH), D, ROW_WIDTH)
        if MODEL.slots:
            save_channels(to_rows + to_dual + ROW_WIDTH, narrowed(of_01, 0, ROW_WIDTH), D, ROW_WIDTH)
            save_channels(to_rows + to_slot, narrowed(of_10, 0, ROW_WIDTH), D, ROW_WIDTH)
            save_channels(to_rows + to_slot + ROW_WIDTH, narrowed(of_11, 0, ROW_WIDTH), D, ROW_WIDTH)
        tl.debug_barrier()
