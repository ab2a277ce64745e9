"""The chunk engine: any rule that is linear in dual coordinates, C tokens at a time, equal to the token loop.

Within a chunk the gradients do not depend on each other, so the rule's update is a linear recurrence in (dual, slots,
grad_1 .. grad_C). Its coefficients come from running `Rule.update` itself on basis vectors, for all chunks at once and
before the scan; the scan then needs only matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from miras.algorithm import LinearAlgorithm
from miras.layout import Grid, Layout, grid
from miras.retention import EuclideanRetention, MirrorRetention, SlopedRetention
from miras.rule import Gates, Rule, State, token
from miras.state import tree_map
from miras.weights import Leaf, Outer, PerToken, Scaled, Unrolled, Weight, Weights, along, matmul_add


def refuses(rule: Rule, gates: Gates | None = None) -> str | None:
    """Why this engine cannot run a rule, or None; it takes any gates."""
    del gates
    if not isinstance(rule.retention, MirrorRetention):
        return f"{rule.retention} is not linear in dual coordinates"
    if not isinstance(rule.algorithm, LinearAlgorithm):
        return f"{rule.algorithm} is not linear in the gradient"
    return None


def run(rule: Rule, state: State, q: Tensor, k: Tensor, v: Tensor, gates: Gates, where: Layout) -> tuple[Tensor, State]:
    """Same function as `recurrence`, a chunk at a time.

    Args:
        rule: the rule.
        state: where to go on from, N rows.
        q: queries [B, T, H, d_k]; k alike; v [B, T, H, d_v].
        k: keys.
        v: values.
        gates: {name: [B, T, H, 1 | D]}.
        where: the layout of the call.

    Returns:
        y [B, T, H, d_v] and the state after each sequence's last token.
    """
    cells = grid(where, rule.chunk, None if state.aligned else state.offset)
    leaves = rule.leaves(q.shape[-1], v.shape[-1])
    q, k, v = cells.slots(q), cells.slots(k), cells.slots(v)
    # A hole's gates are those of a token that keeps everything, so that no formula meets 0 / 0 on its way to `where`.
    gates = {n: cells.slots(g, hole=0.0 if n == "log_alpha" else 1.0) for n, g in gates.items()}
    coefficients = all_coefficients(rule, leaves, gates, cells.keep)

    if cells.order is not None:
        state = state.index_select(cells.order)
    outputs, finished, running = [], [], cells.sizes[0]
    for chunk in _split(Chunk(q, k, v, gates, coefficients, cells.keep), cells.sizes):
        size = chunk.q.shape[0]
        if size < running:
            finished.append(state.map(lambda x, size=size: x[size:]))
            state = state.map(lambda x, size=size: x[:size])
            running = size
        y, state = chunk_step(rule, leaves, state, chunk)
        outputs.append(y)
    return cells.tokens(torch.cat(outputs)), _reassemble(cells, state, finished)


def _reassemble(cells: Grid, state: State, finished: list[State]) -> State:
    """The states of all sequences in their own order; those that ended early stand behind the running ones."""
    parts = [state, *reversed(finished)]
    if len(parts) > 1:
        flat = iter(zip(*(_tensors(part) for part in parts), strict=True))
        state = state.map(lambda _: torch.cat(next(flat)))
    return state if cells.order is None else state.index_select(torch.argsort(cells.order))


def _tensors(state: State) -> list[Tensor]:
    found: list[Tensor] = []
    state.map(lambda x: found.append(x) or x)
    return found


class Coefficients(NamedTuple):
    """Rows of the linear map from (dual, slots, grad_1 .. grad_C) to the dual after each token and the slots at the
    end.

    dual [M, H, C, 1 + S + C, w], slots [M, H, S, 1 + S + C, w]; origin [M, H, C, w] is the decay of the origin up to
    and including each token where gradients are taken there, else None. w is 1 or the number of channels.
    """

    dual: Tensor
    slots: Tensor
    origin: Tensor | None


class Chunk(NamedTuple):
    """One chunk of every running sequence: tokens [N, H, C, ...] and what was computed ahead of the scan."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: dict[str, Tensor]
    coefficients: dict[str, Coefficients]
    keep: Tensor | None


