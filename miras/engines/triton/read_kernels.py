"""Kernels of `read` and of its way back; a program has `CUT.rows` of the tokens of a chunk and head.

`P` is the `Problem` and `CUT` the `Tiling` that a kernel is compiled for; t are the numbers of tokens that read, s of
those that were learned from. What all cotangents are sums of lies between the backward kernels: the cotangent of z,
x, the cotangent of a and, gated, that of b, [H, M C, .], as operands.
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from miras.engines.triton.parts import (
    activation,
    add_product,
    norm,
    norm_back,
    operand,
    product,
    rows,
    save_rows,
    save_tokens,
    slope,
    tokens,
)


class Given(NamedTuple):
    """What reads depend on: tensors, or their shapes, or pointers.

    Attributes:
        q: queries [M, H, C, d_k].
        coef1: of W1, c_tj for its J bases and w_ts beside it, [M, H, C, J + C]; w above the diagonal is not looked at.
        left1: [M, H, C, d_v].
        right1: [M, H, C, hidden].
        keys: of W2 and, gated, of W3, [M, H, C, d_k] each: the slope of a link scales them differently.
        coefs: of W2 and W3, like `coef1`.
        lefts: of W2 and W3, [M, H, C, hidden].
        bases1: J matrices [M, H, d_v, hidden].
        bases2: J matrices [M, H, hidden, d_k] of W2, then J of W3.
        homes: of W1, W2 and W3, [H, o, i], or nothing.
        affine: scale and shift of the norm, [H, d_v], or nothing where there is no norm.
    """

    q: Any
    coef1: Any
    left1: Any
    right1: Any
    keys: Sequence[Any]
    coefs: Sequence[Any]
    lefts: Sequence[Any]
    bases1: Sequence[Any]
    bases2: Sequence[Any]
    homes: Sequence[Any]
    affine: Sequence[Any]

    @property
    def flat(self) -> list[Any]:
        """As operators take it."""
        return [*self[:4], *(x for xs in self[4:] for x in xs)]

    @classmethod
    def of(cls, flat: Sequence[Any], gated: bool, bases: int, home: bool) -> Given:
        """The reverse."""
        rest, inner = iter(flat[4:]), 1 + gated
        counts = (inner, inner, inner, bases, inner * bases, (1 + inner) * home)
        lists = [tuple(next(rest) for _ in range(count)) for count in counts]
        return cls._make([*flat[:4], *lists, tuple(rest)])


# -- a chunk's own ----------------------------------------------------------------------------------------------------


@triton.jit
def _of_chunk(given, here, P: tl.constexpr):
    """`Given` or its cotangents, of one chunk and head; homes and affine are left as they are."""
    return Given(
        given.q + here * P.chunk * P.d_k,
        given.coef1 + here * P.chunk * (P.bases + P.chunk),
        given.left1 + here * P.chunk * P.d_v,
        given.right1 + here * P.chunk * P.hidden,
        [keys + here * P.chunk * P.d_k for keys in given.keys],
        [coef + here * P.chunk * (P.bases + P.chunk) for coef in given.coefs],
        [left + here * P.chunk * P.hidden for left in given.lefts],
        [base + here * P.hidden * P.d_v for base in given.bases1],
        [base + here * P.hidden * P.d_k for base in given.bases2],
        given.homes,
        given.affine,
    )


@triton.jit
def _between(between, here, heads, P: tl.constexpr):
    """The cotangent of z, x and the cotangents of a and b, of one chunk and head."""
    across = (tl.program_id(0) % heads).to(tl.int64) * (tl.num_programs(0) // heads) + here // heads
    to_z, x, inner = between
    wide = across * P.chunk * P.hidden
    return to_z + across * P.chunk * P.d_v, x + wide, [to_a + wide for to_a in inner]


@triton.jit
def _lower(matrix, t, s, WIDTH: tl.constexpr, P: tl.constexpr):
    """Entries (t, s) of a C x C matrix with rows of that width; zeros above the diagonal, where none is looked at."""
    return tl.load(matrix + t * WIDTH + s, mask=(s <= t) & (t < P.chunk), other=0.0)


@triton.jit
def _coefficient(coef, t, j: tl.constexpr, P: tl.constexpr):
    """c_tj for one j."""
    return tl.load(coef + t * (P.bases + P.chunk) + j, mask=t < P.chunk, other=0.0)


# -- forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _scores(a, b, t, s, D: tl.constexpr, SOME: tl.constexpr, P: tl.constexpr):
    """Rows t of a times rows s of b, some channels at a time: as many as there are registers for."""
    total = tl.full([t.shape[0], s.shape[0]], 0.0, P.sum)
    for begin in range(0, D, SOME):
        d = begin + tl.arange(0, SOME)
        total = add_product(total, rows(a, t, d, D, P.limit), tl.trans(rows(b, s, d, D, P.limit)), P.operand)
    return total


@triton.jit
def _with_keys(of, m: tl.constexpr, t, s, SOME: tl.constexpr, P: tl.constexpr):
    """Scores of queries t with the keys s of W2, or of W3 for m = 1, weighted."""
    scores = _scores(of.q, of.keys[m], t, s, P.d_k, SOME, P)
    scores *= _lower(of.coefs[m] + P.bases, t[:, None], s[None, :], P.bases + P.chunk, P)
    return operand(scores, P.operand)


@triton.jit
def _hidden(of, m: tl.constexpr, queries, scores, t, s, h, head, P: tl.constexpr):
    """A block of a_t, or of b_t for m = 1."""
    i = tl.arange(0, P.d_k)
    a = product(scores, rows(of.lefts[m], s, h, P.hidden, P.limit), P.operand, P.sum)
    if P.home:
        home = rows(of.homes[1 + m] + head * P.hidden * P.d_k, h, i, P.d_k, 0)
        a = add_product(a, queries, tl.trans(home), P.operand)
    for j in tl.static_range(len(of.bases1)):
        base = rows(of.bases2[m * P.bases + j], h, i, P.d_k, 0)
        a += _coefficient(of.coefs[m], t[:, None], j, P) * product(queries, tl.trans(base), P.operand, P.sum)
    return a


@triton.jit
def read_forward(given, y, z, heads, P: tl.constexpr, CUT: tl.constexpr):
    """See `read.fused`."""
    here, head = tl.program_id(0).to(tl.int64), tl.program_id(0) % heads
    t, s = tl.program_id(1) * CUT.rows + tl.arange(0, CUT.rows), tl.arange(0, P.tokens)
    o = tl.arange(0, P.d_v)
    WIDTH: tl.constexpr = P.bases + P.chunk
    y, z, of = y + here * P.chunk * P.d_v, z + here * P.chunk * P.d_v, _of_chunk(given, here, P)

    scores2 = _with_keys(of, 0, t, s, 16, P)
    if P.gated:
        scores3 = _with_keys(of, 1, t, s, 16, P)
    queries = operand(tokens(of.q, t, P.limit, P.d_k, P.d_k), P.operand)
    scores1 = tl.full([CUT.rows, P.tokens], 0.0, P.sum)
    total = tl.full([CUT.rows, P.d_v], 0.0, P.sum)
    for begin in range(0, P.hidden, CUT.block):
        h = begin + tl.arange(0, CUT.block)
        a = _hidden(of, 0, queries, scores2, t, s, h, head, P)
        if P.gated:
            x = activation(_hidden(of, 1, queries, scores3, t, s, h, head, P), P.activation) * a
        else:
            x = activation(a, P.activation)
        scores1 = add_product(scores1, x, tl.trans(rows(of.right1, s, h, P.hidden, P.limit)), P.operand)
        if P.home:
            home = rows(of.homes[0] + head * P.hidden * P.d_v, o, h, P.hidden, 0)
            total = add_product(total, x, tl.trans(home), P.operand)
        for j in tl.static_range(len(of.bases1)):
            base = tl.trans(rows(of.bases1[j], o, h, P.hidden, 0))
            total = add_product(total, _coefficient(of.coef1, t[:, None], j, P) * x, base, P.operand)

    # A zero that the compiler does not know, or it keeps addresses of the begin in registers over the loop.
    late = tl.num_programs(2) - 1
    t, s = t + late, s + late
    scores1 *= _lower(of.coef1 + P.bases, t[:, None], s[None, :], WIDTH, P)
    total = add_product(total, scores1, tokens(of.left1, s, P.limit, P.d_v, P.d_v), P.operand)
    save_tokens(z, t, total, P.limit, P.d_v, P.d_v)
    if P.norm:
        n, _ = norm(total, P.eps, P.d_v)
        scale, shift = of.affine
        total = n * tl.load(scale + head * P.d_v + o)[None, :] + tl.load(shift + head * P.d_v + o)[None, :]
    if P.residual:
        total += tokens(of.q, t, P.limit, P.d_k, P.d_k)
    save_tokens(y, t, total, P.limit, P.d_v, P.d_v)


# -- backward ---------------------------------------------------------------------------------------------------------


@triton.jit
def read_back_hidden(given, grad_y, z, between, to_affine, heads, P: tl.constexpr, CUT: tl.constexpr):
    """`between`, and the cotangents of the norm's scale and shift, [parts M, H, d_v]."""
    here, head, part = tl.program_id(0).to(tl.int64), tl.program_id(0) % heads, tl.program_id(1)
    t, s = part * CUT.rows + tl.arange(0, CUT.rows), tl.arange(0, P.tokens)
    o = tl.arange(0, P.d_v)
    WIDTH: tl.constexpr = P.bases + P.chunk
    of = _of_chunk(given, here, P)
    grad_z, x, inner = _between(between, here, heads, P)

    to_z = tokens(grad_y + here * P.chunk * P.d_v, t, P.limit, P.d_v, P.d_v).to(P.sum)
    if P.norm:
        n, rstd = norm(tokens(z + here * P.chunk * P.d_v, t, P.limit, P.d_v, P.d_v).to(P.sum), P.eps, P.d_v)
        at = (part * tl.num_programs(0) + here) * P.d_v + o
        tl.store(to_affine[0] + at, tl.sum(to_z * n, 0))
        tl.store(to_affine[1] + at, tl.sum(to_z, 0))
        to_z = norm_back(to_z * tl.load(of.affine[0] + head * P.d_v + o)[None, :], n, rstd, P.d_v)
    to_z = operand(to_z, P.operand)
    save_tokens(grad_z, t, to_z, P.limit, P.d_v, P.d_v)
    to_scores1 = product(to_z, tl.trans(tokens(of.left1, s, P.limit, P.d_v, P.d_v)), P.operand, P.sum)
    to_scores1 = operand(to_scores1 * _lower(of.coef1 + P.bases, t[:, None], s[None, :], WIDTH, P), P.operand)
    scores2 = _with_keys(of, 0, t, s, min(P.d_k, 32), P)
    if P.gated:
        scores3 = _with_keys(of, 1, t, s, min(P.d_k, 32), P)
    queries = operand(tokens(of.q, t, P.limit, P.d_k, P.d_k), P.operand)
    for begin in range(0, P.hidden, CUT.block):
        h = begin + tl.arange(0, CUT.block)
        a = _hidden(of, 0, queries, scores2, t, s, h, head, P)
        if P.gated:
            b = _hidden(of, 1, queries, scores3, t, s, h, head, P)
            save_rows(x, t, h, activation(b, P.activation) * a, P.hidden, P.limit)
        else:
            save_rows(x, t, h, activation(a, P.activation), P.hidden, P.limit)
        to_x = product(to_scores1, rows(of.right1, s, h, P.hidden, P.limit), P.operand, P.sum)
        if P.home:
            home = rows(of.homes[0] + head * P.hidden * P.d_v, o, h, P.hidden, 0)
            to_x = add_product(to_x, to_z, home, P.operand)
        for j in tl.static_range(len(of.bases1)):
            part_j = product(to_z, rows(of.bases1[j], o, h, P.hidden, 0), P.operand, P.sum)
            to_x += _coefficient(of.coef1, t[:, None], j, P) * part_j
        if P.gated:
            save_rows(inner[0], t, h, to_x * activation(b, P.activation), P.hidden, P.limit)
            save_rows(inner[1], t, h, to_x * slope(b, P.activation) * a, P.hidden, P.limit)
        else:
            save_rows(inner[0], t, h, to_x * slope(a, P.activation), P.hidden, P.limit)


