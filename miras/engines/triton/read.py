"""Reads in many chunks at once, fused: those of a memory of two layers whose gates are one number per head.

For every chunk and head, its tokens t and the tokens s that it learned from,

    W2_t = sum_j c_tj B2_j (+ home2) + sum_{s <= t} w_ts left2_s k_s^T      W1_t likewise, right1_s instead of k_s
    a_t = W2_t q_t,   z_t = W1_t s(a_t),   y_t = (q_t +) scale (.) norm(z_t) + shift

or, with a gate, W3_t likewise, b_t = W3_t q_t and z_t = W1_t (s(b_t) (.) a_t); and no W_t is written out: the kernels
go over blocks of the hidden axis, whose activations stay on chip, and products of C x C scores take the place of the
sums over s. The way back computes them again; only z is kept for it. The linear form of a link within a chunk,
`Linearised`, is a sum of the same kind: link(O) is a base whose coefficient is 1, and slope and mean are in the bases
and factors before they come here, by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from miras.engines.model import memory_name
from miras.engines.triton.parts import OPERANDS, Rounding, sum_dtype
from miras.engines.triton.read_kernels import (
    Given,
    read_back_hidden,
    read_back_over_hidden,
    read_back_over_tokens,
    read_forward,
)
from miras.engines.unroll import Learned, Read, read_weight
from miras.memory import MLP, SwiGLU
from miras.products import operand_dtype
from miras.retention import EuclideanRetention
from miras.rule import Rule
from miras.weights import COLUMNS, ROWS, Leaf, Linearised, Unrolled, Weight

# -- operators of PyTorch ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem(Rounding):
    """What kernels are compiled for; `bases` is J."""

    chunk: int
    d_k: int
    d_v: int
    hidden: int
    gated: bool
    bases: int
    home: bool
    norm: bool
    residual: bool
    activation: str
    eps: float
    operand: tl.dtype

    @classmethod
    def of(cls, given: Given, residual: bool, activation: str, eps: float, operands: torch.dtype) -> Problem:
        """That of some tensors."""
        chunk, d_k = given.q.shape[-2:]
        d_v, hidden = given.left1.shape[-1], given.right1.shape[-1]
        kind = len(given.keys) > 1, len(given.bases1), bool(given.homes), bool(given.affine)
        return cls(chunk, d_k, d_v, hidden, *kind, residual, activation, eps, OPERANDS[operands])

    @property
    def tokens(self) -> int:
        """A chunk's tokens, as a power of two."""
        return max(16, 1 << (self.chunk - 1).bit_length())

    @property
    def limit(self) -> int:
        """Tokens that there are, 0 if as many."""
        return 0 if self.tokens == self.chunk else self.chunk


@dataclass(frozen=True)
class Tiling:
    """Tokens of a program, hidden units at a time, and warps."""

    rows: int
    block: int
    warps: int


def tiling(kernel: Any, problem: Problem) -> Tiling:
    """How a kernel is cut: as coarsely as all its variants still fit into registers."""
    tokens, d = problem.tokens, max(problem.d_k, problem.d_v)
    rows, block, warps = min(64, tokens), 32, 4 if tokens <= 32 else 8
    if problem.operand.primitive_bitwidth > 16:  # without matrix instructions
        rows, block, warps = 16, 16, 8
    elif kernel is read_forward:
        rows = 32 if tokens > 64 and d > 32 else rows
        block = 32 if tokens <= 32 < d or d <= 64 == tokens else 16
    elif kernel is read_back_hidden and tokens != 64:
        rows, block = 32 if problem.gated and d <= 64 < tokens else rows, 16
    # A power of two that divides the hidden axis.
    return Tiling(rows, min(block, problem.hidden & -problem.hidden), warps)


def _launch(kernel: Any, problem: Problem, given: Given, *tensors: Any) -> None:
    cut, (chunks, heads) = tiling(kernel, problem), given.q.shape[:2]
    grid = chunks * heads, problem.tokens // cut.rows, 4 + problem.gated if kernel is read_back_over_tokens else 1
    kernel[grid](given, *tensors, heads, problem, cut, num_warps=cut.warps, num_stages=1)


