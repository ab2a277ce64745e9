"""The scan over chunks of a memory of two layers, W1 s(W2 k) or W1 (s(W3 k) (.) W2 k), as operators: what each chunk
finds and learns, all of it in one kernel (`learn_forward`), and the way back in another (`learn_back`).
"""

# A kernel is launched with what its compiler wants, too, which its signature does not have.
# pyright: reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from miras.engines.model import Model
from miras.engines.triton.learn_back import learn_back_kernel
from miras.engines.triton.learn_forward import learn_kernel
from miras.engines.triton.parts import OPERANDS

WARPS = 8
LEAVES = 3  # matrices at most


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


def shapes(k: Tensor, gate: Tensor | None, rows: Tensor, starts: Sequence[Tensor], model: str, operand: str) -> Shapes:
    """How the kernels are launched."""
    chunks, heads, size, d = k.shape
    widths = 0 if gate is None else gate.shape[-1], rows.shape[-1]
    operands = OPERANDS[getattr(torch, operand)]
    constants = compiled_for(size, d, starts[0].shape[-1], *widths, Model.parse(model), operands)
    return Shapes(chunks, starts[0].shape[0], heads, constants)


def compiled_for(
    chunk: int, d: int, hidden: int, gate_width: int, row_width: int, model: Model, operand: tl.dtype
) -> dict[str, Any]:
    """What a kernel is compiled for. Its tiles are as large as the registers of 8 warps take: see
    `benchmarks/ahead_of_time.py`. With a gate there are more of them at a time.
    """
    tile = min(64, max(16, 1 << (chunk - 1).bit_length()))
    few = d <= 64 or tile > 16  # registers, for matrices beside tokens
    return {
        "C": chunk,
        "LIMIT": chunk if chunk % tile else 0,
        "D": d,
        "HIDDEN": hidden,
        "TILE": tile,
        "PART": 16,
        "BLOCK": 16 if d < 64 or (few and (model.gated or (d > 64 and model.slots))) else 32,
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
    starts: Sequence[Tensor],
    origins: Sequence[Tensor],
    homes: Sequence[Tensor],
    affine: Sequence[Tensor],
    first: Tensor,
    count: Tensor,
    model: str,
    operand: str,
) -> list[Tensor]:
    """Learn from M chunks of N sequences.

    Args:
        k: keys [M, H, C, d]; v alike. Chunk i of sequence n is number first[i] + n.
        v: values.
        gate: the bias' gate [M, H, C, 1 | d], if it has one.
        rows: the update's coefficients [M, H, 1 + S, 1 + S + C, 1 | d].
        starts: dual and slots that the first chunks find, of W1 [N, H, 1 + S, d, hidden], of W2 and W3
            [N, H, 1 + S, hidden, d].
        origins: duals at which the first chunks' gradients are taken, [N, H, o, i]; those of later chunks are at what
            they find.
        homes: the initial duals that states are relative to, [H, o, i], if they are.
        affine: scale and shift of LN, [H, d], if there is one.
        first: number of the first chunk of each step, int32.
        count: chunks of each sequence, int32 [N], not rising.
        model: what the kernels are compiled for, `str(Model)`.
        operand: dtype of the operands of products.

    Returns:
        Of each matrix dual and slots found by each chunk and then at the end of each sequence, [M + N, H, 1 + S, o, i];
        of each the left factor of its gradients, rate1 u1 [M, H, C, d], rate2 u2 or rate2 u3 [M, H, C, hidden]; the
        right factor x of W1's, that of others being k; z = W1 x.
    """
    shape, leaves = shapes(k, gate, rows, starts, model, operand), len(starts)
    made = _empty(k, starts)
    for found, start in zip(made, starts, strict=False):
        found[: shape.rows] = start
    learn_kernel[shape.grid](
        *_pointers(k, v, gate, rows, first, count, origins, homes, affine),
        tuple(made[:leaves]),
        tuple(made[leaves : 2 * leaves]),
        *made[-2:],
        shape.chunks,
        k.shape[2],
        **shape.constants,
        num_warps=WARPS,
        num_stages=1,
    )
    return made


def _pointers(
    k: Tensor, v: Tensor, gate: Tensor | None, rows: Tensor, first: Tensor, count: Tensor, *lists: Sequence[Tensor]
) -> list[Any]:
    """Tensors as kernels take them; what a rule has not got is not looked at."""
    matrices = tuple(tuple(x.contiguous() for x in xs) or (k,) * LEAVES for xs in lists)
    return [*((k if x is None else x).contiguous() for x in (k, v, gate, rows, first, count)), *matrices]


def _empty(k: Tensor, starts: Sequence[Tensor]) -> list[Tensor]:
    """What `learn` returns, unset."""
    (m, heads, size, d), (n, *_, hidden) = k.shape, starts[0].shape
    found = [s.new_empty(m + n, *s.shape[1:]) for s in starts]
    widths = (d, *(hidden for _ in starts), d)
    return [*found, *(k.new_empty(m, heads, size, width) for width in widths)]


