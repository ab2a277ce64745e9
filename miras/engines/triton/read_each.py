"""Reads with a link at every token, `link_at="token"`, in many chunks at once: those of a memory of two layers.

For every chunk and head its tokens t, one after another,

    A_t, S_t = steps_t (A_{t-1}, S_{t-1}, narrow_t wide_t^T)     W_t = link(A_t (+ home))      for each matrix
    a_t = W2_t q_t,   x_t = s(a_t), or with b_t = W3_t q_t in a gated memory s(b_t) (.) a_t
    z_t = W1_t x_t,   y_t = (q_t +) scale (.) norm(z_t) + shift

where A_0 is the dual that the chunk finds and S_0 the algorithm's slot, if it has one. A_t and W_t are in registers,
some channels at a time, and never in memory; as sums over all earlier tokens, by matrix products, they would take C
times as many operations. The way back goes over the tokens from the last to the first. What they find it makes again,
from the begin of their segment of the chunk, in scratch of its own: a decay cannot be undone. All of it is elementwise,
in float32 or in float64: there are no products whose operands could follow autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from miras.engines.model import Model, memory_name
from miras.engines.triton.read_each_back import read_each_backward
from miras.engines.triton.read_each_forward import Between, Given, read_each_forward
from miras.engines.unroll import Learned
from miras.memory import MLP, SwiGLU
from miras.retention import EuclideanRetention
from miras.rule import Rule
from miras.weights import Leaf

# Entries of a tile, dual and slot together, as many as the registers of so many warps take, half of them where each
# channel has steps of its own: see `benchmarks/ahead_of_time.py`. The hidden axis of one channel, at most.
TILE, WARPS, WIDEST = 4096, 8, 1024
# Of the way back: tokens of a segment, about the root of a chunk, and programs, two for each multiprocessor of an H200.
SEGMENT, PROGRAMS = 8, 264


@dataclass(frozen=True)
class Problem:
    """What kernels are compiled for beside the `Model`.

    Attributes:
        slots: S.
        width: 1 or d, of the steps.
        before: a token reads with the weights it has found.
        block: channels of a tile.
        segment: tokens whose states are made again at once.
    """

    chunk: int
    d_k: int
    d_v: int
    hidden: int
    slots: int
    width: int
    before: bool
    block: int
    segment: int

    @classmethod
    def of(cls, given: Given, before: bool) -> Problem:
        """That of some tensors."""
        (chunk, d_k), d_v, hidden = given.q.shape[-2:], given.lefts[0].shape[-1], given.x.shape[-1]
        copies, width = given.steps.shape[-3], given.steps.shape[-1]
        block = min(TILE // (copies if width == 1 else 2 * copies) // hidden, d_k, d_v)
        return cls(chunk, d_k, d_v, hidden, copies - 1, width, before, block, SEGMENT)

    @property
    def tile(self) -> int:
        """Entries of a tile."""
        return self.block * self.hidden

    @property
    def step(self) -> int:
        """Coefficients of a token."""
        return (1 + self.slots) * (2 + self.slots) * self.width

    @property
    def segments(self) -> int:
        """Segments of a chunk."""
        return -(-self.chunk // self.segment)

    @property
    def scratch(self) -> int:
        """Numbers that a program of the way back keeps."""
        return (self.segments + self.segment) * (1 + self.slots) * self.tile


# -- operators of PyTorch ---------------------------------------------------------------------------------------------


@torch.library.custom_op("miras::read_each", mutates_args=())
def fused(tensors: Sequence[Tensor], model: str, before: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs y [M, H, C, d_v] and, for the way back, a, b, z and sums of `Between`.

    Args:
        tensors: `Given.flat`.
        model: what the kernels are compiled for, `str(Model)`.
        before: a token reads with the weights it has found.
    """
    parsed = Model.parse(model)
    given = _given(tensors, parsed)
    y, a, b, z, sums = _empty(given, parsed)
    between = Between(a.zero_(), b.zero_(), z, sums.zero_(), z, a)  # the last two are not looked at
    chunks, heads = given.q.shape[:2]
    read_each_forward[(chunks * heads,)](given, between, y, heads, **_compiled_for(Problem.of(given, before), parsed))
    return y, a, b, z, sums


def _compiled_for(problem: Problem, model: Model) -> dict[str, Any]:
    return {"P": problem, "MODEL": model, "num_warps": WARPS, "num_stages": 1}


def _given(tensors: Sequence[Tensor], model: Model) -> Given:
    """As kernels take it; homes that a rule has not got are not looked at."""
    given = Given.of([x.contiguous() for x in tensors], model)
    return given if model.home else given._replace(homes=(given.q,) * len(given.lefts))