@triton.jit
def _over_hidden(
    x,
    matrix,
    t,
    N: tl.constexpr,
    TURNED: tl.constexpr,
    LIMIT: tl.constexpr,
    P: tl.constexpr,
    CUT: tl.constexpr,
):
    """X M^T for a matrix [N, hidden], of `LIMIT` rows if that is not 0, or, `TURNED`, X M for one [hidden, N]."""
    n = tl.arange(0, N)
    total = tl.full([CUT.rows, N], 0.0, P.sum)
    for begin in range(0, P.hidden, CUT.block):
        h = begin + tl.arange(0, CUT.block)
        part = rows(matrix, h, n, N, 0) if TURNED else tl.trans(rows(matrix, n, h, P.hidden, LIMIT))
        total = add_product(total, rows(x, t, h, P.hidden, P.limit), part, P.operand)
    return total


@triton.jit
def read_back_over_hidden(given, grad_y, between, scores, to, heads, P: tl.constexpr, CUT: tl.constexpr):
    """Sums over the hidden axis: cotangents of c_tj, of q as far as it does not go by scores, and, as `scores`, the
    scores of W1 and the cotangents of those of W2 and W3, [M, H, C, C], without weights.
    """
    here, head = tl.program_id(0).to(tl.int64), tl.program_id(0) % heads
    t, s = tl.program_id(1) * CUT.rows + tl.arange(0, CUT.rows), tl.arange(0, P.tokens)
    of, to = _of_chunk(given, here, P), _of_chunk(to, here, P)
    grad_z, x, inner = _between(between, here, heads, P)
    WIDTH: tl.constexpr = P.bases + P.chunk
    at = here * P.chunk * P.chunk + t[:, None] * P.chunk + s[None, :]
    lower = (s[None, :] <= t[:, None]) & (t[:, None] < P.chunk)

    tl.store(scores[0] + at, _over_hidden(x, of.right1, t, P.tokens, False, P.limit, P, CUT), mask=lower)
    for m in tl.static_range(len(of.lefts)):
        to_scores = _over_hidden(inner[m], of.lefts[m], t, P.tokens, False, P.limit, P, CUT)
        tl.store(scores[1 + m] + at, to_scores, mask=lower)
    for j in tl.static_range(len(of.bases1)):
        part = _over_hidden(x, of.bases1[j], t, P.d_v, False, 0, P, CUT)
        to_c = tl.sum(part * tokens(grad_z, t, P.limit, P.d_v, P.d_v).to(P.sum), 1)
        tl.store(to.coef1 + t * WIDTH + j, to_c, mask=t < P.chunk)
    to_q = tl.full([CUT.rows, P.d_k], 0.0, P.sum)
    for m in tl.static_range(len(of.lefts)):
        if P.home:
            to_q += _over_hidden(inner[m], of.homes[1 + m] + head * P.hidden * P.d_k, t, P.d_k, True, 0, P, CUT)
        for j in tl.static_range(len(of.bases1)):
            part_q = _over_hidden(inner[m], of.bases2[m * P.bases + j], t, P.d_k, True, 0, P, CUT)
            to_c = tl.sum(part_q * tokens(of.q, t, P.limit, P.d_k, P.d_k).to(P.sum), 1)
            tl.store(to.coefs[m] + t * WIDTH + j, to_c, mask=t < P.chunk)
            to_q += _coefficient(of.coefs[m], t[:, None], j, P) * part_q
    if P.residual:
        to_q += tokens(grad_y + here * P.chunk * P.d_v, t, P.limit, P.d_v, P.d_v)
    save_tokens(to.q, t, to_q, P.limit, P.d_k, P.d_k)


