"""Reads in many chunks at once where gates are per channel: their sums over pairs of tokens, fused.

The decay between two tokens is another for each channel, e_tsi = exp(rows_ti - log_si) for s <= t + diagonal, so that
W2, with channels along its columns, and W1, with channels along its rows, are read with

    scores_ts = sum_i a_ti b_si e_tsi        sums_ti = sum_s scores_ts b_si e_tsi

see `decay.decayed_scores` and `decayed_sum`. No e [C, C, d] is written out: between blocks of tokens it is the decay
from s to the begin of t's block times that from there to t, each at most 1 and on one factor of a product; within a
block it is in registers. The derivatives are these sums again and, over the other token,

    back_si = sum_t scores_ts a_ti e_tsi

and those of rows and log are a factor times its own. All other products of such reads, those with matrices of the
hidden axis, are PyTorch's.
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from miras.engines.triton.parts import (
    OPERANDS,
    Rounding,
    add_product,
    product,
    save_rows,
    save_tokens,
    sum_dtype,
    tokens,
)
from miras.engines.unroll import Learned, Read, read_weight
from miras.products import operand_dtype
from miras.rule import Rule
from miras.weights import Decayed, Leaf, Linearised, Weight

BLOCK = tl.constexpr(16)  # tokens of a program: the least that a product may have
WARPS = 4


@dataclass(frozen=True)
class Problem(Rounding):
    """What kernels are compiled for: tokens of a chunk, channels, and which s a token t sees, up to t + diagonal."""

    chunk: int
    d: int
    diagonal: int
    operand: tl.dtype


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _here(x, WIDTH: tl.constexpr, P: tl.constexpr):
    """Where the chunk and head of this program begin, of tokens of that width."""
    return x + tl.program_id(0).to(tl.int64) * P.chunk * WIDTH


@triton.jit
def _tokens(chunk, t, P: tl.constexpr, other=0.0):
    """Some tokens, zeros or `other` beyond the chunk."""
    return tokens(chunk, t, P.chunk, P.d, P.d, other).to(P.sum)


@triton.jit
def _one(chunk, t, P: tl.constexpr):
    """One token [1, d]."""
    return tl.load(chunk + t * P.d + tl.arange(0, P.d))[None, :].to(P.sum)


@triton.jit
def _begin(log, first, P: tl.constexpr):
    """`log` before the token `first`, where a block begins: that of no decay before the first of all, [1, d]."""
    return tl.load(log + (first - 1) * P.d + tl.arange(0, P.d), mask=first > 0, other=0.0)[None, :].to(P.sum)


@triton.jit
def _pairs(scores, t, s, P: tl.constexpr):
    """Entries (t, s), zeros beyond the chunk."""
    return tl.load(scores + t * P.chunk + s, mask=(t < P.chunk) & (s < P.chunk), other=0.0)


@triton.jit
def _ratio(rows, log, seen):
    """The decay e of pairs that are seen, else 0; set before exp, which overflows above the diagonal."""
    return tl.exp(tl.where(seen, rows - log, float("-inf")))


@triton.jit
def decayed_scores_kernel(a, b, rows, log, scores, P: tl.constexpr):
    """Rows t of a block."""
    scores, rows, log = _here(scores, P.chunk, P), _here(rows, P.d, P), _here(log, P.d, P)
    a, b, first = _here(a, P.d, P), _here(b, P.d, P), tl.program_id(1) * BLOCK
    t = first + tl.arange(0, BLOCK)
    begin, rows_t, a_t = _begin(log, first, P), _tokens(rows, t, P, float("-inf")), _tokens(a, t, P)
    left = a_t * tl.exp(rows_t - begin)
    for other in range(0, first, BLOCK):
        s = other + tl.arange(0, BLOCK)
        right = _tokens(b, s, P) * tl.exp(begin - _tokens(log, s, P))
        save_rows(scores, t, s, product(left, tl.trans(right), P.operand, P.sum), P.chunk, P.chunk)
    for s in range(first, min(first + BLOCK, P.chunk)):
        ratio = _ratio(rows_t, _one(log, s, P), t[:, None] + P.diagonal >= s)
        column = tl.sum(a_t * _one(b, s, P) * ratio, 1, keep_dims=True)
        tl.store(scores + t[:, None] * P.chunk + s, column, mask=t[:, None] < P.chunk)
    for other in range(first + BLOCK, P.chunk, BLOCK):
        columns, zeros = other + tl.arange(0, BLOCK), tl.full([BLOCK, BLOCK], 0.0, P.sum)
        tl.store(scores + t[:, None] * P.chunk + columns[None, :], zeros, mask=columns[None, :] < P.chunk)


@triton.jit
def decayed_sum_kernel(scores, b, rows, log, sums, P: tl.constexpr):
    """Sums over s, of the tokens t of a block."""
    scores, rows, log = _here(scores, P.chunk, P), _here(rows, P.d, P), _here(log, P.d, P)
    b, first = _here(b, P.d, P), tl.program_id(1) * BLOCK
    t = first + tl.arange(0, BLOCK)
    begin, rows_t = _begin(log, first, P), _tokens(rows, t, P, float("-inf"))
    total = tl.full([BLOCK, P.d], 0.0, P.sum)
    for other in range(0, first, BLOCK):
        s = other + tl.arange(0, BLOCK)
        right = _tokens(b, s, P) * tl.exp(begin - _tokens(log, s, P))
        total = add_product(total, _pairs(scores, t[:, None], s[None, :], P), right, P.operand)
    total *= tl.exp(rows_t - begin)
    for s in range(first, min(first + BLOCK, P.chunk)):
        ratio = _ratio(rows_t, _one(log, s, P), t[:, None] + P.diagonal >= s)
        total += _pairs(scores, t[:, None], s, P) * _one(b, s, P) * ratio
    save_tokens(_here(sums, P.d, P), t, total, P.chunk, P.d, P.d)


@triton.jit
def decayed_sum_back_kernel(scores, a, rows, log, sums, P: tl.constexpr):
    """Sums over t, of the tokens s of a block."""
    scores, rows, log = _here(scores, P.chunk, P), _here(rows, P.d, P), _here(log, P.d, P)
    a, first = _here(a, P.d, P), tl.program_id(1) * BLOCK
    s = first + tl.arange(0, BLOCK)
    log_s, total = _tokens(log, s, P), tl.full([BLOCK, P.d], 0.0, P.sum)
    for other in range(first + BLOCK, P.chunk, BLOCK):
        t = other + tl.arange(0, BLOCK)
        begin = _begin(log, other, P)
        left = _tokens(a, t, P) * tl.exp(_tokens(rows, t, P, float("-inf")) - begin)
        part = product(tl.trans(_pairs(scores, t[:, None], s[None, :], P)), left, P.operand, P.sum)
        total += part * tl.exp(begin - log_s)
    for t in range(first, min(first + BLOCK, P.chunk)):
        ratio = _ratio(_one(rows, t, P), log_s, t + P.diagonal >= s[:, None])
        total += _pairs(scores, t, s[:, None], P) * _one(a, t, P) * ratio
    save_tokens(_here(sums, P.d, P), s, total, P.chunk, P.d, P.d)


# -- operators of PyTorch ---------------------------------------------------------------------------------------------


def _launch(kernel: Any, given: list[Tensor], like: Tensor, width: int, diagonal: int, operands: torch.dtype) -> Tensor:
    """[M, H, C, width] from some tensors [M, H, C, ..], of which `like` has d channels."""
    chunk, d = like.shape[-2:]
    problem = Problem(chunk, d, diagonal, OPERANDS[operands])
    found = like.new_empty(*like.shape[:-1], width, dtype=sum_dtype(operands))
    grid = found.shape[:-2].numel(), -(-chunk // BLOCK.value)
    kernel[grid](*(x.contiguous() for x in given), found, problem, num_warps=WARPS, num_stages=1)
    return found


@torch.library.custom_op("miras::decayed_scores", mutates_args=())
def decayed_scores(a: Tensor, b: Tensor, rows: Tensor, log: Tensor, diagonal: int, operands: torch.dtype) -> Tensor:
    """See `decay.decayed_scores`; all tensors [M, H, C, d], d a power of two from 16 on. Operands of products are
    rounded to `operands`, sums are in float32 or in float64.
    """
    return _launch(decayed_scores_kernel, [a, b, rows, log], a, a.shape[-2], diagonal, operands)


@torch.library.custom_op("miras::decayed_sum", mutates_args=())
def decayed_sum(scores: Tensor, b: Tensor, rows: Tensor, log: Tensor, diagonal: int, operands: torch.dtype) -> Tensor:
    """See `decay.decayed_sum`; scores [M, H, C, C], all others as of `decayed_scores`."""
    return _launch(decayed_sum_kernel, [scores, b, rows, log], b, b.shape[-1], diagonal, operands)


@torch.library.custom_op("miras::decayed_sum_back", mutates_args=())
def decayed_sum_back(
    scores: Tensor, a: Tensor, rows: Tensor, log: Tensor, diagonal: int, operands: torch.dtype
) -> Tensor:
    """sum_t scores_ts a_t exp(rows_t - log_s) over t from s - diagonal on, [M, H, C, d]."""
    return _launch(decayed_sum_back_kernel, [scores, a, rows, log], a, a.shape[-1], diagonal, operands)


@decayed_scores.register_fake
def _(a, b, rows, log, diagonal, operands):
    return a.new_empty(*a.shape[:-1], a.shape[-2], dtype=sum_dtype(operands))


def _like_factor(scores, factor, rows, log, diagonal, operands):
    return factor.new_empty(factor.shape, dtype=sum_dtype(operands))


decayed_sum.register_fake(_like_factor)
decayed_sum_back.register_fake(_like_factor)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.diagonal, ctx.operands = inputs
    ctx.save_for_backward(*tensors, output)


def _scores_back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b, rows, log, _ = ctx.saved_tensors
    how = rows, log, ctx.diagonal, ctx.operands
    to_a, to_b = decayed_sum(grad, b, *how), decayed_sum_back(grad, a, *how)
    return to_a, to_b, a * to_a, -b * to_b, None, None


def _sum_back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    scores, b, rows, log, sums = ctx.saved_tensors
    how = rows, log, ctx.diagonal, ctx.operands
    to_b = decayed_sum_back(scores, grad, *how)
    return decayed_scores(grad, b, *how), to_b, grad * sums, -b * to_b, None, None


decayed_scores.register_autograd(_scores_back, setup_context=_keep)
decayed_sum.register_autograd(_sum_back, setup_context=_keep)


@register_flop_formula([torch.ops.miras.decayed_scores, torch.ops.miras.decayed_sum, torch.ops.miras.decayed_sum_back])
def _flops(first: Any, second: Any, rows: Any, *_: Any, **_more: Any) -> int:
    """Pairs are counted in full."""
    m, h, c, d = rows
    return 2 * m * h * c * c * d


# -- the seam to the engine -------------------------------------------------------------------------------------------


class Fused(Decayed):
    """`Decayed` by these operators."""

    def scores(self, x: Tensor, right: Tensor) -> Tensor:
        """See `Decayed`."""
        return decayed_scores(x, right, self.rows, self.log, self.diagonal, operand_dtype(x))

    def sums(self, scores: Tensor, left: Tensor) -> Tensor:
        """See `Decayed`."""
        return decayed_sum(scores, left, self.rows, self.log, self.diagonal, operand_dtype(left))


def read(rule: Rule, leaves: dict[str, Leaf], learned: Learned, read: Read) -> Tensor:
    """See `unroll.read_chunks`: the same, with sums over pairs fused where decay is per channel."""
    weights = {n: _fused(read_weight(rule, leaf, learned, n, read.coefficients[n])) for n, leaf in leaves.items()}
    return rule.read(weights, read.q, learned.before.slow)


def _fused(weight: Weight) -> Weight:
    if isinstance(weight, Linearised) and isinstance(weight.change, Decayed):
        return weight._replace(change=Fused(*weight.change))
    return Fused(*weight) if isinstance(weight, Decayed) else weight
