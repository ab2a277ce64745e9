"""The native engine: what the chunk engine computes, a sequence and head at a time, in the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from miras.engines.model import Model
from miras.engines.native.scan import scan
from miras.engines.native.unrolled import unrolled
from miras.engines.programs import Programs, last_chunks, renewed, update_rows
from miras.engines.ragged import in_order, reassemble
from miras.engines.unroll import Decay, all_coefficients, steps
from miras.gates import hole
from miras.layout import Layout, grid
from miras.products import operand_dtype
from miras.rule import Gates, Rule, State
from miras.weights import Leaf


def run(rule: Rule, state: State, q: Tensor, k: Tensor, v: Tensor, gates: Gates, where: Layout) -> tuple[Tensor, State]:
    """Same function as `recurrence`; arguments as of `chunk.run`."""
    cells = grid(where, rule.chunk, None if state.aligned else state.offset)
    leaves = rule.leaves(q.shape[-1], v.shape[-1])
    gates = {n: cells.slots(g, hole(n)) for n, g in gates.items()}
    write, read, eta = _coefficients(rule, leaves["w1"], gates, cells.keep)  # for both: they have model channels
    own = [gates[g.name] for g in rule.bias.gates]
    # A chunk of one token is never begun only: holes, which padding and packs leave, change nothing.
    start, partial = in_order(cells, state), cells.keep is not None and rule.chunk > 1
    starts = [torch.stack([start.dual[n], *start.slots[n]], 2) for n in ("w1", "w2")]
    given = [
        *(cells.slots(x) for x in (q, k, v)),
        *(own[0] if own else None, write, read, eta, *starts),
        *((start.origin["w1"], start.origin["w2"]) if partial else (None, None)),
        *(start.home.get("w1"), start.home.get("w2"), start.slow.get("norm_scale"), start.slow.get("norm_shift")),
    ]
    programs = Programs.of(cells, where.rows, torch.int64, v.device)
    last = last_chunks(cells, start, where) if partial else None
    model, every = str(Model.of(rule, leaves)), _every(given, starts)
    # Autocast leaves float64 as it is.
    rounded = operand_dtype(v) == torch.bfloat16 and v.dtype == torch.float32
    with torch.autocast("cpu", enabled=False):
        made = scan(*given, *programs, last, model, rounded, len(cells.sizes), every)
    y, *ends = made[:3]
    parts = {n: x.unbind(2) for n, x in zip(("w1", "w2"), ends, strict=True)}
    after = replace(start, dual={n: x[0] for n, x in parts.items()}, slots={n: x[1:] for n, x in parts.items()})
    if partial:
        after = renewed(cells, start, after, where, dict(zip(("w1", "w2"), made[3:5], strict=True)))
    else:
        after = replace(after, origin=after.dual, aligned=True)
    return cells.tokens(y), reassemble(cells, after, [])


def _coefficients(rule: Rule, leaf: Leaf, gates: Gates, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of updates and of reads, and eta if they are per channel; see `scan`."""
    if max(g.shape[-1] for g in rule.leaf_gates(leaf, gates).values()) > 1:
        rows = all_coefficients(rule, {"w1": leaf}, gates, keep)["w1"]
        assert isinstance(rows.read, Decay)
        return update_rows(rows.write), rows.read.log, rows.read.eta
    read, write = unrolled(steps(rule, leaf, gates, keep).squeeze(-1), rule.read_at == "before")
    return write.unsqueeze(-1), read, None


def _every(given: Sequence[Tensor | None], starts: Sequence[Tensor]) -> int:
    """How many chunks apart kept states are, so that they add a quarter at most to what is kept of tokens; 0 if nothing
    is kept. States in between are cheap to make again: from the factors of their gradients, which are kept.
    """
    if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)):
        return 0
    k, start = given[1], starts[0]
    assert k is not None
    tokens = 3 * k.shape[2] * (start.shape[-1] + k.shape[3])
    return math.ceil(4 * 2 * start[0, 0].numel() / tokens)