def _split(chunks: Chunk, sizes: list[int]) -> Iterator[Chunk]:
    """The chunks of each step. Split at once: the backward of a slice fills a tensor of all chunks for each step."""
    parts: list[tuple[Tensor, ...]] = []
    tree_map(lambda x: parts.append(x.split(sizes)) or x, chunks)
    for step in range(len(sizes)):
        tensors = iter(part[step] for part in parts)
        yield tree_map(lambda _, tensors=tensors: next(tensors), chunks)


def all_coefficients(rule: Rule, leaves: dict[str, Leaf], gates: Gates, keep: Tensor | None) -> dict[str, Coefficients]:
    """The coefficients of every chunk for every leaf; leaves without a channel axis see other gates than the rest."""
    found: dict[bool, Coefficients] = {}
    result = {}
    for name, leaf in leaves.items():
        if (channels := leaf.channel is not None) not in found:
            found[channels] = _coefficients(rule, rule.leaf_gates(leaf, gates), keep)
        result[name] = found[channels]
    return result


def _coefficients(rule: Rule, gates: dict[str, Tensor], keep: Tensor | None) -> Coefficients:
    like = next(iter(gates.values()))
    chunk, slots_n = like.shape[-2], rule.algorithm.slots
    width, size = max(g.shape[-1] for g in gates.values()), 1 + slots_n + chunk
    basis = (
        torch.eye(size, dtype=like.dtype, device=like.device).unsqueeze(-1).expand(*like.shape[:-2], size, size, width)
    )
    dual, slots = basis[..., 0, :, :], tuple(basis[..., 1 + j, :, :] for j in range(slots_n))
    origin, rows, decays = torch.ones_like(dual[..., :1, :]), [], []
    for t in range(chunk):
        now = token(gates, t)
        held = None if keep is None else keep[:, t, None, None, None]
        new, new_slots = rule.update(dual, slots, basis[..., 1 + slots_n + t, :, :], now)
        dual = _where(held, new, dual)
        slots = tuple(_where(held, x, old) for x, old in zip(new_slots, slots, strict=True))
        rows.append(dual)
        if rule.gradient_at == "decayed":
            origin = _where(held, rule.decay(origin, now), origin)
            decays.append(origin)
    slot_rows = torch.stack(slots, -3) if slots else like.new_zeros(*like.shape[:-2], 0, size, width)
    return Coefficients(torch.stack(rows, -3), slot_rows, torch.cat(decays, -2) if decays else None)


