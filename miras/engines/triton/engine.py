"""The Triton engine: what the chunk engine computes, with its scan over chunks in one kernel, for NVIDIA GPUs.

In training nothing is kept but the call's inputs: the backward pass makes states and factors again, layer by layer.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from miras.engines.model import Model
from miras.engines.programs import Programs, last_chunks, renewed, update_rows
from miras.engines.ragged import in_order, reassemble
from miras.engines.triton import read, read_decayed, read_each
from miras.engines.triton.learn import learn
from miras.engines.unroll import Learned, Read, all_coefficients, linearised, steps
from miras.gates import hole
from miras.layout import Layout, grid
from miras.products import operand_dtype
from miras.rule import Gates, Rule, State
from miras.state import tensors
from miras.weights import Outer


def run(rule: Rule, state: State, q: Tensor, k: Tensor, v: Tensor, gates: Gates, where: Layout) -> tuple[Tensor, State]:
    """Same function as `recurrence`; arguments as of `chunk.run`."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *gates.values(), *tensors(state).values())):
        given = (rule, state, q, k, v, gates, where)
        return checkpoint(_run, *given, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]
    return _run(rule, state, q, k, v, gates, where)


def _run(
    rule: Rule, state: State, q: Tensor, k: Tensor, v: Tensor, gates: Gates, where: Layout
) -> tuple[Tensor, State]:
    cells = grid(where, rule.chunk, None if state.aligned else state.offset)
    leaves = rule.leaves(q.shape[-1], v.shape[-1])
    gates = {n: cells.slots(g, hole(n)) for n, g in gates.items()}
    found = all_coefficients(rule, leaves, gates, cells.keep)
    own = [gates[g.name] for g in rule.bias.gates]
    start, keys = in_order(cells, state), cells.slots(k)
    first, count = Programs.of(cells, where.rows, torch.int32, v.device)
    made = learn(
        keys,
        cells.slots(v),
        own[0] if own else None,
        update_rows(found["w1"].write),  # all matrices have model channels, so they have the same
        [torch.stack([start.dual[n], *start.slots[n]], 2) for n in leaves],
        [start.origin[n] for n in leaves],
        [start.home[n] for n in leaves if start.home],
        [start.slow[n] for n in ("norm_scale", "norm_shift") if start.slow],
        first,
        count,
        str(Model.of(rule, leaves)),
        str(operand_dtype(v)).removeprefix("torch."),
    )
    states, lefts, x = made[: len(leaves)], made[len(leaves) : -2], made[-2]
    before, after = (
        _state(start, dict(zip(leaves, parts, strict=True)))
        for parts in zip(*(f.split([keys.shape[0], where.rows]) for f in states), strict=True)
    )
    if cells.keep is None:
        after = replace(after, origin=after.dual, aligned=True)
        before = replace(before, origin=before.dual)
    else:
        chunk = first[last_chunks(cells, start, where)] + torch.arange(where.rows, device=v.device)
        after = renewed(cells, start, after, where, {n: dual[chunk] for n, dual in before.dual.items()})
        origin = {n: torch.cat([o, before.dual[n][where.rows :]]) for n, o in start.origin.items()}
        before = replace(before, origin=origin)
    links = linearised(rule, leaves, before.origin, before.home) if rule.link_at == "chunk" else {}
    grad = {n: Outer(left, x if n == "w1" else keys) for n, left in zip(leaves, lefts, strict=True)}
    learned = Learned(before, grad, links)
    queries = Read(cells.slots(q), {n: c.read for n, c in found.items()})
    if read_each.serves(rule, leaves, learned):
        y = read_each.read(rule, leaves, learned, queries.q, steps(rule, leaves["w1"], gates, cells.keep))
    else:
        reader = read if read.serves(rule, leaves, learned, queries) else read_decayed
        y = reader.read(rule, leaves, learned, queries)
    return cells.tokens(y), reassemble(cells, after, [])


def _state(state: State, matrices: dict[str, Tensor]) -> State:
    """A state with other duals and slots, [..., H, 1 + S, o, i] of each matrix."""
    parts = {n: x.unbind(2) for n, x in matrices.items()}
    return replace(state, dual={n: x[0] for n, x in parts.items()}, slots={n: x[1:] for n, x in parts.items()})
