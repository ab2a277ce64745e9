"""The scan over chunks for training, with its derivative written out.

Autograd would keep every intermediate of every chunk. Here only the states between chunks and the gradients' factors
are kept, and the rest is computed again, from the last chunk to the first. What depends on the rule is taken apart by
axis: the update is linear; the way back through an MLP's inner gradient is written out; everything else (bias, norm,
link, reads, other memories) is differentiated by autograd on one chunk, or some, at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from miras.algorithm import Implicit, LeastSquares
from miras.engines.unroll import Learned, Read, combine, linearised, read_chunks
from miras.memory import MLP
from miras.memory.activation import ACTIVATIONS
from miras.products import Cast, matmul, matmul_add
from miras.retention import EuclideanRetention
from miras.rule import Rule, State
from miras.weights import Leaf, Outer

# A name, and a leaf or gate, and a number.
Key = tuple[Any, ...]
Parts = dict[Key, Tensor]


class Task(NamedTuple):
    """What is not a tensor: the rule, its leaves, chunks of a step, steps that are read together, and the names of the
    tensors given.

    Names: ("q",), ("k",), ("v",) and ("gate", name), [M, H, C, .]; ("row", leaf, j), the coefficients
    [M, H, 1 + S + C] of the dual (j = 0) and the slots at a chunk's end, and ("read", leaf) those of reads; ("base",
    leaf, j), the dual and the slots that the first chunk finds; ("home", leaf) and ("slow", name).
    """

    rule: Rule
    leaves: dict[str, Leaf]
    rows: int
    together: int
    names: tuple[Key, ...]

    def bases(self, leaf: str) -> list[Key]:
        """The names of a leaf's dual and slots."""
        return [name for name in self.names if name[:2] == ("base", leaf)]


class Scan(torch.autograd.Function):
    """Outputs of all chunks [M, H, C, d_v], and the dual and the slots of each leaf after the last."""

    @staticmethod
    def forward(ctx: Any, task: Task, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(task.names, tensors, strict=True))
        state = {key: given[key] for n in task.leaves for key in task.bases(n)}
        kept: dict[Key, list[Tensor]] = {}
        for here in _steps(task, given, 1):
            grad = _surprise(task, given, _weights(task, given, state), here)
            for n in task.leaves:
                found = {key: state[key] for key in task.bases(n)} | {
                    ("left", n): grad[n].left,
                    ("right", n): grad[n].right,
                }
                for key, x in found.items():
                    kept.setdefault(key, []).append(x)
                bases = [state[key] for key in task.bases(n)]
                rows = {key: given["row", n, key[2]][here].unsqueeze(-1) for key in task.bases(n)}
                state |= {key: combine(row, bases, grad[n], task.leaves[n]) for key, row in rows.items()}
        found = {key: torch.cat(parts) for key, parts in kept.items()}
        y = torch.cat([_read(task, given, found, here) for here in _steps(task, given, task.together)])
        ctx.task, ctx.found, ctx.cast = task, tuple(found), Cast.now(y.device.type)
        ctx.save_for_backward(*tensors, *found.values())
        return y, *state.values()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        task: Task = ctx.task
        tensors = iter(ctx.saved_tensors)
        given, found = ({key: next(tensors) for key in names} for names in (task.names, ctx.found))
        after = dict(zip([key for n in task.leaves for key in task.bases(n)], cotangents[1:], strict=True))
        total: Parts = {key: torch.zeros_like(x) for key, x in given.items() if key[0] != "base"}
        with ctx.cast.again():
            for segment in reversed(_steps(task, given, task.together)):
                above = _back_from_reads(task, given, found, cotangents[0], total, segment)
                for here in reversed(_steps(task, given, 1, segment)):
                    within = slice(here.start - segment.start, here.stop - segment.start)
                    parts = {key: x[within] for key, x in above.items()}
                    after = _back(task, given, {key: x[here] for key, x in found.items()}, parts, after, total, here)
        return None, *((total | after)[name] for name in task.names)


