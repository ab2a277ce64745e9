"""Reads in many chunks at once, fused: those of a two-layer MLP memory whose gates are one number per head.

For every chunk and head, its tokens t and the tokens s that it learned from,

    W2_t = sum_j c_tj B2_j (+ home2) + sum_{s <= t} w_ts left2_s k_s^T      W1_t likewise, right1_s instead of k_s
    a_t = W2_t q_t,   z_t = W1_t s(a_t),   y_t = (q_t +) scale (.) norm(z_t) + shift

and no W_t is written out: the kernels go over blocks of the hidden axis, whose activations stay on chip, and products
of C x C scores take the place of the sums over s. The way back computes them again; only z is kept for it. The linear
form of a link within a chunk, `Linearised`, is a sum of the same kind: link(O) is a base whose coefficient is 1, and
slope and mean are in the bases and factors before they come here, by autograd.
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from miras.engines.triton.parts import (
    OPERANDS,
    activation,
    add_product,
    norm,
    norm_back,
    operand,
    product,
    slope,
)
from miras.engines.unroll import Learned, Read, read_weight
from miras.memory import MLP
from miras.retention import EuclideanRetention
from miras.rule import Rule
from miras.weights import COLUMNS, ROWS, Leaf, Linearised, Unrolled, Weight

# -- kernels: a program has ROWS of the tokens of a chunk and head -----------------------------------------------------


@triton.jit
def _load(pointer, rows, columns, width: tl.constexpr, LIMIT: tl.constexpr):
    """Rows of a matrix of that width, and zeros from `LIMIT` on where it is not 0."""
    at = pointer + rows[:, None] * width + columns[None, :]
    if LIMIT:
        return tl.load(at, mask=rows[:, None] < LIMIT, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _store(pointer, rows, columns, width: tl.constexpr, x, LIMIT: tl.constexpr):
    """The reverse."""
    at = pointer + rows[:, None] * width + columns[None, :]
    if LIMIT:
        tl.store(at, x, mask=rows[:, None] < LIMIT)
    else:
        tl.store(at, x)


@triton.jit
def _lower(pointer, t, s, width: tl.constexpr, C: tl.constexpr):
    """Entries (t, s) of a C x C matrix with rows of that width; zeros above the diagonal, where none is looked at."""
    return tl.load(pointer + t * width + s, mask=(s <= t) & (t < C), other=0.0)


@triton.jit
def _scores(
    a,
    b,
    t,
    s,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    SOME: tl.constexpr,
    LIMIT: tl.constexpr,
    OPERAND: tl.constexpr,
    SUM: tl.constexpr,
):
    """Rows t of a times rows s of b, some channels at a time."""
    total = tl.zeros([ROWS, COLUMNS], SUM)
    for begin in range(0, D, SOME):
        d = begin + tl.arange(0, SOME)
        total = add_product(total, _load(a, t, d, D, LIMIT), tl.trans(_load(b, s, d, D, LIMIT)), OPERAND)
    return total


@triton.jit
def _coefficient(coef, t, j: tl.constexpr, BASES: tl.constexpr, C: tl.constexpr):
    """c_tj for one j."""
    return tl.load(coef + t * (BASES + C) + j, mask=t < C, other=0.0)


@triton.jit
def _hidden(
    queries,
    scores,
    coef2,
    left2,
    bases2,
    homes,
    t,
    s,
    i,
    h,
    here,
    head,
    C: tl.constexpr,
    D_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    BASES: tl.constexpr,
    HOME: tl.constexpr,
    LIMIT: tl.constexpr,
    OPERAND: tl.constexpr,
    SUM: tl.constexpr,
):
    """A block of a_t."""
    a = product(scores, _load(left2, s, h, HIDDEN, LIMIT), OPERAND, SUM)
    if HOME:
        a = add_product(a, queries, tl.trans(_load(homes[1] + head * HIDDEN * D_K, h, i, D_K, 0)), OPERAND)
    for j in tl.static_range(BASES):
        part = product(queries, tl.trans(_load(bases2[j] + here * HIDDEN * D_K, h, i, D_K, 0)), OPERAND, SUM)
        a += _coefficient(coef2, t[:, None], j, BASES, C) * part
    return a


@triton.jit
def _read_forward(
    q,
    k,
    coef1,
    coef2,
    left1,
    right1,
    left2,
    bases1,
    bases2,
    homes,
    affine,
    y,
    z,
    heads,
    C: tl.constexpr,
    D_K: tl.constexpr,
    D_V: tl.constexpr,
    HIDDEN: tl.constexpr,
    BASES: tl.constexpr,
    HOME: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    LIMIT: tl.constexpr,
    OPERAND: tl.constexpr,
    SUM: tl.constexpr,
):
    here, head = tl.program_id(0).to(tl.int64), tl.program_id(0) % heads
    t, s = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, TOKENS)
    i, o = tl.arange(0, D_K), tl.arange(0, D_V)
    q, k = q + here * C * D_K, k + here * C * D_K
    y, z, left1 = y + here * C * D_V, z + here * C * D_V, left1 + here * C * D_V
    right1, left2 = right1 + here * C * HIDDEN, left2 + here * C * HIDDEN
    coef1, coef2 = coef1 + here * C * (BASES + C), coef2 + here * C * (BASES + C)

    scores2 = _scores(q, k, t, s, ROWS, TOKENS, D_K, min(D_K, 64), LIMIT, OPERAND, SUM)
    scores2 = operand(scores2 * _lower(coef2 + BASES, t[:, None], s[None, :], BASES + C, C), OPERAND)
    queries = operand(_load(q, t, i, D_K, LIMIT), OPERAND)
    scores1 = tl.zeros([ROWS, TOKENS], SUM)
    total = tl.zeros([ROWS, D_V], SUM)
    for begin in range(0, HIDDEN, BLOCK):
        h = begin + tl.arange(0, BLOCK)
        a = _hidden(
            queries, scores2, coef2, left2, bases2, homes, t, s, i, h, here, head,
            C, D_K, HIDDEN, BASES, HOME, LIMIT, OPERAND, SUM,
        )  # fmt: skip
        x = activation(a, ACTIVATION)
        scores1 = add_product(scores1, x, tl.trans(_load(right1, s, h, HIDDEN, LIMIT)), OPERAND)
        if HOME:
            total = add_product(total, x, tl.trans(_load(homes[0] + head * HIDDEN * D_V, o, h, HIDDEN, 0)), OPERAND)
        for j in tl.static_range(BASES):
            base = tl.trans(_load(bases1[j] + here * HIDDEN * D_V, o, h, HIDDEN, 0))
            total = add_product(total, _coefficient(coef1, t[:, None], j, BASES, C) * x, base, OPERAND)

    # A zero that the compiler does not know, or it keeps addresses of the begin in registers over the loop.
    late = tl.num_programs(2) - 1
    t, s = t + late, s + late
    scores1 *= _lower(coef1 + BASES, t[:, None], s[None, :], BASES + C, C)
    total = add_product(total, scores1, _load(left1, s, o, D_V, LIMIT), OPERAND)
    _store(z, t, o, D_V, total, LIMIT)
    if NORM:
        n, _ = norm(total, D_V)
        total = n * tl.load(affine[0] + head * D_V + o)[None, :] + tl.load(affine[1] + head * D_V + o)[None, :]
    if RESIDUAL:
        total += _load(q, t, i, D_K, LIMIT)
    _store(y, t, o, D_V, total, LIMIT)


@triton.jit
def _read_back_hidden(
    grad_y,
    z,
    q,
    k,
    coef1,
    coef2,
    left1,
    right1,
    left2,
    bases1,
    bases2,
    homes,
    affine,
    grad_z,
    x,
    grad_a,
    grad_affine,
    heads,
    C: tl.constexpr,
    D_K: tl.constexpr,
    D_V: tl.constexpr,
    HIDDEN: tl.constexpr,
    BASES: tl.constexpr,
    HOME: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    LIMIT: tl.constexpr,
    OPERAND: tl.constexpr,
    SUM: tl.constexpr,
):
    """The cotangents of z and a, and x = s(a), [H, M, C, .], which all others are sums of; those of the norm."""
    here, head, part = tl.program_id(0).to(tl.int64), tl.program_id(0) % heads, tl.program_id(1)
    t, s = part * ROWS + tl.arange(0, ROWS), tl.arange(0, TOKENS)
    i, o = tl.arange(0, D_K), tl.arange(0, D_V)
    right1, left2 = right1 + here * C * HIDDEN, left2 + here * C * HIDDEN
    coef1, coef2 = coef1 + here * C * (BASES + C), coef2 + here * C * (BASES + C)
    across = head.to(tl.int64) * (tl.num_programs(0) // heads) + here // heads
    x, grad_a = x + across * C * HIDDEN, grad_a + across * C * HIDDEN

    to_z = _load(grad_y + here * C * D_V, t, o, D_V, LIMIT).to(SUM)
    if NORM:
        n, rstd = norm(_load(z + here * C * D_V, t, o, D_V, LIMIT).to(SUM), D_V)
        at = (part * tl.num_programs(0) + here) * D_V + o
        tl.store(grad_affine[0] + at, tl.sum(to_z * n, 0))
        tl.store(grad_affine[1] + at, tl.sum(to_z, 0))
        to_z = norm_back(to_z * tl.load(affine[0] + head * D_V + o)[None, :], n, rstd, D_V)
    to_z = operand(to_z, OPERAND)
    _store(grad_z + across * C * D_V, t, o, D_V, to_z, LIMIT)
    to_scores1 = product(to_z, tl.trans(_load(left1 + here * C * D_V, s, o, D_V, LIMIT)), OPERAND, SUM)
    to_scores1 = operand(to_scores1 * _lower(coef1 + BASES, t[:, None], s[None, :], BASES + C, C), OPERAND)
    q, k = q + here * C * D_K, k + here * C * D_K
    scores2 = _scores(q, k, t, s, ROWS, TOKENS, D_K, min(D_K, 32), LIMIT, OPERAND, SUM)
    scores2 = operand(scores2 * _lower(coef2 + BASES, t[:, None], s[None, :], BASES + C, C), OPERAND)
    queries = operand(_load(q, t, i, D_K, LIMIT), OPERAND)
    for begin in range(0, HIDDEN, BLOCK):
        h = begin + tl.arange(0, BLOCK)
        a = _hidden(
            queries, scores2, coef2, left2, bases2, homes, t, s, i, h, here, head,
            C, D_K, HIDDEN, BASES, HOME, LIMIT, OPERAND, SUM,
        )  # fmt: skip
        _store(x, t, h, HIDDEN, activation(a, ACTIVATION), LIMIT)
        to_x = product(to_scores1, _load(right1, s, h, HIDDEN, LIMIT), OPERAND, SUM)
        if HOME:
            to_x = add_product(to_x, to_z, _load(homes[0] + head * HIDDEN * D_V, o, h, HIDDEN, 0), OPERAND)
        for j in tl.static_range(BASES):
            part_j = product(to_z, _load(bases1[j] + here * HIDDEN * D_V, o, h, HIDDEN, 0), OPERAND, SUM)
            to_x += _coefficient(coef1, t[:, None], j, BASES, C) * part_j
        _store(grad_a, t, h, HIDDEN, to_x * slope(a, ACTIVATION), LIMIT)


@triton.jit
def _over_hidden(
    x,
    matrix,
    t,
    n,
    D: tl.constexpr,
    TURNED: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_LIMIT: tl.constexpr,
    LIMIT: tl.constexpr,
    OPERAND: tl.constexpr,
    SUM: tl.constexpr,
):
    """X M^T for a matrix [N, hidden] or, `TURNED`, X M for one [hidden, N]."""
    total = tl.zeros([ROWS, N], SUM)
    for begin in range(0, HIDDEN, BLOCK):
        h = begin + tl.arange(0, BLOCK)
        part = _load(matrix, h, n, D, 0) if TURNED else tl.trans(_load(matrix, n, h, HIDDEN, LIMIT))
        total = add_product(total, _load(x, t, h, HIDDEN, ROW_LIMIT), part, OPERAND)
    return total


@triton.jit
def _read_back_over_hidden(
    grad_y,
    q,
    coef2,
    right1,
    left2,
    bases1,
    bases2,
    homes,
    grad_z,
    x,
    grad_a,
    scores1,
    grad_scores2,
    grad_q,
    grad_coef1,
    grad_coef2,
    heads,
    C: tl.constexpr,
    D_K: tl.constexpr,
    D_V: tl.constexpr,
    HIDDEN: tl.constexpr,
    BASES: tl.constexpr,
    HOME: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    LIMIT: tl.constexpr,
    OPERAND: tl.constexpr,
    SUM: tl.constexpr,
):
    """Sums over the hidden axis: cotangents of c_tj, of q as far as it does not go by scores, and the scores of W1 and
    the cotangents of those of W2, [M, H, C, C], without weights.
    """
    here, head = tl.program_id(0).to(tl.int64), tl.program_id(0) % heads
    t, s = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, TOKENS)
    i, o = tl.arange(0, D_K), tl.arange(0, D_V)
    across = head.to(tl.int64) * (tl.num_programs(0) // heads) + here // heads
    x, grad_a, grad_z = x + across * C * HIDDEN, grad_a + across * C * HIDDEN, grad_z + across * C * D_V
    coef_at = (here * C + t) * (BASES + C)
    at, lower = here * C * C + t[:, None] * C + s[None, :], (s[None, :] <= t[:, None]) & (t[:, None] < C)

    rights, lefts = right1 + here * C * HIDDEN, left2 + here * C * HIDDEN
    sums = _over_hidden(x, rights, t, s, 0, False, ROWS, TOKENS, HIDDEN, BLOCK, LIMIT, LIMIT, OPERAND, SUM)
    tl.store(scores1 + at, sums, mask=lower)
    sums = _over_hidden(grad_a, lefts, t, s, 0, False, ROWS, TOKENS, HIDDEN, BLOCK, LIMIT, LIMIT, OPERAND, SUM)
    tl.store(grad_scores2 + at, sums, mask=lower)
    for j in tl.static_range(BASES):
        base = bases1[j] + here * HIDDEN * D_V
        part = _over_hidden(x, base, t, o, 0, False, ROWS, D_V, HIDDEN, BLOCK, LIMIT, 0, OPERAND, SUM)
        to_c = tl.sum(part * _load(grad_z, t, o, D_V, LIMIT).to(SUM), 1)
        tl.store(grad_coef1 + coef_at + j, to_c, mask=t < C)
    if HOME:
        home = homes[1] + head * HIDDEN * D_K
        to_q = _over_hidden(grad_a, home, t, i, D_K, True, ROWS, D_K, HIDDEN, BLOCK, LIMIT, 0, OPERAND, SUM)
    else:
        to_q = tl.zeros([ROWS, D_K], SUM)
    for j in tl.static_range(BASES):
        base = bases2[j] + here * HIDDEN * D_K
        part_q = _over_hidden(grad_a, base, t, i, D_K, True, ROWS, D_K, HIDDEN, BLOCK, LIMIT, 0, OPERAND, SUM)
        to_c = tl.sum(part_q * _load(q + here * C * D_K, t, i, D_K, LIMIT).to(SUM), 1)
        tl.store(grad_coef2 + coef_at + j, to_c, mask=t < C)
        to_q += _coefficient(coef2 + here * C * (BASES + C), t[:, None], j, BASES, C) * part_q
    if RESIDUAL:
        to_q += _load(grad_y + here * C * D_V, t, o, D_V, LIMIT)
    _store(grad_q + here * C * D_K, t, i, D_K, to_q, LIMIT)


@triton.jit
def _read_back_over_tokens(
    q,
    k,
    coef1,
    coef2,
    left1,
    grad_z,
    x,
    grad_a,
    scores1,
    grad_scores2,
    grad_q,
    grad_k,
    grad_coef1,
    grad_coef2,
    grad_left1,
    grad_right1,
    grad_left2,
    grad_bases1,
    grad_bases2,
    heads,
    C: tl.constexpr,
    D_K: tl.constexpr,
    D_V: tl.constexpr,
    HIDDEN: tl.constexpr,
    BASES: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    LIMIT: tl.constexpr,
    OPERAND: tl.constexpr,
    SUM: tl.constexpr,
):
    """Sums over a chunk's tokens t: cotangents of w_ts, of the factors of some tokens s and of a part of the bases.
    And, for as many tokens t, the rest of q's.
    """
    here, head, part = tl.program_id(0).to(tl.int64), tl.program_id(0) % heads, tl.program_id(1)
    role = tl.program_id(2)
    t, s = tl.arange(0, TOKENS), part * ROWS + tl.arange(0, ROWS)
    i, o = tl.arange(0, D_K), tl.arange(0, D_V)
    q, k, grad_q = q + here * C * D_K, k + here * C * D_K, grad_q + here * C * D_K
    coef1, coef2 = coef1 + here * C * (BASES + C), coef2 + here * C * (BASES + C)
    scores1, grad_scores2 = scores1 + here * C * C, grad_scores2 + here * C * C
    grad_coef1 += here * C * (BASES + C) + BASES
    grad_coef2 += here * C * (BASES + C) + BASES
    across = head.to(tl.int64) * (tl.num_programs(0) // heads) + here // heads
    x, grad_a, grad_z = x + across * C * HIDDEN, grad_a + across * C * HIDDEN, grad_z + across * C * D_V

    within = (t[None, :] < C) & (s[:, None] < C)
    if role == 0:
        # The factors of W1, [s, t]: z = (X R1^T (.) w1) L1.
        to_z = _load(grad_z, t, o, D_V, LIMIT)
        to_scores1 = _scores(left1 + here * C * D_V, grad_z, s, t, ROWS, TOKENS, D_V, min(D_V, 32), LIMIT, OPERAND, SUM)
        scores = _lower(scores1, t[None, :], s[:, None], C, C)
        tl.store(grad_coef1 + t[None, :] * (BASES + C) + s[:, None], scores * to_scores1, mask=within)
        weights = _lower(coef1 + BASES, t[None, :], s[:, None], BASES + C, C)
        to_left1 = product(scores * weights, to_z, OPERAND, SUM)
        _store(grad_left1 + here * C * D_V, s, o, D_V, to_left1, LIMIT)
        to_scores1 = operand(to_scores1 * weights, OPERAND)
        for begin in range(0, HIDDEN, BLOCK):
            h = begin + tl.arange(0, BLOCK)
            to_right1 = product(to_scores1, _load(x, t, h, HIDDEN, LIMIT), OPERAND, SUM)
            _store(grad_right1 + here * C * HIDDEN, s, h, HIDDEN, to_right1, LIMIT)
    elif role == 1:
        # Those of W2: a = (Q K^T (.) w2) L2.
        queries = _load(q, t, i, D_K, LIMIT)
        scores2 = _scores(k, q, s, t, ROWS, TOKENS, D_K, min(D_K, 32), LIMIT, OPERAND, SUM)
        scores = _lower(grad_scores2, t[None, :], s[:, None], C, C)
        tl.store(grad_coef2 + t[None, :] * (BASES + C) + s[:, None], scores * scores2, mask=within)
        weights = _lower(coef2 + BASES, t[None, :], s[:, None], BASES + C, C)
        to_k = product(scores * weights, queries, OPERAND, SUM)
        _store(grad_k + here * C * D_K, s, i, D_K, to_k, LIMIT)
        scores2 = operand(scores2 * weights, OPERAND)
        for begin in range(0, HIDDEN, BLOCK):
            h = begin + tl.arange(0, BLOCK)
            to_left2 = product(scores2, _load(grad_a, t, h, HIDDEN, LIMIT), OPERAND, SUM)
            _store(grad_left2 + here * C * HIDDEN, s, h, HIDDEN, to_left2, LIMIT)
    elif role == 2:
        # Bases, a program's part of the hidden axis: z = c1 (.) X B1^T, a = c2 (.) Q B2^T.
        for j in tl.static_range(BASES):
            for block in range(part, HIDDEN // BLOCK, TOKENS // ROWS):
                h = block * BLOCK + tl.arange(0, BLOCK)
                hidden = tl.trans(_load(x, t, h, HIDDEN, LIMIT)).to(SUM)
                scaled = _coefficient(coef1, t[None, :], j, BASES, C) * hidden
                to_base1 = product(scaled, _load(grad_z, t, o, D_V, LIMIT), OPERAND, SUM)
                _store(grad_bases1[j] + here * HIDDEN * D_V, o, h, HIDDEN, tl.trans(to_base1), 0)
            for block in range(part, HIDDEN // BLOCK, TOKENS // ROWS):
                h = block * BLOCK + tl.arange(0, BLOCK)
                to_a = tl.trans(_load(grad_a, t, h, HIDDEN, LIMIT)).to(SUM)
                scaled = _coefficient(coef2, t[None, :], j, BASES, C) * to_a
                to_base2 = product(scaled, _load(q, t, i, D_K, LIMIT), OPERAND, SUM)
                _store(grad_bases2[j] + here * HIDDEN * D_K, h, i, D_K, to_base2, 0)
    else:
        # q, by scores.
        to_scores = _lower(grad_scores2, s[:, None], t[None, :], C, C)
        to_scores *= _lower(coef2 + BASES, s[:, None], t[None, :], BASES + C, C)
        to_q = _load(grad_q, s, i, D_K, LIMIT)
        to_q = add_product(to_q, to_scores, _load(k, t, i, D_K, LIMIT), OPERAND)
        _store(grad_q, s, i, D_K, to_q, LIMIT)


# -- operators of PyTorch ---------------------------------------------------------------------------------------------


class Given(NamedTuple):
    """What reads depend on: tensors, or their shapes.

    Attributes:
        q: queries [M, H, C, d_k].
        k: keys that the chunk learned from, likewise.
        coef1: of W1, c_tj for its J bases and w_ts beside it, [M, H, C, J + C]; w above the diagonal is not looked at.
        coef2: likewise of W2.
        left1: [M, H, C, d_v].
        right1: [M, H, C, hidden].
        left2: [M, H, C, hidden].
        bases1: J matrices [M, H, d_v, hidden].
        bases2: J matrices [M, H, hidden, d_k].
        homes: of W1 and W2, [H, o, i], or nothing.
        affine: scale and shift of the norm, [H, d_v], or nothing where there is no norm.
    """

    q: Any
    k: Any
    coef1: Any
    coef2: Any
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
        return [*self[:7], *self.bases1, *self.bases2, *self.homes, *self.affine]

    @classmethod
    def of(cls, flat: Sequence[Any], bases: int, home: bool) -> Given:
        """The reverse."""
        rest = iter(flat[7:])
        lists = [tuple(next(rest) for _ in range(count)) for count in (bases, bases, 2 * home)]
        return cls._make([*flat[:7], *lists, tuple(rest)])


class Problem(NamedTuple):
    """What kernels are compiled for; `bases` is J."""

    chunk: int
    d_k: int
    d_v: int
    hidden: int
    bases: int
    home: bool
    norm: bool
    residual: bool
    activation: str
    operands: torch.dtype

    @classmethod
    def of(cls, given: Given, residual: bool, activation: str, operands: torch.dtype) -> Problem:
        """That of some tensors."""
        chunk, d_k = given.q.shape[-2:]
        d_v, hidden = given.left1.shape[-1], given.right1.shape[-1]
        kind = len(given.bases1), bool(given.homes), bool(given.affine)
        return cls(chunk, d_k, d_v, hidden, *kind, residual, activation, operands)

    @property
    def sums(self) -> torch.dtype:
        """The dtype of sums and of what is elementwise."""
        return torch.promote_types(self.operands, torch.float32)

    @property
    def tokens(self) -> int:
        """A chunk's tokens, as a power of two."""
        return max(16, 1 << (self.chunk - 1).bit_length())


