"""Device functions of the way back through a matrix' update: to its gradient's factors and to its state.

See `learn_back` for the formulas.
"""

# Kernels are written in the language of Triton, whose values have other types than Python sees.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from miras.engines.triton.parts import add_product, load, narrowed, save, save_tokens, tokens


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
    for begin in tl.range(0, HIDDEN, BLOCK, disable_licm=True):
        above = tl.load(to_state + at_state + begin * ACROSS)
        total = add_product(total, load(wide + at + begin, t, LIMIT), tl.trans(above), OPERAND)
        scaled = tokens(coef, t, LIMIT, D, ROW_WIDTH) * tokens(narrow, t, LIMIT, D, D)
        to_tile = add_product(load(from_wide + at + begin, t, LIMIT), scaled, above, OPERAND)
        if MODEL.slots:
            above = tl.load(to_state + D * HIDDEN + at_state + begin * ACROSS)
            scaled = tokens(coef + NEXT, t, LIMIT, D, ROW_WIDTH) * tokens(narrow, t, LIMIT, D, D)
            to_tile = add_product(to_tile, scaled, above, OPERAND)
            slot_total = add_product(slot_total, load(wide + at + begin, t, LIMIT), tl.trans(above), OPERAND)
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
