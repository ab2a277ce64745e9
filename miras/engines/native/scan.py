"""The kernels as operators of PyTorch: `miras::scan` and its way back."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from miras.engines.model import Model
from miras.engines.native.build import library

# In the order of the enumerations in vector.h, rows.h and links.h.
ACTIVATIONS = ("gelu", "gelu_tanh", "silu")
BIASES = ("dot", "l2", "lp_smooth", "lp_paper", "huber_coordinate", "huber_norm", "huber_mixture", "robust")
LINKS = ("identity", "kl", "lq_paper", "lq_mirror")

# Fields of `Call`, in its order: tensors given, kept for the way back and returned, then sizes, words and numbers.
GIVEN = (
    *("queries", "k", "v", "gate", "write", "read", "eta", "start1", "start2"),
    *("origin1", "origin2", "home1", "home2", "gamma", "beta"),
)
KEPT = ("a", "p", "a_read", "z", "z_read", "change", "states")
RESULTS = ("y", "end1", "end2", "last1", "last2", *KEPT)
# Numbers per token: of the bias' gate, of coefficients and of eta.
WIDTHS = ("gate_width", "width", "eta_width")
SIZES = ("chunks", "sequences", "heads", "tokens", "d", "hidden", "slots", *WIDTHS, "every", "threads")
WORDS = ("activation", "norm", "residual", "clip", "bias", "link", "alone", "first_order", "rounded")
NUMBERS = ("eps", "exponent", "sharpness", "q", "unit1", "unit2", "constant1", "constant2", "rate1", "rate2")
COTANGENTS = tuple(f"from_{name}" for name in RESULTS[:5])
GRADIENTS = tuple(f"to_{name}" for name in GIVEN)

C = TypeVar("C", bound=ctypes.Structure)


class Call(ctypes.Structure):
    """`Call` of scan.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (*SIZES, *WORDS)),
        *((name, ctypes.c_double) for name in NUMBERS),
        *((name, ctypes.c_void_p) for name in ("first", "count", "last", *GIVEN, *RESULTS, *COTANGENTS, *GRADIENTS)),
    )


def _call(model: str, rounded: bool, every: int, tensors: Mapping[str, Tensor | None]) -> Call:
    rule, k, start = Model.parse(model), tensors["k"], tensors["start1"]
    assert k is not None and start is not None
    sizes = (k.shape[0], start.shape[0], *k.shape[1:], start.shape[-1], start.shape[2] - 1)
    widths = [0 if (x := tensors[name]) is None else x.shape[-1] for name in ("gate", "write", "eta")]
    words = (
        *(ACTIVATIONS.index(rule.activation), rule.norm, rule.residual, rule.clip),
        *(BIASES.index(rule.bias), LINKS.index(rule.link), rule.alone, rule.first_order, rounded),
    )
    units = rule.unit1, rule.unit2, rule.slope1, rule.slope2, rule.rate1, rule.rate2
    numbers = rule.eps, rule.p, rule.sharpness, rule.q, *units
    return point(Call(*sizes, *widths, every, torch.get_num_threads(), *words, *numbers), tensors)


def point(call: C, tensors: Mapping[str, Tensor | None]) -> C:
    """The call, with its pointers set to the tensors that there are and that the caller holds on to."""
    for name, x in tensors.items():
        if x is not None and x.numel():
            setattr(call, name, x.data_ptr())
    return call


@torch.library.custom_op("miras::scan", mutates_args=(), device_types="cpu")
def scan(
    queries: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    write: Tensor,
    read: Tensor,
    eta: Tensor | None,
    start1: Tensor,
    start2: Tensor,
    origin1: Tensor | None,
    origin2: Tensor | None,
    home1: Tensor | None,
    home2: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    first: Tensor,
    count: Tensor,
    last: Tensor | None,
    model: str,
    rounded: bool,
    steps: int,
    every: int,
) -> list[Tensor]:
    """Learn from and read in M chunks of N sequences.

    Args:
        queries: queries [M, H, C, d]; k and v alike. Chunk i of sequence n is number first[i] + n.
        k: keys.
        v: values.
        gate: the bias' gate [M, H, C, 1 | d], if it has one.
        write: the update's coefficients [M, H, 1 + S, 1 + S + C, 1 | d].
        read: those of reads [M, H, C, 1 + S + C], which do not count where chunks are `alone`; or, if these are per
            channel, the sums of log alpha [M, H, C, d].
        eta: eta [M, H, C, 1 | d] if they are.
        start1: dual and slots of W1 that the first chunks find, [N, H, 1 + S, d, hidden].
        start2: of W2, [N, H, 1 + S, hidden, d].
        origin1: dual at which the first chunks' gradients are taken, [N, H, d, hidden], if not there; none where chunks
            are `alone`, and no `last`.
        origin2: of W2.
        home1: the initial dual that states are relative to, [H, d, hidden], if they are.
        home2: of W2.
        gamma: scale of LN [H, d], if there is one.
        beta: its shift.
        first: number of the first chunk of each step, int64.
        count: chunks of each sequence, int64 [N], not rising.
        last: a chunk of each sequence, int64 [N], if the duals are asked for that these find.
        model: what is computed, `str(Model)`.
        rounded: operands of products are rounded to bfloat16, where the machine multiplies these.
        steps: chunks of the longest sequence.
        every: for the way back, the states of one of so many chunks are kept; 0 if there is none.

    Returns:
        y [M, H, C, d]; dual and slots of W1 and of W2 at the end; the duals of both that the chunks `last` find; and
        what is kept for the way back. Empty tensors for what is not asked for.
    """
    given = [queries, k, v, gate, write, read, eta, start1, start2, origin1, origin2, home1, home2, gamma, beta]
    tensors = dict(zip(GIVEN, map(contiguous, given), strict=True))
    made = _empty(k, start1, start2, last, model, steps, every)
    where = {"first": first, "count": count, "last": last}
    call = _call(model, rounded, every, where | tensors | dict(zip(RESULTS, made, strict=True)))
    library(k.dtype).scan_forwards(ctypes.byref(call))
    return made