@triton.jit
def _factors_back(
    own, narrow, wide, scores, coef, to_coef, to_own, to_wide, t, s, D: tl.constexpr, P: tl.constexpr, CUT: tl.constexpr
):
    """Cotangents of one matrix's factors, of some tokens s, and of their weights: z = (X R1^T (.) w1) L1 of W1,
    a = (Q K^T (.) w2) L2 of W2. The scores of the wide factors, X with R1 or the cotangent of a with L2, are given;
    those of the narrow ones, the cotangent of z with L1 or Q with K, are not. Each are, but for weights, the cotangent
    of the other.
    """
    WIDTH: tl.constexpr = P.bases + P.chunk
    tile = tokens(narrow, t, P.limit, D, D)
    others = _scores(own, narrow, s, t, D, 16 if P.tokens > 16 else min(D, 32), P)
    scores = _lower(scores, t[None, :], s[:, None], P.chunk, P)
    within = (t[None, :] < P.chunk) & (s[:, None] < P.chunk)
    tl.store(to_coef + P.bases + t[None, :] * WIDTH + s[:, None], scores * others, mask=within)
    weights = _lower(coef + P.bases, t[None, :], s[:, None], WIDTH, P)
    save_tokens(to_own, s, product(scores * weights, tile, P.operand, P.sum), P.limit, D, D)
    others = operand(others * weights, P.operand)
    for begin in range(0, P.hidden, CUT.block):
        h = begin + tl.arange(0, CUT.block)
        to_factor = product(others, rows(wide, t, h, P.hidden, P.limit), P.operand, P.sum)
        save_rows(to_wide, s, h, to_factor, P.hidden, P.limit)


