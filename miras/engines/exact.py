"""Exact parallel forms of linear memories at chunk 1, a tile of tokens at a time.

* Dot product: the gradient does not depend on the memory, so the chunk engine with any chunk is exact.
* l_2 with one decay per head (DeltaNet, Gated DeltaNet): within a tile W_t = g_t W_0 + sum_{s<=t} (g_t / g_s) u_s k_s^T
  with u_t = eta_t (v_t - g'_t W_0 k_t - sum_{r<t} (g'_t / g_r) (k_r . k_t) u_r), g the cumulated decay, g' = g where
  gradients are taken at the decayed memory and g_{t-1} where they are taken at the previous one: a unit triangular
  system, solved for all tiles at once (the WY or UT form of arXiv 2406.06484 and 2412.06464).

A tile is an evaluation's block size; it does not change the function.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.algorithm import GradientDescent, LinearAlgorithm
from miras.bias import L2, Dot
from miras.engines import chunk
from miras.layout import Layout, grid
from miras.memory import Linear, Vector
from miras.retention import EuclideanRetention
from miras.rule import Gates, Rule, State
from miras.weights import matmul

TILE = 32


def refuses(rule: Rule, gates: Gates | None = None) -> str | None:
    """Why this engine cannot run a rule (with these gates), or None."""
    if rule.chunk != 1:
        return f"it is for chunk 1, the rule has chunk {rule.chunk}"
    if not isinstance(rule.memory, Linear | Vector):
        return f"it is for linear memories, not {rule.memory}"
    if not isinstance(rule.retention, EuclideanRetention):
        return f"{rule.retention} has a link"
    if isinstance(rule.bias, Dot) and isinstance(rule.algorithm, LinearAlgorithm) and not rule.bias.clip:
        return None
    if not isinstance(rule.memory, Linear) or not isinstance(rule.bias, L2) or rule.bias.clip:
        return f"it needs Dot, or Linear with L2 and no clip, not {rule.memory} with {rule.bias}"
    if not isinstance(rule.algorithm, GradientDescent) or rule.retention.to != "zero":
        return f"with L2 it needs GradientDescent and decay to zero, not {rule.algorithm} and {rule.retention}"
    if gates is not None and any(g.shape[-1] > 1 for g in gates.values()):
        return "with L2 it needs gates per head"
    return None


def run(rule: Rule, state: State, q: Tensor, k: Tensor, v: Tensor, gates: Gates, where: Layout) -> tuple[Tensor, State]:
    """Same contract as the chunk engine's `run`."""
    if isinstance(rule.bias, L2):
        return _delta(rule, state, q, k, v, gates, where)
    tiled = replace(rule, chunk=TILE, gradient_at="previous")
    # With chunk 1 every state stands at the start of a chunk.
    y, after = chunk.run(tiled, replace(state, origin=state.dual, aligned=True), q, k, v, gates, where)
    return y, replace(after, origin=after.dual, offset=state.offset, aligned=True)


def _delta(
    rule: Rule, state: State, q: Tensor, k: Tensor, v: Tensor, gates: Gates, where: Layout
) -> tuple[Tensor, State]:
    cells = grid(where, TILE, None)
    q, k, v = cells.slots(q), cells.slots(k), cells.slots(v)
    eta = cells.slots(gates["eta"])  # a hole has eta 0 and log alpha 0: nothing happens in it
    log_decay = cells.slots(gates["log_alpha"]).cumsum(-2) if "log_alpha" in gates else torch.zeros_like(eta)
    seen = log_decay if rule.gradient_at == "decayed" else F.pad(log_decay[..., :-1, :], (0, 0, 1, 0))

    def ratio(rows: Tensor, diagonal: int) -> Tensor:
        """exp(rows_t - log_decay_s) at and below a diagonal; masked before exp, which overflows above it."""
        lower = torch.ones(TILE, TILE, dtype=torch.bool, device=q.device).tril(diagonal)
        return (rows - log_decay.mT).masked_fill(~lower, -torch.inf).exp()

    system = torch.eye(TILE, dtype=q.dtype, device=q.device) + eta * ratio(seen, -1) * matmul(k, k.mT)
    both = torch.cat([eta * v, eta * seen.exp() * k], -1)
    written, erased = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True).split(
        [v.shape[-1], k.shape[-1]], -1
    )
    scores = ratio(log_decay, 0) * matmul(q, k.mT)
    q_decayed, last = log_decay.exp() * q, log_decay[..., -1:, :]
    k_decayed = (last - log_decay).exp() * k

    w = state.dual["w"] if cells.order is None else state.dual["w"].index_select(0, cells.order)
    outputs, finished, begin = [], [], 0
    for step, size in enumerate(cells.sizes):
        if step and size < cells.sizes[step - 1]:
            finished.append(w[size:])
            w = w[:size]
        here = slice(begin, begin + size)
        u = written[here] - matmul(erased[here], w.mT)
        outputs.append(matmul(q_decayed[here], w.mT) + matmul(scores[here], u))
        with torch.autocast(w.device.type, enabled=False):
            w = last[here].exp() * w + u.mT @ k_decayed[here]
        begin += size
    w = torch.cat([w, *reversed(finished)])
    dual = {"w": w if cells.order is None else w.index_select(0, torch.argsort(cells.order))}
    return cells.tokens(torch.cat(outputs)), replace(state, dual=dual, origin=dual)
