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
from miras.engines.triton import read, read_each
from miras.engines.triton.learn import learn
from miras.engines.unroll import Learned, Read, all_coefficients, linearised, read_chunks, steps
from miras.gates import hole
from miras.layout import Layout, grid
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
    device = v.device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else v.dtype
    first, count = Programs.of(cells, where.rows, torch.int32, v.device)
    w1, w2 = ([start.dual[n], *start.slots[n]] for n in ("w1", "w2"))
    found1, found2, left1, x, left2, _ = learn(
        keys,
        cells.slots(v),
        own[0] if own else None,
        update_rows(found["w1"].write),  # both matrices have model channels, so they have the same
        torch.stack(w1, 2),
        torch.stack(w2, 2),
        start.origin["w1"],
        start.origin["w2"],
        start.home.get("w1"),
        start.home.get("w2"),
        start.slow.get("norm_scale"),
        start.slow.get("norm_shift"),
        first,
        count,
        str(Model.of(rule, leaves)),
        str(cast).removeprefix("torch."),
    )
    (found1, end1), (found2, end2) = (f.split([keys.shape[0], where.rows]) for f in (found1, found2))
    before, after = _state(start, found1, found2), _state(start, end1, end2)
    if cells.keep is None:
        after = replace(after, origin=after.dual, aligned=True)
        before = replace(before, origin=before.dual)
    else:
        chunk = first[last_chunks(cells, start, where)] + torch.arange(where.rows, device=v.device)
        after = renewed(cells, start, after, where, {n: dual[chunk] for n, dual in before.dual.items()})
        origin = {n: torch.cat([o, before.dual[n][where.rows :]]) for n, o in start.origin.items()}
        before = replace(before, origin=origin)
    links = linearised(rule, leaves, before.origin, before.home) if rule.link_at == "chunk" else {}
    learned = Learned(before, {"w1": Outer(left1, x), "w2": Outer(left2, keys)}, links)
    queries = Read(cells.slots(q), {n: c.read for n, c in found.items()})
    if read_each.serves(rule, leaves, learned):
        y = read_each.read(rule, leaves, learned, queries.q, steps(rule, leaves["w1"], gates, cells.keep))
    else:
        reader = read.read if read.serves(rule, leaves, learned, queries) else read_chunks
        y = reader(rule, leaves, learned, queries)
    return cells.tokens(y), reassemble(cells, after, [])


def _state(state: State, *matrices: Tensor) -> State:
    """A state with the dual and the slots of the two matrices, [..., H, 1 + S, o, i]."""
    parts = {n: x.unbind(2) for n, x in zip(("w1", "w2"), matrices, strict=True)}
    return replace(state, dual={n: x[0] for n, x in parts.items()}, slots={n: x[1:] for n, x in parts.items()})