def _steps(task: Task, given: Parts, together: int, within: slice | None = None) -> list[slice]:
    """The chunks of each step, or of some steps together."""
    begin, end = (within.start, within.stop) if within else (0, given[("k",)].shape[0])
    size = task.rows * together
    return [slice(i, min(i + size, end)) for i in range(begin, end, size)]


def _learned(task: Task, given: Parts, found: Parts, here: slice) -> Learned:
    """What reads need of learning."""
    rule, tokens = task.rule, given[("k",)].shape[-2]
    dual = {n: found["base", n, 0][here] for n in task.leaves}
    slots = {n: tuple(found[key][here] for key in task.bases(n)[1:]) for n in task.leaves}
    home = {n: given["home", n] for n in task.leaves if ("home", n) in given}
    slow = {key[1]: x for key, x in given.items() if key[0] == "slow"}
    grad = {}
    for n in task.leaves:
        left, right = found["left", n][here], found["right", n][here]
        grad[n] = Outer(left, right, left.shape[-2] // tokens)
    links = linearised(rule, task.leaves, dual, home) if rule.link_at == "chunk" else {}
    offset = next(iter(dual.values())).new_zeros(0, dtype=torch.int64)
    return Learned(State(dual, slots, dual, offset, home, slow, aligned=True), grad, links)


def _read(task: Task, given: Parts, found: Parts, here: slice) -> Tensor:
    rows = {n: given["read", n][here] for n in task.leaves}
    return read_chunks(task.rule, task.leaves, _learned(task, given, found, here), Read(given[("q",)][here], rows))


def _back_from_reads(task: Task, given: Parts, found: Parts, grad_y: Tensor, total: Parts, here: slice) -> Parts:
    """Reads again, and their cotangents: those of what was found, by name; adds to those of what is given."""
    shared = [key for key in given if key[0] in ("home", "slow")]
    tokens = [("q",), *(("read", n) for n in task.leaves)]
    with torch.enable_grad():
        at = {key: x[here].detach().requires_grad_() for key, x in found.items()}
        leaves = {key: given[key][here].detach().requires_grad_() for key in tokens}
        leaves |= {key: given[key].detach().requires_grad_() for key in shared}
        y = _read(task, {**given, **leaves}, at, slice(None))
    wanted = [*at.values(), *leaves.values()]
    grads = torch.autograd.grad(y, wanted, grad_y[here], allow_unused=True, materialize_grads=True)
    _add(total, leaves, grads[len(at) :], here)
    return dict(zip(at, grads, strict=False))


def _add(total: Parts, names: Iterable[Key], grads: Iterable[Tensor], here: slice) -> None:
    """Add cotangents to those of what is given, for all chunks or for these."""
    for key, x in zip(names, grads, strict=True):
        if key[0] in ("home", "slow"):
            total[key] += x
        else:
            total[key][here] += x


def _weights(task: Task, given: Parts, state: Parts) -> dict[str, Tensor]:
    home = {n: given["home", n] for n in task.leaves if ("home", n) in given}
    return task.rule.link({n: state["base", n, 0] for n in task.leaves}, home, task.leaves)


def _surprise(task: Task, given: Parts, weights: dict[str, Tensor], here: slice) -> dict[str, Outer]:
    slow = {name[1]: x for name, x in given.items() if name[0] == "slow"}
    gates = {name[1]: x[here] for name, x in given.items() if name[0] == "gate"}
    return task.rule.surprise(weights, slow, given[("k",)][here], given[("v",)][here], gates, task.leaves)


def _back(task: Task, given: Parts, found: Parts, above: Parts, after: Parts, total: Parts, here: slice) -> Parts:
    """One chunk back: the cotangents of the dual and the slots that it found, from those of what it left and of what
    reads had of it; adds to those of what is given.
    """
    before: Parts = {}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for n in task.leaves:
        names = task.bases(n)
        before |= {key: above[key] for key in names}
        left, right = found["left", n], found["right", n]
        grad_left, grad_right = above["left", n], above["right", n]
        terms = left.shape[-2] // given[("k",)].shape[-2]
        for key in names:
            u, row, grad_row = after[key], given["row", n, key[2]][here], total["row", n, key[2]][here]
            coef = Outer(left, right, terms).spread(row[..., len(names) :].unsqueeze(-1))
            with torch.autocast(u.device.type, enabled=False):
                to_left = right @ u.mT
                grad_right = matmul_add(grad_right, left * coef, u)
            grad_left = torch.addcmul(grad_left, to_left, coef)
            weight = torch.linalg.vecdot(left, to_left)
            grad_row[..., len(names) :] = weight if terms == 1 else weight.unflatten(-1, (-1, terms)).sum(-1)
            for i, base in enumerate(names):
                grad_row[..., i] = torch.linalg.vecdot(found[base].flatten(-2), u.flatten(-2))
                before[base] = torch.addcmul(before[base], row[..., i, None, None], u)
        factors[n] = grad_left, grad_right
    for key, x in _back_to_duals(task, given, found, factors, total, here).items():
        before[key] = before[key] + x
    return before


def _back_to_duals(
    task: Task, given: Parts, found: Parts, factors: dict[str, tuple[Tensor, Tensor]], total: Parts, here: slice
) -> Parts:
    """The cotangents of the duals, through the inner gradients and the link."""
    through = _mlp if _written_out(task.rule) else _any
    duals = {key: found[key] for key in (("base", n, 0) for n in task.leaves)}
    homes = {key: x for key, x in given.items() if key[0] == "home"}
    if isinstance(task.rule.retention, EuclideanRetention):
        grads = through(task, given, found, _weights(task, given, duals), factors, total, here)
        _add(total, homes, [grads[key[1]].sum(0) for key in homes], here)
        return {("base", n, 0): w for n, w in grads.items()}
    with torch.enable_grad():
        leaves = {key: x.detach().requires_grad_() for key, x in (duals | homes).items()}
        weights = _weights(task, leaves, leaves)
    grads = through(task, given, found, {n: w.detach() for n, w in weights.items()}, factors, total, here)
    back = torch.autograd.grad(list(weights.values()), list(leaves.values()), [grads[n] for n in weights])
    _add(total, homes, back[len(duals) :], here)
    return dict(zip(duals, back, strict=False))


def _any(
    task: Task,
    given: Parts,
    found: Parts,
    weights: dict[str, Tensor],
    factors: dict[str, tuple[Tensor, Tensor]],
    total: Parts,
    here: slice,
) -> dict[str, Tensor]:
    """The cotangents of the weights by autograd, for every memory."""
    del found
    tokens = [k for k in given if k[0] in ("k", "v", "gate")]
    with torch.enable_grad():
        leaves = {k: given[k][here].detach().requires_grad_() for k in tokens}
        leaves |= {k: x.detach().requires_grad_() for k, x in given.items() if k[0] == "slow"}
        at = {n: w.detach().requires_grad_() for n, w in weights.items()}
        grad = _surprise(task, {**given, **leaves}, at, slice(None))
        outputs = [x for n in task.leaves for x in (grad[n].left, grad[n].right)]
    sums = [u for n in task.leaves for u in factors[n]]
    outputs, sums = zip(*((y, u) for y, u in zip(outputs, sums, strict=True) if y.requires_grad), strict=True)
    wanted = [*at.values(), *leaves.values()]
    grads = torch.autograd.grad(outputs, wanted, sums, allow_unused=True, materialize_grads=True)
    _add(total, leaves, grads[len(at) :], here)
    return dict(zip(at, grads, strict=False))


def _written_out(rule: Rule) -> bool:
    """Whether the way back through the inner gradient is `_mlp`."""
    memory = rule.memory
    plain = rule.window == 1 and not rule.first_order and not isinstance(rule.algorithm, Implicit | LeastSquares)
    return (
        plain and isinstance(memory, MLP) and not memory.bias and ACTIVATIONS[memory.activation].curvature is not None
    )


def _mlp(
    task: Task,
    given: Parts,
    found: Parts,
    weights: dict[str, Tensor],
    factors: dict[str, tuple[Tensor, Tensor]],
    total: Parts,
    here: slice,
) -> dict[str, Tensor]:
    """The cotangents of an MLP's weights. Its gradient's factors are, for the matrices W_1 .. W_L from the outermost,

        a_i = W_i x_i,  x_{i-1} = s(a_i),  u_1 = d loss / d (W_1 x_1),  u_{i+1} = s'(a_{i+1}) (.) W_i^T u_i

    left u_i, right x_i; u_1 is a function of W_1 x_1 without matrices (norm, residual, bias) and goes by autograd.
    """
    rule, memory = task.rule, task.rule.memory
    assert isinstance(memory, MLP)
    act, depth = ACTIVATIONS[memory.activation], memory.layers
    curvature = act.curvature
    assert curvature is not None
    w = [weights[f"w{i}"] for i in range(1, depth + 1)]
    x = [found["right", f"w{i}"] for i in range(1, depth + 1)]
    rates = [rule.rate(task.leaves[f"w{i}"]) for i in range(1, depth + 1)]
    u = [found["left", f"w{i}"] / rate for i, rate in enumerate(rates, 1)]
    grad_u = [factors[f"w{i}"][0] * rate for i, rate in enumerate(rates, 1)]
    grad_x = [factors[f"w{i}"][1] for i in range(1, depth + 1)]
    grad_w: list[Tensor | None] = [None] * depth
    a = [None, *(matmul(x[i], w[i].mT) for i in range(1, depth))]
    grad_a: list[Any] = [None] * depth
    for i in range(depth - 1, 0, -1):  # from the keys' side to the values'
        inner = act.backward(grad_u[i], a[i])
        grad_a[i] = curvature(a[i]).mul_(grad_u[i]).mul_(matmul(u[i - 1], w[i - 1]))
        grad_u[i - 1] = matmul_add(grad_u[i - 1], inner, w[i - 1].mT)
        grad_w[i - 1] = matmul(u[i - 1].mT, inner)
    grad_z = _head(task, given, matmul(x[0], w[0].mT), grad_u[0], total, here)
    grad_w[0] = matmul_add(grad_w[0], grad_z.mT, x[0])
    grad_x[0] = matmul_add(grad_x[0], grad_z, w[0])
    for i in range(1, depth):
        grad_a[i] += act.backward(grad_x[i - 1], a[i])
        grad_w[i] = matmul_add(grad_w[i], grad_a[i].mT, x[i])
        grad_x[i] = matmul_add(grad_x[i], grad_a[i], w[i])
    total[("k",)][here] += grad_x[-1]
    return {f"w{i}": g for i, g in enumerate(grad_w, 1) if g is not None}


def _head(task: Task, given: Parts, z: Tensor, grad_u: Tensor, total: Parts, here: slice) -> Tensor:
    """The cotangent of z = W_1 x_1, from that of the loss' gradient by z."""
    rule, memory = task.rule, task.rule.memory
    assert isinstance(memory, MLP)
    own: list[Key] = [("gate", g.name) for g in rule.bias.gates]
    with torch.enable_grad():
        tokens: list[Key] = [("k",), ("v",), *own]
        leaves = {k: given[k][here].detach().requires_grad_() for k in tokens}
        leaves |= {k: s.detach().requires_grad_() for k, s in given.items() if k[0] == "slow"}
        z = z.detach().requires_grad_()
        slow = {k[1]: s for k, s in leaves.items() if k[0] == "slow"}
        y, pullback = memory.around(z, leaves[("k",)], slow)
        u = pullback(rule.bias.clipped(y, leaves[("v",)], {k[1]: leaves[k] for k in own}))
    grads = torch.autograd.grad(u, [z, *leaves.values()], grad_u, allow_unused=True, materialize_grads=True)
    _add(total, leaves, grads[1:], here)
    return grads[0]
