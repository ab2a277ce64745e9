"""The definition of a rule's output: one token at a time. Every engine equals it to rounding."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from miras.gates import hole
from miras.rule import Gates, Rule, State, orient, token
from miras.weights import Leaf


def recurrence(
    rule: Rule, state: State, q: Tensor, k: Tensor, v: Tensor, gates: Gates, valid: Tensor | None = None
) -> tuple[Tensor, State]:
    """Read and learn token by token.

    Args:
        rule: the rule.
        state: where to go on from.
        q: queries [B, H, T, d_k]; k alike; v [B, H, T, d_v] (a window's tokens side by side, see `Rule.gradient`).
        k: keys.
        v: values.
        gates: {name: [B, H, T, 1 | D]}.
        valid: bool [B, T]; a token that is False does not exist: no output, no trace in the state. None: all exist.

    Returns:
        y [B, H, T, d_v] (0 where there is no token) and the state after the last token.
    """
    if valid is not None:
        # Selection keeps NaN out of values; out of outer gradients only if no formula has met it.
        exists = valid[:, None, :, None]
        q, k, v = (torch.where(exists, x, 0.0) for x in (q, k, v))
        gates = {n: torch.where(exists, g, hole(n)) for n, g in gates.items()}
    leaves = rule.leaves(q.shape[-1], v.shape[-1] // rule.window)
    seen = {n: rule.leaf_gates(leaf, gates) for n, leaf in leaves.items()}
    outputs = []
    for t in range(q.shape[-2]):
        here = slice(t, t + 1)
        keep = None if valid is None else valid[:, t]
        at_t = {n: orient(token(g, t), leaves[n]) for n, g in seen.items()}
        origin = state.origin
        if rule.gradient_at == "decayed":
            origin = {n: _where(keep, rule.decay(a, at_t[n]), a) for n, a in origin.items()}
        weights = rule.link(origin, state.home, leaves)
        grad = rule.surprise(weights, state.slow, k[..., here, :], v[..., here, :], token(gates, t), leaves)
        before = replace(state, origin=origin)
        dense = {n: g.dense().squeeze(-3) for n, g in grad.items()}
        if rule.step_at == "chunk":
            state = _gather(rule, before, leaves, dense, token(gates, t), keep)
        else:
            state = _step(rule, before, dense, at_t, keep)
        read_state = before if rule.read_at == "before" else state
        y = rule.read(rule.read_weights(read_state, leaves), q[..., here, :], state.slow)
        outputs.append(_where(keep, y, torch.zeros_like(y)))
        state = _advance(rule, state, keep)
    return torch.cat(outputs, -2), state


def _step(
    rule: Rule, state: State, grad: dict[str, Tensor], gates: dict[str, dict[str, Tensor]], keep: Tensor | None
) -> State:
    """The state with one token's gradients {leaf: [B, H, o, i]} learned, under the gates that each matrix sees."""
    dual, slots = {}, {}
    for n, a in state.dual.items():
        old = state.slots[n]
        if rule.algorithm.resets:
            begins = state.offset == 0
            old = tuple(_where(begins if keep is None else begins & keep, torch.zeros_like(x), x) for x in old)
        new, new_slots = rule.update(a, old, grad[n], gates[n])
        dual[n] = _where(keep, new, a)
        slots[n] = tuple(_where(keep, x, o) for x, o in zip(new_slots, old, strict=True))
    return replace(state, dual=dual, slots=slots)


def _gather(
    rule: Rule, state: State, leaves: dict[str, Leaf], grad: dict[str, Tensor], gates: Gates, keep: Tensor | None
) -> State:
    """The state with one token's gradients gathered, and the chunk's step taken where the token is its last."""
    last = state.offset == rule.chunk - 1 if keep is None else (state.offset == rule.chunk - 1) & keep
    gathered, at_end = rule.gather(state.pending, grad, gates, leaves)
    pending = {n: _where(keep, x, state.pending[n]) for n, x in gathered.items()}
    dual, slots = {}, {}
    for n, a in state.dual.items():
        new, new_slots = rule.update(a, state.slots[n], pending[n], rule.matrix_gates(leaves[n], at_end))
        dual[n] = _where(last, new, a)
        slots[n] = tuple(_where(last, x, old) for x, old in zip(new_slots, state.slots[n], strict=True))
    pending = {n: _where(last, torch.zeros_like(x), x) for n, x in pending.items()}
    return replace(state, dual=dual, slots=slots, pending=pending)


def _advance(rule: Rule, state: State, keep: Tensor | None) -> State:
    """Count the token; where it was the last of its chunk, gradients are taken at the new dual from now on."""
    offset = state.offset + (1 if keep is None else keep.to(state.offset))
    full = offset == rule.chunk
    # A chunk that steps only at its end has its origin for a dual until then.
    whole = rule.chunk == 1 or rule.step_at == "chunk"
    origin = dict(state.dual) if whole else {n: _where(full, a, state.origin[n]) for n, a in state.dual.items()}
    return replace(state, origin=origin, offset=torch.where(full, 0, offset), aligned=rule.chunk == 1)


def _where(keep: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """`new` in the rows that are true, `old` in the others; selected, so that NaN in a hole has no effect."""
    return new if keep is None else torch.where(keep.reshape(-1, *[1] * (new.dim() - 1)), new, old)