class Tiling(NamedTuple):
    """Tokens of a program, hidden units at a time, warps, and stages of the pipeline."""

    rows: int
    block: int
    warps: int
    stages: int


def tiling(kernel: Any, problem: Problem) -> Tiling:
    """How a kernel is cut: as coarsely as all its variants still fit into registers."""
    tokens, d = problem.tokens, max(problem.d_k, problem.d_v)
    rows, block, warps = min(64, tokens), 32, 4 if tokens <= 32 else 8
    if problem.operands.itemsize > 2:  # without matrix instructions
        rows, block, warps = 16, 16, 8
    elif kernel is _read_forward:
        rows = 32 if tokens > 64 else rows
        block = 32 if tokens <= 32 < d or d <= 64 == tokens else 16
    elif kernel is _read_back_hidden and tokens != 64:
        block = 16
    # A power of two that divides the hidden axis.
    return Tiling(rows, min(block, problem.hidden & -problem.hidden), warps, 1)


def _launch(kernel: Any, problem: Problem, given: Given, *tensors: Any) -> None:
    cut, (chunks, heads) = tiling(kernel, problem), given.q.shape[:2]
    constants = {
        "C": problem.chunk, "D_K": problem.d_k, "D_V": problem.d_v, "HIDDEN": problem.hidden, "BASES": problem.bases,
        "HOME": problem.home, "NORM": problem.norm, "RESIDUAL": problem.residual, "ACTIVATION": problem.activation,
        "ROWS": cut.rows, "TOKENS": problem.tokens, "BLOCK": cut.block,
        "LIMIT": 0 if problem.tokens == problem.chunk else problem.chunk,
        "OPERAND": OPERANDS[problem.operands], "SUM": OPERANDS[problem.sums],
    }  # fmt: skip
    constants = {n: x for n, x in constants.items() if n in kernel.arg_names}
    grid = chunks * heads, problem.tokens // cut.rows, 4 if kernel is _read_back_over_tokens else 1
    kernel[grid](*tensors, heads, **constants, num_warps=cut.warps, num_stages=cut.stages)


