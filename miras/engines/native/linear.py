"""A linear memory at chunk 1 by the kernels: token by token, which in the cache is as fast as by tiles."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from miras.algorithm import GradientDescent, Implicit
from miras.bias import L2, Dot, Erase
from miras.engines import exact
from miras.engines.model import bias_name, bias_numbers
from miras.engines.native.build import library
from miras.engines.native.scan import BIASES, contiguous, point
from miras.engines.programs import Programs
from miras.engines.ragged import in_order, reassemble
from miras.gates import silence
from miras.layout import Layout, grid
from miras.retention import TwoSided
from miras.rule import Gates, Rule, State
from miras.weights import mv

# Tokens between two states that are kept for the way back: so many that these take as much memory as queries and keys.
TILE = 32

# In the order of the enumeration in linear.h, and the fields of `LinearCall` in its order.
ERASURES = ("never", "key", "own")
GIVEN = ("queries", "k", "v", "eta", "decay", "erase", "along", "gate", "start")
RESULTS = ("y", "end", "error", "states")
SIZES = ("sequences", "heads", "tokens", "keys", "values", "eta_width", "decay_width", "gate_width")
WORDS = ("erasure", "decayed", "before", "kept", "threads", "bias", "clip")


def reasons(rule: Rule, gates: Gates | None) -> Iterator[str]:
    """Why the kernel cannot run a rule with a linear memory."""
    if _bent(rule) and isinstance(rule.algorithm, GradientDescent):
        rule = replace(rule, bias=L2())
    if reason := exact.refuses(rule, gates):
        yield f"its kernel for a linear memory is one of the engine exact, and {reason}"
        return
    if isinstance(rule.retention, TwoSided):
        yield f"its kernel for a linear memory is for a decay of one side, not {rule.retention}"
    if reason := exact.off_home(rule):
        yield f"its kernel is for linear memories, and {reason}"
    if not isinstance(rule.algorithm, GradientDescent | Implicit) or rule.window > 1:
        yield f"its kernel for a linear memory is for gradient descent and no window, not {rule.algorithm}"
    if reason := exact.off_keys(rule, gates):
        yield f"its kernel is for linear memories, and {reason}"


def _bent(rule: Rule) -> bool:
    """Whether a loss other than L2's makes the step of the error."""
    return bias_name(rule) not in ("", "dot", "l2") or (isinstance(rule.bias, L2) and rule.bias.clip)


def run(rule: Rule, state: State, q: Tensor, k: Tensor, v: Tensor, gates: Gates, where: Layout) -> tuple[Tensor, State]:
    """Same function as `recurrence`; arguments as of `chunk.run`."""
    cells = grid(where, TILE, None)
    gates = {n: cells.slots(g, silence(n)) for n, g in gates.items()}
    queries, k, v = (cells.slots(x) for x in (q, k, v))
    eta = exact.step_size(rule, gates["eta"], k)
    start = in_order(cells, state.dual["w"])
    v = exact.from_home(rule, state.home, gates.get("erase", k), v)
    own_gate = next((gates[g.name] for g in rule.bias.gates if not g.vector), None)
    given = (queries, k, v, eta, gates.get("log_alpha"), gates.get("erase"), gates.get("along"), own_gate, start)
    kept = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    own = isinstance(rule.bias, Erase) and rule.bias.along == "own"
    erasure = "never" if isinstance(rule.bias, Dot) else "own" if own else "key"
    programs = Programs.of(cells, where.rows, torch.int64, v.device)
    words = erasure, _loss(rule), rule.gradient_at == "decayed", rule.read_at == "before"
    with torch.autocast("cpu", enabled=False):
        y, end, *_ = linear_scan(*given, *programs, *words, kept)
    if state.home:
        y = y + mv(state.home["w"], queries)
    dual = {"w": reassemble(cells, end, [])}
    return cells.tokens(y), replace(state, dual=dual, origin=dual)


def _loss(rule: Rule) -> str:
    """Name, clip and numbers of the loss, as one argument of operators; L2 where nothing is erased along the key."""
    if not _bent(rule):
        return "l2 0 0 0"
    return " ".join([bias_name(rule), str(int(bool(rule.bias.clip))), *map(repr, bias_numbers(rule))])