def contiguous(x: Tensor | None) -> Tensor | None:
    """The tensor as kernels read it, if there is one."""
    return None if x is None else x.contiguous()


def _empty(
    k: Tensor, start1: Tensor, start2: Tensor, last: Tensor | None, model: str, steps: int, every: int
) -> list[Tensor]:
    """What `scan` returns, unset."""
    rule = Model.parse(model)
    (m, heads, size, d), (n, *_, hidden), copies = k.shape, start1.shape, start1.shape[2]
    wide, narrow = (m, heads, size, hidden), (m, heads, size, d)
    none = (0,)
    lasts = [none, none] if last is None else [(n, heads, d, hidden), (n, heads, hidden, d)]
    kept = [wide, wide, wide, narrow, narrow, none if rule.alone or rule.link == "identity" else narrow]
    states = (n, heads, -(-steps // every), copies, 2, hidden, d) if every else none
    shapes = [narrow, start1.shape, start2.shape, *lasts, *(kept if every else [none] * len(kept)), states]
    return [k.new_empty(shape) for shape in shapes]


@scan.register_fake
def _(queries: Any, k: Any, *rest: Any) -> Any:
    return _empty(k, *rest[5:7], *rest[-5:-3], *rest[-2:])


@torch.library.custom_op("miras::scan_backward", mutates_args=(), device_types="cpu")
def scan_backward(
    cotangents: list[Tensor],
    kept: list[Tensor],
    given: list[Tensor | None],
    where: list[Tensor],
    model: str,
    rounded: bool,
    every: int,
) -> list[Tensor]:
    """The cotangents of `scan`'s tensors `given`, empty for those that are None, from those of its first five results,
    the last two empty if they were, and what it has kept; `where` are first, count and, if there is one, last.
    """
    tensors = dict(zip(GIVEN, map(contiguous, given), strict=True))
    rows = tensors["start1"].shape[0]  # type: ignore[union-attr]
    shared = GIVEN[GIVEN.index("home1") :]
    shapes = {n: (rows, *x.shape) if n in shared else x.shape for n, x in tensors.items() if x is not None}
    to = {n: kept[0].new_empty(shape) for n, shape in shapes.items()}
    above = dict(zip(COTANGENTS, map(contiguous, cotangents), strict=True))
    made = {f"to_{n}": x for n, x in to.items()}
    placed = dict(zip(("first", "count", "last"), where, strict=False))
    call = _call(model, rounded, every, placed | tensors | dict(zip(KEPT, kept, strict=True)) | above | made)
    library(kept[0].dtype).scan_backwards(ctypes.byref(call))
    to = {n: x.sum(0) if n in shared else x for n, x in to.items()}
    return [to[n] if n in to else kept[0].new_empty(0) for n in GIVEN]


@scan_backward.register_fake
def _(cotangents: Any, kept: Any, given: Any, *rest: Any) -> Any:
    return [kept[0].new_empty(0) if x is None else torch.empty_like(x) for x in given]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, ctx.model, ctx.rounded, _, ctx.every = inputs
    ctx.tensors = len(tensors)
    ctx.mark_non_differentiable(*output[5:])
    ctx.set_materialize_grads(False)  # or zeros of all that was kept come back
    ctx.shapes = [x.shape for x in output[:5]]  # the results themselves are not needed
    ctx.save_for_backward(*tensors, *output[5:])


def _backward(ctx: Any, cotangents: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # to be looked at once only, under checkpointing
    given, where, kept = saved[: len(GIVEN)], saved[len(GIVEN) : ctx.tensors], saved[ctx.tensors :]
    above = [kept[0].new_zeros(s) if c is None else c for c, s in zip(cotangents[:5], ctx.shapes, strict=True)]
    placed = [x for x in where if x is not None]
    to = torch.ops.miras.scan_backward(above, list(kept), list(given), placed, ctx.model, ctx.rounded, ctx.every)
    return *(None if x is None else t for x, t in zip(given, to, strict=True)), *(None for _ in range(7))


scan.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.miras.scan)
def _flops(q: Any, k: Any, *rest: Any, **_: Any) -> int:
    """Of a chunk's own tokens one sees half of them."""
    (m, heads, size, d), start1, home, rule = k, rest[5], rest[9], Model.parse(rest[-4])
    copies, hidden = start1[2], start1[-1]
    based = home is not None or rule.link != "identity"
    products = 3 + 2 * copies + 2 * (1 if rule.alone else copies + based)
    return 2 * m * heads * size * (products * d * hidden + (0 if rule.alone else (size + 1) * (d + hidden)))


@register_flop_formula(torch.ops.miras.scan_backward)
def _(above: Any, kept: Any, given: Any, where: Any, model: str, *rest: Any, **_: Any) -> int:
    """What is computed again does not count."""
    m, heads, size, d = given[1]
    # Of first order the weights of inner gradients have no cotangents, one for each of the three products they are in.
    less = 3 * 2 * m * heads * size * d * given[7][-1] if Model.parse(model).first_order else 0
    return 2 * _flops(*given, None, None, None, model, False, 0, 0) - less