@torch.library.custom_op("miras::read", mutates_args=())
def fused(
    tensors: Sequence[Tensor], bases: int, home: bool, residual: bool, activation: str, operands: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Outputs y and, for the way back, z, [M, H, C, d_v]: see the module.

    Args:
        tensors: `Given.flat`.
        bases: J.
        home: whether there are homes.
        residual: whether q is added.
        activation: of `miras.memory.activation`.
        operands: what operands of products are rounded to. Sums are in float32, or in float64.
    """
    given = Given.of([x.contiguous() for x in tensors], bases, home)
    problem = Problem.of(given, residual, activation, operands)
    y, z = (torch.empty_like(given.left1, dtype=problem.sums) for _ in range(2))
    _launch(_read_forward, problem, given, *given, y, z)
    return y, z


@fused.register_fake
def _(tensors, bases, home, residual, activation, operands):
    sums = torch.promote_types(operands, torch.float32)
    left1 = Given.of(tensors, bases, home).left1
    return left1.new_empty(left1.shape, dtype=sums), left1.new_empty(left1.shape, dtype=sums)


@torch.library.custom_op("miras::read_backward", mutates_args=())
def fused_backward(
    grad_y: Tensor,
    z: Tensor,
    tensors: Sequence[Tensor],
    bases: int,
    home: bool,
    residual: bool,
    activation: str,
    operands: torch.dtype,
) -> list[Tensor]:
    """The cotangents of `fused`'s tensors, from that of y."""
    given = Given.of([x.contiguous() for x in tensors], bases, home)
    problem, (chunks, heads) = Problem.of(given, residual, activation, operands), given.q.shape[:2]
    parts, sums = problem.tokens // tiling(_read_back_hidden, problem).rows, problem.sums
    to_bases = [tuple(torch.empty_like(x, dtype=sums) for x in xs) for xs in (given.bases1, given.bases2)]
    to_affine = tuple(z.new_empty(parts * chunks, *x.shape) for x in given.affine)
    to = Given._make([*(torch.empty_like(x, dtype=sums) for x in given[:7]), *to_bases, (), to_affine])
    widths = problem.d_v, problem.hidden, problem.hidden
    grad_z, x, grad_a = (z.new_empty(heads, chunks * problem.chunk, n, dtype=operands) for n in widths)
    scores = tuple(z.new_empty(chunks, heads, problem.chunk, problem.chunk) for _ in range(2))
    between, shared = (grad_z, x, grad_a), given[5:10]
    grad_y = grad_y.contiguous()
    _launch(_read_back_hidden, problem, given, grad_y, z, *given, *between, to.affine)
    found = to.q, to.coef1, to.coef2
    _launch(_read_back_over_hidden, problem, given, grad_y, given.q, given.coef2, *shared, *between, *scores, *found)
    _launch(_read_back_over_tokens, problem, given, *given[:5], *between, *scores, *to[:9])
    if home:
        queries = given.q.to(operands).transpose(0, 1).flatten(1, 2)
        to = to._replace(homes=(grad_z.mT @ x, grad_a.mT @ queries))
    to = to._replace(affine=tuple(x.sum(0) for x in to.affine))
    return [x.to(like.dtype) for x, like in zip(to.flat, tensors, strict=True)]


@fused_backward.register_fake
def _(grad_y, z, tensors, bases, home, residual, activation, operands):
    return [x.new_empty(x.shape) for x in tensors]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *tensors)


