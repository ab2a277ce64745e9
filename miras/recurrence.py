"""The definition of a rule's output: one token at a time. Every engine equals it to rounding."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from miras.rule import Gates, Rule, State, orient, token


def recurrence(
    rule: Rule, state: State, q: Tensor, k: Tensor, v: Tensor, gates: Gates, valid: Tensor | None = None
) -> tuple[Tensor, State]:
    """Read and learn token by token.

    Args:
        rule: the rule.
        state: where to go on from.
        q: queries [B, H, T, d_k]; k alike; v [B, H, T, d_v].
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
        gates = {n: torch.where(exists, g, 0.0 if n == "log_alpha" else 1.0) for n, g in gates.items()}
    leaves = rule.leaves(q.shape[-1], v.shape[-1])
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
        grad = rule.gradient(weights, state.slow, k[..., here, :], v[..., here, :], token(gates, t))
        dual, slots = {}, {}
        for n, a in state.dual.items():
            new, new_slots = rule.update(a, state.slots[n], rule.rate(leaves[n]) * grad[n].dense().squeeze(-3), at_t[n])
            dual[n] = _where(keep, new, a)
            slots[n] = tuple(_where(keep, x, old) for x, old in zip(new_slots, state.slots[n], strict=True))
        state = replace(state, dual=dual, slots=slots, origin=origin)
        y = rule.memory.read(rule.read_weights(state, leaves), q[..., here, :], state.slow)
        outputs.append(_where(keep, y, torch.zeros_like(y)))
        state = _advance(rule, state, keep)
    return torch.cat(outputs, -2), state


def _advance(rule: Rule, state: State, keep: Tensor | None) -> State:
    """Count the token; where it was the last of its chunk, gradients are taken at the new dual from now on."""
    offset = state.offset + (1 if keep is None else keep.to(state.offset))
    full = offset == rule.chunk
    origin = (
        dict(state.dual) if rule.chunk == 1 else {n: _where(full, a, state.origin[n]) for n, a in state.dual.items()}
    )
    return replace(state, origin=origin, offset=torch.where(full, 0, offset), aligned=rule.chunk == 1)


def _where(keep: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """`new` in the rows that are true, `old` in the others; selected, so that NaN in a hole has no effect."""
    return new if keep is None else torch.where(keep.reshape(-1, *[1] * (new.dim() - 1)), new, old)
