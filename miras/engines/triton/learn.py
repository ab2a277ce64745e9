"""The scan over chunks of an MLP of two layers, W1 s(W2 k), all of it in one kernel: what each chunk finds and learns.

One program for each (sequence, head) walks over its chunks. Matrices stay in global memory, where the L2 cache holds
them, and pass through a program in tiles [D, BLOCK] of the hidden axis, so that no size of them is too large. W2
[hidden, D] is looked at transposed: both matrices are then [D, hidden], and the update of each is

    A_j <- sum_i row_ji A_i + (row_j (.) narrow)^T wide        (narrow, wide) = (rate1 u1, x) or (k, rate2 u2)

with a = W2 k, x = s(a), u1 the gradient of the loss by W1 x and u2 = s'(a) (.) W1^T u1. A_0 is the dual, A_1 the
algorithm's slot where it has one; row_ji and row_j are one number for each head, or one for each channel.
"""

# Kernels are written in the language of Triton, whose values have other types than Python sees.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from miras.engines.model import Model
from miras.engines.triton.head import surprise
from miras.engines.triton.learn_back import learn_back_kernel
from miras.engines.triton.link import full, statistics, weight
from miras.engines.triton.parts import (
    OPERANDS,
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

WARPS = 8


@triton.jit
def learn_kernel(
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
    """See `learn`; found1 and found2 hold what the first chunks find."""
    n, h, heads = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    SUM: tl.constexpr = found1.dtype.element_ty
    SIZE: tl.constexpr = D * HIDDEN
    COPIES: tl.constexpr = 1 + MODEL.slots
    ROWS: tl.constexpr = COPIES + C
    # A loop over one tile that the compiler knows to be one, it dissolves; at d = 128 that takes more registers.
    stop = length if D > 64 else C
    tile, part = tl.arange(0, TILE), tl.arange(0, PART)
    c, hidden = tl.arange(0, D)[:, None], tl.arange(0, BLOCK)[None, :]
    at1, at2 = c * HIDDEN + hidden, hidden * D + c
    home1 += h * SIZE
    home2 += h * SIZE
    own = tl.load(count + n)
    for i in tl.range(0, own, disable_licm=True):
        row = tl.load(first + i) + n
        after = tl.load(first + i + 1) + n if i + 1 < own else chunks + n
        chunk = row * heads + h
        here, there = chunk * COPIES * SIZE, (after * heads + h) * COPIES * SIZE
        if i == 0:
            start1, start2 = origin1 + (n * heads + h) * SIZE, origin2 + (n * heads + h) * SIZE
        else:
            start1, start2 = found1 + here, found2 + here
        s1a, s1b = statistics(start1, home1, 1, HIDDEN, D, HIDDEN, BLOCK, MODEL.unit1, MODEL)
        s2a, s2b = statistics(start2, home2, D, 1, D, HIDDEN, BLOCK, MODEL.unit2, MODEL)
        k_here, z_here, left1_here = k + chunk * C * D, z + chunk * C * D, left1 + chunk * C * D
        x_here, left2_here = x + chunk * C * HIDDEN, left2 + chunk * C * HIDDEN

        # x, s'(a) where u2 will stand, and z.
        for begin_t in tl.range(0, stop, TILE, disable_licm=True):
            t = begin_t + tile
            at = t[:, None] * HIDDEN + hidden
            keys = tokens(k_here, t, LIMIT, D, D)
            outer = tl.zeros((TILE, D), SUM)
            for begin in tl.range(0, HIDDEN, BLOCK, disable_licm=True):
                w2 = weight(full(start2, home2, at2 + begin * D, MODEL), s2a, s2b, MODEL.unit2, MODEL)
                a = product(keys, w2, OPERAND, SUM)
                wide = activation(a, MODEL.activation)
                save(x_here + at + begin, wide, t, LIMIT)
                save(left2_here + at + begin, slope(a, MODEL.activation) * MODEL.rate2, t, LIMIT)
                w1 = weight(full(start1, home1, at1 + begin, MODEL), s1a, s1b, MODEL.unit1, MODEL)
                outer = add_product(outer, wide, tl.trans(w1), OPERAND)
            save_tokens(z_here, t, outer, LIMIT, D, D)
        tl.debug_barrier()

        # Tokens do not see each other: u1, of a few at a time.
        for begin_t in tl.range(0, stop, PART, disable_licm=True):
            t = begin_t + part
            u1 = surprise(
                tokens(z_here, t, LIMIT, D, D),
                tokens(k_here, t, LIMIT, D, D),
                tokens(v + chunk * C * D, t, LIMIT, D, D),
                tokens(gate + chunk * C * GATE_WIDTH, t, LIMIT, D, GATE_WIDTH, 1.0),
                tl.trans(channels(gamma + h * D, D, D)),
                tl.trans(channels(beta + h * D, D, D)),
                D,
                MODEL,
            )
            save_tokens(left1_here, t, u1 * MODEL.rate1, LIMIT, D, D)
        tl.debug_barrier()

        # u2, and the states that the next chunk finds.
        to_dual = rows + chunk * COPIES * ROWS * ROW_WIDTH
        to_slot = to_dual + ROWS * ROW_WIDTH
        for begin in tl.range(0, HIDDEN, BLOCK, disable_licm=True):
            w1 = weight(full(start1, home1, at1 + begin, MODEL), s1a, s1b, MODEL.unit1, MODEL)
            dual1, dual2 = tl.load(found1 + here + at1 + begin), tl.load(found2 + here + at2 + begin * D)
            keep = channels(to_dual, D, ROW_WIDTH)
            new1, new2 = keep * dual1, keep * dual2
            if MODEL.slots:
                slot1 = tl.load(found1 + here + SIZE + at1 + begin)
                slot2 = tl.load(found2 + here + SIZE + at2 + begin * D)
                keep = channels(to_dual + ROW_WIDTH, D, ROW_WIDTH)
                new1 += keep * slot1
                new2 += keep * slot2
                keep, keep_slot = channels(to_slot, D, ROW_WIDTH), channels(to_slot + ROW_WIDTH, D, ROW_WIDTH)
                slot1 = keep * dual1 + keep_slot * slot1
                slot2 = keep * dual2 + keep_slot * slot2
            for begin_t in tl.range(0, stop, TILE, disable_licm=True):
                t = begin_t + tile
                at = t[:, None] * HIDDEN + hidden
                narrow1, narrow2 = tokens(left1_here, t, LIMIT, D, D), tokens(k_here, t, LIMIT, D, D)
                u2 = product(narrow1, w1, OPERAND, SUM) / MODEL.rate1
                u2 *= load(left2_here + at + begin, t, LIMIT)
                save(left2_here + at + begin, u2, t, LIMIT)
                wide = load(x_here + at + begin, t, LIMIT)
                coef = tokens(to_dual + COPIES * ROW_WIDTH, t, LIMIT, D, ROW_WIDTH)
                new1 = add_product(new1, tl.trans(coef * narrow1), wide, OPERAND)
                new2 = add_product(new2, tl.trans(coef * narrow2), u2, OPERAND)
                if MODEL.slots:
                    coef = tokens(to_slot + COPIES * ROW_WIDTH, t, LIMIT, D, ROW_WIDTH)
                    slot1 = add_product(slot1, tl.trans(coef * narrow1), wide, OPERAND)
                    slot2 = add_product(slot2, tl.trans(coef * narrow2), u2, OPERAND)
            tl.store(found1 + there + at1 + begin, new1)
            tl.store(found2 + there + at2 + begin * D, new2)
            if MODEL.slots:
                tl.store(found1 + there + SIZE + at1 + begin, slot1)
                tl.store(found2 + there + SIZE + at2 + begin * D, slot2)
        tl.debug_barrier()


class Shapes(NamedTuple):
    """M chunks of N sequences, and what kernels are compiled for."""

    chunks: int
    rows: int
    heads: int
    constants: dict[str, Any]

    @property
    def grid(self) -> tuple[int, int]:
        """Programs."""
        return self.rows, self.heads


def shapes(k: Tensor, gate: Tensor | None, rows: Tensor, start2: Tensor, model: str, operand: str) -> Shapes:
    """How the kernels are launched."""
    chunks, heads, size, d = k.shape
    widths = 0 if gate is None else gate.shape[-1], rows.shape[-1]
    operands = OPERANDS[getattr(torch, operand)]
    constants = compiled_for(size, d, start2.shape[3], *widths, Model.parse(model), operands)
    return Shapes(chunks, start2.shape[0], heads, constants)


def compiled_for(
    chunk: int, d: int, hidden: int, gate_width: int, row_width: int, model: Model, operand: tl.dtype
) -> dict[str, Any]:
    """What a kernel is compiled for. Its tiles are as large as the registers of 8 warps take, hardly spilling: see
    `benchmarks/ahead_of_time.py`.
    """
    tile = min(64, max(16, 1 << (chunk - 1).bit_length()))
    return {
        "C": chunk,
        "LIMIT": chunk if chunk % tile else 0,
        "D": d,
        "HIDDEN": hidden,
        "TILE": tile,
        "PART": 16,
        "BLOCK": 16 if d < 64 or (d > 64 and tile > 16 and model.slots) else 32,
        "GATE_WIDTH": gate_width,
        "ROW_WIDTH": row_width,
        "MODEL": model,
        "OPERAND": operand,
    }


@torch.library.custom_op("miras::learn", mutates_args=())
def learn(
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    rows: Tensor,
    start1: Tensor,
    start2: Tensor,
    origin1: Tensor,
    origin2: Tensor,
    home1: Tensor | None,
    home2: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    first: Tensor,
    count: Tensor,
    model: str,
    operand: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Learn from M chunks of N sequences.

    Args:
        k: keys [M, H, C, d]; v alike. Chunk i of sequence n is number first[i] + n.
        v: values.
        gate: the bias' gate [M, H, C, 1 | d], if it has one.
        rows: the update's coefficients [M, H, 1 + S, 1 + S + C, 1 | d].
        start1: dual and slots of W1 that the first chunks find, [N, H, 1 + S, d, hidden].
        start2: of W2, [N, H, 1 + S, hidden, d].
        origin1: dual at which the first chunks' gradients are taken, [N, H, d, hidden]; those of later
            chunks are at what they find.
        origin2: of W2, [N, H, hidden, d].
        home1: the initial dual that states are relative to, [H, d, hidden], if they are.
        home2: of W2.
        gamma: scale of LN [H, d], if there is one.
        beta: its shift.
        first: number of the first chunk of each step, int32.
        count: chunks of each sequence, int32 [N], not rising.
        model: what the kernels are compiled for, `str(Model)`.
        operand: dtype of the operands of products.

    Returns:
        Dual and slots of W1 found by each chunk and then at the end of each sequence, [M + N, H, 1 + S, d, hidden],
        those of W2; the factors of the gradients rate1 u1 [M, H, C, d], x [M, H, C, hidden] and rate2 u2; z = W1 x.
    """
    shape = shapes(k, gate, rows, start2, model, operand)
    found1, found2, left1, x, left2, z = _empty(k, start1, start2)
    found1[: shape.rows], found2[: shape.rows] = start1, start2
    given = (k, v, gate, rows, first, count, origin1, origin2, home1, home2, gamma, beta)
    learn_kernel[shape.grid](
        *_pointers(given),
        found1,
        found2,
        left1,
        x,
        left2,
        z,
        shape.chunks,
        k.shape[2],
        **shape.constants,
        num_warps=WARPS,
        num_stages=1,
    )
    return found1, found2, left1, x, left2, z


def _pointers(given: Sequence[Tensor | None]) -> list[Tensor]:
    """Tensors as kernels take them; what a rule has not got is not looked at."""
    assert given[0] is not None
    return [given[0] if t is None else t.contiguous() for t in given]


def _empty(k: Tensor, start1: Tensor, start2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `learn` returns, unset."""
    (m, heads, size, d), (n, *_, hidden) = k.shape, start1.shape
    found1, found2 = (s.new_empty(m + n, *s.shape[1:]) for s in (start1, start2))
    left1, x, left2 = (k.new_empty(m, heads, size, width) for width in (d, hidden, hidden))
    return found1, found2, left1, x, left2, torch.empty_like(left1)


@learn.register_fake
def _(k: Tensor, v: Tensor, gate: Tensor | None, rows: Tensor, start1: Tensor, start2: Tensor, *rest: Any) -> Any:
    return _empty(k, start1, start2)


@torch.library.custom_op("miras::learn_backward", mutates_args=())
def learn_backward(
    cotangents: list[Tensor],
    found: list[Tensor],
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    rows: Tensor,
    start1: Tensor,
    start2: Tensor,
    origin1: Tensor,
    origin2: Tensor,
    home1: Tensor | None,
    home2: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    first: Tensor,
    count: Tensor,
    model: str,
    operand: str,
) -> list[Tensor]:
    """The cotangents of `learn`'s arguments from k to beta, empty for those that are None, from those of all that it
    returned but z; `found` is what it returned.
    """
    shape = shapes(k, gate, rows, start2, model, operand)
    given = (k, v, gate, rows, first, count, origin1, origin2, home1, home2, gamma, beta)
    scratch = k.new_empty(shape.rows, shape.heads, k.shape[2], 3 * start1.shape[-1] + k.shape[3])
    starts = [x[shape.chunks :].clone() for x in cotangents[:2]]
    each = [None if x is None else x.new_zeros(shape.rows, *x.shape[-3:]) for x in (home1, home2)]
    each += [None if x is None else x.new_empty(shape.rows, *x.shape) for x in (gamma, beta)]
    to = [*_alike(k, v, gate, rows), *starts, *_alike(origin1, origin2), *each]
    learn_back_kernel[shape.grid](
        *_pointers(given),
        *(x.contiguous() for x in (*found, *cotangents)),
        *(scratch if x is None else x for x in to),
        scratch,
        k.shape[2],
        **shape.constants,
        num_warps=WARPS,
        num_stages=1,
    )
    to = [*to[:8], *(None if x is None else x.sum(0) for x in to[8:])]
    return [k.new_empty(0) if x is None else x for x in to]


def _alike(*given: Tensor | None) -> list[Tensor | None]:
    """Contiguous tensors of the same shapes, unset."""
    return [None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in given]


@learn_backward.register_fake
def _(cotangents: list[Tensor], found: list[Tensor], k: Tensor, *rest: Any) -> list[Tensor]:
    return [k.new_empty(0) if x is None else x for x in _alike(k, *rest[:11])]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *given, ctx.model, ctx.operand = inputs
    ctx.given = len(given)
    ctx.save_for_backward(*given, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # to be looked at once only, under checkpointing
    given, found = list(saved[: ctx.given]), list(saved[ctx.given :])
    known = [torch.zeros_like(x) if c is None else c for c, x in zip(cotangents[:5], found, strict=False)]
    to = torch.ops.miras.learn_backward(known, found, *given, ctx.model, ctx.operand)
    return *(None if x is None else t for t, x in zip(to, given, strict=False)), None, None, None, None


torch.library.register_autograd("miras::learn", _backward, setup_context=_save)


def _products(k: list[int], start1: list[int]) -> int:
    """FLOPs of one product of every chunk with a whole matrix."""
    return 2 * k[0] * k[1] * k[2] * start1[-1] * start1[-2]


@register_flop_formula(torch.ops.miras.learn)
def _(k: list[int], v: Any, gate: Any, rows: Any, start1: list[int], *rest: Any, **also: Any) -> int:
    # a, z and u2; two matrices of each copy.
    return (3 + 2 * start1[2]) * _products(k, start1)


@register_flop_formula(torch.ops.miras.learn_backward)
def _(
    cotangents: Any, found: Any, k: list[int], v: Any, gate: Any, rows: Any, start1: list[int], *rest: Any, **also: Any
) -> int:
    # a, W1 inner, W1^T u1, W1^T to_z, W2^T to_a and three for the matrices; four of each copy.
    return (8 + 4 * start1[2]) * _products(k, start1)