def _back(ctx: Any, grad_y: Tensor | None, _: None) -> tuple[list[Tensor] | None, ...]:
    z, *tensors = ctx.saved_tensors
    grads = None if grad_y is None else fused_backward(grad_y, z, tensors, *ctx.options)
    return grads, *(None for _ in ctx.options)


fused.register_autograd(_back, setup_context=_keep)


@register_flop_formula(torch.ops.miras.read)
def _flops(tensors: Any, bases: int, home: bool, *_: Any, **_more: Any) -> int:
    """Scores are counted in full, as products compute them."""
    (m, h, c, d_k), d_v, hidden = tensors[0], tensors[4][-1], tensors[5][-1]
    return 2 * m * h * c * ((bases + home) * hidden * (d_k + d_v) + c * (d_k + d_v + 2 * hidden))


@register_flop_formula(torch.ops.miras.read_backward)
def _flops_backward(grad_y: Any, z: Any, tensors: Any, bases: int, home: bool, *_: Any, **_more: Any) -> int:
    """Twice those forward, and the hidden layer, the scores and, for c_tj, the outputs again."""
    (m, h, c, d_k), d_v, hidden = tensors[0], tensors[4][-1], tensors[5][-1]
    again = hidden * ((bases + home) * d_k + bases * d_v) + c * (2 * d_k + d_v + 2 * hidden)
    return 2 * _flops(tensors, bases, home) + 2 * m * h * c * again