class LinearCall(ctypes.Structure):
    """`LinearCall` of linear.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (*SIZES, *WORDS)),
        *((name, ctypes.c_double) for name in ("exponent", "sharpness")),
        *((name, ctypes.c_void_p) for name in ("first", "count", *GIVEN, *RESULTS)),
        *((name, ctypes.c_void_p) for name in ("from_y", "from_end", *(f"to_{name}" for name in GIVEN))),
    )


def _call(tensors: dict[str, Tensor | None], erasure: str, loss: str, *words: bool) -> LinearCall:
    k, v, start = (tensors[name] for name in ("k", "v", "start"))
    assert k is not None and v is not None and start is not None
    widths = (0 if (x := tensors[name]) is None else x.shape[-1] for name in ("eta", "decay", "gate"))
    sizes = (start.shape[0], *k.shape[1:], v.shape[-1], *widths)
    bias, clip, *numbers = loss.split()
    about = ERASURES.index(erasure), *words, torch.get_num_threads(), BIASES.index(bias), int(clip)
    return point(LinearCall(*sizes, *about, *map(float, numbers)), tensors)


@torch.library.custom_op("miras::linear_scan", mutates_args=(), device_types="cpu")
def linear_scan(
    queries: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    decay: Tensor | None,
    erase: Tensor | None,
    along: Tensor | None,
    gate: Tensor | None,
    start: Tensor,
    first: Tensor,
    count: Tensor,
    erasure: str,
    loss: str,
    decayed: bool,
    before: bool,
    kept: bool,
) -> list[Tensor]:
    """A_t = A_{t-1} diag(alpha_t) + r_t (eta_t k_t)^T - p_t (eta_t b_t)^T with p_t = A_{t-1} e_t, y_t = A_t q_t.

    Args:
        queries: queries [M, H, C, d_k]; tile i of sequence n is number first[i] + n.
        k: keys [M, H, C, d_k].
        v: values [M, H, C, d_v].
        eta: eta [M, H, C, 1 | d_k].
        decay: log alpha [M, H, C, 1 | d_k], if there is any.
        erase: e [M, H, C, d_k], if it is not k.
        along: b [M, H, C, d_k], if it is not k.
        gate: of the bias, [M, H, C, 1 | d_v], if it has one.
        start: A that the first tiles find, [N, H, d_v, d_k].
        first: number of the first tile of each step, int64.
        count: tiles of each sequence, int64 [N], not rising.
        erasure: "never", r = v and no p; "key", r = v - p, or what `loss` makes of both, and no b; "own", r = v.
        loss: see `_loss`.
        decayed: p_t = A_{t-1} diag(alpha_t) e_t.
        before: y_t = A_{t-1} q_t.
        kept: there will be a way back.

    Returns:
        y [M, H, C, d_v], A at the end, and what is kept: r or p [M, H, C, d_v] and the memories that tiles find
        [M, H, d_v, d_k].
    """
    given = [queries, k, v, eta, decay, erase, along, gate, start]
    tensors = dict(zip(GIVEN, map(contiguous, given), strict=True))
    made = _empty(v, start, kept)
    where = {"first": first, "count": count}
    call = _call(tensors | where | dict(zip(RESULTS, made, strict=True)), erasure, loss, decayed, before, kept)
    library(k.dtype).linear_forwards(ctypes.byref(call))
    return made


def _empty(v: Tensor, start: Tensor, kept: bool) -> list[Tensor]:
    """What `linear_scan` returns, unset."""
    states = (*v.shape[:2], *start.shape[2:])
    shapes = [v.shape, start.shape, *([v.shape, states] if kept else [(0,), (0,)])]
    return [v.new_empty(shape) for shape in shapes]


@linear_scan.register_fake
def _(queries: Any, k: Any, v: Any, *rest: Any) -> Any:
    return _empty(v, rest[GIVEN.index("start") - 3], rest[-1])


@torch.library.custom_op("miras::linear_scan_backward", mutates_args=(), device_types="cpu")
def linear_scan_backward(
    cotangents: list[Tensor],
    kept: list[Tensor],
    given: list[Tensor | None],
    where: list[Tensor],
    erasure: str,
    loss: str,
    decayed: bool,
    before: bool,
) -> list[Tensor]:
    """The cotangents of `linear_scan`'s tensors `given`, empty for those that are None, from those of y and of A at the
    end, and what it has kept; `where` are first and count.
    """
    tensors = dict(zip(GIVEN, map(contiguous, given), strict=True))
    to = [kept[0].new_empty(0 if x is None else x.shape) for x in given]
    made = {f"to_{name}": x for name, x in zip(GIVEN, to, strict=True)}
    above = dict(zip(("from_y", "from_end"), map(contiguous, cotangents), strict=True))
    tensors |= dict(zip(("first", "count", "error", "states"), [*where, *kept], strict=True))
    call = _call(tensors | above | made, erasure, loss, decayed, before, True)
    library(kept[0].dtype).linear_backwards(ctypes.byref(call))
    return to


@linear_scan_backward.register_fake
def _(cotangents: Any, kept: Any, given: Any, *rest: Any) -> Any:
    return [kept[0].new_empty(0 if x is None else x.shape) for x in given]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, ctx.erasure, ctx.loss, ctx.decayed, ctx.before, _ = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, cotangents: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    *given, first, count, y, end, error, states = ctx.saved_tensors
    above = [torch.zeros_like(x) if c is None else c for c, x in zip(cotangents, (y, end), strict=False)]
    words = (ctx.erasure, ctx.loss, ctx.decayed, ctx.before)
    to = torch.ops.miras.linear_scan_backward(above, [error, states], given, [first, count], *words)
    return *(None if x is None else t for x, t in zip(given, to, strict=True)), *(None for _ in range(7))


linear_scan.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.miras.linear_scan)
def _flops(q: Any, k: Any, v: Any, *rest: Any, **_: Any) -> int:
    """Predicting, writing, reading and, along a key of its own, erasing."""
    products = {"never": 2, "key": 3, "own": 4}[rest[-5]]
    return 2 * products * v[0] * v[1] * v[2] * v[3] * k[-1]


@register_flop_formula(torch.ops.miras.linear_scan_backward)
def _(above: Any, kept: Any, given: Any, where: Any, *words: Any, **_: Any) -> int:
    """What is computed again does not count."""
    return 2 * _flops(*given, *where, *words, True)