@learn.register_fake
def _(k: Tensor, v: Tensor, gate: Tensor | None, rows: Tensor, starts: Sequence[Tensor], *rest: Any) -> Any:
    return _empty(k, starts)


@torch.library.custom_op("miras::learn_backward", mutates_args=())
def learn_backward(
    cotangents: Sequence[Tensor],
    made: Sequence[Tensor],
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    rows: Tensor,
    starts: Sequence[Tensor],
    origins: Sequence[Tensor],
    homes: Sequence[Tensor],
    affine: Sequence[Tensor],
    first: Tensor,
    count: Tensor,
    model: str,
    operand: str,
) -> list[Tensor]:
    """The cotangents of `learn`'s tensors from k to affine one after another, empty for a gate that is None, from those
    of all that it returned but z; `made` is what it returned.
    """
    shape, leaves, hidden = shapes(k, gate, rows, starts, model, operand), len(starts), starts[0].shape[-1]
    scratch = k.new_empty(shape.rows, shape.heads, k.shape[2], (2 * leaves - 1) * hidden + k.shape[3])
    tokens = [k.new_empty(0) if x is None else _alike(x) for x in (k, v, gate, rows)]
    to_starts = [x[shape.chunks :].clone() for x in cotangents[:leaves]]
    to_origins = [_alike(x) for x in origins]
    to_homes, to_affine = ([x.new_zeros(shape.rows, *x.shape) for x in xs] for xs in (homes, affine))
    found, lefts, from_found, from_lefts = (
        tuple(x.contiguous() for x in xs[i : i + leaves]) for xs in (made, cotangents) for i in (0, leaves)
    )
    learn_back_kernel[shape.grid](
        *_pointers(k, v, gate, rows, first, count, origins, homes, affine),
        found,
        lefts,
        *(x.contiguous() for x in made[-2:]),
        from_found,
        from_lefts,
        cotangents[-1].contiguous(),
        *tokens,
        tuple(to_starts),
        tuple(to_origins),
        tuple(to_homes) or (scratch,) * leaves,
        tuple(to_affine) or (scratch,) * 2,
        scratch,
        k.shape[2],
        **shape.constants,
        num_warps=WARPS,
        num_stages=1,
    )
    return [*tokens, *to_starts, *to_origins, *(x.sum(0) for x in (*to_homes, *to_affine))]


def _alike(x: Tensor) -> Tensor:
    """A contiguous tensor of the same shape, unset."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@learn_backward.register_fake
def _(cotangents: Any, made: Any, k: Tensor, v: Tensor, gate: Tensor | None, rows: Tensor, *lists: Any) -> list[Tensor]:
    given = (k, v, gate, rows, *(x for xs in lists[:4] for x in xs))
    return [k.new_empty(0) if x is None else _alike(x) for x in given]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tokens, starts, origins, homes, affine, first, count, ctx.model, ctx.operand = inputs
    ctx.sizes = [len(tokens), *(len(xs) for xs in (starts, origins, homes, affine)), 2, len(output)]
    ctx.save_for_backward(*tokens, *starts, *origins, *homes, *affine, first, count, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, cotangents: list[Tensor | None]) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)  # to be looked at once only, under checkpointing
    tokens, *lists, places, made = (list(islice(saved, size)) for size in ctx.sizes)
    known = [torch.zeros_like(x) if c is None else c for c, x in zip(cotangents[:-1], made, strict=False)]
    to = iter(torch.ops.miras.learn_backward(known, made, *tokens, *lists, *places, ctx.model, ctx.operand))
    to_tokens, *to_lists = (list(islice(to, size)) for size in ctx.sizes[:5])
    to_tokens = [None if x is None else t for t, x in zip(to_tokens, tokens, strict=True)]
    return *to_tokens, *to_lists, None, None, None, None


torch.library.register_autograd("miras::learn", _backward, setup_context=_save)


def _products(k: list[int], start1: list[int]) -> int:
    """FLOPs of one product of every chunk with a whole matrix."""
    return 2 * k[0] * k[1] * k[2] * start1[-1] * start1[-2]


@register_flop_formula(torch.ops.miras.learn)
def _(k: list[int], v: Any, gate: Any, rows: Any, starts: list[list[int]], *rest: Any, **also: Any) -> int:
    # a, z, W1^T u1 and b; one for each matrix of each copy.
    return (len(starts) + 1 + len(starts) * starts[0][2]) * _products(k, starts[0])


@register_flop_formula(torch.ops.miras.learn_backward)
def _(
    cotangents: Any,
    made: Any,
    k: list[int],
    v: Any,
    gate: Any,
    rows: Any,
    starts: list[list[int]],
    *rest: Any,
    **also: Any,
) -> int:
    # W1 inner, W1^T u1, W1^T to_z and two for W1 itself; for each other matrix a, W2^T to_a and one for itself; two for
    # each matrix of each copy. Of first order none for the matrices themselves.
    leaves, first_order = len(starts), Model.parse(rest[-2]).first_order
    products = 5 + 3 * (leaves - 1) - (1 + leaves) * first_order + 2 * leaves * starts[0][2]
    return products * _products(k, starts[0])