# -- the seam to the engines ------------------------------------------------------------------------------------------


def serves(rule: Rule, leaves: dict[str, Leaf], learned: Learned, read: Read) -> bool:
    """Whether `read` can take the place of `unroll.read_chunks`."""
    memory = rule.memory
    if not (isinstance(memory, MLP) and memory.layers == 2 and not memory.bias and rule.window == 1):
        return False
    linear = rule.link_at == "chunk" or isinstance(rule.retention, EuclideanRetention)
    per_head = all(isinstance(rows, Tensor) and rows.shape[-1] == 1 for rows in read.coefficients.values())
    shared = all(home.dim() == 3 for home in learned.before.home.values())
    sizes = {leaves["w1"].rows, leaves["w2"].cols} <= {16, 32, 64, 128} and read.q.shape[-2] <= 128
    return linear and per_head and shared and sizes


def read(rule: Rule, leaves: dict[str, Leaf], learned: Learned, read: Read) -> Tensor:
    """See `unroll.read_chunks`: the same, fused."""
    memory = rule.memory
    assert isinstance(memory, MLP)
    w1, w2 = (
        _terms(read_weight(rule, leaves[n], learned, n, read.coefficients[n]), read.coefficients[n])
        for n in ("w1", "w2")
    )
    slow, device = learned.before.slow, read.q.device.type
    affine = [slow["norm_scale"], slow["norm_shift"]] if memory.norm else []
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else w1.left.dtype
    given = Given(
        read.q, w2.right, w1.coef, w2.coef, w1.left, w1.right, w2.left,
        w1.bases, w2.bases, [*w1.home, *w2.home], affine,
    )  # fmt: skip
    return fused(given.flat, len(w1.bases), bool(w1.home), memory.residual, memory.activation, cast)[0]


