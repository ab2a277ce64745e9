"""Rules that take one step a chunk: the chunk's gradients in one pass, their sum by a matrix product, one step."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from miras.engines.ragged import in_order, reassemble, running, split
from miras.gates import silence
from miras.layout import Layout, grid
from miras.rule import Gates, Rule, State, token
from miras.weights import Leaf, Outer


def refuses(rule: Rule, gates: Gates | None = None, tokens: object = None) -> str | None:
    """Why this engine cannot run a rule, or None; it takes any gates."""
    del gates, tokens
    return None if rule.step_at == "chunk" else "the rule takes a step for every token"


def run(rule: Rule, state: State, q: Tensor, k: Tensor, v: Tensor, gates: Gates, where: Layout) -> tuple[Tensor, State]:
    """Same contract as the chunk engine's `run`."""
    cells = grid(where, rule.chunk, None if state.aligned else state.offset)
    leaves, keep = rule.leaves(q.shape[-1], v.shape[-1] // rule.window), cells.keep
    gates = {n: cells.slots(g, silence(n)) for n, g in gates.items()}
    if "log_alpha" in gates:
        width = gates["log_alpha"].shape[-1]
        log_alpha = state.pending["log_alpha"]
        state = replace(state, pending={**state.pending, "log_alpha": log_alpha.expand(*log_alpha.shape[:-1], width)})
    chunks = (cells.slots(q), cells.slots(k), cells.slots(v), gates, {} if keep is None else {"keep": keep})
    state, finished, outputs = in_order(cells, state), [], []
    for size, (q_c, k_c, v_c, gates_c, kept) in zip(cells.sizes, split(chunks, cells.sizes), strict=True):
        state = running(state, size, finished)
        y, state = _one_chunk(rule, leaves, state, q_c, k_c, v_c, gates_c, kept.get("keep"))
        outputs.append(y)
    return cells.tokens(torch.cat(outputs)), reassemble(cells, state, finished)


def _one_chunk(
    rule: Rule,
    leaves: dict[str, Leaf],
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    keep: Tensor | None,
) -> tuple[Tensor, State]:
    weights = rule.link(state.dual, state.home, leaves)
    grad = rule.surprise(weights, state.slow, k, v, gates, leaves)
    sums = {n: _weighted_sum(g, rule.leaf_gates(leaves[n], gates)["eta"], leaves[n]) for n, g in grad.items()}
    last = {**token(gates, slice(-1, None)), "eta": torch.ones_like(gates["eta"][..., :1, :])}
    if "log_alpha" in gates:
        last["log_alpha"] = gates["log_alpha"].sum(-2, keepdim=True)
    pending, at_end = rule.gather(state.pending, sums, last, leaves)
    dual, slots = {}, {}
    for n, a in state.dual.items():
        dual[n], slots[n] = rule.update(a, state.slots[n], pending[n], rule.matrix_gates(leaves[n], at_end))
    y = rule.read(weights, q, state.slow)
    if rule.read_at == "after":
        # Only the last token of a full chunk finds its step taken; what a hole reads is dropped.
        y_last = rule.read(rule.link(dual, state.home, leaves), q[..., -1:, :], state.slow)
        y = torch.cat([y[..., :-1, :], y_last], -2)
    fresh = {n: torch.zeros_like(x) for n, x in pending.items()}
    if keep is None:
        return y, replace(state, dual=dual, slots=slots, origin=dual, pending=fresh, aligned=True)
    full = keep[:, -1]
    dual, slots, pending = (
        _chosen(full, *pair) for pair in ((dual, state.dual), (slots, state.slots), (fresh, pending))
    )
    offset = (state.offset + keep.sum(1)) % rule.chunk
    return y, replace(state, dual=dual, slots=slots, origin=dual, pending=pending, offset=offset, aligned=False)


def _weighted_sum(grad: Outer, eta: Tensor, leaf: Leaf) -> Tensor:
    """sum_t eta_t grad_t, [..., o, i], in the state's own precision."""
    left, right, _ = grad.times(eta, leaf.channel)
    with torch.autocast(left.device.type, enabled=False):
        return left.mT @ right


def _chosen(full: Tensor, new: dict, old: dict) -> dict:
    """`new` in the rows that are true, `old` in the others."""
    rows = full[:, None, None, None]
    return {
        n: tuple(torch.where(rows, a, b) for a, b in zip(x, old[n], strict=True))
        if isinstance(x, tuple)
        else torch.where(rows if x.dim() == 4 else rows[..., 0], x, old[n])
        for n, x in new.items()
    }