def _empty(given: Given, model: Model) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `fused` returns, unset."""
    tokens, d_v, hidden = given.q.shape[:-1], given.lefts[0].shape[-1], given.x.shape[-1]
    sizes = d_v, hidden, hidden * model.gated, d_v, (2 + model.gated) * model.whole
    y, a, b, z, sums = (given.q.new_empty(*tokens, size) for size in sizes)
    return y, a, b, z, sums


@fused.register_fake
def _(tensors: Sequence[Tensor], model: str, before: bool) -> Any:
    parsed = Model.parse(model)
    return _empty(Given.of(tensors, parsed), parsed)


@torch.library.custom_op("miras::read_each_backward", mutates_args=())
def fused_backward(
    grad_y: Tensor, a: Tensor, b: Tensor, z: Tensor, sums: Tensor, tensors: Sequence[Tensor], model: str, before: bool
) -> list[Tensor]:
    """The cotangents of `fused`'s tensors, from that of y."""
    parsed = Model.parse(model)
    given = _given(tensors, parsed)
    problem, (chunks, heads) = Problem.of(given, before), given.q.shape[:2]
    programs = min(chunks, max(1, PROGRAMS // heads))
    between = Between(a, b, z, sums, torch.empty_like(z), torch.zeros_like(a))
    to = Given(
        *(torch.zeros_like(x) for x in given[:4]),
        lefts=tuple(torch.zeros_like(x) for x in given.lefts),
        bases=tuple(torch.empty_like(x) for x in given.bases),
        homes=(),
        affine=(),
    )
    to_homes = tuple(x.new_zeros(programs, *x.shape) for x in given.homes) if parsed.home else given.homes
    to_affine = tuple(x.new_empty(programs, *x.shape) for x in given.affine)
    scratch = z.new_empty(programs, heads, problem.scratch)
    read_each_backward[(programs, heads)](
        *(given, between, grad_y.contiguous(), to, to_homes, to_affine, scratch, chunks, heads),
        **_compiled_for(problem, parsed),
    )
    shared = [x.sum(0) for x in (*(to_homes if parsed.home else ()), *to_affine)]
    return [*to.flat, *shared]


@fused_backward.register_fake
def _(
    grad_y: Any, a: Any, b: Any, z: Any, sums: Any, tensors: Sequence[Tensor], model: str, before: bool
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in tensors]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], *tensors)


def _back(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[list[Tensor] | None, ...]:
    a, b, z, sums, *tensors = ctx.saved_tensors
    grads = None if grad_y is None else fused_backward(grad_y, a, b, z, sums, tensors, *ctx.options)
    return grads, None, None


fused.register_autograd(_back, setup_context=_keep)


@register_flop_formula(torch.ops.miras.read_each)
def _flops(tensors: Any, model: str, *_: Any, **_more: Any) -> int:
    """For each entry of a matrix and token, the gradient added to the dual and each slot, and the read."""
    return 2 * _entries(tensors, model) * (2 + Model.parse(model).slots)


@register_flop_formula(torch.ops.miras.read_each_backward)
def _flops_backward(
    grad_y: Any, a: Any, b: Any, z: Any, sums: Any, tensors: Any, model: str, *_: Any, **_more: Any
) -> int:
    """Twice those forward, and all of them again but the read of W1, the gradients three times."""
    again = 2 * _entries(tensors, model) * 3 * (1 + Model.parse(model).slots)
    return 2 * _flops(tensors, model) + again


def _entries(tensors: Any, model: str) -> int:
    """Entries of all matrices, once for each token, from shapes."""
    given = Given.of(tensors, Model.parse(model))
    (m, h, c, d_k), d_v, hidden = given.q, given.lefts[0][-1], given.x[-1]
    return m * h * c * hidden * (d_v + (len(given.lefts) - 1) * d_k)


# -- the seam to the engine -------------------------------------------------------------------------------------------


def serves(rule: Rule, leaves: dict[str, Leaf], learned: Learned) -> bool:
    """Whether reads are `read`'s: `unroll.read_chunks` would write out each token's weights."""
    if not memory_name(rule):
        return False
    hidden = leaves["w1"].cols
    nonlinear = rule.link_at == "token" and not isinstance(rule.retention, EuclideanRetention)
    shared = all(home.dim() == 3 for home in learned.before.home.values())
    return nonlinear and shared and hidden <= WIDEST and hidden & (hidden - 1) == 0


def read(rule: Rule, leaves: dict[str, Leaf], learned: Learned, q: Tensor, steps: Tensor) -> Tensor:
    """Outputs [M, H, C, d_v]; q [M, H, C, d_k] and `unroll.steps`."""
    assert isinstance(rule.memory, MLP | SwiGLU)
    before, grad = learned.before, learned.grad
    given = Given(
        q,
        grad["w2"].right,
        steps,
        grad["w1"].right,
        [grad[n].left for n in leaves],
        [x for n in leaves for x in (before.dual[n], *before.slots[n])],
        [before.home[n] for n in leaves if before.home],
        [before.slow[n] for n in ("norm_scale", "norm_shift") if before.slow],
    )
    return fused(given.flat, str(Model.of(rule, leaves)), rule.read_at == "before")[0]