class _Terms(NamedTuple):
    """What `fused` takes of one matrix."""

    bases: list[Tensor]
    home: list[Tensor]
    coef: Tensor
    left: Tensor
    right: Tensor


def _terms(weight: Weight, rows: Any) -> _Terms:
    """A chunk's reading weight as a sum of bases and factors."""
    if isinstance(weight, Linearised):
        return _linearised(weight)
    assert isinstance(weight, Unrolled)
    (bases, coef, _), (left, right, _) = weight.bases, weight.grad
    count = coef.shape[-2]
    return _Terms(list(bases[:count]), list(bases[count:]), rows.squeeze(-1), left, right)


def _linearised(weight: Linearised) -> _Terms:
    """link(O) with the coefficient 1, and the change's bases and factors, centred and scaled."""
    change, slope, simplex = weight.change, weight.slope, weight.simplex
    assert isinstance(change, Unrolled)
    (bases, coef, _), (left, right, _), within = change
    if simplex is not None:
        bases = [base - base.mean(simplex, keepdim=True) for base in bases]
    if simplex == ROWS:
        left = left - left.mean(-1, keepdim=True)
    elif simplex == COLUMNS:
        right = right - right.mean(-1, keepdim=True)
    if slope.shape[-1] > 1:
        right = right * slope
    else:
        left = left * slope.mT
    coef = torch.cat([torch.ones_like(coef[..., :1, :]), coef, within], -2).squeeze(-1)
    return _Terms([weight.base, *(slope * base for base in bases)], [], coef, left, right)
