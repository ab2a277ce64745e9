"""The chunk engine: any rule that is linear in dual coordinates, C tokens at a time, equal to the token loop.

The scan over chunks only learns; reads do not depend on each other and are done for some chunks together. Where outer
gradients are wanted of much, the scan is `Scan`, which takes more time and far less memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from miras.algorithm import LinearAlgorithm
from miras.engines.learn import Key, Scan, Task
from miras.engines.ragged import cat, in_order, reassemble, running, split
from miras.engines.unroll import Coefficients, Ends, Read, Write, all_coefficients, read_chunks, write_chunk
from miras.gates import hole
from miras.layout import Grid, Layout, grid
from miras.retention import MirrorRetention
from miras.rule import Gates, Rule, State
from miras.weights import Leaf

# Tokens whose reads are done together: enough to keep a machine busy, few enough for a CPU's cache.
SEGMENT = 256
# Bytes that autograd may keep of one call; beyond that `Scan` computes things again.
LARGE: float = 1 << 30


def refuses(rule: Rule, gates: Gates | None = None, tokens: object = None) -> str | None:
    """Why this engine cannot run a rule, or None; it takes any gates."""
    del gates, tokens
    if not isinstance(rule.retention, MirrorRetention):
        return f"{rule.retention} is not linear in dual coordinates"
    if not isinstance(rule.algorithm, LinearAlgorithm):
        return f"{rule.algorithm} is not linear in the gradient"
    if rule.step_at == "chunk":
        return "the rule takes one step for a whole chunk"
    return None


def run(
    rule: Rule,
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    where: Layout,
    tile: int | None = None,
) -> tuple[Tensor, State]:
    """Same function as `recurrence`, a chunk at a time.

    Args:
        rule: the rule.
        state: where to go on from, N rows.
        q: queries [B, T, H, d_k]; k alike; v [B, T, H, d_v].
        k: keys.
        v: values.
        gates: {name: [B, T, H, 1 | D]}.
        where: the layout of the call.
        tile: tokens at a time, for a rule whose gradients do not depend on the memory: its chunk is then of no effect.

    Returns:
        y [B, T, H, d_v] and the state after each sequence's last token.
    """
    cells = grid(where, tile or rule.chunk, None if state.aligned else state.offset)
    if not (rule.algorithm.resets and cells.index is None and len(cells.sizes) > 1):
        return _run(rule, state, q, k, v, gates, cells)
    # Slots are zero where a chunk begins, so none is carried there, and only those of the last chunk are ever seen.
    bare, lengths = replace(state, slots=dict.fromkeys(state.slots, ())), [where.length - cells.chunk, cells.chunk]
    parts = zip(*(x.split(lengths, 1) for x in (q, k, v, *gates.values())), strict=True)
    outputs, after = [], bare
    for length, slots, (q, k, v, *seen) in zip(lengths, (bare.slots, state.slots), parts, strict=True):
        own = replace(cells, sizes=cells.sizes[: length // cells.chunk], shape=(where.batch, length))
        y, after = _run(rule, replace(after, slots=slots), q, k, v, dict(zip(gates, seen, strict=True)), own)
        outputs.append(y)
    return torch.cat(outputs, 1), after


def _run(rule: Rule, state: State, q: Tensor, k: Tensor, v: Tensor, gates: Gates, cells: Grid) -> tuple[Tensor, State]:
    """`run` on its chunks. A state without the algorithm's slots: these are zero where a chunk begins."""
    leaves = rule.leaves(q.shape[-1], v.shape[-1] // rule.window)
    # A hole's gates are those of a token that keeps everything, so that no formula meets 0 / 0 on its way to `where`.
    gates = {n: cells.slots(g, hole(n)) for n, g in gates.items()}
    coefficients = all_coefficients(rule, leaves, gates, cells.keep)
    if unseen := rule.algorithm.slots - len(next(iter(state.slots.values()))):
        coefficients = {n: c.without(unseen) for n, c in coefficients.items()}
    chunks = Write(cells.slots(k), cells.slots(v), gates, {n: c.write for n, c in coefficients.items()}, cells.keep)
    read = Read(cells.slots(q), {n: c.read for n, c in coefficients.items()})
    together = max(1, SEGMENT // cells.chunk)
    if _trains(rule, cells, state, coefficients, (q, k, v, *state.dual.values(), *state.home.values())):
        return _learn_and_read(rule, leaves, state, chunks, read, cells, together)

    writes, steps = split(chunks, cells.sizes), range(len(cells.sizes))
    segments = [steps[i : i + together] for i in steps[::together]]
    reads = split(read, [sum(cells.sizes[i] for i in segment) for segment in segments])
    state, finished, outputs = in_order(cells, state), [], []
    for segment, queries in zip(segments, reads, strict=True):
        learned = []
        for _, chunk in zip(segment, writes, strict=False):
            state = running(state, chunk.k.shape[0], finished)
            done, state = write_chunk(rule, leaves, state, chunk)
            learned.append(done)
        outputs.append(read_chunks(rule, leaves, cat(learned), queries))
    return cells.tokens(torch.cat(outputs)), reassemble(cells, state, finished)


def _trains(
    rule: Rule, cells: Grid, state: State, coefficients: dict[str, Coefficients], tensors: Sequence[Tensor]
) -> bool:
    """Whether `Scan` runs it: outer gradients of whole chunks from a chunk's start are wanted, gates are per head, and
    autograd would keep too much.
    """
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors) and _kept(state, cells) > LARGE
    whole = cells.index is None and state.aligned and len(cells.sizes) > 1
    per_head = all(isinstance(c.read, Tensor) and c.read.shape[-1] == 1 for c in coefficients.values())
    return wanted and whole and per_head and rule.gradient_at == "previous"


def _kept(state: State, cells: Grid) -> float:
    """About what plain autograd keeps, in bytes, as measured: 11 times the gradients' factors, 2.4 times the states."""
    chunks = sum(cells.sizes)
    factors = sum(a.shape[1] * (a.shape[-2] + a.shape[-1]) * a.element_size() for a in state.dual.values())
    states = sum(a[0].numel() * a.element_size() for a in state.dual.values())
    return chunks * (11 * cells.chunk * factors + 2.4 * states)


def _learn_and_read(
    rule: Rule, leaves: dict[str, Leaf], state: State, chunks: Write, read: Read, cells: Grid, together: int
) -> tuple[Tensor, State]:
    """All chunks by `Scan`."""
    given: dict[Key, Tensor] = {("q",): read.q, ("k",): chunks.k, ("v",): chunks.v}
    given |= {("gate", n): g for n, g in chunks.gates.items()}
    for n in leaves:
        ends, rows = chunks.coefficients[n], read.coefficients[n]
        assert isinstance(ends, Ends) and isinstance(rows, Tensor)  # `_trains` has seen to it
        given |= {("row", n, j): row.squeeze(-1) for j, row in enumerate((ends.dual, *ends.slots.unbind(-3)))}
        given["read", n] = rows
        given |= {("base", n, j): a for j, a in enumerate((state.dual[n], *state.slots[n]))}
    given |= {("home", n): a for n, a in state.home.items()} | {("slow", n): x for n, x in state.slow.items()}
    task = Task(rule, leaves, cells.sizes[0], together, tuple(given))
    y, *after = Scan.apply(task, *given.values())
    found = iter(after)
    bases = {n: [next(found) for _ in task.bases(n)] for n in leaves}
    dual, slots = {n: b[0] for n, b in bases.items()}, {n: tuple(b[1:]) for n, b in bases.items()}
    return cells.tokens(y), replace(state, dual=dual, slots=slots, origin=dual, aligned=True)
