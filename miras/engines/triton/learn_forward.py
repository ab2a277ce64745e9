"""The way forward of `learn`, one kernel, as a kernel is one function to its compiler.

One program for each (sequence, head) walks over its chunks. Matrices stay in global memory, where the L2 cache holds
them, and pass through a program in tiles [D, BLOCK] of the hidden axis, so that no size of them is too large. W2
[hidden, D] is looked at transposed: all matrices are then [D, hidden], and the update of each is

    A_j <- sum_i row_ji A_i + (row_j (.) narrow)^T wide        (narrow, wide) = (rate1 u1, x) or (k, rate2 u2)

with a = W2 k, x = s(a), u1 the gradient of the loss by W1 x and u2 = s'(a) (.) W1^T u1. A_0 is the dual, A_1 the
algorithm's slot where it has one; row_ji and row_j are one number for each head, or one for each channel. A gate is one
more matrix that lies and learns as W2 does: with b = W3 k, x = s(b) (.) a,

    u2 = s(b) (.) W1^T u1        u3 = s'(b) (.) a (.) W1^T u1
"""

# Kernels are written in the language of Triton, whose values have other types than Python sees.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from miras.engines.triton.head import surprise
from miras.engines.triton.link import full, statistics, weight
from miras.engines.triton.parts import (
    activation,
    add_product,
    channels,
    load,
    product,
    save,
    save_tokens,
    slope,
    tokens,
)


@triton.jit
def _kept(
    found,
    at,
    rows,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    MODEL: tl.constexpr,
):
    """What a tile of a matrix's dual and slot leaves of itself to both at the chunk's end; without slots, twice one."""
    dual = tl.load(found + at)
    new = channels(rows, D, ROW_WIDTH) * dual
    new_slot = new
    if MODEL.slots:
        slot = tl.load(found + SIZE + at)
        new += channels(rows + ROW_WIDTH, D, ROW_WIDTH) * slot
        rows += ROWS * ROW_WIDTH
        new_slot = channels(rows, D, ROW_WIDTH) * dual + channels(rows + ROW_WIDTH, D, ROW_WIDTH) * slot
    return new, new_slot


@triton.jit
def _leave(found, at, new, new_slot, SIZE: tl.constexpr, MODEL: tl.constexpr):
    """Store both."""
    tl.store(found + at, new)
    if MODEL.slots:
        tl.store(found + SIZE + at, new_slot)