def _where(held: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if held is None else torch.where(held, new, old)


def chunk_step(rule: Rule, leaves: dict[str, Leaf], state: State, chunk: Chunk) -> tuple[Tensor, State]:
    """One chunk of every running sequence: outputs [N, H, C, d_v] and the next state."""
    anchor, origin = _anchor(rule, leaves, state, chunk)
    grad = rule.gradient(anchor, state.slow, chunk.k, chunk.v, chunk.gates)
    weights: dict[str, Weight] = {}
    dual, slots = {}, {}
    for n, leaf in leaves.items():
        if (rate := rule.rate(leaf)) != 1:
            grad[n] = Outer(rate * grad[n].left, grad[n].right)
        unrolled = _unrolled(state.dual[n], state.slots[n], grad[n], chunk.coefficients[n].dual, leaf)
        weights[n] = _read_weight(rule, leaf, state, n, anchor, unrolled)
        dual[n], slots[n] = _advance(state.dual[n], state.slots[n], grad[n], chunk.coefficients[n], leaf)
    y = rule.memory.read(weights, chunk.q, state.slow)
    return y, _next_state(rule, state, dual, slots, origin, chunk.keep)


def _anchor(rule: Rule, leaves: dict[str, Leaf], state: State, chunk: Chunk) -> tuple[Weights, dict[str, Tensor]]:
    """The weights that the chunk's gradients are taken at, and the origin at the chunk's end."""
    if rule.gradient_at == "previous":
        return rule.link(state.origin, state.home, leaves), state.origin
    weights: dict[str, Weight] = {}
    origin = {}
    for n, leaf in leaves.items():
        decay = chunk.coefficients[n].origin
        assert decay is not None
        bases = (state.origin[n], state.home[n]) if state.home else (state.origin[n],)
        weights[n] = Scaled(bases, decay.unsqueeze(-2), leaf.channel)
        origin[n] = along(decay[..., -1, :], leaf.channel) * state.origin[n]
    return weights, origin


def _unrolled(dual: Tensor, slots: tuple[Tensor, ...], grad: Outer, rows: Tensor, leaf: Leaf) -> Unrolled:
    """The dual after each token, from its rows of coefficients."""
    bases = (dual, *slots)
    return Unrolled(Scaled(bases, rows[..., : len(bases), :], leaf.channel), grad, rows[..., len(bases) :, :])


def _read_weight(
    rule: Rule, leaf: Leaf, state: State, name: str, anchor: Weights, dual: Unrolled
) -> Tensor | PerToken | Unrolled:
    """What each token reads with, W_t, given its dual A_t."""
    home = (state.home[name],) if state.home else ()
    if isinstance(rule.retention, EuclideanRetention):
        return dual._replace(bases=dual.bases._replace(bases=(*dual.bases.bases, *home)))
    if rule.link_at == "token":
        dense = dual.dense() if not home else dual.dense() + home[0].unsqueeze(-3)
        return PerToken(rule.retention.primal(dense, leaf))
    assert isinstance(rule.retention, SlopedRetention)
    retention, start = rule.retention, state.origin[name]
    slope = retention.slope(start + home[0] if home else start, leaf)
    bases, coef = dual.bases.bases, dual.bases.coef
    if bases[0] is start:
        # A_0 = O: alpha A_0 - O is one base with the coefficient alpha - 1.
        coef = torch.cat([coef[..., :1, :] - 1, coef[..., 1:, :]], -2)
    else:
        bases, coef = (*bases, start), torch.cat([coef, -torch.ones_like(coef[..., :1, :])], -2)
    moved = tuple(slope * retention.centre(base, leaf) for base in bases)
    at_origin = anchor[name]
    assert isinstance(at_origin, torch.Tensor)
    left, right = retention.centre_outer(dual.grad, leaf)
    grad = Outer(left, right * slope) if slope.shape[-1] > 1 else Outer(left * slope.mT, right)
    return Unrolled(Scaled((*moved, at_origin), coef, leaf.channel), grad, dual.coef)


def _advance(
    dual: Tensor, slots: tuple[Tensor, ...], grad: Outer, coefficients: Coefficients, leaf: Leaf
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The dual and the slots at the chunk's end. In the state's own precision, whatever autocast does to reads."""
    bases = (dual, *slots)

    def combine(row: Tensor) -> Tensor:
        *decays, coef = row.split([1] * len(bases) + [row.shape[-2] - len(bases)], -2)
        total = None
        for decay, base in zip(decays, bases, strict=True):
            term = along(decay.squeeze(-2), leaf.channel) * base
            total = term if total is None else total + term
        left, right = grad
        on_right = coef.shape[-1] > 1 and leaf.channel == -1
        left, right = (left, right * coef) if on_right else (left * coef, right)
        with torch.autocast(left.device.type, enabled=False):
            return matmul_add(total, left.mT, right)

    rows = coefficients.slots
    return combine(coefficients.dual[..., -1, :, :]), tuple(combine(rows[..., j, :, :]) for j in range(len(slots)))


def _next_state(
    rule: Rule,
    state: State,
    dual: dict[str, Tensor],
    slots: dict[str, tuple[Tensor, ...]],
    origin: dict[str, Tensor],
    keep: Tensor | None,
) -> State:
    if keep is None:
        return replace(state, dual=dual, slots=slots, origin=dual, aligned=True)
    # The tokens of a sequence are side by side, so a token in the last slot means that the chunk is complete.
    full = keep[:, -1]
    origin = {n: torch.where(full[:, None, None, None], a, origin[n]) for n, a in dual.items()}
    return replace(
        state, dual=dual, slots=slots, origin=origin, offset=(state.offset + keep.sum(1)) % rule.chunk, aligned=False
    )