@torch.library.custom_op("miras::read", mutates_args=())
def fused(
    tensors: Sequence[Tensor],
    gated: bool,
    bases: int,
    home: bool,
    residual: bool,
    activation: str,
    eps: float,
    operands: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Outputs y and, for the way back, z, [M, H, C, d_v]: see the module.

    Args:
        tensors: `Given.flat`.
        gated: whether there is a W3.
        bases: J.
        home: whether there are homes.
        residual: whether q is added.
        activation: of `miras.memory.activation`.
        eps: what LN adds to the variance.
        operands: what operands of products are rounded to. Sums are in float32, or in float64.
    """
    given = Given.of([x.contiguous() for x in tensors], gated, bases, home)
    problem = Problem.of(given, residual, activation, eps, operands)
    y, z = (torch.empty_like(given.left1, dtype=sum_dtype(operands)) for _ in range(2))
    _launch(read_forward, problem, given, y, z)
    return y, z


@fused.register_fake
def _(tensors, gated, bases, home, residual, activation, eps, operands):
    left1 = Given.of(tensors, gated, bases, home).left1
    y, z = (left1.new_empty(left1.shape, dtype=sum_dtype(operands)) for _ in range(2))
    return y, z


@torch.library.custom_op("miras::read_backward", mutates_args=())
def fused_backward(
    grad_y: Tensor,
    z: Tensor,
    tensors: Sequence[Tensor],
    gated: bool,
    bases: int,
    home: bool,
    residual: bool,
    activation: str,
    eps: float,
    operands: torch.dtype,
) -> list[Tensor]:
    """The cotangents of `fused`'s tensors, from that of y."""
    given = Given.of([x.contiguous() for x in tensors], gated, bases, home)
    problem, (chunks, heads) = Problem.of(given, residual, activation, eps, operands), given.q.shape[:2]
    parts, sums = problem.tokens // tiling(read_back_hidden, problem).rows, sum_dtype(operands)
    to = Given.of([torch.empty_like(x, dtype=sums) for x in tensors], gated, bases, home)
    to = to._replace(homes=(), affine=tuple(z.new_empty(parts * chunks, *x.shape) for x in given.affine))
    widths = problem.d_v, problem.hidden, *(problem.hidden for _ in given.keys)
    grad_z, x, *inner = (z.new_empty(heads, chunks * problem.chunk, n, dtype=operands) for n in widths)
    scores = tuple(z.new_empty(chunks, heads, problem.chunk, problem.chunk) for _ in (1, *given.keys))
    between, grad_y = (grad_z, x, tuple(inner)), grad_y.contiguous()
    _launch(read_back_hidden, problem, given, grad_y, z, between, to.affine)
    _launch(read_back_over_hidden, problem, given, grad_y, between, scores, to)
    _launch(read_back_over_tokens, problem, given, between, scores, to)
    if home:
        queries = given.q.to(operands).transpose(0, 1).flatten(1, 2)
        to = to._replace(homes=(grad_z.mT @ x, *(to_a.mT @ queries for to_a in inner)))
    to = to._replace(affine=tuple(x.sum(0) for x in to.affine))
    return [x.to(like.dtype) for x, like in zip(to.flat, tensors, strict=True)]


@fused_backward.register_fake
def _(grad_y, z, tensors, *options):
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
def _flops(tensors: Any, gated: bool, bases: int, home: bool, *_: Any, **_more: Any) -> int:
    """Scores are counted in full, as products compute them."""
    (m, h, c, d_k), d_v, hidden = tensors[0], tensors[2][-1], tensors[3][-1]
    inner = (bases + home) * hidden * d_k + c * (d_k + hidden)
    return 2 * m * h * c * ((bases + home) * hidden * d_v + c * (hidden + d_v) + (1 + gated) * inner)


@register_flop_formula(torch.ops.miras.read_backward)
def _flops_backward(
    grad_y: Any, z: Any, tensors: Any, gated: bool, bases: int, home: bool, *_: Any, **_more: Any
) -> int:
    """Twice those forward, and the hidden layer, the scores and, for c_tj, the outputs again."""
    (m, h, c, d_k), d_v, hidden = tensors[0], tensors[2][-1], tensors[3][-1]
    again = hidden * bases * d_v + c * (d_v + hidden)
    inner = hidden * (bases + home) * d_k + c * (2 * d_k + hidden)
    return 2 * _flops(tensors, gated, bases, home) + 2 * m * h * c * (again + (1 + gated) * inner)


# -- the seam to the engines ------------------------------------------------------------------------------------------


def serves(rule: Rule, leaves: dict[str, Leaf], learned: Learned, read: Read) -> bool:
    """Whether `read` can take the place of `unroll.read_chunks`."""
    if not memory_name(rule) or rule.window > 1:
        return False
    linear = rule.link_at == "chunk" or isinstance(rule.retention, EuclideanRetention)
    per_head = all(isinstance(rows, Tensor) and rows.shape[-1] == 1 for rows in read.coefficients.values())
    shared = all(home.dim() == 3 for home in learned.before.home.values())
    sizes = {leaves["w1"].rows, leaves["w2"].cols} <= {16, 32, 64, 128} and read.q.shape[-2] <= 128
    return linear and per_head and shared and sizes


def read(rule: Rule, leaves: dict[str, Leaf], learned: Learned, read: Read) -> Tensor:
    """See `unroll.read_chunks`: the same, fused."""
    memory = rule.memory
    assert isinstance(memory, MLP | SwiGLU)
    w1, *inner = (
        _terms(read_weight(rule, leaf, learned, n, read.coefficients[n]), read.coefficients[n])
        for n, leaf in leaves.items()
    )
    slow = learned.before.slow
    affine = [slow["norm_scale"], slow["norm_shift"]] if memory.norm else []
    cast = operand_dtype(w1.left)
    given = Given(
        read.q, w1.coef, w1.left, w1.right,
        [w.right for w in inner], [w.coef for w in inner], [w.left for w in inner],
        w1.bases, [base for w in inner for base in w.bases], [home for w in (w1, *inner) for home in w.home], affine,
    )  # fmt: skip
    kind = len(inner) > 1, len(w1.bases), bool(w1.home), memory.residual
    return fused(given.flat, *kind, memory.activation, memory.eps, cast)[0]


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