@triton.jit
def learn_kernel(
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
    chunks,
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
    """See `learn`; `found` holds what the first chunks find."""
    n, h, heads = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    SUM: tl.constexpr = found[0].dtype.element_ty
    SIZE: tl.constexpr = D * HIDDEN
    COPIES: tl.constexpr = 1 + MODEL.slots
    ROWS: tl.constexpr = COPIES + C
    LAST: tl.constexpr = 1 + MODEL.gated  # W3, or W2 once more
    tile, part = tl.arange(0, TILE), tl.arange(0, PART)
    c, hidden = tl.arange(0, D)[:, None], tl.arange(0, BLOCK)[None, :]
    at1, at2 = c * HIDDEN + hidden, hidden * D + c
    home1, home2 = homes[0] + h * SIZE, homes[1] + h * SIZE
    own = tl.load(count + n)
    for i in tl.range(0, own, disable_licm=True):
        row = tl.load(first + i) + n
        after = tl.load(first + i + 1) + n if i + 1 < own else chunks + n
        chunk = row * heads + h
        here, there = chunk * COPIES * SIZE, (after * heads + h) * COPIES * SIZE
        begun = (n * heads + h) * SIZE
        if i == 0:
            start1, start2, start3 = origins[0] + begun, origins[1] + begun, origins[LAST] + begun
        else:
            start1, start2, start3 = found[0] + here, found[1] + here, found[LAST] + here
        s1a, s1b = statistics(start1, home1, 1, HIDDEN, D, HIDDEN, BLOCK, MODEL.unit1, MODEL)
        s2a, s2b = statistics(start2, home2, D, 1, D, HIDDEN, BLOCK, MODEL.unit2, MODEL)
        k_here, z_here, left1_here = k + chunk * C * D, z + chunk * C * D, lefts[0] + chunk * C * D
        x_here, left2_here = x + chunk * C * HIDDEN, lefts[1] + chunk * C * HIDDEN
        if MODEL.gated:
            home3, left3_here = homes[2] + h * SIZE, lefts[2] + chunk * C * HIDDEN
            s3a, s3b = statistics(start3, home3, D, 1, D, HIDDEN, BLOCK, MODEL.unit2, MODEL)

        # x, its derivatives by a and b where u2 and u3 will stand, and z.
        for begin_t in tl.range(0, length, TILE, disable_licm=True):
            t = begin_t + tile
            at = t[:, None] * HIDDEN + hidden
            keys = tokens(k_here, t, LIMIT, D, D)
            outer = tl.zeros((TILE, D), SUM)
            for begin in tl.range(0, HIDDEN, BLOCK, disable_licm=True):
                w2 = weight(full(start2, home2, at2 + begin * D, MODEL), s2a, s2b, MODEL.unit2, MODEL)
                a = product(keys, w2, OPERAND, SUM)
                if MODEL.gated:
                    w3 = weight(full(start3, home3, at2 + begin * D, MODEL), s3a, s3b, MODEL.unit2, MODEL)
                    b = product(keys, w3, OPERAND, SUM)
                    by_a = activation(b, MODEL.activation)
                    wide = by_a * a
                    save(left3_here + at + begin, slope(b, MODEL.activation) * a * MODEL.rate2, t, LIMIT)
                else:
                    wide = activation(a, MODEL.activation)
                    by_a = slope(a, MODEL.activation)
                save(x_here + at + begin, wide, t, LIMIT)
                save(left2_here + at + begin, by_a * MODEL.rate2, t, LIMIT)
                w1 = weight(full(start1, home1, at1 + begin, MODEL), s1a, s1b, MODEL.unit1, MODEL)
                outer = add_product(outer, wide, tl.trans(w1), OPERAND)
            save_tokens(z_here, t, outer, LIMIT, D, D)
        tl.debug_barrier()

        # Tokens do not see each other: u1, of a few at a time.
        for begin_t in tl.range(0, length, PART, disable_licm=True):
            t = begin_t + part
            u1 = surprise(
                tokens(z_here, t, LIMIT, D, D),
                tokens(k_here, t, LIMIT, D, D),
                tokens(v + chunk * C * D, t, LIMIT, D, D),
                tokens(gate + chunk * C * GATE_WIDTH, t, LIMIT, D, GATE_WIDTH, 1.0),
                tl.trans(channels(affine[0] + h * D, D, D)),
                tl.trans(channels(affine[1] + h * D, D, D)),
                D,
                MODEL,
            )
            save_tokens(left1_here, t, u1 * MODEL.rate1, LIMIT, D, D)
        tl.debug_barrier()

        # u2 and u3, and the states that the next chunk finds.
        update = rows + chunk * COPIES * ROWS * ROW_WIDTH
        dual_row, slot_row = update + COPIES * ROW_WIDTH, update + (ROWS + COPIES) * ROW_WIDTH
        for begin in tl.range(0, HIDDEN, BLOCK, disable_licm=True):
            w1 = weight(full(start1, home1, at1 + begin, MODEL), s1a, s1b, MODEL.unit1, MODEL)
            new1, slot1 = _kept(found[0] + here, at1 + begin, update, D, ROWS, ROW_WIDTH, SIZE, MODEL)
            new2, slot2 = _kept(found[1] + here, at2 + begin * D, update, D, ROWS, ROW_WIDTH, SIZE, MODEL)
            if MODEL.gated:
                new3, slot3 = _kept(found[2] + here, at2 + begin * D, update, D, ROWS, ROW_WIDTH, SIZE, MODEL)
            for begin_t in tl.range(0, length, TILE, disable_licm=True):
                t = begin_t + tile
                at = t[:, None] * HIDDEN + hidden
                narrow1 = tokens(left1_here, t, LIMIT, D, D)
                to_x = product(narrow1, w1, OPERAND, SUM) / MODEL.rate1
                u2 = to_x * load(left2_here + at + begin, t, LIMIT)
                save(left2_here + at + begin, u2, t, LIMIT)
                if MODEL.gated:
                    u3 = to_x * load(left3_here + at + begin, t, LIMIT)
                    save(left3_here + at + begin, u3, t, LIMIT)
                wide = load(x_here + at + begin, t, LIMIT)
                scaled = tokens(dual_row, t, LIMIT, D, ROW_WIDTH) * narrow1
                new1 = add_product(new1, tl.trans(scaled), wide, OPERAND)
                if MODEL.slots:
                    scaled = tokens(slot_row, t, LIMIT, D, ROW_WIDTH) * narrow1
                    slot1 = add_product(slot1, tl.trans(scaled), wide, OPERAND)
                scaled = tokens(dual_row, t, LIMIT, D, ROW_WIDTH) * tokens(k_here, t, LIMIT, D, D)
                new2 = add_product(new2, tl.trans(scaled), u2, OPERAND)
                if MODEL.gated:
                    new3 = add_product(new3, tl.trans(scaled), u3, OPERAND)
                if MODEL.slots:
                    scaled = tokens(slot_row, t, LIMIT, D, ROW_WIDTH) * tokens(k_here, t, LIMIT, D, D)
                    slot2 = add_product(slot2, tl.trans(scaled), u2, OPERAND)
                    if MODEL.gated:
                        slot3 = add_product(slot3, tl.trans(scaled), u3, OPERAND)
            _leave(found[0] + there, at1 + begin, new1, slot1, SIZE, MODEL)
            _leave(found[1] + there, at2 + begin * D, new2, slot2, SIZE, MODEL)
            if MODEL.gated:
                _leave(found[2] + there, at2 + begin * D, new3, slot3, SIZE, MODEL)
        tl.debug_barrier()