@triton.jit
def _inner_factors_back(of, inner, scores, to, m: tl.constexpr, t, s, P: tl.constexpr, CUT: tl.constexpr):
    """Those of W2, or of W3 for m = 1."""
    _factors_back(
        of.keys[m], of.q, inner[m], scores, of.coefs[m], to.coefs[m], to.keys[m], to.lefts[m], t, s, P.d_k, P, CUT
    )


@triton.jit
def _base_back(wide, narrow, coef, t, h, j: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    """A block [h, D] of the cotangent of base j: sum_t c_tj wide_t narrow_t^T."""
    scaled = _coefficient(coef, t[None, :], j, P) * tl.trans(rows(wide, t, h, P.hidden, P.limit)).to(P.sum)
    return product(scaled, tokens(narrow, t, P.limit, D, D), P.operand, P.sum)


@triton.jit
def read_back_over_tokens(given, between, scores, to, heads, P: tl.constexpr, CUT: tl.constexpr):
    """Sums over a chunk's tokens t: cotangents of w_ts, of the factors of some tokens s and of a part of the bases.
    And, for as many tokens t, the rest of q's.
    """
    here, part, role = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    t, s = tl.arange(0, P.tokens), part * CUT.rows + tl.arange(0, CUT.rows)
    i, o = tl.arange(0, P.d_k), tl.arange(0, P.d_v)
    of, to = _of_chunk(given, here, P), _of_chunk(to, here, P)
    grad_z, x, inner = _between(between, here, heads, P)
    own = here * P.chunk * P.chunk
    if role == 0:
        _factors_back(
            of.left1, grad_z, x, scores[0] + own, of.coef1, to.coef1, to.left1, to.right1, t, s, P.d_v, P, CUT
        )
    elif role == 1:
        _inner_factors_back(of, inner, scores[1] + own, to, 0, t, s, P, CUT)
    elif role == 2:
        # Bases, a program's part of the hidden axis: z = c1 (.) X B1^T, a = c2 (.) Q B2^T.
        for j in tl.static_range(len(of.bases1)):
            for block in range(part, P.hidden // CUT.block, P.tokens // CUT.rows):
                h = block * CUT.block + tl.arange(0, CUT.block)
                to_base1 = _base_back(x, grad_z, of.coef1, t, h, j, P.d_v, P)
                save_rows(to.bases1[j], o, h, tl.trans(to_base1), P.hidden, 0)
            for m in tl.static_range(len(of.lefts)):
                for block in range(part, P.hidden // CUT.block, P.tokens // CUT.rows):
                    h = block * CUT.block + tl.arange(0, CUT.block)
                    to_base2 = _base_back(inner[m], of.q, of.coefs[m], t, h, j, P.d_k, P)
                    save_rows(to.bases2[m * P.bases + j], h, i, to_base2, P.d_k, 0)
    elif role == 3:
        # q, by scores.
        to_q = tokens(to.q, s, P.limit, P.d_k, P.d_k)
        for m in tl.static_range(len(of.lefts)):
            to_scores = _lower(scores[1 + m] + own, s[:, None], t[None, :], P.chunk, P)
            to_scores *= _lower(of.coefs[m] + P.bases, s[:, None], t[None, :], P.bases + P.chunk, P)
            to_q = add_product(to_q, to_scores, tokens(of.keys[m], t, P.limit, P.d_k, P.d_k), P.operand)
        save_tokens(to.q, s, to_q, P.limit, P.d_k, P.d_k)
    elif P.gated:
        _inner_factors_back(of, inner, scores[2] + own, to, 1, t, s, P, CUT)
